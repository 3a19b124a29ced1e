"""Convolutions and pooling on [B, H, W, C], each in the form that runs fast everywhere."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sam2jax.ops.linear import einsum, linear, precision
from sam2jax.types import Array


def conv(
    x: Array, kernel: Array, bias: Array, *, stride: int, padding: int, dtype: jnp.dtype
) -> Array:
    """Convolution with a [kh, kw, I, O] kernel and the same zero padding on every side."""
    y: Any = _convolve(x.astype(dtype), kernel.astype(dtype), stride, padding)
    return (y + bias.reshape(1, 1, 1, -1)).astype(dtype)


def _plain_convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )


# On a CPU the kernel's gradient is a product for each of its cells: XLA's own takes a hundred times
# as long there.
_convolve = jax.custom_vjp(_plain_convolve, nondiff_argnums=(2, 3))


def _convolve_forward(x: Array, kernel: Array, stride: int, padding: int):
    return _plain_convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(
    stride: int, padding: int, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    gradient = gradient.astype(x.dtype)

    def by_x(x: Array) -> Array:
        return _plain_convolve(x, kernel, stride, padding).astype(gradient.dtype)

    def by_kernel(kernel: Array) -> Array:
        return _plain_convolve(x, kernel, stride, padding).astype(gradient.dtype)

    for_kernel = lax.platform_dependent(
        cpu=lambda: _kernel_gradient(x, gradient, kernel.shape[0], stride, padding),
        default=lambda: jax.vjp(by_kernel, kernel)[1](gradient)[0].astype(jnp.float32),
    )
    return jax.vjp(by_x, x)[1](gradient)[0], for_kernel.astype(kernel.dtype)


def _kernel_gradient(x: Array, gradient: Array, size: int, stride: int, padding: int) -> Array:
    """[k, k, I, O] of an input [B, H, W, I] and the gradient [B, H', W', O] of the output."""
    (_, height, width, _), sides = gradient.shape, (padding, padding)
    padded = jnp.pad(x, ((0, 0), sides, sides, (0, 0)))
    reach = (x.shape[0], (height - 1) * stride + 1, (width - 1) * stride + 1, x.shape[3])

    def cell(index: Array) -> Array:
        seen = lax.dynamic_slice(padded, (0, index // size, index % size, 0), reach)
        return einsum("bhwi,bhwo->io", seen[:, ::stride, ::stride], gradient)

    cells = lax.map(cell, jnp.arange(size**2, dtype=jnp.int32))
    return cells.reshape(size, size, *cells.shape[1:])


_convolve.defvjp(_convolve_forward, _convolve_backward)


def depthwise_conv(x: Array, kernel: Array, bias: Array, dtype: jnp.dtype) -> Array:
    """Depthwise convolution with a [k, k, C] kernel, k odd, same size.

    Written as a sum of shifted products: XLA fuses it, while its grouped convolution is twenty
    times slower on a CPU. Its reverse derivative is written down too, as what is derived from the
    sum compiles ten times longer; there is no forward one.
    """
    y: Any = _shifted_products(x, kernel, dtype)
    return (y + bias.reshape(1, 1, 1, -1).astype(jnp.float32)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted_products(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """[B, H, W, C] float32; factors are rounded to `dtype`."""
    size, (_, height, width, _) = kernel.shape[0], x.shape
    padded = _pad(x.astype(dtype), size)
    kernel = kernel.astype(dtype).astype(jnp.float32)
    y = jnp.zeros(x.shape, jnp.float32)
    for i in range(size):
        for j in range(size):
            shifted = padded[:, i : i + height, j : j + width].astype(jnp.float32)
            y = y + shifted * kernel[i, j].reshape(1, 1, 1, -1)
    return y


def _shifted_forward(x: Array, kernel: Array, dtype: jnp.dtype):
    return _shifted_products(x, kernel, dtype), (x, kernel)


def _shifted_backward(dtype: jnp.dtype, residuals: tuple[Array, Array], gradient: Array):
    """The same sum with the kernel turned, and for each of its cells a product with `x`."""
    x, kernel = residuals
    size = kernel.shape[0]
    padded = _pad(x.astype(dtype), size)

    def cell(index: Array) -> Array:
        shifted = lax.dynamic_slice(padded, (0, index // size, index % size, 0), x.shape)
        return jnp.sum(shifted.astype(jnp.float32) * gradient, axis=(0, 1, 2))

    by_kernel = lax.map(cell, jnp.arange(size**2, dtype=jnp.int32)).reshape(kernel.shape)
    by_x: Any = _shifted_products(gradient, kernel[::-1, ::-1], dtype)
    return by_x.astype(x.dtype), by_kernel.astype(kernel.dtype)


_shifted_products.defvjp(_shifted_forward, _shifted_backward)


def _pad(x: Array, size: int) -> Array:
    pad = size // 2
    return jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))


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
