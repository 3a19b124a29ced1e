"""The memory bank of one object (SAM 2 paper, section 4): slots, and how they are read and written.

A bank has room for a fixed number of frames, so that one program serves every frame: nothing is
appended, and no shape depends on how much has been seen. What is kept and what is read is for a
`MemoryPolicy` to say. Everything derives from the frame indices that the slots hold, never from
the order of writing. Functions here are for one object; the tracker vmaps them.

In shapes C, R and P are numbers of slots: for conditioning frames, recent frames and recent
pointers. HW are the cells of a memory, D its width, W that of a pointer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sam2jax.config import SAM2Config
from sam2jax.tree import Tree
from sam2jax.types import EMPTY, Array, FrameMemory, MemoryRead

# Beyond any frame's index, and small enough that sums of two stay in int32. Conditioning frames are
# ranked `cond_frame - FAR`, before all recent ones.
FAR = np.iinfo(np.int32).max // 2


class MemoryBank(Tree):
    """Slots that are free hold the frame index EMPTY."""

    cond_frame: Array  # [C] int32, conditioning frames
    cond_spatial: Array  # [C, HW, D] bfloat16
    cond_pointer: Array  # [C, W] float32
    cond_iou: Array  # [C] float32, predicted IoU when written
    cond_score: Array  # [C] float32, object score when written
    recent_frame: Array  # [R] int32, recent frames
    recent_spatial: Array  # [R, HW, D] bfloat16
    recent_iou: Array  # [R] float32
    recent_score: Array  # [R] float32
    pointer_frame: Array  # [P] int32, recent frames' pointers, which reach back further
    pointer: Array  # [P, W] float32
    pointer_iou: Array  # [P] float32
    pointer_score: Array  # [P] float32

    @property
    def has_memory(self) -> Array:
        """Whether a conditioning frame is held, without which nothing is tracked: [] bool."""
        return jnp.any(self.cond_frame != EMPTY, axis=-1)

    @property
    def spatial_frame(self) -> Array:
        """[C + R] int32, frames whose spatial memory is held: conditioning ones, recent ones."""
        return jnp.concatenate([self.cond_frame, self.recent_frame], axis=-1)

    @property
    def pointed_frame(self) -> Array:
        """[C + P] int32, frames whose pointer is held: conditioning ones, recent ones."""
        return jnp.concatenate([self.cond_frame, self.pointer_frame], axis=-1)


class Room(NamedTuple):
    """Slots that a policy needs beside the official ones."""

    cond: int = 0
    recent: int = 0
    pointers: int = 0


NO_ROOM = Room()


def empty(config: SAM2Config, max_cond_frames: int, room: Room = NO_ROOM) -> MemoryBank:
    """A bank that holds nothing, with room for `max_cond_frames` prompted frames."""
    cells, width = config.feature_size**2, config.hidden_dim
    cond = max_cond_frames + room.cond
    recent = config.num_recent + room.recent
    pointers = config.num_recent_pointers + room.pointers

    def none(count: int) -> Array:
        return jnp.full(count, EMPTY, jnp.int32)

    return MemoryBank(
        cond_frame=none(cond),
        cond_spatial=jnp.zeros((cond, cells, config.mem_dim), jnp.bfloat16),
        cond_pointer=jnp.zeros((cond, width), jnp.float32),
        cond_iou=jnp.zeros(cond, jnp.float32),
        cond_score=jnp.zeros(cond, jnp.float32),
        recent_frame=none(recent),
        recent_spatial=jnp.zeros((recent, cells, config.mem_dim), jnp.bfloat16),
        recent_iou=jnp.zeros(recent, jnp.float32),
        recent_score=jnp.zeros(recent, jnp.float32),
        pointer_frame=none(pointers),
        pointer=jnp.zeros((pointers, width), jnp.float32),
        pointer_iou=jnp.zeros(pointers, jnp.float32),
        pointer_score=jnp.zeros(pointers, jnp.float32),
    )


# Reading ------------------------------------------------------------------------------------------


class Selected(Tree):
    """Which of K slots a frame attends to: conditioning ones first, recent ones behind them."""

    valid: Array  # [K] bool
    rank: Array  # [K] int32, the least is read first
    position: Array  # [K] int32, temporal position of a spatial memory, or distance of a pointer
    scale: Array | None = None  # [K] float32, by which keys are multiplied; None: 1


def gather(
    bank: MemoryBank,
    spatial: Selected,
    num_spatial: int,
    pointers: Selected,
    num_pointers: int,
    longest: Array,
) -> MemoryRead:
    """Reads the selected slots, of which there are at most so many, in order of rank.

    Ranks come from frame indices, so that what is read, to the last bit, does not depend on which
    slot holds what.

    Args:
      bank: of one object.
      spatial: of `bank.spatial_frame`.
      num_spatial: static, the most of them that are ever valid.
      pointers: of `bank.pointed_frame`.
      num_pointers: static, the most of them that are ever valid.
      longest: [] int32, what distances of pointers are divided by.
    """
    order, count = _in_order(spatial, num_spatial)
    pointer_order, pointer_count = _in_order(pointers, num_pointers)
    return MemoryRead(
        spatial=jnp.concatenate([bank.cond_spatial, bank.recent_spatial])[order],
        spatial_tpos=spatial.position[order],
        spatial_frame=_blank_past(bank.spatial_frame[order], count),
        num_spatial=count,
        pointers=jnp.concatenate([bank.cond_pointer, bank.pointer])[pointer_order],
        pointer_position=pointers.position[pointer_order] / longest.astype(jnp.float32),
        pointer_frame=_blank_past(bank.pointed_frame[pointer_order], pointer_count),
        num_pointers=pointer_count,
        spatial_scale=None if spatial.scale is None else spatial.scale[order],
        pointer_scale=None if pointers.scale is None else pointers.scale[pointer_order],
    )


def _in_order(selected: Selected, capacity: int) -> tuple[Array, Array]:
    """Indices of the valid entries by rank, cut to `capacity`, and how many are valid."""
    order = jnp.argsort(jnp.where(selected.valid, selected.rank, FAR))[:capacity]
    return order, jnp.sum(selected.valid, dtype=jnp.int32)


def _blank_past(frames: Array, count: Array) -> Array:
    return jnp.where(jnp.arange(frames.shape[0], dtype=jnp.int32) < count, frames, EMPTY)


# Writing ------------------------------------------------------------------------------------------


def slot_for(frames: Array, frame: Array, keep: Array) -> Array:
    """The slot to write `frame` to, one-hot: its own, else a free one, else the least of `keep`.

    `keep` [K] is int32; below -FAR - 2 a slot comes before its own and free ones.
    """
    keep = jnp.where(frames == EMPTY, -FAR - 1, keep)
    keep = jnp.where(frames == frame, -FAR - 2, keep)
    return jnp.arange(frames.shape[0], dtype=jnp.int32) == jnp.argmin(keep)


def becomes_recent(bank: MemoryBank, frame: Array, recent: Array, conditioning: Array) -> Array:
    """Whether `frame` is to be written as a recent one: [] bool. It is where there is memory
    (`recent`), but not as long as it is prompted itself, now or since an earlier turn."""
    return recent & ~conditioning & ~jnp.any(bank.cond_frame == frame)


def put_cond(bank: MemoryBank, slot: Array, memory: FrameMemory) -> MemoryBank:
    """The bank with a frame's memory in a conditioning slot; `slot` [C] bool is one-hot or none."""
    return bank.replace(
        cond_frame=put(slot, bank.cond_frame, memory.frame),
        cond_spatial=put(slot, bank.cond_spatial, memory.spatial),
        cond_pointer=put(slot, bank.cond_pointer, memory.pointer),
        cond_iou=put(slot, bank.cond_iou, memory.iou),
        cond_score=put(slot, bank.cond_score, memory.object_score),
    )


def put_recent(bank: MemoryBank, slot: Array, pointer: Array, memory: FrameMemory) -> MemoryBank:
    """The bank with a frame's memory in a recent slot [R] and a pointer slot [P]."""
    return bank.replace(
        recent_frame=put(slot, bank.recent_frame, memory.frame),
        recent_spatial=put(slot, bank.recent_spatial, memory.spatial),
        recent_iou=put(slot, bank.recent_iou, memory.iou),
        recent_score=put(slot, bank.recent_score, memory.object_score),
        pointer_frame=put(pointer, bank.pointer_frame, memory.frame),
        pointer=put(pointer, bank.pointer, memory.pointer),
        pointer_iou=put(pointer, bank.pointer_iou, memory.iou),
        pointer_score=put(pointer, bank.pointer_score, memory.object_score),
    )


def release(bank: MemoryBank, frame: Array, when: Array) -> MemoryBank:
    """The bank without `frame` among its recent ones, where `when` [] bool says so."""

    def freed(frames: Array) -> Array:
        return jnp.where(when & (frames == frame), EMPTY, frames)

    return bank.replace(
        recent_frame=freed(bank.recent_frame), pointer_frame=freed(bank.pointer_frame)
    )


def first_prompted(start: Array, frame: Array, direction: Array, conditioning: Array) -> Array:
    """The first conditioning frame in the order of time, or EMPTY, once `frame` is taken in.

    Frames that lie ahead are remembered before their turn: the first is not the first written.
    """
    earlier = (start == EMPTY) | ((frame - start) * direction < 0)
    return jnp.where(conditioning & earlier, frame, start)


def put(slot: Array, old: Array, new: Array) -> Array:
    """`old` [K, ...] with `new` [...] where `slot` [K] is true."""
    return jnp.where(slot.reshape(slot.shape + (1,) * new.ndim), new[None], old)
