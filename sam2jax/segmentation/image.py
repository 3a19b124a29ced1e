"""One image, from pixels to masks, without memory (official `sam2_image_predictor.py`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sam2jax.checks import check_model, check_prompts
from sam2jax.config import SAM2Config
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.masks import stability_score
from sam2jax.ops.resize import preprocess_image
from sam2jax.types import Array, ImageFeatures, MaskCandidates, MaskPrediction, Prompts


def preprocess_images(model: SAM2, images: Array) -> Array:
    """Resizes and normalises, as everything that takes uint8 frames does by itself.

    Done beforehand where a gradient with respect to pixels is wanted, say. Points then are in
    pixels of the S x S image.

    Args:
      model: static description, from `load`.
      images: uint8 RGB [B, H, W, 3], or float [B, S, S, 3], which comes back as it is.

    Returns:
      float32 [B, S, S, 3]: scaled to [0, 1], resized bilinearly with antialiasing, less ImageNet's
      mean (0.485, 0.456, 0.406), over its standard deviation (0.229, 0.224, 0.225).

    Raises:
      ValueError, TypeError: it is no such array.
    """
    size = model.config.image_size
    _check_images(images, size)
    return preprocess_image(jnp.asarray(images), size)


def encode_image(model: SAM2, params: Any, images: Array) -> ImageFeatures:
    """Encodes images as one batch.

    Args:
      model: static description, from `load`.
      params: its parameters.
      images: uint8 RGB [B, H, W, 3], or float [B, S, S, 3] resized and normalised
        (`preprocess_images`).

    Returns:
      Features with a leading [B].

    Raises:
      ValueError, TypeError: it is no such array.
    """
    check_model(model, params)
    _check_images(images, model.config.image_size)
    return _encode_image(model, params, images)


def _check_images(images: Any, size: int) -> None:
    expected = f"uint8 RGB [B, H, W, 3], or float [B, {size}, {size}, 3] already normalised"
    shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
    if shape is None or dtype is None:
        raise TypeError(f"Expected images, {expected}; got a {type(images).__name__}.")
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"Expected images, {expected}; got shape {tuple(shape)}.")
    if jnp.issubdtype(dtype, jnp.floating):
        if shape[1:3] != (size, size):
            raise ValueError(f"Expected images, {expected}; got {dtype} of shape {tuple(shape)}.")
    elif dtype != jnp.uint8:
        raise TypeError(f"Expected images, {expected}; got {dtype}.")


def decode_masks(
    model: SAM2,
    params: Any,
    features: ImageFeatures,
    prompts: Prompts,
    *,
    multimask: bool = True,
    size: tuple[int, int] | None = None,
) -> MaskPrediction:
    """Segments what is prompted on an encoded image.

    Batches of images go through `jax.vmap` over features and prompts.

    Args:
      model: static description, from `load`.
      params: its parameters.
      features: of one image, from `encode_image`, with a leading [1] or without.
      prompts: of N objects: points, a box, or an earlier answer (`logits`) to improve on, or both.
        Their kind means nothing here, and a `mask` is refused.
      multimask: three masks per object; otherwise one, which is the best of the three where the
        single one is unstable, if the model's options say so.
      size: (height, width) of the image that points refer to; None: the model's S x S.

    Raises:
      ValueError, TypeError: prompts hold masks, or do not fit the model.
    """
    check_model(model, params)
    if prompts.mask is not None:
        raise ValueError("Images take earlier answers as mask prompts: give logits, not a mask.")
    check_prompts(model.config, prompts, prompts.num_objects)
    if features.features.ndim == 3:
        features = jax.tree.map(lambda x: x[None], features)
    return _decode_masks(model, params, features, prompts, multimask=multimask, size=size)


@partial(jax.jit, static_argnums=0)
def _encode_image(model, params, images):
    images = preprocess_image(images, model.config.image_size)
    return model.apply({"params": params}, images, method="encode_image")


@partial(jax.jit, static_argnames=("model", "multimask", "size"))
def _decode_masks(model, params, features, prompts, *, multimask, size):
    config = model.config
    height, width = size or (config.image_size, config.image_size)
    scale = jnp.asarray([config.image_size / width, config.image_size / height], jnp.float32)
    # Where there is no point at all, the decoder is given none, not even one that says so.
    num_points = jnp.where(prompts.num_points == 0, -1, prompts.num_points)
    candidates = model.apply(
        {"params": params},
        model.apply({"params": params}, features.features, method="without_memory"),
        (features.high_res_s0, features.high_res_s1),
        prompts.points * scale.reshape(1, 1, 2),
        prompts.labels,
        num_points,
        prompts.logits,
        prompts.has_logits,
        method="decode_masks",
    )
    if multimask:
        masks, ious = candidates.masks[:, 1:], candidates.ious[:, 1:]
    else:
        masks, ious = _single_mask(config, candidates)
    return MaskPrediction(masks=masks, ious=ious, object_score=candidates.object_score)


def _single_mask(config: SAM2Config, candidates: MaskCandidates) -> tuple[Array, Array]:
    """One mask of N objects: [N, 1, h, w], [N, 1]."""
    index = jnp.zeros(candidates.ious.shape[0], jnp.int32)
    if config.dynamic_multimask_via_stability:
        stability = stability_score(
            candidates.masks[:, 0], config.dynamic_multimask_stability_delta
        )
        best = jnp.argmax(candidates.ious[:, 1:], axis=-1).astype(jnp.int32) + 1
        index = jnp.where(stability < config.dynamic_multimask_stability_thresh, best, index)
    masks = jnp.take_along_axis(candidates.masks, index[:, None, None, None], axis=1)
    return masks, jnp.take_along_axis(candidates.ious, index[:, None], axis=1)
