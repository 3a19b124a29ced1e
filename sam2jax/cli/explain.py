"""What `sam2jax track --explain` draws: where the attention went, frame by frame."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sam2jax.io.images import IMAGE_SUFFIXES, write_image
from sam2jax.io.timeline import Looked, heat_maps, looked_at, timeline

if TYPE_CHECKING:
    from sam2jax.io.video import Video
    from sam2jax.types import FrameOutput

MOST_FRAMES = 200  # columns of the timeline; of longer videos every n-th frame is drawn
HEAT_MAPS = 4  # frames of which maps are drawn
_HEIGHT = 150  # of a map in pixels


class Explainer:
    """Collects what was looked at, and draws it.

    Args:
        path: of the picture.
        object_ids: in the order of the answers.
        frames: that will be tracked.
    """

    def __init__(self, path: pathlib.Path, object_ids: Sequence[int], frames: range) -> None:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"--explain {path}: expected a name that ends in .png or .jpg.")
        if path.is_dir() or not path.absolute().parent.is_dir():  # known before it is needed
            raise ValueError(f"--explain {path}: it is a folder, or is in none that exists.")
        self._path, self._ids = path, object_ids
        self._step = -(-len(frames) // MOST_FRAMES)
        drawn = frames[:: self._step]
        places = np.linspace(0, len(drawn) - 1, HEAT_MAPS + 1)[1:].round().astype(int)
        self._mapped = {drawn[place] for place in places.tolist()}
        self._drawn = set(drawn)
        self._looked: dict[int, list[Looked]] = {}  # by frame, of each object

    def watch(self, frame: int, output: FrameOutput) -> None:
        if frame not in self._drawn:
            return
        looked = [looked_at(frame, output, index) for index in range(len(self._ids))]
        if frame not in self._mapped:  # they are large
            looked = [item._replace(maps=item.maps[:, :0, :0]) for item in looked]
        self._looked[frame] = looked

    def write(self, video: Video) -> None:
        """Draws the timeline, and below it maps over a few frames of the video."""
        by_object = list(zip(*(self._looked[frame] for frame in sorted(self._looked)), strict=True))
        parts = [timeline(by_object, self._ids)]
        for index in sorted(self._mapped & set(self._looked)):
            (frame,) = video.frames(index, index + 1, original=True)
            assert frame.original is not None
            small = _shrink(frame.original)
            parts += [heat_maps(small, item) for item in self._looked[index]]
        width = max(part.shape[1] for part in parts)
        write_image(self._path, np.concatenate([_widened(part, width) for part in parts]))


def _shrink(picture: np.ndarray) -> np.ndarray:
    from PIL import Image

    height, width = picture.shape[:2]
    size = max(round(width * _HEIGHT / height), 1), _HEIGHT
    return np.asarray(Image.fromarray(picture).resize(size))


def _widened(picture: np.ndarray, width: int) -> np.ndarray:
    """On white paper of that width, with a margin below."""
    room = ((0, 6), (0, width - picture.shape[1]), (0, 0))
    return np.pad(picture, room, constant_values=255)
