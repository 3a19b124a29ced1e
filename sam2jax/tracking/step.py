"""One frame of pixels: encoded, answered and remembered. All tracking goes through here."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sam2jax.checks import check_frame, check_frame_index, check_model, check_prompts
from sam2jax.config import SAM2Config
from sam2jax.memory.policy import SAM2 as SAM2_POLICY
from sam2jax.memory.policy import MemoryPolicy
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.resize import preprocess_image
from sam2jax.tracking.frame import process_ahead, process_frame
from sam2jax.tracking.segment import run_model
from sam2jax.tracking.state import TrackState, check_carried, check_state
from sam2jax.types import Array, FrameOutput, ImageFeatures, Prompts


def step(
    model: SAM2,
    params: Any,
    state: TrackState,
    frame: Array,
    prompts: Prompts | None = None,
    *,
    reverse: bool = False,
    policy: MemoryPolicy = SAM2_POLICY,
    explain: bool = False,
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
      policy: what is remembered and attended to, the one that the state was made for.
      explain: the answer comes with an `Explanation`.

    Returns:
      The state for the next frame, and the masks on this one.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
    """
    check_model(model, params)
    check_state(model.config, state, policy)
    check_frame(model.config, frame)
    if prompts is not None:
        check_prompts(model.config, prompts, state.num_objects)
    return _step(model, params, policy, state, frame, prompts, reverse=reverse, explain=explain)


def condition(
    model: SAM2,
    params: Any,
    state: TrackState,
    frame: Array,
    prompts: Prompts,
    frame_index: int | Array,
    *,
    reverse: bool = False,
    policy: MemoryPolicy = SAM2_POLICY,
) -> TrackState:
    """Remembers a prompted frame out of turn, typically one that lies ahead.

    The official predictor encodes all prompted frames before it tracks; the frames tracked after
    this see it, wherever it lies. When its turn comes, `step` is given the same prompts again, and
    only then does the policy judge its answer.

    Args:
      model, params, state, frame: as in `step`.
      prompts: of kind CONDITIONING; objects without are left as they are.
      frame_index: of `frame`.
      reverse, policy: as in `step`.

    Returns:
      The state with the frame in its banks; the frame to be processed next is the same.
    """
    check_model(model, params)
    check_state(model.config, state, policy)
    check_frame(model.config, frame)
    check_prompts(model.config, prompts, state.num_objects)
    check_frame_index(frame_index)
    index = jnp.asarray(frame_index, jnp.int32)
    direction = time_direction(reverse)
    return _condition(model, params, policy, state, frame, prompts, index, direction)


@partial(jax.jit, static_argnames=("model", "reverse", "explain"))
def _step(model, params, policy, state, frame, prompts, *, reverse, explain):
    check_carried(model.config, state, policy)
    features = encode_frame(model, params, frame)
    if prompts is not None:
        prompts = scale_prompts(model.config, prompts, frame)
    direction = time_direction(reverse)
    state, result = process_frame(
        model, params, state, features, prompts, direction, policy, explain
    )
    return state, result.best(policy.lineages).output


@partial(jax.jit, static_argnames="model")
def _condition(model, params, policy, state, frame, prompts, frame_index, direction):
    check_carried(model.config, state, policy)
    features = encode_frame(model, params, frame)
    prompts = scale_prompts(model.config, prompts, frame)
    return process_ahead(model, params, state, features, prompts, frame_index, direction, policy)[0]


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
