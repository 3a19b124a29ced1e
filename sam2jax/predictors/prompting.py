"""One object's prompts on one frame, answered."""

from __future__ import annotations

from typing import Any

import numpy as np

from sam2jax.config import SAM2Config
from sam2jax.memory.policy import MemoryPolicy
from sam2jax.nn.sam2 import SAM2
from sam2jax.predictors.programs import Record, answer_prompt, fit_mask
from sam2jax.predictors.propagation import frame_features, stored
from sam2jax.predictors.session import InferenceState, ObjectHistory, build_state
from sam2jax.types import CONDITIONING, REFINEMENT, Prompts, power_of_two

POINTS = 8  # that programs are compiled for at first; beyond them, powers of two
NO_POINTS = np.zeros((0, 2), np.float32), np.zeros(0, np.int32)


def answer(
    model: SAM2,
    params: Any,
    policy: MemoryPolicy,
    state: InferenceState,
    history: ObjectHistory,
    frame: int,
    points: tuple[np.ndarray, np.ndarray],
    *,
    mask: np.ndarray | None = None,
    previous: Record | None = None,
) -> Record:
    """Answers a prompt: without memory on a new frame, else with the memories that are settled.

    Args:
      model, params: from `load`.
      policy: that memories are kept by.
      state: of the session.
      history: of the object.
      frame: index of the frame.
      points: [P, 2] (x, y) in pixels of the model's image, and their labels [P].
      mask: [h, w] bool; then there are no points.
      previous: an earlier answer on this frame, which is fed back.
    """
    refine = frame in history.tracked
    if refine and mask is None and not history.cond:  # clicks are answered with memory
        raise RuntimeError(
            f"Frame {frame} was tracked from prompts that are gone: prompt another frame, and "
            "propagate, before correcting this one."
        )
    direction = np.int32(-1 if history.tracked.get(frame) else 1)
    memory = history if refine else ObjectHistory()
    record = answer_prompt(
        model,
        params,
        policy,
        build_state(model.config, policy, state, [memory], frame, direction, capacity=1),
        frame_features(model, params, state, frame),
        _as_prompts(model.config, *points, mask, previous, refine),
        direction,
    )
    return stored(record, state)


def _as_prompts(
    config: SAM2Config,
    points: np.ndarray,
    labels: np.ndarray,
    mask: np.ndarray | None,
    previous: Record | None,
    refine: bool,
) -> Prompts:
    """Prompts with every field there, so that one program takes them all."""
    width, size = power_of_two(max(POINTS, len(labels))), config.image_size
    rows, kinds = np.zeros((1, width, 2), np.float32), np.zeros((1, width), np.int32)
    rows[0, : len(points)], kinds[0, : len(labels)] = points, labels
    no_mask, no_logits = np.zeros((size, size), np.float32), np.zeros((size // 4,) * 2, np.float32)
    fields = {
        "points": rows,
        "labels": kinds,
        "num_points": np.array([len(labels)], np.int32),
        "kind": np.array([REFINEMENT if refine else CONDITIONING], np.int32),
        "mask": (no_mask if mask is None else fit_mask(mask.astype(np.float32), size=size))[None],
        "has_mask": np.array([mask is not None]),
        "logits": (no_logits if previous is None else previous.masks)[None],
        "has_logits": np.array([previous is not None]),
    }
    return Prompts(**fields)
