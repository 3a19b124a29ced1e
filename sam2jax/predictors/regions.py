"""Which of many masks to keep, and what to mend in them, on the host."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import jax
import numpy as np
import scipy.ndimage

from sam2jax.ops.boxes import non_maximum_suppression
from sam2jax.types import power_of_two

EVERYTHING = 1.0  # an IoU that no box exceeds
LEAST_ROOM = 1024  # boxes that are compared, so that few programs are compiled
Drawn = np.ndarray | bytes  # a mask: bits [H, W / 8] uint8, as `packbits` makes them, or compressed


def kept_boxes(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Rows of `boxes` [C, 4] that are left after non-maximum suppression, best first."""
    order = np.argsort(-scores, kind="stable")
    if threshold >= EVERYTHING or not len(order):
        return order
    room = max(power_of_two(len(order)), LEAST_ROOM)
    kept = _suppressed(
        filled(boxes[order], room),
        filled(scores[order].astype(np.float32), room),
        np.arange(room) < len(order),
        np.float32(threshold),
    )
    return order[np.asarray(kept)[: len(order)]]


def filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Rows up to `count` of them, so that one program takes them all."""
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def compressed(bits: np.ndarray) -> bytes:
    """A mask's bits in a few KiB."""
    return zlib.compress(bits.tobytes(), 1)


def restored(mask: Drawn, size: tuple[int, int]) -> np.ndarray:
    """A mask as it was drawn: [H, W] bool."""
    if isinstance(mask, bytes):
        mask = np.frombuffer(zlib.decompress(mask), np.uint8)
    bits = mask.reshape(size[0], -1)
    return np.unpackbits(bits, axis=1, count=size[1]).view(bool)


def clean_masks(
    masks: Iterable[Drawn],
    boxes: np.ndarray,
    size: tuple[int, int],
    min_area: int,
    threshold: float,
) -> tuple[list[Drawn], np.ndarray, np.ndarray]:
    """Fills small holes, removes small regions, and drops duplicates that this makes.

    Those that need no change are preferred to those that do. Returns all masks and boxes [C, 4],
    changed where needed, and the rows to keep in order of preference.
    """
    cleaned, new_boxes, changed = [], [], []
    for held, box in zip(masks, boxes, strict=True):
        mask = restored(held, size)
        filled = ~_without_small(~mask, min_area, keep_one=False)
        whole = _without_small(filled, min_area, keep_one=True)
        changed.append(not np.array_equal(whole, mask))
        cleaned.append(compressed(np.packbits(whole, axis=1)) if changed[-1] else held)
        new_boxes.append(_box(whole) if changed[-1] else box)
    scores = 1.0 - np.array(changed, np.float32)
    boxes = np.array(new_boxes, np.float32).reshape(-1, 4)
    return cleaned, boxes, kept_boxes(boxes, scores, threshold)


def _without_small(region: np.ndarray, min_area: int, *, keep_one: bool) -> np.ndarray:
    """Drops 8-connected parts of fewer than `min_area` pixels; `keep_one`: not the last one."""
    labels = np.zeros(region.shape, np.int32)
    scipy.ndimage.label(region, np.ones((3, 3)), output=labels)
    areas = np.bincount(labels.ravel())
    large = areas >= min_area
    large[0] = False
    if keep_one and len(areas) > 1 and not large.any():
        large[1 + np.argmax(areas[1:])] = True
    return large[labels]


def _box(mask: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros(4, np.float32)
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)


_suppressed = jax.jit(non_maximum_suppression)
