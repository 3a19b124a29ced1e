"""Memory policies of fixed capacity against plain references that keep every frame.

$SAM2JAX_SCRIPTS asks for more scripts (of each policy) than these few.
"""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jax import memory
from sam2jax.memory import MemoryPolicy, Now, Seen
from sam2jax.ops.masks import largest_component
from sam2jax.testing import small_config
from sam2jax.types import EMPTY, NO_OBJ_SCORE, FrameMemory, MaskCandidates
from tests import policy_references as plain

CONFIG = dataclasses.replace(small_config(), image_size=64)
SIZE = CONFIG.mask_size
LENGTH, STREAM = 300, 16
SCRIPTS = int(os.environ.get("SAM2JAX_SCRIPTS", 2))


@dataclasses.dataclass(frozen=True)
class Case:
    policy: Callable[..., MemoryPolicy]
    reference: Callable[..., plain.Reference]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    theirs: dict[str, Any] | None = None  # the reference's, where it names them otherwise


CASES = {
    "sam2": Case(memory.sam2, plain.Sam2),
    "sam3_score": Case(memory.sam3_score, plain.Sam3Score),
    "sam3_score, strict": Case(memory.sam3_score, plain.Sam3Score, {"threshold": 0.6}),
    "samurai": Case(memory.samurai, plain.Samurai),
    "samurai, large": Case(memory.samurai, plain.Samurai, {"alpha": 0.15, "stable_frames": 5}),
    "rcms": Case(memory.rcms, plain.Rcms),
    "rcms, four": Case(memory.rcms, plain.Rcms, {"most": 4, "threshold": 0.4}),
    "dam4sam": Case(memory.dam4sam, plain.Dam4Sam),
    "dam4sam, eager": Case(
        memory.dam4sam,
        plain.Dam4Sam,
        {"iou_threshold": 0.3, "area_low": 0.3, "area_high": 3.0},
    ),
    "sam2long": Case(memory.sam2long, plain.Sam2Long),
    "sam2long, paper": Case(
        memory.sam2long, plain.Sam2Long, {"iou_threshold": 0.3, "certainty": 2.0}
    ),
    "sam2long, uncertain": Case(memory.sam2long, plain.Sam2Long, {"lineages": 4, "certainty": 1e3}),
}


@dataclasses.dataclass
class Script:
    """What the decoder would say: T frames, for P lineages."""

    masks: np.ndarray  # [T, P, 4, s, s] logits
    ious: np.ndarray  # [T, P, 4]
    score: np.ndarray  # [T, P]
    conditioning: np.ndarray  # [T] bool
    multimask: np.ndarray  # [T] bool


def rectangle(center: np.ndarray, sides: np.ndarray) -> np.ndarray:
    low = np.clip(np.round(center - sides / 2), 0, SIZE).astype(int)
    high = np.clip(np.round(center + sides / 2), 0, SIZE).astype(int)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[low[0] : high[0], low[1] : high[1]] = True
    return mask


def write_script(seed: int, lineages: int, start: int) -> Script:
    """A box that wanders, is hidden for some time, and is mistaken for something beside it."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((LENGTH, lineages, 4, SIZE, SIZE), np.float32)
    # Away from thresholds, and from halves of a hundredth, which float32 may round otherwise.
    ious = rng.integers(5, 99, (LENGTH, lineages, 4)) / 100 + rng.uniform(-4e-3, 4e-3)
    ious += rng.uniform(-2e-4, 2e-4, ious.shape)
    ious[:, :, 1:] = np.where(
        rng.random((LENGTH, lineages, 1)) < 0.7, np.maximum(ious[:, :, 1:], 0.82), ious[:, :, 1:]
    )
    score = rng.uniform(0.5, 8, (LENGTH, lineages))
    center, sides = np.array([8.0, 8.0]), np.array([6.0, 5.0])
    hidden = 0
    for frame in range(LENGTH):
        center = np.clip(center + rng.normal(0, 0.7, 2), 2, SIZE - 2)
        sides = np.clip(sides + rng.normal(0, 0.2, 2), 3, 8)
        hidden = hidden - 1 if hidden else int(rng.integers(1, 30)) * (rng.random() < 0.03)
        for lineage in range(lineages):
            for index in range(4):
                mask = rectangle(center + rng.normal(0, 0.6, 2), sides)
                if rng.random() < 0.3:
                    mask |= rectangle(rng.uniform(0, SIZE, 2), np.array([3.0, 3.0]))
                if rng.random() < 0.04 or (hidden and rng.random() < 0.7):
                    mask[:] = False
                noise = rng.uniform(0.2, 6, mask.shape)
                masks[frame, lineage, index] = np.where(mask, noise, -noise)
            if hidden:
                score[frame, lineage] = -rng.uniform(0.1, 8)
        if rng.random() < 0.1:  # a tie
            ious[frame, :, 2] = ious[frame, :, 1]
    conditioning = np.zeros(LENGTH, bool)
    conditioning[[start, start + 60, start + 61, start + 140]] = True
    multimask = rng.random(LENGTH) < 0.95
    return Script(masks, ious.astype(np.float32), score.astype(np.float32), conditioning, multimask)


@partial(jax.jit, static_argnames="max_cond_frames")
def run(policy: MemoryPolicy, script: dict[str, Any], max_cond_frames: int) -> dict[str, Any]:
    """What the policy reads, takes and writes on every frame, as the tracker would call it."""
    bank = memory.empty(CONFIG, max_cond_frames, policy.room)
    held = bank, policy.init(CONFIG, policy.settings, bank)
    lineages = policy.lineages
    held = jax.tree.map(lambda x: jnp.broadcast_to(x, (lineages, *x.shape)), held)

    def body(held, item):
        bank, carried = held
        now = Now(
            frame=item["frame"],
            direction=jnp.int32(1),
            num_frames=jnp.int32(STREAM),
            conditioning=item["conditioning"],
            recent=bank.has_memory[0],
            multimask=item["multimask"],
        )
        read = jax.vmap(policy.read, in_axes=(None, None, 0, 0, None))(
            CONFIG, policy.settings, bank, carried, now
        )
        candidates = MaskCandidates(
            masks=item["masks"],
            ious=item["ious"],
            tokens=jnp.zeros((lineages, 4, CONFIG.hidden_dim)),
            object_score=item["score"],
        )
        choice, carried = policy.choose(CONFIG, policy.settings, carried, candidates, now)
        bank, candidates = jax.tree.map(lambda x: x[choice.parent], (bank, candidates))
        index = jnp.where(now.multimask, choice.best + 1, 0)
        rows = jnp.arange(lineages)
        mask = jnp.where(choice.present[:, None, None], candidates.masks[rows, index], NO_OBJ_SCORE)
        seen = Seen(
            alternatives=candidates.masks[:, 1:],
            chosen=choice.best,
            mask=mask,
            iou=candidates.ious[rows, index],
            object_score=candidates.object_score,
        )
        carried, cut = jax.vmap(policy.judge, in_axes=(None, None, 0, 0, None))(
            CONFIG, policy.settings, carried, seen, now
        )
        cells = CONFIG.feature_size**2
        content = jnp.broadcast_to(now.frame, rows.shape)
        remembered = FrameMemory(
            frame=content,
            spatial=jnp.broadcast_to(
                content[:, None, None], (lineages, cells, CONFIG.mem_dim)
            ).astype(jnp.bfloat16),
            pointer=jnp.broadcast_to(
                content[:, None].astype(jnp.float32), (lineages, CONFIG.hidden_dim)
            ),
            iou=seen.iou,
            object_score=seen.object_score,
        )
        bank, carried = jax.vmap(policy.write, in_axes=(None, None, 0, 0, 0, None))(
            CONFIG, policy.settings, bank, carried, remembered, now
        )
        # The tracker leaves alone what it has never been shown.
        known = now.conditioning | now.recent
        after = jax.tree.map(partial(jnp.where, known), (bank, carried), held)
        return after, {
            "read": read,
            "parent": choice.parent,
            "index": index,
            "cut": cut,
            "mask": mask,
            "cond": bank.cond_frame,
        }

    return jax.lax.scan(body, held, script)[1]


def read_lists(read: Any, frame: int, lineage: int, longest: int) -> tuple[list, list]:
    """(frame, position, scale) of what was read, and that its content is of those frames."""

    def row(name: str) -> np.ndarray:
        value = getattr(read, name)
        if value is None:
            frames = read.spatial_frame if "spatial" in name else read.pointer_frame
            return np.ones(frames.shape[2])
        return value[frame, lineage]

    lists = []
    for kind, positions, factor in (
        ("spatial", row("spatial_tpos"), 1),
        ("pointer", row("pointer_position"), longest),
    ):
        frames = row(f"{kind}_frame")
        count = int(row("num_spatial" if kind == "spatial" else "num_pointers"))
        assert (frames[:count] != EMPTY).all() and (frames[count:] == EMPTY).all()
        content = row("spatial" if kind == "spatial" else "pointers")[:count]
        expected = frames[:count].reshape(-1, *(1,) * (content.ndim - 1))
        np.testing.assert_array_equal(
            content.astype(np.float32),
            np.broadcast_to(expected.astype(content.dtype), content.shape).astype(np.float32),
        )
        found = zip(frames, positions * factor, row(f"{kind}_scale"), strict=True)
        lists.append([(int(f), round(float(p), 3), float(s)) for f, p, s in found][:count])
    return lists[0], lists[1]


@pytest.mark.optimised
@pytest.mark.parametrize("seed", range(SCRIPTS))
@pytest.mark.parametrize("name", CASES)
def test_choices_reads_and_writes_are_those_of_an_unbounded_memory(name: str, seed: int):
    case = CASES[name]
    policy = case.policy(**case.settings)
    reference = case.reference(**(case.settings if case.theirs is None else case.theirs))
    start = 7 * (seed % 2)
    script = write_script(seed, policy.lineages, start)
    frames = np.arange(LENGTH, dtype=np.int32)
    found = run(policy, {"frame": frames, **vars(script)}, max_cond_frames=4)
    found = jax.tree.map(np.asarray, found)
    for frame in range(start, LENGTH):
        where = f"{name}, seed {seed}, frame {frame}"
        conditioning = bool(script.conditioning[frame])
        if not conditioning:
            for lineage, read in enumerate(reference.read(frame, STREAM)):
                spatial, pointers = read_lists(found["read"], frame, lineage, read.longest)
                for ours, theirs in ((spatial, read.spatial), (pointers, read.pointers)):
                    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs], where
                    np.testing.assert_allclose(
                        [entry[2] for entry in ours], [entry[2] for entry in theirs], atol=1e-5
                    )
        candidates = [
            plain.Candidates(
                script.masks[frame, p], script.ious[frame, p], float(script.score[frame, p])
            )
            for p in range(policy.lineages)
        ]
        taken = reference.choose(
            frame,
            candidates,
            conditioning=conditioning,
            multimask=bool(script.multimask[frame]),
        )
        ours = list(zip(found["parent"][frame], found["index"][frame], strict=True))
        assert ours == taken, where
        answers = list(found["mask"][frame])
        cut = reference.write(frame, answers, conditioning=conditioning)
        assert found["cut"][frame].tolist() == cut, where


def test_what_the_scripts_make_happen():
    """Otherwise the comparison would be of little."""
    script = write_script(0, 1, 0)
    frames = np.arange(LENGTH, dtype=np.int32)
    inputs = {"frame": frames, **vars(script)}
    assert 5 < (script.score < 0).sum() < LENGTH / 2
    promoted = run(memory.dam4sam(iou_threshold=0.3), inputs, 2)
    assert promoted["cut"].sum() >= 5
    kept = run(memory.rcms(), inputs, 2)["cond"]
    assert (np.asarray(kept[-1]) != EMPTY).sum() == 2 + 3
    followed = run(memory.samurai(stable_frames=3), inputs, 2)
    plainly = run(memory.sam2(), inputs, 2)
    assert (followed["index"] != plainly["index"]).sum() > 5


def test_a_promotion_is_of_one_frame_alone():
    """What was judged of a frame does not promote another, which is passed over or lies ahead."""
    policy = memory.dam4sam()
    bank = memory.empty(CONFIG, 1, policy.room)
    carried = policy.init(CONFIG, policy.settings, bank).replace(promote=jnp.bool_(True))
    record = FrameMemory(
        frame=jnp.int32(7),
        spatial=jnp.ones_like(bank.cond_spatial[0]),
        pointer=jnp.ones_like(bank.cond_pointer[0]),
        iou=jnp.float32(1),
        object_score=jnp.float32(1),
    )
    no = jnp.bool_(False)
    now = Now(jnp.int32(7), jnp.int32(1), jnp.int32(STREAM), no, recent=no, multimask=no)
    kept, _ = policy.write(CONFIG, policy.settings, bank, carried, record, now)
    jax.tree.map(np.testing.assert_array_equal, kept, bank)
    ahead = now.replace(conditioning=jnp.bool_(True))
    kept, carried = policy.write(CONFIG, policy.settings, bank, carried, record, ahead)
    assert int(carried.promoted_at) == EMPTY and int(carried.start) == 7
    kept, carried = policy.write(
        CONFIG, policy.settings, bank, carried, record, now.replace(recent=jnp.bool_(True))
    )
    assert int(carried.promoted_at) == 7 and (np.asarray(kept.cond_frame) == 7).any()


def test_settings_are_traced():
    """One program for all values, alone and vmapped."""
    script = write_script(1, 1, 0)
    inputs = {"frame": np.arange(LENGTH, dtype=np.int32), **vars(script)}
    run(memory.samurai(), inputs, 2)
    with jax.log_compiles(False):
        count = run._cache_size()
        run(memory.samurai(alpha=0.4, iou_threshold=0.7), inputs, 2)
        assert run._cache_size() == count
    thresholds = jnp.array([0.1, 0.5, 0.9])
    several = jax.vmap(lambda t: run(memory.samurai(iou_threshold=t), inputs, 2)["read"])(
        thresholds
    )
    for row, threshold in enumerate(thresholds):
        alone = run(memory.samurai(iou_threshold=float(threshold)), inputs, 2)["read"]
        np.testing.assert_array_equal(several.spatial_frame[row], alone.spatial_frame)


def test_largest_component():
    from scipy import ndimage

    rng = np.random.default_rng(0)
    for share in (0.0, 0.2, 0.4, 0.6, 1.0):
        region = rng.random((24, 30)) < share
        labels, count = ndimage.label(region, np.ones((3, 3)))
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        expected = labels == 1 + np.argmax(sizes) if count else region
        np.testing.assert_array_equal(largest_component(region), expected)
