"""SAM 2's own rule of what is kept and what is attended to (official `sam2_base.py`)."""

from __future__ import annotations

import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.memory.bank import (
    FAR,
    MemoryBank,
    Selected,
    becomes_recent,
    gather,
    put_cond,
    put_recent,
    release,
    slot_for,
)
from sam2jax.types import EMPTY, Array, FrameMemory, MemoryRead


def read(
    config: SAM2Config, bank: MemoryBank, frame: Array, direction: Array, num_frames: Array
) -> MemoryRead:
    """What a frame attends to (official `_prepare_memory_conditioned_features`).

    Args:
      config: of the model.
      bank: of one object.
      frame: [] int32.
      direction: [] int32, 1 forward or -1 in reverse time order.
      num_frames: [] int32, length of the clip, which pointer distances are divided by up to 16.
    """
    longest = longest_distance(config, num_frames)
    spatial = select_spatial(config, bank, frame, direction)
    pointers = select_pointers(config, bank, frame, direction, longest)
    return gather_selected(config, bank, spatial, pointers, longest)


def gather_selected(
    config: SAM2Config, bank: MemoryBank, spatial: Selected, pointers: Selected, longest: Array
) -> MemoryRead:
    """Reads what was selected, of which there is never more than the official rule reads."""
    most = _capacity(config, bank)
    num_spatial, num_pointers = most + config.num_recent, most + config.num_recent_pointers
    return gather(bank, spatial, num_spatial, pointers, num_pointers, longest)


def longest_distance(config: SAM2Config, num_frames: Array) -> Array:
    """How far back pointers are read, which their distances are divided by: [] int32."""
    return jnp.clip(num_frames, 2, config.max_obj_ptrs_in_encoder) - 1


def select_spatial(
    config: SAM2Config, bank: MemoryBank, frame: Array, direction: Array
) -> Selected:
    """Conditioning frames, past or future, all carry the last temporal encoding; recent ones the
    one of their place, so that a missing frame is skipped and shifts nothing."""
    selected = select_cond_frames(config, bank, frame)
    spare = (bank.cond_frame != EMPTY) & ~selected  # may stand in for a recent frame
    # Place 0 is the previous frame, place `num_recent` - 1 the oldest.
    wanted = _wanted_frames(config, frame, direction)
    recent_place, recent_valid = _find(bank.recent_frame, wanted)
    spare_place, spare_valid = _find(bank.cond_frame, wanted)
    cond_rank = jnp.where(selected, bank.cond_frame - FAR, spare_place)
    cond_place = jnp.where(selected, config.num_maskmem - 1, spare_place)
    return Selected(
        valid=jnp.concatenate([selected | (spare & spare_valid), recent_valid]),
        rank=jnp.concatenate([cond_rank, recent_place]),
        position=jnp.concatenate([cond_place, recent_place]),
    )


def select_pointers(
    config: SAM2Config, bank: MemoryBank, frame: Array, direction: Array, longest: Array
) -> Selected:
    """Pointers of conditioning frames that are not in the future, and of the last 15 frames."""
    selected = select_cond_frames(config, bank, frame)
    spare = (bank.cond_frame != EMPTY) & ~selected
    cond_distance = (frame - bank.cond_frame) * direction
    recent_distance = (frame - bank.pointer_frame) * direction

    def near(distance: Array) -> Array:
        return (distance >= 1) & (distance <= longest)

    seen = cond_distance >= 0
    if not config.only_obj_ptrs_in_the_past_for_eval:
        seen = jnp.ones_like(seen)
    cond_valid = (selected & seen) | (spare & near(cond_distance))
    recent_valid = (bank.pointer_frame != EMPTY) & near(recent_distance)
    return Selected(
        valid=jnp.concatenate([cond_valid, recent_valid]),
        rank=jnp.concatenate([bank.cond_frame - FAR, recent_distance]),
        position=jnp.concatenate([cond_distance, recent_distance]),
    )


def write(
    config: SAM2Config,
    bank: MemoryBank,
    memory: FrameMemory,
    direction: Array,
    *,
    conditioning: Array,
    recent: Array,
) -> MemoryBank:
    """Returns the bank with a frame's memory put in as a conditioning frame, a recent one, or not.

    A frame replaces itself. Otherwise a conditioning frame takes a free slot, or that of the
    conditioning frame furthest away in time; a recent frame takes the slot that no later frame
    will read. A frame is held as one or the other: what has become a conditioning frame leaves
    the recent ones, and a conditioning frame is not written as a recent one.

    Args:
      config: of the model.
      bank: of one object.
      memory: what the frame leaves behind.
      direction: [] int32, 1 forward or -1 in reverse time order.
      conditioning: [] bool, write it as a conditioning frame.
      recent: [] bool, write it as a recent frame.
    """
    frame = memory.frame
    recent = becomes_recent(bank, frame, recent, conditioning)
    # Between strides only the last frame is read; the others are told apart by age.
    age = -bank.recent_frame * direction
    between = bank.recent_frame % config.memory_temporal_stride_for_eval != 0
    slot = slot_for(bank.recent_frame, frame, jnp.where(between, -FAR, -age)) & recent
    pointer = slot_for(bank.pointer_frame, frame, bank.pointer_frame * direction) & recent
    bank = write_conditioning(bank, memory, conditioning)
    return put_recent(bank, slot, pointer, memory)


def write_conditioning(bank: MemoryBank, memory: FrameMemory, conditioning: Array) -> MemoryBank:
    """The bank with a frame's memory as that of a conditioning frame, where the flag [] says so."""
    distance = jnp.abs(bank.cond_frame - memory.frame)
    slot = slot_for(bank.cond_frame, memory.frame, -distance) & conditioning
    return put_cond(release(bank, memory.frame, conditioning), slot, memory)


def _capacity(config: SAM2Config, bank: MemoryBank) -> int:
    """Most conditioning frames that one frame attends to."""
    held, most = bank.cond_frame.shape[0], config.max_cond_frames_in_attn
    return held if most == -1 else min(held, most)


def select_cond_frames(config: SAM2Config, bank: MemoryBank, frame: Array) -> Array:
    """Which conditioning frames are attended to as such: [C] bool.

    All of them, or the nearest before `frame`, the nearest from it on, and then the nearest of the
    rest (official `select_closest_cond_frames`).
    """
    valid = bank.cond_frame != EMPTY
    if _capacity(config, bank) == bank.cond_frame.shape[0]:
        return valid
    distance = jnp.where(valid, jnp.abs(bank.cond_frame - frame), FAR)
    before = valid & (bank.cond_frame < frame)
    for side in (before, valid & ~before):
        nearest = jnp.min(jnp.where(side, distance, FAR))
        distance = jnp.where(side & (distance == nearest), EMPTY, distance)
    rank = jnp.argsort(jnp.argsort(distance))
    return valid & (rank < _capacity(config, bank))


def _wanted_frames(config: SAM2Config, frame: Array, direction: Array) -> Array:
    """Recent frames to attend to, the previous one first: [R] int32.

    With a stride r, the previous frame and then every r-th one from two frames back on.
    """
    stride = config.memory_temporal_stride_for_eval
    two_back = frame - 2 * direction
    # Floored in forward order, ceiled in reverse: the multiple of r at or beyond `two_back`.
    start = direction * ((direction * two_back) // stride) * stride
    steps = jnp.arange(config.num_recent - 1, dtype=jnp.int32)
    strided = start - direction * steps * stride
    # Indices below zero are no frames, and must not match EMPTY.
    frames = jnp.concatenate([(frame - direction)[None], strided])
    return jnp.where(frames < 0, -FAR, frames)


def _find(frames: Array, wanted: Array) -> tuple[Array, Array]:
    """Place in `wanted` of each frame, and whether it has one: [K], [K] bool."""
    match = frames[:, None] == wanted[None, :]
    return jnp.argmax(match, axis=1).astype(jnp.int32), jnp.any(match, axis=1)
