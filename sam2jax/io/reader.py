"""Frames read ahead of where they are needed, in a thread of their own."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, TypeAlias

import numpy as np

from sam2jax.io.video import Video

_BUDGET = 64 * 2**20  # bytes of frames that are kept
_FEWEST = 8  # frames that are kept however large they are

_Job: TypeAlias = "tuple[int, Future[np.ndarray]]"


class FrameReader:
    """Reads a video in a thread of its own, ahead of where it is asked.

    The last frames are kept, up to a fixed number of bytes. Only that thread touches the video's
    frames, so that reading here and there, and ahead, never decodes two at once. It ends with
    `close`, with this object, or with the program, whatever it is waiting for then.
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
        if not self._end.alive:
            raise ValueError("this reader is closed; make another one.")
        known = self._frames.get(index)
        if known is None or (known.done() and known.exception() is not None):
            self._forget_waiting()
            known = self._begin(index)
        self._frames.move_to_end(index)
        for other in itertools.islice(ahead, _FEWEST - 1):  # this one must keep its place
            if other not in self._frames:
                self._begin(other)
        try:
            image = known.result()
        except Exception:
            self._frames.pop(index, None)
            raise
        self._room = max(_FEWEST, _BUDGET // image.nbytes)
        return image

    def close(self) -> None:
        """Ends the thread, after the frame that it is at; the video may be closed then."""
        self._forget_waiting()
        self._end()
        self._thread.join()
        self._frames.clear()

    def _begin(self, index: int) -> Future[np.ndarray]:
        """Puts a frame in line, and lets go of the one that was not asked for for longest."""
        future: Future[np.ndarray] = Future()
        self._frames[index] = future
        self._jobs.put((index, future))
        while len(self._frames) > self._room:
            _, oldest = self._frames.popitem(last=False)
            oldest.cancel()
        return future

    def _forget_waiting(self) -> None:
        """Takes frames out of the line, so that a jump does not wait for them."""
        for index, future in list(self._frames.items()):
            if future.cancel():
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
