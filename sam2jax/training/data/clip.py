"""What training sees: clips of frames with a mask for every object in every frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


class Clip(NamedTuple):
    """T frames and up to M objects, in NumPy; a batch has a leading [B]."""

    frames: np.ndarray  # [T, S, S, 3] uint8 RGB
    masks: np.ndarray  # [T, M, S, S] bool, false where an object is out of sight
    objects: np.ndarray  # [M] bool, which objects are real; those past them have no mask


class RawClip(NamedTuple):
    """What a source gives: pictures at their own size, with N >= 1 objects."""

    frames: Sequence[Image]  # T RGB pictures of one size
    masks: np.ndarray  # [T, N, H, W] bool


def pad_objects(frames: np.ndarray, masks: np.ndarray, max_objects: int) -> Clip:
    """Frames [T, S, S, 3] and masks [T, N, S, S] as a clip of M >= N objects, the real ones first.

    Objects past the first M are left out.
    """
    found = masks[:, :max_objects]
    missing = max_objects - found.shape[1]
    return Clip(
        frames=frames,
        masks=np.pad(found, ((0, 0), (0, missing), (0, 0), (0, 0))),
        objects=np.arange(max_objects) < found.shape[1],
    )


def middle(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the pixel farthest from the outside of a mask [H, W] that is not empty."""
    import scipy.ndimage

    padded = np.asarray(scipy.ndimage.distance_transform_edt(np.pad(mask, 1)))
    depth = padded[1:-1, 1:-1]
    row, column = np.unravel_index(np.argmax(depth), mask.shape)
    return float(column), float(row)
