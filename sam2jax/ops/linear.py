"""Products in the model's compute type, with float32 accumulation.

float32 asks for full precision on every backend (accelerators default to TF32 or bfloat16
passes); bfloat16 does what autocast does, with float32 accumulation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from sam2jax.types import Array

ROWS, PARTS = 2048, 64  # of the sum behind a kernel's gradient: in a part, at least, and at most


def precision(dtype: jnp.dtype) -> lax.Precision:
    """Full precision for float32 operands, the backend's own for narrower ones."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def einsum(subscripts: str, *operands: Array) -> Array:
    """`jnp.einsum` with float32 accumulation and result; operands share one dtype."""
    return jnp.einsum(
        subscripts,
        *operands,
        precision=precision(operands[0].dtype),
        preferred_element_type=jnp.float32,
    )


def linear(x: Array, kernel: Array, bias: Array | None, dtype: jnp.dtype) -> Array:
    """Affine map of the last axis: [..., I] x [I, O] -> [..., O] in `dtype`."""
    y = product(x.astype(dtype), kernel)
    if bias is not None:
        y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
    return y.astype(dtype)


def product(x: Array, kernel: Array) -> Array:
    """[..., I] x [I, O] -> [..., O] float32; the kernel is rounded to what `x` is in."""
    return _product(x, kernel) if x.dtype == jnp.float32 else _narrow_product(x, kernel)


def _product(x: Array, kernel: Array) -> Array:
    return lax.dot_general(
        x,
        kernel.astype(x.dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )


# Derived automatically its gradient would be of float32 factors, and the kernel's one long sum.
_narrow_product = jax.custom_vjp(_product)


def _narrow_product_forward(x: Array, kernel: Array):
    return _product(x, kernel), (x, kernel)


def _narrow_product_backward(residuals: tuple[Array, Array], gradient: Array):
    x, kernel = residuals
    gradient = gradient.astype(x.dtype)  # which it was in when it came
    by_x = _product(gradient, kernel.T).astype(x.dtype)
    return by_x, _by_kernel(x, gradient).astype(kernel.dtype)


_narrow_product.defvjp(_narrow_product_forward, _narrow_product_backward)


def _by_kernel(x: Array, gradient: Array) -> Array:
    """[..., I] and [..., O] -> [I, O], summed in parts that together fill an accelerator."""
    x, gradient = (t.reshape(-1, t.shape[-1]) for t in (x, gradient))
    rows, parts = x.shape[0], 1
    while rows % (2 * parts) == 0 and rows >= 2 * parts * ROWS and parts < PARTS:
        parts *= 2
    x, gradient = (t.reshape(parts, -1, t.shape[-1]) for t in (x, gradient))
    # XLA would make one sum of it again.
    sums = lax.optimization_barrier(einsum("pri,pro->pio", x, gradient))
    return jnp.sum(sums, axis=0)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """Normalises the last axis in float32 and stays there, as autocast does."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    shape = (1,) * (x.ndim - 1) + scale.shape
    return centred * lax.rsqrt(variance + eps) * scale.reshape(shape) + bias.reshape(shape)


def gelu(x: Array) -> Array:
    """The exact (erf) GELU, PyTorch's default."""
    return jax.nn.gelu(x, approximate=False)
