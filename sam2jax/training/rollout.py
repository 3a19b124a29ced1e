"""A clip tracked for training: prompts are simulated, and every answer is held against the truth.

The same boxes, bank and choices as in `tracking.frame`, with what training does otherwise
(official `SAM2Train`): conditioning frames come first, some frames get correction clicks, one
after another, and all answers on the way are supervised.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.memory import official as rule
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.resize import preprocess_image, resize_masks
from sam2jax.tracking import segment
from sam2jax.tracking.state import TrackState, init_state
from sam2jax.training.losses import LossConfig, Losses, mask_iou, prediction_losses
from sam2jax.training.prompts import Plan, PromptConfig, sample_box, sample_click
from sam2jax.tree import Tree
from sam2jax.types import (
    CONDITIONING,
    NO_OBJ_SCORE,
    NONE,
    Array,
    FrameMemory,
    ImageFeatures,
    MaskCandidates,
    MemoryRead,
    Prompts,
)

FORWARD = 1


class FrameItem(Tree):
    """One frame of a clip and what happens on it."""

    pixels: Array  # [S, S, 3] uint8
    target: Array  # [N, S, S] bool
    index: Array  # [] int32
    conditioning: Array  # [] bool
    points: Array  # [] bool
    box: Array  # [] bool
    corrected: Array  # [] bool
    from_truth: Array  # [K] bool
    prompt_key: Array  # random
    click_keys: Array  # [K + 1] random, of which the first is not used
    dropout_key: Array  # random


class Shown(Tree):
    """The answer so far, to be corrected and then remembered."""

    answer: segment.Answer
    high_res: Array  # [N, S, S] logits
    prompts: Prompts  # points so far


def training_config(config: SAM2Config) -> SAM2Config:
    """The same model with the inference options that the official code trains with."""
    return dataclasses.replace(
        config,
        dynamic_multimask_via_stability=False,
        binarize_mask_from_pts_for_mem_enc=False,
        fill_hole_area=0,
        max_cond_frames_in_attn=-1,
        memory_temporal_stride_for_eval=1,
        only_obj_ptrs_in_the_past_for_eval=False,
    )


def clip_losses(
    model: SAM2,
    params: Any,
    frames: Array,
    masks: Array,
    plan: Plan,
    key: Array,
    prompt_config: PromptConfig,
    loss_config: LossConfig,
    *,
    remat: bool = True,
) -> tuple[Losses, Array]:
    """Tracks one clip and compares.

    Args:
      model: with the options of `training_config`.
      params: its parameters.
      frames: [T, S, S, 3] uint8.
      masks: [T, N, S, S] bool, of N objects.
      plan: from `make_plan`.
      key: random, for prompts and dropout.
      prompt_config, loss_config: as in training.
      remat: compute a frame's intermediate values again for its gradient, so that the memory
        needed for a clip is that for one frame, and a bank for each. Without it frames are encoded
        together, ahead of the others' steps.

    Returns:
      Losses [T, N], summed over the answers on a frame, and the IoU [T, N] of its last answer; in
      the order of the plan.
    """
    num_frames, count = masks.shape[:2]
    room = max(prompt_config.max_cond_frames, prompt_config.max_corrected_frames)
    state = init_state(model, count, num_frames, max_cond_frames=min(room, num_frames))
    # Memories are rounded as they are written; what later frames send back adds up in float32.
    bank = state.bank
    state = state.replace(
        bank=bank.replace(
            cond_spatial=bank.cond_spatial.astype(jnp.float32),
            recent_spatial=bank.recent_spatial.astype(jnp.float32),
        )
    )

    def encode(pixels: Array, key: Array) -> ImageFeatures:
        images = preprocess_image(pixels, model.config.image_size)
        return segment.run_model(model, params, "encode_image", images, dropout=key)

    def body(state: TrackState, inputs: tuple[FrameItem, ImageFeatures | None]):
        item, features = inputs
        if features is None:
            features = encode(item.pixels[None], item.dropout_key)
        return _track_frame(
            model,
            params,
            state,
            item,
            features,
            prompt_config,
            loss_config,
            remat,
            last=num_frames == 1,
        )

    items, encoded = frame_items(frames, masks, plan, key), None
    if not remat:  # all frames at once; what each keeps for its gradient is kept anyway
        encoded = jax.tree.map(lambda x: x[:, None], encode(items.pixels, items.dropout_key[0]))
    return jax.lax.scan(jax.checkpoint(body) if remat else body, state, (items, encoded))[1]


def frame_items(frames: Array, masks: Array, plan: Plan, key: Array) -> FrameItem:
    """A clip's frames in the order of the plan: every field with a leading [T]."""
    num_frames, corrections = plan.from_truth.shape
    keys = jax.vmap(lambda one: jax.random.split(one, 3))(jax.random.split(key, num_frames))
    return FrameItem(
        pixels=jnp.asarray(frames)[plan.frame],
        target=jnp.asarray(masks)[plan.frame],
        index=plan.frame,
        conditioning=plan.conditioning,
        points=jnp.broadcast_to(plan.points, (num_frames,)),
        box=plan.box,
        corrected=plan.corrected,
        from_truth=plan.from_truth,
        prompt_key=keys[:, 0],
        click_keys=jax.vmap(lambda one: jax.random.split(one, corrections + 1))(keys[:, 1]),
        dropout_key=keys[:, 2],
    )


def _track_frame(
    model,
    params,
    state,
    item: FrameItem,
    features: ImageFeatures,
    prompt_config,
    loss_config,
    remat,
    *,
    last: bool,
):
    config, direction = model.config, jnp.int32(FORWARD)
    run = partial(segment.run_model, model, params, dropout=item.dropout_key)
    state = state.replace(frame_index=item.index)

    # With `remat` all of the frame is computed again, and without it the widest arrays.
    again = (lambda box: box) if remat else jax.checkpoint
    recall = again(lambda features, read: run("condition_on_memory", features, read))
    conditioned = jax.lax.cond(
        item.conditioning,
        lambda: _without_memory(run, features, item),
        lambda: recall(features.features, _read_banks(config, state, direction)).astype(
            jnp.float32
        ),
    )
    first = _fed_mask(run, first_prompts(item))

    def turn(shown: Shown, step):
        is_first, key, from_truth = step

        def answer():
            clicked = _with_click(key, from_truth, item.target, shown)
            prompts = jax.tree.map(partial(jnp.where, is_first), first, clicked)
            candidates = segment.decode(run, features, conditioned, prompts, None)
            return _show(run, config, loss_config, item, candidates, prompts)

        def leave():
            return shown, Losses.zeros(len(item.target))

        return jax.lax.cond(is_first | item.corrected, answer, leave)

    # One program for the first answer and for all corrections.
    corrections = len(item.from_truth)
    steps = (
        jnp.arange(corrections + 1, dtype=jnp.int32) == 0,
        item.click_keys,
        jnp.pad(item.from_truth, (1, 0)),
    )
    shown, losses = jax.lax.scan(
        jax.checkpoint(turn) if remat else turn, _nothing_shown(config, first), steps
    )
    losses = jax.tree.map(lambda x: jnp.sum(x, axis=0), losses)
    if not last:
        keep = item.conditioning
        if prompt_config.corrected_as_cond:
            keep = keep | item.corrected
        encode = again(lambda *given: run("encode_memory", *given))
        state = _remember(encode, config, state, features, shown, keep, direction)
    return state, (losses, mask_iou(shown.high_res > 0, item.target))


def first_prompts(item: FrameItem) -> Prompts:
    """What a frame starts with, for all of its N objects, and room for clicks to come."""
    count, size = item.target.shape[:2]
    corrections = len(item.from_truth)
    click_key, box_key = jax.random.split(item.prompt_key)
    click, label = sample_click(click_key, item.target, jnp.zeros_like(item.target))
    corners = sample_box(box_key, item.target)
    clicks = jnp.stack([click, jnp.zeros_like(click)], axis=1)
    number = jnp.where(item.conditioning & item.points, 1 + item.box.astype(jnp.int32), 0)
    label = jnp.where(item.box, jnp.asarray([[2, 3]], jnp.int32), label[:, None])
    return Prompts(
        points=jnp.pad(jnp.where(item.box, corners, clicks), ((0, 0), (0, corrections), (0, 0))),
        labels=jnp.pad(label, ((0, 0), (0, corrections))),
        num_points=jnp.broadcast_to(number, (count,)),
        kind=jnp.broadcast_to(jnp.where(item.conditioning, CONDITIONING, NONE), (count,)),
        mask=item.target.astype(jnp.float32),
        has_mask=jnp.broadcast_to(item.conditioning & ~item.points, (count,)),
        logits=jnp.zeros((count, size // 4, size // 4)),
        has_logits=jnp.zeros(count, bool),
    )


def _fed_mask(run: segment.Run, prompts: Prompts) -> Prompts:
    """The prompts with masks as the decoder takes them."""
    fed = run("downsample_mask", prompts.mask).astype(jnp.float32)
    return prompts.replace(logits=fed, has_logits=prompts.has_mask)


def _nothing_shown(config: SAM2Config, prompts: Prompts) -> Shown:
    count, size, width = len(prompts.kind), config.image_size, config.mask_size
    answer = segment.Answer(
        masks=jnp.zeros((count, width, width)),
        iou=jnp.zeros(count),
        object_score=jnp.zeros(count),
        pointer=jnp.zeros((count, config.hidden_dim)),
    )
    return Shown(answer=answer, high_res=jnp.zeros((count, size, size)), prompts=prompts)


def _with_click(key: Array, from_truth: Array, target: Array, shown: Shown) -> Prompts:
    """One more click on what is wrong, beside the mask as it is."""
    wrong = (shown.high_res > 0) & ~from_truth
    click, label = sample_click(key, target, wrong)
    prompts, place = shown.prompts, shown.prompts.num_points[0]
    return prompts.replace(
        points=prompts.points.at[:, place].set(click),
        labels=prompts.labels.at[:, place].set(label),
        num_points=prompts.num_points + 1,
        logits=shown.answer.masks,
        has_logits=jnp.ones_like(prompts.num_points, dtype=bool),
    )


def _without_memory(run, features: ImageFeatures, item: FrameItem) -> Array:
    """What the decoder sees of a conditioning frame: [N, H, W, C]. Masks go in beside the bare
    features."""
    bare = features.features.astype(jnp.float32)
    seen = jnp.where(item.points, run("without_memory", features.features), bare)
    return jnp.broadcast_to(seen, (item.target.shape[0], *seen.shape[1:]))


def _show(
    run: segment.Run,
    config: SAM2Config,
    loss_config: LossConfig,
    item: FrameItem,
    candidates: MaskCandidates,
    prompts: Prompts,
) -> tuple[Shown, Losses]:
    """Takes a mask for each object, and compares: all alternatives where there are some."""
    size = (config.image_size, config.image_size)
    answer = segment.choose(run, config, candidates, prompts)
    given = jnp.asarray(prompts.has_mask)
    answer = segment.answer_with_mask(run, answer, jnp.asarray(prompts.mask), given)
    as_logits = jnp.asarray(prompts.mask) * segment.MASK_SCALE + segment.MASK_BIAS
    high_res = jnp.where(given[:, None, None], as_logits, resize_masks(answer.masks, size))

    # Of masks at full size nothing is kept for the gradient: they are the largest arrays by far.
    @jax.checkpoint
    def compare(masks: Array, ious: Array, score: Array) -> Losses:
        masks = jnp.where(given[:, None, None, None], as_logits[:, None], resize_masks(masks, size))
        return prediction_losses(loss_config, masks, ious, score, item.target)

    def alternatives() -> Losses:
        present = (candidates.object_score > 0)[:, None, None, None]
        masks = jnp.where(present, candidates.masks[:, 1:], NO_OBJ_SCORE)
        return compare(masks, candidates.ious[:, 1:], candidates.object_score)

    def single() -> Losses:
        return compare(answer.masks[:, None], answer.iou[:, None], answer.object_score)

    # The same for all objects of a frame.
    points = prompts.num_points[0]
    multimask = (points >= config.multimask_min_pt_num) & (points <= config.multimask_max_pt_num)
    losses = jax.lax.cond(multimask & ~given[0], alternatives, single)
    return Shown(answer=answer, high_res=high_res, prompts=prompts), losses


def _remember(encode, config, state, features, shown: Shown, conditioning, direction) -> TrackState:
    answer = shown.answer
    weights = jax.nn.sigmoid(shown.high_res) * segment.MEMORY_SCALE + segment.MEMORY_BIAS
    count = state.num_objects
    memory = FrameMemory(
        frame=jnp.broadcast_to(state.frame_index, (count,)),
        spatial=encode(features.features, weights, answer.object_score),
        pointer=answer.pointer,
        iou=answer.iou,
        object_score=answer.object_score,
    )

    def write(bank, memory):
        flags = {"conditioning": conditioning, "recent": ~conditioning}
        return rule.write(config, bank, memory, direction, **flags)

    return state.replace(bank=jax.vmap(write)(state.bank, memory))


def _read_banks(config, state: TrackState, direction: Array) -> MemoryRead:
    return jax.vmap(rule.read, in_axes=(None, 0, None, None, None))(
        config, state.bank, state.frame_index, direction, state.num_frames
    )
