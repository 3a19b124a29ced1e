"""Attention to many keys, and linear layers: the ways there are to compute them here.

python -m benchmarks.kernels

Each way runs in a loop on the device: by XLA (attention in blocks), and on an NVIDIA GPU attention
as the kernel of `sam2jax.ops.flash` and by cuDNN, and both as candidates of `benchmarks.hopper` and
`benchmarks.hopper_linear`. Prints microseconds, the rate, and the largest error beside float32 as a
share of the largest answer; what a device lacks is named. results/kernels-DEVICE.json is written.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.timing import machine, save_record, seconds
from sam2jax.ops.attention import _online
from sam2jax.ops.linear import gelu, linear
from sam2jax.types import Array

ATTENTION = {  # rows of the batch, queries, keys, channels of keys and of values
    "a full bank": (1, 4096, 28736, 256, 64),
    "a full bank, 8 objects": (8, 4096, 28736, 256, 64),
    "each other": (1, 4096, 4096, 256, 256),
    "each other, 8 objects": (8, 4096, 4096, 256, 256),
}
GELU = {  # with GELU, where the trunk's MLPs begin: rows, channels in and out
    "large, stage 1": (65536, 144, 576),
    "large, stage 2": (16384, 288, 1152),
    "large, stage 3": (4096, 576, 2304),
    "large, stage 4": (1024, 1152, 4608),
    "base_plus, stage 1": (65536, 112, 448),
    "base_plus, stage 3": (4096, 448, 1792),
    "tiny, stage 1": (65536, 96, 384),
    "tiny, stage 3": (4096, 384, 1536),
}
PLAIN = {  # without: queries, keys and values
    "large, stage 3, qkv": (4096, 576, 1728),
    "tiny, stage 3, qkv": (4096, 384, 1152),
}
TURNS, RUNS = 50, 5  # on a GPU
Way = Callable[..., Array]


class Problem(NamedTuple):
    """What the ways are given, which the first of them takes in float32, too."""

    given: tuple[Array, ...]
    work: int  # multiplications and additions
    ways: tuple[Way, ...]


def blocks(query: Array, key: Array, value: Array, length: Array) -> Array:
    return _online(query, key, value, length)[0]


def triton(query: Array, key: Array, value: Array, length: Array) -> Array:
    from sam2jax.ops.flash import flash_attention

    return flash_attention(query, key, value, length)[0]


def mosaic(query: Array, key: Array, value: Array, length: Array) -> Array:
    from benchmarks.hopper import flash_attention

    return flash_attention(query, key, value, length)[0]


def cudnn(query: Array, key: Array, value: Array, length: Array) -> Array:
    width = value.shape[2]
    value = jnp.pad(value, ((0, 0), (0, 0), (0, key.shape[2] - width)))
    query, key, value = (x[:, :, None] for x in (query, key, value))
    options = {"scale": 1.0, "key_value_seq_lengths": length, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(query, key, value, **options)[:, :, 0, :width]


def xla(x: Array, kernel: Array, bias: Array) -> Array:
    return linear(x, kernel, bias, x.dtype)


def xla_gelu(x: Array, kernel: Array, bias: Array) -> Array:
    return gelu(xla(x, kernel, bias))


def mosaic_linear(x: Array, kernel: Array, bias: Array) -> Array:
    from benchmarks.hopper_linear import linear

    return linear(x, kernel, bias)


def mosaic_gelu(x: Array, kernel: Array, bias: Array) -> Array:
    from benchmarks.hopper_linear import gelu, linear

    return linear(x, kernel, bias, gelu)


def attention_problem(shape: tuple[int, ...]) -> Problem:
    count, queries, keys, width, wide = shape
    query, key, value = _noise((count, queries, width), (count, keys, width), (count, keys, wide))
    given = query * width**-0.5, key, value, jnp.full((count,), keys, jnp.int32)
    work = 2 * count * queries * keys * (width + wide)
    return Problem(given, work, (blocks, triton, mosaic, cudnn))


def linear_problem(shape: tuple[int, ...], ways: tuple[Way, ...] = (xla, mosaic_linear)) -> Problem:
    rows, width, wide = shape
    x, kernel, bias = _noise((rows, width), (width, wide), (wide,))
    return Problem((x, kernel * width**-0.5, bias), 2 * rows * width * wide, ways)


def gelu_problem(shape: tuple[int, ...]) -> Problem:
    return linear_problem(shape, (xla_gelu, mosaic_gelu))


def _noise(*sizes: tuple[int, ...]) -> Iterator[Array]:
    for i, size in enumerate(sizes):
        yield jax.random.normal(jax.random.key(i), size, jnp.bfloat16)


def time_of(way: Way, given: tuple[Array, ...], turns: int, runs: int) -> float:
    """Seconds of one turn, the best of some runs."""

    @jax.jit
    def loop(first: Array, *rest: Array) -> Array:
        def turn(_: Any, first: Array) -> Array:
            whole = lax.optimization_barrier(way(first, *rest))
            return first + whole[..., :1] * jnp.bfloat16(2**-9)  # one turn needs the other

        return lax.fori_loop(0, turns, turn, first)

    def run() -> None:
        jax.block_until_ready(loop(*given))

    run()
    return min(seconds(run) for _ in range(runs)) / turns


def rows(problems: dict[str, Callable[[], Problem]], often: tuple[int, int]) -> Iterator[Any]:
    """A row for each problem and way, timed so many turns and runs."""
    for name, make in problems.items():
        given, work, ways = make()
        wide = (x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in given)
        exact = jax.jit(ways[0])(*wide)
        for way in ways if jax.default_backend() == "gpu" else ways[:1]:
            row = {"shape": name, "way": way.__name__}
            try:
                found = jax.jit(way)(*given).astype(jnp.float32)
                error = float(jnp.max(jnp.abs(found - exact)) / jnp.max(jnp.abs(exact)))
                time = time_of(way, given, *often)
                yield row | {"seconds": time, "rate": work / time, "error": error}
            except Exception as why:  # what a device or a version of JAX lacks
                yield row | {"refused": f"{type(why).__name__}: {why}".splitlines()[0]}


def main() -> None:
    record = machine()
    print(f"{'':<26}{'':<14}{'us':>10}{'Tflop/s':>9}{'error':>9}")
    problems = {
        name: functools.partial(make, shape)
        for make, shapes in (
            (attention_problem, ATTENTION),
            (gelu_problem, GELU),
            (linear_problem, PLAIN),
        )
        for name, shape in shapes.items()
    }
    found = []
    often = (TURNS, RUNS) if jax.default_backend() == "gpu" else (1, 1)
    for row in rows(problems, often):
        found.append(row)
        if "refused" in row:
            told = row["refused"]
        else:
            told = f"{row['seconds'] * 1e6:10.1f}{row['rate'] / 1e12:9.1f}{row['error']:9.5f}"
        print(f"{row['shape']:<26}{row['way']:<14}{told}", flush=True)
    device = re.sub(r"\W+", "-", record["device"].lower())
    print(save_record(f"kernels-{device}", record | {"rows": found}))


if __name__ == "__main__":
    main()
