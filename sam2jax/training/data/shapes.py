"""Shapes of procedural objects, as signed distances on a grid: positive inside.

A field is float32 [GRID, GRID] over [-EXTENT, EXTENT] squared, x along the columns. The shapes
themselves lie within the unit circle; the rest leaves room for deformation. Transcendental
functions are taken in float64 and rounded, all else is elementwise: the same seed gives the same
field on every machine.
"""

from __future__ import annotations

import numpy as np

GRID = 160
EXTENT = 1.3  # half the width of the grid, where the unit circle holds the shape
_VARIATION = 0.06  # by about how much the outlines of like shapes differ
_SMOOTH = 0.12  # difference of two fields below which their union is rounded
_AXIS = (np.arange(GRID) / (GRID - 1) * 2 - 1) * EXTENT
_X, _Y = np.meshgrid(_AXIS, _AXIS)
_RADIUS = np.sqrt(_X * _X + _Y * _Y)
_ANGLE = np.arctan2(_Y, _X)


def draw_shape(rng: np.random.Generator) -> np.ndarray:
    """A random shape with concavities or holes: [GRID, GRID] float32, centred, of radius 1."""
    draw = _SHAPES[rng.integers(len(_SHAPES))]
    field = draw(rng)
    if rng.random() < 0.25 and draw is not _ring:
        field = np.minimum(field, -_hole(rng))
    return normalize(field)


def vary(field: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A like shape: the outline moves in and out a little, smoothly."""
    waves = np.zeros_like(_X)
    for _ in range(4):
        kx, ky, phase = rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(0, 2 * np.pi)
        waves += np.sin(kx * _X + ky * _Y + phase)
    return normalize(field + _VARIATION / 2 * waves)


def solid(rng: np.random.Generator, aspect: float) -> np.ndarray:
    """A shape without holes or bays, to hide things: a lump for an aspect near 1, or a bar."""
    if aspect < 1.3:
        radius, _ = _fourier(rng, harmonics=4, roughness=0.12)
        return normalize(radius - _RADIUS)
    corner = rng.uniform(0.0, 0.6) / aspect
    return normalize(_box(0.0, 0.0, 1.0 - corner, 1 / aspect - corner) + corner)


def core(field: np.ndarray) -> float:
    """Radius of the largest circle about the centre that a shape covers."""
    outside = _RADIUS[field < 0]
    return float(outside.min()) if outside.size else EXTENT


def area(field: np.ndarray) -> float:
    """Area of a shape, in units of its radius squared."""
    return float(np.count_nonzero(field >= 0)) * (2 * EXTENT / (GRID - 1)) ** 2


def normalize(field: np.ndarray) -> np.ndarray:
    """Centres a field's inside and scales it to radius 1, by resampling; float32."""
    rows, columns = np.nonzero(field >= 0)
    x, y = _AXIS[columns], _AXIS[rows]
    center_x, center_y = (x.min() + x.max()) / 2, (y.min() + y.max()) / 2
    radius = np.sqrt(((x - center_x) ** 2 + (y - center_y) ** 2).max()) + EXTENT / GRID
    resampled = _resample(field, _AXIS * radius + center_x, _AXIS * radius + center_y) / radius
    return np.minimum(resampled, 1.0 + EXTENT / GRID - _RADIUS).astype(np.float32)


def _resample(field: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear values of a field at the crossings of columns `x` and rows `y`."""

    def place(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cells = np.clip((at / EXTENT + 1) / 2 * (GRID - 1), 0, GRID - 1.001)
        low = cells.astype(np.int64)
        return low, cells - low

    (column, right), (row, down) = place(x), place(y)
    down = down[:, None]
    rows = field[row] * (1 - down) + field[row + 1] * down
    return rows[:, column] * (1 - right) + rows[:, column + 1] * right


# Signed fields of single shapes ------------------------------------------------------------------


def _fourier(
    rng: np.random.Generator, harmonics: int, roughness: float
) -> tuple[np.ndarray, np.ndarray]:
    """A smooth closed curve about the origin: its radius at every grid point's angle, and slope."""
    radius, slope = np.ones_like(_ANGLE), np.zeros_like(_ANGLE)
    for k in range(1, harmonics + 1):
        amplitude = roughness * rng.uniform(0.3, 1.0) / k**0.5
        phase = rng.uniform(0, 2 * np.pi)
        radius += amplitude * np.sin(k * _ANGLE + phase)
        slope += k * amplitude * np.cos(k * _ANGLE + phase)
    radius = np.maximum(radius, 0.25)
    scale = 0.7 / radius.max()
    return radius * scale, slope * scale


def _star(rng: np.random.Generator) -> np.ndarray:
    radius, slope = _fourier(rng, harmonics=7, roughness=0.3)
    # First-order distance to the curve: along the radius, shortened by the curve's slant.
    return (radius - _RADIUS) / np.sqrt(1 + (slope / radius) ** 2)


def _flower(rng: np.random.Generator) -> np.ndarray:
    petals, depth = int(rng.integers(3, 8)), rng.uniform(0.2, 0.45)
    wave = petals * _ANGLE
    radius, slope = 0.7 * (1 + depth * np.sin(wave)), 0.7 * depth * petals * np.cos(wave)
    return (radius - _RADIUS) / np.sqrt(1 + (slope / radius) ** 2)


def _polygon(rng: np.random.Generator) -> np.ndarray:
    """A polygon with sharp corners, often concave: angles in order, radii at random."""
    count = int(rng.integers(5, 11))
    angle = (np.arange(count) + rng.uniform(-0.35, 0.35, count)) / count * 2 * np.pi
    radius = rng.uniform(0.3, 1.0, count)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    nearest, inside = np.full_like(_X, np.inf), np.zeros(_X.shape, bool)
    for i in range(count):
        j = (i + 1) % count
        ex, ey = x[j] - x[i], y[j] - y[i]
        px, py = _X - x[i], _Y - y[i]
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        dx, dy = px - along * ex, py - along * ey
        nearest = np.minimum(nearest, dx * dx + dy * dy)
        crosses = (py < 0) != (_Y - y[j] < 0)
        if ey:
            inside ^= crosses & (px < py * (ex / ey))
    return np.where(inside, 1.0, -1.0) * np.sqrt(nearest)


def _crescent(rng: np.random.Generator) -> np.ndarray:
    bite, shift = rng.uniform(0.5, 0.75), rng.uniform(0.3, 0.55)
    return np.minimum(0.8 - _RADIUS, np.sqrt((_X - shift) ** 2 + _Y * _Y) - bite)


def _ring(rng: np.random.Generator) -> np.ndarray:
    radius, slope = _fourier(rng, harmonics=3, roughness=0.15)
    inner = rng.uniform(0.35, 0.62)
    return np.minimum(radius - _RADIUS, _RADIUS - inner * radius) / np.sqrt(
        1 + (slope / radius) ** 2
    )


def _blocks(rng: np.random.Generator) -> np.ndarray:
    """Bars on a grid that hang together, as in letters: L, T, H, E, O, + and the like."""
    field = np.full_like(_X, -np.inf)
    width = rng.uniform(0.14, 0.22)
    spots = (-0.6, 0.0, 0.6)
    upright = spots[rng.integers(3)]
    field = np.maximum(field, _box(upright, 0.0, width, 0.6 + width))
    level = rng.random(3) < 0.6
    level[rng.integers(3)] = True
    for spot, wanted in zip(spots, level, strict=True):
        if wanted:
            left, right = sorted((upright, spots[rng.integers(3)]))
            if left == right:
                left, right = -0.6, 0.6
            half = (right - left) / 2
            field = np.maximum(field, _box(left + half, spot, half + width, width))
    if rng.random() < 0.4:
        field = np.maximum(field, _box(-upright, 0.0, width, 0.6 + width))
        field = np.maximum(field, _box(0.0, spots[rng.integers(3)], 0.6, width))
    return field


def _lumps(rng: np.random.Generator) -> np.ndarray:
    """A smooth union of circles in a chain."""
    x = y = 0.0
    field = np.full_like(_X, -np.inf)
    for _ in range(int(rng.integers(3, 6))):
        radius = rng.uniform(0.16, 0.34)
        circle = radius - np.sqrt((_X - x) ** 2 + (_Y - y) ** 2)
        field = _smooth_max(field, circle)
        turn = rng.uniform(0, 2 * np.pi)
        x = min(max(x + 0.42 * np.cos(turn), -0.6), 0.6)
        y = min(max(y + 0.42 * np.sin(turn), -0.6), 0.6)
    return field


def _smooth_max(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    blend = np.maximum(_SMOOTH - np.abs(a - b), 0) / _SMOOTH
    return np.maximum(a, b) + blend * blend * (_SMOOTH / 4)


def _hole(rng: np.random.Generator) -> np.ndarray:
    x, y, radius = rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25), rng.uniform(0.12, 0.25)
    return radius - np.sqrt((_X - x) ** 2 + (_Y - y) ** 2)


def _box(x: float, y: float, half_width: float, half_height: float) -> np.ndarray:
    dx, dy = np.abs(_X - x) - half_width, np.abs(_Y - y) - half_height
    outside = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2)
    return -(outside + np.minimum(np.maximum(dx, dy), 0))


_SHAPES = (_star, _star, _flower, _polygon, _polygon, _crescent, _ring, _blocks, _blocks, _lumps)
