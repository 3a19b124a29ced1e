"""Frames in: containers, folders of images, arrays; lazily, so that memory is flat in the length.

The bytes are those that the official loaders produce. Containers are resized by FFmpeg's bilinear
scaler, which equals decord (the official decoder) bit for bit; one exception was found, a video
exactly as high as the size asked for, where decord's older FFmpeg takes colour half a line off.
Folders are resized by Pillow. Arrays and iterators of arrays are passed on at their own size.
"""

from __future__ import annotations

import abc
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from sam2jax.io import images

Source = str | os.PathLike[str] | bytes | np.ndarray | Iterable[Any]


class Frame(NamedTuple):
    """One frame, decoded once."""

    index: int
    image: np.ndarray  # uint8 RGB [S, S, 3], what the model sees
    original: np.ndarray | None  # uint8 RGB [H, W, 3], where it was asked for


class Video(abc.ABC):
    """A clip whose frames are read when they are needed. `open_video` makes one.

    `video[i]` is what the model sees of frame i: uint8 RGB [S, S, 3], or the frame at its own
    size if the video was opened without one. Frames may be asked for in any order; forward and
    backward runs are cheap.
    """

    name: str  # for messages
    height: int  # of the original
    width: int
    num_frames: int
    fps: Fraction | None = None
    size: int | None = None  # may be set until the first frame has been read

    def __len__(self) -> int:
        return self.num_frames

    def reaches(self, index: int) -> bool:
        """Whether there is a frame `index`, 0 or more; where the length is unknown, cheaper."""
        return 0 <= index < self.num_frames

    def __getitem__(self, index: int) -> np.ndarray:
        at = index if index >= 0 else index + self.num_frames
        if not self.reaches(at):
            raise IndexError(f"{self.name} has {self.num_frames} frames, not frame {index}.")
        try:
            return self._image(self._read(at))
        except IndexError as error:  # the container promised more frames than it holds
            raise IndexError(f"{self.name} ends before frame {index}.") from error

    def __iter__(self) -> Iterator[np.ndarray]:
        return (frame.image for frame in self.frames())

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def frames(
        self,
        start: int | None = None,
        stop: int | None = None,
        *,
        reverse: bool = False,
        original: bool = False,
    ) -> Iterator[Frame]:
        """Frames `start` to `stop` (exclusive); with `reverse`, the same ones from the last.

        Args:
            start: first frame; None: 0.
            stop: one past the last frame; None: the end.
            reverse: whether to go backward in time.
            original: whether the original-size frame is wanted as well.
        """
        for index in self._backward(start, stop) if reverse else self._forward(start, stop):
            try:
                native = self._read(index)
            except IndexError:  # the container promised more frames than it holds
                continue
            yield Frame(index, self._image(native), self._original(native) if original else None)

    def _forward(self, start: int | None, stop: int | None) -> Iterable[int]:
        """Does not ask for the length unless it counts from the end: it may be far away."""
        if (start or 0) < 0 or (stop or 0) < 0:
            return range(*slice(start, stop).indices(self.num_frames))
        first = start or 0
        indices = itertools.count(first) if stop is None else range(first, stop)
        return itertools.takewhile(self.reaches, indices)

    def _backward(self, start: int | None, stop: int | None) -> Iterable[int]:
        if (start or 0) >= 0 and stop is not None and self.reaches(stop - 1):
            return reversed(range(start or 0, stop))
        return reversed(range(*slice(start, stop).indices(self.num_frames)))

    def frame_name(self, index: int) -> str:
        """What files about this frame are called, without suffix."""
        return f"{index:05d}"

    def close(self) -> None:  # noqa: B027 (only containers hold something)
        """Releases the file; the video cannot be read afterwards."""

    @abc.abstractmethod
    def _read(self, index: int) -> Any:
        """Decodes frame `index`, 0 or more; IndexError past the end."""

    @abc.abstractmethod
    def _image(self, native: Any) -> np.ndarray:
        """What the model sees of a decoded frame."""

    @abc.abstractmethod
    def _original(self, native: Any) -> np.ndarray:
        """A decoded frame at its own size."""


def open_video(source: Source, size: int | None = None) -> Video:
    """Opens a clip: a file that FFmpeg reads, a folder of JPEG or PNG frames, or frames.

    Args:
        source: path of a video, an image or a folder; the bytes of a video; uint8 RGB
            [T, H, W, 3]; or an iterator (or list) of uint8 RGB [H, W, 3], arrays or pictures,
            which is read only as far as needed. Arrays are never resized here.
        size: width and height that frames are resized to, as the official loaders do; None: not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a video, is empty, truncated or damaged.
    """
    if isinstance(source, np.ndarray):
        return ArrayVideo(source)
    if isinstance(source, Iterable) and not isinstance(source, str | bytes | os.PathLike):
        from sam2jax.io.spool import IteratorVideo

        return IteratorVideo(source)
    from sam2jax.io.container import ContainerVideo

    if isinstance(source, bytes):
        return ContainerVideo(source, size)
    path = pathlib.Path(source)
    if path.is_dir():
        return FolderVideo(images.list_frames(path), size, name=str(path))
    if not path.exists():
        raise FileNotFoundError(f"there is no video {path}; expected a video file or a folder.")
    if path.suffix.lower() in images.IMAGE_SUFFIXES:
        return FolderVideo([path], size, name=str(path))
    return ContainerVideo(path, size)


class ArrayVideo(Video):
    """Frames that are in memory already."""

    def __init__(self, frames: np.ndarray):
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(
                "an array of frames must be uint8 RGB [T, H, W, 3], got "
                f"{frames.dtype} {list(frames.shape)}."
            )
        if 0 in frames.shape:
            raise ValueError(f"the video is empty: its frames have shape {list(frames.shape)}.")
        self._frames = frames
        self.name = "the array"
        self.num_frames, self.height, self.width = frames.shape[:3]

    def _read(self, index: int) -> np.ndarray:
        return self._frames[index]

    def _image(self, native: np.ndarray) -> np.ndarray:
        return native

    _original = _image


class FolderVideo(Video):
    """A folder of image files; frames are numbered in the order of their names."""

    def __init__(self, paths: list[pathlib.Path], size: int | None, name: str):
        self._paths = paths
        self.name, self.size, self.num_frames = name, size, len(paths)
        self.height, self.width = images.image_dimensions(paths[0])
        for path in paths[1:]:
            height, width = images.image_dimensions(path)
            if (height, width) != (self.height, self.width):
                raise ValueError(
                    f"{path} is {width}x{height} and the frames before it are {self.width}x"
                    f"{self.height}; all frames must have the same size."
                )

    def frame_name(self, index: int) -> str:
        return self._paths[index].stem

    def _read(self, index: int) -> Any:
        return images.open_image(self._paths[index])

    def _image(self, native: Any) -> np.ndarray:
        return images.resize_image(native, self.size) if self.size else np.asarray(native)

    def _original(self, native: Any) -> np.ndarray:
        return np.asarray(native)
