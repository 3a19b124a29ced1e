"""Products in the model's compute type, with float32 accumulation.

float32 asks for full precision on every backend (accelerators default to TF32 or bfloat16
passes); bfloat16 does what autocast does, with float32 accumulation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from sam2jax.types import Array


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
    y = lax.dot_general(
        x.astype(dtype),
        kernel.astype(dtype),
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
    return y.astype(dtype)


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
