"""The memory bank of one object (SAM 2 paper, section 4; official `sam2_base.py`).

A bank has room for a fixed number of frames, so that one program serves every frame: nothing is
appended, and no shape depends on how much has been seen. Conditioning (prompted) frames are kept;
recent frames replace one another. Everything derives from the frame indices that the slots hold,
never from the order of writing. Functions here are for one object; the tracker vmaps them.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct

from sam2jax.config import SAM2Config
from sam2jax.types import EMPTY, Array, FrameMemory, MemoryRead

FAR = np.iinfo(np.int32).max // 2


class MemoryBank(struct.PyTreeNode):
    """Slots that are free hold the frame index EMPTY."""

    cond_frame: Array  # [C] int32, conditioning frames
    cond_spatial: Array  # [C, HW, D] bfloat16
    cond_pointer: Array  # [C, W] float32
    cond_iou: Array  # [C] float32, predicted IoU when written
    cond_score: Array  # [C] float32, object score when written
    recent_frame: Array  # [R] int32, recent frames
    recent_spatial: Array  # [R, HW, D] bfloat16
    pointer_frame: Array  # [P] int32, recent frames' pointers, which reach back further
    pointer: Array  # [P, W] float32
    pointer_iou: Array  # [P] float32
    pointer_score: Array  # [P] float32

    @property
    def has_memory(self) -> Array:
        """Whether a conditioning frame is held, without which nothing is tracked: [] bool."""
        return jnp.any(self.cond_frame != EMPTY, axis=-1)


def empty(config: SAM2Config, max_cond_frames: int) -> MemoryBank:
    """A bank that holds nothing, with room for `max_cond_frames` conditioning frames."""
    cells, width = config.feature_size**2, config.hidden_dim
    cond, recent, pointers = max_cond_frames, config.num_recent, config.num_recent_pointers

    def none(count: int) -> Array:
        return jnp.full(count, EMPTY, jnp.int32)

    return MemoryBank(
        cond_frame=none(cond),
        cond_spatial=jnp.zeros((cond, cells, config.mem_dim), jnp.bfloat16),
        cond_pointer=jnp.zeros((cond, width)),
        cond_iou=jnp.zeros(cond),
        cond_score=jnp.zeros(cond),
        recent_frame=none(recent),
        recent_spatial=jnp.zeros((recent, cells, config.mem_dim), jnp.bfloat16),
        pointer_frame=none(pointers),
        pointer=jnp.zeros((pointers, width)),
        pointer_iou=jnp.zeros(pointers),
        pointer_score=jnp.zeros(pointers),
    )


def read(
    config: SAM2Config, bank: MemoryBank, frame: Array, direction: Array, num_frames: Array
) -> MemoryRead:
    """What a frame attends to (official `_prepare_memory_conditioned_features`).

    Conditioning frames, past or future, all carry the last temporal encoding; recent ones the one
    of their place, so that a missing frame is skipped and shifts nothing. Pointers come from
    conditioning frames that are not in the future and from the last 15 frames.

    Args:
      config: of the model.
      bank: of one object.
      frame: [] int32.
      direction: [] int32, 1 forward or -1 in reverse time order.
      num_frames: [] int32, length of the clip, which pointer distances are divided by up to 16.
    """
    selected = _selected_cond_frames(config, bank, frame)
    spare = (bank.cond_frame != EMPTY) & ~selected  # may stand in for a recent frame

    # Spatial memories. Place 0 is the previous frame, place `num_recent` - 1 the oldest.
    wanted = _wanted_frames(config, frame, direction)
    recent_place, recent_valid = _find(bank.recent_frame, wanted)
    spare_place, spare_valid = _find(bank.cond_frame, wanted)
    tpos = jnp.concatenate([jnp.where(selected, config.num_maskmem - 1, spare_place), recent_place])
    valid = jnp.concatenate([selected | (spare & spare_valid), recent_valid])
    rank = jnp.concatenate([jnp.where(selected, bank.cond_frame - FAR, spare_place), recent_place])
    spatial_order, num_spatial = _in_order(valid, rank, _capacity(config, bank) + config.num_recent)
    spatial_frame = jnp.concatenate([bank.cond_frame, bank.recent_frame])[spatial_order]

    # Object pointers.
    longest = jnp.clip(num_frames, 2, config.max_obj_ptrs_in_encoder) - 1
    cond_distance = (frame - bank.cond_frame) * direction
    recent_distance = (frame - bank.pointer_frame) * direction

    def near(distance: Array) -> Array:
        return (distance >= 1) & (distance <= longest)

    seen = cond_distance >= 0
    if not config.only_obj_ptrs_in_the_past_for_eval:
        seen = jnp.ones_like(seen)
    distance = jnp.concatenate([cond_distance, recent_distance])
    valid = jnp.concatenate(
        [
            (selected & seen) | (spare & near(cond_distance)),
            (bank.pointer_frame != EMPTY) & near(recent_distance),
        ]
    )
    rank = jnp.concatenate([bank.cond_frame - FAR, recent_distance])
    order, num_pointers = _in_order(
        valid, rank, _capacity(config, bank) + config.num_recent_pointers
    )
    pointer_frame = jnp.concatenate([bank.cond_frame, bank.pointer_frame])[order]
    return MemoryRead(
        spatial=jnp.concatenate([bank.cond_spatial, bank.recent_spatial])[spatial_order],
        spatial_tpos=tpos[spatial_order],
        spatial_frame=_blank_past(spatial_frame, num_spatial),
        num_spatial=num_spatial,
        pointers=jnp.concatenate([bank.cond_pointer, bank.pointer])[order],
        pointer_position=distance[order] / longest.astype(jnp.float32),
        pointer_frame=_blank_past(pointer_frame, num_pointers),
        num_pointers=num_pointers,
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
    recent = recent & ~conditioning & ~jnp.any(bank.cond_frame == frame)

    distance = jnp.abs(bank.cond_frame - frame)
    cond = _slot(bank.cond_frame, frame, -distance) & conditioning

    # Between strides only the last frame is read; the others are told apart by age.
    age = -bank.recent_frame * direction
    between = bank.recent_frame % config.memory_temporal_stride_for_eval != 0
    slot = _slot(bank.recent_frame, frame, jnp.where(between, -FAR, -age)) & recent
    pointer = _slot(bank.pointer_frame, frame, bank.pointer_frame * direction) & recent

    def put(mask: Array, old: Array, new: Array) -> Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * new.ndim), new[None], old)

    def released(frames: Array) -> Array:
        return jnp.where(conditioning & (frames == frame), EMPTY, frames)

    return bank.replace(
        cond_frame=put(cond, bank.cond_frame, frame),
        cond_spatial=put(cond, bank.cond_spatial, memory.spatial),
        cond_pointer=put(cond, bank.cond_pointer, memory.pointer),
        cond_iou=put(cond, bank.cond_iou, memory.iou),
        cond_score=put(cond, bank.cond_score, memory.object_score),
        recent_frame=put(slot, released(bank.recent_frame), frame),
        recent_spatial=put(slot, bank.recent_spatial, memory.spatial),
        pointer_frame=put(pointer, released(bank.pointer_frame), frame),
        pointer=put(pointer, bank.pointer, memory.pointer),
        pointer_iou=put(pointer, bank.pointer_iou, memory.iou),
        pointer_score=put(pointer, bank.pointer_score, memory.object_score),
    )


def _capacity(config: SAM2Config, bank: MemoryBank) -> int:
    """Most conditioning frames that one frame attends to."""
    held, most = bank.cond_frame.shape[0], config.max_cond_frames_in_attn
    return held if most == -1 else min(held, most)


def _selected_cond_frames(config: SAM2Config, bank: MemoryBank, frame: Array) -> Array:
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


def _in_order(valid: Array, rank: Array, capacity: int) -> tuple[Array, Array]:
    """Indices of the valid entries by rank, cut to `capacity`, and how many are valid.

    Ranks come from frame indices, so that what is read, to the last bit, does not depend on which
    slot holds what.
    """
    order = jnp.argsort(jnp.where(valid, rank, FAR))[:capacity]
    return order, jnp.sum(valid, dtype=jnp.int32)


def _blank_past(frames: Array, count: Array) -> Array:
    return jnp.where(jnp.arange(frames.shape[0]) < count, frames, EMPTY)


def _slot(frames: Array, frame: Array, keep: Array) -> Array:
    """The slot to write `frame` to, one-hot: its own, else a free one, else the least of `keep`."""
    keep = jnp.where(frames == EMPTY, -FAR - 1, keep)
    keep = jnp.where(frames == frame, -FAR - 2, keep)
    return jnp.arange(frames.shape[0]) == jnp.argmin(keep)
