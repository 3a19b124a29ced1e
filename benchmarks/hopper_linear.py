"""A candidate for linear layers on Hopper GPUs, which has yet to run on one.

Mosaic GPU: two warpgroups have 128 rows each and take turns, so that one multiplies while the
other computes an activation and writes (CUTLASS's "ping-pong"), and a third fetches ahead of them.
`python -m benchmarks.kernels` compares it with what XLA makes.
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

from sam2jax.ops.flash import PROGRAMS
from sam2jax.types import Array

ROWS, GROUPS = 128, 2  # rows of a warpgroup's tile, and warpgroups that compute
WRITTEN = 64  # rows that are written at a time
MOST_CHANNELS = 128  # that are fetched at a time
ON_CHIP = 192 * 2**10  # bytes for what is fetched
FETCHING, COMPUTING = 40, 232  # registers of a thread


def gelu(x: Array) -> Array:
    """The exact GELU: max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, which does not cancel, with `erfc` to
    1.5e-7 (Abramowitz and Stegun, 7.1.26). Mosaic GPU lacks the `erf` of the package's own."""
    size = jnp.abs(x)
    part = lax.square(lax.rsqrt(1.0 + (0.3275911 * 0.5**0.5) * size))  # a division is slower
    tail = jnp.full_like(x, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = tail * part + coefficient
    return jnp.maximum(x, 0.0) - size * (0.5 * part) * tail * jnp.exp2(x * x * -0.7213475204444817)


def linear(
    x: Array,
    kernel: Array,
    bias: Array,
    activation: Callable[[Array], Array] | None = None,
    *,
    interpret: Any = None,
) -> Array:
    """An affine map, and an activation: [R, I] x [I, O] -> [R, O], all bfloat16; R is a multiple of
    128, I of 16, O of 32."""
    (rows, width), wide = x.shape, kernel.shape[1]
    columns = next(n for n in (128, 96, 64, 32) if wide % n == 0)
    lanes = next(n for n in (64, 32, 16) if width % n == columns % n == 0)  # 128 bytes at most
    edge = next(n for n in (64, 32) if columns % n == 0)
    channels = max(n for n in range(lanes, MOST_CHANNELS + 1, lanes) if width % n == 0)
    stages = ON_CHIP // (2 * GROUPS * (ROWS + columns) * channels)

    def on_chip(*shape: int, lanes: int) -> Any:
        transforms = plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(2 * lanes)
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    def barriers(arrivals: int) -> Any:
        # A warpgroup has to wait for every phase of a barrier that it waits for at all.
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=GROUPS * stages)

    tiles = rows // ROWS * (wide // columns)
    return plgpu.kernel(
        functools.partial(_kernel, activation),
        out_type=jax.ShapeDtypeStruct((rows, wide), x.dtype),
        scratch_types={
            "parts": on_chip(GROUPS * stages, ROWS, channels, lanes=lanes),
            "kernels": on_chip(GROUPS * stages, channels, columns, lanes=lanes),
            "there": barriers(2),
            "read": barriers(1),
            "done": on_chip(GROUPS, WRITTEN, columns, lanes=edge),
        },
        grid=(min(tiles, PROGRAMS),),
        grid_names=("program",),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(x, kernel, bias)


def _kernel(
    activation: Callable[[Array], Array] | None,
    x_ref,
    kernel_ref,
    bias_ref,
    out_ref,
    *,
    parts,
    kernels,
    there,
    read,
    done,
) -> None:
    """Every so many-th tile, which the warpgroups have in turn.

    As all of a tile is fetched before the next, no warpgroup multiplies before its turn.
    """
    group, program = lax.axis_index("group"), lax.axis_index("program")
    programs = jnp.int32(lax.axis_size("program"))
    stages, channels, columns = kernels.shape[0] // GROUPS, *kernels.shape[1:]
    across, steps = out_ref.shape[1] // columns, x_ref.shape[1] // channels
    tiles = out_ref.shape[0] // ROWS * across
    own = lax.div(tiles - program + programs - 1, programs)  # of this program

    def turns_of(group: Array) -> Array:
        return lax.div(own - group + GROUPS - 1, jnp.int32(GROUPS))

    def place(index: Array) -> tuple[Array, Any]:
        tile = program + index * programs
        row, column = lax.div(tile, jnp.int32(across)), lax.rem(tile, jnp.int32(across))
        return row * ROWS, pl.ds(column * columns, columns)

    def slot_of(group: Array, step: Array) -> Array:
        return group * stages + lax.rem(step, jnp.int32(stages))

    @pl.when(group == GROUPS)
    def fetch():
        plgpu.set_max_registers(FETCHING, action="decrease")

        @pl.loop(0, own * steps)
        def fetch_part(count):
            index, step = lax.div(count, jnp.int32(steps)), lax.rem(count, jnp.int32(steps))
            turn, group = lax.div(index, jnp.int32(GROUPS)), lax.rem(index, jnp.int32(GROUPS))
            slot = slot_of(group, turn * steps + step)
            start, at_columns = place(index)
            at_rows, at = pl.ds(start, ROWS), pl.ds(step * channels, channels)
            pl.when(turn * steps + step >= stages)(lambda: plgpu.barrier_wait(read.at[slot]))
            plgpu.copy_gmem_to_smem(x_ref.at[at_rows, at], parts.at[slot], there.at[slot])
            plgpu.copy_gmem_to_smem(kernel_ref.at[at, at_columns], kernels.at[slot], there.at[slot])

        for slot in range(GROUPS * stages):  # a barrier ends as it begins
            used = turns_of(jnp.int32(slot // stages)) * steps > slot % stages
            pl.when(used)(functools.partial(plgpu.barrier_wait, read.at[slot]))

    @pl.when(group < GROUPS)
    def compute():
        plgpu.set_max_registers(COMPUTING, action="increase")

        @pl.loop(0, turns_of(group))
        def compute_tile(turn):
            start, at_columns = place(turn * GROUPS + group)
            by_column = plgpu.Layout.WGMMA.reduce(0)
            bias = plgpu.load(bias_ref.at[at_columns], layout=by_column, optimized=False)
            bias = bias.astype(jnp.float32)

            def multiply(sums):
                for step in range(steps):
                    slot = slot_of(group, turn * steps + step)
                    plgpu.barrier_wait(there.at[slot])
                    plgpu.wgmma(sums, parts.at[slot], kernels.at[slot])
                    if step:
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(read.at[slot_of(group, turn * steps + step - 1)])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(read.at[slot_of(group, turn * steps + steps - 1)])
                return sums[...]

            sums = pl.run_scoped(multiply, plgpu.ACC((ROWS, columns), jnp.float32))
            for row in range(0, ROWS, WRITTEN):
                out = sums[row : row + WRITTEN]
                out = out + lax.broadcast_in_dim(bias, out.shape, (1,))
                if activation is not None:
                    out = activation(out)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                done[group] = out.astype(done.dtype)
                plgpu.commit_smem()
                rows = pl.ds(start + row, WRITTEN)
                plgpu.copy_smem_to_gmem(done.at[group], out_ref.at[rows, at_columns])

        plgpu.wait_smem_to_gmem(0)
