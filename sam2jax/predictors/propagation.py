"""Tracking a session's objects, a chunk of frames at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sam2jax.memory.policy import MemoryPolicy
from sam2jax.nn.sam2 import SAM2
from sam2jax.predictors.programs import (
    Record,
    at_size,
    carries,
    encode,
    take,
    take_turn,
    track_frames,
)
from sam2jax.predictors.session import (
    OBJECTS,
    InferenceState,
    build_state,
    memory_reach,
)
from sam2jax.predictors.sizes import preprocess
from sam2jax.tracking.state import TrackState
from sam2jax.types import Array, ImageFeatures, power_of_two


class FrameAnswer(NamedTuple):
    """All objects' answers on a frame; arrays may still be being computed."""

    frame: int
    records: list[Record]
    masks: list[Array]  # [H, W] logits of each object, at the video's size


class Propagation:
    """Objects on their way through a video, in one direction.

    The tracker's state follows the frames on the device. It is built anew from what the session
    remembers at the start, and whenever the session has been changed.
    """

    def __init__(
        self,
        model: SAM2,
        params: Any,
        policy: MemoryPolicy,
        state: InferenceState,
        frames_at_once: int,
        *,
        reverse: bool,
    ) -> None:
        self.model, self.params, self.policy, self.state = model, params, policy, state
        self.reverse = reverse
        self._direction = np.int32(-1 if reverse else 1)
        self._histories = dict(state.objects)
        # Room for more costs nothing where objects are tracked one by one.
        room = OBJECTS if model.config.objects_at_once == 1 else 1
        self._capacity = power_of_two(max(room, len(self._histories)))
        self._tracker: TrackState | None = None
        self._version = state.version
        self._chunk = frames_at_once
        self._carries = carries(model.config, policy)

    def run(self, start: int, stop: int | None) -> Iterator[FrameAnswer]:
        """Answers from frame `start` to `stop`, or to the end of the video.

        Each is remembered just before it is yielded: the session holds what was yielded, and no
        more. Where chunks hold several frames the next one is begun early; it is dropped when the
        session is changed in between.
        """
        sign = int(self._direction)
        ready: deque[FrameAnswer] = deque()
        upcoming = start
        while True:
            if self.is_outdated and ready:
                upcoming = ready[0].frame
                ready.clear()
            if len(ready) < self._chunk:
                chunk = self._existing(upcoming, stop)
                ready.extend(self.advance(chunk))
                upcoming += sign * len(chunk)
            if not ready:
                return
            answer = ready.popleft()
            self.remember(answer)
            yield answer

    def advance(self, frames: Sequence[int]) -> list[FrameAnswer]:
        """Answers on up to a chunk of consecutive frames; what is remembered stays as it is."""
        if self.is_outdated:
            self._catch_up()
        histories = list(self._histories.values())
        busy = np.zeros((self._chunk, self._capacity), bool)
        for row, frame in enumerate(frames):
            busy[row, : len(histories)] = [frame not in history.cond for history in histories]
        tracked = self._track(frames, busy) if busy.any() else None
        if self._carries and frames:
            self._take_turns(frames[-1])
        answers = []
        for row, frame in enumerate(frames):
            records = [
                history.cond[frame]
                if frame in history.cond
                else take(tracked, np.int32(row), np.int32(place))
                for place, history in enumerate(histories)
            ]
            size = (self.state.video_height, self.state.video_width)
            masks = [at_size(record.masks, size=size) for record in records]
            for mask in masks:
                mask.copy_to_host_async()  # while the next frames are tracked
            answers.append(FrameAnswer(frame, records, masks))
        return answers

    def remember(self, answer: FrameAnswer) -> None:
        """Puts a frame's answers into the objects' histories."""
        config, frame = self.model.config, answer.frame
        for history, record in zip(self._histories.values(), answer.records, strict=True):
            history.tracked[frame] = self.reverse
            if frame not in history.cond:
                history.recent[frame] = stored(record, self.state)
            if self.state.history == "none":
                history.prune(frame, memory_reach(config, self.policy))

    @property
    def is_outdated(self) -> bool:
        """Whether the session was changed since frames were last tracked."""
        return self._version != self.state.version

    @property
    def obj_ids(self) -> list[Any]:
        return list(self._histories)

    def _catch_up(self) -> None:
        """Takes note that the session was changed; objects that were added since wait."""
        for obj_id, history in self._histories.items():
            if self.state.objects.get(obj_id) is not history or not history.cond:
                raise RuntimeError(
                    f"Object {obj_id!r} or its prompts were removed while it was tracked: start "
                    "propagate_in_video again."
                )
        self._tracker, self._version = None, self.state.version

    def _existing(self, first: int, stop: int | None) -> list[int]:
        """The next chunk, as far as it is wanted and the video goes."""
        sign = int(self._direction)
        chunk = []
        for frame in range(first, first + sign * self._chunk, sign):
            wanted = stop is None or (stop - frame) * sign > 0
            if not wanted or not self.state.video.reaches(frame):
                break
            ahead = (frame + sign, frame + 2 * sign)
            try:
                self.state.frames.read(frame, [f for f in ahead if f >= 0])
            except IndexError:  # the container promised more frames than it holds
                break
            chunk.append(frame)
            if self._carries and any(frame in h.cond for h in self._histories.values()):
                break  # its turn has come, before the next one is tracked
        return chunk

    def _track(self, frames: Sequence[int], busy: np.ndarray) -> Record:
        tracker = self._tracker_at(frames[0])
        self._tracker = None  # given away; it stays so if what follows is interrupted
        features = self._features(frames)
        self._tracker, records = track_frames(
            self.model, self.params, self.policy, tracker, features, busy, self._direction
        )
        return records

    def _take_turns(self, frame: int) -> None:
        """Tells the policy of objects that are prompted on a frame, which are not tracked there."""
        config = self.model.config
        for place, history in enumerate(self._histories.values()):
            if frame in history.cond:
                self._tracker = take_turn(
                    config,
                    self.policy,
                    self._tracker_at(frame),
                    np.int32(place),
                    history.cond[frame],
                    self._direction,
                    np.bool_(history.is_alternative(config, frame)),
                )

    def _tracker_at(self, frame: int) -> TrackState:
        tracker = self._tracker or build_state(
            self.model.config,
            self.policy,
            self.state,
            list(self._histories.values()),
            frame,
            self._direction,
            self._capacity,
        )
        return tracker.replace(frame_index=np.int32(frame))

    def _features(self, frames: Sequence[int]) -> ImageFeatures:
        if self._chunk == 1:
            return frame_features(self.model, self.params, self.state, frames[0])
        images = [self.state.frames.read(frame) for frame in frames]
        images += images[-1:] * (self._chunk - len(images))
        return _encode(self.model, self.params, np.stack(images))


def frames_at_once() -> int:
    """One frame fills a CPU; several, encoded as one batch, an accelerator."""
    return 1 if jax.default_backend() == "cpu" else 8


def frame_features(model: SAM2, params: Any, state: InferenceState, frame: int) -> ImageFeatures:
    """A frame's features; the last ones are kept, for click after click on one frame."""
    cached = state.cached_features
    if cached is None or cached[0] != frame:
        image = state.frames.read(frame)
        cached = state.cached_features = (frame, _encode(model, params, image[None]))
    return cached[1]


def _encode(model: SAM2, params: Any, frames: np.ndarray) -> ImageFeatures:
    """Features of frames of any size, by one program."""
    size = model.config.image_size
    fits = frames.shape[1:3] == (size, size)
    return encode(model, params, frames if fits else preprocess(frames, size=size))


def stored(record: Record, state: InferenceState) -> Record:
    """A record where the session keeps such."""
    return jax.device_get(record) if state.offload_state_to_cpu else record


def stop_at(start: int, count: int | None, reverse: bool) -> int | None:
    """One past the last frame; None: the end of the video."""
    if reverse:
        return -1 if count is None else max(start - count, 0) - 1
    return None if count is None else start + count + 1
