"""Boxes (x0, y0, x1, y1) around masks, and which of those that overlap to keep."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sam2jax.types import Array


def mask_boxes(masks: Array) -> Array:
    """The first and last column and row of each mask: [C, H, W] bool -> [C, 4] int32.

    Zeros for an empty mask (official `batched_mask_to_box`).
    """

    def span(inside: Array) -> tuple[Array, Array]:
        size = inside.shape[-1]
        index = jnp.arange(size, dtype=jnp.int32)[None]
        first = jnp.min(jnp.where(inside, index, size), axis=-1)
        return first, jnp.max(jnp.where(inside, index, -1), axis=-1)

    left, right = span(jnp.any(masks, axis=1))
    top, bottom = span(jnp.any(masks, axis=2))
    boxes = jnp.stack([left, top, right, bottom], axis=-1)
    return jnp.where((right < 0)[:, None], 0, boxes)


def non_maximum_suppression(boxes: Array, scores: Array, valid: Array, threshold: float) -> Array:
    """Keeps boxes in the order of their scores, without those that overlap with a better one.

    Args:
      boxes: [K, 4].
      scores: [K]; of equal ones the first is the better.
      valid: [K] bool, which boxes there are.
      threshold: IoU above which a box falls to a better one.

    Returns:
      [K] bool, those that are kept.
    """
    order = jnp.argsort(-scores, stable=True)
    sorted_boxes = boxes[order].astype(jnp.float32)
    x0, y0, x1, y1 = sorted_boxes.T
    area = (x1 - x0) * (y1 - y0)
    index = jnp.arange(len(order), dtype=jnp.int32)

    def suppress(place: Array, kept: Array) -> Array:
        width = jnp.minimum(x1, x1[place]) - jnp.maximum(x0, x0[place])
        height = jnp.minimum(y1, y1[place]) - jnp.maximum(y0, y0[place])
        shared = jnp.maximum(width, 0) * jnp.maximum(height, 0)
        overlap = shared / (area + area[place] - shared) > threshold
        return kept & ~(kept[place] & overlap & (index > place))

    kept = jax.lax.fori_loop(0, len(order), suppress, valid[order])
    return jnp.zeros_like(valid).at[order].set(kept)
