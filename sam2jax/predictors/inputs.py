"""What users hand to predictors, checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from sam2jax.types import point_rows


def check_image(image: Any) -> np.ndarray:
    """An image or a frame, uint8 RGB [H, W, 3] or a picture of Pillow's, as an array of its own:
    cameras fill the same buffer again and again."""
    mode = getattr(image, "mode", "RGB")
    mode = mode if isinstance(mode, str) else "RGB"  # of a PyTorch tensor it is a method
    array = np.array(image)
    if mode != "RGB" or array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"Expected an image, uint8 RGB [H, W, 3], got {array.dtype} {list(array.shape)}"
            + (f" of mode {mode}; convert it to RGB." if mode != "RGB" else "; convert it.")
        )
    if not array.size:
        raise ValueError(f"The image is empty: its shape is {list(array.shape)}.")
    return array


def check_mask(mask: Any) -> np.ndarray:
    """A mask of any size and type, nonzero where the object is, or, as officially, of a PyTorch
    tensor at least 0.5: [h, w] bool."""
    is_tensor = hasattr(mask, "is_floating_point")
    mask = np.asarray(mask)
    if mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"Expected a mask [h, w], got shape {mask.shape}.")
    if not (np.issubdtype(mask.dtype, np.number) or mask.dtype == bool):
        raise TypeError(f"Expected a mask of numbers or booleans, got {mask.dtype}.")
    if not np.isfinite(mask).all():
        raise ValueError("The mask must be finite.")
    # Pillow's bilevel pictures are bools of 255, which XLA would add up as such.
    return mask >= 0.5 if is_tensor else mask != 0


def check_points(owner: str, points: Any, labels: Any, box: Any, clear_old_points: bool):
    """Points and labels with a box's corners in front: [P, 2] float32, [P] int32."""
    if (points is None) != (labels is None):
        raise ValueError("points and labels must be given together.")
    if points is None and box is None:
        raise ValueError("Give points, a box, or both.")
    if box is not None and not clear_old_points:
        raise ValueError(
            "A box must come before any point: it cannot be added with clear_old_points=False."
        )
    rows = np.zeros((0, 2), np.float32)
    kinds = np.zeros(0, np.int32)
    if points is not None:
        rows = np.asarray(points, np.float32)
        kinds = np.asarray(labels)
        rows = rows[0] if rows.ndim == 3 and len(rows) == 1 else rows
        kinds = kinds[0] if kinds.ndim == 2 and len(kinds) == 1 else kinds
    rows, kinds = point_rows(owner, rows, kinds, box, None)
    if not len(kinds):
        raise ValueError("Give points, a box, or both: the list of points is empty.")
    return rows, kinds
