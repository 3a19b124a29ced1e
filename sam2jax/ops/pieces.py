"""What a CPU does in another way, where no gradient is asked for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sam2jax.types import Array

PIECE = 2**21  # values at a time, which stay in a CPU's cache
FROM = 4  # pieces


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def on_cpu(way: Callable[..., Array], elsewhere: Callable[..., Array], *given: Any) -> Array:
    """`elsewhere(*given)`, and on a CPU `way(*given)`; gradients are those of `elsewhere`."""
    return lax.platform_dependent(*given, cpu=way, default=elsewhere)


on_cpu.defvjp(
    lambda way, elsewhere, *given: jax.vjp(elsewhere, *given),
    lambda way, elsewhere, pullback, gradient: pullback(gradient),
)


def by_pieces(
    function: Callable[..., Array], x: Array, *params: Any, item: tuple[int, ...], values: int
) -> Array:
    """`function(x, *params)`, and on a CPU a few items of `x` after another.

    Args:
      function: of arrays alone; of any [N, *item] it takes each item for itself.
      x: items, their number in one axis or in several: [..., *item] in memory.
      *params: what it takes besides.
      item: the shape of one.
      values: how many are held at once for an item.
    """
    count, size = x.size // math.prod(item), 2 ** int(math.log2(max(PIECE / values, 1)))
    if count % size or count < FROM * size:
        return function(x, *params)

    def pieces(x: Array, *params: Any) -> Array:
        cut = x.reshape(-1, size, *item)
        piece, whole = (jax.eval_shape(function, of, *params) for of in (cut[0], x))
        # Filled with what depends on `x`, or XLA makes room for all layers at the start.
        room = jnp.full((len(cut), *piece.shape), x.ravel()[0].astype(piece.dtype))

        def put(index: Array, room: Array) -> Array:
            y = function(lax.dynamic_index_in_dim(cut, index, keepdims=False), *params)
            return lax.dynamic_update_index_in_dim(room, y, index, 0)

        return lax.fori_loop(0, len(cut), put, room).reshape(whole.shape)

    return on_cpu(pieces, function, x, *params)
