"""Windows of a feature map, side by side, that do not overlap (official `backbones/utils.py`)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from sam2jax.types import Array


def window_partition(
    x: Array, window: tuple[int, int], num_heads: int, outside: Array | None = None
) -> Array:
    """[B, H, W, heads * d] -> [B * windows * heads, tokens of a window, d].

    Where windows reach beyond the map they hold `outside` [heads * d], or zeros.
    """
    batch, height, width, _ = x.shape
    pad_h, pad_w = -height % window[0], -width % window[1]
    if pad_h or pad_w:
        x = jnp.pad(x, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
        if outside is not None:
            inside = (np.arange(height + pad_h) < height)[:, None] & (
                np.arange(width + pad_w) < width
            )
            # Widened first: gradients are summed in the dtype of `outside`.
            filling = jnp.broadcast_to(outside, x.shape).astype(x.dtype)
            x = jnp.where(inside[None, :, :, None], x, filling)
    rows, columns = (height + pad_h) // window[0], (width + pad_w) // window[1]
    x = x.reshape(batch, rows, window[0], columns, window[1], num_heads, -1)
    return x.transpose(0, 1, 3, 5, 2, 4, 6).reshape(-1, window[0] * window[1], x.shape[-1])


def window_unpartition(
    windows: Array, window: tuple[int, int], num_heads: int, height: int, width: int
) -> Array:
    """Inverse of `window_partition` for a map of height x width: [B, height, width, heads * d]."""
    rows, columns = -(-height // window[0]), -(-width // window[1])
    x = windows.reshape(-1, rows, columns, num_heads, *window, windows.shape[-1])
    x = x.transpose(0, 1, 4, 2, 5, 3, 6).reshape(
        -1, rows * window[0], columns * window[1], num_heads * windows.shape[-1]
    )
    return x[:, :height, :width]
