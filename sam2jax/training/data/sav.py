"""SA-V's training set: masks as run lengths in JSON, six times a second (official
`JSONRawDataset`)."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sam2jax.io.images import image_dimensions, list_frames, open_image
from sam2jax.io.video import open_video
from sam2jax.training.data.clip import RawClip
from sam2jax.training.data.config import SAVSource
from sam2jax.training.data.runlengths import decode_masks, read_json
from sam2jax.training.data.sampling import list_names, require_folder, sample_clip

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIX = "_manual.json"


class SAVVideo:
    """A film or a folder of its frames, and the masklets of `{video}_manual.json`.

    Frames without annotation of every object are left out, as in the official loader. A context
    manager: leaving it closes the film.
    """

    def __init__(self, images: pathlib.Path, masks: pathlib.Path, frames_per_annotation: int):
        self.name = str(masks)
        contents = read_json(masks)
        self._annotations = _masklets(contents, self.name)
        count = len(self._annotations)
        # As what sam2jax writes; the masks would be laid on frames that they are not of.
        if frames_per_annotation > 1 and 1 < count == contents.get("video_frame_count"):
            raise ValueError(
                f"{self.name} has masks for each of its {count} frames, not for one in "
                f"{frames_per_annotation}; set frames_per_annotation = 1."
            )
        self._film, self._paths = None, {}
        if images.is_dir():
            frames = list_frames(images)
            self._paths = {int(path.stem): path for path in frames if path.stem.isdecimal()}
            self._size = image_dimensions(frames[0])
        else:
            self._film = open_video(images.with_name(f"{images.name}.mp4"))
            self._size = (self._film.height, self._film.width)
        self._numbers = [
            (i * frames_per_annotation, i)
            for i, found in enumerate(self._annotations)
            if found and None not in found and self._has(i * frames_per_annotation)
        ]

    def __enter__(self) -> SAVVideo:
        return self

    def __exit__(self, *_: object) -> None:
        if self._film is not None:
            self._film.close()

    def __len__(self) -> int:
        return len(self._numbers)

    def image(self, frame: int) -> Image:
        from PIL import Image

        number = self._numbers[frame][0]
        if self._film is None:
            return open_image(self._paths[number])
        try:
            return Image.fromarray(self._film[number])
        except IndexError as error:
            raise ValueError(str(error)) from error

    def visible(self, frame: int) -> list[int]:
        found = self._annotations[self._numbers[frame][1]]
        masks = decode_masks(found, self._size, self.name)
        return np.flatnonzero(masks.any((1, 2))).tolist()

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        found = self._annotations[self._numbers[frame][1]]
        if len(found) <= max(objects):
            raise ValueError(f"{self.name} has a different number of objects in some frames.")
        return decode_masks([found[i] for i in objects], self._size, self.name)

    def _has(self, number: int) -> bool:
        return self._film.reaches(number) if self._film is not None else number in self._paths


class SAVReader:
    """Clips of a `SAVSource`; raises as `FolderReader` does."""

    def __init__(self, source: SAVSource):
        require_folder(source.images)
        self._source = source
        names = list_names(source.masks, source.file_list)
        if source.file_list is None:
            names = [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]
        if not names:
            raise ValueError(f"{source.masks} holds no files named like video{SUFFIX}.")
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def read(
        self, index: int, rng: np.random.Generator, num_frames: int, max_objects: int
    ) -> RawClip:
        source, name = self._source, self._names[index]
        images = pathlib.Path(source.images) / name
        masks = pathlib.Path(source.masks) / f"{name}{SUFFIX}"
        with SAVVideo(images, masks, source.frames_per_annotation) as video:
            return sample_clip(
                video,
                rng,
                num_frames,
                max_objects,
                stride=source.stride,
                reverse_time_prob=source.reverse_time_prob,
            )


def _masklets(contents: Any, name: str) -> list[Any]:
    """The outer list is over annotated frames, the inner one over objects."""
    found = contents.get("masklet") if isinstance(contents, dict) else None
    if not isinstance(found, list) or not all(
        frame is None or isinstance(frame, list) for frame in found
    ):
        raise ValueError(f"{name} has no list of lists 'masklet', as SA-V's files have.")
    return found
