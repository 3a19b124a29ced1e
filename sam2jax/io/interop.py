"""Answers in the forms of other libraries: supervision, FiftyOne, napari.

They are imported when they are asked for; none of them is needed otherwise. Masks are what
predictors and `track` give, at the size of the frame: logits, of which those above 0 are the
object's, or bool. An object out of sight has no pixel, and is left out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from sam2jax.io.drawing import color


def to_supervision(masks: Any, obj_ids: Sequence[int], scores: Any = None) -> Any:
    """One frame's objects as `supervision.Detections`, with `tracker_id` and `class_id`.

    Args:
      masks: [N, H, W] or [N, 1, H, W] logits, or bool.
      obj_ids: N whole numbers.
      scores: [N] from 0 to 1, for instance predicted IoUs: the confidence.

    Raises:
      ImportError: supervision is not installed.
      ValueError: masks, ids and scores do not fit, or an id is no whole number.
    """
    import supervision

    if not _are_whole(obj_ids):
        raise ValueError(f"Tracker ids are whole numbers, got the ids {list(obj_ids)}.")
    masks, scores, seen = _visible(masks, obj_ids, scores)
    if not len(seen):
        return supervision.Detections.empty()
    ids = np.asarray(obj_ids)[seen].astype(int)
    return supervision.Detections(
        xyxy=np.array([_box(mask) for mask in masks], np.float32),
        mask=masks,
        confidence=scores,
        class_id=ids,
        tracker_id=ids,
    )


def to_fiftyone(masks: Any, obj_ids: Sequence[Hashable], scores: Any = None) -> Any:
    """One frame's objects as `fiftyone.Detections`; arguments as in `to_supervision`.

    Labels are the ids as text; `index` is the object's place among them, from 1.
    """
    import fiftyone

    masks, scores, seen = _visible(masks, obj_ids, scores)
    detections = []
    for row, (place, mask) in enumerate(zip(seen.tolist(), masks, strict=True)):
        x0, y0, x1, y1 = _box(mask)
        height, width = mask.shape
        detections.append(
            fiftyone.Detection(
                label=str(obj_ids[place]),
                index=place + 1,
                bounding_box=[x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height],
                mask=mask[y0:y1, x0:x1],
                confidence=None if scores is None else float(scores[row]),
            )
        )
    return fiftyone.Detections(detections=detections)


def to_napari(
    masks: Any, obj_ids: Sequence[int], name: str = "sam2jax"
) -> tuple[np.ndarray, dict[str, Any], str]:
    """A clip's objects as a layer of labels: `viewer.add_layer(Layer.create(*to_napari(...)))`.

    Where objects overlap the first of them wins.

    Args:
      masks: [T, N, H, W] or [T, N, 1, H, W] logits, or bool.
      obj_ids: N numbers from 1 on, the labels.
      name: of the layer.

    Returns:
      What napari calls a layer data tuple: labels [T, H, W], the layer's arguments, its kind.

    Raises:
      ValueError: masks and ids do not fit, an id is below 1, or there is no frame.
    """
    frames = [_as_bool(frame, obj_ids) for frame in masks]
    if not frames:
        raise ValueError("Expected masks [T, N, H, W] of at least one frame, got none.")
    if not _are_whole(obj_ids) or min(obj_ids, default=1) < 1:
        raise ValueError(f"Labels are numbers from 1 on, got the ids {list(obj_ids)}.")
    labels = np.zeros((len(frames), *frames[0].shape[1:]), np.int32)
    for time, frame in enumerate(frames):
        for obj_id, mask in reversed(list(zip(obj_ids, frame, strict=True))):
            labels[time, mask] = obj_id
    colors: dict[int | None, Any] = {None: (0, 0, 0, 0)}
    colors |= {int(i): (*(np.array(color(int(i))) / 255).tolist(), 1.0) for i in obj_ids}
    return labels, {"name": name, "colormap": colors}, "labels"


def _are_whole(obj_ids: Sequence[Any]) -> bool:
    return all(isinstance(obj_id, int | np.integer) for obj_id in obj_ids)


def _as_bool(masks: Any, obj_ids: Sequence[Any]) -> np.ndarray:
    """[N, H, W] bool."""
    masks = np.asarray(masks)
    if masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks.ndim != 3 or len(masks) != len(obj_ids):
        raise ValueError(
            f"Masks of a frame must be [{len(obj_ids)}, H, W] for {len(obj_ids)} object ids, got "
            f"{list(masks.shape)}."
        )
    return masks > 0


def _visible(masks: Any, obj_ids: Sequence[Any], scores: Any):
    """Masks and scores of the objects that are in sight, and which those are."""
    masks = _as_bool(masks, obj_ids)
    seen = np.flatnonzero(masks.any((1, 2)))
    if scores is not None:
        scores = np.asarray(scores, np.float32)
        if scores.shape != (len(masks),):
            raise ValueError(f"Scores must be [{len(masks)}], got {list(scores.shape)}.")
        scores = scores[seen]
    return masks[seen], scores, seen


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a mask [H, W]; the last two are one past its last pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
