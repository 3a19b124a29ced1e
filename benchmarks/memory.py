"""Memory against the number of frames: temporary memory of the device's program, and the peak of
the host's while a video is tracked from disk."""

from __future__ import annotations

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sam2jax
from benchmarks.settings import Settings
from benchmarks.timing import Row
from sam2jax.nn.sam2 import SAM2, param_shapes

ROOT = pathlib.Path(__file__).resolve().parent.parent
PICTURE = (270, 480)  # height and width of the video's frames


def rows(settings: Settings) -> Iterator[Row]:
    model = SAM2(settings.first)
    for length in (1, *settings.lengths):
        name = f"temporary memory, {length} frames in one program"
        yield Row(name, None, temporary(model, length), unit="MiB")
    for length in settings.lengths:
        yield Row(f"host's peak, {length} frames", None, peak(settings, length), unit="MiB")


def temporary(model: SAM2, length: int) -> float:
    """Of the compiled program, beside its arguments and results."""

    def run(params: Any, frames: Any):
        return sam2jax.track(model, params, frames, prompts)[1].masks

    prompts = sam2jax.Prompts.make(points=[[(10, 10)]])
    frames = jax.ShapeDtypeStruct((length, *PICTURE, 3), jnp.uint8)
    program = jax.jit(run).lower(param_shapes(model.config), frames).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20


def peak(settings: Settings, length: int) -> float:
    """Of a process that tracks so many frames and writes their masks."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"from benchmarks.memory import child; child({folder!r}, {length}, {settings!r})"
        command = [sys.executable, "-c", f"from benchmarks.settings import Settings; {code}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def child(folder: str, length: int, settings: Settings) -> None:
    from benchmarks.settings import SEED
    from sam2jax.io.writer import VideoWriter
    from sam2jax.testing import random_params

    path = pathlib.Path(folder) / "clip.mp4"
    rng = np.random.default_rng(0)
    with VideoWriter(path, None, *PICTURE) as writer:
        for _ in range(length):
            writer.write(rng.integers(0, 256, (*PICTURE, 3), np.uint8))
    config = settings.first
    predictor = sam2jax.SAM2VideoPredictor(SAM2(config), random_params(config, SEED))
    state = predictor.init_state(path)
    predictor.add_new_points_or_box(state, 0, 1, points=[(100, 100)], labels=[1])
    for _ in predictor.propagate_in_video(state):
        pass
    print(json.dumps(resident_peak()))


def resident_peak() -> float:
    """Of this process. What `getrusage` tells on Linux may be the parent's, where that had more."""
    status = pathlib.Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
