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
from sam2jax.nn.memory_attention import WATCHED, MemoryTokens, RoPEAttention
from sam2jax.testing import random_params
from tests.clips import write_folder
from tests.test_cli import commands_in_an_empty_folder, write_checkpoint
from tests.test_tracking import CONFIG, MODEL, TWO, assert_same, clip

LENGTH = 6


@pytest.mark.parametrize("heads, pooling", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_memories_are_attended_to_and_told_what_they_received(heads, pooling):
    """Beside one softmax over all that is valid, written out; a square of cells counts for all."""
    options = dataclasses.replace(CONFIG.memory_attention, num_heads=heads)
    config = dataclasses.replace(CONFIG, memory_attention=options, memory_pooling=pooling)
    slots, pointers, side = 3, 2, config.feature_size
    cells, pieces, width = side**2, config.pointer_tokens, config.mem_dim
    keys = jax.random.split(jax.random.key(0), 6)

    def draw(key, *shape):
        return 3 * jax.random.normal(key, (2, *shape))

    spatial, place = (draw(key, slots, cells, width) for key in keys[:2])
    pointed, position = (draw(key, pointers * pieces, width) for key in keys[2:4])
    counts = (3, 1), (2, 2)  # of an object: memories, pointers
    tokens = MemoryTokens.make(
        spatial,
        place,
        jnp.array([3, 2]),
        pointed,
        position,
        jnp.array([1, 2]) * pieces,
        pooling=pooling,
    )
    x = draw(keys[4], cells, config.hidden_dim)
    box = RoPEAttention(config, config.mem_dim)
    variables = box.init(keys[5], x, tokens, method="attend_memory")
    assert set(variables) == {"params"}
    out, told = box.apply(variables, x, tokens, method="attend_memory", mutable=[WATCHED])
    plain = box.apply(variables, x, tokens, method="attend_memory")
    np.testing.assert_allclose(out, plain, atol=1e-6)
    ((spatial_mass, pointer_mass),) = told[WATCHED]["mass"]

    def pooled(maps):
        """[K * HW, C] -> [K, cells, C]."""
        squares = maps.reshape(
            -1, side // pooling, pooling, side // pooling, pooling, maps.shape[-1]
        )
        return squares.mean((2, 4)).reshape(slots, -1, maps.shape[-1])

    def written_out(box, x):
        query, key = box._query(x), box._rotated(tokens.spatial_keys, box.k_proj)
        kernel, bias = box._in_pairs(box.k_proj)
        pointed_key = tokens.pointer_keys @ kernel + bias.reshape(1, 1, -1)
        value_kernel, value_bias = box.v_proj()
        each = query.shape[-1] // heads
        for n, (memories, held) in enumerate(counts):
            parts, masses = [], []
            for h in range(heads):
                part = slice(h * each, (h + 1) * each)
                key_maps = pooled(key[n][:, part])[:memories].reshape(-1, each)
                all_keys = jnp.concatenate([key_maps, pointed_key[n, : held * pieces, part]])
                maps = pooled(spatial[n].reshape(-1, width))[:memories].reshape(-1, width)
                values = jnp.concatenate([maps, pointed[n, : held * pieces]])
                heavier = jnp.arange(len(values)) < len(maps)
                bias = jnp.where(heavier, 2 * np.log(pooling), 0.0)
                weights = jax.nn.softmax(query[n][:, part] @ all_keys.T + bias[None], axis=-1)
                parts.append(weights @ (values @ value_kernel[:, part] + value_bias[None, part]))
                of_maps, of_pointers = weights[:, : len(maps)], weights[:, len(maps) :]
                masses.append(
                    (
                        of_maps.reshape(cells, memories, -1).sum(-1),
                        of_pointers.reshape(cells, held, -1).sum(-1),
                    )
                )
            answer = box.out_proj(jnp.concatenate(parts, axis=-1))
            yield answer, *(jnp.stack(m).mean(0).T for m in zip(*masses, strict=True))

    found = box.apply(variables, x, method=lambda box, x: list(written_out(box, x)))
    for n, (answer, maps, pointer) in enumerate(found):
        np.testing.assert_allclose(out[n], answer, atol=2e-5)
        np.testing.assert_allclose(spatial_mass[n, : len(maps)], maps, atol=1e-5)
        np.testing.assert_allclose(pointer_mass[n, : len(pointer)], pointer, atol=1e-5)
        assert not spatial_mass[n, len(maps) :].any()
        assert not pointer_mass[n, len(pointer) :].any()


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
