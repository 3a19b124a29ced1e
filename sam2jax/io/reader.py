"""Frames read ahead of where they are needed, in a thread of their own."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeAlias

import numpy as np

from sam2jax.io.video import Video

_BUDGET = 64 * 2**20  # bytes of frames that are kept
_FEWEST = 8  # frames that are kept however large they are
_CLOSED = "this reader is closed; make another one."

_Job: TypeAlias = "tuple[int, Future[np.ndarray]]"


class FrameReader:
    """Reads a video in a thread of its own, ahead of where it is asked.

    The last frames are kept, up to a fixed number of bytes. Only that thread touches the video's
    frames, so that reading here and there, and ahead, never decodes two at once. It ends with
    `close`, with this object, or with the program, whatever it is waiting for then. Several threads
    may read.
    """

    def __init__(self, video: Video) -> None:
        self._video = video
        # The thread holds the video and the queue, not this object: that can go at any time.
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_work, args=(video, self._jobs), name=f"reads {video.name}", daemon=True
        )
        self._thread.start()
        self._end = weakref.finalize(self, self._jobs.put, None)
        self._frames: OrderedDict[int, Future[np.ndarray]] = OrderedDict()  # the latest last
        self._room = _FEWEST
        self._lock = threading.Lock()  # of what follows and precedes, not while waiting
        self._awaited: Counter[int] = Counter()  # frames that are being waited for, by how many

    def __deepcopy__(self, memo: Any) -> FrameReader:
        """Reads the same video, which only lends one frame at a time."""
        return FrameReader(self._video)

    def read(self, index: int, ahead: Iterable[int] = ()) -> np.ndarray:
        """The model's image of a frame.

        Args:
            index: of the frame, 0 or more.
            ahead: up to 7 frames to begin with while this one is worked on. Those that the video
                does not have are passed over; failures show when such a frame is asked for.

        Returns:
            uint8 RGB as `video[index]` gives it; it is shared, so it cannot be written to.

        Raises:
            IndexError: there is no such frame.
            ValueError: it cannot be decoded, or the reader is closed.
        """
        with self._lock:
            if not self._end.alive:
                raise ValueError(_CLOSED)
            known = self._frames.get(index)
            if known is None or (known.done() and known.exception() is not None):
                self._forget_waiting()
                known = self._begin(index)
            self._frames.move_to_end(index)
            self._awaited[index] += 1
            for other in itertools.islice(ahead, _FEWEST - 1):  # this one must keep its place
                if other not in self._frames:
                    self._begin(other)
        try:
            image = known.result()
        except CancelledError:
            raise ValueError(_CLOSED) from None
        except Exception:
            with self._lock:
                if self._frames.get(index) is known:
                    del self._frames[index]
            raise
        finally:
            with self._lock:
                self._awaited -= Counter([index])
        self._room = max(_FEWEST, _BUDGET // image.nbytes)
        return image

    def close(self) -> None:
        """Ends the thread, after the frame that it is at; the video may be closed then."""
        with self._lock:
            self._awaited.clear()
            self._forget_waiting()
            self._end()
        self._thread.join()
        self._frames.clear()

    def _begin(self, index: int) -> Future[np.ndarray]:
        """Puts a frame in line, and lets go of the one that was not asked for for longest."""
        future: Future[np.ndarray] = Future()
        self._frames[index] = future
        self._jobs.put((index, future))
        idle = [other for other in self._frames if other != index and not self._awaited[other]]
        for oldest in idle[: max(len(self._frames) - self._room, 0)]:
            self._frames.pop(oldest).cancel()
        return future

    def _forget_waiting(self) -> None:
        """Takes frames that nobody waits for out of the line, so that a jump does not."""
        for index, future in list(self._frames.items()):
            if not self._awaited[index] and future.cancel():
                del self._frames[index]


def _work(video: Video, jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        index, future = job
        if future.set_running_or_notify_cancel():
            try:
                image = video[index]
                image.flags.writeable = False
            except BaseException as error:  # whatever it is, it is for whoever asks
                future.set_exception(error)
            else:
                future.set_result(image)
        del job, future  # or they would be kept until the next one comes
