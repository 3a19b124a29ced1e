"""What another object costs, beside the official package: same weights, same frames, in turn.

python -m benchmarks.objects [--variant NAME] [--image-size N] [--dtype bfloat16]
                             [--objects 1 2 4 8 16] [--frames N] [--runs N]

Both video predictors track objects with full memory banks: one conditioning frame, six recent
ones, sixteen object pointers. Prints seconds per frame for each number of objects, and the slope of
a line through them: the cost of an added object. The ratio is official time over ours. A time is
believed after the answers have agreed. The weights are random, which changes nothing about the
work. On an accelerator ours takes eight frames at once: ask for --frames 8. On a machine that is
not idle set OMP_WAIT_POLICY=passive: PyTorch's threads spin otherwise, and it is slowed most. Needs
the parity extra.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import jax
import numpy as np

import sam2jax
from benchmarks.timing import HEADER, Comparison, compare, save
from benchmarks.track import CLICK
from sam2jax.config import VARIANTS, SAM2Config
from sam2jax.nn.sam2 import SAM2
from sam2jax.predictors.session import ObjectHistory
from sam2jax.testing import random_params
from tests import oracle
from tests.parity.pairs import CLIP, assert_close, iou

SEED = 7  # of the weights
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


class Official:
    """The official predictor, tracking in a session whose objects share one full memory."""

    def __init__(self, config: SAM2Config, frames: np.ndarray) -> None:
        self.model = oracle.build(config, SEED)
        self.images = (frames / np.float32(255) - MEAN) / STD
        self.full = config.max_obj_ptrs_in_encoder
        self.bfloat16 = config.dtype == "bfloat16"

    def start(self, objects: int) -> None:
        """The prompted frame's memory becomes every object's, on all frames before the timed."""
        model = self.model
        with self._autocast():
            state = oracle.init_state(model, self.images)
            points = np.float32([CLICK]) * model.image_size
            oracle.prompt(model, state, obj_id=0, points=points, labels=[1])
            model.propagate_in_video_preflight(state)
        first = state["output_dict_per_obj"][0]["cond_frame_outputs"][0]
        for obj in range(objects):
            held = state["output_dict_per_obj"][model._obj_id_to_idx(state, obj)]
            held["cond_frame_outputs"][0] = first
            held["non_cond_frame_outputs"] = dict.fromkeys(range(1, self.full), first)
        self.answers = model.propagate_in_video(state, start_frame_idx=self.full)

    def track(self, frames: int) -> None:
        """Tracks the next frames; `masks` are the last one's: [N, 1, H, W]."""
        with self._autocast():
            for _, _, masks in itertools.islice(self.answers, frames):
                self.masks = masks.float().numpy()

    def _autocast(self) -> contextlib.AbstractContextManager:
        return oracle.autocast() if self.bfloat16 else contextlib.nullcontext()


class Ours:
    """Our predictor in the same situation."""

    def __init__(self, config: SAM2Config, frames: np.ndarray) -> None:
        self.predictor = sam2jax.SAM2VideoPredictor(SAM2(config), random_params(config, SEED))
        self.frames, self.full = frames, config.max_obj_ptrs_in_encoder

    def start(self, objects: int) -> None:
        state = self.predictor.init_state(self.frames)
        points = np.float32([CLICK]) * self.predictor.image_size
        self.predictor.add_new_points_or_box(state, 0, 0, points=points, labels=[1])
        list(self.predictor.propagate_in_video(state, max_frame_num_to_track=0))
        first = state.objects[0].cond[0]
        memories = {
            frame: first.replace(memory=first.memory.replace(frame=np.int32(frame)))
            for frame in range(1, self.full)
        }
        state.objects = {
            obj: ObjectHistory(cond={0: first}, recent=dict(memories)) for obj in range(objects)
        }
        self.answers = self.predictor.propagate_in_video(state, start_frame_idx=self.full)

    def track(self, frames: int) -> None:
        for _, _, masks in itertools.islice(self.answers, frames):
            self.masks = masks
        # Nothing that was begun ahead may be finished in the other's time.
        jax.block_until_ready(jax.live_arrays())


def rows(config: SAM2Config, counts: list[int], frames: int, runs: int) -> Iterator[Comparison]:
    """Seconds per frame for each number of objects, then the cost of an added one."""
    # One more run than those timed warms up; what ours begins ahead needs frames, too.
    length = config.max_obj_ptrs_in_encoder + frames * (runs + 2)
    shape = (length, config.image_size, config.image_size, 3)
    pictures = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    official, ours = Official(config, pictures), Ours(config, pictures)
    exact = None
    if config.dtype == "bfloat16":
        exact = Official(dataclasses.replace(config, dtype="float32"), pictures)
    measured = []
    for count in counts:
        sides = [official, ours, exact] if exact else [official, ours]
        for side in sides:
            side.start(count)
        row = compare(
            f"objects: {count}", lambda: official.track(frames), lambda: ours.track(frames), runs
        )
        if exact:
            exact.track(frames * (runs + 1))
        check(*(side.masks for side in sides))
        row = dataclasses.replace(row, official=row.official / frames, ours=row.ours / frames)
        measured.append(row)
        yield row
    if len(counts) > 1:
        theirs = slope(counts, [row.official for row in measured])
        mine = slope(counts, [row.ours for row in measured])
        yield Comparison("an added object", theirs, mine, theirs / mine, runs)


def slope(counts: list[int], seconds: list[float]) -> float:
    return float(np.polyfit(counts, seconds, 1)[0])


def check(official: np.ndarray, ours: np.ndarray, exact: np.ndarray | None = None) -> None:
    """The design's bars. In bfloat16, no further from official float32 than 1.5 times autocast."""
    if exact is None:
        assert_close(ours, official, CLIP, "mask logits")
        assert iou(ours > 0, official > 0) > 0.999
    else:
        assert distance(ours, exact) <= 1.5 * distance(official, exact)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference."""
    return float(np.sqrt(np.mean((one - other) ** 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="sam2.1_hiera_tiny", choices=VARIANTS)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--frames", type=int, default=1, help="per run")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs per row")
    given = parser.parse_args()
    config = dataclasses.replace(
        VARIANTS[given.variant], image_size=given.image_size, dtype=given.dtype
    )
    print(f"{given.variant}, {given.image_size} px, {given.dtype}\n{HEADER}", flush=True)
    measured = []
    for row in rows(config, given.objects, given.frames, given.runs):
        measured.append(row)
        print(row, flush=True)
    name = f"objects-{given.variant}-{given.image_size}-{given.dtype}"
    print("written to", save(name, vars(given), measured))


if __name__ == "__main__":
    main()
