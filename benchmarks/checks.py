"""Answers are compared before a time is believed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.timing import Row

FEATURES, LOGITS = 1e-4, 5e-3  # largest difference in float32, as shares of the largest value
AUTOCAST = 1.5  # times the official autocast's own distance from float32


def believe(
    what: str, ours: Any, official: Any, exact: Any = None, *, channels_last: bool = False
) -> None:
    """Raises where our answer is not the official one.

    Args:
      what: that was computed.
      ours: our answer, [..., H, W, C] if `channels_last`.
      official: a tensor, [..., C, H, W] if `channels_last`.
      exact: the official answer in float32, where the two others are in bfloat16.
      channels_last: it is features, and not logits.
    """
    mine = np.asarray(ours, np.float32)
    theirs, truth = (_array(x, channels_last) for x in (official, exact))
    if mine.shape != theirs.shape:
        raise AssertionError(f"{what}: shapes {mine.shape} and {theirs.shape}")
    if truth is None:
        bar = (FEATURES if channels_last else LOGITS) * np.abs(theirs).max()
        found = np.abs(mine - theirs).max()
    else:
        bar, found = AUTOCAST * _distance(theirs, truth), _distance(mine, truth)
    if not found <= bar:
        raise AssertionError(f"{what} differs by {found:.2e}, more than {bar:.2e}")


def believed(row: Row, check: Callable[[], None]) -> Row:
    """The row, or only why it is not believed, where `check` raises: others follow."""
    try:
        check()
    except AssertionError as error:
        return Row(row.name, None, None, refused=str(error))
    return row


def _array(tensor: Any, channels_last: bool) -> Any:
    if tensor is None:
        return None
    array = tensor.detach().float().cpu().numpy() if hasattr(tensor, "detach") else tensor
    return np.moveaxis(array, -3, -1) if channels_last else array


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference."""
    return float(np.sqrt(np.mean((one - other) ** 2)))
