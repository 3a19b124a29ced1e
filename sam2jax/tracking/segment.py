"""From a frame's features to masks, and to what the memory encoder is given of them.

Pure functions over the boxes of the model, for N objects that share a frame; `step` and training
put them together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.nn.memory_attention import WATCHED
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.masks import stability_score
from sam2jax.ops.resize import resize_bilinear, resize_masks
from sam2jax.tracking.state import TrackState
from sam2jax.tree import Tree
from sam2jax.types import (
    CONDITIONING,
    NO_OBJ_SCORE,
    NONE,
    Array,
    ImageFeatures,
    MaskCandidates,
    MemoryRead,
    Prompts,
)

# A mask prompt is answered as it is, with these logits (official `_use_mask_as_output`).
MASK_SCALE, MASK_BIAS = 20.0, -10.0
# What the memory encoder is given of a mask: the same range.
MEMORY_SCALE, MEMORY_BIAS = 20.0, -10.0


class Answer(Tree):
    """The decoder's choice for N objects."""

    masks: Array  # [N, S/4, S/4] float32
    iou: Array  # [N]
    object_score: Array  # [N]
    pointer: Array  # [N, C]


class Attended(Tree):
    """Where the attention of N objects went, as in `Explanation`."""

    mass: Array  # [N, L, K]
    pointer_mass: Array  # [N, L, Q]
    maps: Array  # [N, K, H, W]


Run = Callable[..., Any]  # `run_model` of a model with its parameters


def run_model(
    model: SAM2,
    params: Any,
    method: str,
    *args: Any,
    dropout: Array | None = None,
    watch: bool = False,
) -> Any:
    """Runs one box of the model; `dropout` is a random key, for training alone. With `watch` also
    returns what memories received, of every layer."""
    rngs = None if dropout is None else {"dropout": dropout}
    run = partial(model.apply, {"params": params}, *args, method=method, rngs=rngs)
    return run(mutable=[WATCHED]) if watch else run()


def fit_mask_prompt(mask: Array, size: int) -> Array:
    """A mask prompt at the model's size, 0 or 1: [N, S, S]. One of that size is taken as it is."""
    if mask.shape[-2:] == (size, size):
        return mask.astype(jnp.float32)
    resized = resize_bilinear(mask[..., None], size, size, antialias=True)[..., 0]
    return (resized >= 0.5).astype(jnp.float32)


def condition_features(
    run: Run,
    state: TrackState,
    features: ImageFeatures,
    memory_read: MemoryRead,
    prompts: Prompts,
    watch: bool = False,
) -> tuple[Array, Attended | None]:
    """What the decoder sees of the frame, per object: [N, H, W, C]. With `watch` also where the
    attention went.

    A new conditioning frame is answered without memory, all others with it. A mask prompt is
    turned into a pointer from the bare features.
    """
    plain = run("without_memory", features.features)
    shape = (prompts.kind.shape[0], *plain.shape[1:])
    tracked = (prompts.kind != CONDITIONING) & state.bank.has_memory
    if prompts.has_mask is not None:
        tracked = tracked & ~prompts.has_mask

    def with_memory() -> tuple[Array, Attended | None]:
        found = run("condition_on_memory", features.features, memory_read, watch=watch)
        if not watch:
            return found, None
        return found[0], _attended(found[1], tracked, plain.shape[1:3])

    def without() -> tuple[Array, Attended | None]:
        bare = jnp.broadcast_to(plain, shape)
        if not watch:
            return bare, None
        shapes = jax.eval_shape(with_memory)[1]
        return bare, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    conditioned, attended = jax.lax.cond(jnp.any(tracked), with_memory, without)

    def pick(which: Array, one: Array, other: Array) -> Array:
        return jnp.where(which[:, None, None, None], one, other)

    conditioned = pick(tracked, conditioned, plain)
    if prompts.has_mask is not None:
        conditioned = pick(prompts.has_mask, features.features, conditioned)
    return conditioned, attended


def _attended(watched: Any, tracked: Array, size: tuple[int, ...]) -> Attended:
    """From what the layers have told; nothing for objects that are answered without memory."""
    layers = watched[WATCHED]["memory_attention"]
    found = [layers[f"layers_{i}"]["cross_attn_image"]["mass"][0] for i in range(len(layers))]
    spatial, pointers = (jnp.stack(part, axis=1) for part in zip(*found, strict=True))
    spatial = jnp.where(tracked[:, None, None, None], spatial, 0.0)
    pointers = jnp.where(tracked[:, None, None, None], pointers, 0.0)
    maps = jnp.mean(spatial, axis=1)
    return Attended(
        mass=jnp.mean(spatial, axis=-1),
        pointer_mass=jnp.mean(pointers, axis=-1),
        maps=maps.reshape(*maps.shape[:2], *size),
    )


def decode(
    run: Run,
    features: ImageFeatures,
    conditioned: Array,
    prompts: Prompts,
    mask: Array | None,
) -> MaskCandidates:
    """Runs the decoder once for all objects, whatever their prompts are."""
    dense, has_dense, num_points = None, None, prompts.num_points
    if prompts.logits is not None:
        dense, has_dense = prompts.logits, prompts.has_logits
    if mask is not None and prompts.has_mask is not None:
        has_mask, downsampled = prompts.has_mask, run("downsample_mask", mask)
        num_points = jnp.where(has_mask, 0, num_points)
        if dense is None or has_dense is None:
            dense, has_dense = downsampled, has_mask
        else:
            dense = jnp.where(has_mask[:, None, None], downsampled, dense)
            has_dense = has_dense | has_mask
    high_res = (features.high_res_s0, features.high_res_s1)
    return run(
        "decode_masks",
        conditioned,
        high_res,
        prompts.points,
        prompts.labels,
        num_points,
        dense,
        has_dense,
    )


def is_multimask(config: SAM2Config, prompts: Prompts) -> Array:
    """Whether one of the alternatives is taken, not the single mask: [N] bool. With at most one
    click it is, by the official options."""
    points = prompts.num_points
    multimask = (points >= config.multimask_min_pt_num) & (points <= config.multimask_max_pt_num)
    return multimask if prompts.has_mask is None else multimask & ~prompts.has_mask


def choose(
    run: Run,
    config: SAM2Config,
    candidates: MaskCandidates,
    prompts: Prompts,
    best: Array | None = None,
    present: Array | None = None,
) -> Answer:
    """Takes one mask per object (official `_forward_sam_heads` and `MaskDecoder.forward`).

    Where there is a choice the best of the alternatives, and its token; otherwise the single mask,
    or the best alternative where that is unstable, with the single mask's token either way.

    Args:
      run, config, candidates, prompts: of N objects.
      best: [N] int32, which alternative is the best; None: that with the highest predicted IoU.
      present: [N] bool, whether the object is in sight; None: as its score says.
    """
    if best is None:
        best = jnp.argmax(candidates.ious[:, 1:], axis=-1)
    if present is None:
        present = candidates.object_score > 0
    multimask = is_multimask(config, prompts)
    alternative = multimask
    if config.dynamic_multimask_via_stability:
        delta = config.dynamic_multimask_stability_delta
        stability = stability_score(candidates.masks[:, 0], delta)
        unstable = stability < config.dynamic_multimask_stability_thresh
        alternative = alternative | unstable
    mask_index = jnp.where(alternative, best + 1, 0)
    token_index = jnp.where(multimask, best + 1, 0)
    masks = jnp.take_along_axis(candidates.masks, mask_index[:, None, None, None], axis=1)[:, 0]
    token = jnp.take_along_axis(candidates.tokens, token_index[:, None, None], axis=1)[:, 0]
    return Answer(
        masks=jnp.where(present[:, None, None], masks, NO_OBJ_SCORE),
        iou=jnp.take_along_axis(candidates.ious, mask_index[:, None], axis=1)[:, 0],
        object_score=candidates.object_score,
        pointer=run("object_pointer", token, present),
    )


def answer_with_mask(run: Run, answer: Answer, mask: Array, has_mask: Array) -> Answer:
    """Puts mask prompts in the place of what was decoded (official `_use_mask_as_output`)."""
    size = answer.masks.shape[-1]
    logits = mask * MASK_SCALE + MASK_BIAS
    low_res = resize_bilinear(logits[..., None], size, size, antialias=True)[..., 0]
    present = jnp.any(mask > 0, axis=(1, 2))
    score = jnp.where(present, MASK_SCALE + MASK_BIAS, MASK_BIAS)
    pointer = run("absent_pointer", answer.pointer, present)
    return Answer(
        masks=jnp.where(has_mask[:, None, None], low_res, answer.masks),
        iou=jnp.where(has_mask, 1.0, answer.iou),
        object_score=jnp.where(has_mask, score, answer.object_score),
        pointer=jnp.where(has_mask[:, None], pointer, answer.pointer),
    )


def memory_weights(
    config: SAM2Config, masks: Array, shown: Array, prompts: Prompts, cut: Array | None = None
) -> Array:
    """What the memory encoder is given of the masks: [N, S, S] from -10 to 10.

    A tracked frame's mask goes in as it was decoded; a prompted one's as the user saw it, with
    its holes filled and, with the official post-processing, cut at zero. So are those where `cut`
    [N] bool says so.
    """
    size = config.image_size
    prompted = (prompts.kind != NONE)[:, None, None]
    high_res = resize_masks(jnp.where(prompted, shown, masks), (size, size))
    weights = jax.nn.sigmoid(high_res)
    cuts = [] if cut is None else [cut[:, None, None]]
    if config.binarize_mask_from_pts_for_mem_enc:
        cuts.append(prompted)
    for where in cuts:
        weights = jnp.where(where, (high_res > 0).astype(jnp.float32), weights)
    return weights * MEMORY_SCALE + MEMORY_BIAS
