"""Simulated users (SAM 2 paper, appendix D.2.2; official `training/model/sam2.py`).

For each step it is drawn which frames are prompted, with what, and which are corrected; all clips
of a batch share it, as in the official code, so that each frame runs one way only.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sam2jax.tree import Tree
from sam2jax.types import Array

BOX_NOISE, MOST_BOX_NOISE = 0.1, 20.0  # share of the box's sides, and pixels


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How prompts are drawn; the defaults are the official recipe's."""

    point_probability: float = 0.5  # of clicks or boxes; masks otherwise
    box_probability: float = 0.5  # of a box where a click could be
    ground_truth_probability: float = 0.1  # of a correction from the object, not from the error
    max_cond_frames: int = 2  # frames that are prompted from the start, the first among them
    max_corrected_frames: int = 2  # frames that get correction clicks, those among them
    corrections: int = 7  # clicks on each
    corrected_as_cond: bool = True  # corrected frames become conditioning frames

    def __post_init__(self) -> None:
        for name in ("point_probability", "box_probability", "ground_truth_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        if self.corrections < 0:
            raise ValueError(f"corrections must not be negative, got {self.corrections}.")
        if not 1 <= self.max_cond_frames <= self.max_corrected_frames:
            raise ValueError(
                "max_cond_frames must be at least 1 and at most max_corrected_frames, got "
                f"{self.max_cond_frames} and {self.max_corrected_frames}."
            )


class Plan(Tree):
    """What happens to a clip's T frames, in the order in which they are processed."""

    frame: Array  # [T] int32: conditioning frames first, the others as time goes
    conditioning: Array  # [T] bool, prompted from the start
    points: Array  # [] bool, prompts are clicks or boxes; masks otherwise
    box: Array  # [T] bool, a box and not a click
    corrected: Array  # [T] bool
    from_truth: Array  # [T, K] bool, which correction clicks do not look at the error


def make_plan(config: PromptConfig, key: Array, num_frames: int) -> Plan:
    """Draws a plan. A single frame is always prompted with a click or a box, and corrected."""
    draws = jax.random.split(key, 6)
    first = jax.random.randint(draws[0], (), 1, min(config.max_cond_frames, num_frames) + 1)
    most = min(config.max_corrected_frames, num_frames)
    corrected = jax.random.randint(draws[1], (), jnp.minimum(first, most), most + 1)
    points = jax.random.bernoulli(draws[2], config.point_probability) | (num_frames == 1)
    # The first frame, then the others in a random order: those in front are prompted.
    others = jax.random.permutation(draws[3], jnp.arange(1, num_frames, dtype=jnp.int32))
    place = jnp.arange(1, num_frames, dtype=jnp.int32)
    rank = jnp.zeros(num_frames, jnp.int32).at[others].set(place)
    frames = jnp.arange(num_frames, dtype=jnp.int32)
    order = jnp.argsort(jnp.where(rank < first, frames - num_frames, frames)).astype(jnp.int32)
    shape = (num_frames, config.corrections)
    return Plan(
        frame=order,
        conditioning=(rank < first)[order],
        points=points,
        box=jax.random.bernoulli(draws[4], config.box_probability, (num_frames,)),
        corrected=(points & (rank < corrected))[order],
        from_truth=jax.random.bernoulli(draws[5], config.ground_truth_probability, shape),
    )


def sample_click(key: Array, target: Array, shown: Array) -> tuple[Array, Array]:
    """A click anywhere in the error of each object's mask (official
    `sample_random_points_from_errors`); where there is none, on the background.

    Args:
      key: random key.
      target: [N, H, W] bool.
      shown: [N, H, W] bool, the mask to be corrected; all false: a click on the object.

    Returns:
      (x, y) [N, 2] in pixels, and labels [N] int32: 1 where the object was missed.
    """
    missed, wrong = target & ~shown, ~target & shown
    perfect = ~jnp.any(missed | wrong, axis=(1, 2), keepdims=True)
    region = (missed | wrong | (perfect & ~target)).reshape(len(target), -1)
    count = jnp.cumsum(region, axis=1, dtype=jnp.int32)
    wanted = jax.random.uniform(key, (len(target), 1)) * count[:, -1:].astype(jnp.float32)
    index = jnp.argmax(count > wanted.astype(jnp.int32), axis=1)
    width = target.shape[2]
    points = jnp.stack([index % width, index // width], axis=1).astype(jnp.float32)
    hit = jnp.take_along_axis(missed.reshape(len(target), -1), index[:, None], axis=1)[:, 0]
    return points, hit.astype(jnp.int32)


def sample_box(key: Array, target: Array) -> Array:
    """Corners [N, 2, 2] of noisy boxes around masks [N, H, W] bool (official
    `sample_box_points`)."""
    height, width = target.shape[1:]

    def span(inside: Array) -> tuple[Array, Array]:
        size = inside.shape[1]
        index = jnp.arange(size, dtype=jnp.int32)[None]
        first = jnp.min(jnp.where(inside, index, size), axis=1)
        return first, jnp.max(jnp.where(inside, index, -1), axis=1)

    left, right = span(jnp.any(target, axis=1))
    top, bottom = span(jnp.any(target, axis=2))
    box = jnp.stack([left, top, right, bottom], axis=1).astype(jnp.float32)
    sides = jnp.tile(box[:, 2:] - box[:, :2], (1, 2))
    noise = jax.random.uniform(key, box.shape, minval=-1.0, maxval=1.0)
    box = box + noise * jnp.minimum(sides * BOX_NOISE, MOST_BOX_NOISE)
    edge = jnp.asarray([[width, height, width, height]], jnp.float32) - 1
    return jnp.clip(box, 0, edge).reshape(-1, 2, 2)
