"""A clip in one program: `step`, scanned."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sam2jax.memory.policy import SAM2 as SAM2_POLICY
from sam2jax.memory.policy import MemoryPolicy
from sam2jax.nn.sam2 import SAM2
from sam2jax.tracking.checks import check_frame, check_prompts, check_state
from sam2jax.tracking.state import TrackState, init_state
from sam2jax.tracking.step import (
    encode_frame,
    process_ahead,
    process_frame,
    scale_prompts,
    time_direction,
)
from sam2jax.types import CONDITIONING, EMPTY, NONE, Array, ClipPrompts, FrameOutput, Prompts


def track(
    model: SAM2,
    params: Any,
    frames: Array,
    prompts: Prompts | ClipPrompts | Mapping[int, Prompts] | None = None,
    state: TrackState | None = None,
    *,
    reverse: bool = False,
    policy: MemoryPolicy = SAM2_POLICY,
    explain: bool = False,
) -> tuple[TrackState, FrameOutput]:
    """Tracks through a clip, or a chunk of one, as one compiled program.

    Prompted frames that lie ahead of the first tracked one are encoded first, as the official
    predictor does, so that earlier frames see them.

    Args:
      model: static description, from `load`.
      params: its parameters.
      frames: uint8 [T, H, W, 3] RGB, or float [T, S, S, 3] resized and normalised; in order of
        time, also in reverse.
      prompts: by frame index; or those of the first frame to be tracked. Frames outside of this
        chunk are passed over (`condition` remembers them).
      state: where to continue; None: a new clip, whose first frame has index 0, with room for
        every prompted frame. `frames` begin at `state.frame_index`, or end there in reverse.
      reverse: from the last frame to the first.
      policy: what is remembered and attended to. One of several lineages answers at the end of
        the chunk, along the best of them, unless it is `online`.
      explain: the answers come with an `Explanation`: what was attended to, the candidates, and
        the policy's own state.

    Returns:
      The state for the next chunk, and the answers with a leading [T], in order of time.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
    """
    check_frame(model.config, frames, leading=1)
    num_frames = frames.shape[0]
    if isinstance(prompts, Mapping):
        prompts = ClipPrompts.make(prompts)
    if state is None:
        if prompts is None:
            raise ValueError("Nothing to track: give prompts, or a state that holds some.")
        one = prompts.prompts if isinstance(prompts, ClipPrompts) else prompts
        room = prompts.frames.shape[0] if isinstance(prompts, ClipPrompts) else 1
        first = num_frames - 1 if reverse else 0
        state = init_state(model, one.num_objects, num_frames, room, first, policy)
    check_state(model.config, state, policy)
    if isinstance(prompts, Prompts):
        check_prompts(model.config, prompts, state.num_objects)
        prompts = ClipPrompts(
            frames=state.frame_index[None], prompts=jax.tree.map(lambda x: x[None], prompts)
        )
        ahead = False
    elif prompts is not None:
        check_prompts(model.config, prompts.prompts, state.num_objects, leading=1)
        ahead = _any_ahead(prompts.frames, state.frame_index)
    else:
        ahead = False
    return _track(
        model, params, policy, frames, prompts, state, reverse=reverse, ahead=ahead, explain=explain
    )


def _any_ahead(frames: Array, first: Array) -> bool:
    """Whether a frame other than the first is prompted; True where that cannot be known yet."""
    if isinstance(frames, Tracer) or isinstance(first, Tracer):
        return True
    prompted = np.asarray(frames)
    return bool(np.any((prompted != np.asarray(first)) & (prompted != EMPTY)))


@partial(jax.jit, static_argnames=("model", "reverse", "ahead", "explain"))
def _track(model, params, policy, frames, prompts, state, *, reverse, ahead, explain):
    if ahead:
        state = _encode_all_ahead(model, params, policy, frames, prompts, state, reverse)

    direction = time_direction(reverse)

    def body(state: TrackState, frame: Array):
        now = None
        if prompts is not None:
            now = scale_prompts(model.config, _prompts_at(prompts, state.frame_index), frame)
        features = encode_frame(model, params, frame)
        state, result = process_frame(
            model, params, state, features, now, direction, policy, explain
        )
        kept = result.best(policy.lineages) if policy.online else result
        return state, (kept.output, kept.parent)

    state, (outputs, parents) = jax.lax.scan(body, state, frames, reverse=reverse)
    if not policy.online:
        outputs = _read_back(outputs, parents, policy.lineages, reverse)
    return state, outputs


def _read_back(outputs: FrameOutput, parents: Array, lineages: int, reverse: bool) -> FrameOutput:
    """From the lineages that are best at the end, back through what they went on from.

    Args:
      outputs: leading [T, N * P].
      parents: [T, N * P] int32, rows of the frame before.
      lineages: P.
      reverse: the frame before is the one after.

    Returns:
      Leading [T, N].
    """

    def back(rows: Array, item: tuple[FrameOutput, Array]):
        output, parent = item
        return parent[rows], jax.tree.map(lambda x: x[rows], output)

    best = jnp.arange(0, parents.shape[1], lineages, dtype=jnp.int32)
    return jax.lax.scan(back, best, (outputs, parents), reverse=not reverse)[1]


def _prompts_at(prompts: ClipPrompts, frame_index: Array) -> Prompts:
    """The prompts of one frame, of kind NONE where it has none."""
    match = prompts.frames == frame_index
    chosen = jax.tree.map(lambda x: x[jnp.argmax(match)], prompts.prompts)
    missing = ~jnp.any(match)
    chosen = chosen.replace(
        kind=jnp.where(missing, NONE, chosen.kind),
        num_points=jnp.where(missing, 0, chosen.num_points),
    )
    for flag in ("has_mask", "has_logits"):
        if getattr(chosen, flag) is not None:
            chosen = chosen.replace(**{flag: getattr(chosen, flag) & ~missing})
    return chosen


def _encode_all_ahead(
    model, params, policy, frames, prompts: ClipPrompts, state: TrackState, reverse
):
    """Remembers this chunk's prompted frames but the first, whose turn comes at once."""
    first_in_time = state.frame_index - (frames.shape[0] - 1 if reverse else 0)

    def body(state: TrackState, item):
        frame_index, now = item
        offset = frame_index - first_in_time
        inside = (offset >= 0) & (offset < frames.shape[0])
        due = inside & (frame_index != state.frame_index) & jnp.any(now.kind == CONDITIONING)

        def encode(state: TrackState) -> TrackState:
            features = encode_frame(model, params, frames[offset])
            scaled = scale_prompts(model.config, now, frames[offset])
            return process_ahead(model, params, state, features, scaled, frame_index, policy)[0]

        return jax.lax.cond(due, encode, lambda state: state, state), None

    return jax.lax.scan(body, state, (prompts.frames, prompts.prompts))[0]
