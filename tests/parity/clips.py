"""Clips and scripts: the same frames and prompts through our tracker and the official one."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

import sam2jax
from tests import oracle
from tests.parity.pairs import CLIP, LOGITS, Pair, assert_close, iou

SIZE = (540, 960)  # of the clip `bedroom`
CLICK = (210.0, 350.0)

OBJECTS, ROOM, WIDTH = 3, 8, 4  # of objects, conditioning frames and points, in every program


@functools.lru_cache(maxsize=4)
def load_clip(media: pathlib.Path, image_size: int, count: int) -> np.ndarray:
    """The first frames of `bedroom` as the official code preprocesses a folder: [T, S, S, 3]."""
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    paths = [media / "bedroom" / f"{index:05d}.jpg" for index in range(count)]
    load = oracle.sam2.utils.misc._load_img_as_tensor
    images = [oracle.to_numpy(load(path, image_size)[0]) for path in paths]
    return (np.stack(images) - mean) / std


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Clicks, a box or a mask for one object on one frame; positions as shares of the frame."""

    frame: int = 0
    obj: int = 0
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | None = None

    def arguments(self, size: int) -> dict[str, Any]:
        """As the predictors take them, in pixels of a square frame."""
        if self.mask is not None:
            return {"mask": self.mask}
        given: dict[str, Any] = {}
        if self.labels:
            given["points"] = np.float32(self.points) * size
            given["labels"] = np.int32(self.labels)
        if self.box is not None:
            given["box"] = np.float32(self.box) * size
        return given


def click(frame: int = 0, obj: int = 0, at: tuple[float, float] = CLICK, label: int = 1) -> Prompt:
    """A click at a pixel of the original clip."""
    return Prompt(frame, obj, ((at[0] / SIZE[1], at[1] / SIZE[0]),), (label,))


@dataclasses.dataclass(frozen=True)
class Bars:
    """Largest difference of mask logits in the first answer and in those that feed on it, and of
    object scores; least IoU of masks."""

    frame: float
    clip: float
    score: float
    iou: float


REAL = Bars(frame=LOGITS, clip=CLIP, score=CLIP, iou=0.999)
# The small model's logits are of size 0.1 rather than 3, and one pixel of its masks weighs more.
SMALL = Bars(frame=2e-5, clip=2e-5, score=2e-4, iou=0.99)


@dataclasses.dataclass(frozen=True)
class Result:
    """Per frame tracked, by index: [N, S/4, S/4] mask logits and [N] object scores."""

    masks: dict[int, np.ndarray]
    scores: dict[int, np.ndarray]


def official(
    both: Pair, frames: np.ndarray, prompts: list[Prompt], start: int = 0, reverse: bool = False
) -> Result:
    model, size = both.official, both.config.image_size
    state = oracle.init_state(model, frames)
    for one in sorted(prompts, key=lambda p: p.obj):
        given = one.arguments(size)
        oracle.prompt(model, state, frame_idx=one.frame, obj_id=one.obj, **given)
    order = list(oracle.propagate(model, state, start_frame_idx=start, reverse=reverse))
    held = {t: [oracle.outputs(state, t, obj) for obj in range(count(prompts))] for t in order}
    return Result(
        {t: np.stack([one["masks"] for one in held[t]]) for t in order},
        {t: np.stack([one["object_score"] for one in held[t]]) for t in order},
    )


def ours(
    both: Pair,
    frames: np.ndarray,
    prompts: list[Prompt],
    start: int = 0,
    reverse: bool = False,
    params: Any = None,
) -> Result:
    """Ours, a step at a time, with room for OBJECTS: one program serves all scripts."""
    params = both.params if params is None else params
    state, by_frame = begin(both, params, frames, prompts, start)
    none = sam2jax.Prompts.none(OBJECTS, WIDTH)
    real, result = count(prompts), Result({}, {})
    for t in range(start, -1, -1) if reverse else range(start, len(frames)):
        now = by_frame.get(t, none)
        state, out = sam2jax.step(both.model, params, state, frames[t], now, reverse=reverse)
        result.masks[t] = np.asarray(out.masks)[:real]
        result.scores[t] = np.asarray(out.object_score)[:real]
    return result


def ours_scanned(both: Pair, frames: np.ndarray, prompts: list[Prompt]) -> Result:
    """Ours, as one program over the whole clip."""
    state, by_frame = begin(both, both.params, frames, prompts, 0)
    _, out = sam2jax.track(both.model, both.params, frames, by_frame, state)
    real, steps = count(prompts), range(len(frames))
    masks, scores = np.asarray(out.masks)[:, :real], np.asarray(out.object_score)[:, :real]
    return Result({t: masks[t] for t in steps}, {t: scores[t] for t in steps})


def begin(
    both: Pair, params: Any, frames: np.ndarray, prompts: list[Prompt], start: int
) -> tuple[sam2jax.TrackState, dict[int, sam2jax.Prompts]]:
    """A state that has seen the prompted frames but the first, and the prompts by frame."""
    by_frame = {
        frame: make_prompts([p for p in prompts if p.frame == frame], both)
        for frame in sorted({p.frame for p in prompts})
    }
    state = sam2jax.init_state(both.model, OBJECTS, len(frames), ROOM, frame_index=start)
    for frame, given in by_frame.items():
        if frame != start:
            state = sam2jax.condition(both.model, params, state, frames[frame], given, frame)
    return state, by_frame


def make_prompts(prompts: list[Prompt], both: Pair) -> sam2jax.Prompts:
    rows = {p.obj: p.arguments(both.config.image_size) for p in prompts}

    def column(name: str) -> list | None:
        values = [rows.get(obj, {}).get(name) for obj in range(OBJECTS)]
        return None if all(value is None for value in values) else values

    return sam2jax.Prompts.make(
        points=column("points"),
        labels=column("labels"),
        boxes=column("box"),
        masks=column("mask"),
        width=WIDTH,
    )


def count(prompts: list[Prompt]) -> int:
    return 1 + max(p.obj for p in prompts)


def compare(ours: Result, theirs: Result, bars: Bars) -> None:
    """Holds masks, IoU of the masks and object scores to `bars`, on every frame tracked."""
    assert set(ours.masks) == set(theirs.masks)
    for position, t in enumerate(theirs.masks):
        bar = bars.clip if position else bars.frame
        assert_close(ours.masks[t], theirs.masks[t], bar, f"frame {t}: masks")
        assert_close(ours.scores[t], theirs.scores[t], bars.score, f"frame {t}: object score")
        for obj in range(len(theirs.masks[t])):
            overlap = iou(ours.masks[t][obj] > 0, theirs.masks[t][obj] > 0)
            assert overlap > bars.iou, f"frame {t}, object {obj}: IoU {overlap}"


def ellipse(height: int, width: int) -> np.ndarray:
    """A mask prompt with a ragged edge."""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    return (x - 0.3) ** 2 / 0.02 + (y - 0.6) ** 2 / 0.05 + 0.1 * np.sin(40 * x) < 1
