"""Whether a written checkpoint gives back what was read."""

from __future__ import annotations

import numpy as np

from sam2jax.convert.checkpoint import Checkpoint, read
from sam2jax.convert.layouts import from_params
from sam2jax.io.files import PathLike


def largest_difference(source: Checkpoint, written: PathLike) -> float:
    """Reads `written`, brings it back to the source's layout, and compares every number.

    Returns:
        The largest absolute difference; 0 unless the source is wider than float32, or was
        written in a narrower type.

    Raises:
        ValueError: the two do not have the same tensors.
    """
    again = from_params(read(written).params(), source.layout)
    if {k: v.shape for k, v in again.items()} != {k: v.shape for k, v in source.tensors.items()}:
        raise ValueError(f"{written} does not hold the same tensors as {source.name}.")
    return max(_difference(source.tensors[name], value) for name, value in again.items())


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    if np.array_equal(a, b, equal_nan=True):  # infinities too
        return 0.0
    return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))
