"""Annotated images: SA-1B's (a JSON for each) and COCO's (one instances JSON).

An image is a clip of one frame; where longer ones are asked for, it is repeated (official
`SA1BRawDataset`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sam2jax.io.images import list_images, open_image
from sam2jax.training.data.clip import RawClip
from sam2jax.training.data.config import ImagesSource
from sam2jax.training.data.runlengths import decode_masks, read_json
from sam2jax.training.data.sampling import list_names, require_folder, sample_clip

if TYPE_CHECKING:
    from PIL.Image import Image


class AnnotatedImage:
    """A video of one frame, with COCO annotations. Crowds and empty masks are left out."""

    def __init__(self, image: Image, annotations: Any, name: str, max_area: float):
        self.name = name
        self._image = image
        self._size = (image.height, image.width)
        try:
            self._segmentations = [
                found["segmentation"]
                for found in annotations
                if not found.get("iscrowd")
                and 0 < found["area"] <= max_area * image.height * image.width
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} has annotations without segmentation and area.") from error

    def __len__(self) -> int:
        return 1

    def image(self, frame: int) -> Image:
        return self._image

    def visible(self, frame: int) -> list[int]:
        # As the official loader, trusts `area`: an image may have hundreds of masks.
        return list(range(len(self._segmentations)))

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        return decode_masks([self._segmentations[i] for i in objects], self._size, self.name)


class ImagesReader:
    """Clips of an `ImagesSource`; raises as `FolderReader` does."""

    def __init__(self, source: ImagesSource):
        require_folder(source.images)
        self._source = source
        masks = pathlib.Path(source.masks)
        wanted = None
        if source.file_list is not None:
            wanted = set(list_names(source.images, source.file_list))
        if masks.is_dir():
            paths = [p for p in list_images(source.images) if wanted is None or p.stem in wanted]
            self._entries = [(path, masks / f"{path.stem}.json") for path in paths]
            self._annotations: dict[pathlib.Path, list[Any]] | None = None
        else:
            self._annotations = _instances(masks, pathlib.Path(source.images))
            paths = [p for p in self._annotations if wanted is None or p.stem in wanted]
            self._entries = [(path, masks) for path in paths]
        if not self._entries:
            raise ValueError(f"{source.masks} and {source.images} have no image in common.")

    def __len__(self) -> int:
        return len(self._entries)

    def read(
        self, index: int, rng: np.random.Generator, num_frames: int, max_objects: int
    ) -> RawClip:
        path, masks = self._entries[index]
        if self._annotations is None:
            contents = read_json(masks)
            annotations = contents.get("annotations", ()) if isinstance(contents, dict) else None
        else:
            annotations = self._annotations[path]
        name = str(masks) if self._annotations is None else f"{masks} ({path.name})"
        image = AnnotatedImage(open_image(path), annotations, name, self._source.max_area)
        clip = sample_clip(image, rng, 1, max_objects)
        return RawClip(list(clip.frames) * num_frames, np.repeat(clip.masks, num_frames, axis=0))


def _instances(path: pathlib.Path, folder: pathlib.Path) -> dict[pathlib.Path, list[Any]]:
    """The annotations of each image that has some, of a COCO instances file."""
    contents = read_json(path)
    try:
        names = {image["id"]: folder / image["file_name"] for image in contents["images"]}
        found: dict[pathlib.Path, list[Any]] = {}
        for annotation in contents["annotations"]:
            found.setdefault(names[annotation["image_id"]], []).append(annotation)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a COCO instances file (images and annotations): {error!r}."
        ) from error
    return found
