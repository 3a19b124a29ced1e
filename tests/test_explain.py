"""What `explain` tells: where the attention went, and the pictures of it."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sam2jax
from sam2jax import memory
from sam2jax.io.timeline import Looked, heat_maps, looked_at, ramp, timeline
from sam2jax.nn.memory_attention import WATCHED, MemoryTokens, RoPEAttention, place_after
from sam2jax.ops.attention import attention
from sam2jax.testing import random_params
from tests.clips import write_folder
from tests.test_cli import commands_in_an_empty_folder, write_checkpoint
from tests.test_tracking import CONFIG, MODEL, TWO, assert_same, clip

LENGTH = 6


@pytest.mark.parametrize("heads", [1, 2])
def test_the_mass_is_that_of_the_weights(heads):
    """Attending to values that name their memory gives what each memory received."""
    options = dataclasses.replace(CONFIG.memory_attention, num_heads=heads)
    config = dataclasses.replace(CONFIG, memory_attention=options)
    slots, pointers, cells = 3, 2, config.feature_size**2
    keys = jax.random.split(jax.random.key(0), 6)

    def draw(key, *shape):
        return 3 * jax.random.normal(key, (2, *shape))

    pieces = config.pointer_tokens
    tokens = MemoryTokens.make(
        draw(keys[0], slots, cells, config.mem_dim),
        draw(keys[1], slots, cells, config.mem_dim),
        jnp.array([3, 2]),
        draw(keys[2], pointers * pieces, config.mem_dim),
        draw(keys[3], pointers * pieces, config.mem_dim),
        jnp.array([1, 2]) * pieces,
    )
    x = draw(keys[4], cells, config.hidden_dim)
    box = RoPEAttention(config, config.mem_dim)
    variables = box.init(keys[5], x, tokens, method="attend_memory")
    assert set(variables) == {"params"}
    out, told = box.apply(variables, x, tokens, method="attend_memory", mutable=[WATCHED])
    plain = box.apply(variables, x, tokens, method="attend_memory")
    np.testing.assert_allclose(out, plain, atol=1e-6)
    ((spatial, pointed),) = told[WATCHED]["mass"]

    def named(box, x, tokens):
        """[N, HW, K + Q], a head at a time."""
        query, key = box._query(x), box._rotated(tokens.spatial_keys, box.k_proj)
        kernel, bias = box._in_pairs(box.k_proj)
        pointed = tokens.pointer_keys @ kernel + bias.reshape(1, 1, -1)
        key = place_after(key, pointed, tokens.spatial_length)
        names = jnp.repeat(jnp.eye(slots + pointers)[:slots], cells, axis=0)
        tail = jnp.repeat(jnp.eye(slots + pointers)[slots:], pieces, axis=0)
        value = place_after(jnp.stack([names] * 2), jnp.stack([tail] * 2), tokens.spatial_length)
        width = query.shape[-1] // heads
        parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
        return sum(
            attention(query[..., p], key[..., p], value, length=tokens.length, scale=1.0)
            for p in parts
        ) / len(parts)

    expected = jnp.moveaxis(box.apply(variables, x, tokens, method=named), -1, 1)
    np.testing.assert_allclose(spatial, expected[:, :slots], atol=1e-5)
    np.testing.assert_allclose(pointed, expected[:, slots:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [memory.SAM2, memory.sam2long(lineages=2)])
def test_an_explained_answer_is_the_same(policy):
    params = random_params(CONFIG, seed=3)
    frames = clip(LENGTH)
    _, plain = sam2jax.track(MODEL, params, frames, TWO, policy=policy)
    _, out = sam2jax.track(MODEL, params, frames, TWO, policy=policy, explain=True)
    told = out.explanation
    assert_same(out.replace(explanation=None), plain)
    mass = told.mass.sum(-1) + told.pointer_mass.sum(-1)  # [T, N, L]
    np.testing.assert_allclose(mass[0], 0)
    np.testing.assert_allclose(mass[1:], 1, atol=1e-5)
    np.testing.assert_allclose(told.maps.mean((-2, -1)), told.mass.mean(2), atol=1e-5)
    read = out.memory_frames >= 0
    assert (told.mass.sum(2) > 0)[1:].tolist() == read[1:].tolist()
    assert told.masks.shape == (LENGTH, 2, 4, 16, 16) and told.ious.shape == (LENGTH, 2, 4)
    if policy is memory.SAM2:
        assert told.chosen.tolist() == np.argmax(told.ious[..., 1:], -1).tolist()
        assert told.carried == ()
        state = sam2jax.init_state(MODEL, 2, LENGTH, 1)
        _, first = sam2jax.step(MODEL, params, state, frames[0], TWO, explain=True)
        np.testing.assert_allclose(first.explanation.ious, told.ious[0], atol=1e-5)


def looked(frame: int, held: list[int], tpos: list[int]) -> Looked:
    count = len(held)
    return Looked(
        frame=frame,
        memory_frames=np.array(held),
        tpos=np.array(tpos),
        mass=np.linspace(0.1, 0.6, count),
        pointer_mass=0.2,
        maps=np.linspace(0, 1, count)[:, None, None] * np.ones((1, 4, 4)),
        iou=0.9,
        object_score=-1.0,
    )


def test_pictures():
    rows = [[looked(1, [0, -1, -1], [6, 0, 0]), looked(2, [0, 1, -1], [6, 0, 1])]]
    picture = timeline(rows, [1])
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    taller = timeline(rows * 2, [1, 2])
    assert taller.shape[0] > 1.8 * picture.shape[0]
    dark = timeline([[item._replace(mass=np.ones(3)) for item in rows[0]]], [1])
    assert dark.mean() < picture.mean()
    assert ramp(np.float32(0)).tolist() == [255, 255, 255]
    assert ramp(np.float32(1)).tolist() == [8, 30, 70]
    frame = np.full((20, 30, 3), 100, np.uint8)
    maps = heat_maps(frame, rows[0][1])
    assert maps.shape == (20, 60, 3)
    assert maps[10:, 35:].mean() > maps[10:, :25].mean()
    np.testing.assert_array_equal(heat_maps(frame, looked(0, [-1], [0])), frame)
    with pytest.raises(ValueError, match="explain=True"):
        looked_at(0, sam2jax.FrameOutput(*[np.zeros(1)] * 6), 0)


@pytest.mark.slow
def test_track_draws_it(tmp_path, monkeypatch):
    command = commands_in_an_empty_folder(tmp_path, monkeypatch)
    checkpoint = write_checkpoint(tmp_path)
    frames = write_folder(tmp_path / "frames", [f"{i:05d}.png" for i in range(5)])
    given = ["track", frames, "--checkpoint", checkpoint, "--point", "20,30", "-q"]
    given += ["--masks", "masks.npz"]
    result = command(*given, "--box", "5,5,20,20@2", "--explain", "memory.png")
    assert result.exit_code == 0, result.output
    drawn = np.asarray(Image.open("memory.png"))
    assert drawn.shape[0] > 400 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 20
    os.remove("memory.png")
    os.remove("masks.npz")
    result = command(*given, "--explain", "memory.txt")
    assert result.exit_code == 2 and ".png" in result.output
    assert os.listdir() == []
