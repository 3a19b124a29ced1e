"""SAMURAI: masks chosen by motion, and memory of good frames (arXiv 2411.11922)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.memory import official
from sam2jax.memory.bank import MemoryBank
from sam2jax.memory.policies import kalman, ranked
from sam2jax.memory.policies.kalman import Motion
from sam2jax.memory.policies.ranked import Accepted
from sam2jax.memory.policy import Choice, MemoryPolicy, Now, no_judgement
from sam2jax.ops.boxes import mask_boxes
from sam2jax.ops.resize import resize_masks
from sam2jax.tree import Tree
from sam2jax.types import Array, FrameMemory, MaskCandidates, MemoryRead

_NO_SCORE = jnp.inf  # of a frame that was chosen without motion


class Settings(Tree):
    """The release's values are the defaults of `samurai`."""

    alpha: Array  # weight of motion beside the predicted IoU
    iou_threshold: Array
    score_threshold: Array
    motion_threshold: Array
    presence: Array  # object score above which the object is in sight
    stable_frames: Array  # after so many frames motion counts
    stable_iou: Array  # below which the motion is given up


class Carried(Tree):
    accepted: Accepted
    motion: Motion
    stable: Array  # [] int32, frames for which the motion has held
    score: Array  # [] of motion, on the frame being processed


def samurai(
    alpha: float | Array = 0.25,
    iou_threshold: float | Array = 0.5,
    score_threshold: float | Array = 0.0,
    motion_threshold: float | Array = 0.0,
    presence: float | Array = -1.0,
    stable_frames: int | Array = 15,
    stable_iou: float | Array = 0.3,
) -> MemoryPolicy:
    """SAMURAI (arXiv 2411.11922), one Kalman filter for each object.

    Where there are alternatives, the one with the greatest `alpha` x IoU of its box with the
    predicted one + (1 - `alpha`) x predicted IoU is taken, once the motion has been stable. Frames
    with a predicted IoU, object score and motion score above thresholds are remembered; the last
    six of them are attended to, and the previous frame. Pointers are SAM 2's.

    Args:
      alpha: the release's value for tiny, small and base_plus; it has 0.15 for large.
      iou_threshold, score_threshold, motion_threshold: of frames that are remembered.
      presence: object score above which an object is in sight (SAM 2: 0).
      stable_frames: how long the motion is observed before it counts.
      stable_iou: predicted IoU below which it is observed anew.
    """
    return MemoryPolicy(
        init=_init,
        read=_read,
        choose=_choose,
        judge=no_judgement,
        write=_write,
        settings=Settings(
            alpha=jnp.asarray(alpha, jnp.float32),
            iou_threshold=jnp.asarray(iou_threshold, jnp.float32),
            score_threshold=jnp.asarray(score_threshold, jnp.float32),
            motion_threshold=jnp.asarray(motion_threshold, jnp.float32),
            presence=jnp.asarray(presence, jnp.float32),
            stable_frames=jnp.asarray(stable_frames, jnp.int32),
            stable_iou=jnp.asarray(stable_iou, jnp.float32),
        ),
    )


def _init(config: SAM2Config, settings: Settings, bank: MemoryBank) -> Carried:
    return Carried(
        accepted=ranked.nothing_accepted(config, settings, bank),
        motion=kalman.nothing(),
        stable=jnp.zeros((), jnp.int32),
        score=jnp.full((), _NO_SCORE, jnp.float32),
    )


def _read(
    config: SAM2Config, settings: Settings, bank: MemoryBank, carried: Carried, now: Now
) -> MemoryRead:
    longest = official.longest_distance(config, now.num_frames)
    spatial = ranked.select_spatial(config, bank, carried.accepted, now)
    pointers = official.select_pointers(config, bank, now.frame, now.direction, longest)
    return official.gather_selected(config, bank, spatial, pointers, longest)


def _choose(
    config: SAM2Config, settings: Settings, carried: Carried, candidates: MaskCandidates, now: Now
) -> tuple[Choice, Carried]:
    best, carried = jax.vmap(_follow, in_axes=(None, None, 0, 0, 0, None))(
        config, settings, carried, candidates.masks[:, 1:], candidates.ious[:, 1:], now
    )
    return Choice(
        parent=jnp.arange(best.shape[0], dtype=jnp.int32),
        best=best,
        present=candidates.object_score > settings.presence,
    ), carried


def _follow(
    config: SAM2Config, settings: Settings, carried: Carried, masks: Array, ious: Array, now: Now
) -> tuple[Array, Carried]:
    """The alternative [] that is taken, and the motion with its box."""
    size = (config.image_size, config.image_size)
    boxes = mask_boxes(resize_masks(masks, size) > 0).astype(jnp.float32)
    before, expected = carried.motion, kalman.predict(carried.motion)
    motion_iou = kalman.box_iou(kalman.box_of(expected), boxes)
    is_new, is_stable = carried.stable == 0, carried.stable >= settings.stable_frames
    weighted = settings.alpha * motion_iou + (1 - settings.alpha) * ious
    best = jnp.argmax(jnp.where(is_stable, weighted, ious)).astype(jnp.int32)
    box, iou = boxes[best], ious[best]
    # A stable motion is given up below the threshold, a new one not confirmed at it.
    holds = jnp.where(is_stable, iou >= settings.stable_iou, iou > settings.stable_iou)

    def pick(condition: Array, one: Motion, other: Motion) -> Motion:
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)

    motion = pick(holds, kalman.update(expected, box), expected)
    motion = pick(is_new, kalman.initiate(box), motion)
    stable = jnp.where(is_new, 1, jnp.where(holds, carried.stable + 1, 0)).astype(jnp.int32)
    return best, carried.replace(
        motion=pick(now.multimask, motion, before),
        stable=jnp.where(now.multimask, stable, carried.stable),
        score=jnp.where(now.multimask & is_stable, motion_iou[best], _NO_SCORE),
    )


def _write(
    config: SAM2Config,
    settings: Settings,
    bank: MemoryBank,
    carried: Carried,
    memory: FrameMemory,
    now: Now,
) -> tuple[MemoryBank, Carried]:
    good = (
        (memory.iou > settings.iou_threshold)
        & (memory.object_score > settings.score_threshold)
        & (carried.score > settings.motion_threshold)
        # The frame after the prompted one is never looked back at.
        & (ranked.tracked_for(carried.accepted, now) >= 2)
    )
    flags = {"good": good, "good_pointer": jnp.ones((), bool)}
    bank, accepted = ranked.write(bank, carried.accepted, memory, now, **flags)
    return bank, carried.replace(accepted=accepted)
