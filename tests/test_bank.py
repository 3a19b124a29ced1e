"""The memory bank against a plain reference that keeps every frame in growing dictionaries."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jax.memory import official as rule
from sam2jax.memory.bank import empty
from sam2jax.testing import small_config
from sam2jax.types import EMPTY, FrameMemory

CONFIG = small_config(image_size=32)


def remember(frame: int) -> FrameMemory:
    """A memory that can be told from every other by its content."""
    cells, width = CONFIG.feature_size**2, CONFIG.mem_dim
    return FrameMemory(
        frame=jnp.int32(frame),
        spatial=jnp.full((cells, width), frame, jnp.bfloat16),
        pointer=jnp.full(CONFIG.hidden_dim, frame, jnp.float32),
        iou=jnp.float32(0.5),
        object_score=jnp.float32(1.0),
    )


def select(cond: list[int], frame: int, most: int) -> list[int]:
    """The documented rule: nearest before, nearest from here on, then the nearest of the rest."""
    if most == -1 or len(cond) <= most:
        return cond
    before = [max((t for t in cond if t < frame), default=None)]
    after = [min((t for t in cond if t >= frame), default=None)]
    chosen = [t for t in before + after if t is not None]
    rest = sorted((t for t in cond if t not in chosen), key=lambda t: abs(t - frame))
    return chosen + rest[: most - len(chosen)]


def reference_read(config, cond, recent, frame, sign, num_frames):
    """Sets of (frame, temporal encoding) and (frame, distance)."""
    chosen = select(cond, frame, config.max_cond_frames_in_attn)
    spare = [t for t in cond if t not in chosen]
    stride = config.memory_temporal_stride_for_eval
    spatial = {(t, config.num_maskmem - 1) for t in chosen}
    for back in range(1, config.num_maskmem):
        if back == 1:
            wanted = frame - sign
        elif sign == 1:
            wanted = ((frame - 2) // stride) * stride - (back - 2) * stride
        else:
            wanted = -(-(frame + 2) // stride) * stride + (back - 2) * stride
        if wanted in recent or wanted in spare:
            spatial.add((wanted, back - 1))
    longest = min(num_frames, config.max_obj_ptrs_in_encoder)
    pointers = {(t, (frame - t) * sign) for t in chosen if (frame - t) * sign >= 0}
    for back in range(1, longest):
        if frame - back * sign in recent or frame - back * sign in spare:
            pointers.add((frame - back * sign, back))
    return spatial, pointers


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("stride, most", [(1, -1), (1, 2), (3, -1), (2, 3)])
def test_reads_equal_an_unbounded_history(sign, stride, most):
    config = dataclasses.replace(
        CONFIG, memory_temporal_stride_for_eval=stride, max_cond_frames_in_attn=most
    )
    num_frames, cond = 40, [12, 30, 20, 5, 21]
    bank = empty(config, len(cond))
    direction = jnp.int32(sign)

    @jax.jit
    def read(bank, frame):
        return rule.read(config, bank, frame, direction, jnp.int32(num_frames))

    @jax.jit
    def write(bank, memory, conditioning):
        return rule.write(
            config, bank, memory, direction, conditioning=conditioning, recent=~conditioning
        )

    for frame in cond:
        bank = write(bank, remember(frame), jnp.bool_(True))
    recent: set[int] = set()
    for frame in range(num_frames)[::sign]:
        got = read(bank, jnp.int32(frame))
        spatial, pointers = reference_read(config, cond, recent, frame, sign, num_frames)
        held = np.asarray(got.spatial_frame)[: int(got.num_spatial)].tolist()
        rows = np.asarray(got.spatial_tpos)[: len(held)].tolist()
        assert set(zip(held, rows, strict=True)) == spatial and len(held) == len(spatial)
        np.testing.assert_array_equal(got.spatial[: len(held), 0, 0].astype(np.float32), held)
        held = np.asarray(got.pointer_frame)[: int(got.num_pointers)].tolist()
        distance = np.rint(np.asarray(got.pointer_position)[: len(held)] * 15).astype(int).tolist()
        assert set(zip(held, distance, strict=True)) == pointers and len(held) == len(pointers)
        np.testing.assert_array_equal(got.pointers[: len(held), 0], held)
        assert np.all(np.asarray(got.spatial_frame)[int(got.num_spatial) :] == EMPTY)
        bank = write(bank, remember(frame), jnp.bool_(False))
        if frame not in cond:
            recent.add(frame)


def write(bank, frame, *, conditioning):
    return rule.write(
        CONFIG,
        bank,
        remember(frame),
        jnp.int32(1),
        conditioning=jnp.bool_(conditioning),
        recent=jnp.bool_(not conditioning),
    )


def test_tracked_frames_never_evict_a_conditioning_frame():
    bank = write(empty(CONFIG, 2), 0, conditioning=True)
    for frame in range(1, 60):
        bank = write(bank, frame, conditioning=False)
    assert bank.cond_frame.tolist() == [0, EMPTY]
    assert sorted(bank.recent_frame.tolist()) == list(range(60 - CONFIG.num_recent, 60))
    assert sorted(bank.pointer_frame.tolist()) == list(range(45, 60))


def test_a_full_bank_gives_up_the_furthest_conditioning_frame():
    bank = empty(CONFIG, 2)
    for frame in (10, 40, 50):
        bank = write(bank, frame, conditioning=True)
    assert sorted(bank.cond_frame.tolist()) == [40, 50]


def test_a_frame_replaces_itself_and_is_held_once():
    bank = write(empty(CONFIG, 2), 0, conditioning=True)
    bank = write(bank, 1, conditioning=False)
    bank = write(bank, 1, conditioning=False)
    assert bank.recent_frame.tolist().count(1) == 1
    bank = write(bank, 1, conditioning=True)
    assert 1 not in bank.recent_frame.tolist() and 1 not in bank.pointer_frame.tolist()
    bank = write(bank, 0, conditioning=False)
    assert bank.cond_frame.tolist() == [0, 1] and 0 not in bank.recent_frame.tolist()


def test_pointer_distances_follow_the_length_of_a_short_clip():
    bank = write(empty(CONFIG, 1), 0, conditioning=True)
    for frame in range(1, 6):
        bank = write(bank, frame, conditioning=False)
    read = rule.read(CONFIG, bank, jnp.int32(6), jnp.int32(1), jnp.int32(5))
    count = int(read.num_pointers)
    # Four frames back at most, and the conditioning frame whatever its distance.
    assert read.pointer_frame[:count].tolist() == [0, 5, 4, 3, 2]
    np.testing.assert_allclose(read.pointer_position[:count], np.array([6, 1, 2, 3, 4]) / 4)


def test_what_is_read_does_not_depend_on_the_order_of_writing():
    """Not even in its order, so that answers are the same to the last bit."""

    def filled(order):
        bank = empty(CONFIG, 4)
        for index, conditioning in order:
            bank = write(bank, index, conditioning=conditioning)
        return rule.read(CONFIG, bank, jnp.int32(9), jnp.int32(1), jnp.int32(16))

    frames = [(0, True), (5, True), (4, False), (6, False), (7, False), (8, False)]
    chex.assert_trees_all_equal(filled(frames), filled(frames[:2][::-1] + frames[2:][::-1]))
