"""Rotary position encoding over the two axes of a feature map (official `position_encoding.py`).

The first half of a head's pairs turns with x, the second with y. Official weights interleave the
two members of a pair; we compute with all first members, then all second ones (`split_pairs`
brings a projection's columns into that order), since a product of queries and keys does not see
a common permutation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam2jax.ops.attention import kernels_of_gpus
from sam2jax.ops.linear import linear
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


def rotate(x: Array, table: Sequence[Array | np.ndarray]) -> Array:
    """Rotates [..., T, d], in `split_pairs` order, by a table of T positions, in float32."""
    cos, sin = (t.reshape((1,) * (x.ndim - 2) + t.shape) for t in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.astype(x.dtype)


def project_and_rotate(
    x: Array,
    kernel: Array,
    bias: Array,
    table: Sequence[Array | np.ndarray],
    dtype: jnp.dtype,
    *,
    scale: float = 1.0,
    room: int = 0,
    in_one: bool = True,
) -> Array:
    """Projects maps to one head in `split_pairs` order, and rotates them.

    Args:
      x: [B, maps * P, I].
      kernel: [I, d], and bias: [d].
      table: for P positions.
      dtype: to compute in.
      scale: of the result.
      room: zeros that follow each row.
      in_one: in bfloat16 it is one kernel on NVIDIA GPUs.

    Returns:
      [B, maps * P + room, d] in `dtype`.
    """
    x, (cos, sin) = x.astype(dtype), map(jnp.asarray, table)
    kernels = kernels_of_gpus() if in_one and dtype == jnp.bfloat16 else None
    if kernels is None or not kernels.can_rotate(kernel, len(cos), room):
        return _project_then_rotate(x, kernel, bias, cos, sin, scale, room)
    return _project_and_rotate(x, kernel, bias, cos, sin, scale, room)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _project_and_rotate(
    x: Array, kernel: Array, bias: Array, cos: Array, sin: Array, scale: float, room: int
) -> Array:
    ways = {"cuda": kernels_of_gpus().project_and_rotate, "default": _project_then_rotate}
    ways = {name: functools.partial(way, scale=scale, room=room) for name, way in ways.items()}
    return lax.platform_dependent(x, kernel, bias, cos, sin, **ways)


_project_and_rotate.defvjp(
    lambda *given: (_project_and_rotate(*given), given[:5]),
    lambda scale, room, given, gradient: jax.vjp(
        functools.partial(_project_then_rotate, scale=scale, room=room), *given
    )[1](gradient),
)


def _project_then_rotate(
    x: Array, kernel: Array, bias: Array, cos: Array, sin: Array, scale: float, room: int
) -> Array:
    batch, rows, width = x.shape
    y = linear(x.reshape(batch, -1, len(cos), width), kernel, bias, x.dtype)
    y = (rotate(y, (cos, sin)) * scale).reshape(batch, rows, -1)
    return jnp.pad(y, ((0, 0), (0, room), (0, 0)))
