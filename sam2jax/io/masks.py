"""Masks out: palette PNGs, COCO or SA-V JSON, or arrays, written frame by frame.

The writers have one interface. They are context managers: leaving one normally makes its
output appear, an exception leaves nothing behind. No writer holds more than one frame.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, Self, TypeAlias

import numpy as np

from sam2jax.io.files import PathLike, atomic_dir, atomic_path
from sam2jax.io.runs import encode_coco


class _FolderWriter:
    """A folder of PNGs. `palette` has the colours of the first object ids; those that it leaves
    out are DAVIS's."""

    def __init__(self, folder: PathLike, palette: bytes | None = None):
        self._destination = folder
        given = palette or b""
        self._palette = given + davis_palette()[len(given) :]

    def __enter__(self) -> Self:
        self._undo = contextlib.ExitStack()
        self._folder = self._undo.enter_context(atomic_dir(self._destination))
        return self

    def __exit__(self, *failure: Any) -> None:
        self._undo.__exit__(*failure)

    def _save(self, path: pathlib.Path, labels: np.ndarray) -> None:
        from PIL import Image

        picture = Image.fromarray(labels)
        picture.putpalette(self._palette)
        picture.save(path)


class PaletteWriter(_FolderWriter):
    """A folder of PNGs as DAVIS has them: pixels hold object ids, 0 is background.

    Where objects overlap the lowest id wins, as in the official tool.
    """

    def write(self, index: int, name: str, object_ids: Sequence[int], masks: np.ndarray) -> None:
        """Writes a frame.

        Args:
            index: number of the frame.
            name: what its file is called, without suffix.
            object_ids: N ids, 1 to 255.
            masks: bool [N, H, W].
        """
        _check(object_ids, masks)
        if not all(0 < object_id < 256 for object_id in object_ids):
            raise ValueError(
                f"palette PNGs hold object ids 1 to 255, got {list(object_ids)}; "
                "write .json or .npz, or number the objects from 1."
            )
        labels = np.zeros(masks.shape[1:], np.uint8)
        for object_id, mask in sorted(zip(object_ids, masks, strict=True), key=lambda m: -m[0]):
            labels[mask] = object_id
        self._save(self._folder / f"{name}.png", labels)


class ObjectWriter(_FolderWriter):
    """A folder of PNGs for each object, as SA-V has them: 000/00000.png; pixels are 1 on it.

    Objects may overlap.
    """

    def write(self, index: int, name: str, object_ids: Sequence[int], masks: np.ndarray) -> None:
        """Writes a frame; arguments as in `PaletteWriter.write`, ids from 0 on."""
        _check(object_ids, masks)
        for object_id, mask in zip(object_ids, masks, strict=True):
            folder = self._folder / f"{object_id:03d}"
            folder.mkdir(exist_ok=True)
            self._save(folder / f"{name}.png", mask.astype(np.uint8))


class _FileWriter:
    """One file, opened by `_open` under a temporary name."""

    def __init__(self, path: PathLike):
        self._destination = pathlib.Path(path)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._open(undo.enter_context(atomic_path(self._destination)), undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._undo.__exit__(*failure)

    def _open(self, temporary: pathlib.Path, undo: contextlib.ExitStack) -> None:
        raise NotImplementedError


class RunLengthWriter(_FileWriter):
    """A JSON list with a COCO annotation for every object and frame, absent objects included.

    Each has `image_id` (the frame's number), `file_name` (its name), `category_id` (the object),
    `segmentation` (compressed run lengths, as pycocotools reads them), `area` and `bbox`.
    """

    def _open(self, temporary: pathlib.Path, undo: contextlib.ExitStack) -> None:
        self._file = undo.enter_context(temporary.open("w", encoding="utf-8"))
        undo.callback(self._file.write, "\n]\n")
        self._file.write("[")
        self._separator = "\n"

    def write(self, index: int, name: str, object_ids: Sequence[int], masks: np.ndarray) -> None:
        """Writes a frame; arguments as in `PaletteWriter.write`, any ids."""
        from pycocotools import mask as coco

        _check(object_ids, masks)
        runs: Any = [encode_coco(mask) for mask in masks]
        areas: Any = coco.area(runs)
        boxes: Any = coco.toBbox(runs)
        for object_id, run, area, box in zip(object_ids, runs, areas, boxes, strict=True):
            record = {
                "image_id": index,
                "file_name": name,
                "category_id": object_id,
                "segmentation": run,
                "area": int(area),
                "bbox": [int(side) for side in box],
            }
            self._file.write(self._separator + json.dumps(record))
            self._separator = ",\n"


class MaskletWriter(_FileWriter):
    """A JSON file as SA-V has them: `masklet` lists the frames' objects, as COCO run lengths.

    Every frame counts as annotated (SA-V: every fourth); those before the first that is written
    are null. Objects are in the order of `masklet_id`.
    """

    def _open(self, temporary: pathlib.Path, undo: contextlib.ExitStack) -> None:
        self._file = undo.enter_context(temporary.open("w", encoding="utf-8"))
        self._file.write('{"masklet": [')
        self._count, self._size = 0, (0, 0)
        self._object_ids: list[int] = []
        self._seen: dict[int, list[int]] = {}  # frames on which each object is in sight
        undo.push(self._finish)

    def write(self, index: int, name: str, object_ids: Sequence[int], masks: np.ndarray) -> None:
        """Writes a frame, in order of time; arguments as in `ArrayWriter.write`."""
        _check(object_ids, masks)
        if index < self._count:
            raise ValueError(f"frames must come in order of time, got {index} after {self._count}.")
        self._object_ids = _check_same(self._object_ids, object_ids)
        self._size = masks.shape[1:]
        for object_id, mask in zip(object_ids, masks, strict=True):
            frames = self._seen.setdefault(object_id, [])
            frames += [index] * bool(mask.any())
        runs = [encode_coco(mask) for mask in masks]
        for row in [*[None] * (index - self._count), runs]:
            self._file.write((",\n" if self._count else "\n") + json.dumps(row))
            self._count += 1

    def _finish(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            return
        seen = [self._seen[object_id] for object_id in self._object_ids]
        rest = {
            "video_id": self._destination.stem.rpartition("_")[0],
            "video_frame_count": self._count,
            "video_height": self._size[0],
            "video_width": self._size[1],
            "masklet_num": len(self._object_ids),
            "masklet_id": self._object_ids,
            "masklet_first_appeared_frame": [frames[0] if frames else None for frames in seen],
            "masklet_frame_count": [len(frames) for frames in seen],
        }
        self._file.write("\n],\n" + json.dumps(rest)[1:] + "\n")


class ArrayWriter(_FileWriter):
    """An .npz: a bool array [N, H, W] for each frame, under the frame's name, packed on disk.

    `object_ids` says which objects the N are, and `frames` which numbers the frames have, in the
    order they were written; no frame can be named so. `np.load` reads one frame at a time.
    """

    def _open(self, temporary: pathlib.Path, undo: contextlib.ExitStack) -> None:
        self._archive = undo.enter_context(
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        )
        self._frames: list[int] = []
        self._object_ids: list[int] = []
        undo.push(self._finish)

    def write(self, index: int, name: str, object_ids: Sequence[int], masks: np.ndarray) -> None:
        """Writes a frame; arguments as in `PaletteWriter.write`, any ids, the same every time."""
        _check(object_ids, masks)
        if name in ("object_ids", "frames"):
            raise ValueError(f"in an .npz file no frame can be named {name!r}; write .json.")
        self._object_ids = _check_same(self._object_ids, object_ids)
        self._frames.append(index)
        self._add(name, np.ascontiguousarray(masks))

    def _finish(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self._add("object_ids", np.array(self._object_ids, np.int64))
            self._add("frames", np.array(self._frames, np.int64))

    def _add(self, name: str, values: np.ndarray) -> None:
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, values, allow_pickle=False)


MaskWriter: TypeAlias = PaletteWriter | RunLengthWriter | MaskletWriter | ArrayWriter

_SAV_NAMES = ("_manual.json", "_auto.json")
_WRITERS: dict[str, type[MaskWriter]] = {
    "": PaletteWriter,
    ".json": RunLengthWriter,
    ".npz": ArrayWriter,
}


def mask_writer(path: PathLike) -> MaskWriter:
    """The writer that a path asks for: .json, .npz, or a folder where it has no suffix.

    Files that are named as SA-V's, `VIDEO_manual.json` or `VIDEO_auto.json`, become such.
    """
    path = pathlib.Path(path)
    if path.name.endswith(_SAV_NAMES):
        return MaskletWriter(path)
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix not in _WRITERS:
        raise ValueError(
            f"{path} must end in .json (COCO run lengths; SA-V's in _manual.json) or .npz "
            "(arrays), or be a folder without suffix (palette PNGs)."
        )
    return _WRITERS[suffix](path)


def davis_palette() -> bytes:
    """The 256 colours of DAVIS and Pascal VOC: bits of the id, dealt to the channels in turn."""
    ids = np.arange(256, dtype=np.uint8)
    colors = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            if 3 * (7 - bit) + channel < 8:
                colors[:, channel] |= ((ids >> (3 * (7 - bit) + channel)) & 1) << bit
    return colors.tobytes()


def _check_same(before: list[int], object_ids: Sequence[int]) -> list[int]:
    """The ids of all frames' objects, of which there are always the same."""
    if before and before != list(object_ids):
        raise ValueError(f"object ids changed from {before} to {list(object_ids)}.")
    return list(object_ids)


def _check(object_ids: Sequence[int], masks: np.ndarray) -> None:
    if masks.ndim != 3 or masks.dtype != np.bool_ or len(masks) != len(object_ids):
        raise ValueError(
            f"masks must be bool [{len(object_ids)}, H, W] for {len(object_ids)} object ids, got "
            f"{masks.dtype} {list(masks.shape)}."
        )
