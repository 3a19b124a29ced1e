"""Videos in containers, through PyAV (FFmpeg)."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import pathlib
import threading
from fractions import Fraction
from typing import Any, NamedTuple

import av
import av.filter
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition

from sam2jax.io.video import Video

_BUDGET = 256 * 2**20  # bytes of decoded frames kept while reading backward
_MOST_PIXELS = 2**27  # of a frame
_LISTS = ("concat", "dash", "hls", "imf", "webm_dash_manifest")  # of other files' names
_UNTIMED = ("avi", "h264", "hevc", "m4v", "mpegvideo")  # their time stamps do not order frames
# Titles and the like need not be UTF-8; from 19 on PyAV takes them without being told.
ANY_METADATA: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)
_TURNS = {
    1: (("transpose", "cclock"),),
    2: (("hflip", ""), ("vflip", "")),
    3: (("transpose", "clock"),),
}


class ContainerVideo(Video):
    """A video file.

    Opening reads the whole file once without decoding it: that counts the frames (headers are not
    always right), finds the key frames that decoding can start from, and shows whether the file
    is complete. Backward runs decode from a key frame and keep what fits a fixed amount of memory.
    Threads may share it, and close it while others read: those get a ValueError.
    """

    def __init__(self, source: pathlib.Path | bytes, size: int | None):
        self._source, self.size = source, size
        self._lock = threading.RLock()  # FFmpeg's objects are not to be touched by two at once
        self.name = "the video" if isinstance(source, bytes) else str(source)
        self._index = _scan(source, self.name)
        self.num_frames = len(self._index.times)
        self._kept: dict[int, Any] = {}  # decoded frames, by number
        self._converter: Converter | None = None  # known from the first frame on
        self._container: Any = None
        self._closed = False
        self._rewind()
        try:
            first = self._decode()
        except IndexError as error:
            raise ValueError(f"{self.name} has no frames; expected a video.") from error
        self._kept[0] = first
        self._index = self._index.starting_at(first.pts)
        self.num_frames = len(self._index.times)
        self._converter = Converter(first)
        self.height, self.width = self._converter.height, self._converter.width
        self.fps = self._index.frame_rate(self._stream)
        self._room = max(8, _BUDGET // sum(plane.buffer_size for plane in first.planes))

    def close(self) -> None:
        with self._lock:
            self._kept.clear()
            self._container.close()
            self._closed = True

    def __del__(self) -> None:
        # FFmpeg's objects know each other: the file would stay open until cycles are looked for.
        container = getattr(self, "_container", None)
        if container is not None:
            container.close()

    def _read(self, index: int) -> Any:
        with self._lock:
            return self._read_alone(index)

    def _read_alone(self, index: int) -> Any:
        if self._closed:
            raise ValueError(f"{self.name} is closed; open it again.")
        if index >= self.num_frames:
            raise IndexError(index)
        if index not in self._kept:
            key = self._index.key_before(index)
            if not key <= self._next <= index:
                self._seek(key)
            self._kept.clear()
            while self._next <= index:
                number, frame = self._next, self._decode()
                if number > index - self._room:
                    self._kept[number] = frame
        return self._kept[index]

    def _decode(self) -> Any:
        """The next frame; IndexError at the end."""
        try:
            frame = next(self._frames, None)
        except FFmpegError as error:
            raise self._damaged() from error
        if frame is None:
            self.num_frames = self._next
            raise IndexError(self._next)
        if frame.is_corrupt:
            raise self._damaged()
        if self._converter is not None:
            self._converter.check(frame, self._next, self.name)
            if not self._index.agrees(self._next, frame.pts):
                self._index = self._index.without_times()  # packets without a frame: count from 0
        self._next += 1
        return frame

    def _damaged(self) -> ValueError:
        damaged, self._next = self._next, self.num_frames  # so that who asks again starts anew
        return ValueError(
            f"{self.name} is damaged at frame {damaged} and cannot be decoded; re-encode it, "
            "for example with `ffmpeg -i IN OUT.mp4`, and look at the result."
        )

    def _rewind(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = _open(self._source, self.name)
        self._stream = video_stream(self._container, self.name)
        self._stream.thread_type = "AUTO"
        self._frames = self._container.decode(self._stream)
        self._next = 0

    def _seek(self, key: int) -> None:
        """Makes key frame number `key` the next one, or frame 0 where that is not possible."""
        wanted = int(self._index.times[key])
        # Formats differ in whether they look for presentation or for decoding times.
        for target in self._index.seek_targets(key):
            with contextlib.suppress(FFmpegError):
                self._container.seek(target, stream=self._stream)
                frames = self._container.decode(self._stream)
                for frame in frames:
                    if frame.pts == wanted:
                        self._frames, self._next = itertools.chain([frame], frames), key
                        return
                    if frame.pts is None or frame.pts > wanted:
                        break
        self._rewind()

    def _image(self, native: Any) -> np.ndarray:
        assert self._converter is not None
        with self._lock:
            return self._converter.image(native, self.size)

    def _original(self, native: Any) -> np.ndarray:
        assert self._converter is not None
        return self._converter.original(native)


class Converter:
    """Makes RGB arrays of decoded frames, turned upright as the first one asks for."""

    def __init__(self, first: Any):
        self._coded = (first.width, first.height)  # before rotation
        self._turns = {90: 1, 180: 2, 270: 3}.get(round(first.rotation) % 360, 0)  # to the left
        self.width, self.height = reversed(self._coded) if self._turns % 2 else self._coded
        self._scaler: av.filter.Graph | None = None

    def check(self, frame: Any, index: int, name: str) -> None:
        """ValueError where a frame is not as large as the first."""
        if (frame.width, frame.height) != self._coded:
            raise ValueError(
                f"{name} changes its size at frame {index}; all frames must have the same size. "
                "Re-encode it with one size first."
            )

    def image(self, frame: Any, size: int | None) -> np.ndarray:
        """uint8 RGB [size, size, 3], the same size every time; None: the frame's own."""
        if size is None:
            return self.original(frame)
        if self._scaler is None:
            self._scaler = _scaler(frame, self._turns, size)
        self._scaler.push(frame)
        return self._scaler.pull().to_ndarray()

    def original(self, frame: Any) -> np.ndarray:
        """uint8 RGB [H, W, 3]."""
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), self._turns))


class _Index(NamedTuple):
    """What the packets of a video stream say about its frames, in the order they are shown."""

    times: np.ndarray  # [T] presentation times
    keys: np.ndarray  # [K] numbers of the key frames, ascending
    key_decoding_times: np.ndarray  # [K]
    timed: bool  # whether the times can be relied on

    def without_times(self) -> _Index:
        return self._replace(keys=self.keys[:0], timed=False)

    def starting_at(self, time: int | None) -> _Index:
        """Drops what comes before the first frame that can be decoded."""
        if not self.timed or time is None:
            return self.without_times()
        first = int(np.searchsorted(self.times, time))
        kept = self.keys >= first
        return _Index(
            self.times[first:], self.keys[kept] - first, self.key_decoding_times[kept], True
        )

    def frame_rate(self, stream: Any) -> Fraction | None:
        """Frames per second: what the container says, but where its times say otherwise."""
        said = frame_rate(stream)
        if not self.timed or len(self.times) < 2 or not stream.time_base:
            return said
        seconds = int(self.times[-1] - self.times[0]) * Fraction(stream.time_base)
        found = (len(self.times) - 1) / seconds
        if said and abs(found / said - 1) < 0.05:  # times are rounded, and streams may begin late
            return said
        return found.limit_denominator(1001)

    def key_before(self, index: int) -> int:
        at = int(np.searchsorted(self.keys, index, side="right"))
        return int(self.keys[at - 1]) if at else 0

    def seek_targets(self, key: int) -> tuple[int, ...]:
        if key == 0:  # a fresh start is as fast and always works
            return ()
        at = int(np.searchsorted(self.keys, key))
        return int(self.times[key]), int(self.key_decoding_times[at])

    def agrees(self, index: int, time: int | None) -> bool:
        return not self.timed or (index < len(self.times) and time == self.times[index])


def _scan(source: pathlib.Path | bytes, name: str) -> _Index:
    """Reads all packets of the video stream."""
    _check_complete(source, name)
    times, decoding_times, is_key = [], [], []
    with contextlib.closing(_open(source, name)) as container:
        timed = container.format.name not in _UNTIMED
        try:
            for packet in container.demux(video_stream(container, name)):
                if not packet.size or packet.is_discard:
                    continue
                if packet.is_corrupt:
                    raise ValueError(
                        f"{name} is truncated or damaged at about frame {len(times)}; copy it "
                        "again, or re-encode it, for example with `ffmpeg -i IN OUT.mp4`."
                    )
                timed = timed and packet.pts is not None
                times.append(packet.pts or 0)
                decoding_times.append(packet.pts if packet.dts is None else packet.dts)
                is_key.append(packet.is_keyframe)
        except FFmpegError as error:
            raise ValueError(
                f"{name} is damaged after {len(times)} frames; copy it again."
            ) from error
    if not times or not timed or len(set(times)) < len(times):
        none = np.zeros(0, np.int64)
        return _Index(np.arange(len(times)), none, none, False)
    order = np.argsort(np.array(times))
    keys = np.flatnonzero(np.array(is_key)[order])
    return _Index(np.array(times)[order], keys, np.array(decoding_times)[order][keys], True)


def _open(source: pathlib.Path | bytes, name: str) -> Any:
    try:
        if isinstance(source, bytes):
            container = av.open(io.BytesIO(source), **ANY_METADATA)
        else:
            with source.open("rb"):  # for Python's own, clearer errors about access
                # From the root on: FFmpeg takes what is before a colon for a protocol.
                container = av.open(str(source.absolute()), **ANY_METADATA)
    except (FFmpegError, MemoryError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.EMFILE, errno.ENFILE):  # that is not the video's fault
            raise OSError(number, os.strerror(number), name) from error
        raise ValueError(
            f"{name} is not a video that FFmpeg can read, or an incomplete one; expected a video "
            "file (mp4, mkv, mov, webm, ...) or a folder of JPEG or PNG frames."
        ) from error
    if container.format.name in _LISTS:
        container.close()
        raise ValueError(f"{name} is a list of other files; give the video itself.")
    return container


def video_stream(container: Any, name: str) -> Any:
    """The first film in a container.

    Raises:
        ValueError: there is none, its codec is unknown, or its frames are huge.
    """
    # The tty demuxer takes any .txt for a film of its letters; a cover picture is no film either.
    for stream in container.streams.video if container.format.name != "tty" else ():
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise ValueError(f"{name} is damaged, or of a codec that FFmpeg does not know.")
            if stream.width * stream.height > _MOST_PIXELS:
                raise ValueError(
                    f"{name} has frames of {stream.width}x{stream.height}, larger than can be read."
                )
            return stream
    raise ValueError(f"{name} holds no video; expected a video file (mp4, mkv, mov, webm, ...).")


def frame_rate(stream: Any) -> Fraction | None:
    """Frames per second, as far as the container knows."""
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate.numerator, rate.denominator) if rate else None


def _scaler(frame: Any, turns: int, size: int) -> av.filter.Graph:
    """Rotation as the file asks for, then FFmpeg's bilinear scaler, then RGB: what decord does."""
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(template=frame)]
    nodes += [graph.add(*turn) for turn in _TURNS.get(turns, ())]
    nodes += [
        graph.add("scale", f"{size}:{size}:flags=bilinear"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    return graph


def _check_complete(source: pathlib.Path | bytes, name: str) -> None:
    """Refuses empty files, and Matroska files shorter than they say: FFmpeg takes those."""
    if isinstance(source, bytes):
        head, length = source[:64], len(source)
    else:
        with source.open("rb") as file:
            head, length = file.read(64), os.fstat(file.fileno()).st_size
    if not length:
        raise ValueError(f"{name} is empty; expected a video.")
    expected = _matroska_length(head)
    if expected and length < expected:
        raise ValueError(
            f"{name} is truncated: {length} of {expected} bytes are there; copy it again."
        )


def _matroska_length(head: bytes) -> int | None:
    """How long a Matroska file says it is; None: it is none, or does not say."""

    def number(at: int) -> tuple[int, int]:  # EBML: leading zeros of the first byte give the width
        if at >= len(head):
            return -1, at
        width = 9 - head[at].bit_length()
        value = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
        return (-1 if value == (1 << 7 * width) - 1 else value), at + width

    if head[:4] != b"\x1a\x45\xdf\xa3":
        return None
    header, body = number(4)
    segment = body + header
    if head[segment : segment + 4] != b"\x18\x53\x80\x67":
        return None
    length, start = number(segment + 4)
    return start + length if length >= 0 else None
