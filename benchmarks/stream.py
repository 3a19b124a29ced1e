"""Memory of a stream that does not end, and its answers beside the offline tracker's.

python -m benchmarks.stream VIDEO [--variant NAME] [--image-size N] [--frames N]

The frames of the video come again and again. Every thousand frames an object is added and an older
one removed. Prints the memory of the host (resident) and of the device (live arrays) on the way,
and the largest difference of the first 200 answers from `SAM2VideoPredictor`'s; 0 is expected.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

import sam2jax
from sam2jax.io.video import open_video
from sam2jax.testing import random_params

COMPARED = 200
EVERY = 1000  # frames between reports, and between changes of objects


def host_mib() -> float:
    """Resident memory of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def device_mib() -> float:
    return sum(array.nbytes for array in jax.live_arrays()) / 2**20


def click(frame: np.ndarray) -> dict[str, Any]:
    height, width = frame.shape[:2]
    return {"points": [[0.22 * width, 0.65 * height]], "labels": [1]}


def offline(predictor: sam2jax.SAM2VideoPredictor, frames: np.ndarray) -> list[np.ndarray]:
    state = predictor.init_state(frames)
    predictor.add_new_points_or_box(state, 0, 0, **click(frames[0]))
    return [masks for _, _, masks in predictor.propagate_in_video(state)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video")
    parser.add_argument("--variant", default="sam2.1_hiera_tiny", choices=sam2jax.VARIANTS)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--frames", type=int, default=10_000)
    given = parser.parse_args()
    config = dataclasses.replace(sam2jax.VARIANTS[given.variant], image_size=given.image_size)
    model, params = sam2jax.SAM2(config), random_params(config, seed=7)
    with open_video(given.video, given.image_size) as video:
        clip = np.stack([frame.image for frame in video.frames(0, COMPARED)])

    expected = offline(sam2jax.SAM2VideoPredictor(model, params), clip)
    camera = sam2jax.SAM2CameraPredictor(model, params)
    camera.load_first_frame(clip[0])
    camera.add_new_prompt(0, 0, **click(clip[0]))
    worst, start = 0.0, time.perf_counter()
    print(
        f"{'frame':>8} {'host MiB':>10} {'device MiB':>11} {'ms a frame':>11}  objects", flush=True
    )
    for index in range(1, given.frames):
        _, masks = camera.track(clip[index % len(clip)])
        if index < len(clip):
            worst = max(worst, float(np.abs(masks - expected[index]).max()))
        if index % EVERY == EVERY - 1 or index == len(clip):
            rate = 1000 * (time.perf_counter() - start) / index
            memory = f"{host_mib():10.1f} {device_mib():11.1f}"
            print(f"{index:8} {memory} {rate:11.1f}  {camera.obj_ids}", flush=True)
        if index % EVERY == 0:
            camera.add_new_prompt(index, index, **click(clip[0]))
            camera.remove_object(index - EVERY)
    print(f"largest difference in the first {len(clip)} frames: {worst:.1e}")


if __name__ == "__main__":
    main()
