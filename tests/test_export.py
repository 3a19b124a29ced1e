"""Exported programs: called by JAX alone, they answer as the functions that they were made of."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import sam2jax
from sam2jax.export import PLATFORMS, Sizes, export_programs, from_tree, to_tree
from sam2jax.segmentation.image import decode_masks, encode_image
from sam2jax.testing import random_params, small_config
from tests.test_tracking import assert_same, clip

MODEL = sam2jax.SAM2(small_config(image_size=64))
LENGTHS = 3, 5
POINTS = np.array([[[30, 18], [0, 0]], [[5, 5], [40, 30]]], np.float32)
LABELS = np.array([[1, -1], [2, 3]], np.int32)
PROMPTS = sam2jax.Prompts.make(points=[[(30, 18)], None], boxes=[None, (5, 5, 40, 30)])
ALONE = """
import sys
for name in ("sam2jax", "flax"):
    sys.modules[name] = None  # importing it fails
import json
import jax
import numpy as np
from jax import export

jax.config.update("jax_disable_most_optimizations", True)
metadata = json.load(open("programs/metadata.json"))
weights = [] if metadata["weights"] == "inside" else [dict(np.load("programs/weights.npz"))]
given = np.load("given.npz")
points, labels = given["points"], given["labels"]

def program(name):
    stored = open(f"programs/{name}.stablehlo", "rb").read()
    return jax.jit(export.deserialize(stored).call)

found = {}
track, step = program("track"), program("step")
for name in given:
    if name.startswith("clip"):
        for key, value in track(*weights, given[name], points, labels).items():
            found[f"{name}/{key}"] = value
state, last = program("start")(), given["clip0"]
for index, frame in enumerate(last):
    state, answer = step(*weights, state, frame, points, labels if index == 0 else 0 * labels - 1)
for key, value in answer.items():
    found[f"step/{key}"] = value
features = program("encode")(*weights, last[0])
for key, value in program("decode")(*weights, features, points, labels).items():
    found[f"image/{key}"] = value
np.savez("found.npz", **found)
"""


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL.config, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("embed", [False, True])
def test_jax_alone_gives_the_same(tmp_path: pathlib.Path, params, embed: bool):
    clips = [clip(length) for length in LENGTHS]
    sizes = Sizes(clips[0].shape[1:3], num_objects=2, num_points=2)
    export_programs(MODEL, params, tmp_path / "programs", sizes=sizes, embed=embed)
    given = {f"clip{index}": frames for index, frames in enumerate(clips)}
    np.savez(tmp_path / "given.npz", points=POINTS, labels=LABELS, **given)
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True)

    expected = {}
    for index, frames in enumerate(clips):
        _, out = sam2jax.track(MODEL, params, frames, PROMPTS)
        expected[f"clip{index}"] = out
    # A stream of unknown length, which `start` and `step` are for.
    state = sam2jax.init_state(MODEL, 2)
    _, out = sam2jax.track(MODEL, params, clips[0], PROMPTS, state)
    expected["step"] = jax.tree.map(lambda x: x[-1], out)
    features = encode_image(MODEL, params, clips[0][:1])
    expected["image"] = decode_masks(MODEL, params, features, PROMPTS, size=sizes.frame)
    with np.load(tmp_path / "found.npz") as found:
        for part, answer in expected.items():
            ours = {key: found[f"{part}/{key}"] for key in to_tree(answer)}
            if part == "image":
                np.testing.assert_allclose(ours["masks"], answer.masks, atol=1e-4)
                np.testing.assert_allclose(ours["ious"], answer.ious, atol=1e-5)
            elif part == "step":
                np.testing.assert_allclose(ours["masks"], answer.masks, atol=1e-3)
            else:
                assert_same(from_tree(answer, ours), answer)

    metadata = json.loads((tmp_path / "programs/metadata.json").read_text())
    assert metadata["platforms"] == list(PLATFORMS)
    assert metadata["model"]["image_size"] == 64 and metadata["sam2jax"] == sam2jax.__version__
    assert (tmp_path / "programs/weights.npz").exists() is not embed
    described = metadata["programs"]["track"]
    assert list(described["arguments"]) == ["frames", "points", "labels"]  # as they are called
    assert described["arguments"]["frames"] == "uint8[T,{},{},3]".format(*sizes.frame)
    assert described["results"]["masks"] == "float32[T,2,16,16]"


def test_trees_hold_everything(params):
    state = sam2jax.init_state(MODEL, 2, policy=sam2jax.memory.sam2long())
    again = from_tree(state, to_tree(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_functions_of_states_are_exported_too(tmp_path, params):
    """And read by another process, which has seen none of the types before."""
    state = sam2jax.init_state(MODEL, 2, policy=sam2jax.memory.sam2long())
    exported = jax.export.export(jax.jit(lambda state, prompts: (prompts, state)))(state, PROMPTS)
    path = tmp_path / "program"
    path.write_bytes(exported.serialize())
    code = f"""
import jax, pathlib, sam2jax
again = jax.export.deserialize(bytearray(pathlib.Path({str(path)!r}).read_bytes()))
prompts, state = jax.tree.unflatten(again.out_tree, range(again.out_tree.num_leaves))
print(type(prompts) is sam2jax.Prompts, type(state) is sam2jax.TrackState, state.lineages)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "True", str(state.lineages)]
    assert state.lineages > 1


def test_what_is_refused(tmp_path, params):
    with pytest.raises(ValueError, match="of cpu, cuda, tpu; got metal"):
        export_programs(MODEL, params, tmp_path / "x", platforms=["metal"])
    with pytest.raises(ValueError, match="at least 1"):
        Sizes((0, 10))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="exists already"):
        export_programs(MODEL, params, tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
