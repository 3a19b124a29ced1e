"""Many videos: shared out, batched and resumed, with the masks of each alone."""

import gc
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from sam2jax.cli.batch import CHUNK
from sam2jax.cli.plan import (
    Shape,
    Task,
    find_process,
    make_batches,
    read_list,
    read_table,
    shape_of,
    share,
)
from sam2jax.cli.prompts import read_prompts
from sam2jax.io.masks import RunLengthWriter
from sam2jax.io.writer import VideoWriter
from tests.clips import write_clip, write_folder
from tests.test_cli import commands_in_an_empty_folder, write_checkpoint

LENGTHS = {"a": 5, "b": CHUNK + 3, "c": 7, "d": CHUNK}  # ragged; some take several chunks
LATER = [
    {"points": [[30, 20]], "frame": 1},
    {"object": 2, "box": [5, 5, 30, 40], "frame": 1},
    {"points": [[32, 24], [50, 40]], "labels": [1, 0], "frame": 4},
    {"object": 3, "frame": 2, "mask": "mask.png"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    return commands_in_an_empty_folder(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
    """Files and a folder of frames, of two sizes; one has prompts of its own beside it."""
    folder = tmp_path_factory.mktemp("videos")
    for name, length in LENGTHS.items():
        write_clip(folder / f"{name}.mp4", length, noise=name != "a")
    write_folder(folder / "e.1", [f"{i}.png" for i in range(6)], height=40)
    (folder / "c.json").write_text(json.dumps(LATER))
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:50] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def film(path: pathlib.Path, length: int, height: int = 48, width: int = 64) -> pathlib.Path:
    """A bright square that wanders over noise, however long."""
    noise = np.random.default_rng(0).integers(0, 90, (8, height, width, 3), np.uint8)
    with VideoWriter(path, 25, height, width) as writer:
        for index in range(length):
            frame = noise[index % 8].copy()
            left = index % (width // 2)
            frame[height // 4 : 3 * height // 4, left : left + width // 3] += 150
            writer.write(frame)
    return path


def read(path: pathlib.Path) -> list[dict]:
    return json.loads(path.read_text())


def results(folder: pathlib.Path) -> dict[str, list[dict]]:
    return {path.stem: read(path) for path in sorted(folder.glob("[!.]*.json"))}


def assert_same_masks(found: list[dict], expected: list[dict]) -> None:
    """The same objects on the same frames, and masks up to rounding at their edges."""
    from pycocotools import mask as coco

    def label(row: dict) -> tuple:
        return row["image_id"], row["file_name"], row["category_id"], row["segmentation"]["size"]

    assert list(map(label, found)) == list(map(label, expected))
    for one, other in zip(found, expected, strict=True):
        ours, theirs = (coco.decode(row["segmentation"]) for row in (one, other))
        assert np.mean(ours != theirs) < 2e-3
    assert any(0 < row["area"] < np.prod(row["segmentation"]["size"]) for row in expected)


# What is to be done ------------------------------------------------------------------------------


def test_lists_and_folders(tmp_path):
    (tmp_path / "v").mkdir()
    lines = [
        "v/a.mp4",
        "",
        '{"video": "v/b.mkv", "prompts": [{"points": [[1, 2]]}]}',
        '{"video": "v/a.mp4", "name": "again", "prompts": "v/p.json"}',
    ]
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines))
    a, b, again = read_list(path)
    assert a == Task("a", tmp_path / "v/a.mp4", None, tmp_path)
    assert (b.name, b.prompts) == ("b", [{"points": [[1, 2]]}])
    assert (again.name, again.prompts) == ("again", tmp_path / "v/p.json")
    assert again.folder == tmp_path / "v"
    (tmp_path / "home.txt").write_text("~/v/a.mp4")
    assert read_list(tmp_path / "home.txt")[0].video == pathlib.Path.home() / "v/a.mp4"
    for name in ("b.MOV", "a.mp4", "a.json", "a.png", ".hidden.mp4"):
        (tmp_path / "v" / name).touch()
    (tmp_path / "v/c.2").mkdir()
    assert [task.name for task in read_list(tmp_path / "v")] == ["a", "b", "c.2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no video"),
        ('{"video": 3}', "line 1: expected a path"),
        ('{"video": "a.mp4", "color": 1}', "line 1: expected a path"),
        ('a.mp4\n{"video"', "line 2"),
        ("v/a.mp4\nw/a.mkv", "both be written as a"),
        ('{"video": "a.mp4", "name": "../a"}', "without a folder"),
        ('{"video": "a.mp4", "name": ".a"}', "without a folder"),
    ],
)
def test_lists_that_are_refused(tmp_path, text, words):
    (tmp_path / "list").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_list(tmp_path / "list")
    with pytest.raises(FileNotFoundError, match="no list or folder"):
        read_list(tmp_path / "other")


def test_prompts_of_a_video_come_from_the_nearest_place(tmp_path):
    common = read_prompts(["1,1"])
    task = Task("x", tmp_path / "v.mp4", None, tmp_path)
    assert read_table(task, common) is common
    (tmp_path / "v.json").write_text('[{"points": [[2, 2]]}]')
    assert read_table(task, common).frames[0][1].points == [(2, 2)]
    listed = task._replace(prompts=[{"frame": 3, "mask": "m.png"}])
    assert read_table(listed, common).frames[3][1].mask == tmp_path / "m.png"
    with pytest.raises(ValueError, match="its prompts, entry 0"):
        read_table(task._replace(prompts=[{}]), common)
    with pytest.raises(ValueError, match="no prompt"):
        read_table(task._replace(video=tmp_path / "w.mp4"), None)


SLURM = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}
POD = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c"}
SLICES = {**POD, "MEGASCALE_SLICE_ID": "1", "MEGASCALE_NUM_SLICES": "2"}
JOB = {"JOB_COMPLETION_INDEX": "3"}


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, (None, None), (0, 1)),
        ({}, (1, 3), (1, 3)),
        (SLURM, (None, None), (2, 4)),
        (SLURM, (0, 2), (0, 2)),
        (POD, (None, None), (1, 3)),
        ({**SLICES, **JOB}, (None, None), (4, 6)),
        (JOB, (None, 5), (3, 5)),
        ({}, (None, 5), "--process-id is missing"),
        (JOB, (None, None), "--num-processes is missing"),
        (SLURM, (1, None), "--num-processes is missing"),
        ({}, (5, 5), "numbered 0 to N-1"),
        ({**SLURM, "SLURM_PROCID": "x"}, (None, None), "expected a number"),
    ],
)
def test_which_process_this_is(environment, given, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            find_process(environment, *given)
    else:
        assert find_process(environment, *given) == expected


def test_every_video_is_in_one_share():
    tasks = [Task(str(i), pathlib.Path(f"{i}.mp4"), None, pathlib.Path()) for i in range(11)]
    shares = [share(tasks, index, 4) for index in range(4)]
    assert sorted(sum(shares, []), key=lambda task: int(task.name)) == tasks
    assert {len(part) for part in shares} == {2, 3}


def test_videos_that_are_alike_go_together():
    one, two = read_prompts(["1,1"]), read_prompts(["1,1", "2,2,0@2:3", "1,2@3:5"])
    assert shape_of(one, 33, 48, 64) == Shape(48, 64, 64, 1, 1, 1, False)
    assert shape_of(two, 32, 48, 64) == Shape(48, 64, 32, 4, 1, 4, False)
    names = [(one, 20), (two, 20), (one, 31), (one, 18), (one, 40), (one, 30)]
    measured = [
        (Task(str(i), pathlib.Path(), None, pathlib.Path()), shape_of(table, frames, 4, 4), frames)
        for i, (table, frames) in enumerate(names)
    ]
    batches = make_batches(measured, 2)
    assert [[task.name for task in tasks] for _, tasks in batches] == [
        ["3", "0"],
        ["5", "2"],
        ["1"],
        ["4"],
    ]


# Whole runs --------------------------------------------------------------------------------------


def link(videos: pathlib.Path, folder: pathlib.Path, *names: str) -> pathlib.Path:
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(videos / name)
    return folder


def test_failures_are_told_and_tried_again(run, checkpoint, videos, tmp_path):
    folder = link(videos, tmp_path / "videos", "a.mp4", "d.mp4")
    whole = (videos / "b.mp4").read_bytes()
    (folder / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    options = "--checkpoint", checkpoint, "--point", "32,24", "--out", "out", "-q"
    done = run("track-all", folder, *options)
    assert done.exit_code == 1
    assert "error: broken: " in done.output and "1 of 3 videos failed" in done.output
    assert {name: len(rows) for name, rows in results(pathlib.Path("out")).items()} == {
        "a": LENGTHS["a"],
        "d": LENGTHS["d"],
    }
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path("out").iterdir()}
    (folder / "broken.mp4").write_bytes(whole)
    again = run("track-all", folder, *options)
    assert again.exit_code == 0 and "1 of its 3 videos" in again.output
    assert len(read(pathlib.Path("out/broken.json"))) == LENGTHS["b"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(os.listdir("out")) == 3


@pytest.mark.slow
def test_masks_are_those_of_each_video_alone(run, checkpoint, videos):
    """Ragged lengths, two sizes, later prompts, and masks."""
    given = "--checkpoint", checkpoint, "--point", "32,24", "-q"
    done = run("track-all", videos, "--out", "out", *given)
    assert done.exit_code == 0, done.output
    found = results(pathlib.Path("out"))
    assert sorted(found) == ["a", "b", "c", "d", "e.1"]
    for name in found:
        source = videos / name if name == "e.1" else videos / f"{name}.mp4"
        prompts = ("--prompts", videos / "c.json") if name == "c" else given[2:4]
        alone = f"{name}.json"
        result = run("track", source, *given[:2], *prompts, "--masks", alone, "-q")
        assert result.exit_code == 0, result.output
        assert_same_masks(found[name], read(pathlib.Path(alone)))


@pytest.mark.slow
def test_a_video_that_breaks_midway_leaves_the_others_alone(
    run, checkpoint, videos, tmp_path, monkeypatch
):
    from sam2jax.io import container

    decode, count = container.ContainerVideo._decode, []

    def failing(self):
        if self.name.endswith("b.mp4") and self._next == CHUNK + 1:
            count.append(self._next)
            raise self._damaged()
        return decode(self)

    paths = tmp_path / "list"
    paths.write_text("\n".join(str(videos / f"{name}.mp4") for name in "bd"))
    options = "--checkpoint", checkpoint, "--point", "32,24", "--out", "out", "-q"
    with monkeypatch.context() as patch:
        patch.setattr(container.ContainerVideo, "_decode", failing)
        done = run("track-all", paths, *options)
    assert done.exit_code == 1 and f"b: {videos / 'b.mp4'} is damaged" in done.output
    assert count and os.listdir("out") == ["d.json"]
    with monkeypatch.context() as patch:
        patch.setattr(RunLengthWriter, "write", _no_space)
        full = run("track-all", paths, *options)
    assert full.exit_code == 1 and "b: [Errno 28]" in full.output
    assert os.listdir("out") == ["d.json"]


def _no_space(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_processes_together_do_what_one_does(run, checkpoint, videos):
    options = "--checkpoint", checkpoint, "--point", "32,24", "-q"
    alone = run("track-all", videos, "--out", "one", *options)
    assert alone.exit_code == 0, alone.output
    for index in (2, 0, 1):
        share = "--process-id", index, "--num-processes", 3
        result = run("track-all", videos, "--out", "three", *share, *options)
        assert result.exit_code == 0, result.output
        assert f"process {index} of 3" in result.output
    expected, found = results(pathlib.Path("one")), results(pathlib.Path("three"))
    assert sorted(found) == sorted(expected) and len(found) == 5
    for name in found:
        assert_same_masks(found[name], expected[name])
    for masks, name in (("png", "a"), ("npz", "a.npz")):
        result = run("track-all", videos, "--out", masks, "--masks", masks, *options)
        assert result.exit_code == 0 and (pathlib.Path(masks) / name).exists()
    labels = np.asarray(Image.open("png/a/00004.png"))
    with np.load("npz/a.npz") as stored:
        np.testing.assert_array_equal(stored["00004"][0], labels == 1)


def test_what_is_refused(run, checkpoint, videos, tmp_path):
    options = "--checkpoint", checkpoint, "--out"
    task = {"video": str(videos / "a.mp4"), "prompts": "prompts/a.json"}
    (tmp_path / "list.txt").write_text(json.dumps(task))
    result = run("track-all", tmp_path / "list.txt", *options, tmp_path / "prompts")
    assert result.exit_code == 2 and "holds videos or prompts of the list" in result.output
    for out, more, words in (
        (videos, (), "holds videos or prompts of the list"),
        ("out", ("--num-processes", 2), "--process-id is missing"),
        ("out", ("--point", "1"), "expected X,Y"),
    ):
        result = run("track-all", videos, *options, out, *more)
        assert result.exit_code == 2 and words in result.output
    assert os.listdir() == []


# Killed ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_loses_nothing_and_does_nothing_twice(checkpoint, tmp_path):
    """Killed at any moment: while it starts, decodes, tracks, or writes."""
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    film(folder / "0.mp4", 4 * CHUNK)
    for index in range(1, 12):  # copies: encoders do not always take the same bits
        shutil.copy(folder / "0.mp4", folder / f"{index}.mp4")
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "2"}
    environment = {**os.environ, **quick, "SAM2JAX_CACHE": str(tmp_path / "cache")}

    def start() -> subprocess.Popen:
        command = [sys.executable, "-m", "sam2jax", "track-all", folder, "--out", out, "-q"]
        command += ["--checkpoint", checkpoint, "--point", "32,24"]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    done: dict[pathlib.Path, tuple[int, int]] = {}
    rng = np.random.default_rng(0)
    for kill in range(3):
        process = start()
        while process.poll() is None and len(list(out.glob("[!.]*"))) <= len(done):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5) if kill else 0)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path, stamp in done.items():
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == stamp  # not done again
        for path in out.glob("[!.]*"):
            assert len(read(path)) == 4 * CHUNK  # whole
            done[path] = path.stat().st_ino, path.stat().st_mtime_ns
    assert 0 < len(done) < 12
    _, told = (process := start()).communicate(timeout=300)
    assert process.returncode == 0, told
    assert f"{12 - len(done)} of its 12 videos" in told
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{i}.json" for i in range(12))
    for path, stamp in done.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == stamp
    same = [[row["segmentation"] for row in rows] for rows in results(out).values()]
    assert all(rows == same[0] for rows in same)


# Long --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("command", ["track", "track-all"])
def test_memory_does_not_grow_with_the_video(run, checkpoint, tmp_path, monkeypatch, command):
    """Masks or frames that were kept would be 50 MiB and more between the two looks."""
    height, width, looks = 144, 192, (1000, 3000)
    (tmp_path / "films").mkdir()
    path = film(tmp_path / "films/long.mp4", looks[1], height, width)
    write, seen = RunLengthWriter.write, {}

    def watched(self, index, *rest):
        write(self, index, *rest)
        if index + 1 in looks:
            gc.collect()
            seen[index + 1] = resident(), sum(array.nbytes for array in jax.live_arrays())

    monkeypatch.setattr(RunLengthWriter, "write", watched)
    given = "--checkpoint", checkpoint, "--point", "60,70", "-q"
    if command == "track":
        result = run("track", path, "--masks", "long.json", *given)
    else:
        result = run("track-all", path.parent, "--out", ".", *given)
    assert result.exit_code == 0, result.output
    assert len(read(pathlib.Path("long.json"))) == looks[1]
    (host, device), (host_later, device_later) = (seen[look] for look in looks)
    assert (looks[1] - looks[0]) * height * width > 50 * 2**20
    assert host_later - host < 16 * 2**20
    assert device_later < device + 2**20


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
