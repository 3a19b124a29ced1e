"""Region similarity J and boundary measure F of masks, as DAVIS defines them.

Perazzi et al. 2016, section 5; the numbers are those of the official SA-V evaluator
(`sav_benchmark.py`) and of vos-benchmark, which agree with the DAVIS toolkit.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.spatial import KDTree

TOLERANCE = 0.008  # how far boundaries may be apart, as a share of the picture's diagonal


def region_similarity(truth: np.ndarray, prediction: np.ndarray) -> float:
    """J, the IoU of two masks: [H, W] bool each; 1 where both are empty."""
    union = np.count_nonzero(truth | prediction)
    return np.count_nonzero(truth & prediction) / union if union else 1.0


def boundary_measure(
    truth: np.ndarray, prediction: np.ndarray, tolerance: float = TOLERANCE
) -> float:
    """F, the harmonic mean of precision and recall of boundary pixels.

    Args:
      truth: [H, W] bool.
      prediction: [H, W] bool.
      tolerance: distance up to which boundary pixels match, as a share of the diagonal; it is
        rounded up to whole pixels.

    Returns:
      In [0, 1]; 1 where neither mask has a boundary (both are empty, or fill the picture), 0
      where one of them has none.
    """
    radius = np.ceil(tolerance * np.linalg.norm(truth.shape))
    ours, theirs = (np.argwhere(boundary(mask)) for mask in (prediction, truth))
    if not len(ours) or not len(theirs):
        return float(len(ours) == len(theirs))
    precision, recall = _share_near(ours, theirs, radius), _share_near(theirs, ours, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from a neighbour to the right, below, or both: [H, W] bool -> bool.

    So boundaries lie half a pixel up and left of where they are (official `_seg2bmap`). What the
    picture's edge cuts off is no boundary.
    """
    beyond = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = beyond[:-1, 1:], beyond[1:, :-1], beyond[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ diagonal)


def score_frames(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
) -> dict[int, tuple[float, float]]:
    """J and F of every object of a video, averaged over frames (official `Evaluator`).

    An object counts from the frame on which truth or prediction first show it, and only if the
    truth ever does.

    Args:
      pairs: truth and prediction of each frame: [H, W] integers or bool, 0 is background.

    Returns:
      By object, J and F in [0, 1].
    """
    seen: set[int] = set()
    true: set[int] = set()
    frames: dict[int, list[tuple[float, float]]] = {}
    for truth, prediction in pairs:
        shown = objects_in(truth)
        true |= shown
        seen |= shown | objects_in(prediction)
        for obj in seen:
            masks = truth == obj, prediction == obj
            frames.setdefault(obj, []).append((region_similarity(*masks), boundary_measure(*masks)))
    means = {obj: np.mean(frames[obj], axis=0) for obj in sorted(true)}
    return {obj: (float(j), float(f)) for obj, (j, f) in means.items()}


def score_clip(truth: np.ndarray, found: np.ndarray) -> list[float]:
    """J&F of each object of a clip, first and last frame left out, as DAVIS does.

    Args:
      truth: [T, N, H, W] bool.
      found: [T, N, H, W] bool.

    Returns:
      N numbers in [0, 1]; nan for an object that is never seen.
    """
    pairs = zip(truth[1:-1].swapaxes(0, 1), found[1:-1].swapaxes(0, 1), strict=True)
    return [float(np.mean(score_frames(zip(*pair, strict=True)).get(1, np.nan))) for pair in pairs]


def objects_in(labels: np.ndarray) -> set[int]:
    """Numbers above 0 in a picture of uint8 or bool."""
    return set(np.flatnonzero(np.bincount(labels.ravel())).tolist()) - {0}


def _share_near(points: np.ndarray, others: np.ndarray, radius: float) -> float:
    """The share of points [P, 2] with one of `others` [Q, 2] within `radius`: what dilating the
    others by a disk would cover, without a picture to dilate."""
    bound = radius + 1  # the tree's own bound is exclusive
    distances, _ = KDTree(others).query(points, distance_upper_bound=bound)
    return float(np.mean(distances <= radius))
