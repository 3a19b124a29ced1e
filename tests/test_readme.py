"""Every snippet of the README and the guides runs, in order, on small models."""

import re
import shlex

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import sam2jax
from sam2jax.cli import app
from sam2jax.config import HieraConfig, MemoryAttentionConfig
from sam2jax.io.masks import davis_palette
from sam2jax.io.writer import VideoWriter
from sam2jax.memory import POLICIES
from sam2jax.testing import random_params, small_config
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```(python|console)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for kind, text in SNIPPETS if kind == "console" for line in text.splitlines()]
PYTHON = "".join(text for kind, text in SNIPPETS if kind == "python")

SMALL = small_config(
    name="sam2.1_hiera_tiny",
    image_size=64,
    trunk=HieraConfig(8, 1, (1, 1, 1, 1), (2,), (4, 2, 4, 2)),
    memory_attention=MemoryAttentionConfig(num_layers=1, mlp_dim=64),
)
MINE = """
output = "runs/mine"
steps = 1
batch_size = 2
num_frames = 1
max_objects = 1
remat = false
[model]
checkpoint = "sam2.1_hiera_tiny.pt"
[[data.sources]]
kind = "folder"
images = "DAVIS/JPEGImages/480p"
masks = "DAVIS/Annotations/480p"
multiplier = 2
[prompts]
corrections = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clip and a checkpoint, under the names that the README gives them."""
    path = tmp_path_factory.mktemp("readme")
    sam2jax.save(path / "sam2.1_hiera_tiny.pt", SMALL, random_params(SMALL, seed=3))
    frames = np.random.default_rng(0).integers(0, 255, (3, 360, 400, 3), np.uint8)
    (path / "photos").mkdir()
    for name in ("cups.jpg", "photos/1.png"):
        Image.fromarray(frames[0]).save(path / name)
    with VideoWriter(path / "clip.mp4", 24, 360, 400) as writer:
        for frame in frames:
            writer.write(frame)
    (path / "videos").mkdir()
    (path / "videos/cups.mp4").symlink_to(path / "clip.mp4")
    write_benchmark(path / "DAVIS", frames)
    (path / "mine.toml").write_text(MINE)
    return path


def write_benchmark(folder, frames):
    """A video with two objects, laid out as DAVIS is."""
    labels = np.zeros(frames.shape[1:3], np.uint8)
    labels[50:150, 40:200], labels[200:300, 150:350] = 1, 2
    images, masks = folder / "JPEGImages/480p/cups", folder / "Annotations/480p/cups"
    lists = folder / "ImageSets/2017"
    for part in (images, masks, lists):
        part.mkdir(parents=True)
    (lists / "val.txt").write_text("cups\n")
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(images / f"{index:05d}.jpg")
        picture = Image.fromarray(labels, "P")
        picture.putpalette(davis_palette())
        picture.save(masks / f"{index:05d}.png")


def test_nothing_is_left_out():
    assert len(SNIPPETS) == README.count("```") / 2


@pytest.mark.slow
def test_commands(folder, monkeypatch):
    monkeypatch.chdir(folder)
    ours = [line for line in COMMANDS if line.startswith("sam2jax ")]
    for line in ours:
        line = line.replace("--image-size 512", "--image-size 64")
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    assert len(ours) >= 6
    for name in (
        *(
            "sam2jax_demo.mp4",
            "sam2jax_demo.png",
            "out.mp4",
            "cups_masks.png",
            "found/1.png",
            "found/1.json",
        ),
        *("tracked/cups.json", "mine.pt", "davis/results.csv"),
    ):
        assert (folder / name).stat().st_size > 0
    assert len(list((folder / "masks").iterdir())) == 3


def test_other_commands_are_those_that_ci_runs_or_modules_that_exist():
    checks = (ROOT / ".ci/run").read_text()
    for line in COMMANDS:
        if line.startswith("python -m "):
            module = ROOT / line.split()[2].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
        elif not line.startswith("sam2jax "):
            assert line in checks


@pytest.mark.slow
def test_python(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(PYTHON, "README.md", "exec"), names)
    assert names["masks"].shape == (3, 2, 360, 400)
    assert names["saliency"].shape == (3, 64, 64, 3) and np.abs(names["saliency"]).max() > 0
    assert names["several"].masks.shape == (2, 3, 2, 16, 16)
    np.testing.assert_allclose(names["shares"].sum(-1)[0], 0)  # a prompted frame reads nothing
    assert (names["shares"].sum(-1)[1:] > 0.1).all()


def python_in(text: str) -> str:
    return "".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


@pytest.mark.slow
def test_the_guide_to_policies(folder, monkeypatch):
    """Its own policy reads what it says, and is short."""
    monkeypatch.chdir(folder)
    text = (ROOT / "docs/policies.md").read_text()
    code = python_in(text)
    names: dict = {}
    exec(compile(code, "docs/policies.md", "exec"), names)
    assert names["together"].shape[:3] == (3, 3, 1)
    assert names["out"].masks.shape == (3, 1, 64, 64)
    own = code[code.index("def read(") : code.index("diverse =")]
    assert len(own.splitlines()) < 60
    assert set(re.findall(r"^\| `(\w+)`", text, flags=re.MULTILINE)) == set(POLICIES)
    # Alike frames replace one another: of a still picture one is held beside the prompted one.
    still = np.repeat(names["frames"][:1], 6, axis=0)
    for threshold, held in ((-1.0, 1), (2.0, 5)):
        policy = names["diverse"].replace(settings=np.float32(threshold))
        state, _ = sam2jax.track(
            names["model"], names["params"], still, names["prompts"], policy=policy
        )
        assert int((state.bank.recent_frame >= 0).sum()) == held


@pytest.mark.slow
def test_the_guide_to_exports(folder, monkeypatch):
    monkeypatch.chdir(folder)
    text = (ROOT / "docs/export.md").read_text()
    (command,) = re.findall(r"```console\n(.*?)\n```", text)
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    names: dict = {}
    exec(compile(python_in(text), "docs/export.md", "exec"), names)
    assert names["answers"]["masks"].shape == (16, 2, 64, 64)
    np.testing.assert_allclose(names["answer"]["masks"], names["answers"]["masks"][-1], atol=1e-2)
    for file in re.findall(r"^\| `([\w.]+)`", text, flags=re.MULTILINE):
        assert (folder / "nano" / file).exists()
