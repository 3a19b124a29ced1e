"""What an interactive session on one video remembers, outside of the compiled program.

The tracker's bank is of constant size; a session keeps every frame's memory beside it, so that a
user can go back, correct and track in either direction, and builds the bank for a starting frame
from that history.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam2jax.config import SAM2Config
from sam2jax.io.video import Video
from sam2jax.memory.bank import MemoryBank, empty
from sam2jax.tracking.state import TrackState
from sam2jax.types import Array, FrameMemory, ImageFeatures


@dataclasses.dataclass
class Record:
    """One object's answer on one frame, and what it left behind."""

    masks: Array  # [S/4, S/4] float32 logits
    memory: FrameMemory  # of one object


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

    def answer(self, frame: int, *, cond: bool) -> Record | None:
        """The latest answer on a frame, one that is pending first."""
        pending = self.pending_cond if cond else self.pending_recent
        return pending.get(frame) or self.cond.get(frame) or self.recent.get(frame)

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


@dataclasses.dataclass
class InferenceState:
    """A session on one video. `state["obj_ids"]` and the like read as in the official predictor."""

    video: Video
    num_frames: int
    video_height: int
    video_width: int
    offload_state_to_cpu: bool = False
    objects: dict[Hashable, ObjectHistory] = dataclasses.field(default_factory=dict)
    cached_features: tuple[int, ImageFeatures] | None = None

    @property
    def obj_ids(self) -> list[Hashable]:
        return list(self.objects)

    def __getitem__(self, name: str) -> Any:
        if name not in ("obj_ids", "num_frames", "video_height", "video_width"):
            raise KeyError(name)
        return getattr(self, name)


def build_state(
    config: SAM2Config,
    histories: list[ObjectHistory],
    capacity: int,
    frame: int,
    num_frames: int,
    *,
    reverse: bool,
) -> TrackState:
    """The tracker's state as it stands before `frame`, from what is remembered.

    Args:
      config: of the model.
      histories: of N objects.
      capacity: objects to make room for; those past N hold nothing.
      frame: index of the frame to be processed next.
      num_frames: length of the video.
      reverse: direction of tracking.
    """
    room = power_of_two(max((len(h.cond) for h in histories), default=1))
    banks = [_build_bank(config, h, room, frame, reverse=reverse) for h in histories]
    banks += [empty(config, room)] * (capacity - len(banks))
    return TrackState(
        bank=jax.tree.map(lambda *x: jnp.stack(x), *banks),
        frame_index=jnp.asarray(frame, jnp.int32),
        num_frames=jnp.asarray(num_frames, jnp.int32),
    )


def _build_bank(
    config: SAM2Config, history: ObjectHistory, room: int, frame: int, *, reverse: bool
) -> MemoryBank:
    bank = empty(config, room)
    sign = -1 if reverse else 1
    stride = config.memory_temporal_stride_for_eval
    past = sorted((f for f in history.recent if (frame - f) * sign > 0), reverse=not reverse)
    nearest = [f for f in past if f == frame - sign or f % stride == 0][: config.num_recent]

    def fill(frames: list[int], records: dict[int, Record], **fields: str) -> dict[str, Array]:
        if not frames:
            return {}
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *(records[f].memory for f in frames))
        return {
            ours: getattr(bank, ours).at[: len(frames)].set(getattr(stacked, theirs))
            for ours, theirs in fields.items()
        }

    return bank.replace(
        **fill(
            list(history.cond),
            history.cond,
            cond_frame="frame",
            cond_spatial="spatial",
            cond_pointer="pointer",
            cond_iou="iou",
            cond_score="object_score",
        ),
        **fill(nearest, history.recent, recent_frame="frame", recent_spatial="spatial"),
        **fill(
            past[: config.num_recent_pointers],
            history.recent,
            pointer_frame="frame",
            pointer="pointer",
            pointer_iou="iou",
            pointer_score="object_score",
        ),
    )


def power_of_two(count: int) -> int:
    """The least power of two that holds `count`: few sizes, few compilations."""
    return 1 << max(count - 1, 0).bit_length()
