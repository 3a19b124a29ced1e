"""Mask arithmetic: logits in, logits out."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sam2jax.types import Array

_MOST_STEPS = 32  # of flooding, one after the other
HOLE_SCORE = 0.1  # what a filled hole's logit becomes (official `fill_holes_in_mask_scores`)

AnyArray = TypeVar("AnyArray", Array, np.ndarray)


def stability_score(masks: Array, delta: float) -> Array:
    """IoU of a mask cut at +delta and at -delta: [..., H, W] -> [...]; 1 where both are empty."""
    inner = jnp.sum(masks > delta, axis=(-2, -1)).astype(jnp.float32)
    outer = jnp.sum(masks > -delta, axis=(-2, -1)).astype(jnp.float32)
    return jnp.where(outer > 0, inner / jnp.maximum(outer, 1.0), 1.0)


def fill_holes(masks: Array, max_area: int) -> Array:
    """Turns background regions of at most `max_area` pixels into foreground: [N, H, W].

    Regions are 8-connected, as in the official CUDA extension, which this replaces.
    """
    holes = jax.vmap(lambda mask: small_regions(mask, max_area))(masks <= 0)
    return jnp.where(holes, HOLE_SCORE, masks)


def fill_regions(
    masks: Array, hole_area: int, sprinkle_area: int, threshold: Array | float
) -> Array:
    """Fills small holes and removes small regions of images' masks: [N, H, W] logits.

    Both are looked for in the masks as they come (official `SAM2Transforms.postprocess_masks`).
    """
    out = masks
    for is_hole, area, score in ((True, hole_area, 10.0), (False, sprinkle_area, -10.0)):
        if area > 0:
            region = (masks <= threshold) if is_hole else (masks > threshold)
            small = jax.vmap(lambda mask, area=area: small_regions(mask, area))(region)
            out = jnp.where(small, threshold + score, out)
    return out


def small_regions(region: Array, max_area: int) -> Array:
    """Marks the 8-connected components of at most `max_area` pixels: [H, W] bool -> bool.

    The largest pixel index floods its component one step at a time. After `max_area` steps every
    component that small has one label; a larger one either has one too, and is counted, or still
    shows two labels side by side, and is recognised by that. Where that takes many steps all
    components are labelled to their ends instead.
    """
    height, width = region.shape
    count = height * width
    if max_area > _MOST_STEPS:
        label = _components(region)
    else:
        label = jnp.where(region, _indices(region), 0)
        label = jax.lax.fori_loop(
            0, max_area, lambda _, x: jnp.where(region, _neighbourhood_max(x), 0), label
        )
    spreading = region & (_neighbourhood_max(label) != label)
    flat = label.reshape(-1)
    area = jnp.zeros(count + 1, jnp.int32).at[flat].add(1)
    # The lower of two labels side by side belongs to a component that is still being flooded.
    unfinished = jnp.zeros(count + 1, bool).at[flat].max(spreading.reshape(-1))
    small = (area <= max_area) & ~unfinished
    return region & small[label]


def largest_component(region: Array) -> Array:
    """The 8-connected component of most pixels, of equal ones the first: [H, W] bool -> bool."""
    label = _components(region)
    area = jnp.zeros(label.size + 1, jnp.int32).at[label.reshape(-1)].add(1).at[0].set(0)
    first = jnp.argmax(area[label].reshape(-1))
    return region & (label == label.reshape(-1)[first])


def _indices(region: Array) -> Array:
    """Of pixels, from 1: [H, W] int32."""
    return jnp.arange(1, region.size + 1, dtype=jnp.int32).reshape(region.shape)


def _components(region: Array) -> Array:
    """The largest pixel index of each pixel's 8-connected component, 0 outside: [H, W] int32."""

    def spread(state: tuple[Array, Array]) -> tuple[Array, Array]:
        label, _ = state
        new = jnp.where(region, _neighbourhood_max(label), 0)
        # A label is also a pixel of its component, and may have heard of a greater one.
        jumped = jnp.where(region, new.reshape(-1)[new - 1], 0)
        return jumped, jnp.any(jumped != label)

    start = jnp.where(region, _indices(region), 0), jnp.any(region)
    return jax.lax.while_loop(lambda state: state[1], spread, start)[0]


def _neighbourhood_max(x: Array) -> Array:
    """Largest of the 3x3 pixels around each: [H, W]."""
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (1, 1)
        padded = jnp.pad(x, pad)
        size = x.shape[axis]
        parts = [jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3)]
        x = jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])
    return x


def non_overlapping(masks: AnyArray) -> AnyArray:
    """Leaves each pixel to the object that scores highest there: [N, H, W] logits.

    The others are pushed to -10 or below (official `_apply_non_overlapping_constraints`). NumPy
    arrays give NumPy arrays.
    """
    xp: Any = masks.__array_namespace__()
    winner = xp.argmax(masks, axis=0)[None] == xp.arange(masks.shape[0])[:, None, None]
    return xp.where(winner, masks, xp.minimum(masks, xp.asarray(-10.0, dtype=masks.dtype)))
