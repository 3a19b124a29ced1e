"""Cold start: from a new process to the first mask, with and without the disk cache of programs."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks.settings import SEED, Settings
from benchmarks.timing import Row
from sam2jax.config import SAM2Config
from sam2jax.convert import write
from sam2jax.testing import random_params

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = """
import json, time
import av, scipy.ndimage  # of which the official package has no need
marks = [time.perf_counter()]
def mark(): marks.append(time.perf_counter())
import numpy as np, sam2jax
mark()
model, params = sam2jax.load({path!r}, **{options!r})
mark()
predictor = sam2jax.SAM2VideoPredictor(model, params)
size = model.config.image_size
state = predictor.init_state(np.zeros((2, size, size, 3), np.uint8))
predictor.add_new_points_or_box(state, 0, 1, points=[(size / 4, size / 2)], labels=[1])
mark()
print(json.dumps([b - a for a, b in zip(marks, marks[1:])]))
"""
OFFICIAL = """
import json, time
import av, scipy.ndimage, sam2jax  # of which the official package has no need
marks = [time.perf_counter()]
def mark(): marks.append(time.perf_counter())
import numpy as np, torch
from benchmarks import official
from benchmarks.settings import Settings
from tests import oracle
mark()
config = {settings!r}.first
model = oracle.construct(config)
tensors = torch.load({path!r}, weights_only=True)["model"]
model = oracle.filled(model, tensors).to(official.DEVICE)
mark()
size = config.image_size
with official.running(config):
    state = oracle.init_state(model, np.zeros((2, size, size, 3), np.float32))
    model.add_new_points_or_box(state, 0, 1, points=[(size / 4, size / 2)], labels=[1])
if official.DEVICE == "cuda":
    torch.cuda.synchronize()
mark()
print(json.dumps([b - a for a, b in zip(marks, marks[1:])]))
"""
PARTS = ("import", "load", "first mask")


def rows(settings: Settings) -> Iterator[Row]:
    config = settings.first
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "weights.pt"
        store(config, path)
        names = ("image_size", "dtype", "fill_hole_area")
        options = {name: getattr(config, name) for name in names}
        given = {"path": str(path), "options": options, "settings": settings}
        runs = settings.runs
        official = median(OFFICIAL.format(**given), runs) if settings.official else None
        for cache in (None, pathlib.Path(folder) / "programs"):
            ours = median(OURS.format(**given), runs, cache)
            what = "cached" if cache else "not cached"
            for index, part in enumerate((*PARTS, "all")):
                mine = sum(ours) if part == "all" else ours[index]
                if official is None:
                    yield Row(f"cold start, {what}: {part}", None, mine)
                    continue
                theirs = sum(official) if part == "all" else official[index]
                yield Row(f"cold start, {what}: {part}", theirs, mine, theirs / mine)


def store(config: SAM2Config, path: pathlib.Path) -> None:
    flat: dict[str, Any] = flatten_dict(random_params(config, SEED), sep="/")
    write(path, {name: np.asarray(value) for name, value in flat.items()}, config)


def median(code: str, runs: int, cache: pathlib.Path | None = None) -> list[float]:
    """Of some runs after one that brings files into memory, and fills the cache."""
    run(code, cache)
    return np.median([run(code, cache) for _ in range(runs)], axis=0).tolist()


def run(code: str, cache: pathlib.Path | None = None) -> list[float]:
    """Seconds of each part, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    if cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
