"""How procedural objects and cameras move: smooth paths over T frames, in float64."""

from __future__ import annotations

import numpy as np

FRAMES_PER_KNOT = 8  # frames from one random place of a path to the next


def knots(num_frames: int) -> int:
    """Knots that a path of `num_frames` needs, one of them before its first frame."""
    return (num_frames - 1) // FRAMES_PER_KNOT + 4


def spline(values: np.ndarray, num_frames: int) -> np.ndarray:
    """A Catmull-Rom curve through `values` [K, ...], knot 1 at frame 0: [T, ...]."""
    times = np.arange(num_frames) / FRAMES_PER_KNOT
    low = times.astype(np.int64)
    t = (times - low).reshape(-1, *[1] * (values.ndim - 1))
    before, here, after, beyond = (values[low + k] for k in range(4))
    return here + t / 2 * (
        (after - before)
        + t * (2 * before - 5 * here + 4 * after - beyond)
        + t * t * (3 * (here - after) + beyond - before)
    )


def drift(rng: np.random.Generator, num_frames: int, amount: float) -> np.ndarray:
    """A curve [T] that strays up to about `amount` from 0."""
    return spline(rng.uniform(-amount, amount, knots(num_frames)), num_frames)


def turning(rng: np.random.Generator, num_frames: int, step: float) -> np.ndarray:
    """Angles [T] in radians from a random one on, that turn up to `step` from knot to knot."""
    steps = rng.uniform(-step, step, knots(num_frames))
    return spline(rng.uniform(0, 2 * np.pi) + np.cumsum(steps), num_frames)


def wander(
    rng: np.random.Generator,
    num_frames: int,
    start: np.ndarray,
    low: float = 0.05,
    high: float = 0.95,
    toward: np.ndarray | None = None,
) -> np.ndarray:
    """A path [T, 2] from `start` between random places of a square, now faster, now slower.

    Args:
      toward: [T, 2], a path that draws this one halfway to itself.
    """
    places = [start + rng.uniform(-0.1, 0.1, 2), start]
    for k in range(2, knots(num_frames)):
        goal = rng.uniform(low, high, 2)
        if toward is not None:
            frame = min((k - 1) * FRAMES_PER_KNOT, num_frames - 1)
            goal = (goal + toward[frame]) / 2
        places.append(places[-1] + rng.uniform(0.05, 0.8) * (goal - places[-1]))
    return spline(np.stack(places), num_frames)


def passage(rng: np.random.Generator, num_frames: int, stay: int) -> tuple[np.ndarray, np.ndarray]:
    """Goes away and comes back: how far it is gone, 0 to 1 [T], and where it has turned [T] bool.

    It is gone (exactly 1) for `stay` frames or a few more, and leaves and returns smoothly.
    """
    last = num_frames - 1
    gone = min(stay + rng.uniform(0.5, 3.5), max(last - 1.5, stay))
    ramp = min(rng.uniform(4.0, 7.0), max((last - gone) / 2 - 0.25, 0.5))
    leaves = rng.uniform(0, max(last - gone - 2 * ramp, 0))
    times = np.arange(num_frames, dtype=np.float64)
    out = np.clip((times - leaves) / ramp, 0, 1)
    back = np.clip((times - leaves - ramp - gone) / ramp, 0, 1)
    smooth = out * out * (3 - 2 * out) - back * back * (3 - 2 * back)
    return smooth, times > leaves + ramp + gone / 2
