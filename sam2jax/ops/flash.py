"""Attention as one kernel, for NVIDIA GPUs (Pallas, by way of Triton): scores stay on the chip.

To many keys it is the online softmax of `ops.attention` (FlashAttention, arXiv 2205.14135). Keys
are split where there are few queries, so that the whole chip has work. Values may be narrower than
keys. Within windows heads are read where the projection has left them, and nothing is transposed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from sam2jax.ops.attention import MASKED
from sam2jax.types import Array, power_of_two

QUERIES, KEYS = 128, 64  # in a block
PROGRAMS = 128  # that a large chip runs at once
MOST_SPLITS = 8
WINDOW_QUERIES = 64  # in a block
LEAST = 16  # rows or columns of a product
_PER_BIT = 1.4426950408889634  # log2(e): the chip has exponentials of base 2


def flash_attention(
    query: Array, key: Array, value: Array, length: Array, *, interpret: bool = False
) -> tuple[Array, Array]:
    """`softmax(query key^T) value` over the first `length` keys.

    Args:
      query: [B, T, d] bfloat16, scaled.
      key: [B, K, d] bfloat16.
      value: [B, K, e] bfloat16.
      length: [B] int32.
      interpret: run it as JAX, on any device.

    Returns:
      [B, T, e] bfloat16, zeros where no key is valid, and the logarithm of the summed weights
      [B, T] float32.
    """
    count, rows, width = query.shape[0], query.shape[1], value.shape[2]
    query, key, value = _padded(query, QUERIES), _padded(key, KEYS), _padded(value, KEYS)
    blocks = query.shape[1] // QUERIES
    splits = max(1, min(MOST_SPLITS, PROGRAMS // (count * blocks)))
    # The fastest on an H200. Wider values leave no room for a third stage.
    warps, stages = (4, 3) if value.shape[2] <= 64 else (8, 2)

    def whole(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, i, s: (b, 0, 0))

    out, log_sum = pl.pallas_call(
        functools.partial(_kernel, splits),
        grid=(count, blocks, splits),
        in_specs=[
            pl.BlockSpec((1,), lambda b, i, s: (b,)),
            pl.BlockSpec((None, QUERIES, query.shape[2]), lambda b, i, s: (b, i, 0)),
            whole(key),
            whole(value),
        ],
        out_specs=[
            pl.BlockSpec((None, None, QUERIES, value.shape[2]), lambda b, i, s: (b, s, i, 0)),
            pl.BlockSpec((None, None, QUERIES), lambda b, i, s: (b, s, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((count, splits, query.shape[1], value.shape[2]), jnp.float32),
            jax.ShapeDtypeStruct((count, splits, query.shape[1]), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="flash_attention",
    )(length, query, key, value)
    total = jax.nn.logsumexp(log_sum, axis=1)
    out = jnp.sum(out * jnp.exp(log_sum - total[:, None])[..., None], axis=1)
    return out[:, :rows, :width].astype(value.dtype), total[:, :rows]


def _padded(x: Array, rows: int) -> Array:
    """To whole blocks, with as many channels as a power of two."""
    channels = max(power_of_two(x.shape[2]), LEAST)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % rows), (0, channels - x.shape[2])))


def _kernel(splits: int, length_ref, query_ref, key_ref, value_ref, out_ref, log_sum_ref) -> None:
    """A block of queries, and one split of the blocks of keys."""
    length, query = length_ref[0], query_ref[...]
    blocks = lax.div(length + (KEYS - 1), jnp.int32(KEYS))
    first, after = (lax.div(blocks * (pl.program_id(2) + i), jnp.int32(splits)) for i in (0, 1))

    def add(index: Array, carry):
        total, row_sum, row_max = carry
        start = index * KEYS
        scores = triton.dot(query, key_ref[pl.ds(start, KEYS), :].T) * _PER_BIT
        valid = start + lax.broadcasted_iota(jnp.int32, scores.shape, 1) < length
        scores = jnp.where(valid, scores, MASKED)
        new_max = jnp.maximum(row_max, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_max[:, None])
        shrunk = jnp.exp2(row_max - new_max)
        part = triton.dot(weights.astype(value_ref.dtype), value_ref[pl.ds(start, KEYS), :])
        row_sum = row_sum * shrunk + jnp.sum(weights, axis=1)
        return total * shrunk[:, None] + part, row_sum, new_max

    rows = jnp.zeros((query.shape[0],), jnp.float32)
    carry = jnp.zeros(out_ref.shape, jnp.float32), rows, rows + MASKED
    total, row_sum, row_max = lax.fori_loop(first, after, add, carry)
    row_sum = jnp.maximum(row_sum, jnp.finfo(jnp.float32).tiny)
    out_ref[...] = total / row_sum[:, None]
    log_sum_ref[...] = (row_max + jnp.log2(row_sum)) / _PER_BIT


def window_attention(qkv: Array, num_heads: int, *, interpret: bool = False) -> Array:
    """Self-attention within each of many windows.

    Args:
      qkv: [B, T, 3 * heads * d] bfloat16: queries, keys and values, heads side by side in each. T
        is at most `ops.attention.MOST_IN_WINDOW`.
      num_heads: side by side.
      interpret: run it as JAX, on any device.

    Returns:
      [B, T, heads * d].
    """
    count, tokens, width = qkv.shape
    channels = width // (3 * num_heads)
    rows = max(power_of_two(tokens), LEAST)
    queries = min(rows, WINDOW_QUERIES)
    out = pl.pallas_call(
        functools.partial(_window_kernel, queries, rows),
        grid=(count, num_heads, rows // queries),
        in_specs=[
            pl.BlockSpec((None, tokens, 3, None, channels), lambda b, h, i: (b, 0, 0, h, 0)),
        ],
        out_specs=pl.BlockSpec((None, tokens, None, channels), lambda b, h, i: (b, 0, h, 0)),
        out_shape=jax.ShapeDtypeStruct((count, tokens, num_heads, channels), qkv.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="window_attention",
    )(qkv.reshape(count, tokens, 3, num_heads, channels))
    return out.reshape(count, tokens, -1)


def _window_kernel(queries: int, rows: int, qkv_ref, out_ref) -> None:
    """A block of a window's queries in one head; what lies outside of the window is masked."""
    tokens, _, channels = qkv_ref.shape
    lanes = jnp.arange(max(power_of_two(channels), LEAST))[None, :]

    def inside(at: Array) -> Array:
        return (at < tokens) & (lanes < channels)

    def take(part: int, at: Array) -> Array:
        return triton.load(qkv_ref.at[at, part, lanes], mask=inside(at), other=0.0)

    at = (pl.program_id(2) * queries + jnp.arange(queries))[:, None]
    keys = jnp.arange(rows)
    scores = triton.dot(take(0, at), take(1, keys[:, None]).T) * (channels**-0.5 * _PER_BIT)
    scores = jnp.where(keys[None, :] < tokens, scores, MASKED)
    weights = jnp.exp2(scores - jnp.max(scores, axis=1, keepdims=True))
    total = triton.dot(weights.astype(out_ref.dtype), take(2, keys[:, None]))
    out = total / jnp.sum(weights, axis=1, keepdims=True)
    triton.store(out_ref.at[at, lanes], out.astype(out_ref.dtype), mask=inside(at))
