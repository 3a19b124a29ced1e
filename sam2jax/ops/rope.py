"""Rotary position encoding over the two axes of a feature map (official `position_encoding.py`).

The first half of a head's pairs turns with x, the second with y. Official weights interleave the
two members of a pair; we compute with all first members, then all second ones (`split_pairs`
brings a projection's columns into that order), since a product of queries and keys does not see
a common permutation.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from sam2jax.types import Array


@functools.lru_cache(maxsize=16)
def rope_table(size: int, dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [size * size, dim / 2] for a square map, row by row."""
    freqs = 1.0 / theta ** (np.arange(0, dim, 4, dtype=np.float32)[: dim // 4] / dim)
    y, x = np.divmod(np.arange(size * size), size)
    angles = np.concatenate([np.outer(x, freqs), np.outer(y, freqs)], axis=-1).astype(np.float32)
    return np.cos(angles), np.sin(angles)


def split_pairs(kernel: Array, num_heads: int) -> Array:
    """Reorders a projection's last axis, [..., heads * d]: first members of all pairs first."""
    pairs = kernel.reshape(*kernel.shape[:-1], num_heads, -1, 2)
    return jnp.swapaxes(pairs, -1, -2).reshape(kernel.shape)


def rotate(x: Array, table: tuple[np.ndarray, np.ndarray]) -> Array:
    """Rotates [..., T, d], in `split_pairs` order, by a table of T positions, in float32."""
    cos, sin = (t.reshape((1,) * (x.ndim - 2) + t.shape) for t in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.astype(x.dtype)
