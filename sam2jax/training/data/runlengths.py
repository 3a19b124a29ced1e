"""Masks in JSON files: COCO run lengths, compressed or not, and polygons."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

_REACH = 4  # how far polygons may be off, in sides of the frame


def read_json(path: pathlib.Path) -> Any:
    """The contents of a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}.") from error


def decode_masks(segmentations: Sequence[Any], size: tuple[int, int], name: str) -> np.ndarray:
    """Segmentations as COCO has them, in a frame of `size` (height, width): bool [N, H, W].

    Args:
      segmentations: run lengths (`size` and `counts`, a string or a list), or lists of polygons.
      size: of the frame; run lengths of another size are refused.
      name: the file's, for messages.

    Raises:
      ValueError: a segmentation is none of these, or of another size.
    """
    masks = np.zeros((len(segmentations), *size), bool)
    for mask, given in zip(masks, segmentations, strict=True):
        try:
            mask[:] = _decode(given, size)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"{name} has a mask that cannot be read: {error!r}.") from error
    return masks


def _decode(given: Any, size: tuple[int, int]) -> np.ndarray:
    """One segmentation as bool [H, W].

    Not pycocotools' own `decode`: where run lengths stop early it leaves memory uninitialised.
    """
    if isinstance(given, list):
        counts = uncompress(_from_polygons(given, size))
    elif list(given["size"]) != list(size):
        raise ValueError(f"its size is {given['size']} and the frame's {list(size)}")
    elif isinstance(given["counts"], list):
        counts = np.array(given["counts"], np.int64)
    else:
        counts = uncompress(bytes(given["counts"], "ascii"))
    if counts.ndim != 1 or (counts < 0).any() or counts.sum() != size[0] * size[1]:
        raise ValueError("its runs do not fill the frame")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(size[::-1]).T  # runs go down the columns


def uncompress(counts: bytes) -> np.ndarray:
    """Lengths of runs, from COCO's compressed form: [R] int64.

    A number is a row of five-bit digits, lowest first, all but its last with bit 5 set; bit 4 of
    the last is its sign. From the fourth on, numbers are differences to the last but one.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits & 32 == 0)
    if not ends.size or ends[-1] != digits.size - 1:
        raise ValueError("its run lengths are cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(digits.size) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((digits & 31) << (5 * place), starts)
    numbers -= np.where(digits[ends] & 16, 1 << (5 * (place[ends] + 1)), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _from_polygons(polygons: list[Any], size: tuple[int, int]) -> bytes:
    """Compressed run lengths of polygons, each [x0, y0, x1, y1, ...] with three corners or more."""
    from pycocotools import mask as coco

    if not polygons or any(len(p) < 6 or len(p) % 2 for p in polygons):
        raise ValueError("a polygon has three corners or more, two numbers each")
    corners: Any = [[float(value) for value in polygon] for polygon in polygons]
    # pycocotools takes memory for every pixel of an outline, whether inside the frame or not.
    if not all(abs(value) <= _REACH * max(size) for polygon in corners for value in polygon):
        raise ValueError("a polygon leaves the frame by far")
    runs: Any = coco.merge(coco.frPyObjects(corners, *size))
    return runs["counts"]
