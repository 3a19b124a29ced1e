"""The folders of benchmarks: which videos there are, and which masks are given for them.

DAVIS, MOSE, LVOS and YouTube-VOS keep VIDEO/FRAME.png, whose pixels are object numbers; SA-V keeps
VIDEO/OBJECT/FRAME.png, a binary picture for each object, which may overlap.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sam2jax.evaluation.metrics import objects_in
from sam2jax.io.files import PathLike
from sam2jax.io.images import read_labels


class FrameMasks(NamedTuple):
    """What is given on a frame."""

    masks: dict[int, np.ndarray]  # by object, [H, W] bool
    palette: bytes | None = None  # of the picture that they come from


class Inputs(NamedTuple):
    """The masks to start a video from."""

    frames: dict[int, list[int]]  # by object, indices of the frames whose masks are given, in order
    palette: bytes | None  # of the first picture


class PaletteMasks:
    """A video's masks with all objects in one picture."""

    per_object = False
    object_ids: tuple[int, ...] = ()  # those known without looking into pictures

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def read(self, frame: str) -> FrameMasks:
        """All objects on a frame, none of them empty; nothing where there is no picture."""
        path = self.folder / f"{frame}.png"
        if not path.exists():
            return FrameMasks({})
        labels, palette = read_labels(path)
        return FrameMasks({obj: labels == obj for obj in sorted(objects_in(labels))}, palette)


class ObjectMasks:
    """A video's masks with a folder for each object."""

    per_object = True

    def __init__(self, folder: pathlib.Path) -> None:
        names = subfolders(folder)
        if odd := [name for name in names if not name.isdecimal()]:
            raise ValueError(f"{folder / odd[0]}: expected folders named by numbers, like 000.")
        self._folders = {int(name): folder / name for name in names}
        self.folder = folder
        self.object_ids = tuple(sorted(self._folders))

    def read(self, frame: str) -> FrameMasks:
        """The objects that have a picture for this frame; masks may be empty."""
        masks, palette = {}, None
        for obj in self.object_ids:
            path = self._folders[obj] / f"{frame}.png"
            if path.exists():
                labels, palette = read_labels(path)
                masks[obj] = labels > 0
        return FrameMasks(masks, palette)


def open_masks(folder: PathLike) -> PaletteMasks | ObjectMasks:
    """A video's masks, in the layout that they have.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: its subfolders are not named by numbers.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of masks {folder}.")
    return ObjectMasks(folder) if subfolders(folder) else PaletteMasks(folder)


def find_inputs(
    masks: PaletteMasks | ObjectMasks,
    frames: Sequence[str],
    *,
    objects_appear_later: bool = False,
    use_all_masks: bool = False,
) -> Inputs:
    """Which masks a video is started from (official `vos_inference`).

    Without `objects_appear_later` these are the first frame's, or, with `use_all_masks`, those of
    every frame that has some; all objects must be on the first of these frames. With it, they are
    the first mask of each object that is not empty, or all of these.

    Args:
      masks: of the video.
      frames: names of its frames, in order.
      objects_appear_later: whether objects may be missing on the first frame.
      use_all_masks: whether masks after the first are taken too.

    Raises:
      ValueError: there is no mask, or an object appears later unexpectedly.
    """
    given: dict[int, list[int]] = {}
    palette = None
    looked_at = frames if objects_appear_later or use_all_masks else frames[:1]
    for index, name in enumerate(looked_at):
        found = masks.read(name)
        palette = palette or found.palette
        for obj, mask in found.masks.items():
            if not objects_appear_later or (mask.any() and (use_all_masks or obj not in given)):
                given.setdefault(obj, []).append(index)
    if not given:
        raise ValueError(
            f"{masks.folder} has no object on {_span(looked_at)}; masks must be named as frames "
            "are, and objects_appear_later given where the first frame may have none."
        )
    if not objects_appear_later:
        first = min(indices[0] for indices in given.values())
        here = {obj for obj, indices in given.items() if indices[0] == first}
        if late := sorted({*given, *masks.object_ids} - here):
            raise ValueError(
                f"in {masks.folder} object {', '.join(map(str, late))} has no mask for frame "
                f"{frames[first]}; give objects_appear_later (LVOS and YouTube-VOS need it)."
            )
    return Inputs(given, palette)


def _span(frames: Sequence[str]) -> str:
    return f"frame {frames[0]}" if len(frames) == 1 else f"frames {frames[0]} to {frames[-1]}"


def list_videos(root: PathLike) -> list[str]:
    """Names of the folders in a folder, in order.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: there are none in it.
    """
    if not pathlib.Path(root).is_dir():
        raise FileNotFoundError(f"there is no folder {root}.")
    names = subfolders(root)
    if not names:
        raise ValueError(f"{root} holds no videos; expected a folder of frames for each.")
    return names


def read_video_list(path: PathLike) -> list[str]:
    """The lines of a file such as DAVIS's val.txt, each the name of a video.

    Raises:
      OSError: the file cannot be read.
      ValueError: it names no video, or one that is no plain name.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no list of videos: {error}.") from error
    lines = [line.strip() for line in text.splitlines()]
    names = list(dict.fromkeys(line for line in lines if line))
    if not names:
        raise ValueError(f"{path} names no videos; expected a name on each line.")
    if odd := [n for n in names if pathlib.Path(n).name != n or n.startswith(".")]:
        raise ValueError(f"{path}: {odd[0]!r} is no name of a video; expected one on each line.")
    return names


def subfolders(folder: PathLike) -> list[str]:
    """Names of folders in a folder, sorted; hidden ones are left out."""
    entries = pathlib.Path(folder).iterdir()
    return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
