"""Frames from an iterator, kept on disk, so that earlier ones can be revisited."""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np

from sam2jax.io.video import Video

_END = object()


class IteratorVideo(Video):
    """Frames that come one after the other: a generator, a camera, a list.

    They are taken only as far as asked for. Each goes to an anonymous temporary file (in $TMPDIR,
    H x W x 3 bytes a frame), so that memory is flat however long the iterator is. Safe to use
    from several threads.
    """

    def __init__(self, source: Iterable[Any]):
        """
        Args:
            source: uint8 RGB [H, W, 3] frames of one size, arrays or pictures.

        Raises:
            ValueError: there is no frame, or the first is none. Later frames are checked when
                they are taken.
        """
        self.name = "the iterator"
        self._source = iter(source)
        self._lock = threading.Lock()
        self._count = 0
        self._ended = False
        self._failure: Exception | None = None
        self.height = self.width = 0  # until the first frame is there
        self._file = tempfile.TemporaryFile(prefix="sam2jax-")
        weakref.finalize(self, self._file.close)
        if not self.reaches(0):
            raise ValueError("the video is empty: its iterator gave no frame.")

    @property
    def num_frames(self) -> int:  # type: ignore[override]
        """The length; reads to the end of the iterator."""
        with self._lock:
            while self._take():
                pass
        return self._count

    def reaches(self, index: int) -> bool:
        """Whether there is a frame `index`, 0 or more; takes frames up to it."""
        with self._lock:
            while index >= self._count and self._take():
                pass
        return 0 <= index < self._count

    def close(self) -> None:
        """Removes the frames from disk. The iterator is left as it is; it is the caller's."""
        self._file.close()

    def _take(self) -> bool:
        """Moves a frame from the iterator to disk; False at the end."""
        # An iterator that has failed must not look like one that has ended: it fails again.
        if self._failure is not None:
            raise self._failure
        try:
            frame = _END if self._ended else next(self._source, _END)
            if frame is _END:
                self._ended = True
                return False
            pixels = _checked(frame, self._count)
            if self._count and pixels.shape != (self.height, self.width, 3):
                raise ValueError(
                    f"frame {self._count} is {pixels.shape[1]}x{pixels.shape[0]} and the frames "
                    f"before it are {self.width}x{self.height}; all must have the same size."
                )
            self._file.seek(self._count * pixels.nbytes)
            self._file.write(pixels.data)
        except Exception as error:
            self._failure = error
            raise
        self.height, self.width = pixels.shape[:2]
        self._count += 1
        return True

    def _read(self, index: int) -> np.ndarray:
        if not self.reaches(index):
            raise IndexError(index)
        frame = np.empty((self.height, self.width, 3), np.uint8)
        with self._lock:
            self._file.seek(index * frame.nbytes)
            self._file.readinto(frame.data)
        return frame

    def _image(self, native: np.ndarray) -> np.ndarray:
        return native

    _original = _image


def _checked(frame: Any, index: int) -> np.ndarray:
    """A frame as a contiguous array."""
    mode = getattr(frame, "mode", "RGB")  # of a Pillow picture; of a PyTorch tensor a method
    if isinstance(mode, str) and mode != "RGB":
        raise ValueError(f"frame {index} is a picture of mode {mode}; convert it to RGB.")
    pixels = np.ascontiguousarray(frame)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(
            f"frame {index} must be uint8 RGB [H, W, 3], got {pixels.dtype} {list(pixels.shape)}."
        )
    return pixels
