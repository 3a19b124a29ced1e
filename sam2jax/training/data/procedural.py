"""Clips that are drawn, not downloaded: textured shapes that move, deform and hide one another.

A clip is a pure function of a `SceneConfig`, a seed and its size. Randomness comes from PCG64,
seeded by the numbers alone. Arithmetic is elementwise, in integers where colours are concerned,
with tables in the place of float32 transcendental functions: it does not depend on a machine's
BLAS or vector units.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sam2jax.training.data import motion, shapes, textures
from sam2jax.training.data.clip import Clip
from sam2jax.training.data.config import SceneConfig
from sam2jax.training.data.scene import Layer, Scene, hides, plan_scene

_ATTEMPTS = 100  # scenes drawn before a configuration is called impossible
_RIM = 0.2  # width of the shade along an outline, in radii
_TURN = 1024  # entries of the sine table
_SINE = np.sin(np.arange(_TURN) / _TURN * 2 * np.pi).astype(np.float32)
_PER_RADIAN = _TURN / (2 * np.pi)


class Stamp(NamedTuple):
    """Where a layer falls on a frame: a window of [h, w] pixels."""

    window: tuple[slice, slice]  # rows and columns of the frame
    distance: np.ndarray  # [h, w] float32, signed distance to the outline in pixels, inside > 0
    u: np.ndarray  # [h, w] float32, place in the object's own space, in radii
    v: np.ndarray  # [h, w] float32


def clip_kind(config: SceneConfig, seed: int) -> str:
    """What happens in the clip of a seed: one of `config.kinds`, in turn."""
    return config.kinds[seed % len(config.kinds)]


def procedural_clip(
    config: SceneConfig, seed: int, *, image_size: int = 256, num_frames: int = 32
) -> Clip:
    """Draws the clip of a seed; its objects are the scene's, the target (of its kind) first.

    Every object is in the first frame, where it covers `min_area` to `max_area` of the frame. A
    mask holds the pixels whose centre lies in the object and in none that is nearer: at such
    pixels the object's share of the colour is at least a half.

    Raises:
      ValueError: no scene as configured was found.
    """
    for attempt in range(_ATTEMPTS):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, attempt])))
        scene = plan_scene(config, clip_kind(config, seed), rng, num_frames)
        if not _starts_well(config, _masks(scene, 0, image_size)):
            continue
        masks = np.stack([_masks(scene, t, image_size) for t in range(num_frames)])
        if _goes_well(config, clip_kind(config, seed), masks):
            frames = _paint(scene, rng, image_size, num_frames)
            return Clip(frames, masks, np.ones(config.num_objects, bool))
    raise ValueError(
        f"no scene of {config.num_objects} objects of {config.min_area} to {config.max_area} of "
        "the frame was found; ask for fewer or smaller ones."
    )


# What must be seen --------------------------------------------------------------------------------


def _masks(scene: Scene, frame: int, size: int) -> np.ndarray:
    """Visible pixels [N, S, S] bool of the annotated objects in a frame."""
    nearest = np.full((size, size), -1, np.int8)
    for number, layer in enumerate(scene.layers):
        stamp = place(layer, frame, size)
        if stamp is not None:
            nearest[stamp.window][stamp.distance >= 0] = number
    return nearest == np.array(scene.objects, np.int8)[:, None, None]


def _starts_well(config: SceneConfig, masks: np.ndarray) -> bool:
    shares = masks.sum((1, 2)) / masks[0].size
    return bool(((shares >= config.min_area) & (shares <= config.max_area)).all())


def _goes_well(config: SceneConfig, kind: str, masks: np.ndarray) -> bool:
    """Whether who is out of sight, and for how long, is as the kind says: masks [T, N, S, S]."""
    hidden = config.hidden_in(len(masks))
    if not hidden:
        return True
    seen = np.any(masks, axis=(2, 3))
    absences = [longest_absence(seen[:, i]) for i in range(seen.shape[1])]
    if not hides(kind):
        return max(length for length, _ in absences) < hidden
    length, end = absences[0]
    shares = masks[end:, 0].sum((1, 2)) / masks[0, 0].size
    return length >= hidden and bool((shares >= config.min_area / 2).any())


def longest_absence(seen: np.ndarray) -> tuple[int, int]:
    """The longest run of frames where `seen` [T] is false: its length, and the frame after it."""
    best = run = end = 0
    for frame, there in enumerate(seen):
        run = 0 if there else run + 1
        if run > best:
            best, end = run, frame + 1
    return best, end


# Drawing ------------------------------------------------------------------------------------------


def place(layer: Layer, frame: int, size: int) -> Stamp | None:
    """Where a layer falls on a frame of `size` pixels; None: nowhere."""
    x, y = layer.path[frame] * size
    radius, reach = layer.scale[frame] * size, layer.reach[frame] * size + 1
    left, right = max(int(x - reach), 0), min(int(x + reach) + 1, size)
    top, bottom = max(int(y - reach), 0), min(int(y + reach) + 1, size)
    if left >= right or top >= bottom:
        return None
    cosine, sine = np.cos(layer.angle[frame]) / radius, np.sin(layer.angle[frame]) / radius
    dx = np.arange(left, right) + (0.5 - x)
    dy = (np.arange(top, bottom) + (0.5 - y))[:, None]
    u = (dx * cosine).astype(np.float32) + (dy * sine).astype(np.float32)
    v = (dy * cosine).astype(np.float32) - (dx * sine).astype(np.float32)
    if layer.bend:
        (wave_u, wave_v), (phase_u, phase_v) = layer.waves, layer.phases[frame]
        u, v = u + _bend(v, layer.bend, wave_v, phase_v), v + _bend(u, layer.bend, wave_u, phase_u)
    distance = _lookup(layer.field, u, v) * np.float32(radius)
    return Stamp((slice(top, bottom), slice(left, right)), distance, u, v)


def _bend(at: np.ndarray, amplitude: float, wave: float, phase: float) -> np.ndarray:
    turns = at * np.float32(wave * _PER_RADIAN) + np.float32(phase * _PER_RADIAN)
    return _SINE[turns.astype(np.int32) & (_TURN - 1)] * np.float32(amplitude)


def _lookup(field: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Bilinear values of a shape's field at places of its own space."""
    grid = shapes.GRID
    unit = np.float32((grid - 1) / (2 * shapes.EXTENT))
    middle, top = np.float32((grid - 1) / 2), np.float32(grid - 1.001)
    column = np.clip(u * unit + middle, 0, top)
    row = np.clip(v * unit + middle, 0, top)
    left, above = column.astype(np.int32), row.astype(np.int32)
    right, down = column - left, row - above
    flat, at = field.reshape(-1), above * grid + left
    one = np.float32(1)
    upper = flat[at] * (one - right) + flat[at + 1] * right
    lower = flat[at + grid] * (one - right) + flat[at + grid + 1] * right
    return upper * (one - down) + lower * down


def _stamp(canvas: np.ndarray, layer: Layer, frame: int, tile: np.ndarray, texels: float) -> None:
    """Draws a layer on a canvas [H, H] of packed colours; `texels` are those of its radius."""
    stamp = place(layer, frame, len(canvas))
    if stamp is None:
        return
    alpha = (np.clip(stamp.distance + np.float32(0.5), 0, 1) * np.float32(256)).astype(np.uint64)
    step = np.float32(texels * (1 << textures.FRACTION))
    start = layer.offset * len(tile) * (1 << textures.FRACTION)
    x = (stamp.u * step + np.float32(start[0])).astype(np.int32)
    y = (stamp.v * step + np.float32(start[1])).astype(np.int32)
    colors = textures.sample(tile, x, y)
    rim = np.clip(1 - stamp.distance / np.float32(_RIM * layer.scale[frame] * len(canvas)), 0, 1)
    light = (np.float32(256) - rim * np.float32(256 * layer.shade)).astype(np.uint64)
    colors = textures.blend(np.zeros_like(colors), colors, light)
    canvas[stamp.window] = textures.blend(canvas[stamp.window], colors, alpha)


def _paint(scene: Scene, rng: np.random.Generator, size: int, num_frames: int) -> np.ndarray:
    """The frames [T, S, S, 3] uint8 of a scene, before a ground that the camera moves over."""
    tile_size = textures.tile_size(size)
    count = 1 + max(layer.texture for layer in scene.layers)
    tiles = [textures.draw_texture(rng, tile_size) for _ in range(count)]
    texels = [layer.density * layer.scale[0] * size for layer in scene.layers]
    ground = _paint_ground(rng, tile_size)
    views = _camera(rng, num_frames)
    gain = np.exp(motion.drift(rng, num_frames, 0.08)).astype(np.float32)
    noise = _noise_tile(rng, size + 64)
    shifts = rng.integers(0, 64, (num_frames, 2)).tolist()
    soft = rng.random() < 0.33
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    for frame, (row, column) in enumerate(shifts):
        canvas = _look(ground, views[frame], size)
        for layer, texels_wide in zip(scene.layers, texels, strict=True):
            _stamp(canvas, layer, frame, tiles[layer.texture], texels_wide)
        colors = textures.unpack(textures.soften(canvas) if soft else canvas)
        grain = noise[row : row + size, column : column + size]
        frames[frame] = np.clip(colors * gain[frame] + grain, 0, 255)
    return frames


def _paint_ground(rng: np.random.Generator, tile_size: int) -> np.ndarray:
    """A canvas twice as wide as a tile, of one texture with still patches of others."""
    tiles = [textures.draw_texture(rng, tile_size) for _ in range(int(rng.integers(2, 5)))]
    canvas = np.tile(tiles[0], (2, 2))
    for tile in tiles[1:]:
        for _ in range(2):
            still = Layer(
                field=shapes.draw_shape(rng),
                path=rng.uniform(0.2, 0.8, (1, 2)),
                angle=rng.uniform(0, 2 * np.pi, 1),
                scale=rng.uniform(0.06, 0.25, 1),
                bend=0.0,
                waves=np.ones(2),
                phases=np.zeros((1, 2)),
                texture=0,
                density=1.0,
                offset=rng.random(2),
                shade=rng.uniform(0.0, 0.4),
            )
            texels = float(still.scale[0]) * len(canvas) * rng.uniform(0.7, 1.4)
            _stamp(canvas, still, 0, tile, texels)
    return canvas


def _camera(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """[T, 4]: centre (x, y) of the view in widths of the frame, its width, and its angle."""
    amount = rng.random()
    curves = [motion.drift(rng, num_frames, amount * room) for room in (0.2, 0.2, 0.1, 0.06)]
    curves[2] = np.exp(curves[2])
    return np.stack(curves, -1)


def _look(ground: np.ndarray, view: np.ndarray, size: int) -> np.ndarray:
    """What a view shows of the ground: packed colours [S, S]."""
    x, y, width, angle = view
    center, unit = len(ground) / 2, 1 << textures.FRACTION
    pixels = np.arange(size) + 0.5 - size / 2
    along, across = pixels * (np.cos(angle) * width * unit), pixels * (np.sin(angle) * width * unit)
    column = ((center + x * size) * unit + along).astype(np.int32)
    row = ((center + y * size) * unit + along).astype(np.int32)
    return textures.sample(
        ground,
        column - across.astype(np.int32)[:, None],
        row[:, None] + across.astype(np.int32),
    )


def _noise_tile(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise of up to a few levels, bell-shaped: [size, size, 3] float32."""
    strength = rng.uniform(0.0, 5.0)
    total = np.zeros((size, size, 3), np.float32)
    for _ in range(3):
        total += rng.integers(0, 256, total.shape, np.uint8)
    return (total - np.float32(3 * 127.5)) * np.float32(strength / 128)
