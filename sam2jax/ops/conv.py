"""Convolutions and pooling on [B, H, W, C], each in the form that runs fast everywhere."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from sam2jax.ops.linear import linear, precision
from sam2jax.types import Array


def conv(
    x: Array, kernel: Array, bias: Array, *, stride: int, padding: int, dtype: jnp.dtype
) -> Array:
    """Convolution with a [kh, kw, I, O] kernel and the same zero padding on every side."""
    y = lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    )
    return (y + bias.reshape(1, 1, 1, -1)).astype(dtype)


def depthwise_conv(x: Array, kernel: Array, bias: Array, dtype: jnp.dtype) -> Array:
    """Depthwise convolution with a [k, k, C] kernel, same size.

    Written as a sum of shifted products: XLA fuses it, while its grouped convolution is twenty
    times slower on a CPU.
    """
    size, (_, height, width, _) = kernel.shape[0], x.shape
    pad = size // 2
    padded = jnp.pad(x.astype(dtype), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    kernel = kernel.astype(dtype).astype(jnp.float32)
    y = bias.reshape(1, 1, 1, -1).astype(jnp.float32)
    for i in range(size):
        for j in range(size):
            shifted = padded[:, i : i + height, j : j + width].astype(jnp.float32)
            y = y + shifted * kernel[i, j].reshape(1, 1, 1, -1)
    return y.astype(dtype)


def upsample_conv(x: Array, kernel: Array, bias: Array, dtype: jnp.dtype) -> Array:
    """Transposed convolution, kernel [I, 2, 2, O] and stride 2: each pixel becomes a 2x2 patch."""
    batch, height, width, channels = x.shape
    y = linear(x, kernel.reshape(channels, -1), jnp.tile(bias, 4), dtype)
    y = y.reshape(batch, height, width, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(batch, 2 * height, 2 * width, -1)


def max_pool_2x2(x: Array) -> Array:
    """[B, H, W, C] -> [B, H/2, W/2, C]."""
    batch, height, width, channels = x.shape
    return jnp.max(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def upsample_nearest_2x(x: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, C]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
