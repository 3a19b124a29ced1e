"""Shapes and dtypes, looked at before anything is compiled; they are known even inside a jit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sam2jax.config import SAM2Config
from sam2jax.types import Array, Prompts


def check_model(model: Any, params: Any) -> None:
    """A model and its parameters, in this order."""
    if not isinstance(getattr(model, "config", None), SAM2Config):
        raise TypeError(f"Expected a model, as `load` returns it, got a {type(model).__name__}.")
    if not isinstance(params, Mapping) or "image_encoder" not in params:
        inside = f" of {list(params)[:3]}" if isinstance(params, Mapping) else ""
        raise TypeError(
            "Expected the model's parameters, as `load` returns them, got a "
            f"{type(params).__name__}{inside}."
        )


def check_frame(config: SAM2Config, frame: Array, *, leading: int = 0) -> None:
    """A frame is uint8 [H, W, 3], or float [S, S, 3]; `leading` axes come before."""
    size = config.image_size
    expected = f"uint8 [H, W, 3] RGB, or float [{size}, {size}, 3] already normalised"
    expected = "frames with a time axis, each " + expected if leading else expected
    shape, dtype = getattr(frame, "shape", None), getattr(frame, "dtype", None)
    if shape is None or dtype is None:
        raise TypeError(f"Expected {expected}, got a {type(frame).__name__}; pass an array.")
    if len(shape) != 3 + leading or shape[-1] != 3 or 0 in shape:
        raise ValueError(f"Expected {expected}, got shape {tuple(shape)}.")
    if jnp.issubdtype(dtype, jnp.floating):
        if shape[leading : leading + 2] != (size, size):
            raise ValueError(
                f"Expected {expected}, got {dtype} of shape {tuple(shape)}; pass uint8 to have "
                "it resized."
            )
    elif dtype != jnp.uint8:
        raise TypeError(f"Expected {expected}, got {dtype}.")


def check_frame_index(index: Any) -> None:
    """Frames are counted from 0; arrays, which may be traced, are not looked into."""
    if isinstance(index, int | np.integer) and index < 0:
        raise ValueError(f"Frames are counted from 0, got frame_index {index}.")


def check_prompts(
    config: SAM2Config, prompts: Prompts, num_objects: int, *, leading: int = 0
) -> None:
    """Fields agree with each other and with the number of objects."""
    if not isinstance(prompts, Prompts):
        raise TypeError(f"Expected Prompts (see Prompts.make), got {type(prompts).__name__}.")
    points, labels = prompts.points.shape[leading:], prompts.labels.shape[leading:]
    if len(points) != 3 or points[2] != 2 or labels != points[:2] or labels[1] == 0:
        raise ValueError(f"Expected points [N, P, 2] and labels [N, P], got {points} and {labels}.")
    if points[0] != num_objects:
        raise ValueError(
            f"The state tracks {num_objects} objects, but the prompts are for {points[0]}."
        )
    for name in ("num_points", "kind", "has_mask", "has_logits"):
        value = getattr(prompts, name)
        if value is not None and value.shape[leading:] != (num_objects,):
            raise ValueError(f"Expected {name} [{num_objects}], got {value.shape[leading:]}.")
    for name in ("mask", "logits"):
        value, flag = getattr(prompts, name), getattr(prompts, f"has_{name}")
        if (value is None) != (flag is None):
            raise ValueError(f"Prompts need both {name} and has_{name}, or neither.")
        if value is not None and (value.ndim != 3 + leading or value.shape[leading] != num_objects):
            raise ValueError(f"Expected {name} [{num_objects}, h, w], got {value.shape[leading:]}.")
    size = config.mask_size
    if prompts.logits is not None and prompts.logits.shape[-2:] != (size, size):
        raise ValueError(
            f"Expected logits [{num_objects}, {size}, {size}], got {prompts.logits.shape}."
        )
