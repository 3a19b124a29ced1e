"""Position encodings (official `position_encoding.py` and `sam2_utils.get_1d_sine_pe`)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from sam2jax.ops.linear import einsum
from sam2jax.types import Array

TEMPERATURE = 10000.0


def _wavelengths(dim: int) -> np.ndarray:
    index = np.arange(dim, dtype=np.float32)
    return (TEMPERATURE ** (2 * (index // 2) / dim)).astype(np.float32)


@functools.lru_cache(maxsize=16)
def sine_2d(size: int, dim: int) -> np.ndarray:
    """Sinusoids of (y, x) on a square map, each axis half of `dim`: [size, size, dim]."""
    position = np.arange(1, size + 1, dtype=np.float32)
    position = position / (position[-1] + np.float32(1e-6)) * np.float32(2 * np.pi)
    angles = position[:, None] / _wavelengths(dim // 2)
    axis = np.stack([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=-1)
    axis = axis.reshape(size, dim // 2).astype(np.float32)
    y = np.broadcast_to(axis[:, None], (size, size, dim // 2))
    x = np.broadcast_to(axis[None, :], (size, size, dim // 2))
    return np.concatenate([y, x], axis=-1)


def sine_1d(position: Array, dim: int) -> Array:
    """Sines, then cosines, of scalar positions: [...] -> [..., dim]."""
    wavelengths = _wavelengths(dim // 2)
    angles = position[..., None] / wavelengths.reshape((1,) * position.ndim + (-1,))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def random_fourier(coords: Array, gaussian: Array) -> Array:
    """SAM's encoding of (x, y) in [0, 1]: [..., 2] x [2, F] -> [..., 2 F], in float32."""
    angles = 2 * np.pi * einsum("...i,if->...f", 2 * coords - 1, gaussian)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def pixel_centres(size: int) -> np.ndarray:
    """Centres of a square map's cells as (x, y) in [0, 1]: [size, size, 2]."""
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(centre, centre, indexing="xy")
    return np.stack([x, y], axis=-1)
