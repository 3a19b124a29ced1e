"""`sam2jax demo`: the model that ships, on a clip that is drawn."""

import os
import pathlib
import re
import socket

import jax
import numpy as np
import pytest
from PIL import Image

import sam2jax
from sam2jax.config import NANO, VARIANTS
from sam2jax.io.checkpoints import WEIGHTS
from sam2jax.io.drawing import color
from sam2jax.io.sheet import Cell, contact_sheet
from sam2jax.io.video import open_video
from tests.test_cli import commands_in_an_empty_folder


@pytest.fixture
def command(tmp_path, monkeypatch):
    return commands_in_an_empty_folder(tmp_path, monkeypatch)


def test_the_model_that_ships():
    model, params = sam2jax.load(NANO.name)
    assert model.config == NANO == VARIANTS[NANO.name]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 1e6 < count < 2e6
    assert (WEIGHTS / f"{NANO.name}.safetensors").stat().st_size < 6e6


@pytest.mark.optimised
def test_demo(command, monkeypatch):
    def offline(*_):
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", offline)
    result = command("demo", "--out", "new/folder")
    assert result.exit_code == 0, result.output
    monkeypatch.chdir("new/folder")
    assert sorted(os.listdir()) == ["sam2jax_demo.mp4", "sam2jax_demo.png"]
    score, told, hidden = re.search(
        r"J&F (\d\.\d+) over 3 objects, one click each; (\d+) of (\d+) hidden", result.output
    ).groups()
    assert float(score) > 0.6 and int(hidden) >= 8 and int(told) > int(hidden) / 2
    assert re.search(r"\d+\.\d frames/s", result.output)
    frames = list(open_video("sam2jax_demo.mp4"))
    assert len(frames) == 32 and frames[0].shape == (512, 512, 3)
    sheet = np.asarray(Image.open("sam2jax_demo.png"))
    assert sheet.shape[1] > 4 * 256 and (sheet == color(1)).all(-1).any()


def test_what_demo_refuses(command):
    pathlib.Path("file").touch()
    for given, message in (
        (["--out", "file/out"], "file"),
        (["--checkpoint", "missing.pt"], "missing.pt"),
        (["--seed", "-1"], "seed"),
    ):
        result = command("demo", *given)
        assert result.exit_code == 2 and message in result.output, result.output
    assert os.listdir() == ["file"]


def test_a_sheet_marks_what_is_hidden():
    picture = np.full((40, 160, 3), 200, np.uint8)
    cells = [Cell(picture, f"frame {i}", [False, i == 2]) for i in range(3)]
    sheet = contact_sheet("title", cells, [1, 2], columns=2)
    rows = np.flatnonzero((sheet == 200).all(-1).sum(1) >= 160)
    assert len(rows) == 2 * 40  # two rows of pictures
    first, last = (np.s_[: rows[39] + 20], np.s_[rows[79] :])
    seen, hidden = ((sheet[part] == color(2)).all(-1).sum() for part in (first, last))
    assert seen > 2 * hidden > 0  # two dots, and a ring
    assert (sheet[last] == color(1)).all(-1).any()
