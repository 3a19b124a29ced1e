"""Videos as folders of JPEGs, with palette PNGs or a folder of PNGs for each object.

DAVIS, MOSE and YouTube-VOS have palette PNGs; SA-V's val and test sets have a folder for each
object (official `PNGRawDataset`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sam2jax.io.images import image_dimensions, list_frames, list_masks, open_image, read_labels
from sam2jax.training.data.clip import RawClip
from sam2jax.training.data.config import FolderSource
from sam2jax.training.data.sampling import list_names, require_folder, sample_clip

if TYPE_CHECKING:
    from PIL.Image import Image


class PaletteVideo:
    """A folder of frames, and palette PNGs of the same names for some of them, or all."""

    def __init__(self, images: pathlib.Path, masks: pathlib.Path):
        self.name = str(masks)
        frames, labels = _by_number(list_frames(images)), _by_number(list_masks(masks))
        self._paths = [(frames[at], labels[at]) for at in frames if at in labels]

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, frame: int) -> Image:
        return open_image(self._paths[frame][0])

    def visible(self, frame: int) -> list[int]:
        return [i for i in np.unique(read_labels(self._paths[frame][1])[0]).tolist() if i]

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        return read_labels(self._paths[frame][1])[0] == np.array(objects, np.uint8)[:, None, None]


class ObjectFolderVideo:
    """A folder of frames, and for each object a folder of PNGs; an absent PNG is an empty mask."""

    def __init__(self, images: pathlib.Path, masks: pathlib.Path):
        self.name = str(masks)
        folders = sorted(p for p in masks.iterdir() if p.is_dir() and any(p.iterdir()))
        self._objects = [_by_number(list_masks(folder)) for folder in folders]
        annotated = {at for found in self._objects for at in found}
        frames = _by_number(list_frames(images))
        self._frames = {at: path for at, path in frames.items() if at in annotated}
        self._numbers = list(self._frames)

    def __len__(self) -> int:
        return len(self._numbers)

    def image(self, frame: int) -> Image:
        return open_image(self._frames[self._numbers[frame]])

    def visible(self, frame: int) -> list[int]:
        everyone = range(len(self._objects))
        return [i for i in everyone if self.masks(frame, [i]).any()]

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        at = self._numbers[frame]
        size = image_dimensions(self._frames[at])
        found = [self._objects[i].get(at) for i in objects]
        return np.stack([read_labels(p)[0] > 0 if p else np.zeros(size, bool) for p in found])


class FolderReader:
    """Clips of a `FolderSource`.

    Raises:
      FileNotFoundError: a folder of it, or its list, does not exist.
      ValueError: it is empty.
    """

    def __init__(self, source: FolderSource):
        require_folder(source.masks)
        self._source = source
        self._names = list_names(source.images, source.file_list)

    def __len__(self) -> int:
        return len(self._names)

    def read(
        self, index: int, rng: np.random.Generator, num_frames: int, max_objects: int
    ) -> RawClip:
        source, name = self._source, self._names[index]
        return sample_clip(
            _open(pathlib.Path(source.images) / name, pathlib.Path(source.masks) / name),
            rng,
            num_frames,
            max_objects,
            stride=source.stride,
            reverse_time_prob=source.reverse_time_prob,
        )


def _open(images: pathlib.Path, masks: pathlib.Path) -> PaletteVideo | ObjectFolderVideo:
    require_folder(str(masks))
    apart = any(path.is_dir() for path in masks.iterdir())
    return (ObjectFolderVideo if apart else PaletteVideo)(images, masks)


def _by_number(pictures: Sequence[pathlib.Path]) -> dict[int | str, pathlib.Path]:
    """Pictures by the frame that they are of; 5 and 00005 are the same."""
    return {int(p.stem) if p.stem.isdecimal() else p.stem: p for p in pictures}
