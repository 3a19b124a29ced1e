"""Frames of unknown number: iterators, reading ahead, and live streams."""

import numpy as np
import pytest
from PIL import Image

from sam2jax.io.video import open_video
from tests.clips import number, picture, write_clip


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
