"""An encoded frame, from features to masks and memory: what `step` does after encoding.

Objects are independent given the features; each goes through the policy's four functions and
through `segment`, where the boxes of the model are put together.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.memory.policy import SAM2 as SAM2_POLICY
from sam2jax.memory.policy import Choice, MemoryPolicy, Now, Seen
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.masks import fill_holes
from sam2jax.tracking.segment import (
    Answer,
    answer_with_mask,
    choose,
    condition_features,
    decode,
    fit_mask_prompt,
    is_multimask,
    memory_weights,
    run_model,
)
from sam2jax.tracking.state import TrackState
from sam2jax.tree import Tree
from sam2jax.types import (
    CONDITIONING,
    EMPTY,
    MAX_FED_BACK_LOGIT,
    NO_OBJ_SCORE,
    NONE,
    Array,
    Explanation,
    FrameMemory,
    FrameOutput,
    ImageFeatures,
    Prompts,
)


class FrameResult(Tree):
    """What came of a frame, for N objects of P lineages each: every field has a leading [N * P]."""

    output: FrameOutput
    memory: FrameMemory  # what the frame leaves behind, for callers that keep history
    parent: Array  # int32, the row before this frame that each row goes on from

    def best(self, lineages: int) -> FrameResult:
        """Of each object the first lineage, which is the best so far: leading [N]."""
        return self if lineages == 1 else jax.tree.map(lambda x: x[::lineages], self)


def process_frame(
    model: SAM2,
    params: Any,
    state: TrackState,
    features: ImageFeatures,
    prompts: Prompts | None,
    direction: Array,
    policy: MemoryPolicy = SAM2_POLICY,
    explain: bool = False,
) -> tuple[TrackState, FrameResult]:
    """`step` on an encoded frame, with points in pixels of the model's image."""
    if prompts is None:
        prompts = Prompts.none(state.num_objects)
    result, carried = _answer_frame(
        model, params, policy, state, features, prompts, direction, explain
    )
    bank = state.bank
    if state.lineages > 1:
        bank = jax.tree.map(lambda x: x[result.parent], bank)
    now = _now(model.config, state, prompts, direction)
    state = _remember(model.config, policy, state.replace(bank=bank, carried=carried), result, now)
    if result.output.explanation is not None:
        explained = result.output.explanation.replace(carried=state.carried)
        result = result.replace(output=result.output.replace(explanation=explained))
    return state.replace(frame_index=state.frame_index + direction), result


def process_ahead(
    model: SAM2,
    params: Any,
    state: TrackState,
    features: ImageFeatures,
    prompts: Prompts,
    frame_index: Array,
    direction: Array,
    policy: MemoryPolicy = SAM2_POLICY,
) -> tuple[TrackState, FrameResult]:
    """`condition` on an encoded frame; also returns what came of it."""
    at_frame = state.replace(frame_index=frame_index)
    prompted = prompts.kind == CONDITIONING
    prompts = prompts.replace(kind=jnp.where(prompted, CONDITIONING, NONE))
    # Nothing but new conditioning frames: no memory is read.
    forgetful = at_frame.replace(
        bank=at_frame.bank.replace(cond_frame=jnp.full_like(at_frame.bank.cond_frame, EMPTY))
    )
    result, _ = _answer_frame(model, params, policy, forgetful, features, prompts, direction)
    now = _now(model.config, forgetful, prompts, direction)
    kept = _remember(model.config, policy, at_frame, result, now)
    return state.replace(bank=kept.bank, carried=kept.carried), result


def _answer_frame(
    model: SAM2,
    params: Any,
    policy: MemoryPolicy,
    state: TrackState,
    features: ImageFeatures,
    prompts: Prompts,
    direction: Array,
    explain: bool = False,
) -> tuple[FrameResult, Any]:
    """A frame's answer, and memory as if it were to be written, and what the policy carries on.

    Objects are independent given the frame's features. They are taken a few at a time, the last
    group filled up with its last one, and groups without memory or prompt cost nothing.
    """
    count = state.num_objects
    groups = -(-count // model.config.objects_at_once)
    group = -(-count // groups)

    def answer(item: tuple[TrackState, Prompts]) -> tuple[FrameResult, Any]:
        return _answer_group(model, params, policy, *item, features, direction, explain)

    def split(x: Array) -> Array:
        missing = (groups * group - count) * (x.shape[0] // count)
        if missing:
            x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))])
        return x.reshape(groups, -1, *x.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[: count * x.shape[1] // group]

    held = jax.tree.map(split, (state.bank, state.carried, prompts))
    answers = jax.lax.map(lambda x: answer((state.replace(bank=x[0], carried=x[1]), x[2])), held)
    result, carried = jax.tree.map(join, answers)
    first = jnp.arange(count * state.lineages, dtype=jnp.int32) // (group * state.lineages)
    return result.replace(parent=result.parent + first * (group * state.lineages)), carried


def _answer_group(model, params, policy, state, prompts, features, direction, explain):
    config = model.config
    now = _now(config, state, prompts, direction)
    prompts = _per_lineage(prompts, state.lineages)
    memory_read = jax.vmap(policy.read, in_axes=(None, None, 0, 0, 0))(
        config, policy.settings, state.bank, state.carried, now
    )
    known = state.bank.has_memory | (prompts.kind != NONE)

    def segment():
        return _segment(model, params, policy, state, features, memory_read, prompts, now, explain)

    def leave():
        shapes = jax.eval_shape(segment)[-1] if explain else None
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return *_no_answer(config, state), nothing

    answer, spatial, parent, carried, explanation = jax.lax.cond(jnp.any(known), segment, leave)
    finite = ~known | _all_finite(answer, spatial)
    # A row that is broken goes on from itself.
    parent = jnp.where(finite, parent, jnp.arange(parent.shape[0], dtype=jnp.int32))
    seen = known & finite
    output = FrameOutput(
        masks=jnp.where(seen[:, None, None], answer.masks, NO_OBJ_SCORE),
        iou=jnp.where(seen, answer.iou, 0.0),
        object_score=jnp.where(seen, answer.object_score, NO_OBJ_SCORE),
        finite=finite,
        memory_frames=memory_read.spatial_frame[parent],
        pointer_frames=memory_read.pointer_frame[parent],
        explanation=explanation,
    )
    memory = FrameMemory(
        frame=jnp.where(finite, state.frame_index, EMPTY),
        spatial=jnp.where(finite[:, None, None], spatial, 0),
        pointer=jnp.where(finite[:, None], answer.pointer, 0.0),
        iou=jnp.where(finite, answer.iou, 0.0),
        object_score=jnp.where(finite, answer.object_score, NO_OBJ_SCORE),
    )

    carried = _where(seen, carried, state.carried)
    return FrameResult(output=output, memory=memory, parent=parent), carried


def _all_finite(*trees: Any) -> Array:
    """Whether a row's numbers all are: [N * P] bool."""
    return functools.reduce(
        jnp.logical_and,
        [jnp.all(jnp.isfinite(x), axis=range(1, x.ndim)) for x in jax.tree.leaves(trees)],
    )


def _where(rows: Array, new: Any, old: Any) -> Any:
    """The rows of one tree or of the other; leading [N * P]."""

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(rows.reshape(rows.shape + (1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(pick, new, old)


def _segment(model, params, policy, state, features, memory_read, prompts, now, explain):
    """From features to masks, with their holes filled, and to the spatial memory of them."""
    config = model.config
    run = partial(run_model, model, params)
    mask = None
    if prompts.mask is not None:
        mask = fit_mask_prompt(prompts.mask, config.image_size)
    if prompts.logits is not None:
        fed_back = jnp.clip(prompts.logits, -MAX_FED_BACK_LOGIT, MAX_FED_BACK_LOGIT)
        has_logits = prompts.has_logits & (prompts.kind != NONE)
        prompts = prompts.replace(logits=fed_back, has_logits=has_logits)
    conditioned, attended = condition_features(run, state, features, memory_read, prompts, explain)
    candidates = decode(run, features, conditioned, prompts, mask)
    choice, carried = _choose(config, policy, state, candidates, now)
    if state.lineages > 1:
        candidates = jax.tree.map(lambda x: x[choice.parent], candidates)
    answer = choose(run, config, candidates, prompts, choice.best, choice.present)
    if mask is not None:
        answer = answer_with_mask(run, answer, mask, prompts.has_mask)
    seen = Seen(
        alternatives=candidates.masks[:, 1:],
        chosen=choice.best,
        mask=answer.masks,
        iou=answer.iou,
        object_score=answer.object_score,
    )
    carried, cut = jax.vmap(policy.judge, in_axes=(None, None, 0, 0, 0))(
        config, policy.settings, carried, seen, now
    )
    shown = answer.masks
    if config.fill_hole_area:
        shown = fill_holes(shown, config.fill_hole_area)
    weights = memory_weights(config, answer.masks, shown, prompts, cut)
    spatial = run("encode_memory", features.features, weights, answer.object_score)
    explanation = None
    if attended is not None:
        rows = jax.tree.map(lambda x: x[choice.parent], (memory_read.spatial_tpos, attended))
        explanation = Explanation(
            tpos=rows[0],
            **vars(rows[1]),
            masks=candidates.masks,
            ious=candidates.ious,
            chosen=choice.best,
            lineage=choice.parent % state.lineages,
            carried=(),
        )
    return answer.replace(masks=shown), spatial, choice.parent, carried, explanation


def _choose(config, policy, state, candidates, now) -> tuple[Choice, Any]:
    """The policy's choice for each object, its lineages together; rows in, rows out."""
    lineages = state.lineages

    def split(x: Array) -> Array:
        return x.reshape(-1, lineages, *x.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    of_object = jax.tree.map(lambda x: x[::lineages], now)
    choice, carried = jax.vmap(policy.choose, in_axes=(None, None, 0, 0, 0))(
        config, policy.settings, *jax.tree.map(split, (state.carried, candidates)), of_object
    )
    choice, carried = jax.tree.map(join, (choice, carried))
    rows = jnp.arange(choice.parent.shape[0], dtype=jnp.int32)
    parent = choice.parent.astype(jnp.int32)  # with 64-bit types on, a policy's may be wider
    return choice.replace(parent=rows // lineages * lineages + parent), carried


def _no_answer(config: SAM2Config, state: TrackState):
    """Of the shapes that `_segment` returns, but for the explanation."""
    rows = state.bank.cond_frame.shape[0]
    answer = Answer(
        masks=jnp.zeros((rows, config.mask_size, config.mask_size), jnp.float32),
        iou=jnp.zeros(rows, jnp.float32),
        object_score=jnp.zeros(rows, jnp.float32),
        pointer=jnp.zeros((rows, config.hidden_dim), jnp.float32),
    )
    spatial = jnp.zeros((rows, config.feature_size**2, config.mem_dim), jnp.bfloat16)
    return answer, spatial, jnp.arange(rows, dtype=jnp.int32), state.carried


def _now(config: SAM2Config, state: TrackState, prompts: Prompts, direction: Array) -> Now:
    """What the policy is told of the frame; leading [N * P]."""
    rows = state.bank.cond_frame.shape[0]

    def spread(x: Array) -> Array:
        return jnp.broadcast_to(x, rows)

    def repeat(x: Array) -> Array:
        return jnp.repeat(x, state.lineages)

    return Now(
        frame=spread(state.frame_index),
        direction=spread(direction),
        num_frames=spread(state.num_frames),
        conditioning=repeat(prompts.kind == CONDITIONING),
        recent=state.bank.has_memory,
        multimask=repeat(is_multimask(config, prompts)),
    )


def _per_lineage(prompts: Prompts, lineages: int) -> Prompts:
    if lineages == 1:
        return prompts
    return jax.tree.map(lambda x: jnp.repeat(x, lineages, axis=0), prompts)


def _remember(
    config: SAM2Config, policy: MemoryPolicy, state: TrackState, result: FrameResult, now: Now
) -> TrackState:
    bank, carried = jax.vmap(policy.write, in_axes=(None, None, 0, 0, 0, 0))(
        config, policy.settings, state.bank, state.carried, result.memory, now
    )
    # A frame on which NaN or infinity arose leaves nothing behind, nor one that is passed over.
    written = result.output.finite & (now.conditioning | now.recent)
    bank, carried = _where(written, (bank, carried), (state.bank, state.carried))
    return state.replace(bank=bank, carried=carried)
