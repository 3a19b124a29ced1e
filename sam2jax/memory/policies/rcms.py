"""Reliable conditioning memory, of the MOSEv2 benchmark (arXiv 2508.05630)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from sam2jax.config import SAM2Config
from sam2jax.memory import official
from sam2jax.memory.bank import FAR, MemoryBank, Room, becomes_recent, put_recent, slot_for
from sam2jax.memory.policy import MemoryPolicy, Now, Seen, best_iou, official_read
from sam2jax.tree import Tree
from sam2jax.types import EMPTY, Array, FrameMemory


class Settings(Tree):
    threshold: Array  # of the reliability
    most: int = struct.field(pytree_node=False)  # frames that are promoted


class Carried(Tree):
    reliability: Array  # [] of the frame being processed
    recent: Array  # [R] bool, which slots hold reliable frames
    pointer: Array  # [P] bool
    lost: Array  # [] bool, whether the object has been out of sight


def rcms(threshold: float | Array = 0.6, most: int = 3) -> MemoryPolicy:
    """When an object is lost for the first time, its last reliable frames are kept for good.

    A frame's reliability is sigmoid(object score) x predicted IoU x the mean probability of the
    mask's pixels. All else is SAM 2's rule.

    Args:
      threshold: reliability above which a frame is reliable.
      most: frames that become conditioning frames (the release's code has 3, its text 4).
    """
    return MemoryPolicy(
        init=_init,
        read=official_read,
        choose=best_iou,
        judge=_judge,
        write=_write,
        settings=Settings(threshold=jnp.asarray(threshold, jnp.float32), most=most),
        room=Room(cond=most, recent=most, pointers=most),
    )


def _init(config: SAM2Config, settings: Settings, bank: MemoryBank) -> Carried:
    return Carried(
        reliability=jnp.zeros((), jnp.float32),
        recent=jnp.zeros_like(bank.recent_frame, bool),
        pointer=jnp.zeros_like(bank.pointer_frame, bool),
        lost=jnp.zeros((), bool),
    )


def _judge(
    config: SAM2Config, settings: Settings, carried: Carried, seen: Seen, now: Now
) -> tuple[Carried, Array]:
    inside = seen.mask > 0
    probability = jnp.sum(jnp.where(inside, jax.nn.sigmoid(seen.mask), 0.0))
    certainty = probability / jnp.maximum(jnp.sum(inside), 1).astype(jnp.float32)
    reliability = jax.nn.sigmoid(seen.object_score) * seen.iou * certainty
    return carried.replace(reliability=reliability), jnp.zeros((), bool)


def _write(
    config: SAM2Config,
    settings: Settings,
    bank: MemoryBank,
    carried: Carried,
    memory: FrameMemory,
    now: Now,
) -> tuple[MemoryBank, Carried]:
    tracked = becomes_recent(bank, memory.frame, now.recent, now.conditioning)
    lost = tracked & (memory.object_score <= 0)
    first = lost & ~carried.lost
    for _ in range(settings.most):
        bank = _promote(bank, carried, first, now.direction)

    def slot(frames: Array, reliable: Array, most: int) -> Array:
        reliable = reliable & (frames != EMPTY)
        age = (now.frame - frames) * now.direction
        needed = _among_newest(frames != EMPTY, age, most - 1)
        needed = needed | _among_newest(reliable, age, settings.most)
        return slot_for(frames, memory.frame, jnp.where(needed, 0, -FAR // 2) - age) & tracked

    spatial = slot(bank.recent_frame, carried.recent, config.num_recent)
    pointer = slot(bank.pointer_frame, carried.pointer, config.num_recent_pointers)
    reliable = carried.reliability > settings.threshold
    bank = official.write_conditioning(bank, memory, now.conditioning)
    return put_recent(bank, spatial, pointer, memory), carried.replace(
        recent=jnp.where(spatial, reliable, carried.recent),
        pointer=jnp.where(pointer, reliable, carried.pointer),
        lost=carried.lost | lost,
    )


def _among_newest(valid: Array, age: Array, most: int) -> Array:
    """Which slots are among the `most` valid ones of the least age: [K] bool."""
    newer = valid[None, :] & (age[None, :] < age[:, None])
    return valid & (jnp.sum(newer, axis=1) < most)


def _promote(bank: MemoryBank, carried: Carried, when: Array, direction: Array) -> MemoryBank:
    """Makes the newest reliable frame, if there is one, a conditioning frame."""
    reliable = carried.recent & (bank.recent_frame != EMPTY)
    newest = jnp.argmax(jnp.where(reliable, bank.recent_frame * direction, -FAR))
    frame = bank.recent_frame[newest]
    place = jnp.argmax(bank.pointer_frame == frame)
    memory = FrameMemory(
        frame=frame,
        spatial=bank.recent_spatial[newest],
        pointer=bank.pointer[place],
        iou=bank.recent_iou[newest],
        object_score=bank.recent_score[newest],
    )
    return official.write_conditioning(bank, memory, when & reliable[newest])
