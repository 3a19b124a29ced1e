"""Full disks, folders that cannot be written to, commands that are killed."""

import contextlib
import os
import pathlib
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

import sam2jax
from fuzz import seeds
from sam2jax.io.images import write_image
from sam2jax.io.masks import ArrayWriter, PaletteWriter, RunLengthWriter
from sam2jax.io.writer import VideoWriter
from tests.conftest import ROOT


def _frames(make):
    def write(path: pathlib.Path) -> None:
        rng = np.random.default_rng(0)
        with make(path) as writer:
            for i in range(40):
                if isinstance(writer, VideoWriter):
                    writer.write(rng.integers(0, 256, (64, 64, 3), np.uint8))
                else:
                    writer.write(i, f"{i:05d}", [1], rng.random((1, 64, 64)) > 0.5)

    return write


def _checkpoint(path: pathlib.Path) -> None:
    from sam2jax.convert import write

    write(path, seeds.parameters(), seeds.small_model())


def _session(path: pathlib.Path) -> None:
    predictor = seeds.session_predictor()
    state = predictor.init_state(seeds.session_video())
    state.objects[1] = sam2jax.predictors.session.ObjectHistory(
        masks={i: np.ones((32, 32), bool) for i in range(8)}
    )
    predictor.save_state(state, path)


WRITERS = {
    "a.mp4": _frames(lambda path: VideoWriter(path, None, 64, 64)),
    "a.npz": _frames(ArrayWriter),
    "a.json": _frames(RunLengthWriter),
    "pngs": _frames(PaletteWriter),
    "a.png": lambda path: write_image(
        path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    ),
    "a.safetensors": _checkpoint,
    "a.pt": _checkpoint,
    "session.npz": _session,
}


@contextlib.contextmanager
def full_disk(size: int):
    """No file of this process may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [0, 300])
def test_full_disk(tmp_path, name, size):
    WRITERS[name](tmp_path / name)  # all is well
    folder = tmp_path / "full"
    folder.mkdir()
    with full_disk(size), pytest.raises((OSError, ValueError)):
        WRITERS[name](folder / name)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "pngs"])
def test_what_was_there_stays_when_the_disk_is_full(tmp_path, name):
    (tmp_path / name).write_bytes(b"before")
    with full_disk(300), pytest.raises((OSError, ValueError)):
        WRITERS[name](tmp_path / name)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"before"


def test_of_a_link_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "a.png", tmp_path / "elsewhere" / "b.png"
    link.symlink_to(target)
    for _ in range(2):  # at first it leads nowhere
        WRITERS["a.png"](link)
        assert link.is_symlink() and target.stat().st_size > 0
    assert os.listdir(tmp_path / "elsewhere") == ["b.png"]


def test_devices_and_pipes_are_left_alone(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png is a device or a pipe"):
        WRITERS["a.png"](tmp_path / "a.png")
    assert (tmp_path / "a.png").is_fifo() and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that none can write to")
@pytest.mark.parametrize("name", WRITERS)
def test_folder_that_cannot_be_written_to(name):
    with pytest.raises((OSError, ValueError)):
        WRITERS[name](pathlib.Path("/proc/self") / name)


@pytest.mark.slow
def test_a_killed_conversion_comes_back():
    """Tracking is killed in test_track_all.py, training in test_training_runs.py."""
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.kills", "convert", "--times", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("| convert |")
