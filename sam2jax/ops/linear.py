"""Products in the model's compute type, with float32 accumulation.

float32 asks for full precision on every backend (accelerators default to TF32 or bfloat16
passes); bfloat16 does what autocast does, with float32 accumulation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam2jax.ops.pieces import by_pieces
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


def rounded_einsum(subscripts: str, *operands: Array) -> Array:
    """`einsum` with its result in the dtype of the operands."""
    if operands[0].dtype == jnp.float32:
        return einsum(subscripts, *operands)
    return _rounded_einsum(subscripts, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_einsum(subscripts: str, *operands: Array) -> Array:
    def at_once(*operands: Array) -> Array:
        dtype = operands[0].dtype
        return jnp.einsum(subscripts, *operands, preferred_element_type=dtype)

    # On accelerators the sums, which are in float32, never reach memory.
    last = functools.partial(_einsum_then_rounded, subscripts)
    return lax.platform_dependent(*operands, cpu=last, default=at_once)


def _einsum_then_rounded(subscripts: str, *operands: Array) -> Array:
    return einsum(subscripts, *operands).astype(operands[0].dtype)


_rounded_einsum.defvjp(
    lambda subscripts, *operands: (_rounded_einsum(subscripts, *operands), operands),
    lambda subscripts, operands, gradient: jax.vjp(
        functools.partial(_einsum_then_rounded, subscripts), *operands
    )[1](gradient),
)


def linear(
    x: Array, kernel: Array, bias: Array | None, dtype: jnp.dtype, *, rounded: bool = True
) -> Array:
    """Affine map of the last axis: [..., I] x [I, O] -> [..., O] in `dtype`, or, not `rounded`, in
    float32."""
    return _linear(x.astype(dtype), kernel, bias, rounded)


def _product(x: Array, kernel: Array, dtype: jnp.dtype = jnp.float32) -> Array:
    return lax.dot_general(
        x,
        kernel.astype(x.dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=dtype,
    )


def _added(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


# Derived automatically, gradients of narrow products would be of float32 factors, and the kernel's
# one long sum of rows that a CPU transposes first, computing all that is fused into them again.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x: Array, kernel: Array, bias: Array | None, rounded: bool) -> Array:
    def last(x: Array, kernel: Array, bias: Array | None) -> Array:
        return _added(_product(x, kernel), bias).astype(x.dtype)

    def at_once(x: Array, kernel: Array, bias: Array | None) -> Array:
        return _added(_product(x, kernel, x.dtype), bias)

    if not rounded or x.dtype == jnp.float32:
        return _added(_product(x, kernel), bias)
    bias = None if bias is None else bias.astype(x.dtype)
    # As in `_rounded_einsum`.
    return lax.platform_dependent(x, kernel, bias, cpu=last, default=at_once)


def _linear_forward(x: Array, kernel: Array, bias: Array | None, rounded: bool):
    return _linear(x, kernel, bias, rounded), (x, kernel, bias)


def _linear_backward(rounded: bool, residuals: tuple[Array, Array, Array | None], gradient: Array):
    x, kernel, bias = residuals
    gradient = gradient.astype(x.dtype)
    by_bias = None
    if bias is not None:
        rows = gradient.reshape(-1, gradient.shape[-1])
        by_bias = jnp.sum(rows, axis=0, dtype=jnp.float32).reshape(bias.shape).astype(bias.dtype)
    by_x = _linear(gradient, kernel.T, None, True)
    return by_x, _by_kernel(x, gradient).astype(kernel.dtype), by_bias


_linear.defvjp(_linear_forward, _linear_backward)


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


def mlp(
    x: Array,
    layers: Sequence[tuple[Array, Array]],
    activation: Callable[[Array], Array],
    dtype: jnp.dtype,
    *,
    rounded: bool = True,
) -> Array:
    """Linear layers, each a kernel [I, O] and a bias, with an activation between them."""

    def of_rows(x: Array, *layers: tuple[Array, Array]) -> Array:
        for layer in layers[:-1]:
            x = activation(linear(x, *layer, dtype))
        return linear(x, *layers[-1], dtype, rounded=rounded)

    hidden = layers[0][1].size
    return by_pieces(of_rows, x.astype(dtype), *layers, item=x.shape[-1:], values=hidden)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """Normalises the last axis in float32 and stays there, as autocast does."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    shape = (1,) * (x.ndim - 1) + scale.shape
    return centred * lax.rsqrt(variance + eps) * scale.reshape(shape) + bias.reshape(shape)


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """The exact (erf) GELU, PyTorch's default."""

    def by_erf(x: Array) -> Array:
        wide = x.astype(jnp.float32)
        return (0.5 * wide * (1.0 + lax.erf(wide * np.sqrt(0.5)))).astype(x.dtype)

    # On a CPU the complement is faster as XLA takes it, on accelerators a third of the work.
    return lax.platform_dependent(x, cpu=_gelu_by_erfc, default=by_erf)


def _gelu_by_erfc(x: Array) -> Array:
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Of the platforms' ways one, or both would keep what they need for the gradient.
    return gelu(*primals), jax.jvp(_gelu_by_erfc, primals, tangents)[1]
