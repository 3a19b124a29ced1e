"""The losses of one prediction (SAM 2 paper, appendix D.2.2; official `loss_fns.py`)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sam2jax.tree import Tree
from sam2jax.types import Array

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the parts; the defaults are the official ones."""

    mask: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    object_score: float = 1.0


class Losses(Tree):
    """The parts, before they are weighted; they add up over steps, frames and objects."""

    mask: Array  # focal loss of the best mask
    dice: Array  # of the best mask
    iou: Array  # of all masks' predicted IoUs
    object_score: Array  # cross-entropy

    @classmethod
    def zeros(cls, count: int) -> Losses:
        """Of `count` objects that nothing was compared for."""
        return cls(*(jnp.zeros(count) for _ in range(4)))

    def total(self, config: LossConfig) -> Array:
        return (
            config.mask * self.mask
            + config.dice * self.dice
            + config.iou * self.iou
            + config.object_score * self.object_score
        )


def prediction_losses(
    config: LossConfig, masks: Array, ious: Array, object_score: Array, target: Array
) -> Losses:
    """Losses of one decoding, for each of N objects.

    Of several masks the one with the lowest focal and dice loss learns; every predicted IoU
    learns from its own mask. Where the object is out of sight only its score learns.

    Args:
      config: decides which mask is the best.
      masks: [N, K, H, W] logits, the K alternatives of a decoding.
      ious: [N, K], predicted.
      object_score: [N] logits.
      target: [N, H, W] bool.

    Returns:
      Losses of shape [N].
    """
    visible = jnp.any(target, axis=(1, 2)).astype(jnp.float32)
    mask, dice = focal_loss(masks, target[:, None]), dice_loss(masks, target[:, None])
    combined = config.mask * mask + config.dice * dice
    best = jnp.argmin(combined, axis=1)[:, None]

    def of_best(loss: Array) -> Array:
        return jnp.take_along_axis(loss, best, axis=1)[:, 0]

    return Losses(
        mask=visible * of_best(mask),
        dice=visible * of_best(dice),
        iou=visible * jnp.mean(jnp.abs(ious - mask_iou(masks > 0, target[:, None])), axis=1),
        object_score=cross_entropy(object_score, visible),
    )


def cross_entropy(logits: Array, target: Array) -> Array:
    """Of a sigmoid with `target` in [0, 1], element by element."""
    return jnp.maximum(logits, 0) - logits * target + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def focal_loss(masks: Array, target: Array) -> Array:
    """Mean over pixels (arXiv 1708.02002): [..., H, W] logits, bool -> [...]."""
    target = target.astype(jnp.float32)
    prob = jax.nn.sigmoid(masks)
    missed = prob * (1 - target) + (1 - prob) * target
    alpha = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    return jnp.mean(alpha * missed**FOCAL_GAMMA * cross_entropy(masks, target), axis=(-2, -1))


def dice_loss(masks: Array, target: Array) -> Array:
    """One minus the soft overlap, with 1 added above and below: [..., H, W] -> [...]."""
    prob, target = jax.nn.sigmoid(masks), target.astype(jnp.float32)
    shared = jnp.sum(prob * target, axis=(-2, -1))
    both = jnp.sum(prob, axis=(-2, -1)) + jnp.sum(target, axis=(-2, -1))
    return 1 - (2 * shared + 1) / (both + 1)


def mask_iou(masks: Array, target: Array) -> Array:
    """IoU of bool masks [..., H, W]; 0 where both are empty."""
    shared = jnp.sum(masks & target, axis=(-2, -1), dtype=jnp.int32)
    union = jnp.sum(masks | target, axis=(-2, -1), dtype=jnp.int32)
    return shared.astype(jnp.float32) / jnp.maximum(union, 1).astype(jnp.float32)
