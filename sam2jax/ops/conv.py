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
    x: Array,
    kernel: Array,
    bias: Array,
    *,
    stride: int,
    padding: int,
    dtype: jnp.dtype,
    rounded: bool = True,
) -> Array:
    """Convolution with a [kh, kw, I, O] kernel and the same zero padding on every side."""
    bias = bias.astype(dtype if rounded else jnp.float32)
    y: Any = _convolve(x.astype(dtype), kernel, bias, stride, padding, rounded)
    return y


def _library_convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )


def _convolve_as_product(
    x: Array, kernel: Array, bias: Array | None, stride: int, padding: int, rounded: bool = True
) -> Array:
    """Pixels become cells of `stride` x `stride`, and each kernel reaches over a few of them."""
    (batch, height, width, channels), (size, _, _, features) = x.shape, kernel.shape
    reach = -(-size // stride)  # cells
    out_height, out_width = (1 + (n + 2 * padding - size) // stride for n in (height, width))
    rows, columns = out_height + reach - 1, out_width + reach - 1
    below, right = stride * rows - padding - height, stride * columns - padding - width
    sides = (0, 0, 0), (padding, below, 0), (padding, right, 0), (0, 0, 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), sides)
    x = x.reshape(batch, rows, stride, columns, stride * channels).swapaxes(2, 3)
    x = x.reshape(batch, rows, columns, -1)
    corners = [(i, j) for i in range(reach) for j in range(reach)]
    x = jnp.concatenate([x[:, i : i + out_height, j : j + out_width] for i, j in corners], -1)
    rest = (0, reach * stride - size)
    kernel = jnp.pad(kernel, (rest, rest, (0, 0), (0, 0)))
    kernel = kernel.reshape(reach, stride, reach, stride, channels, features).swapaxes(1, 2)
    return linear(x, kernel.reshape(-1, features), bias, x.dtype, rounded=rounded)


# XLA's own kernel gradients take a hundred times as long on a CPU as a product for each cell of the
# kernel. On a GPU cuDNN is slow with as few channels as there are here, forward and backward.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _convolve(
    x: Array, kernel: Array, bias: Array, stride: int, padding: int, rounded: bool
) -> Array:
    """[B, H, W, I] -> [B, H', W', O]; the kernel is rounded to the dtype of `x`."""

    def by_library(x: Array, kernel: Array, bias: Array) -> Array:
        y = _library_convolve(x, kernel, stride, padding)
        y = y + bias.reshape(1, 1, 1, -1)
        return y.astype(x.dtype) if rounded else y

    by_product = functools.partial(
        _convolve_as_product, stride=stride, padding=padding, rounded=rounded
    )
    return lax.platform_dependent(x, kernel, bias, cpu=by_library, default=by_product)


def _convolve_forward(
    x: Array, kernel: Array, bias: Array, stride: int, padding: int, rounded: bool
):
    return _convolve(x, kernel, bias, stride, padding, rounded), (x, kernel)


def _convolve_backward(
    stride: int, padding: int, rounded: bool, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    def of_library(x: Array, kernel: Array, gradient: Array):
        def by_x(x: Array) -> Array:
            return _library_convolve(x, kernel, stride, padding).astype(gradient.dtype)

        for_kernel = _kernel_gradient(x, gradient, kernel.shape[0], stride, padding)
        return jax.vjp(by_x, x)[1](gradient)[0], for_kernel.astype(kernel.dtype)

    def of_product(x: Array, kernel: Array, gradient: Array):
        way = functools.partial(_convolve_as_product, bias=None, stride=stride, padding=padding)
        return jax.vjp(way, x, kernel)[1](gradient)

    by_bias = jnp.sum(gradient, axis=(0, 1, 2), dtype=jnp.float32).astype(gradient.dtype)
    gradient = gradient.astype(residuals[0].dtype)
    by_x, by_kernel = lax.platform_dependent(
        *residuals, gradient, cpu=of_library, default=of_product
    )
    return by_x, by_kernel, by_bias


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _kernel_gradient(x: Array, gradient: Array, size: int, stride: int, padding: int) -> Array:
    """[k, k, I, O] of an input [B, H, W, I] and the gradient [B, H', W', O] of the output."""
    (_, height, width, _), sides = gradient.shape, (padding, padding)
    padded = jnp.pad(x, ((0, 0), sides, sides, (0, 0)))
    reach = (x.shape[0], (height - 1) * stride + 1, (width - 1) * stride + 1, x.shape[3])

    def cell(index: Array) -> Array:
        seen = _shifted(padded, index, size, reach)
        return einsum("bhwi,bhwo->io", seen[:, ::stride, ::stride], gradient)

    cells = lax.map(cell, jnp.arange(size**2, dtype=jnp.int32))
    return cells.reshape(size, size, *cells.shape[1:])


def depthwise_conv(x: Array, kernel: Array, bias: Array, dtype: jnp.dtype) -> Array:
    """Depthwise convolution with a [k, k, C] kernel, k odd, same size.

    Written as a sum of shifted products: XLA fuses it, while its grouped convolution is twenty
    times slower on a CPU. Its reverse derivative is written down too, as what is derived from the
    sum compiles ten times longer; there is no forward one.
    """
    y: Any = _shifted_products(x, kernel, dtype)
    return (y + bias.astype(dtype).reshape(1, 1, 1, -1)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted_products(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    """[B, H, W, C] float32; factors are rounded to `dtype`."""

    def summed(x: Array, kernel: Array, by_rows: bool) -> Array:
        size, (_, height, width, _) = kernel.shape[0], x.shape
        padded = _pad(x, size)
        y = jnp.zeros(x.shape, jnp.float32)
        for i in range(size):
            for j in range(size):
                shifted = padded[:, i : i + height, j : j + width].astype(jnp.float32)
                y = y + shifted * kernel[i, j].reshape(1, 1, 1, -1)
            if by_rows and i % 2:
                y, padded = lax.optimization_barrier((y, padded))
        return y

    # For GPUs XLA fuses 14 products well; 28 take minutes to compile, of 49 half are written out.
    return lax.platform_dependent(
        x.astype(dtype),
        kernel.astype(dtype).astype(jnp.float32),
        cpu=functools.partial(summed, by_rows=False),
        default=functools.partial(summed, by_rows=True),
    )


def _shifted_forward(x: Array, kernel: Array, dtype: jnp.dtype):
    return _shifted_products(x, kernel, dtype), (x, kernel)


def _shifted_backward(dtype: jnp.dtype, residuals: tuple[Array, Array], gradient: Array):
    """The same sum with the kernel turned, and for each of its cells a product with `x`."""
    x, kernel = residuals
    size = kernel.shape[0]
    padded = _pad(x.astype(dtype), size)

    def cell(index: Array) -> Array:
        shifted = _shifted(padded, index, size, x.shape)
        return jnp.sum(shifted.astype(jnp.float32) * gradient, axis=(0, 1, 2))

    by_kernel = lax.map(cell, jnp.arange(size**2, dtype=jnp.int32)).reshape(kernel.shape)
    by_x: Any = _shifted_products(gradient, kernel[::-1, ::-1], dtype)
    return by_x.astype(x.dtype), by_kernel.astype(kernel.dtype)


_shifted_products.defvjp(_shifted_forward, _shifted_backward)


def _shifted(padded: Array, index: Array, size: int, shape: tuple[int, ...]) -> Array:
    """What cell `index` of a kernel of `size` x `size` sees."""
    none = jnp.zeros_like(index)
    return lax.dynamic_slice(padded, (none, index // size, index % size, none), shape)


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


def average_pool(x: Array, size: int) -> Array:
    """[B, H, W, C] -> [B, H / size, W / size, C], summed in float32."""
    batch, height, width, channels = x.shape
    cells = x.reshape(batch, height // size, size, width // size, size, channels)
    return jnp.mean(cells, axis=(2, 4), dtype=jnp.float32).astype(x.dtype)


def upsample_nearest_2x(x: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, C]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
