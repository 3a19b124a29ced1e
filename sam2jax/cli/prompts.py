"""Prompts as they are typed: read, checked, and made into what the tracker takes."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from sam2jax.types import Prompts

POINT = "X,Y[,LABEL][@OBJECT][:FRAME]"
BOX = "X0,Y0,X1,Y1[@OBJECT][:FRAME]"
MASK = "PNG[@OBJECT][:FRAME]"
_LABELS = (-1, 0, 1, 2, 3)
_MOST_OBJECTS = 255  # what a palette PNG can hold


@dataclasses.dataclass
class ObjectPrompt:
    """What is said about one object on one frame, in pixels of the video."""

    points: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    labels: list[int] = dataclasses.field(default_factory=list)
    box: tuple[float, float, float, float] | None = None
    mask: pathlib.Path | None = None

    @property
    def num_points(self) -> int:
        return len(self.points) + (2 if self.box else 0)


FramePrompts = dict[int, ObjectPrompt]  # by object


class PromptTable:
    """All prompts of a run: `frames[frame][object]`."""

    def __init__(self) -> None:
        self.frames: dict[int, FramePrompts] = {}

    @property
    def object_ids(self) -> list[int]:
        return sorted({object_id for frame in self.frames.values() for object_id in frame})

    def entry(self, object_id: int, frame: int) -> ObjectPrompt:
        if not 1 <= object_id <= _MOST_OBJECTS:
            raise ValueError(f"object {object_id}: objects are numbered 1 to {_MOST_OBJECTS}.")
        if frame < 0:
            raise ValueError(f"frame {frame}: frames are numbered from 0.")
        return self.frames.setdefault(frame, {}).setdefault(object_id, ObjectPrompt())

    def add_point(self, values: Sequence[Any], object_id: int, frame: int) -> None:
        x, y, label = (*values, 1) if len(values) == 2 else values
        if label not in _LABELS:
            raise ValueError(
                f"label {label}: expected 1 (on the object) or 0 (not on it); 2 and 3 are a "
                "box's corners, -1 is no point."
            )
        entry = self.entry(object_id, frame)
        entry.points.append((x, y))
        entry.labels.append(int(label))
        self._check_one_kind(entry, object_id, frame)

    def add_box(self, values: Sequence[float], object_id: int, frame: int) -> None:
        x0, y0, x1, y1 = values
        if x1 <= x0 or y1 <= y0:
            raise ValueError(
                f"box {x0:g},{y0:g},{x1:g},{y1:g} is empty: expected X0 < X1 and Y0 < Y1."
            )
        entry = self.entry(object_id, frame)
        if entry.box is not None:
            raise ValueError(f"object {object_id} has two boxes on frame {frame}; give one.")
        entry.box = (x0, y0, x1, y1)
        self._check_one_kind(entry, object_id, frame)

    def add_mask(self, path: pathlib.Path, object_id: int, frame: int) -> None:
        entry = self.entry(object_id, frame)
        if entry.mask is not None:
            raise ValueError(f"object {object_id} has two masks on frame {frame}; give one.")
        entry.mask = path
        self._check_one_kind(entry, object_id, frame)

    def _check_one_kind(self, entry: ObjectPrompt, object_id: int, frame: int) -> None:
        if entry.mask is not None and entry.num_points:
            raise ValueError(
                f"object {object_id} has a mask and points or a box on frame {frame}; "
                "give one or the other."
            )


def read_prompts(
    points: Iterable[str] = (),
    boxes: Iterable[str] = (),
    masks: Iterable[str] = (),
    file: pathlib.Path | None = None,
    options: str = "--point, --box, --mask or --prompts",
) -> PromptTable:
    """Reads what was typed, and what a file of prompts says.

    Args:
        points: as `POINT` says.
        boxes: as `BOX` says.
        masks: as `MASK` says.
        file: of prompts, in JSON.
        options: those that the command has, to be named where none is given.

    Raises:
        ValueError: something cannot be understood, contradicts itself, or there is no prompt.
        FileNotFoundError: there is no such file.
    """
    table = PromptTable()
    for text in points:
        body, object_id, frame = _split(text)
        values = _numbers(body, (2, 3), "--point", text, f"{POINT}, like 210,350 or 210,350,0@2:15")
        table.add_point(values, object_id, frame)
    for text in boxes:
        body, object_id, frame = _split(text)
        values = _numbers(body, (4,), "--box", text, f"{BOX}, like 100,200,300,400")
        table.add_box(values, object_id, frame)
    for text in masks:
        body, object_id, frame = _split(text)
        table.add_mask(pathlib.Path(body), object_id, frame)
    if file is not None:
        _read_file(table, file)
    if not table.frames:
        raise ValueError(f"there is no prompt: say where the objects are with {options}.")
    return table


def check_against_video(table: PromptTable, num_frames: int, name: str) -> None:
    """Refuses prompts on frames that the video does not have."""
    last = max(table.frames)
    if last >= num_frames:
        raise ValueError(
            f"there is a prompt on frame {last}, but {name} has {num_frames} frames, numbered "
            f"0 to {num_frames - 1}."
        )


def check_inside(table: PromptTable, height: int, width: int, name: str) -> None:
    """Refuses points and boxes that lie outside of the picture, which no answer can come of."""
    for objects in table.frames.values():
        for object_id, prompt in objects.items():
            given: list[tuple[str, tuple[float, ...]]] = [("point", p) for p in prompt.points]
            if prompt.box:
                given.append(("box", prompt.box))
            for what, values in given:
                (left, top), (right, bottom) = values[:2], values[-2:]
                if right < 0 or bottom < 0 or left > width or top > height:
                    at = ",".join(f"{value:g}" for value in values)
                    raise ValueError(
                        f"the {what} {at} of object {object_id} lies outside of {name}, which is "
                        f"{width}x{height} pixels."
                    )


def read_masks(table: PromptTable, height: int, width: int) -> dict[tuple[int, int], np.ndarray]:
    """The mask prompts, by (frame, object): bool [H, W] of the video's size."""
    from sam2jax.io.images import read_mask

    found = {}
    for frame, objects in table.frames.items():
        for object_id, prompt in objects.items():
            if prompt.mask is None:
                continue
            mask = read_mask(prompt.mask)
            if mask.shape != (height, width):
                raise ValueError(
                    f"{prompt.mask} is {mask.shape[1]}x{mask.shape[0]}, but the video is "
                    f"{width}x{height}; a mask must have the size of the video."
                )
            found[frame, object_id] = mask
    return found


def to_prompts(
    table: PromptTable,
    masks: Mapping[tuple[int, int], np.ndarray],
    scale: tuple[float, float],
) -> dict[int, Prompts]:
    """What the tracker takes, by frame; padded alike, so that one program serves all.

    Args:
        table: the prompts.
        masks: what `read_masks` found.
        scale: from pixels of the video to those of the frames that the tracker is given, (x, y).
    """
    from sam2jax.types import Prompts, power_of_two

    ids = table.object_ids
    most = max(p.num_points for objects in table.frames.values() for p in objects.values())
    width = power_of_two(most)
    nothing = ObjectPrompt()
    prompts = {}
    for frame, objects in table.frames.items():
        rows = [objects.get(object_id, nothing) for object_id in ids]
        prompts[frame] = Prompts.make(
            points=[[_scaled(p, scale) for p in row.points] or None for row in rows],
            labels=[row.labels or None for row in rows],
            boxes=[
                (*_scaled(row.box[:2], scale), *_scaled(row.box[2:], scale)) if row.box else None
                for row in rows
            ],
            masks=[masks.get((frame, object_id)) for object_id in ids],
            width=width,
        )
    return prompts


def _scaled(point: Sequence[float], scale: tuple[float, float]) -> tuple[float, float]:
    return point[0] * scale[0], point[1] * scale[1]


def _split(text: str) -> tuple[str, int, int]:
    """BODY[@OBJECT][:FRAME]; only digits count, since a path may hold these signs too."""
    found = re.fullmatch(r"(.*?)(?:@(-?\d+))?(?::(-?\d+))?", text, re.DOTALL)
    assert found  # the body takes whatever there is
    return found[1], int(found[2] or 1), int(found[3] or 0)


def _numbers(
    body: str, lengths: tuple[int, ...], option: str, text: str, expected: str
) -> list[float]:
    try:
        values = [float(value) for value in body.split(",")]
    except ValueError:
        values = []
    if len(values) not in lengths:
        raise ValueError(f"{option} {text}: expected {expected}.")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{option} {text}: coordinates must be finite.")
    return values


def _read_file(table: PromptTable, path: pathlib.Path) -> None:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path} of prompts.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    add_entries(table, entries, path.parent, str(path))


def add_entries(table: PromptTable, entries: Any, folder: pathlib.Path, name: str) -> None:
    """Adds what a file of prompts holds; paths of masks are relative to `folder`.

    Raises:
        ValueError: an entry of `name` cannot be understood or contradicts another.
    """
    if not isinstance(entries, list):
        raise ValueError(f"{name}: expected a list of prompts, see `sam2jax track --help`.")
    for number, entry in enumerate(entries):
        try:
            _add_entry(table, entry, folder)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}, entry {number}: {error}") from error


def _add_entry(table: PromptTable, entry: Any, folder: pathlib.Path) -> None:
    known = {"object", "frame", "points", "labels", "box", "mask"}
    if not isinstance(entry, dict) or not set(entry) <= known:
        raise ValueError(f"expected an object with some of {', '.join(sorted(known))}.")
    object_id, frame = entry.get("object", 1), entry.get("frame", 0)
    if not all(isinstance(value, int) for value in (object_id, frame)):
        raise ValueError("object and frame must be whole numbers.")
    points = _listed(entry, "points", [])
    labels = _listed(entry, "labels", [1] * len(points))
    if len(labels) != len(points):
        raise ValueError(f"{len(points)} points have {len(labels)} labels; give one for each.")
    if not points and "box" not in entry and "mask" not in entry:
        raise ValueError("there is no prompt; give points, box or mask.")
    for point, label in zip(points, labels, strict=True):
        table.add_point([*_finite(point, 2, "a point"), label], object_id, frame)
    if "box" in entry:
        table.add_box(_finite(entry["box"], 4, "a box"), object_id, frame)
    if "mask" in entry:
        table.add_mask(folder / entry["mask"], object_id, frame)


def _listed(entry: Any, key: str, default: list[Any]) -> list[Any]:
    values = entry.get(key, default)
    if not isinstance(values, list):
        raise ValueError(f"{key} must be a list, got {values!r}.")
    return values


def _finite(values: Any, length: int, what: str) -> list[float]:
    numbers = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
    if not numbers or len(values) != length or not all(map(math.isfinite, values)):
        raise ValueError(f"{what} must be {length} finite numbers, got {values!r}.")
    return values
