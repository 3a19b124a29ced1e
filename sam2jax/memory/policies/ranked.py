"""Memory of accepted frames alone: what the policies that filter frames have in common.

They walk back through all history and take the frames whose scores were good enough. Scores are
those of when a frame was written, so the last n accepted ones, and the previous frame, which is
always taken, are all that a bank has to hold.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.memory import official
from sam2jax.memory.bank import (
    FAR,
    MemoryBank,
    Selected,
    becomes_recent,
    first_prompted,
    put_recent,
    slot_for,
)
from sam2jax.memory.policy import Now
from sam2jax.tree import Tree
from sam2jax.types import EMPTY, Array, FrameMemory


class Accepted(Tree):
    """Which of a bank's slots hold accepted frames, beside the previous one."""

    start: Array  # [] int32, the first conditioning frame, or EMPTY
    count: Array  # [] int32, accepted so far, held or not
    recent: Array  # [R] bool
    pointer: Array  # [P] bool


def nothing_accepted(config: SAM2Config, settings: Any, bank: MemoryBank) -> Accepted:
    """As it is at the beginning."""
    return Accepted(
        start=jnp.full((), EMPTY, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        recent=jnp.zeros_like(bank.recent_frame, bool),
        pointer=jnp.zeros_like(bank.pointer_frame, bool),
    )


def tracked_for(accepted: Accepted, now: Now) -> Array:
    """How many frames a frame is after the first conditioning one: [] int32."""
    return (now.frame - accepted.start) * now.direction


def select_spatial(config: SAM2Config, bank: MemoryBank, accepted: Accepted, now: Now) -> Selected:
    """All conditioning frames, and the last six of the list, with their place in it."""
    cond = official.select_cond_frames(config, bank, now.frame)
    listed, place = _places(bank, bank.recent_frame, accepted.recent, now)
    return Selected(
        valid=jnp.concatenate([cond, listed & (place < config.num_recent)]),
        rank=jnp.concatenate([bank.cond_frame - FAR, place]),
        position=jnp.concatenate([jnp.full_like(bank.cond_frame, config.num_maskmem - 1), place]),
    )


def select_pointers(
    config: SAM2Config, bank: MemoryBank, accepted: Accepted, now: Now, longest: Array
) -> Selected:
    """Conditioning frames of the past, and the list but for its oldest, which the originals' loops
    leave out; the place in the list, from 1, stands for the distance in time.

    The list has at most `longest` accepted frames.
    """
    distance = (now.frame - bank.cond_frame) * now.direction
    cond = official.select_cond_frames(config, bank, now.frame) & (distance >= 0)
    listed, place = _places(bank, bank.pointer_frame, accepted.pointer, now)
    previous = now.frame - now.direction
    has_previous = jnp.any((bank.pointer_frame == previous) & accepted.pointer)
    length = jnp.minimum(accepted.count, longest) + ~has_previous
    valid = listed & (place + 1 < length) & (place < config.num_recent_pointers)
    return Selected(
        valid=jnp.concatenate([cond, valid]),
        rank=jnp.concatenate([bank.cond_frame - FAR, place]),
        position=jnp.concatenate([distance, place + 1]),
    )


def _places(bank: MemoryBank, frames: Array, accepted: Array, now: Now) -> tuple[Array, Array]:
    """Which slots are in the list, and their place in it, the newest first: [K] bool, [K] int32.

    The previous frame has the first place, and keeps it when it is a conditioning frame and so not
    among these.
    """
    previous = now.frame - now.direction
    listed = (frames != EMPTY) & (accepted | (frames == previous))
    age = (now.frame - frames) * now.direction
    newer = listed[None, :] & (age[None, :] < age[:, None])
    place = jnp.sum(newer, axis=1, dtype=jnp.int32)
    return listed, place + jnp.any(bank.cond_frame == previous)


def write(
    bank: MemoryBank,
    accepted: Accepted,
    memory: FrameMemory,
    now: Now,
    *,
    good: Array,
    good_pointer: Array,
) -> tuple[MemoryBank, Accepted]:
    """Puts a frame in as a conditioning or a recent one.

    What gives way is a frame that was not accepted, else the oldest. The flags [] bool say whether
    the frame is accepted, and whether its pointer is.
    """
    conditioning = now.conditioning
    recent = becomes_recent(bank, memory.frame, now.recent, conditioning)

    def slot(frames: Array, kept: Array) -> Array:
        age = (now.frame - frames) * now.direction
        return slot_for(frames, memory.frame, jnp.where(kept, 0, -FAR // 2) - age) & recent

    spatial = slot(bank.recent_frame, accepted.recent)
    pointer = slot(bank.pointer_frame, accepted.pointer)
    again = jnp.any(accepted.pointer & (bank.pointer_frame == memory.frame))
    count = accepted.count - again + (good_pointer & recent)
    bank = put_recent(
        official.write_conditioning(bank, memory, conditioning), spatial, pointer, memory
    )
    return bank, Accepted(
        start=first_prompted(accepted.start, memory.frame, now.direction, conditioning),
        count=jnp.maximum(count, 0),
        recent=jnp.where(spatial, good, accepted.recent & (bank.recent_frame != EMPTY)),
        pointer=jnp.where(pointer, good_pointer, accepted.pointer & (bank.pointer_frame != EMPTY)),
    )
