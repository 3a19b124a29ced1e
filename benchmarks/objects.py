"""What another object costs: both video predictors track objects with full memory banks.

Seconds per frame for each number of objects, and the slope of a line through them. On a machine
that is not idle set OMP_WAIT_POLICY=passive: PyTorch's threads spin otherwise, and it is slowed
most.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import jax
import numpy as np

import sam2jax
from benchmarks.checks import believe, believed
from benchmarks.settings import SEED, Settings
from benchmarks.timing import Row, compare
from benchmarks.track import CLICK
from sam2jax.config import SAM2Config
from sam2jax.nn.sam2 import SAM2
from sam2jax.predictors.propagation import frames_at_once
from sam2jax.predictors.session import ObjectHistory
from sam2jax.testing import random_params

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


class Official:
    """The official predictor, tracking in a session whose objects share one full memory."""

    def __init__(self, config: SAM2Config, frames: np.ndarray, compiled: str | None) -> None:
        from benchmarks import official

        self.model = official.build(config, compiled)
        self.running = lambda: official.running(config)
        self.device = official.DEVICE
        self.images = (frames / np.float32(255) - MEAN) / STD
        self.full = config.max_obj_ptrs_in_encoder

    def start(self, objects: int) -> None:
        """The prompted frame's memory becomes every object's, on all frames before the timed."""
        from tests import oracle

        model = self.model
        with self.running():
            state = oracle.init_state(model, self.images)
            state["images"] = state["images"].to(self.device)
            points = np.float32([CLICK]) * model.image_size
            model.add_new_points_or_box(state, 0, 0, points=points, labels=[1])
            model.propagate_in_video_preflight(state)
        first = state["output_dict_per_obj"][0]["cond_frame_outputs"][0]
        for obj in range(objects):
            held = state["output_dict_per_obj"][model._obj_id_to_idx(state, obj)]
            held["cond_frame_outputs"][0] = first
            held["non_cond_frame_outputs"] = dict.fromkeys(range(1, self.full), first)
        self.answers = model.propagate_in_video(state, start_frame_idx=self.full)

    def track(self, frames: int) -> None:
        """Tracks the next frames; `masks` are the last one's: [N, 1, H, W]."""
        with self.running():
            for _, _, masks in itertools.islice(self.answers, frames):
                self.masks = masks.float().cpu().numpy()


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


def rows(settings: Settings) -> Iterator[Row]:
    config, runs = settings.first, settings.runs
    chunk = frames_at_once()  # whole ones are timed
    frames = -(-settings.frames // chunk) * chunk
    # One more run than those timed warms up; what ours begins ahead needs frames, too.
    length = config.max_obj_ptrs_in_encoder + frames * (runs + 2)
    shape = (length, config.image_size, config.image_size, 3)
    pictures = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    ours, theirs, exact = Ours(config, pictures), None, None
    if settings.official:
        theirs = Official(config, pictures, settings.compiled)
        if config.dtype != "float32":
            exact = Official(settings.exact, pictures, compiled=None)
    measured = []
    for count in settings.objects:
        for side in filter(None, (ours, theirs, exact)):
            side.start(count)
        row = compare(
            f"{count} objects: frame",
            theirs and (lambda: theirs.track(frames)),
            lambda: ours.track(frames),
            runs,
        )
        if exact:
            exact.track(frames * (runs + 1))
        if theirs:
            given = row.name, ours.masks, theirs.masks, exact and exact.masks
            row = believed(row, functools.partial(believe, *given))
        measured.append(row.per(frames))
        yield measured[-1]
    if len(measured) > 1 and all(row.ours for row in measured):
        mine = slope(settings.objects, [row.ours for row in measured])
        if theirs is None:
            yield Row("an added object", None, mine)
        else:
            official = slope(settings.objects, [row.official for row in measured])
            yield Row("an added object", official, mine, official / mine)


def slope(counts: tuple[int, ...], seconds: list[float]) -> float:
    return float(np.polyfit(counts, seconds, 1)[0])
