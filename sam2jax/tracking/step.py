"""One frame, from pixels to masks and memory. The only place where a frame is processed."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sam2jax import memory as bank_ops
from sam2jax.config import SAM2Config
from sam2jax.memory.bank import MemoryBank
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.masks import fill_holes
from sam2jax.ops.resize import preprocess_image
from sam2jax.tracking.checks import check_frame, check_prompts, check_state
from sam2jax.tracking.segment import (
    Answer,
    answer_with_mask,
    choose,
    condition_features,
    decode,
    fit_mask_prompt,
    memory_weights,
    run_model,
)
from sam2jax.tracking.state import TrackState
from sam2jax.types import (
    CONDITIONING,
    NO_OBJ_SCORE,
    NONE,
    Array,
    FrameMemory,
    FrameOutput,
    ImageFeatures,
    MemoryRead,
    Prompts,
)

MAX_FED_BACK_LOGIT = 32.0  # of earlier answers beside clicks, as the official predictor has it


def step(
    model: SAM2,
    params: Any,
    state: TrackState,
    frame: Array,
    prompts: Prompts | None = None,
    *,
    reverse: bool = False,
) -> tuple[TrackState, FrameOutput]:
    """Answers one frame and remembers it.

    Pure; it is compiled once per shape when called directly, and composes with `jit`, `vmap`,
    `grad` and `scan`.

    Args:
      model: static description, from `load`.
      params: its parameters.
      state: from `init_state` or an earlier step.
      frame: uint8 [H, W, 3] RGB, or float [S, S, 3] resized and normalised.
      prompts: on this frame; None: track.
      reverse: the next frame is the one before this.

    Returns:
      The state for the next frame, and the masks on this one.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
    """
    check_state(model.config, state)
    check_frame(model.config, frame)
    if prompts is not None:
        check_prompts(model.config, prompts, state.num_objects)
    return _step(model, params, state, frame, prompts, reverse=reverse)


def condition(
    model: SAM2,
    params: Any,
    state: TrackState,
    frame: Array,
    prompts: Prompts,
    frame_index: int | Array,
) -> TrackState:
    """Remembers a prompted frame out of turn, typically one that lies ahead.

    The official predictor encodes all prompted frames before it tracks; the frames tracked after
    this see it, wherever it lies. When its turn comes, `step` is given the same prompts again.

    Args:
      model, params, state, frame: as in `step`.
      prompts: of kind CONDITIONING; objects without are left as they are.
      frame_index: of `frame`.

    Returns:
      The state with the frame in its banks; the frame to be processed next is the same.
    """
    check_state(model.config, state)
    check_frame(model.config, frame)
    check_prompts(model.config, prompts, state.num_objects)
    return _condition(model, params, state, frame, prompts, jnp.asarray(frame_index, jnp.int32))


@partial(jax.jit, static_argnames=("model", "reverse"))
def _step(model, params, state, frame, prompts, *, reverse):
    features = encode_frame(model, params, frame)
    if prompts is not None:
        prompts = scale_prompts(model.config, prompts, frame)
    direction = time_direction(reverse)
    state, output, _ = process_frame(model, params, state, features, prompts, direction)
    return state, output


@partial(jax.jit, static_argnames="model")
def _condition(model, params, state, frame, prompts, frame_index):
    features = encode_frame(model, params, frame)
    prompts = scale_prompts(model.config, prompts, frame)
    return process_ahead(model, params, state, features, prompts, frame_index)[0]


def time_direction(reverse: bool) -> Array:
    """1 forward, -1 in reverse: [] int32."""
    return jnp.int32(-1 if reverse else 1)


def encode_frame(model: SAM2, params: Any, frame: Array) -> ImageFeatures:
    """Features of one frame, [H, W, 3] or [S, S, 3] as in `step`."""
    return encode_frames(model, params, frame[None])


def encode_frames(model: SAM2, params: Any, frames: Array) -> ImageFeatures:
    """Features of several frames, encoded as one batch."""
    images = preprocess_image(frames, model.config.image_size)
    return run_model(model, params, "encode_image", images)


def scale_prompts(config: SAM2Config, prompts: Prompts, frame: Array) -> Prompts:
    """From pixels of the frame that prompts were given with to pixels of the model's image."""
    height, width = frame.shape[:2]
    scale = jnp.asarray([config.image_size / width, config.image_size / height], jnp.float32)
    return prompts.replace(points=prompts.points * scale.reshape(1, 1, 2))


def process_frame(
    model: SAM2,
    params: Any,
    state: TrackState,
    features: ImageFeatures,
    prompts: Prompts | None,
    direction: Array,
) -> tuple[TrackState, FrameOutput, FrameMemory]:
    """`step` on an encoded frame, with points in pixels of the model's image.

    It also returns what the frame leaves behind, for callers that keep history.
    """
    if prompts is None:
        prompts = Prompts.none(state.num_objects)
    output, memory = _answer_frame(model, params, state, features, prompts, direction)
    prompted = prompts.kind == CONDITIONING
    bank = write_banks(model.config, state, memory, direction, prompted, state.bank.has_memory)
    state = state.replace(bank=bank, frame_index=state.frame_index + direction)
    return state, output, memory


def process_ahead(
    model: SAM2,
    params: Any,
    state: TrackState,
    features: ImageFeatures,
    prompts: Prompts,
    frame_index: Array,
) -> tuple[TrackState, FrameOutput, FrameMemory]:
    """`condition` on an encoded frame; also returns the answer and what the frame leaves behind."""
    at_frame = state.replace(frame_index=frame_index)
    prompted = prompts.kind == CONDITIONING
    prompts = prompts.replace(kind=jnp.where(prompted, CONDITIONING, NONE))
    # Nothing but new conditioning frames: no memory is read.
    forgetful = at_frame.replace(
        bank=at_frame.bank.replace(cond_frame=jnp.full_like(at_frame.bank.cond_frame, -1))
    )
    output, memory = _answer_frame(model, params, forgetful, features, prompts, jnp.int32(1))
    never = jnp.zeros_like(prompted)
    bank = write_banks(model.config, at_frame, memory, jnp.int32(1), prompted, never)
    return state.replace(bank=bank), output, memory


def _answer_frame(
    model: SAM2,
    params: Any,
    state: TrackState,
    features: ImageFeatures,
    prompts: Prompts,
    direction: Array,
) -> tuple[FrameOutput, FrameMemory]:
    """A frame's answer and memory, as if each were to be written.

    Objects are independent given the frame's features. They are taken a few at a time, and those
    that have neither memory nor prompt cost nothing.
    """
    count, group = state.num_objects, model.config.objects_at_once
    group = max(size for size in range(1, count + 1) if count % size == 0 and size <= group)

    def answer(item: tuple[TrackState, Prompts]) -> tuple[FrameOutput, FrameMemory]:
        return _answer_group(model, params, *item, features, direction)

    def split(x: Array) -> Array:
        return x.reshape(count // group, group, *x.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(count, *x.shape[2:])

    shared = {"frame_index": state.frame_index, "num_frames": state.num_frames}
    bank, prompts = jax.tree.map(split, (state.bank, prompts))
    answers = jax.lax.map(
        lambda x: answer((TrackState(bank=x[0], **shared), x[1])), (bank, prompts)
    )
    return jax.tree.map(join, answers)


def _answer_group(model, params, state, prompts, features, direction):
    config = model.config
    memory_read = read_banks(config, state, direction)
    known = state.bank.has_memory | (prompts.kind != NONE)
    answer, spatial = jax.lax.cond(
        jnp.any(known),
        lambda: _segment(model, params, state, features, memory_read, prompts),
        lambda: _no_answer(config, state.num_objects),
    )
    output = FrameOutput(
        masks=jnp.where(known[:, None, None], answer.masks, NO_OBJ_SCORE),
        iou=jnp.where(known, answer.iou, 0.0),
        object_score=jnp.where(known, answer.object_score, NO_OBJ_SCORE),
        memory_frames=memory_read.spatial_frame,
        pointer_frames=memory_read.pointer_frame,
    )
    memory = FrameMemory(
        frame=jnp.broadcast_to(state.frame_index, known.shape),
        spatial=spatial,
        pointer=answer.pointer,
        iou=answer.iou,
        object_score=answer.object_score,
    )
    return output, memory


def _segment(model, params, state, features, memory_read, prompts) -> tuple[Answer, Array]:
    """From features to masks, with their holes filled, and to the spatial memory of them."""
    config = model.config
    run = partial(run_model, model, params)
    mask = None
    if prompts.mask is not None:
        mask = fit_mask_prompt(prompts.mask, config.image_size)
    if prompts.logits is not None:
        fed_back = jnp.clip(prompts.logits, -MAX_FED_BACK_LOGIT, MAX_FED_BACK_LOGIT)
        prompts = prompts.replace(logits=fed_back)
    conditioned = condition_features(run, state, features, memory_read, prompts)
    candidates = decode(run, features, conditioned, prompts, mask)
    answer = choose(run, config, candidates, prompts)
    if mask is not None:
        answer = answer_with_mask(run, answer, mask, prompts.has_mask)
    shown = answer.masks
    if config.fill_hole_area:
        shown = fill_holes(shown, config.fill_hole_area)
    weights = memory_weights(config, answer.masks, shown, prompts)
    spatial = run("encode_memory", features.features, weights, answer.object_score)
    return answer.replace(masks=shown), spatial


def _no_answer(config: SAM2Config, count: int) -> tuple[Answer, Array]:
    """Of the shapes that `_segment` returns."""
    answer = Answer(
        masks=jnp.zeros((count, config.mask_size, config.mask_size)),
        iou=jnp.zeros(count),
        object_score=jnp.zeros(count),
        pointer=jnp.zeros((count, config.hidden_dim)),
    )
    return answer, jnp.zeros((count, config.feature_size**2, config.mem_dim), jnp.bfloat16)


def read_banks(config: SAM2Config, state: TrackState, direction: Array) -> MemoryRead:
    """What each object's frame attends to; leading [N]."""
    return jax.vmap(bank_ops.read, in_axes=(None, 0, None, None, None))(
        config, state.bank, state.frame_index, direction, state.num_frames
    )


def write_banks(
    config: SAM2Config,
    state: TrackState,
    memory: FrameMemory,
    direction: Array,
    conditioning: Array,
    recent: Array,
) -> MemoryBank:
    """Each object's bank with the frame put in, as its two flags [N] say."""
    write = partial(bank_ops.write, config)

    def one(bank, frame_memory, conditioning, recent):
        return write(bank, frame_memory, direction, conditioning=conditioning, recent=recent)

    return jax.vmap(one)(state.bank, memory, conditioning, recent)
