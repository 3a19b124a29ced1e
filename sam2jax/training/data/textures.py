"""Textures of procedural clips: periodic tiles of colour, one distribution for objects and ground.

A tile is uint64 [P, P], P a power of two: a pixel's red, green and blue lie in 16-bit lanes, so
that one multiplication weighs all three. Colours take 8 bits of a lane and weights sum to 256:
no lane overflows, and sampling is exact integer arithmetic, the same on every machine.
"""

from __future__ import annotations

import numpy as np

LANES = np.uint64(0x00FF_00FF_00FF)  # 8 bits in each lane
HALF = np.uint64(0x0080_0080_0080)  # 0.5 in each lane, in units of 1/256
FRACTION = 8  # bits of a coordinate behind the point
_LEVELS = 512  # of a colour ramp


def pack(colors: np.ndarray) -> np.ndarray:
    """Colours [..., 3] in 0..255 as lanes: [...] uint64."""
    values = colors.astype(np.uint64)
    return values[..., 0] | values[..., 1] << np.uint64(16) | values[..., 2] << np.uint64(32)


def unpack(lanes: np.ndarray) -> np.ndarray:
    """Lanes [...] as colours [..., 3] uint16, whatever they hold (little-endian)."""
    return np.ascontiguousarray(lanes, "<u8").view("<u2").reshape(*lanes.shape, 4)[..., :3]


def draw_texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random tile: a pattern, coloured by a random ramp, with finer grain and uneven light."""
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))](rng, size)
    grain = _clouds(rng, size, cells=int(rng.integers(16, 40)), octaves=2)
    values = pattern + rng.uniform(0.02, 0.3) * (grain - np.float32(0.5))
    index = (np.clip(values, 0, 1) * np.float32(_LEVELS - 1)).astype(np.int32)
    colors = _ramp(rng)[index]
    light = np.float32(rng.uniform(0.0, 0.45)) * (_noise(rng, size, 3) - np.float32(0.5))
    colors = colors * (np.float32(1) + light)[..., None]
    return pack(np.clip(colors, 0, 255))


def sample(tile: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear colours at int32 coordinates in 1/256 of a texel, periodic: lanes as of `tile`."""
    size = len(tile)
    mask, shift = size - 1, size.bit_length() - 1
    left, top = x >> FRACTION, y >> FRACTION
    right, bottom = (left + 1) & mask, ((top + 1) & mask) << shift
    left, top = left & mask, (top & mask) << shift
    fx, fy = x & 255, y & 255
    both = (fx * fy) >> FRACTION
    flat = tile.reshape(-1)
    lanes = flat[top | left] * (256 - fx - fy + both).astype(np.uint64)
    lanes += flat[top | right] * (fx - both).astype(np.uint64)
    lanes += flat[bottom | left] * (fy - both).astype(np.uint64)
    lanes += flat[bottom | right] * both.astype(np.uint64)
    return ((lanes + HALF) >> np.uint64(8)) & LANES


def blend(under: np.ndarray, over: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Lanes of `over` on `under`; alpha is uint64 in 0..256."""
    return ((over * alpha + under * (np.uint64(256) - alpha) + HALF) >> np.uint64(8)) & LANES


def soften(lanes: np.ndarray) -> np.ndarray:
    """A slight blur of [H, W]: the binomial 1 2 1, both ways."""
    wide = np.pad(lanes, 1, mode="edge")
    rows = wide[:-2] + wide[1:-1] * np.uint64(2) + wide[2:]
    both = rows[:, :-2] + rows[:, 1:-1] * np.uint64(2) + rows[:, 2:]
    return ((both + (HALF >> np.uint64(4))) >> np.uint64(4)) & LANES


def tile_size(pixels: int) -> int:
    """The power of two that is at least `pixels`."""
    return 1 << max(pixels - 1, 1).bit_length()


# Patterns: periodic float32 [P, P] in about [0, 1] ------------------------------------------------


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth value noise: a random grid, interpolated by cubic B-splines."""
    grid = rng.random((cells, cells), np.float32)
    at = np.arange(size) * (cells / size)
    low = at.astype(np.int64)
    t = (at - low).astype(np.float32)
    one = np.float32(1)
    weights = (
        (one - t) * (one - t) * (one - t) / 6,
        (3 * t * t * t - 6 * t * t + 4) / 6,
        (-3 * t * t * t + 3 * t * t + 3 * t + 1) / 6,
        t * t * t / 6,
    )
    places = [(low + k) % cells for k in range(-1, 3)]
    rows = sum(grid[p] * w[:, None] for p, w in zip(places, weights, strict=True))
    # The transpose keeps memory access along rows.
    columns = np.ascontiguousarray(np.asarray(rows).T)
    return np.asarray(sum(columns[p] * w[:, None] for p, w in zip(places, weights, strict=True)))


def _spread(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / (high - low)


def _clouds(rng: np.random.Generator, size: int, cells: int, octaves: int) -> np.ndarray:
    total = _noise(rng, size, cells)
    for octave in range(1, octaves):
        total = total + _noise(rng, size, cells << octave) * np.float32(0.5**octave)
    return _spread(total)


def _phase(rng: np.random.Generator, size: int, waves: int) -> np.ndarray:
    """A slanted ramp with about `waves` whole periods across the tile, bent by noise."""
    turn = rng.uniform(0, 2 * np.pi)
    kx, ky = round(waves * np.cos(turn)), round(waves * np.sin(turn))
    if not kx and not ky:
        kx = waves
    step = np.arange(size, dtype=np.float32) / np.float32(size)
    bend = np.float32(rng.uniform(0.0, 1.2)) * _noise(rng, size, int(rng.integers(3, 7)))
    return step * np.float32(kx) + step[:, None] * np.float32(ky) + bend


def _wave(phase: np.ndarray, sharpness: float) -> np.ndarray:
    """A triangle wave of period 1, cut off so that it is more or less square."""
    saw = phase - np.floor(phase)
    triangle = np.abs(saw - np.float32(0.5)) * np.float32(2)
    return np.clip((triangle - np.float32(0.5)) * np.float32(sharpness) + np.float32(0.5), 0, 1)


def _cloudy(rng: np.random.Generator, size: int) -> np.ndarray:
    return _clouds(rng, size, cells=int(rng.integers(4, 14)), octaves=int(rng.integers(2, 5)))


def _striped(rng: np.random.Generator, size: int) -> np.ndarray:
    return _wave(_phase(rng, size, int(rng.integers(5, 20))), rng.uniform(1.0, 6.0))


def _checked(rng: np.random.Generator, size: int) -> np.ndarray:
    waves, sharpness = int(rng.integers(4, 14)), rng.uniform(2.0, 8.0)
    one = _wave(_phase(rng, size, waves), sharpness)
    other = _wave(_phase(rng, size, waves), sharpness)
    return one + other - 2 * one * other if rng.random() < 0.5 else (one + other) / 2


def _spotted(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _spread(_noise(rng, size, int(rng.integers(10, 32))))
    level, sharpness = rng.uniform(0.4, 0.65), rng.uniform(4.0, 14.0)
    return np.clip((field - np.float32(level)) * np.float32(sharpness) + np.float32(0.5), 0, 1)


def _veined(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _clouds(rng, size, cells=int(rng.integers(4, 10)), octaves=3)
    return np.minimum(np.abs(field - np.float32(0.5)) * np.float32(rng.uniform(3, 8)), 1)


_PATTERNS = (_cloudy, _cloudy, _striped, _checked, _spotted, _veined)


def _ramp(rng: np.random.Generator) -> np.ndarray:
    """Colours from 0 to 1: [_LEVELS, 3] float32, through a few random ones about a common hue."""
    count = int(rng.integers(2, 6))
    hue, loose = rng.random(3), rng.uniform(0.35, 1.0)
    stops = (hue * (1 - loose) + rng.random((count, 3)) * loose) * 255
    light = rng.uniform(-60, 60, (count, 1))
    at = np.linspace(0, 1, _LEVELS)
    places = np.linspace(0, 1, count)
    stops = np.clip(stops + light, 5, 250)
    return np.stack([np.interp(at, places, stops[:, c]) for c in range(3)], -1).astype(np.float32)
