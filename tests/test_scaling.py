"""The clip program on many devices and processes: the same answers, and how the work is split."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

import sam2jax
from sam2jax.testing import random_params
from tests.conftest import ROOT
from tests.test_tracking import MODEL, TWO, assert_same, clip

FRAMES = 16
SPLIT = """
import sys

import jax

jax.config.update("jax_disable_most_optimizations", True)
coordinator, index, out = sys.argv[1:]
if coordinator:
    jax.distributed.initialize(coordinator, 2, int(index))
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import sam2jax
from sam2jax.testing import random_params
from sam2jax.tracking.step import encode_frames
from tests.test_tracking import MODEL, TWO, clip

FRAMES = 16
params, frames = random_params(MODEL.config, seed=3), clip(FRAMES)


def run(params, frames, prompts):
    return sam2jax.track(MODEL, params, frames, prompts, frames_at_once=FRAMES)[1]


def run_videos(params, videos, prompts):
    return sam2jax.track(MODEL, params, videos, prompts)[1]


def flops(program):
    return program.cost_analysis()["flops"]


def place(tree, sharding):
    def one(x):
        return jax.make_array_from_callback(jnp.shape(x), sharding, lambda i: np.asarray(x)[i])

    return jax.tree.map(one, tree)


def split(run, devices, params, frames, prompts, prompts_too=False):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("devices",), auto, devices=devices)
    everywhere = NamedSharding(mesh, PartitionSpec())
    leading = NamedSharding(mesh, PartitionSpec("devices"))
    prompts = place(prompts, leading if prompts_too else everywhere)
    given = place(params, everywhere), place(frames, leading), prompts
    return jax.jit(run, out_shardings=everywhere).lower(*given).compile(), given


def track_all_of(videos, prompts, params):
    from sam2jax.cli import batch

    mesh = jax.make_mesh((8,), ("videos",), (jax.sharding.AxisType.Auto,))
    program = batch._program(MODEL, 1, NamedSharding(mesh, PartitionSpec("videos")))
    prompts = jax.tree.map(lambda x: x[:, None], prompts)
    prompts = sam2jax.ClipPrompts(frames=jnp.zeros((8, 1), jnp.int32), prompts=prompts)
    state = sam2jax.init_state(MODEL, 2, 2, 1)
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *jnp.shape(x))), state)
    policy = sam2jax.memory.SAM2.replace(online=True)
    lengths = np.full(8, 2, np.int32)
    return program.lower(params, policy, videos, prompts, states, lengths).compile()


assert len(jax.devices()) == 8
program, given = split(run, jax.devices(), params, frames, TWO)
found = {"frames": program(*given)}
work = {"frames": flops(program)}
if not coordinator:
    work["alone"] = flops(split(run, jax.devices()[:1], params, frames, TWO)[0])
    encode = jax.jit(lambda params, frames: encode_frames(MODEL, params, frames))
    work["encoding"] = flops(encode.lower(params, frames).compile())
    videos = np.stack([clip(2, seed) for seed in range(8)])
    prompts = sam2jax.Prompts.stack([TWO] * 8)
    program, given = split(run_videos, jax.devices(), params, videos, prompts, True)
    found["videos"], work["videos"] = program(*given), flops(program)
    work["eight videos"] = flops(jax.jit(run_videos).lower(params, videos, prompts).compile())
    work["track-all"] = flops(track_all_of(videos, prompts, params))
if jax.process_index() == 0:
    answers = {
        f"{part}/{name}": value
        for part, output in found.items()
        for name, value in vars(output).items()
        if value is not None
    }
    np.savez(out, **{f"work/{name}": count for name, count in work.items()}, **answers)
"""


def spawn(out: pathlib.Path, devices: int, coordinator: str = "", index: int = 0):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", SPLIT, coordinator, str(index), str(out)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen) -> None:
    told = [process.communicate(timeout=900)[1] for process in processes]
    for process, errors in zip(processes, told, strict=True):
        assert process.returncode == 0, errors[-2000:]


@pytest.fixture(scope="module")
def expected():
    params = random_params(MODEL.config, seed=3)
    return sam2jax.track(MODEL, params, clip(FRAMES), TWO)[1]


def read(path: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """By the part before the slash, by the part behind it."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as stored:
        for name in stored:
            part, key = name.split("/")
            parts.setdefault(part, {})[key] = stored[name]
    return parts


@pytest.mark.slow
def test_work_is_split_over_eight_devices(tmp_path, expected):
    finish(spawn(tmp_path / "out.npz", 8))
    found = read(tmp_path / "out.npz")
    work = found["work"]
    assert_same(sam2jax.FrameOutput(**found["frames"]), expected)
    # Each device encodes two of sixteen frames; what follows is done by all. XLA counts the loop
    # over frames once: all the rest is encoding.
    tracking = work["alone"] - work["encoding"]
    assert 0 < tracking < work["encoding"] / 8
    assert work["frames"] - tracking < 1.1 * work["encoding"] / 8
    # Of eight videos each device tracks one. The partitioner leaves some of the work unsplit.
    assert work["videos"] < work["eight videos"] * (1 / 8 + 0.15)
    assert work["track-all"] < 1.01 * work["eight videos"] / 8  # by shard_map
    params = random_params(MODEL.config, seed=3)
    for index in range(8):
        _, alone = sam2jax.track(MODEL, params, clip(2, index), TWO)
        rows = {name: value[index] for name, value in found["videos"].items()}
        assert_same(sam2jax.FrameOutput(**rows), alone)


@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one(tmp_path, expected):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    out = tmp_path / "out.npz"
    finish(*(spawn(out, 4, address, index) for index in range(2)))
    assert_same(sam2jax.FrameOutput(**read(out)["frames"]), expected)


def test_batches_must_divide_the_clip():
    params = random_params(MODEL.config, seed=3)
    with pytest.raises(ValueError, match="must divide the 5 frames"):
        sam2jax.track(MODEL, params, clip(5), TWO, frames_at_once=2)
    with pytest.raises(ValueError, match="must divide"):
        sam2jax.track(MODEL, params, clip(4)[None], sam2jax.Prompts.stack([TWO]), frames_at_once=0)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_frames_encoded_together_give_the_same(expected, reverse):
    params = random_params(MODEL.config, seed=3)
    alone = expected
    if reverse:
        alone = sam2jax.track(MODEL, params, clip(FRAMES), TWO, reverse=True)[1]
    _, out = sam2jax.track(MODEL, params, clip(FRAMES), TWO, frames_at_once=4, reverse=reverse)
    assert_same(out, alone)
