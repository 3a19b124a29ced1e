"""Attention as one kernel, for NVIDIA GPUs (Pallas, by way of Triton): scores stay on the chip.

To many keys it is the online softmax of `ops.attention` (FlashAttention, arXiv 2205.14135). Keys
are split where there are few queries, so that the whole chip has work. Values may be narrower than
keys. Within an image heads are read where the projection has left them, and nothing is transposed.
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
PART = 64  # channels in a product: a block has a power of two, and heads rarely have as many
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
        weights, shrunk, row_sum, row_max = _weighed(scores, row_sum, row_max)
        part = triton.dot(weights.astype(value_ref.dtype), value_ref[pl.ds(start, KEYS), :])
        return total * shrunk + part, row_sum, row_max

    rows = jnp.zeros((query.shape[0],), jnp.float32)
    carry = jnp.zeros(out_ref.shape, jnp.float32), rows, rows + MASKED
    total, row_sum, row_max = lax.fori_loop(first, after, add, carry)
    row_sum = jnp.maximum(row_sum, jnp.finfo(jnp.float32).tiny)
    out_ref[...] = total / row_sum[:, None]
    log_sum_ref[...] = (row_max + jnp.log2(row_sum)) / _PER_BIT


def _weighed(scores: Array, row_sum: Array, row_max: Array) -> tuple[Array, Array, Array, Array]:
    """A step of the online softmax, in powers of two: the weights of a block of keys, what all
    before them shrinks by [T, 1], and the sum and the greatest score of each row so far."""
    new_max = jnp.maximum(row_max, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - new_max[:, None])
    shrunk = jnp.exp2(row_max - new_max)
    return weights, shrunk[:, None], row_sum * shrunk + jnp.sum(weights, axis=1), new_max


def self_attention(
    qkv: Array, query: Array | None = None, *, num_heads: int, interpret: bool = False
) -> Array:
    """Attention of tokens to each other, within each of many windows or over a whole map.

    Args:
      qkv: [B, T, 3 * heads * d] bfloat16: queries, keys and values, heads side by side in each.
      query: [B, Q, heads * d] in place of those queries.
      num_heads: side by side.
      interpret: run it as JAX, on any device.

    Returns:
      [B, Q or T, heads * d].
    """
    count, tokens, width = qkv.shape
    channels = width // (3 * num_heads)
    qkv = qkv.reshape(count, tokens, 3, num_heads, channels)
    query = qkv if query is None else query.reshape(count, -1, 1, num_heads, channels)
    asking = query.shape[1]
    # The fastest on an H200 among some.
    queries, keys = QUERIES, KEYS
    if asking % queries:
        queries, keys = min(max(power_of_two(asking), LEAST), 64), 32
    warps = 8 if tokens > 256 else 4 if tokens > LEAST else 1

    def of_head(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:3], None, channels), lambda b, h, i: (b, 0, 0, h, 0))

    out = pl.pallas_call(
        functools.partial(_self_kernel, queries, keys),
        grid=(count, num_heads, pl.cdiv(asking, queries)),
        in_specs=[of_head(query), of_head(qkv)],
        out_specs=pl.BlockSpec((None, asking, None, channels), lambda b, h, i: (b, 0, h, 0)),
        out_shape=jax.ShapeDtypeStruct((count, asking, num_heads, channels), qkv.dtype),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
        name="self_attention",
    )(query, qkv)
    return out.reshape(count, asking, -1)


def _self_kernel(queries: int, keys: int, query_ref, qkv_ref, out_ref) -> None:
    """A block of one head's queries. What lies outside of tokens and channels is masked."""
    tokens, channels = qkv_ref.shape[0], qkv_ref.shape[2]
    parts = [jnp.arange(min(max(power_of_two(channels), LEAST), PART))]
    if channels > PART:
        parts.append(PART + jnp.arange(max(power_of_two(channels - PART), LEAST)))

    def inside(ref, at: Array, lanes: Array) -> Array:
        return (at < ref.shape[0])[:, None] & (lanes < channels)[None]

    def take(ref, which: int, at: Array, lanes: Array) -> Array:
        place = ref.at[at[:, None], which, lanes[None]]
        return triton.load(place, mask=inside(ref, at, lanes), other=0.0)

    at = pl.program_id(2) * queries + jnp.arange(queries)
    query = [take(query_ref, 0, at, lanes) for lanes in parts]

    def add(index: Array, carry):
        totals, row_sum, row_max = carry
        place = index * keys + jnp.arange(keys)
        products = (
            triton.dot(q, take(qkv_ref, 1, place, lanes).T)
            for q, lanes in zip(query, parts, strict=True)
        )
        scores = sum(products) * (channels**-0.5 * _PER_BIT)
        scores = jnp.where((place < tokens)[None], scores, MASKED)
        weights, shrunk, row_sum, row_max = _weighed(scores, row_sum, row_max)
        weights = weights.astype(out_ref.dtype)
        totals = tuple(
            total * shrunk + triton.dot(weights, take(qkv_ref, 2, place, lanes))
            for total, lanes in zip(totals, parts, strict=True)
        )
        return totals, row_sum, row_max

    rows = jnp.zeros((queries,), jnp.float32)
    totals = tuple(jnp.zeros((queries, len(lanes)), jnp.float32) for lanes in parts)
    carry = totals, rows, rows + MASKED
    totals, row_sum, _ = lax.fori_loop(0, pl.cdiv(tokens, keys), add, carry)
    for total, lanes in zip(totals, parts, strict=True):
        out = (total / row_sum[:, None]).astype(out_ref.dtype)
        place = out_ref.at[at[:, None], lanes[None]]
        triton.store(place, out, mask=inside(out_ref, at, lanes))
