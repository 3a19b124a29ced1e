"""Frames from iterators, and frames read ahead."""

import gc
import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from sam2jax.io.reader import FrameReader
from sam2jax.io.video import ArrayVideo, open_video
from tests.clips import number, picture, write_clip
from tests.conftest import ROOT


class Camera:
    """An iterator of pictures that notes how many were taken."""

    def __init__(self, length, height=48, width=64):
        self.taken, self._length, self._shape = 0, length, (height, width)

    def __iter__(self):
        return self

    def __next__(self):
        if self.taken == self._length:
            raise StopIteration
        self.taken += 1
        return picture((self.taken - 1) % 20, *self._shape)


# Iterators ---------------------------------------------------------------------------------------


def test_reaches(tmp_path):
    for video in (
        open_video(write_clip(tmp_path / "clip.mp4", 3)),
        open_video(np.zeros((3, 8, 8, 3), np.uint8)),
        open_video(Camera(3)),
    ):
        assert [video.reaches(i) for i in (0, 2, 3, 100, -1)] == [True, True, False, False, False]


def test_iterator_is_read_as_far_as_asked_for():
    camera = Camera(None)
    with open_video(camera, 32) as video:
        assert (video.height, video.width, camera.taken) == (48, 64, 1)
        assert number(video[7]) == 7 and camera.taken == 8
        assert number(video[2]) == 2 and camera.taken == 8
        assert video.reaches(3) and camera.taken == 8
        assert video.reaches(9) and camera.taken == 10
        assert [f.index for f in video.frames(8, 12)] == [8, 9, 10, 11] and camera.taken == 12
        backward = video.frames(11, 14, reverse=True, original=True)
        assert [number(f.original) for f in backward] == [13, 12, 11] and camera.taken == 14
        for index, frame in enumerate(video):  # without end
            assert number(frame) == index % 20
            assert camera.taken == max(14, index + 1)
            if index == 30:
                break


def test_iterator_that_ends():
    video = open_video(Camera(5))
    assert len(list(video)) == 5 == len(video)
    assert [number(f.image) for f in video.frames(reverse=True)] == [4, 3, 2, 1, 0]
    assert [f.index for f in video.frames(-2)] == [3, 4] and number(video[-1]) == 4
    with pytest.raises(IndexError, match="5 frames, not frame 5"):
        video[5]


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda frames: (f for f in frames)])
def test_kinds_of_iterators(kind):
    frames = [picture(i, 8, 12) for i in range(3)]
    mixed = [frames[0], Image.fromarray(frames[1]), np.asfortranarray(frames[2])]
    video = open_video(kind(mixed))
    np.testing.assert_array_equal(np.stack(list(video)), frames)
    assert (video.num_frames, video.height, video.width) == (3, 8, 12)


def test_long_iterator_is_not_held_in_memory():
    import tracemalloc

    tracemalloc.start()
    with open_video(Camera(300, 200, 200)) as video:  # 36 MB
        assert len(video) == 300 and number(video[150]) == 10
        _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6


GOOD = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    "frames,words",
    [
        ([], "the video is empty"),
        ([GOOD, np.zeros((8, 4, 3), np.uint8)], "frame 1 is 4x8 .* 8x8"),
        ([GOOD, GOOD, GOOD.astype(np.float32)], r"frame 2 must be uint8 .* float32 \[8, 8, 3\]"),
        ([GOOD[..., 0]], r"frame 0 must be uint8 .* \[8, 8\]"),
        ([GOOD[:0]], r"frame 0 must be uint8 .* \[0, 8, 3\]"),
        ([GOOD, None], "frame 1 must be uint8"),
        (["a.png"], "frame 0 must be uint8"),
        ([Image.fromarray(GOOD).convert("L")], "frame 0 is a picture of mode L"),
        ([Image.fromarray(GOOD).convert("YCbCr")], "frame 0 is a picture of mode YCbCr"),
    ],
)
def test_iterators_of_other_things_are_refused(frames, words):
    with pytest.raises(ValueError, match=words):
        list(open_video(frames))


def test_iterator_that_fails_does_not_look_as_if_it_had_ended():
    def frames():
        yield GOOD
        raise RuntimeError("unplugged")

    video = open_video(frames())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="unplugged"):
            video.reaches(1)
        with pytest.raises(RuntimeError, match="unplugged"):
            len(video)
    assert not video[0].any()


# Reading ahead -----------------------------------------------------------------------------------


class Slow(ArrayVideo):
    """Twenty frames; notes what is read and in which thread, and waits at those that are held."""

    def __init__(self, num_frames=20, side=16):
        super().__init__(np.stack([picture(i, side, side) for i in range(num_frames)]))
        self.reads, self.threads, self.held = [], set(), {}
        self.broken = set()

    def _read(self, index):
        self.reads.append(index)
        self.threads.add(threading.current_thread())
        if index in self.held:
            assert self.held[index].wait(10)
        if index in self.broken:
            raise ValueError(f"frame {index} is damaged")
        return super()._read(index)


@pytest.fixture
def slow():
    return Slow()


def test_reader_reads_ahead_in_one_thread(slow):
    reader = FrameReader(slow)
    for index in range(17):
        assert number(reader.read(index, range(index + 1, index + 4))) == index
    reader.close()  # waits for what is begun
    assert slow.reads == list(range(len(slow.reads))) and len(slow.reads) >= 17
    (thread,) = slow.threads
    assert thread is not threading.current_thread() and not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        reader.read(0)


def test_reader_works_while_nobody_waits(slow):
    reader = FrameReader(slow)
    reader.read(3, ahead=[2, 1])
    wait_until(lambda: slow.reads == [3, 2, 1])
    assert number(reader.read(1)) == 1 and slow.reads == [3, 2, 1]
    reader.close()


def test_reader_does_not_wait_for_what_is_no_longer_wanted(slow):
    reader, slow.held[1] = FrameReader(slow), threading.Event()
    reader.read(0, ahead=[1, 2, 3, 4])
    wait_until(lambda: slow.reads == [0, 1])
    threading.Timer(0.05, slow.held[1].set).start()
    assert number(reader.read(15)) == 15
    assert slow.reads == [0, 1, 15]
    assert number(reader.read(3)) == 3  # though it was given up before
    reader.close()


def test_threads_do_not_give_up_what_others_wait_for(slow):
    reader, slow.held[1] = FrameReader(slow), threading.Event()
    reader.read(0, ahead=[1])
    wait_until(lambda: slow.reads == [0, 1])
    found = {}

    def read(index):
        try:
            found[index] = number(reader.read(index))
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=read, args=(index,)) for index in (5, 12, 3, 18)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(reader._awaited) == 4)
    slow.held[1].set()
    for thread in threads:
        thread.join()
    assert found == {index: index for index in (5, 12, 3, 18)}
    assert not reader._awaited
    reader.close()


def test_who_waits_is_told_that_the_reader_is_closed(slow):
    reader, slow.held[1] = FrameReader(slow), threading.Event()
    reader.read(0, ahead=[1])
    wait_until(lambda: slow.reads == [0, 1])
    errors = []

    def read():
        try:
            reader.read(9)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: len(reader._awaited) == 1)
    threading.Timer(0.05, slow.held[1].set).start()
    reader.close()
    thread.join()
    assert errors == ["this reader is closed; make another one."]


def test_reader_keeps_few_frames(slow, monkeypatch):
    monkeypatch.setattr("sam2jax.io.reader._BUDGET", 10 * 16 * 16 * 3)
    reader = FrameReader(slow)
    for index in [*range(10), 0]:
        assert number(reader.read(index)) == index
    assert slow.reads == list(range(10))
    for index in (10, 0, 9, 2, 1):  # 1 had to go, being the one not asked for for longest
        reader.read(index)
    assert slow.reads == [*range(11), 1]
    assert not reader.read(2).flags.writeable
    reader.close()


def test_reader_raises_what_the_video_raises(slow):
    reader = FrameReader(slow)
    slow.broken = {5, 6}
    assert number(reader.read(4, ahead=[5, 100])) == 4  # neither is asked for yet
    wait_until(lambda: slow.reads == [4, 5])
    for index in (5, 6):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"frame {index} is damaged"):
                reader.read(index)
    with pytest.raises(IndexError, match="20 frames, not frame 100"):
        reader.read(100)
    slow.broken = set()
    assert [number(reader.read(index)) for index in (5, 6)] == [5, 6]
    reader.close()


def test_reader_takes_any_number_ahead(slow):
    reader = FrameReader(slow)
    assert number(reader.read(0, ahead=itertools.count(1))) == 0
    reader.close()
    assert slow.reads[0] == 0 and len(slow.reads) <= 8


def test_reader_reads_an_iterator_no_further_than_asked():
    camera = Camera(None)
    reader = FrameReader(open_video(camera))
    assert number(reader.read(2, ahead=[3, 4])) == 2
    wait_until(lambda: camera.taken == 5)
    reader.close()
    assert camera.taken == 5


def test_forgotten_reader_ends_its_thread(slow):
    reader = FrameReader(slow)
    reader.read(0)
    (thread,) = slow.threads
    del reader
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_reader_does_not_hold_up_the_end_of_the_program():
    code = """
import threading, numpy as np
from sam2jax.io.reader import FrameReader
from sam2jax.io.video import open_video
def frames():
    yield np.zeros((8, 8, 3), np.uint8)
    print("waiting", flush=True)
    threading.Event().wait()
reader = FrameReader(open_video(frames()))
reader.read(0, ahead=[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0 and done.stderr == ""


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "this did not happen within 10 s"
        time.sleep(0.001)
