"""Live streams in: cameras, the network and pipes; once, in order, without end."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av
from av.error import FFmpegError, InvalidDataError

from sam2jax.io.container import ANY_METADATA, Converter, frame_rate, video_stream
from sam2jax.io.video import Frame

_STDIN = "-"
_DEVICE = "/dev/video"
_PIPEABLE = (
    "expected mpegts, mkv or the like, raw frames, or an mp4 with its index first "
    "(-movflags +faststart)"
)


class RawFormat(NamedTuple):
    """Of frames that come as bare bytes: RGB, 8 bits, rows from the top."""

    width: int
    height: int
    fps: Fraction = Fraction(25)

    @classmethod
    def parse(cls, text: str) -> RawFormat:
        """Reads WIDTHxHEIGHT[@FPS], like 640x480@30 or 640x480@30000/1001.

        Raises:
            ValueError: it is something else.
        """
        found = re.fullmatch(r"(\d+)x(\d+)(?:@(\d+(?:\.\d+|/\d+)?))?", text)
        with contextlib.suppress(ZeroDivisionError):
            raw = found and cls(int(found[1]), int(found[2]), Fraction(found[3] or 25))
            if raw and min(raw) > 0:
                return raw
        raise ValueError(
            f"raw frames of {text}: expected WIDTHxHEIGHT[@FPS], like 640x480 or 640x480@30."
        )


def is_stream(address: str) -> bool:
    """Whether `open_stream` is for this: "-", a URL (scheme://...) or a camera (/dev/video*)."""
    return (
        address == _STDIN
        or address.startswith(_DEVICE)
        or re.match(r"[a-z][a-z0-9+.-]*://", address, re.IGNORECASE) is not None
    )


def open_stream(address: str, size: int | None = None, raw: RawFormat | None = None) -> Stream:
    """Opens a live stream, and waits for its first frame.

    Args:
        address: "-" for what comes through stdin (any format that FFmpeg reads without seeking,
            or bare frames); a URL that FFmpeg knows (rtsp://, http://, tcp://, udp://, ...); or
            a camera, /dev/video0.
        size: width and height that frames are resized to, as `open_video` does; None: not.
        raw: what bare frames look like; with "-" alone.

    Raises:
        ValueError: it cannot be opened, or holds no video.
    """
    if raw is not None and address != _STDIN:
        raise ValueError(f"raw frames come through stdin, so from - and not from {address}.")
    if address == _STDIN and os.isatty(0):
        raise ValueError("nothing comes through stdin but the keyboard; pipe a stream into it.")
    return Stream(address, size, raw)


class Stream:
    """Frames as they arrive, each of them once. `open_stream` makes one.

    A thread waits for the source and decodes, one frame ahead and no further: a source that is
    faster has to wait, or drops frames of its own. Thus waiting can be broken off at any time.

    What comes through stdin must be whole. A camera or a network may lose something: what cannot
    be decoded is passed over, and when the connection breaks the stream ends, and `lost` says so.
    """

    name: str  # for messages
    height: int  # of the original
    width: int
    fps: Fraction | None
    size: int | None  # may be set until the first frame has been taken
    num_taken: int  # frames so far
    lost: str | None = None  # why the stream ended, if it did not end by itself

    def __init__(self, address: str, size: int | None, raw: RawFormat | None):
        self.name = "the stream" if address == _STDIN else address
        self.size = size
        self._address, self._raw = address, raw
        self._whole = address == _STDIN
        self.num_taken = 0
        self._stopped = self._closed = False
        self._wanted = threading.Semaphore(0)
        # Of this kind because `stop` is called by signal handlers, perhaps within `get`.
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=f"reads {self.name}", daemon=True).start()
        try:
            self.fps = self._take() or None
            self._first = self._take()
        except BaseException:
            self.close()
            raise
        if self._first is None:
            raise ValueError(
                self.lost or f"{self.name} ended before its first frame; expected a video."
            )
        self._converter = Converter(self._first)
        self.height, self.width = self._converter.height, self._converter.width

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        return self.frames()

    def frames(self, *, original: bool = True) -> Iterator[Frame]:
        """The frames that nobody has taken yet, numbered from the first that arrived.

        Args:
            original: whether the original-size frame is wanted as well.

        Raises:
            ValueError: something else than a frame came, or one of another size.
        """
        while (native := self._next()) is not None:
            self._converter.check(native, self.num_taken, self.name)
            shown = self._converter.original(native) if original else None
            frame = Frame(self.num_taken, self._converter.image(native, self.size), shown)
            self.num_taken += 1
            yield frame

    def frame_name(self, index: int) -> str:
        """What files about this frame are called, without suffix."""
        return f"{index:05d}"

    def stop(self) -> None:
        """Makes the stream end after the frame at hand; signal handlers may call it."""
        self._stopped = True
        self._arrived.put(None)

    def close(self) -> None:
        """Lets go of the source, at once or, while it is silent, with the next that it sends."""
        self._closed = True
        self.stop()
        self._wanted.release()

    def _next(self) -> Any:
        first, self._first = self._first, None
        return first if first is not None else self._take()

    def _take(self) -> Any:
        """What the thread has found next; None at the end."""
        found = self._arrived.get()
        if found is None or self._stopped:
            self._stopped = True
            self._arrived.put(None)  # for whoever asks again
            return None
        if isinstance(found, BaseException):
            self.stop()
            raise found
        self._wanted.release()
        return found

    def _work(self) -> None:
        try:
            with contextlib.closing(self._decode()) as decoded:
                for found in decoded:
                    self._arrived.put(found)
                    self._wanted.acquire()
                    if self._closed:
                        return
            self._arrived.put(None)
        except BaseException as error:  # told where frames are taken
            self._arrived.put(error)

    def _decode(self) -> Generator[Any]:
        """The frame rate (0: unknown), then the frames as FFmpeg has them."""
        count = 0
        with contextlib.closing(_open(self._address, self.name, self._raw)) as container:
            stream = video_stream(container, self.name)
            stream.thread_type = "SLICE"  # threads for whole frames would hold frames back
            yield frame_rate(stream) or 0
            try:
                for packet in container.demux(stream):
                    for frame in self._frames_of(packet):
                        if frame.is_corrupt and self._whole:
                            raise self._damaged(count)
                        yield frame
                        count += 1
            except FFmpegError as error:
                if self._whole:
                    raise self._damaged(count) from error
                with contextlib.suppress(FFmpegError):
                    for frame in stream.decode(None):  # those that the decoder has kept back
                        yield frame
                        count += 1
                self.lost = f"{self.name} was lost after {count} frames: {error.strerror}."

    def _frames_of(self, packet: Any) -> list[Any]:
        try:
            return packet.decode()
        except InvalidDataError:
            if self._whole:
                raise
            return []

    def _damaged(self, count: int) -> ValueError:
        expected = _PIPEABLE
        if self._raw is not None:
            width, height, _ = self._raw
            expected = f"raw frames of {width}x{height} have {3 * width * height} bytes each"
        return ValueError(f"{self.name} is damaged or incomplete after {count} frames; {expected}.")


def _open(address: str, name: str, raw: RawFormat | None) -> Any:
    try:
        if raw is not None:
            options = {"video_size": f"{raw.width}x{raw.height}", "framerate": str(raw.fps)}
            return av.open(
                "pipe:0", format="rawvideo", options={"pixel_format": "rgb24", **options}
            )
        if address == _STDIN:
            return av.open("pipe:0", **ANY_METADATA)
        kind = "v4l2" if address.startswith(_DEVICE) else None
        return av.open(address, format=kind, **ANY_METADATA)
    except FFmpegError as error:
        expected = (
            _PIPEABLE if address == _STDIN else "expected a camera or a URL that FFmpeg can read"
        )
        raise ValueError(f"{name} cannot be opened ({error.strerror}); {expected}.") from error
