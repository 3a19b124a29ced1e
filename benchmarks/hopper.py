"""A candidate for attention to many keys on Hopper GPUs, which has yet to run on one.

It is `sam2jax.ops.flash.flash_attention` by way of Mosaic GPU in place of Triton: two warpgroups
have 64 queries each and take turns, so that one multiplies while the other computes exponentials
(FlashAttention-3, arXiv 2407.08608), and a third fetches keys and values ahead of them.
`python -m benchmarks.kernels` compares the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sam2jax.ops.attention import MASKED
from sam2jax.ops.flash import _PER_BIT, MOST_SPLITS, PROGRAMS
from sam2jax.types import Array

ROWS, GROUPS = 64, 2  # queries of a warpgroup, and warpgroups that compute
STAGES = 2  # blocks of keys on the chip
LANES = 64  # channels are a multiple of it
FETCHING, COMPUTING = 40, 232  # registers of a thread


def flash_attention(
    query: Array, key: Array, value: Array, length: Array, *, interpret: Any = None
) -> tuple[Array, Array]:
    """As in `sam2jax.ops.flash`; `interpret` takes `InterpretGPUParams`, with JAX 0.11 or later."""
    count, rows, width = query.shape[0], query.shape[1], value.shape[2]
    keys = 128 if width <= LANES else 64
    query = _padded(query, -rows % (GROUPS * ROWS))
    key, value = (_padded(x, max(keys - x.shape[1], 0)) for x in (key, value))
    blocks = query.shape[1] // (GROUPS * ROWS)
    splits = max(1, min(MOST_SPLITS, PROGRAMS // (count * blocks)))
    part = value.dtype if splits == 1 else jnp.float32

    def on_chip(*shape: int) -> Any:
        transforms = plgpu.TilingTransform((8, LANES)), plgpu.SwizzleTransform(128)
        return plgpu.SMEM(shape, query.dtype, transforms=transforms)

    read = plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES)
    out, log_sum = plgpu.kernel(
        functools.partial(_kernel, splits, keys, interpret is not None),
        out_type=[
            jax.ShapeDtypeStruct((count, splits, query.shape[1], value.shape[2]), part),
            jax.ShapeDtypeStruct((count, splits, query.shape[1]), jnp.float32),
        ],
        scratch_types={
            "query": on_chip(GROUPS, ROWS, query.shape[2]),
            "query_there": plgpu.Barrier(num_barriers=GROUPS),
            "keys": on_chip(STAGES, keys, key.shape[2]),
            "keys_there": plgpu.Barrier(num_barriers=STAGES),
            "keys_read": read,
            "values": on_chip(STAGES, keys, value.shape[2]),
            "values_there": plgpu.Barrier(num_barriers=STAGES),
            "values_read": read,
            "turn": plgpu.Barrier(num_arrivals=GROUPS),
        },
        grid=(splits, blocks, count),
        grid_names=("split", "block", "row"),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(length, query, key, value)
    if splits == 1:
        return out[:, 0, :rows, :width], log_sum[:, 0, :rows]
    total = jax.nn.logsumexp(log_sum, axis=1)
    out = jnp.sum(out * jnp.exp(log_sum - total[:, None])[..., None], axis=1)
    return out[:, :rows, :width].astype(value.dtype), total[:, :rows]


def _padded(x: Array, rows: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, rows), (0, -x.shape[2] % LANES)))


def _kernel(
    splits: int,
    block: int,
    interpret: bool,
    length_ref,
    query_ref,
    key_ref,
    value_ref,
    out_ref,
    log_sum_ref,
    *,
    query,
    query_there,
    keys,
    keys_there,
    keys_read,
    values,
    values_there,
    values_read,
    turn,
) -> None:
    """Two blocks of queries, and one split of the blocks of keys."""
    row, split, group = (lax.axis_index(name) for name in ("row", "split", "group"))
    length, size = length_ref[row], jnp.int32(block)
    blocks = lax.div(length + (block - 1), size)
    first, after = (lax.div(blocks * (split + i), jnp.int32(splits)) for i in (0, 1))
    whole = jnp.clip(lax.div(length, size), first, after)
    steps = after - first

    def start_of(index: Array) -> Array:
        """The last block overlaps its neighbour rather than reach past the end."""
        return jnp.minimum(index * size, key_ref.shape[1] - block)

    def slot_of(step: Array) -> Array:
        return lax.rem(step, jnp.int32(STAGES))

    def take_turns() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(group == GROUPS)
    def fetch():
        plgpu.set_max_registers(FETCHING, action="decrease")

        @pl.loop(0, steps)
        def fetch_block(step):
            slot = slot_of(step)
            rows = pl.ds(start_of(first + step), block)
            for ref, into, there, read in (
                (key_ref, keys, keys_there, keys_read),
                (value_ref, values, values_there, values_read),
            ):
                pl.when(step >= STAGES)(functools.partial(plgpu.barrier_wait, read.at[slot]))
                plgpu.copy_gmem_to_smem(ref.at[row, rows], into.at[slot], there.at[slot])

        for slot in range(STAGES):  # a barrier ends as it begins
            for read in (keys_read, values_read):
                pl.when(steps > slot)(functools.partial(plgpu.barrier_wait, read.at[slot]))

    @pl.when(group < GROUPS)
    def compute():
        plgpu.set_max_registers(COMPUTING, action="increase")
        own = query.at[group]
        rows = pl.ds((lax.axis_index("block") * GROUPS + group) * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(query_ref.at[row, rows], own, query_there.at[group])
        plgpu.barrier_wait(query_there.at[group])
        pl.when(steps > 0)(lambda: plgpu.barrier_wait(keys_there.at[0]))
        pl.when(group == 1)(take_turns)

        def add(masked: bool, index: Array, carry):
            total, row_sum, row_max = carry
            step = index - first
            slot = slot_of(step)

            def multiply(scores_ref):
                plgpu.wgmma(scores_ref, own, keys.at[slot].transpose((1, 0)))
                take_turns()  # to exponentials, once this product is on its way
                return scores_ref[...]

            scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, block), jnp.float32))
            plgpu.barrier_arrive(keys_read.at[slot])
            if masked:
                layout = plgpu.Layout.WGMMA
                lane = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=layout)
                at = lane + start_of(index)
                scores = jnp.where((at >= index * size) & (at < length), scores, MASKED)
            new_max = jnp.maximum(row_max, jnp.max(scores, axis=1) * _PER_BIT)
            shrunk = jnp.exp2(row_max - new_max)
            weights = jnp.exp2(scores * _PER_BIT - _across(new_max, scores))
            row_sum = row_sum * shrunk + jnp.sum(weights, axis=1)
            # All of it before the other warpgroup's turn ends.
            total, row_sum, row_max, weights = lax.optimization_barrier(
                (total * _across(shrunk, total), row_sum, new_max, weights.astype(values.dtype))
            )
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(values_there.at[slot])
            plgpu.barrier_wait(turn)
            there = keys_there.at[slot_of(step + 1)]
            ahead = functools.partial(
                pl.when(step + 1 < steps), functools.partial(plgpu.barrier_wait, there)
            )
            total = _add_product(total, weights, values.at[slot], ahead, interpret)
            plgpu.barrier_arrive(values_read.at[slot])
            return total, row_sum, row_max

        by_row = plgpu.Layout.WGMMA.reduce(1)
        zeros = jnp.zeros((ROWS, out_ref.shape[3]), jnp.float32)
        total = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        row_sum, row_max = (
            plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), by_row) for x in (0.0, MASKED)
        )
        carry = lax.fori_loop(
            first, whole, functools.partial(add, False), (total, row_sum, row_max)
        )
        total, row_sum, row_max = lax.fori_loop(whole, after, functools.partial(add, True), carry)
        pl.when(group == 0)(take_turns)
        row_sum = jnp.maximum(row_sum, jnp.finfo(jnp.float32).tiny)
        out_ref[row, split, rows] = (total / _across(row_sum, total)).astype(out_ref.dtype)
        log_sum_ref[row, split, rows] = row_max / _PER_BIT + jnp.log(row_sum)


def _across(x: Array, like: Array) -> Array:
    return lax.broadcast_in_dim(x, like.shape, (0,))


def _add_product(
    total: Array, weights: Array, values_ref: Any, ahead: Callable[[], None], interpret: bool
) -> Array:
    """`total + weights values`, waiting for the next keys while it is computed."""
    if interpret:  # of products with a factor in registers JAX has no interpreter
        ahead()
        total = total + jnp.dot(weights, values_ref[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # read here by threads, where a product reads as copies write
        return total

    def multiply(total_ref):
        plgpu.wgmma(total_ref, weights, values_ref)
        ahead()

    return pl.run_state(multiply)(plgpu.ACC.init(total))
