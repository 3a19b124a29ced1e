"""A Kalman filter of one object's box at constant velocity, with DeepSORT's noise.

The state is the box's middle (x, y), its width over its height, its height, and their velocities
per frame (arXiv 1703.07402, section 2.1).
"""

from __future__ import annotations

import jax.numpy as jnp

from sam2jax.tree import Tree
from sam2jax.types import Array

_POSITION, _VELOCITY = 1 / 20, 1 / 160  # standard deviations, in heights
_HIGH = "highest"  # precision of products, whatever the device's default


class Motion(Tree):
    mean: Array  # [8] float32
    covariance: Array  # [8, 8] float32


def nothing() -> Motion:
    """Of no box yet."""
    return Motion(mean=jnp.zeros(8, jnp.float32), covariance=jnp.eye(8, dtype=jnp.float32))


def initiate(box: Array) -> Motion:
    """From a first box (x0, y0, x1, y1), at rest."""
    measured = _measurement(box)
    position, velocity = 2 * _POSITION * measured[3], 10 * _VELOCITY * measured[3]
    return Motion(
        mean=jnp.concatenate([measured, jnp.zeros(4, jnp.float32)]),
        covariance=_diagonal(position, 1e-2, velocity, 1e-5),
    )


def predict(motion: Motion) -> Motion:
    """One frame on."""
    height = motion.mean[3]
    step = jnp.eye(8, dtype=jnp.float32) + jnp.eye(8, k=4, dtype=jnp.float32)
    noise = _diagonal(_POSITION * height, 1e-2, _VELOCITY * height, 1e-5)
    moved = jnp.matmul(
        jnp.matmul(step, motion.covariance, precision=_HIGH), step.T, precision=_HIGH
    )
    return Motion(
        mean=motion.mean + jnp.concatenate([motion.mean[4:], jnp.zeros(4, jnp.float32)]),
        covariance=moved + noise,
    )


def update(motion: Motion, box: Array) -> Motion:
    """With the box that was found."""
    noise = _diagonal(_POSITION * motion.mean[3], 1e-1, 0.0, 0.0)[:4, :4]
    projected = motion.covariance[:4, :4] + noise
    gain = jnp.linalg.solve(projected, motion.covariance[:4]).T  # [8, 4]
    innovation = _measurement(box) - motion.mean[:4]
    explained = jnp.matmul(gain, motion.covariance[:4], precision=_HIGH)
    return Motion(
        mean=motion.mean + jnp.matmul(gain, innovation, precision=_HIGH),
        covariance=motion.covariance - explained,
    )


def box_of(motion: Motion) -> Array:
    """(x0, y0, x1, y1) of the state: [4]."""
    x, y, aspect, height = motion.mean[:4]
    half_width, half_height = aspect * height / 2, height / 2
    return jnp.stack([x - half_width, y - half_height, x + half_width, y + half_height])


def box_iou(box: Array, others: Array) -> Array:
    """IoU of a box [4] with others [K, 4]; 0 where one has no area: [K]."""

    def area(boxes: Array) -> Array:
        sides = boxes[..., 2:] - boxes[..., :2]
        return jnp.where(jnp.all(sides > 0, axis=-1), sides[..., 0] * sides[..., 1], 0.0)

    corners = jnp.concatenate(
        [jnp.maximum(box[None, :2], others[:, :2]), jnp.minimum(box[None, 2:], others[:, 2:])],
        axis=-1,
    )
    shared = area(corners)
    whole = area(box) + area(others) - shared
    empty = (area(box) == 0) | (area(others) == 0)
    return jnp.where(empty, 0.0, shared / jnp.where(empty, 1.0, whole))


def _measurement(box: Array) -> Array:
    """Middle, aspect and height [4] of a box; one without height counts as one pixel high."""
    width, height = box[2] - box[0], box[3] - box[1]
    height = jnp.where(height == 0, 1.0, height)
    middle = (box[:2] + box[2:]) / 2
    return jnp.concatenate([middle, jnp.stack([width / height, height])])


def _diagonal(position: Array, aspect: float, velocity: Array | float, turning: float) -> Array:
    """Covariance [8, 8] of standard deviations, the aspect's among those of x, y and height."""
    deviations = [position, position, aspect, position, velocity, velocity, turning, velocity]
    return jnp.diag(jnp.square(jnp.stack([jnp.asarray(d, jnp.float32) for d in deviations])))
