"""SAM2Long: several histories, of which the best one answers in the end (arXiv 2410.16268)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.memory import official
from sam2jax.memory.bank import MemoryBank, Selected
from sam2jax.memory.policies import ranked
from sam2jax.memory.policies.ranked import Accepted
from sam2jax.memory.policy import Choice, MemoryPolicy, Now, no_judgement
from sam2jax.tree import Tree
from sam2jax.types import Array, FrameMemory, MaskCandidates, MemoryRead

_COND_SCORE = 10.0  # what conditioning frames count as, among object scores
_LEAST_IOU = 1e-5


class Settings(Tree):
    iou_threshold: Array
    certainty: Array
    low: Array
    high: Array


class Carried(Tree):
    accepted: Accepted
    score: Array  # [] sum of the logarithms of the predicted IoUs along the lineage


def sam2long(
    lineages: int = 3,
    iou_threshold: float | Array = 0.1,
    certainty: float | Array = 2.0,
    modulation: tuple[float | Array, float | Array] = (0.95, 1.05),
    online: bool = False,
) -> MemoryPolicy:
    """A tree of masks, pruned to a few lineages on every frame.

    Each lineage offers three masks; those with the greatest sum of log IoUs go on, or, where no
    object score is certain, those whose IoUs differ. A lineage remembers frames with a predicted
    IoU above a threshold and its object in sight. Keys are scaled by the rank of their frame's
    object score.

    Args:
      lineages: P. The paper has 3; 1 is no tree.
      iou_threshold: of frames that are remembered: 0.1 in the release's commands, 0.3 in the
        paper's ablation and the release's own defaults.
      certainty: object score (of either sign) from which an answer is certain: 2 in the release's
        commands and the paper, 1 by the release's own defaults.
      modulation: what the keys of the least and of the most certain memory are multiplied by.
      online: each frame is answered at once by the lineage that is best so far. Otherwise the
        answers are those of the lineage that is best at the end.
    """
    if lineages < 1:
        raise ValueError(f"lineages must be at least 1, got {lineages}.")
    numbers = (iou_threshold, certainty, *modulation)
    return MemoryPolicy(
        init=_init,
        read=_read,
        choose=_choose,
        judge=no_judgement,
        write=_write,
        settings=Settings(*(jnp.asarray(number, jnp.float32) for number in numbers)),
        lineages=lineages,
        online=online,
    )


def _init(config: SAM2Config, settings: Settings, bank: MemoryBank) -> Carried:
    return Carried(
        accepted=ranked.nothing_accepted(config, settings, bank), score=jnp.zeros((), jnp.float32)
    )


def _read(
    config: SAM2Config, settings: Settings, bank: MemoryBank, carried: Carried, now: Now
) -> MemoryRead:
    longest = official.longest_distance(config, now.num_frames)
    spatial = ranked.select_spatial(config, bank, carried.accepted, now)
    pointers = ranked.select_pointers(config, bank, carried.accepted, now, longest)
    cond = jnp.full_like(bank.cond_score, _COND_SCORE)
    scale = _modulation(settings, spatial, jnp.concatenate([cond, bank.recent_score]))
    spatial = spatial.replace(scale=scale)
    scale = _modulation(settings, pointers, jnp.concatenate([cond, bank.pointer_score]))
    # The release leaves a single frame's keys alone, and a single pointer's only beside it.
    single = (jnp.sum(pointers.valid) == 1) & (jnp.sum(spatial.valid) > 1)
    pointers = pointers.replace(scale=jnp.where(single, settings.low, scale))
    return official.gather_selected(config, bank, spatial, pointers, longest)


def _modulation(settings: Settings, selected: Selected, score: Array) -> Array:
    """What keys are multiplied by, from low to high by ascending score: [K]."""
    first = selected.valid[None, :] & (
        (score[None, :] < score[:, None])
        | ((score[None, :] == score[:, None]) & (selected.rank[None, :] < selected.rank[:, None]))
    )
    count = jnp.sum(selected.valid)
    share = jnp.sum(first, axis=1) / jnp.maximum(count - 1, 1).astype(jnp.float32)
    return jnp.where(count > 1, settings.low + (settings.high - settings.low) * share, 1.0)


def _choose(
    config: SAM2Config, settings: Settings, carried: Carried, candidates: MaskCandidates, now: Now
) -> tuple[Choice, Carried]:
    ious, object_score = candidates.ious[:, 1:], candidates.object_score
    lineages, options = ious.shape
    reached = carried.score[:, None] + jnp.log(ious + _LEAST_IOU)
    certain = jnp.max(jnp.abs(object_score)) > settings.certainty
    signed = jnp.where(object_score > 0, 1.0, -1.0)[:, None] * ious
    order = jnp.argsort(-reached.reshape(-1), stable=True)
    taken = jnp.where(certain, order[:lineages], _distinct(reached, signed, order))
    taken = taken[jnp.argsort(-reached.reshape(-1)[taken], stable=True)]

    # Prompted frames, and the one after the first of them, do not branch.
    prompted = now.conditioning | (ranked.tracked_for(_first(carried.accepted), now) <= 1)
    branches = now.multimask & ~prompted
    itself = jnp.arange(lineages, dtype=jnp.int32)
    best = jnp.argmax(ious, axis=1).astype(jnp.int32)
    parent = jnp.where(branches, taken // options, itself)
    score = jnp.where(branches, reached.reshape(-1)[taken], carried.score)
    return Choice(
        parent=parent,
        best=jnp.where(branches, taken % options, best),
        present=object_score[parent] > 0,
    ), Carried(
        accepted=jax.tree.map(lambda x: x[parent], carried.accepted),
        score=jnp.where(prompted, 0.0, score),
    )


def _first(accepted: Accepted) -> Accepted:
    """Of the first lineage; what all share is read off it."""
    return jax.tree.map(lambda x: x[0], accepted)


def _distinct(reached: Array, signed: Array, order: Array) -> Array:
    """The best candidates [P] of [P, A] whose IoUs differ in the second decimal; where there are
    too few, the best of each lineage that has none, and then the best of the rest."""
    lineages, options = reached.shape
    rounded = jnp.round(signed.reshape(-1) * 100)
    flat = reached.reshape(-1)
    taken = jnp.full(lineages, -1, order.dtype)
    is_taken, count = jnp.zeros(flat.size, bool), jnp.int32(0)

    def take(state, candidate: Array, wanted: Array):
        taken, is_taken, count = state
        wanted = wanted & (count < lineages) & ~is_taken[candidate]
        place = (jnp.arange(lineages, dtype=jnp.int32) == count) & wanted
        return (
            jnp.where(place, candidate, taken),
            is_taken.at[candidate].set(is_taken[candidate] | wanted),
            count + wanted,
        )

    state = taken, is_taken, count
    for candidate in order:
        state = take(state, candidate, ~jnp.any(state[1] & (rounded == rounded[candidate])))
    for lineage in range(lineages):
        used = jnp.any(state[1].reshape(lineages, options)[lineage])
        state = take(state, lineage * options + jnp.argmax(reached[lineage]), ~used)
    for candidate in order:
        state = take(state, candidate, jnp.bool_(True))
    return state[0]


def _write(
    config: SAM2Config,
    settings: Settings,
    bank: MemoryBank,
    carried: Carried,
    memory: FrameMemory,
    now: Now,
) -> tuple[MemoryBank, Carried]:
    good = (memory.iou > settings.iou_threshold) & (memory.object_score > 0)
    flags = {"good": good, "good_pointer": good}
    bank, accepted = ranked.write(bank, carried.accepted, memory, now, **flags)
    return bank, carried.replace(accepted=accepted)
