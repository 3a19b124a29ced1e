"""Attention as one kernel, for NVIDIA GPUs (Pallas, by way of Triton): scores stay on the chip.

To many keys it is the online softmax of `ops.attention` (FlashAttention, arXiv 2205.14135). Keys
are split where there are few queries, so that the whole chip has work. Values may be narrower than
keys. Within an image heads are read where the projection has left them, and nothing is transposed.
Rotated queries and keys are projected and rotated in one kernel, too.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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
ROWS, CHANNELS = 64, 64  # in a block of what is projected and rotated
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
    part = value.dtype if splits == 1 else jnp.float32
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
            jax.ShapeDtypeStruct((count, splits, query.shape[1], value.shape[2]), part),
            jax.ShapeDtypeStruct((count, splits, query.shape[1]), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="flash_attention",
    )(length, query, key, value)
    if splits == 1:
        return out[:, 0, :rows, :width], log_sum[:, 0, :rows]
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
    whole = jnp.clip(lax.div(length, jnp.int32(KEYS)), first, after)

    def add(masked: bool, index: Array, carry):
        total, row_sum, row_max = carry
        start = index * KEYS
        scores = triton.dot(query, key_ref[pl.ds(start, KEYS), :].T)
        if masked:
            valid = start + lax.broadcasted_iota(jnp.int32, scores.shape, 1) < length
            scores = jnp.where(valid, scores, MASKED)
        weights, shrunk, row_sum, row_max = _weighed(scores, _PER_BIT, row_sum, row_max)
        part = triton.dot(weights.astype(value_ref.dtype), value_ref[pl.ds(start, KEYS), :])
        return total * shrunk + part, row_sum, row_max

    rows = jnp.zeros((query.shape[0],), jnp.float32)
    carry = jnp.zeros(out_ref.shape, jnp.float32), rows, rows + MASKED
    carry = lax.fori_loop(first, whole, functools.partial(add, False), carry)
    total, row_sum, row_max = lax.fori_loop(whole, after, functools.partial(add, True), carry)
    row_sum = jnp.maximum(row_sum, jnp.finfo(jnp.float32).tiny)
    out_ref[...] = (total / row_sum[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = (row_max + jnp.log2(row_sum)) / _PER_BIT


def _weighed(
    scores: Array, scale: float, row_sum: Array, row_max: Array
) -> tuple[Array, Array, Array, Array]:
    """A step of the online softmax, in powers of two: the weights of a block of keys, what all
    before them shrinks by [T, 1], and the sum and the greatest scaled score of each row so far."""
    new_max = jnp.maximum(row_max, jnp.max(scores, axis=1) * scale)
    weights = jnp.exp2(scores * scale - new_max[:, None])
    shrunk = jnp.exp2(row_max - new_max)
    return weights, shrunk[:, None], row_sum * shrunk + jnp.sum(weights, axis=1), new_max


def self_attention(
    qkv: Array,
    outside: Array,
    query: Array | None = None,
    *,
    num_heads: int,
    window: int,
    interpret: bool = False,
) -> Array:
    """Attention of a map's cells to each other, within windows or over the whole map.

    Args:
      qkv: [B, H, W, 3 * heads * d] bfloat16: queries, keys and values, heads side by side in each.
      outside: [3 * heads * d], what windows hold of it where they reach beyond the map.
      query: [B, H / p, W / p, heads * d] in place of those queries.
      num_heads: side by side.
      window: its side; 0: the whole map is one.
      interpret: run it as JAX, on any device.

    Returns:
      [B, H, W, heads * d], or as `query`.
    """
    batch, height, width, channels = qkv.shape
    channels //= 3 * num_heads
    rows, columns = (height, width) if query is None else query.shape[1:3]
    pool = height // rows
    side = (window, window) if window else (height, width)
    cells = Windows((height, width), side)
    asked = Windows((rows, columns), (side[0] // pool, side[1] // pool))
    qkv = qkv.reshape(batch, -1, 3, num_heads, channels)
    query = qkv if query is None else query.reshape(batch, -1, 1, num_heads, channels)
    outside = outside.astype(qkv.dtype).reshape(3, num_heads, channels)
    # The fastest on an H200 among some.
    queries, keys = QUERIES, KEYS
    if asked.tokens % queries:
        queries, keys = min(max(power_of_two(asked.tokens), LEAST), 64), 32
    warps = 8 if cells.tokens > 256 else 4 if cells.tokens > LEAST else 1

    def of_head(x: Array) -> pl.BlockSpec:
        block = (None, *x.shape[1:3], None, channels)
        return pl.BlockSpec(block, lambda w, h, i: (lax.div(w, cells.count), 0, 0, h, 0))

    out = pl.pallas_call(
        functools.partial(_self_kernel, cells, asked, queries, keys),
        grid=(batch * cells.count, num_heads, pl.cdiv(asked.tokens, queries)),
        in_specs=[
            of_head(query),
            of_head(qkv),
            pl.BlockSpec((3, None, channels), lambda w, h, i: (0, h, 0)),
        ],
        out_specs=pl.BlockSpec(
            (None, rows * columns, None, channels),
            lambda w, h, i: (lax.div(w, cells.count), 0, h, 0),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, rows * columns, num_heads, channels), qkv.dtype),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
        name="self_attention",
    )(query, qkv, outside)
    return out.reshape(batch, rows, columns, -1)


class Windows(NamedTuple):
    """Windows that cover a map, from its upper left corner."""

    map: tuple[int, int]  # height and width
    window: tuple[int, int]

    @property
    def across(self) -> int:
        return pl.cdiv(self.map[1], self.window[1])

    @property
    def count(self) -> int:
        return pl.cdiv(self.map[0], self.window[0]) * self.across

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def reach_beyond(self) -> bool:
        return any(m % w for m, w in zip(self.map, self.window, strict=True))

    def cells(self, index: Array, at: Array) -> tuple[Array, Array]:
        """Where in the map, row by row, tokens `at` [T] of a window are, and whether they are."""
        across, (height, width) = jnp.int32(self.across), self.window
        row = lax.div(index, across) * height + lax.div(at, jnp.int32(width))
        column = lax.rem(index, across) * width + lax.rem(at, jnp.int32(width))
        inside = (row < self.map[0]) & (column < self.map[1]) & (at < self.tokens)
        return row * self.map[1] + column, inside

    def beyond(self, index: Array) -> Array:
        """How many tokens of a window lie beyond the map."""
        across, (height, width) = jnp.int32(self.across), self.window
        rows = jnp.minimum(self.map[0] - lax.div(index, across) * height, height)
        columns = jnp.minimum(self.map[1] - lax.rem(index, across) * width, width)
        return self.tokens - rows * columns


def _self_kernel(
    cells: Windows,
    asked: Windows,
    queries: int,
    keys: int,
    query_ref,
    qkv_ref,
    outside_ref,
    out_ref,
) -> None:
    """A block of one head's queries in a window. What is not there is masked."""
    channels = qkv_ref.shape[2]
    index = lax.rem(pl.program_id(0), jnp.int32(cells.count))
    parts = [jnp.arange(min(max(power_of_two(channels), LEAST), PART))]
    if channels > PART:
        parts.append(PART + jnp.arange(max(power_of_two(channels - PART), LEAST)))

    def take(ref, which: int, at: Array, inside: Array, lanes: Array) -> Array:
        place = ref.at[at[:, None], which, lanes[None]]
        return triton.load(place, mask=inside[:, None] & (lanes < channels)[None], other=0.0)

    scale = channels**-0.5 * _PER_BIT
    asking, wanted = asked.cells(index, pl.program_id(2) * queries + jnp.arange(queries))
    query = [take(query_ref, 0, asking, wanted, lanes) for lanes in parts]
    totals = tuple(jnp.zeros((queries, len(lanes)), jnp.float32) for lanes in parts)
    row_sum = jnp.zeros((queries,), jnp.float32)
    row_max = row_sum + MASKED
    if cells.reach_beyond:
        # Tokens beyond the map are all alike: one, counted as often as there are such.
        count = cells.beyond(index).astype(jnp.float32)
        key, value = (
            [
                triton.load(outside_ref.at[which, lanes], mask=lanes < channels, other=0.0)
                for lanes in parts
            ]
            for which in (1, 2)
        )
        products = (
            jnp.sum(_wide(q) * _wide(k)[None], axis=1) for q, k in zip(query, key, strict=True)
        )
        row_max = jnp.where(count > 0, sum(products) * scale, row_max)
        row_sum = row_sum + count
        totals = tuple(t + count * _wide(v)[None] for t, v in zip(totals, value, strict=True))

    def add(block: Array, carry):
        totals, row_sum, row_max = carry
        at, inside = cells.cells(index, block * keys + jnp.arange(keys))
        products = (
            triton.dot(q, take(qkv_ref, 1, at, inside, lanes).T)
            for q, lanes in zip(query, parts, strict=True)
        )
        scores: Any = sum(products)
        if cells.reach_beyond or cells.tokens % keys:
            scores = jnp.where(inside[None], scores, MASKED)
        weights, shrunk, row_sum, row_max = _weighed(scores, scale, row_sum, row_max)
        weights = weights.astype(out_ref.dtype)
        totals = tuple(
            total * shrunk + triton.dot(weights, take(qkv_ref, 2, at, inside, lanes))
            for total, lanes in zip(totals, parts, strict=True)
        )
        return totals, row_sum, row_max

    carry = totals, row_sum, row_max
    totals, row_sum, _ = lax.fori_loop(0, pl.cdiv(cells.tokens, keys), add, carry)
    for total, lanes in zip(totals, parts, strict=True):
        out = (total / row_sum[:, None]).astype(out_ref.dtype)
        place = out_ref.at[asking[:, None], lanes[None]]
        triton.store(place, out, mask=wanted[:, None] & (lanes < channels)[None])


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)


def can_rotate(kernel: Array, positions: int, room: int) -> bool:
    """Whether `project_and_rotate` takes these sizes: it does not fill blocks up."""
    width, pairs = kernel.shape[0], kernel.shape[1] // 2
    return width % CHANNELS == positions % ROWS == room % ROWS == 0 and (
        pairs == power_of_two(pairs) >= LEAST
    )


def project_and_rotate(
    x: Array,
    kernel: Array,
    bias: Array,
    cos: Array,
    sin: Array,
    scale: float = 1.0,
    room: int = 0,
    *,
    interpret: bool = False,
) -> Array:
    """`ops.rope.project_and_rotate`.

    Args:
      x: [B, maps * P, I] bfloat16.
      kernel: [I, d], in `split_pairs` order, as is `bias`: [d].
      cos: [P, d / 2], as is `sin`.
      scale: of the result.
      room: zeros that follow each row.
      interpret: run it as JAX, on any device.

    Returns:
      [B, maps * P + room, d] bfloat16.
    """
    (batch, rows, width), (positions, pairs) = x.shape, cos.shape
    blocks, period = rows // ROWS, positions // ROWS

    def table() -> pl.BlockSpec:
        return pl.BlockSpec((ROWS, pairs), lambda b, i: (lax.rem(i, jnp.int32(period)), 0))

    return pl.pallas_call(
        functools.partial(_rotated_kernel, blocks, scale),
        grid=(batch, blocks + room // ROWS),
        in_specs=[
            pl.BlockSpec((None, ROWS, width), lambda b, i: (b, jnp.minimum(i, blocks - 1), 0)),
            pl.BlockSpec(kernel.shape, lambda b, i: (0, 0)),
            pl.BlockSpec(bias.shape, lambda b, i: (0,)),
            table(),
            table(),
        ],
        out_specs=pl.BlockSpec((None, ROWS, 2 * pairs), lambda b, i: (b, i, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, rows + room, 2 * pairs), x.dtype),
        # As many registers as there are for two sums of 64 x 128.
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="project_and_rotate",
    )(x, kernel.astype(x.dtype), bias.astype(x.dtype), cos, sin)


def _rotated_kernel(
    blocks: int, scale: float, x_ref, kernel_ref, bias_ref, cos_ref, sin_ref, out_ref
) -> None:
    pairs = cos_ref.shape[1]
    halves = pl.ds(0, pairs), pl.ds(pairs, pairs)  # first and second members of pairs

    def add(index: Array, sums):
        at = pl.ds(index * CHANNELS, CHANNELS)
        x = x_ref[:, at]
        products = (triton.dot(x, kernel_ref[at, half]) for half in halves)
        return tuple(s + product for s, product in zip(sums, products, strict=True))

    sums = (jnp.zeros(cos_ref.shape, jnp.float32),) * 2
    sums = lax.fori_loop(0, x_ref.shape[1] // CHANNELS, add, sums)
    first, second = (s + _wide(bias_ref[h])[None] for s, h in zip(sums, halves, strict=True))
    cos, sin = cos_ref[...], sin_ref[...]
    inside = pl.program_id(1) < blocks
    rotated = first * cos - second * sin, first * sin + second * cos
    for half, members in zip(halves, rotated, strict=True):
        out_ref[:, half] = jnp.where(inside, members * scale, 0.0).astype(out_ref.dtype)
