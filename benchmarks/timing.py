"""Timing two ways of doing the same thing in turn, so that a busy machine slows both alike."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Medians over paired runs, in seconds."""

    name: str
    official: float
    ours: float
    ratio: float  # median of official / ours; above 1: ours is faster
    runs: int

    def __str__(self) -> str:
        return f"{self.name:<24} {self.official:10.4f} {self.ours:10.4f} {self.ratio:8.2f}"


HEADER = f"{'seconds':<24} {'official':>10} {'sam2jax':>10} {'ratio':>8}"


def compare(
    name: str, official: Callable[[], Any], ours: Callable[[], Any], runs: int
) -> Comparison:
    """Runs both once to warm up, then in turn. Each returns when its work is done."""
    official(), ours()
    times = [(_seconds(official), _seconds(ours)) for _ in range(runs)]
    theirs, mine = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    return Comparison(name, theirs, mine, ratio, runs)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def save(name: str, settings: dict[str, Any], rows: list[Comparison]) -> pathlib.Path:
    """Writes results/NAME.json."""
    import jax
    import torch

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "settings": settings,
        "machine": {
            "processor": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "jax_device": jax.devices()[0].device_kind,
        },
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "torch": torch.__version__,
        },
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
