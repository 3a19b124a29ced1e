"""A clip in one program: `step`, scanned."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sam2jax.checks import check_frame, check_model, check_prompts
from sam2jax.memory.policy import SAM2 as SAM2_POLICY
from sam2jax.memory.policy import MemoryPolicy
from sam2jax.nn.sam2 import SAM2
from sam2jax.tracking.frame import FrameResult, process_ahead, process_frame
from sam2jax.tracking.state import TrackState, check_carried, check_state, init_state
from sam2jax.tracking.step import encode_frame, encode_frames, scale_prompts, time_direction
from sam2jax.types import (
    CONDITIONING,
    EMPTY,
    NO_OBJ_SCORE,
    NONE,
    Array,
    ClipPrompts,
    FrameOutput,
    ImageFeatures,
    Prompts,
)


def track(
    model: SAM2,
    params: Any,
    frames: Array,
    prompts: Prompts | ClipPrompts | Mapping[int, Prompts] | None = None,
    state: TrackState | None = None,
    *,
    lengths: Array | None = None,
    reverse: bool = False,
    policy: MemoryPolicy = SAM2_POLICY,
    explain: bool = False,
    look_ahead: bool = True,
    frames_at_once: int = 1,
) -> tuple[TrackState, FrameOutput]:
    """Tracks through a clip, or a chunk of one, as one compiled program.

    Prompted frames that lie ahead of the first tracked one are encoded first, as the official
    predictor does, so that earlier frames see them.

    Several videos are tracked at once where frames have a leading [V]; prompts, state and answers
    then have it, too. Shorter ones are padded, and say so by `lengths`; videos with fewer objects
    have some that are never prompted (`Prompts.stack` pads). Answers are those of each alone, but
    for rounding.

    Args:
      model: static description, from `load`.
      params: its parameters.
      frames: uint8 [T, H, W, 3] RGB, or float [T, S, S, 3] resized and normalised; in order of
        time, also in reverse. [V, T, H, W, 3] for several videos.
      prompts: by frame index; or those of the first frame to be tracked. Frames outside of this
        chunk are passed over (`condition` remembers them).
      state: where to continue; None: a new clip of these frames, whose first one has index 0,
        with room for every prompted frame. For a clip in chunks give the first chunk a state, too:
        `init_state(..., num_frames=length of the whole clip)`. `frames` begin at
        `state.frame_index`, or end there in reverse.
      lengths: [V] int32, how many of these T frames are each of several videos' own; behind them
        nothing is answered or remembered.
      reverse: from the last frame to the first.
      policy: what is remembered and attended to. One that follows several lineages returns the
        history of the lineage that is best at the end of the chunk, or, if it is `online`, each
        frame's best so far.
      explain: the answers come with an `Explanation`: what was attended to, the candidates, and
        the policy's own state.
      look_ahead: whether prompted frames of this chunk are encoded first; False where `condition`
        has remembered them before.
      frames_at_once: how many frames are encoded as one batch; a divisor of T. With T and frames
        that are split over devices by time, each device encodes its own.

    Returns:
      The state for the next chunk, and the answers with a leading [T], in order of time.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
    """
    check_model(model, params)
    if getattr(frames, "ndim", 0) == 5:
        given = {
            "reverse": reverse,
            "policy": policy,
            "explain": explain,
            "look_ahead": look_ahead,
            "frames_at_once": frames_at_once,
        }
        return _track_videos(model, params, frames, prompts, state, lengths, **given)
    if lengths is not None:
        raise ValueError("lengths are for several videos, frames [V, T, H, W, 3].")
    check_frame(model.config, frames, leading=1)
    num_frames = frames.shape[0]
    _check_frames_at_once(num_frames, frames_at_once)
    if isinstance(prompts, Mapping):
        if state is None and not any(0 <= frame < num_frames for frame in prompts):
            raise ValueError(
                f"None of the prompted frames {list(prompts)} is one of the clip's {num_frames}."
            )
        prompts = ClipPrompts.make(prompts)
    if state is None:
        one, room = _of_a_frame(prompts)
        first = num_frames - 1 if reverse else 0
        state = init_state(model, one.num_objects, num_frames, room, first, policy)
    check_state(model.config, state, policy)
    if prompts is not None:
        one, room = _of_a_frame(prompts)
        leading = 1 if isinstance(prompts, ClipPrompts) else 0
        check_prompts(model.config, one, state.num_objects, leading=leading)
    prompts, ahead = _by_frame(prompts, state.frame_index)
    return _track(
        *(model, params, policy, frames, prompts, state),
        reverse=reverse,
        ahead=look_ahead and ahead,
        explain=explain,
        frames_at_once=frames_at_once,
    )


def _track_videos(
    model: SAM2,
    params: Any,
    frames: Array,
    prompts: Prompts | ClipPrompts | Mapping[int, Prompts] | None,
    states: TrackState | None,
    lengths: Array | None,
    *,
    reverse: bool,
    policy: MemoryPolicy,
    explain: bool,
    look_ahead: bool,
    frames_at_once: int,
) -> tuple[TrackState, FrameOutput]:
    """`track` on several videos, padded to one length; everything has a leading [V]."""
    check_frame(model.config, frames, leading=2)
    count, longest = frames.shape[:2]
    if isinstance(prompts, Mapping):
        raise TypeError(
            "Several videos take Prompts.stack of their first frames' prompts, or ClipPrompts with "
            "a leading [V]."
        )
    _check_videos(count, longest, prompts, states, lengths)
    _check_frames_at_once(longest, frames_at_once)
    if states is None:
        one, room = _of_a_frame(prompts)
        # In reverse the padding comes first, when nothing is known yet.
        first = longest - 1 if reverse else 0
        blank = init_state(model, one.num_objects, longest, room, first, policy)
        fresh: TrackState = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), blank
        )
        if lengths is not None:
            fresh = fresh.replace(num_frames=jnp.asarray(lengths, jnp.int32))
        states = fresh
    ends, starts = None, states.frame_index
    if lengths is not None:
        ends = starts - (longest - 1 if reverse else 0) + jnp.asarray(lengths, jnp.int32)
        starts = ends - 1 if reverse else starts
    prompts, ahead = _by_frame(prompts, starts)

    def one_video(frames: Array, prompts: ClipPrompts | None, state: TrackState, end: Any):
        check_state(model.config, state, policy)
        if prompts is not None:
            check_prompts(model.config, prompts.prompts, state.num_objects, leading=1)
        flags = {
            "reverse": reverse,
            "ahead": look_ahead and ahead,
            "explain": explain,
            "frames_at_once": frames_at_once,
        }
        return _track(model, params, policy, frames, prompts, state, end, **flags)

    return jax.vmap(one_video)(frames, prompts, states, ends)


def _check_videos(
    count: int, longest: int, prompts: Any, states: TrackState | None, lengths: Array | None
) -> None:
    for name, tree in (("prompts", prompts), ("state", states)):
        if any(jnp.shape(x)[:1] != (count,) for x in jax.tree.leaves(tree)):
            raise ValueError(
                f"Expected {name} with a leading [{count}], one for each video (Prompts.stack)."
            )
    if lengths is None:
        return
    if jnp.shape(lengths) != (count,):
        raise ValueError(f"Expected lengths [{count}], got {jnp.shape(lengths)}.")
    if not isinstance(lengths, Tracer):
        known = np.asarray(lengths)
        if known.min() < 0 or known.max() > longest:
            raise ValueError(f"lengths must be from 0 to {longest}, got {known.tolist()}.")


def _check_frames_at_once(num_frames: int, frames_at_once: int) -> None:
    if frames_at_once < 1 or (frames_at_once > 1 and num_frames % frames_at_once):
        raise ValueError(
            f"frames_at_once must divide the {num_frames} frames, got {frames_at_once}; pad them "
            "and give lengths, or track the rest by another call."
        )


def _of_a_frame(prompts: Prompts | ClipPrompts | None) -> tuple[Prompts, int]:
    """The prompts themselves, and how many frames they are for."""
    if prompts is None:
        raise ValueError("Nothing to track: give prompts, or a state that holds some.")
    if isinstance(prompts, ClipPrompts):
        return prompts.prompts, prompts.frames.shape[-1]
    return prompts, 1


def _by_frame(
    prompts: Prompts | ClipPrompts | None, first: Array
) -> tuple[ClipPrompts | None, bool]:
    """Prompts by frame, and whether a frame other than the first tracked may be prompted."""
    if prompts is None:
        return None, False
    if isinstance(prompts, ClipPrompts):
        return prompts, _any_ahead(prompts.frames, first)
    axis = first.ndim  # behind that of videos, if there is one
    single = jax.tree.map(lambda x: jnp.expand_dims(x, axis), prompts)
    return ClipPrompts(frames=jnp.expand_dims(first, axis), prompts=single), False


def _any_ahead(frames: Array, first: Array) -> bool:
    """Whether a frame other than the first is prompted; True where that cannot be known yet."""
    if isinstance(frames, Tracer) or isinstance(first, Tracer):
        return True
    prompted = np.asarray(frames)
    return bool(np.any((prompted != np.asarray(first)[..., None]) & (prompted != EMPTY)))


@partial(jax.jit, static_argnames=("model", "reverse", "ahead", "explain", "frames_at_once"))
def _track(
    model,
    params,
    policy,
    frames,
    prompts,
    state,
    end=None,
    *,
    reverse,
    ahead,
    explain,
    frames_at_once,
):
    """`end` [] int32: frames from there on are padding; None: there is none."""
    check_carried(model.config, state, policy)
    if ahead:
        state = _encode_all_ahead(model, params, policy, frames, prompts, state, end, reverse)

    direction = time_direction(reverse)

    def track_encoded(state: TrackState, features: ImageFeatures):
        now = None
        if prompts is not None:
            now = scale_prompts(model.config, _prompts_at(prompts, state.frame_index), frames[0])
        after, result = process_frame(
            model, params, state, features, now, direction, policy, explain
        )
        if end is not None:
            after, result = _unless_padding(state, after, result, end)
        kept = result.best(policy.lineages) if policy.online else result
        return after, (kept.output, kept.parent)

    def track_frame(state: TrackState, frame: Array):
        return track_encoded(state, encode_frame(model, params, frame))

    def track_batch(state: TrackState, batch: Array):
        features = encode_frames(model, params, batch)
        single = jax.tree.map(lambda x: x[:, None], features)
        return jax.lax.scan(track_encoded, state, single, reverse=reverse)

    if frames_at_once == 1:
        state, (outputs, parents) = jax.lax.scan(track_frame, state, frames, reverse=reverse)
    else:
        batches = frames.reshape(-1, frames_at_once, *frames.shape[1:])
        state, answers = jax.lax.scan(track_batch, state, batches, reverse=reverse)
        outputs, parents = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), answers)
    if not policy.online:
        outputs = _read_back(outputs, parents, policy.lineages, reverse)
    return state, outputs


def _unless_padding(before: TrackState, after: TrackState, result: FrameResult, end: Array):
    """Behind the end nothing is answered or remembered, and the state stays where it was."""
    inside = before.frame_index < end
    held = jax.tree.map(lambda new, old: jnp.where(inside, new, old), after, before)
    # In reverse the padding comes first, and is walked over.
    walked = inside | (after.frame_index < before.frame_index)
    index = jnp.where(walked, after.frame_index, before.frame_index)
    output = result.output
    rows = jnp.arange(result.parent.shape[0], dtype=jnp.int32)
    nothing = {
        "masks": NO_OBJ_SCORE,
        "iou": 0.0,
        "object_score": NO_OBJ_SCORE,
        "finite": True,
        "memory_frames": EMPTY,
        "pointer_frames": EMPTY,
    }
    absent = output.replace(
        **{name: jnp.where(inside, getattr(output, name), x) for name, x in nothing.items()},
        explanation=jax.tree.map(
            lambda x: jnp.where(inside, x, jnp.zeros_like(x)), output.explanation
        ),
    )
    result = result.replace(output=absent, parent=jnp.where(inside, result.parent, rows))
    return held.replace(frame_index=index), result


def _read_back(outputs: FrameOutput, parents: Array, lineages: int, reverse: bool) -> FrameOutput:
    """From the lineages that are best at the end, back through what they went on from.

    Each object's lineages are sorted, the best first (`Choice`).

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
    model, params, policy, frames, prompts: ClipPrompts, state: TrackState, end, reverse
):
    """Remembers this chunk's prompted frames but the first, whose turn comes at once."""
    earliest = state.frame_index - (frames.shape[0] - 1 if reverse else 0)
    end = earliest + frames.shape[0] if end is None else end
    first = end - 1 if reverse else state.frame_index
    direction = time_direction(reverse)

    def body(state: TrackState, item):
        frame_index, now = item
        inside = (frame_index >= earliest) & (frame_index < end)
        due = inside & (frame_index != first) & jnp.any(now.kind == CONDITIONING)

        def encode(state: TrackState) -> TrackState:
            frame = frames[frame_index - earliest]
            features = encode_frame(model, params, frame)
            scaled = scale_prompts(model.config, now, frame)
            return process_ahead(
                model, params, state, features, scaled, frame_index, direction, policy
            )[0]

        return jax.lax.cond(due, encode, lambda state: state, state), None

    return jax.lax.scan(body, state, (prompts.frames, prompts.prompts))[0]
