"""Clips out of annotated videos: which frames, which objects (official `vos_sampler.py`)."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sam2jax.training.data.clip import RawClip

if TYPE_CHECKING:
    from PIL.Image import Image


class AnnotatedVideo(Protocol):
    """Frames with masks, read when they are asked for; they are numbered from 0."""

    name: str  # for messages

    def __len__(self) -> int: ...

    def image(self, frame: int) -> Image:
        """A frame as an RGB picture."""
        ...

    def visible(self, frame: int) -> list[int]:
        """The objects that have a pixel in a frame."""
        ...

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        """bool [N, H, W] of some objects in a frame."""
        ...


class NothingToSample(ValueError):
    """An example is whole, but too short, or shows nothing that a clip could start with."""


class Reader(Protocol):
    """A source of raw clips, by number. What is damaged raises an error that names its file."""

    def __len__(self) -> int: ...

    def read(
        self, index: int, rng: np.random.Generator, num_frames: int, max_objects: int
    ) -> RawClip:
        """A clip of one example, drawn with `rng`; raises `NothingToSample` where there is none."""
        ...


def sample_clip(
    video: AnnotatedVideo,
    rng: np.random.Generator,
    num_frames: int,
    max_objects: int,
    *,
    stride: int = 1,
    reverse_time_prob: float = 0.0,
) -> RawClip:
    """Frames in a row and objects that the first of them shows (official `RandomUniformSampler`).

    Args:
      video: what to draw from.
      rng: decides on the first frame, the direction and the objects.
      num_frames: T.
      max_objects: at most so many of the objects of the first frame are taken.
      stride: every n-th frame is taken.
      reverse_time_prob: how likely the frames are to go backward.

    Raises:
      NothingToSample: the video is too short, or shows no object where a clip could start.
      ValueError: its masks are of another size than its frames.
    """
    span = (num_frames - 1) * stride + 1
    if len(video) < span:
        raise NothingToSample(
            f"{video.name} has {len(video)} annotated frames, and a clip of {num_frames} needs "
            f"{span}."
        )
    backward = rng.random() < reverse_time_prob
    for start in rng.permutation(len(video) - span + 1).tolist():
        frames = list(range(start, start + span, stride))
        frames = frames[::-1] if backward else frames
        visible = video.visible(frames[0])
        if visible:
            break
    else:
        raise NothingToSample(
            f"{video.name} has no frame with an object that a clip could start at."
        )
    objects = [visible[i] for i in rng.permutation(len(visible))[:max_objects]]
    images = [video.image(frame) for frame in frames]
    masks = [video.masks(frame, objects) for frame in frames]
    sizes = {(image.height, image.width) for image in images}
    sizes |= {found.shape[1:] for found in masks}
    if len(sizes) != 1:
        raise ValueError(f"{video.name} has frames or masks of different sizes: {sorted(sizes)}.")
    return RawClip(images, np.stack(masks))


def list_names(folder: str, file_list: str | None) -> list[str]:
    """What a source is made of: the names in a text file, or everything in a folder, sorted.

    Suffixes are dropped from listed names, as officially; SA-V's have a folder, too.

    Raises:
      FileNotFoundError: the folder or the list does not exist.
      ValueError: there is nothing in it.
    """
    require_folder(folder)
    if file_list is None:
        names = sorted(p.name for p in pathlib.Path(folder).iterdir() if p.name[0] != ".")
    else:
        if not pathlib.Path(file_list).is_file():
            raise FileNotFoundError(f"there is no file_list {file_list}.")
        lines = pathlib.Path(file_list).read_text(encoding="utf-8").splitlines()
        names = sorted({os.path.splitext(line.strip())[0] for line in lines if line.strip()})
    if not names:
        raise ValueError(f"{file_list or folder} is empty; there is nothing to train on.")
    return names


def require_folder(folder: str) -> None:
    """Raises FileNotFoundError where there is no such folder."""
    if not pathlib.Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; check the path.")
