"""Timing two ways of doing the same thing in turn, so that a busy machine slows both alike."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from sam2jax.io.files import atomic_path
from sam2jax.ops.linear import precision

RESULTS = pathlib.Path(__file__).parent / "results"
PRODUCT = 4096  # rows and columns of the product that a device's rate is measured by


@dataclasses.dataclass(frozen=True)
class Row:
    """Medians over paired runs. Where the official package is missing, its figures are None."""

    name: str
    official: float | None
    ours: float | None
    ratio: float | None = None  # median of official / ours; above 1: ours is faster, or smaller
    spread: tuple[float, float] | None = None  # least and greatest of the paired ratios
    runs: int = 1
    share: float | None = None  # of the device's rate of matrix products, of ours
    unit: str = "s"
    refused: str | None = None  # why the answers, and so the times, were not believed

    def per(self, count: int, name: str | None = None) -> Row:
        """Of one among `count` that were timed together."""
        official, ours = (x if x is None else x / count for x in (self.official, self.ours))
        return dataclasses.replace(self, official=official, ours=ours, name=name or self.name)

    def __str__(self) -> str:
        if self.ours is None:
            return f"{self.name:<34} not believed: {self.refused}"
        spread = "" if self.spread is None else "{:.2f} to {:.2f}".format(*self.spread)
        cells = [
            f"{self.name:<34}",
            " " * 10 if self.official is None else f"{self.official:10.4f}",
            f"{self.ours:10.4f}",
            f"{self.unit:>4}",
            " " * 7 if self.ratio is None else f"{self.ratio:7.2f}",
            f"{spread:>14}",
            "" if self.share is None else f"{self.share:7.0%}",
        ]
        return " ".join(cells).rstrip()


HEADER = (
    f"{'':<34} {'official':>10} {'sam2jax':>10} {'':>4} {'ratio':>7} {'spread':>14} {'share':>7}"
)


def compare(
    name: str, official: Callable[[], Any] | None, ours: Callable[[], Any], runs: int
) -> Row:
    """Runs both once to warm up, then in turn. Each returns when its work is done."""
    both = [run for run in (official, ours) if run is not None]
    for run in both:
        run()
    times = [[seconds(run) for run in both] for _ in range(runs)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    if official is None:
        return Row(name, None, medians[0], runs=runs)
    ratios = [theirs / mine for theirs, mine in times]
    spread = min(ratios), max(ratios)
    return Row(name, medians[0], medians[1], statistics.median(ratios), spread, runs)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def with_share(row: Row, operations: float, rate: float) -> Row:
    """With the share of the device's rate that so many operations in our time are."""
    if row.ours is None:
        return row
    return dataclasses.replace(row, share=operations / row.ours / rate)


def operations(program: Callable, *args: Any, **options: Any) -> float:
    """Floating point operations of the products in a jitted function; where it depends on the
    device, of the way that has most, and of a loop whose end is not known of one turn."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, args
    )
    return products(program.trace(*shapes, **options).jaxpr.jaxpr)


def _jaxpr(param: Any) -> Any:
    return param if hasattr(param, "eqns") else getattr(param, "jaxpr", None)


def products(jaxpr: Any) -> float:
    """Operations of a jaxpr's products and convolutions."""
    total = 0.0
    for equation in jaxpr.eqns:
        params, shapes = equation.params, [x.aval.shape for x in equation.invars]
        inside = [products(inner) for inner in map(_jaxpr, jax.tree.leaves(params)) if inner]
        size = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * size * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            features = shapes[1][params["dimension_numbers"].rhs_spec[0]]
            total += 2 * size * math.prod(shapes[1]) / features
        elif equation.primitive.name == "cond":
            total += max(inside)
        else:
            total += sum(inside) * params.get("length", 1)  # of a scan
    return total


@functools.cache
def matrix_rate(dtype: str, runs: int = 5) -> float:
    """Operations a second that the device reaches in one large product, the best of some runs."""
    left, right = jax.random.normal(jax.random.key(0), (2, PRODUCT, PRODUCT), jnp.dtype(dtype))
    options = {"precision": precision(left.dtype), "preferred_element_type": jnp.float32}
    product = jax.jit(lambda a, b: jnp.matmul(a, b, **options))

    def run() -> None:
        jax.block_until_ready(product(left, right))

    run()
    return 2 * PRODUCT**3 / min(seconds(run) for _ in range(runs))


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    packages = ("jax", "jaxlib", "flax", "numpy", "torch", "sam2")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
    }


def processor() -> str:
    """Its name, where the system tells it."""
    about = pathlib.Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {platform.machine()}" if names else platform.machine()


def save(name: str, settings: dict[str, Any], rows: Iterable[Row]) -> pathlib.Path:
    """Writes results/NAME.json: rows, and what they hold for."""
    record = {**machine(), "settings": settings, "rows": [dataclasses.asdict(row) for row in rows]}
    return save_record(name, record)


def save_record(name: str, record: dict[str, Any]) -> pathlib.Path:
    """Writes results/NAME.json, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    return path
