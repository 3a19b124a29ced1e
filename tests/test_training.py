"""Optimizer, low-rank updates, sharding, configurations: what a run is made of."""

import dataclasses
import math
import os
import pathlib
import signal
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from typer.testing import CliRunner

from sam2jax.cli import app
from sam2jax.config import VARIANTS
from sam2jax.nn.layers import dropout
from sam2jax.nn.sam2 import SAM2, param_shapes
from sam2jax.testing import random_params
from sam2jax.tracking.segment import run_model
from sam2jax.training.checkpoints import Checkpoints
from sam2jax.training.config import SHIPPED, TrainConfig, read_config
from sam2jax.training.lora import LoraConfig, init_lora, merge_lora
from sam2jax.training.optimizer import (
    OptimizerConfig,
    is_decayed,
    make_optimizer,
    make_schedule,
    rate_factor,
)
from sam2jax.training.sharding import SHARDS, batch_sharding, make_mesh, state_shardings
from sam2jax.training.step import init_train_state, model_params, train_step
from tests.training import CONFIG, MODEL, SIZE, batch, first_state, run_config, run_values

PATHS = flatten_dict(param_shapes(VARIANTS["sam2.1_hiera_tiny"]), sep="/")


def test_rates_by_layer():
    config = OptimizerConfig(learning_rate=1e-5, vision_learning_rate=5e-6, layer_decay=0.9)
    factor = {path: rate_factor(config, path, 12) for path in PATHS}
    trunk = "image_encoder/trunk"
    assert factor["memory_attention/norm/scale"] == 1
    assert factor["image_encoder/neck/convs_0/kernel"] == 0.5
    assert factor[f"{trunk}/pos_embed"] == factor[f"{trunk}/pos_embed_window"] == 0.5
    assert math.isclose(factor[f"{trunk}/patch_embed/proj/kernel"], 0.5 * 0.9**13)
    assert math.isclose(factor[f"{trunk}/blocks_0/norm1/scale"], 0.5 * 0.9**12)
    assert math.isclose(factor[f"{trunk}/blocks_11/mlp/layers_0/kernel"], 0.5 * 0.9)


def test_which_weights_decay():
    decayed = {path for path in PATHS if is_decayed(path)}
    assert not any(path.endswith("bias") for path in decayed)
    scales = {path.removesuffix("/scale") for path in decayed if path.endswith("scale")}
    assert scales == {
        *(f"memory_encoder/fuser/layers_{i}/norm" for i in range(2)),
        *(f"memory_encoder/mask_downsampler/encoder_{i}" for i in (1, 4, 7, 10)),
        *(f"sam_prompt_encoder/mask_downscaling_{i}" for i in (1, 4)),
        "sam_mask_decoder/output_upscaling_1",
    }
    assert {path for path in PATHS if path.endswith("kernel")} < decayed


def test_an_update_of_adamw():
    """By hand, for two parameters in different groups, with the gradient clipped."""
    config = OptimizerConfig(learning_rate=0.1, vision_learning_rate=0.05, clip_norm=1.0)
    params = {"a/kernel": jnp.array([2.0]), "image_encoder/neck/bias": jnp.array([3.0])}
    gradient = {"a/kernel": jnp.array([3.0]), "image_encoder/neck/bias": jnp.array([4.0])}
    optimizer = make_optimizer(config, params, num_blocks=12, steps=10)
    state = optimizer.init(params)
    updates, state = optimizer.update(gradient, state, params)
    # Adam's first step is the sign of the gradient; only the kernel decays.
    np.testing.assert_allclose(updates["a/kernel"], [-0.1 * (1 + 0.1 * 2.0)], rtol=1e-5)
    np.testing.assert_allclose(updates["image_encoder/neck/bias"], [-0.05], rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["a/kernel"], [0.1 * 3 / 5], rtol=1e-5)


def test_an_update_of_muon():
    """A matrix is stepped as far in all directions, and as far as AdamW would; the rest by Adam."""
    config = OptimizerConfig(kind="muon", learning_rate=0.1, weight_decay=0.0, clip_norm=1e9)
    key = jax.random.key(0)
    shapes = {
        "a/kernel": (64, 32),
        "b/kernel": (3, 3, 16, 48),
        "a/bias": (32,),
        "b/narrow/kernel": (64, 4),
        "dwconv/kernel": (7, 7, 32),
    }
    gradient = {path: jax.random.normal(key, shape) for path, shape in shapes.items()}
    optimizer = make_optimizer(config, gradient, num_blocks=12, steps=10)
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    for path in ("a/kernel", "b/kernel"):
        step, slope = (
            np.asarray(x[path]).reshape(-1, shapes[path][-1]) for x in (updates, gradient)
        )
        spread = np.linalg.svd(step, compute_uv=False) / (0.1 * 0.2 * len(step) ** 0.5)
        assert 0.6 < spread.min() and spread.max() < 1.3, spread
        assert np.sum(step * slope) < 0
        assert np.sqrt(np.mean(step**2)) < 0.1 * 0.2 * 1.3
    for path in set(shapes) - {"a/kernel", "b/kernel"}:
        np.testing.assert_allclose(updates[path], -0.1 * np.sign(gradient[path]), rtol=1e-4)


def test_schedules():
    plain = make_schedule(OptimizerConfig(learning_rate=1.0), 100)
    assert [round(float(plain(s)), 3) for s in (0, 50, 100)] == [1.0, 0.55, 0.1]
    warm = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 100)
    assert [round(float(warm(s)), 3) for s in (0, 5, 10, 100)] == [0.0, 0.5, 1.0, 0.1]


def test_low_rank_updates():
    config = LoraConfig(rank=2, alpha=4.0)
    params = {path: jnp.ones(leaf.shape) for path, leaf in PATHS.items()}
    lora = init_lora(config, params, jax.random.key(0))
    targets = {path.rsplit("/", 1)[0] for path in lora}
    assert "image_encoder/trunk/blocks_0/attn/qkv/kernel" in targets
    assert "memory_attention/layers_3/cross_attn_image/v_proj/kernel" in targets
    assert not any("mlp" in path or "conv" in path for path in targets)
    for path, value in merge_lora(config, params, lora).items():
        np.testing.assert_array_equal(value, params[path])  # nothing learnt yet
    path = "memory_attention/layers_0/self_attn/q_proj/kernel"
    lora[f"{path}/lora_b"] = jnp.ones((2, 256))
    merged = merge_lora(config, params, lora)
    expected = 1 + 2.0 * np.asarray(lora[f"{path}/lora_a"]).sum(1, keepdims=True)
    np.testing.assert_allclose(merged[path], np.broadcast_to(expected, (256, 256)), atol=1e-5)
    with pytest.raises(ValueError, match="no matrix"):
        init_lora(LoraConfig(targets="nothing"), params, jax.random.key(0))
    for bad in ({"rank": 0}, {"targets": "("}):
        with pytest.raises(ValueError):
            LoraConfig(**bad)


def test_frozen_parts(tmp_path):
    state = first_state(run_config(tmp_path, freeze=["^image_encoder/", "^sam_prompt_encoder/"]))
    assert {path.split("/")[0] for path in state.frozen} == {
        "image_encoder",
        "sam_prompt_encoder",
        "no_mem_pos_enc",
    }
    assert not set(state.trainable) & set(state.frozen)
    config = run_config(tmp_path, lora={"rank": 2})
    state = first_state(config)
    assert all(path.endswith(("lora_a", "lora_b")) for path in state.trainable)
    whole = flatten_dict(model_params(config, state), sep="/")
    assert set(whole) == set(flatten_dict(param_shapes(CONFIG), sep="/"))
    with pytest.raises(ValueError, match="nothing to be trained"):
        first_state(run_config(tmp_path, freeze=["."]))
    with pytest.raises(ValueError, match="'image_encodr' is in no parameter's name; .* image_enc"):
        first_state(run_config(tmp_path, freeze=["image_encodr", "mask_decoder"]))


def test_shardings(tmp_path):
    mesh = make_mesh(2)
    assert batch_sharding(mesh).shard_shape((4, 3)) == (2, 3)
    state = first_state(run_config(tmp_path))
    placed = state_shardings(mesh, state)
    path = "memory_attention/layers_0/linear1/kernel"
    moments = optax.tree.get(placed.opt_state, "mu")
    for place in (placed.trainable[path], moments[path]):
        assert place.shard_shape((32, 32)) == (16, 32)
    assert placed.trainable["maskmem_tpos_enc"].is_fully_replicated
    assert placed.step.is_fully_replicated
    # A kernel that cannot be split evenly is copied.
    odd = {"kernel": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    assert state_shardings(mesh, odd)["kernel"].is_fully_replicated
    assert make_mesh(1).shape[SHARDS] == 1
    with pytest.raises(ValueError, match="shards must divide"):
        make_mesh(3)


def test_configurations_that_ship():
    names = sorted(path.stem for path in SHIPPED.glob("*.toml"))
    assert names == ["finetune", "lora", "scratch"]
    recipe = read_config("finetune")
    official = TrainConfig(
        output=recipe.output, steps=recipe.steps, model=recipe.model, data=recipe.data, seed=123
    )
    assert dataclasses.replace(recipe, workers=official.workers) == official
    scratch = read_config("scratch").model.architecture
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(scratch)))
    assert 1e6 < size < 2e6
    assert read_config("lora").lora is not None


def test_paths_of_configurations_from_home(tmp_path):
    path = tmp_path / "a.toml"
    text = '''output = "~/runs"
steps = 1
model = {checkpoint = "~/a.pt"}
[[data.sources]]
kind = "folder"
images = "~/images"
masks = "masks~"'''
    path.write_text(text)
    config, home = read_config(path), os.path.expanduser("~")
    (source,) = config.data.sources
    given = config.output, config.model.checkpoint, source.images, source.masks
    assert given == (f"{home}/runs", f"{home}/a.pt", f"{home}/images", "masks~")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "no key 'stepz'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": "many"}, "config.steps must be int"),
        ({"model": {}}, "one of checkpoint, variant and architecture"),
        ({"model": {"variant": "sam3"}}, "variant must be one of"),
        ({"model": {"checkpoint": "x", "dtype": "float16"}}, "dtype must be one of"),
        ({"model": {"architecture": {"width": 3}}}, "width"),
        ({"data": {"sources": [{"kind": "tape"}]}}, "kind must be one of"),
        ({"prompts": {"point_probability": 2.0}}, "point_probability"),
        ({"optimizer": {"clip_norm": 0.0}}, "clip_norm"),
        ({"freeze": ["("]}, "no regular expression"),
        ({"lora": {}, "freeze": ["a"]}, "leave freeze out"),
    ],
)
def test_refused_configurations(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_config(tmp_path, **changes)


def test_command_line(tmp_path):
    run = CliRunner().invoke
    shown = run(app, ["train", "--config", "lora", "--show"])
    assert shown.exit_code == 0 and shown.output == (SHIPPED / "lora.toml").read_text()
    shown = run(app, ["train", "--config", "lora", "--show", "--steps", "3"])
    assert shown.exit_code == 2 and "leave --output and --steps out" in shown.output
    for text, message in (
        ("steps = ", "no TOML file"),
        ("steps = 3", "needs 'output', 'model'"),
    ):
        path = tmp_path / "bad.toml"
        path.write_text(text)
        result = run(app, ["train", "--config", str(path)])
        assert result.exit_code == 2 and message in result.output
    result = run(app, ["train", "--config", "nothing"])
    assert result.exit_code == 2 and "neither a file" in result.output
    assert "finetune, lora, scratch" in result.output
    result = run(app, ["train", "--config", "lora", "--coordinator", "localhost:1234"])
    assert result.exit_code == 2 and "give --distributed too" in result.output


def test_training_without_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "run.toml"
    path.write_text("tensorboard = true\n" + (SHIPPED / "scratch.toml").read_text())
    for package in ("tensorboardX", "grain"):
        monkeypatch.setitem(sys.modules, package, None)
        result = CliRunner().invoke(app, ["train", "--config", str(path)])
        assert result.exit_code == 2 and result.output == (
            f"error: training needs {package}: pip install 'sam2jax[train]'\n"
        )


def test_runs_that_cannot_begin(tmp_path):
    from sam2jax.training.loop import train

    with pytest.raises(FileNotFoundError, match="no checkpoint to resume"):
        train(run_config(tmp_path), resume=True, progress=False)
    assert not pathlib.Path(run_config(tmp_path).output).exists()
    with pytest.raises(ValueError, match="multiple of the 2 devices"):
        train(run_config(tmp_path, batch_size=3), progress=False)
    with pytest.raises(FileNotFoundError):
        train(run_config(tmp_path, model={"checkpoint": str(tmp_path / "none.pt")}), progress=False)
    assert run_values(tmp_path)["steps"] == 6


def test_a_checkpoint_of_another_state_is_refused(tmp_path):
    with Checkpoints(tmp_path / "run", 2) as checkpoints:
        checkpoints.save(3, {"a": jnp.ones(4)}, {"epoch": 1})
    with Checkpoints(tmp_path / "run", 2) as checkpoints:
        state, data = checkpoints.load({"a": jnp.zeros(4)})
        assert data == {"epoch": 1} and state["a"].tolist() == [1] * 4
        with pytest.raises(ValueError, match="not of this configuration"):
            checkpoints.load({"b": jnp.zeros(4), "c": jnp.zeros(2)})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("call", ["save_async", "close"])
def test_a_signal_waits_until_a_checkpoint_is_begun_or_written(tmp_path, monkeypatch, number, call):
    """Left half-way, Orbax's threads would keep the process for ever."""

    class Told(BaseException):
        pass

    def tell(number, frame):
        raise Told

    before = signal.signal(number, tell)
    try:
        checkpoints = Checkpoints(tmp_path / "run", 2)
        real, finished = getattr(checkpoints._checkpointer, call), []

        def disturbed(*args, **given):
            signal.raise_signal(number)
            real(*args, **given)
            finished.append(call)

        monkeypatch.setattr(checkpoints._checkpointer, call, disturbed)
        with pytest.raises(Told):
            checkpoints.save(3, {"a": jnp.ones(4)}, {})
            checkpoints.close()
        assert finished == [call] and signal.getsignal(number) is tell
        if call == "save_async":
            checkpoints.close()
        with Checkpoints(tmp_path / "run", 2) as again:
            assert again.latest == 3
    finally:
        signal.signal(number, before)


def test_a_run_that_diverges_stores_no_such_state(tmp_path, monkeypatch):
    from sam2jax.training import loop

    def step(config, model, state, batch):
        norm = math.nan if state.step == 3 else 1.0
        return SimpleNamespace(step=state.step + 1), {"loss": 1, "iou": 1, "gradient_norm": norm}

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(loop, "_place", lambda batch, placed: batch)
    saved = []
    checkpoints = SimpleNamespace(save=lambda step, state, data: saved.append(step))
    loader = MagicMock(__next__=MagicMock())
    config = run_config(tmp_path, log_every=5, checkpoint_every=2)
    with pytest.raises(FloatingPointError, match="the gradient_norm of step 4 is nan"):
        loop._run(config, MODEL, SimpleNamespace(step=0), loader, make_mesh(), checkpoints, False)
    assert saved == [2]


def test_a_run_that_diverges_is_told_in_one_line(tmp_path, monkeypatch):
    def train(*_, **__):
        raise FloatingPointError("the loss of step 4 is nan")

    monkeypatch.setattr("sam2jax.training.loop.train", train)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    result = CliRunner().invoke(app, ["train", "--config", "scratch"])
    assert result.exit_code == 2 and result.output == "error: the loss of step 4 is nan\n"


def test_states_are_float32(tmp_path):
    halves = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.bfloat16), param_shapes(CONFIG))
    state = init_train_state(run_config(tmp_path), MODEL, halves, jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.trainable))


def test_what_is_dropped_depends_on_the_key_alone():
    trunk = dataclasses.replace(CONFIG.trunk, drop_path_rate=0.5)
    dropping = SAM2(dataclasses.replace(CONFIG, trunk=trunk))
    params = random_params(CONFIG, seed=1)
    images = np.random.default_rng(0).standard_normal((3, SIZE, SIZE, 3)).astype(np.float32)
    encode = jax.jit(
        lambda model, key: run_model(model, params, "encode_image", images, dropout=key).features,
        static_argnums=0,
    )
    kept = encode(MODEL, None)
    np.testing.assert_array_equal(encode(dropping, None), kept)
    keys = [jax.random.key(seed) for seed in (0, 0, 1)]
    one, again, other = (np.asarray(encode(dropping, key)) for key in keys)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - kept).max() > 1e-3

    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dropout(self, x, 0.25)

    ones = jnp.ones((40, 50))
    dropped = Half().apply({}, ones, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert 0.7 < (np.asarray(dropped) > 0).mean() < 0.8
    np.testing.assert_array_equal(Half().apply({}, ones), ones)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_a_step_in_bfloat16_keeps_float32_parameters(tmp_path, remat):
    """Traced only: what compiling would take minutes for."""
    config = run_config(tmp_path, remat=remat)
    trunk = dataclasses.replace(CONFIG.trunk, drop_path_rate=0.1)
    attention = dataclasses.replace(CONFIG.memory_attention, dropout=0.1)
    half = dataclasses.replace(
        MODEL.config, dtype="bfloat16", trunk=trunk, memory_attention=attention
    )
    state = first_state(config)
    new, metrics = jax.eval_shape(
        lambda state, clips: train_step(config, SAM2(half), state, clips), state, batch()
    )
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for leaf, old in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        assert (leaf.shape, leaf.dtype) == (old.shape, old.dtype)
    assert {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}
