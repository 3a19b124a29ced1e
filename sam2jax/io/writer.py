"""Videos out."""

from __future__ import annotations

import contextlib
import pathlib
from fractions import Fraction
from typing import Any

import numpy as np

from sam2jax.io.files import PathLike, atomic_path

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}

# The first that this build of FFmpeg has; all of them play everywhere.
_ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "18", "preset": "veryfast"},
    "libopenh264": {"rc_mode": "quality"},
    "mpeg4": {"qmin": "2", "qmax": "5"},
}
_BT709 = 1  # colour primaries, transfer and matrix; without it players guess by the size


class VideoWriter:
    """Writes RGB frames as a video; the file appears when all are written, or not at all.

    A context manager: leaving it normally completes the file, an exception discards it. Frames of
    odd width or height are extended by a row or column, since common players want even ones.

    Args:
        path: ends in .mp4, .mov or .mkv.
        fps: frames per second; None: 25.
        height: of every frame.
        width: of every frame.
    """

    def __init__(self, path: PathLike, fps: Fraction | float | None, height: int, width: int):
        self._format = video_format(path)
        self._path = pathlib.Path(path)
        self._fps = Fraction(fps or 25).limit_denominator(100_000)
        self._size = (height, width)
        self._count = 0

    def __enter__(self) -> VideoWriter:
        import av

        with contextlib.ExitStack() as undo:
            temporary = undo.enter_context(atomic_path(self._path))
            # The index goes first, so that a browser can play what it has of the file.
            options = {"movflags": "+faststart"} if self._format != "matroska" else {}
            self._container = undo.enter_context(
                av.open(str(temporary), "w", format=self._format, options=options)
            )
            self._stream = self._add_stream()
            undo.push(self._finish)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._undo.__exit__(*failure)

    def write(self, frame: np.ndarray) -> None:
        """Appends a frame: uint8 RGB [H, W, 3]."""
        import av

        height, width = self._size
        if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
            raise ValueError(
                f"a frame of this video must be uint8 [{height}, {width}, 3], got "
                f"{frame.dtype} {list(frame.shape)}."
            )
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=1)
        picture.pts, picture.time_base = self._count, 1 / self._fps
        self._container.mux(self._stream.encode(picture))
        self._count += 1

    def _add_stream(self) -> Any:
        from av.codec import Codec

        for name in _ENCODERS:
            with contextlib.suppress(ValueError):
                Codec(name, "w")
                break
        else:
            raise ValueError(f"this FFmpeg has no video encoder ({', '.join(_ENCODERS)}).")
        stream: Any = self._container.add_stream(name, rate=self._fps, options=_ENCODERS[name])
        height, width = self._size
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = 1  # limited, as in all video
        return stream

    def _finish(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            if not self._count:
                raise ValueError(f"no frame was written to {self._path}; a video has at least one.")
            self._container.mux(self._stream.encode(None))


def video_format(path: PathLike) -> str:
    """FFmpeg's name for the container that `path` asks for by its suffix."""
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}: the video is written so.")
    return FORMATS[suffix]
