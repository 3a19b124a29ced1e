"""Separable resizing with PyTorch's conventions (half-pixel centres), as two matrix products.

`jax.image.resize` has another cubic kernel and antialiases by default, so the weights are ours.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from sam2jax.ops.linear import einsum
from sam2jax.types import Array

CUBIC_A = -0.75  # PyTorch's cubic kernel without antialiasing
MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]
STD = (0.229, 0.224, 0.225)


def resize_bilinear(x: Array, height: int, width: int, *, antialias: bool = False) -> Array:
    """[B, H, W, C] -> [B, height, width, C] in float32."""
    return _separable(x, height, width, "antialiased" if antialias else "linear")


def resize_bicubic(x: Array, height: int, width: int) -> Array:
    """[B, H, W, C] -> [B, height, width, C] in float32, clamped at the edges."""
    return _separable(x, height, width, "cubic")


def resize_masks(masks: Array, size: tuple[int, int]) -> Array:
    """Brings mask logits to a frame's size, bilinearly: [N, h, w] -> [N, H, W] float32.

    The official predictors resize without antialiasing, which matters where a frame is smaller
    than the mask. Leading axes may be many: [..., h, w].
    """
    height, width = size
    flat = masks.reshape(-1, *masks.shape[-2:], 1)
    return resize_bilinear(flat, height, width).reshape(*masks.shape[:-2], height, width)


def preprocess_image(image: Array, size: int) -> Array:
    """Brings frames [B, H, W, 3] to what the model takes: [B, size, size, 3] float32, normalised.

    uint8 frames are resized on floats with antialiasing, as the official image path does.
    Floating-point ones are taken to be resized and normalised already.
    """
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image.astype(jnp.float32)
    image = resize_bilinear(image.astype(jnp.float32) / 255.0, size, size, antialias=True)
    mean, std = (np.asarray(v, np.float32).reshape(1, 1, 1, 3) for v in (MEAN, STD))
    return (image - mean) / std


def bilinear_weights(source: int, target: int) -> np.ndarray:
    """Weights of source samples in target samples, as in `resize_masks`: [target, source]."""
    return _weights(source, target, "linear")


def blend_rows(x: Array, rows: Array, shares: Array) -> Array:
    """Rows as weighted sums of a few others: [..., h, W, C] -> [..., H, W, C].

    Args:
      x: what they are taken from.
      rows: [K, H] int32, which.
      shares: [K, H] float32, their weights.
    """
    shares = shares.reshape(len(shares), *[1] * (x.ndim - 3), -1, 1, 1)
    parts = [shares[k] * jnp.take(x, rows[k], axis=-3) for k in range(len(rows))]
    return functools.reduce(jnp.add, parts)


def _separable(x: Array, height: int, width: int, method: str) -> Array:
    x = x.astype(jnp.float32)
    if height < x.shape[1]:
        x = _resize_rows(x, height, method)  # first, since the columns' product is the larger work
    if x.shape[2] != width:
        x = einsum("ow,bhwc->bhoc", jnp.asarray(_weights(x.shape[2], width, method)), x)
    return x if x.shape[1] == height else _resize_rows(x, height, method)


def _resize_rows(x: Array, height: int, method: str) -> Array:
    # Reading a few whole rows is cheaper than a product with mostly zeros.
    return blend_rows(
        x, *(jnp.asarray(part) for part in taps(_weights(x.shape[1], height, method)))
    )


def taps(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same weights [target, source] as `blend_rows` takes them: rows and shares [K, target]."""
    count = int((weights != 0).sum(1).max())
    rows = np.argsort(weights == 0, axis=1, kind="stable")[:, :count]
    return rows.T.astype(np.int32), np.take_along_axis(weights, rows, axis=1).T


@functools.lru_cache(maxsize=8)  # of up to 16 MiB each, and more
def _weights(source: int, target: int, method: str) -> np.ndarray:
    """Weight of each source sample in each target sample: [target, source]."""
    scale = source / target
    centre = (np.arange(target) + 0.5) * scale  # in source pixels, from the edge
    if method == "antialiased" and scale > 1:
        distance = np.abs(np.arange(source)[None] + 0.5 - centre[:, None]) / scale
        weights = np.maximum(1 - distance, 0)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    weights = np.zeros((target, source))
    if method == "cubic":
        first, taps, kernel = np.floor(centre - 0.5).astype(int) - 1, 4, _cubic
    else:
        centre = np.maximum(centre, 0.5)
        first, taps, kernel = np.floor(centre - 0.5).astype(int), 2, _triangle
    for tap in range(taps):
        weight = kernel(np.abs(centre - 0.5 - (first + tap)))
        np.add.at(weights, (np.arange(target), np.clip(first + tap, 0, source - 1)), weight)
    return weights.astype(np.float32)


def _triangle(distance: np.ndarray) -> np.ndarray:
    return 1 - distance


def _cubic(distance: np.ndarray) -> np.ndarray:
    near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance**2 + 1
    far = CUBIC_A * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)
