"""What happens in a procedural clip: layers of shapes, their paths, and who hides whom.

Lengths are in widths of the frame until a layer is drawn. An object's own space has its shape in
the unit circle; it is turned, scaled and bent from there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sam2jax.training.data import motion, shapes
from sam2jax.training.data.config import HARD, SceneConfig

_REACH = 1.5  # a bend of amplitude a moves points by up to sqrt(2) a
_FREE_TRIES = 24  # random places of which the one with most room is taken
_EDGE = 0.15  # how far these lie from the frame's edges, at least


class Layer(NamedTuple):
    """A shape that moves, with the texture that sticks to it."""

    field: np.ndarray  # [GRID, GRID] float32, signed distance in units of its radius
    path: np.ndarray  # [T, 2] centre (x, y), in widths of the frame
    angle: np.ndarray  # [T] radians
    scale: np.ndarray  # [T] radius, in widths of the frame
    bend: float  # amplitude of the deformation, in radii
    waves: np.ndarray  # [2] its spatial frequencies, radians per radius
    phases: np.ndarray  # [T, 2] its phases, radians
    texture: int  # which texture; layers that share one look alike
    density: float  # texels per pixel at the first frame
    offset: np.ndarray  # [2] where in the texture the centre lies, as shares of the tile
    shade: float  # how much darker the outline is than the middle

    @property
    def reach(self) -> np.ndarray:
        """Radius [T] of a circle about the centre that holds the whole shape."""
        return self.scale * (1 + _REACH * self.bend)


class Scene(NamedTuple):
    """Layers from the farthest to the nearest."""

    layers: tuple[Layer, ...]
    objects: tuple[int, ...]  # layer of each annotated object; the first is the target


def plan_scene(config: SceneConfig, kind: str, rng: np.random.Generator, num_frames: int) -> Scene:
    """Draws a scene of a kind; whether all can be seen as it should is for the caller to check.

    In an `occluded` scene the target goes out of sight for `hidden_frames` and returns: behind
    something larger, or over the frame's edge. In a `distractor` scene a layer that is not
    annotated shares the target's texture and nearly its shape, and is drawn toward it. In a
    `hard` scene there are both.
    """
    hidden = config.hidden_in(num_frames) if hides(kind) else 0
    roles = [_draw_object(config, rng, num_frames, small=hides(kind), texture=0)]
    if hidden:
        leave = rng.random() < 0.5
        roles = (_exit if leave else _cover)(roles[0], rng, hidden)
    else:
        roles = [_move(roles[0], rng, [])]
    covered = len(roles) > 1
    if kind in ("distractor", HARD):
        roles.append(_twin(roles[0], rng))
    extras = len(roles) - 1
    for i in range(1, config.num_objects):
        found = _draw_object(config, rng, num_frames, small=False, texture=extras + i)
        roles.append(_move(found, rng, roles))
    order = np.argsort(rng.random(len(roles))).tolist()
    if covered:  # what covers the target is nearer
        target, cover = order.index(0), order.index(1)
        if cover < target:
            order[cover], order[target] = 0, 1
    annotated = [0, *range(extras + 1, len(roles))]
    return Scene(tuple(roles[i] for i in order), tuple(order.index(i) for i in annotated))


def hides(kind: str) -> bool:
    """Whether the target of such a scene goes out of sight."""
    return kind in ("occluded", HARD)


def _draw_object(
    config: SceneConfig, rng: np.random.Generator, num_frames: int, small: bool, texture: int
) -> Layer:
    """A shape with its size, turning and bending, in the middle of the frame."""
    field = shapes.draw_shape(rng)
    area = shapes.area(field)
    low, high = np.sqrt(1.15 * config.min_area / area), np.sqrt(0.9 * config.max_area / area)
    top = max(min(high, 0.16), low) if small else max(min(high, 0.42), low)
    scale = low * (top / low) ** rng.random() * np.exp(motion.drift(rng, num_frames, 0.3))
    return Layer(
        field=field,
        path=np.full((num_frames, 2), 0.5),
        angle=motion.turning(rng, num_frames, step=0.8),
        scale=np.clip(scale, low, top),
        bend=rng.uniform(0.0, 0.1),
        waves=rng.uniform(1.5, 3.5, 2),
        phases=np.stack([motion.turning(rng, num_frames, step=2.0) for _ in range(2)], -1),
        texture=texture,
        density=rng.uniform(0.7, 1.4),
        offset=rng.random(2),
        shade=rng.uniform(0.0, 0.4),
    )


def _move(layer: Layer, rng: np.random.Generator, others: list[Layer]) -> Layer:
    start = _free_place(rng, layer, others)
    return layer._replace(path=motion.wander(rng, len(layer.path), start))


def _free_place(rng: np.random.Generator, layer: Layer, others: list[Layer]) -> np.ndarray:
    """Of some random places, the one farthest from what is there in the first frame."""
    places = rng.uniform(_EDGE, 1 - _EDGE, (_FREE_TRIES, 2))
    if not others:
        return places[0]
    gaps = [
        np.sqrt(((places - other.path[0]) ** 2).sum(-1)) - other.reach[0] - layer.reach[0]
        for other in others
    ]
    return places[int(np.argmax(np.min(gaps, axis=0)))]


def _exit(layer: Layer, rng: np.random.Generator, hidden: int) -> list[Layer]:
    """Over one of the four edges, along it out of sight, and in again."""
    num_frames = len(layer.path)
    gone, _ = motion.passage(rng, num_frames, hidden)
    path = motion.wander(rng, num_frames, rng.uniform(0.2, 0.8, 2))
    edge = layer.reach.max() + 0.03
    inside = 0.15 + 0.3 * path[:, 0]
    away = inside * (1 - gone) - edge * gone
    path = np.stack([away, path[:, 1]], -1)
    side = int(rng.integers(4))
    path = 1 - path if side % 2 else path
    return [layer._replace(path=path[:, ::-1] if side // 2 else path)]


def _cover(layer: Layer, rng: np.random.Generator, hidden: int) -> list[Layer]:
    """The target and, in front of it, something larger; one passes the other, or both move."""
    num_frames = len(layer.path)
    gone, turned = motion.passage(rng, num_frames, hidden)
    onward = rng.random() < 0.6
    apart = (1 - gone) * np.where(turned & onward, 1.0, -1.0)
    aspect = 1.0 if rng.random() < 0.5 else rng.uniform(1.5, 4.5)
    field = shapes.solid(rng, aspect)
    core, reach = shapes.core(field), layer.reach.max()
    radius = 1.06 * reach / core
    # A bar is passed across its length.
    across = 1.06 * reach if aspect > 1.3 else radius
    heading = rng.uniform(0, 2 * np.pi)
    direction = np.array([np.cos(heading), np.sin(heading)])
    offset = (apart * (reach + across + 0.01))[:, None] * direction
    middle = motion.wander(rng, num_frames, rng.uniform(0.4, 0.6, 2), 0.3, 0.7)
    share = rng.random()
    cover = Layer(
        field=field,
        path=middle - (1 - share) * offset,
        angle=heading + np.pi / 2 + motion.drift(rng, num_frames, 0.15),
        scale=np.full(num_frames, radius),
        bend=0.0,
        waves=np.ones(2),
        phases=np.zeros((num_frames, 2)),
        texture=1,
        density=rng.uniform(0.7, 1.4),
        offset=rng.random(2),
        shade=rng.uniform(0.0, 0.4),
    )
    return [layer._replace(path=middle + share * offset), cover]


def _twin(layer: Layer, rng: np.random.Generator) -> Layer:
    """A layer that is hard to tell from a given one, and comes near it."""
    num_frames = len(layer.path)
    twin = layer._replace(
        field=shapes.vary(layer.field, rng),
        angle=motion.turning(rng, num_frames, step=0.8),
        scale=layer.scale[0] * rng.uniform(0.85, 1.15) * np.exp(motion.drift(rng, num_frames, 0.2)),
        phases=np.stack([motion.turning(rng, num_frames, step=2.0) for _ in range(2)], -1),
        offset=rng.random(2),
    )
    start = _free_place(rng, twin, [layer])
    return twin._replace(path=motion.wander(rng, num_frames, start, toward=layer.path))
