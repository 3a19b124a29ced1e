"""The compiled programs of a session.

Each is compiled once for a model and a size of video: for any number of clicks, either direction
in time and, up to a power of two, any number of objects and of prompted frames.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sam2jax.config import SAM2Config
from sam2jax.memory.bank import MemoryBank, empty, write
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.resize import resize_masks
from sam2jax.tracking.segment import fit_mask_prompt
from sam2jax.tracking.state import TrackState
from sam2jax.tracking.step import encode_frames, process_frame
from sam2jax.types import EMPTY, Array, FrameMemory, ImageFeatures, Prompts


class Record(struct.PyTreeNode):
    """One object's answer on one frame, and what it leaves behind."""

    masks: Array  # [S/4, S/4] float32 logits, holes filled
    memory: FrameMemory  # of one object, with the predicted IoU and the object score


@partial(jax.jit, static_argnums=0)
def encode(model: SAM2, params: Any, frames: Array) -> ImageFeatures:
    """Frames [K, H, W, 3] as one batch."""
    return encode_frames(model, params, frames)


@partial(jax.jit, static_argnums=0)
def answer_prompt(
    model: SAM2,
    params: Any,
    state: TrackState,
    features: ImageFeatures,
    prompts: Prompts,
    direction: Array,
) -> Record:
    """One object's answer to a prompt; the state, of that object alone, stays what it is."""
    _, output, memory = process_frame(model, params, state, features, prompts, direction)
    return jax.tree.map(lambda x: x[0], Record(masks=output.masks, memory=memory))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def track_frames(
    model: SAM2,
    params: Any,
    state: TrackState,
    features: ImageFeatures,
    busy: Array,
    direction: Array,
) -> tuple[TrackState, Record]:
    """Tracks N objects through K encoded frames.

    `busy` [K, N] bool: objects that are to be tracked on a frame. The others are passed over, at
    no cost: padding, and objects that are prompted there.

    Returns the state after the frames, and the answers with leading [K, N].
    """
    cond_frame = state.bank.cond_frame

    def remembering(state: TrackState, frames: Array) -> TrackState:
        return state.replace(bank=state.bank.replace(cond_frame=frames))

    def body(state: TrackState, item):
        features, busy = item
        features = jax.tree.map(lambda x: x[None], features)
        # An object without conditioning frames is not tracked.
        state = remembering(state, jnp.where(busy[:, None], cond_frame, EMPTY))
        state, output, memory = process_frame(model, params, state, features, None, direction)
        return state, Record(masks=output.masks, memory=memory)

    state, records = jax.lax.scan(body, state, (features, busy))
    return remembering(state, cond_frame), records


@jax.jit
def take(records: Record, frame: Array, place: Array) -> Record:
    """One object's answer on one frame, of `track_frames`."""
    return jax.tree.map(lambda x: x[frame, place], records)


@partial(jax.jit, static_argnums=1)
def at_size(masks: Array, size: tuple[int, int]) -> Array:
    """One object's mask logits [S/4, S/4] at the size of the video: [H, W]."""
    return resize_masks(masks[None], size)[0]


@partial(jax.jit, static_argnums=1)
def fit_mask(mask: Array, size: int) -> Array:
    """A mask prompt [h, w] at the model's size: [S, S] float32, 0 or 1."""
    return fit_mask_prompt(mask[None], size)[0]


empty_bank = jax.jit(empty, static_argnums=(0, 1))


@partial(jax.jit, static_argnums=0)
def remember(
    config: SAM2Config, bank: MemoryBank, memory: FrameMemory, direction: Array, conditioning: Array
) -> MemoryBank:
    """One object's bank with a frame's memory put in, as a conditioning or a recent one."""
    return write(config, bank, memory, direction, conditioning=conditioning, recent=~conditioning)


@jax.jit
def stack(*banks: MemoryBank) -> MemoryBank:
    """Banks of N objects, with a leading [N]."""
    return jax.tree.map(lambda *x: jnp.stack(x), *banks)
