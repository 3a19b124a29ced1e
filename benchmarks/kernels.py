"""Attention to many keys, the ways there are to compute it on this device, a layer at a time.

python -m benchmarks.kernels

Each way runs in a loop on the device: as blocks by XLA, and on an NVIDIA GPU as the kernel of
`sam2jax.ops.flash`, as the candidate of `benchmarks.hopper`, and by cuDNN. Prints microseconds, the
rate, and the largest error beside float32 as a share of the largest answer; what a device lacks is
named. results/kernels-DEVICE.json is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.timing import machine, save_record, seconds
from sam2jax.ops.attention import _online
from sam2jax.types import Array

SHAPES = {  # rows of the batch, queries, keys, channels of keys and of values
    "a full bank": (1, 4096, 28736, 256, 64),
    "a full bank, 8 objects": (8, 4096, 28736, 256, 64),
    "each other": (1, 4096, 4096, 256, 256),
    "each other, 8 objects": (8, 4096, 4096, 256, 256),
}
TURNS, RUNS = 50, 5  # on a GPU
Way = Callable[[Array, Array, Array, Array], Array]


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


def problem(shape: tuple[int, ...]) -> tuple[Array, Array, Array, Array]:
    count, queries, keys, width, wide = shape
    sizes = (count, queries, width), (count, keys, width), (count, keys, wide)
    query, key, value = (
        jax.random.normal(jax.random.key(i), size, jnp.bfloat16) for i, size in enumerate(sizes)
    )
    return query * width**-0.5, key, value, jnp.full((count,), keys, jnp.int32)


def time_of(way: Way, given: tuple[Array, ...], turns: int, runs: int) -> float:
    """Seconds of one turn, the best of some runs."""

    @jax.jit
    def loop(query: Array, *rest: Array) -> Array:
        def turn(_: Any, query: Array) -> Array:
            return query + way(query, *rest)[..., :1] * jnp.bfloat16(2**-9)  # one needs the other

        return lax.fori_loop(0, turns, turn, query)

    def run() -> None:
        jax.block_until_ready(loop(*given))

    run()
    return min(seconds(run) for _ in range(runs)) / turns


def rows(shapes: dict[str, tuple[int, ...]], turns: int, runs: int) -> Iterator[dict[str, Any]]:
    ways = (blocks, triton, mosaic, cudnn) if jax.default_backend() == "gpu" else (blocks,)
    for name, shape in shapes.items():
        given = problem(shape)
        count, queries, keys, width, wide = shape
        work = 2 * count * queries * keys * (width + wide)
        exact = jax.jit(blocks)(*(x.astype(jnp.float32) for x in given[:3]), given[3])
        for way in ways:
            row = {"shape": name, "way": way.__name__}
            try:
                found = jax.jit(way)(*given).astype(jnp.float32)
                error = float(jnp.max(jnp.abs(found - exact)) / jnp.max(jnp.abs(exact)))
                time = time_of(way, given, turns, runs)
                yield row | {"seconds": time, "rate": work / time, "error": error}
            except Exception as why:  # what a device or a version of JAX lacks
                yield row | {"refused": f"{type(why).__name__}: {why}".splitlines()[0]}


def main() -> None:
    record = machine()
    print(f"{'':<26}{'':<8}{'us':>10}{'Tflop/s':>9}{'error':>9}")
    found = []
    often = (TURNS, RUNS) if jax.default_backend() == "gpu" else (1, 1)
    for row in rows(SHAPES, *often):
        found.append(row)
        if "refused" in row:
            told = row["refused"]
        else:
            told = f"{row['seconds'] * 1e6:10.1f}{row['rate'] / 1e12:9.1f}{row['error']:9.5f}"
        print(f"{row['shape']:<26}{row['way']:<8}{told}", flush=True)
    device = re.sub(r"\W+", "-", record["device"].lower())
    print(save_record(f"kernels-{device}", record | {"rows": found}))


if __name__ == "__main__":
    main()
