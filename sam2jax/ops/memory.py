"""Attention to memories: maps whose keys are rotated and, behind them, tokens whose are not."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sam2jax.ops.attention import (
    BLOCKWISE_FROM,
    CPU_BLOCK,
    Seen,
    answer,
    attention,
    look_at,
    nothing_seen,
    take,
    whole_values,
)
from sam2jax.ops.linear import linear
from sam2jax.ops.pieces import on_cpu
from sam2jax.ops.rope import project_and_rotate, rotate
from sam2jax.types import Array


def place_after(first: Array, second: Array, length: Array) -> Array:
    """Puts `second` [N, Q, D] behind the first `length` [N] tokens of `first` [N, K, D]."""
    return place_in(jnp.pad(first, ((0, 0), (0, second.shape[1]), (0, 0))), second, length)


def place_in(first: Array, second: Array, length: Array) -> Array:
    """`place_after`, where `first` [N, K + Q, D] has room for it."""
    put = jax.vmap(lambda row, tail, at: lax.dynamic_update_slice_in_dim(row, tail, at, axis=0))
    return put(first, second.astype(first.dtype), length)


def attend_to_maps(
    query: Array,
    maps: Array,
    tokens: Array,
    value: Array,
    kernel: Array,
    bias: Array,
    table: Sequence[Array | np.ndarray],
    length_of_maps: Array,
    length: Array,
    in_one: bool,
) -> Array:
    """Attends, with one head, to what is projected to keys here.

    On a CPU large problems project and rotate one map at a time, where the attention reads it:
    the keys of all are never written out, and there are none for slots that are empty.

    Args:
      query: [N, T, d], scaled.
      maps: [N, K * P, I], valid ones first.
      tokens: [N, Q, I], which follow the valid maps and are not rotated.
      value: [N, K * P + Q, e], of both.
      kernel: [I, d] in `split_pairs` order, and bias: [d].
      table: for the P positions of a map, see `rope_table`.
      length_of_maps: [N] int32, how many of their tokens are valid: a multiple of P.
      length: [N] int32, how many are valid in all.
      in_one: in bfloat16 kernels are used on NVIDIA GPUs.

    Returns:
      [N, T, e] in the dtype of `value`.
    """
    cos, sin = map(jnp.asarray, table)
    given = _Given(query, maps, tokens, value, kernel, bias, cos, sin, length_of_maps, length)
    keys_first = functools.partial(_keys_first, in_one=in_one)
    if query.shape[1] * value.shape[1] < BLOCKWISE_FROM or len(cos) % CPU_BLOCK:
        return keys_first(given)
    return on_cpu(_keys_on_the_way, keys_first, given)


class _Given(NamedTuple):
    """See `attend_to_maps`."""

    query: Array
    maps: Array
    tokens: Array
    value: Array
    kernel: Array
    bias: Array
    cos: Array
    sin: Array
    length_of_maps: Array
    length: Array


def _keys_first(given: _Given, in_one: bool) -> Array:
    query, maps, tokens, value, kernel, bias, cos, sin, length_of_maps, length = given
    room, dtype = tokens.shape[1], value.dtype
    keys = project_and_rotate(maps, kernel, bias, (cos, sin), dtype, room=room, in_one=in_one)
    keys = place_in(keys, linear(tokens, kernel, bias, dtype), length_of_maps)
    return attention(query, keys, value, length=length, scale=1.0, kernel=in_one)


def _keys_on_the_way(given: _Given) -> Array:
    query, maps, tokens, value, kernel, bias, cos, sin, length_of_maps, length = given
    dtype, positions = value.dtype, len(cos)
    values = whole_values(value, length, 1)
    others = linear(tokens, kernel, bias, dtype)
    held = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < (length - length_of_maps)[:, None]

    def one(row: tuple[Array, ...]) -> Array:
        query, maps, others, held, values, of_maps = (x[None] for x in row)

        def look_at_map(index: Array, seen: Seen) -> Seen:
            start = index * positions
            keys = linear(take(maps, start, positions), kernel, bias, dtype)
            keys = rotate(keys, (cos, sin))

            def look_at_block(index: Array, seen: Seen) -> Seen:
                at = index * CPU_BLOCK
                block = take(keys, at, CPU_BLOCK), take(values, start + at, CPU_BLOCK)
                return look_at(seen, query, *block)

            return lax.fori_loop(0, positions // CPU_BLOCK, look_at_block, seen)

        seen = nothing_seen(query, values)
        seen = lax.fori_loop(0, of_maps[0] // positions, look_at_map, seen)
        behind = take(values, of_maps[0], others.shape[1])
        return answer(look_at(seen, query, others, behind, held), value.shape[-1], dtype)[0][0]

    return lax.map(one, (query, maps.astype(dtype), others, held, values, length_of_maps))
