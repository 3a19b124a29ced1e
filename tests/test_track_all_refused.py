"""Many videos: what is refused, and videos that end early, break, or are left halfway."""

import contextlib
import os
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sam2jax.cli import batch
from sam2jax.cli.plan import Shape, Task, read_list
from sam2jax.cli.prompts import read_prompts
from sam2jax.io.masks import RunLengthWriter
from sam2jax.io.video import ArrayVideo
from tests.test_cli import commands_in_an_empty_folder

SIZE = 8
FRAMES = np.zeros((6, SIZE, SIZE, 3), np.uint8)


class SlowVideo(ArrayVideo):
    """Takes its time over each frame, and must not be closed meanwhile."""

    def __init__(self, held: int = len(FRAMES)):
        super().__init__(FRAMES)
        self.held = held  # frames that can be decoded
        self.reading = self.closed = self.torn = False

    def _read(self, index):
        assert not self.closed
        if index >= self.held:
            raise IndexError(index)
        self.reading = True
        time.sleep(0.05 if index else 0)
        self.reading = False
        return FRAMES[index]

    def close(self):
        self.torn |= self.reading
        self.closed = True


class FakeTracker:
    """Answers nothing but empty masks; breaks at a call."""

    num_videos = 1

    def __init__(self, breaks: int | None = None):
        self.calls, self.breaks = 0, breaks

    def start(self, shape, slots):
        return None, None

    def advance(self, states, chunks, prompts):
        if self.calls == self.breaks:
            raise RuntimeError("out of memory")
        self.calls += 1
        return None, -np.ones((1, 2, 1, 4, 4), np.float32)


@pytest.fixture
def job(tmp_path):
    model = types.SimpleNamespace(config=types.SimpleNamespace(image_size=SIZE))
    common = read_prompts(["1,1"])
    return batch.Job(model, None, None, tmp_path, "json", common, chunk=2)


@pytest.fixture
def opened(monkeypatch):
    """The videos that were opened, all of them slow."""
    videos = []

    def open_video(path, size=None):
        videos.append(SlowVideo())
        return videos[-1]

    monkeypatch.setattr(batch, "open_video", open_video)
    return videos


def task(tmp_path, name: str, *frames: int) -> Task:
    prompts = [{"points": [[1, 1]], "frame": frame} for frame in frames] or None
    return Task(name, tmp_path / f"{name}.mp4", prompts, tmp_path)


@pytest.mark.parametrize("what", ["device", "disk"])
def test_no_video_is_closed_while_it_is_decoded(job, opened, monkeypatch, what):
    """Whatever breaks, a thread may be at the chunk behind."""

    def no_space(*_):
        raise OSError(28, "No space left on device")

    if what == "disk":
        monkeypatch.setattr(RunLengthWriter, "write", no_space)
    tracker = FakeTracker(breaks=0 if what == "device" else None)
    with ThreadPoolExecutor(2) as pool:
        slot = batch._Slot(job, task(job.out, "a"))
        shape = Shape(SIZE, SIZE, 8, 1, 1, 1, False)
        (outcome,) = batch._run(tracker, shape, [slot], pool)
    (video,) = opened
    assert ("No space" if what == "disk" else "out of memory") in outcome.problem
    assert video.closed and not video.torn
    assert slot.begun == slot.prompted_later == []
    assert os.listdir(job.out) == []


def test_a_run_that_is_left_closes_its_videos(job, opened, monkeypatch):
    """Also those that were opened ahead, and one that is half written."""
    monkeypatch.setattr(batch, "Tracker", lambda job: FakeTracker())
    tasks = [task(job.out, name) for name in "abcd"]
    with contextlib.closing(batch.track_all(job, tasks)) as outcomes:
        assert next(outcomes) == batch.Outcome("a", None)
    assert len(opened) > len(tasks) + 1  # looked into, and two opened once more
    assert all(video.closed and not video.torn for video in opened)
    assert os.listdir(job.out) == ["a.json"]

    write = RunLengthWriter.write

    def stopped(self, index, *rest):
        write(self, index, *rest)
        if index == 3:
            raise SystemExit(143)

    monkeypatch.setattr(RunLengthWriter, "write", stopped)
    opened.clear()
    with pytest.raises(SystemExit):
        list(batch.track_all(job, tasks[1:]))
    assert opened and all(video.closed and not video.torn for video in opened)
    assert os.listdir(job.out) == ["a.json"]


@pytest.mark.parametrize(("held", "frame"), [(3, 3), (4, 5)])
def test_a_prompt_behind_the_last_frame_is_told(job, monkeypatch, held, frame):
    """Headers may promise more frames than there are."""
    video = SlowVideo(held)
    monkeypatch.setattr(batch, "open_video", lambda *_: video)
    for frames in ((frame,), (0, frame)):
        with pytest.raises(ValueError, match=f"there is a prompt on frame {frame}, but .* ends"):
            batch._Slot(job, task(job.out, "a", *frames))
        assert video.closed
        video.closed = False


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"video": "a.mp4", "name": ""}', "line 1: the name '' must"),
        ('{"video": ' + "[" * 100_000, "line 1: "),
    ],
)
def test_lists_that_are_refused(tmp_path, line, words):
    (tmp_path / "list").write_text(line)
    with pytest.raises(ValueError, match=words):
        read_list(tmp_path / "list")


def test_what_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    run = commands_in_an_empty_folder(tmp_path, monkeypatch)
    videos = tmp_path / "videos"
    (videos / "frames").mkdir(parents=True)
    given = "track-all", videos, "--checkpoint", "none.pt", "--out"
    for out, more, words in (
        (videos / "out", (), "is inside of"),
        (videos / "new" / "out", (), "is inside of"),
        ("out", ("--policy", "none"), "there is no policy 'none'"),
    ):
        result = run(*given, out, *more)
        assert result.exit_code == 2 and words in result.output
    assert os.listdir(videos) == ["frames"] and os.listdir() == []
