"""What a session answers on a frame."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from sam2jax.predictors.programs import at_size
from sam2jax.predictors.session import InferenceState
from sam2jax.types import EMPTY, NO_OBJ_SCORE, Array


class Scores(NamedTuple):
    """What the model thinks of its answers on a frame."""

    obj_ids: list[Hashable]
    object_scores: np.ndarray  # [N] float32 logits, above 0: the object is in the frame
    ious: np.ndarray  # [N] float32, predicted IoU of each mask
    finite: np.ndarray  # [N] bool; False: NaN or infinity arose, and the object counts as away


def scores_on(state: InferenceState, frame: int) -> Scores:
    """Of all objects' latest answers on a frame; -1024 and 0 where an object has none."""
    count = len(state.objects)
    scores, ious = np.full(count, NO_OBJ_SCORE, np.float32), np.zeros(count, np.float32)
    finite = np.ones(count, bool)
    for index, history in enumerate(state.objects.values()):
        record = history.latest(frame)
        if record is not None:
            memory = record.memory
            scores[index], ious[index] = float(memory.object_score), float(memory.iou)
            finite[index] = int(memory.frame) != EMPTY
    return Scores(state.obj_ids, scores, ious, finite)


def masks_on(
    state: InferenceState, frame: int, cond: bool | None = None
) -> list[Array | np.ndarray]:
    """All objects' latest answers on a frame, [H, W] at the video's size; -1024 where an object
    has none.

    `cond` says whether pending answers of conditioning frames count, or those of corrections;
    None: the former where there are any, as in the official predictor.
    """
    histories = state.objects.values()
    if cond is None:
        cond = any(frame in history.pending_cond for history in histories)
    size = (state.video_height, state.video_width)
    records = [history.answer(frame, cond=cond) for history in histories]
    nothing = np.full(size, NO_OBJ_SCORE, np.float32)
    return [nothing if record is None else at_size(record.masks, size=size) for record in records]
