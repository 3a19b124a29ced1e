"""Non-overlapping square windows of a feature map (official `backbones/utils.py`)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from sam2jax.types import Array


def window_partition(x: Array, size: int, outside: Array | None = None) -> Array:
    """[B, H, W, C] -> [B * windows, size, size, C].

    Where windows reach beyond the map they hold `outside` [C], or zeros.
    """
    batch, height, width, channels = x.shape
    pad_h, pad_w = -height % size, -width % size
    if pad_h or pad_w:
        x = jnp.pad(x, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
        if outside is not None:
            inside = (np.arange(height + pad_h) < height)[:, None] & (
                np.arange(width + pad_w) < width
            )
            # Widened first: gradients are summed in the dtype of `outside`.
            filling = jnp.broadcast_to(outside, x.shape).astype(x.dtype)
            x = jnp.where(inside[None, :, :, None], x, filling)
    rows, columns = (height + pad_h) // size, (width + pad_w) // size
    x = x.reshape(batch, rows, size, columns, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size, size, channels)


def window_unpartition(windows: Array, height: int, width: int) -> Array:
    """Inverse of `window_partition` for a map of height x width: [B, height, width, C]."""
    size, channels = windows.shape[1], windows.shape[-1]
    rows, columns = -(-height // size), -(-width // size)
    x = windows.reshape(-1, rows, columns, size, size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * size, columns * size, channels)
    return x[:, :height, :width]
