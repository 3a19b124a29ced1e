"""What an interactive session on one video remembers, outside of the compiled programs.

The tracker's bank is of constant size; a session keeps every frame's memory beside it, so that a
user can go back, correct and track in either direction, and builds the bank for a starting frame
from that history.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from sam2jax.config import SAM2Config
from sam2jax.memory.policy import SAM2, MemoryPolicy, reach
from sam2jax.predictors.programs import Held, Record, carries, nothing_held, remember, stack
from sam2jax.tracking.state import TrackState
from sam2jax.types import ImageFeatures, power_of_two

History = Literal["all", "none"]

# Sizes that programs are compiled for at first; beyond them, powers of two.
OBJECTS, COND_FRAMES = 8, 4
# Prompted frames of an object that are kept where no history is.
MOST_COND_FRAMES = 16
# Tracked frames from which a policy's memory is built anew.
REPLAYED = 64


class Frames(Protocol):
    """Where a session's frames come from: a `FrameReader`, or the last frame of a stream."""

    def read(self, index: int, ahead: Iterable[int] = ()) -> np.ndarray: ...


@dataclasses.dataclass
class ObjectHistory:
    """One object's prompts and answers, by frame index.

    Answers to prompts wait in `pending` until tracking starts, as in the official predictor.
    """

    points: dict[int, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    masks: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    cond: dict[int, Record] = dataclasses.field(default_factory=dict)
    recent: dict[int, Record] = dataclasses.field(default_factory=dict)
    pending_cond: dict[int, Record] = dataclasses.field(default_factory=dict)
    pending_recent: dict[int, Record] = dataclasses.field(default_factory=dict)
    tracked: dict[int, bool] = dataclasses.field(default_factory=dict)  # frame -> in reverse

    def copy(self) -> ObjectHistory:
        """Shares what is in the dictionaries: arrays are not written to."""
        return ObjectHistory(**{name: dict(held) for name, held in vars(self).items()})

    def answer(self, frame: int, *, cond: bool) -> Record | None:
        """The latest answer on a frame, one that is pending first."""
        pending = self.pending_cond if cond else self.pending_recent
        return pending.get(frame) or self.cond.get(frame) or self.recent.get(frame)

    def latest(self, frame: int) -> Record | None:
        return self.pending_recent.get(frame) or self.answer(frame, cond=True)

    @property
    def is_prompted(self) -> bool:
        """Whether there is, or will be, a conditioning frame to track from."""
        return bool(self.cond or self.pending_cond)

    def is_alternative(self, config: SAM2Config, frame: int) -> bool:
        """Whether a frame was answered by one of three alternatives, not by the single mask."""
        clicks = len(self.points[frame][1]) if frame in self.points else 0
        most = config.multimask_max_pt_num
        return frame not in self.masks and config.multimask_min_pt_num <= clicks <= most

    def settle(self, clear_around: int | None) -> None:
        """Makes pending answers memories (official `propagate_in_video_preflight`)."""
        for pending, settled in (
            (self.pending_recent, self.recent),
            (self.pending_cond, self.cond),
        ):
            for frame, record in pending.items():
                settled[frame] = record
                if clear_around is not None:
                    self.forget_around(frame, clear_around)
            pending.clear()
        for frame in self.cond:
            self.recent.pop(frame, None)

    def forget_around(self, frame: int, reach: int) -> None:
        """Drops tracked memories within `reach` frames."""
        for near in range(frame - reach, frame + reach + 1):
            self.recent.pop(near, None)

    def clear_prompts(self, frame: int) -> None:
        """Drops a frame's prompts; its answer stays, as that of a frame without."""
        for held in (self.points, self.masks, self.pending_cond, self.pending_recent):
            held.pop(frame, None)
        if frame in self.cond:
            self.recent[frame] = self.cond.pop(frame)
            self.tracked.pop(frame, None)

    def prune(self, frame: int, reach: int) -> None:
        """Keeps what the bank keeps: frames within `reach`, and a few conditioning frames."""
        while len(self.cond) > MOST_COND_FRAMES:
            del self.cond[max(self.cond, key=lambda prompted: abs(prompted - frame))]
        for held in (self.recent, self.tracked):
            for far in [f for f in held if abs(f - frame) > reach]:
                del held[far]
        answered = {*self.cond, *self.tracked, *self.pending_cond, *self.pending_recent}
        for prompts in (self.points, self.masks):
            for gone in [f for f in prompts if f not in answered]:
                del prompts[gone]


@dataclasses.dataclass
class InferenceState:
    """A session on one video. `state["obj_ids"]` and the like read as in the official predictor.

    A frame's memory of one object takes (S/16)^2 * 128 + (S/4)^2 * 4 bytes and a little more:
    769 KiB at 1024 px, on the device, or on the host with `offload_state_to_cpu`.
    """

    video: Any  # sam2jax.io.video.Video, or what stands for it in a stream
    frames: Frames
    video_height: int
    video_width: int
    clip_length: int  # in frames, up to the number that pointer distances are divided by
    source: str | None = None  # absolute path of the video, where it has one
    offload_state_to_cpu: bool = False
    history: History = "all"
    objects: dict[Hashable, ObjectHistory] = dataclasses.field(default_factory=dict)
    version: int = 0  # of what is remembered, raised by every change but tracking
    cached_features: tuple[int, ImageFeatures] | None = None  # of the frame looked at last

    def __deepcopy__(self, memo: Any) -> InferenceState:
        """A session of its own on the same video, which goes on from here."""
        copies = {obj_id: history.copy() for obj_id, history in dict(self.objects).items()}
        return dataclasses.replace(self, frames=copy.deepcopy(self.frames, memo), objects=copies)

    def __getstate__(self) -> Any:
        raise TypeError(
            "A session is copied by copy.deepcopy, and kept in a file by the predictor's "
            "save_state, from which load_state takes it up."
        )

    def __repr__(self) -> str:
        size = f"{self.video_width}x{self.video_height}"
        prompted = sorted({f for h in self.objects.values() for f in (*h.points, *h.masks)})
        tracked = len({frame for history in self.objects.values() for frame in history.tracked})
        return (
            f"InferenceState({self.video.name}, {size}, obj_ids={self.obj_ids}, "
            f"prompted frames={prompted}, {tracked} frames tracked)"
        )

    @property
    def num_frames(self) -> int:
        return self.video.num_frames

    @property
    def obj_ids(self) -> list[Hashable]:
        return list(self.objects)

    def __getitem__(self, name: str) -> Any:
        if name not in ("obj_ids", "num_frames", "video_height", "video_width"):
            raise KeyError(name)
        return getattr(self, name)


def check_session(state: Any) -> InferenceState:
    if not isinstance(state, InferenceState):
        raise TypeError(f"Expected what init_state returned, got {type(state).__name__}.")
    return state


def unknown_object(state: InferenceState, obj_id: Hashable) -> RuntimeError:
    return RuntimeError(f"There is no object {obj_id!r}; the objects are {state.obj_ids}.")


def build_state(
    config: SAM2Config,
    policy: MemoryPolicy,
    state: InferenceState,
    histories: Sequence[ObjectHistory],
    frame: int,
    direction: np.int32,
    capacity: int,
) -> TrackState:
    """The tracker's state as it stands before `frame`, from what is remembered.

    Args:
      config: of the model.
      policy: that the memories are kept by.
      state: of the session.
      histories: of N objects.
      frame: index of the frame to be processed next.
      direction: 1 or, in reverse, -1.
      capacity: objects to make room for; those past N hold nothing.
    """
    room = power_of_two(max([COND_FRAMES, *(len(h.cond) for h in histories)]))
    none = nothing_held(config, policy, room)
    every = [_hold(config, policy, h, frame, direction, none) for h in histories]
    held = stack(policy.lineages, *every, *[none] * (capacity - len(every)))
    return TrackState(
        bank=held.bank,
        frame_index=np.int32(frame),  # type: ignore[arg-type]
        num_frames=np.int32(state.clip_length),  # type: ignore[arg-type]
        carried=held.carried,
        lineages=policy.lineages,
    )


def _hold(
    config: SAM2Config,
    policy: MemoryPolicy,
    history: ObjectHistory,
    frame: int,
    direction: np.int32,
    held: Held,
) -> Held:
    """What the tracker holds of an object before `frame`: its history, written once more."""

    def age(other: int) -> int:
        return (frame - other) * int(direction)

    def write(held: Held, index: int, record: Record, *, due: bool) -> Held:
        conditioning = np.bool_(index in history.cond)
        alternative = np.bool_(history.is_alternative(config, index))
        return remember(
            config, policy, held, record, direction, conditioning, alternative, np.bool_(due)
        )

    for index, record in history.cond.items():  # of equally far ones the first prompted is read
        held = write(held, index, record, due=False)
    answers = {**history.recent, **(history.cond if carries(config, policy) else {})}
    for index in sorted(answers, key=age, reverse=True):
        if 0 < age(index) <= memory_reach(config, policy):
            held = write(held, index, answers[index], due=True)
    return held


def memory_reach(config: SAM2Config, policy: MemoryPolicy) -> int:
    """How many frames back the bank's recent memories can lie; of policies that choose among
    frames as they please, how many are written once more when a session was changed."""
    if policy.write is not SAM2.write:
        return REPLAYED
    spatial = config.num_recent * reach(config, policy.settings).memory_temporal_stride_for_eval
    return max(spatial, config.num_recent_pointers)
