"""Clips and scripts: the same frames and prompts through our tracker and the official one."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

import sam2jax
from sam2jax.types import EMPTY, FrameOutput
from tests import oracle
from tests.parity.pairs import Pair, assert_close, iou

SIZE = (540, 960)  # of the clip `bedroom`
CLICK = (210.0, 350.0)


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
    out, first = track(both, frames, prompts, start, reverse, params)
    indices = range(first, first + len(out.masks))
    masks, scores = np.asarray(out.masks), np.asarray(out.object_score)
    return Result({t: masks[t - first] for t in indices}, {t: scores[t - first] for t in indices})


def track(
    both: Pair,
    frames: np.ndarray,
    prompts: list[Prompt],
    start: int = 0,
    reverse: bool = False,
    params: Any = None,
) -> tuple[FrameOutput, int]:
    """Our answers with a leading [T], and the index of the first."""
    by_frame = {
        frame: make_prompts([p for p in prompts if p.frame == frame], count(prompts), both)
        for frame in sorted({p.frame for p in prompts})
    }
    state = sam2jax.init_state(
        both.model, count(prompts), len(frames), len(by_frame), frame_index=start
    )
    for frame, given in by_frame.items():  # those that lie behind, too
        state = sam2jax.condition(
            both.model, params or both.params, state, frames[frame], given, frame
        )
    first = 0 if reverse else start
    chunk = frames[: start + 1] if reverse else frames[start:]
    _, out = sam2jax.track(
        both.model, params or both.params, chunk, by_frame, state, reverse=reverse
    )
    return out, first


def make_prompts(prompts: list[Prompt], objects: int, both: Pair) -> sam2jax.Prompts:
    rows = {p.obj: p.arguments(both.config.image_size) for p in prompts}

    def column(name: str) -> list | None:
        values = [rows.get(obj, {}).get(name) for obj in range(objects)]
        return None if all(value is None for value in values) else values

    return sam2jax.Prompts.make(
        points=column("points"),
        labels=column("labels"),
        boxes=column("box"),
        masks=column("mask"),
        width=4,  # one program for all scripts
    )


def count(prompts: list[Prompt]) -> int:
    return 1 + max(p.obj for p in prompts)


def compare(ours: Result, theirs: Result, frame_bar: float, clip_bar: float) -> None:
    """Masks, IoU of the masks and object scores, on every frame that the official code tracked.

    The first answer is held to `frame_bar`; what feeds on it to `clip_bar`.
    """
    assert set(ours.masks) == set(theirs.masks)
    for position, t in enumerate(theirs.masks):
        bar = clip_bar if position else frame_bar
        assert_close(ours.masks[t], theirs.masks[t], bar, f"frame {t}: masks")
        assert_close(ours.scores[t], theirs.scores[t], bar, f"frame {t}: object score")
        for obj in range(len(theirs.masks[t])):
            overlap = iou(ours.masks[t][obj] > 0, theirs.masks[t][obj] > 0)
            assert overlap > 0.999, f"frame {t}, object {obj}: IoU {overlap}"


def frames_read(indices: np.ndarray) -> set[int]:
    """The frames that were attended to, without the empty slots."""
    return {int(i) for i in np.asarray(indices).ravel() if i != EMPTY}


def ellipse(height: int, width: int) -> np.ndarray:
    """A mask prompt with a ragged edge."""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    return (x - 0.3) ** 2 / 0.02 + (y - 0.6) ** 2 / 0.05 + 0.1 * np.sin(40 * x) < 1
