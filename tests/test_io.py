"""Frames and pictures in: the official bytes, in any order, and what is refused."""

import errno
import gc
import glob
import hashlib
import os

import av
import numpy as np
import pytest
from PIL import Image

from sam2jax.io import container
from sam2jax.io.images import list_frames, list_images, read_image, read_mask
from sam2jax.io.masks import davis_palette
from sam2jax.io.reader import FrameReader
from sam2jax.io.video import open_video
from tests.clips import number, picture, write_clip, write_folder

FORWARD = list(range(12))

# Digests of frames 0, 37 and 199 of bedroom.mp4 as decord 0.6.0, the official decoder, gives them.
DECORD = {
    256: ("2d6f6fd1732707f5", "e28af93c39f2d4d5", "e77bf6c25d12529d"),
    1024: ("530a459bc32a391d", "3c48998f8599be38", "b5542b29a52ae285"),
}

CLIPS = {
    "clip.mp4": {},
    "clip.mkv": {},
    "clip.ts": {},
    "clip.h264": {},
    "clip.avi": {"codec": "mpeg4"},
    "order.avi": {},
    "clip.webm": {"codec": "libvpx-vp9"},
    "sound.mp4": {"audio": True},
    "open.mp4": {"options": {"x264-params": "open-gop=1"}},
    "one_key.mp4": {"gop": 100},
}


def digest(frame):
    return hashlib.sha256(frame.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", CLIPS)
def test_containers_in_any_order(tmp_path, name, monkeypatch):
    monkeypatch.setattr(container, "_BUDGET", 0)  # the fewest frames are kept
    with open_video(write_clip(tmp_path / name, **CLIPS[name]), 32) as video:
        assert (len(video), video.height, video.width, video.fps) == (12, 48, 64, 25)
        assert [number(frame) for frame in video] == FORWARD
        backward = []
        for frame in video.frames(reverse=True, original=True):
            assert frame.image.shape == (32, 32, 3) and frame.image.dtype == np.uint8
            assert frame.original.shape == (48, 64, 3)
            assert number(frame.original) == number(frame.image) == frame.index
            assert len(video._kept) <= 8
            backward.append(frame.index)
        assert backward == FORWARD[::-1]
        for index in (7, 3, 3, 11, 0, 8, -1):
            assert number(video[index]) == index % 12
        assert [frame.index for frame in video.frames(4, 7)] == [4, 5, 6]
        with pytest.raises(IndexError, match="12 frames"):
            video[12]


def test_backward_run_does_not_decode_everything_for_every_frame(tmp_path):
    video = open_video(write_clip(tmp_path / "clip.mp4", 20, gop=5), 32)
    decoded, decode = [], video._decode
    video._decode = lambda: decoded.append(1) or decode()
    assert [number(f.image) for f in video.frames(3, 20, reverse=True)] == list(range(3, 20))[::-1]
    assert len(decoded) <= 20  # each group of five once


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_uneven_frame_times(tmp_path, name):
    times = [0, 1, 5, 6, 7, 20, 21, 22, 30, 31, 40, 41]
    video = open_video(write_clip(tmp_path / name, times=times), 32)
    assert [number(frame) for frame in video] == FORWARD
    assert number(video[6]) == 6
    np.testing.assert_allclose(float(video.fps), 25 * 11 / 41, rtol=1e-2)


def test_video_from_bytes(tmp_path):
    data = write_clip(tmp_path / "clip.mp4").read_bytes()
    assert [number(frame) for frame in open_video(data, 32)] == FORWARD


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "2024-05-01T10:30.mp4")
    assert [number(frame) for frame in open_video("2024-05-01T10:30.mp4", 32)] == FORWARD


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path, rotation):
    plain = open_video(write_clip(tmp_path / "plain.mp4"), 32)
    turned = open_video(write_clip(tmp_path / "turned.mp4", rotation=rotation), 32)
    expected = np.rot90(plain[3], rotation // 90)
    (original,) = (f.original for f in turned.frames(3, 4, original=True))
    assert (turned.height, turned.width) == ((64, 48) if rotation % 180 else (48, 64))
    assert original.shape == (turned.height, turned.width, 3)
    # Two scalers disagree along the dark corner's edge only.
    wrong = np.abs(turned[3].astype(int) - expected).max(-1) > 8
    assert wrong.mean() < 0.1
    corners = {90: (-1, 0), 180: (-1, -1), 270: (0, -1)}[rotation]
    assert turned[3][corners].max() < 20 and original[corners].max() < 20


def test_recording_that_starts_between_key_frames(tmp_path):
    data = write_clip(tmp_path / "clip.ts", 12, gop=5).read_bytes()
    packets = [data[i : i + 188] for i in range(0, len(data), 188)]
    # Tables first, then from the third picture of the first group on.
    (tmp_path / "cut.ts").write_bytes(b"".join(packets[:3] + packets[6:]))
    video = open_video(tmp_path / "cut.ts", 32)
    forward = [number(frame) for frame in video]
    assert forward == list(range(forward[0], 12)) and len(video) == len(forward) < 12
    assert [number(f.image) for f in video.frames(reverse=True)] == forward[::-1]


def test_times_that_repeat_are_not_used(tmp_path):
    data = write_clip(tmp_path / "clip.ts").read_bytes()
    (tmp_path / "twice.ts").write_bytes(data + data)
    video = open_video(tmp_path / "twice.ts", 32)
    assert [number(frame) for frame in video] == FORWARD + FORWARD
    assert [number(f.image) for f in video.frames(reverse=True)] == (FORWARD + FORWARD)[::-1]


def test_a_file_that_ends_early_is_shorter(tmp_path):
    video = open_video(write_clip(tmp_path / "clip.mp4"), 32)
    video.num_frames = 15  # as if three packets gave no picture
    assert [f.index for f in video.frames()] == FORWARD
    assert len(video) == 12


@pytest.mark.parametrize("size", sorted(DECORD))
def test_mp4_equals_the_official_decoder(media, size):
    with open_video(media / "bedroom.mp4", size) as video:
        assert len(video) == 200
        assert tuple(digest(video[i]) for i in (0, 37, 199)) == DECORD[size]


def test_original_size_equals_ffmpeg(media):
    with open_video(media / "bedroom.mp4") as video, av.open(str(media / "bedroom.mp4")) as film:
        expected = next(film.decode(video=0)).to_ndarray(format="rgb24")
        np.testing.assert_array_equal(video[0], expected)


def test_folder_equals_the_official_loader(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "00000.jpg")
    video = open_video(tmp_path, 32)
    expected = Image.open(tmp_path / "00000.jpg").convert("RGB").resize((32, 32))
    np.testing.assert_array_equal(video[0], np.asarray(expected))
    (frame,) = video.frames(original=True)
    assert frame.original.shape == (48, 64, 3)
    np.testing.assert_array_equal(frame.original, read_image(tmp_path / "00000.jpg"))


@pytest.mark.parametrize(
    "names",
    [
        ["1.jpg", "2.JPG", "10.JPEG", "0011.jpg"],
        ["shot2.png", "shot10.png", "shot10b.png"],
        ["a.png", "a-1.png", "b.png"][1:] + ["c.png"],
    ],
)
def test_folder_order(tmp_path, names):
    folder = write_folder(tmp_path / "frames", names)
    for other in ("notes.txt", "._1.png", "masks.npz"):
        (folder / other).write_bytes(b"not a frame")
    assert [path.name for path in list_frames(folder)] == names
    video = open_video(folder, 32)
    assert [number(frame) for frame in video] == list(range(len(names)))
    assert [number(f.image) for f in video.frames(reverse=True)] == list(range(len(names)))[::-1]
    assert video.frame_name(1) == names[1].rsplit(".", 1)[0]


def test_masks_beside_frames_are_no_frames(tmp_path):
    """As officially: where there are JPEG files, PNG files are something else."""
    folder = write_folder(tmp_path / "frames", ["0.jpg", "1.jpg"])
    write_folder(tmp_path / "masks", ["1.png", "mask.png"])
    for path in (tmp_path / "masks").iterdir():
        path.rename(folder / path.name)
    assert len(open_video(folder)) == 2
    assert [path.name for path in list_frames(folder)] == ["0.jpg", "1.jpg"]
    with pytest.raises(ValueError, match="more than one file for frame 1"):
        list_images(folder)


def test_single_picture_is_a_clip_of_one_frame(tmp_path):
    write_folder(tmp_path, ["only.png"])
    assert len(open_video(tmp_path / "only.png", 32)) == 1


def test_greys_of_16_bits_become_8(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(8, 32)
    Image.fromarray(grey).save(tmp_path / "8.png")
    for name in ("16.png", "16.tiff"):
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / name)
        np.testing.assert_array_equal(
            read_image(tmp_path / name), read_image(tmp_path / "8.png"), name
        )


def test_array_is_passed_through():
    frames = np.stack([picture(i, 48, 64) for i in range(3)])
    video = open_video(frames, 32)
    assert (len(video), video.height, video.width) == (3, 48, 64)
    np.testing.assert_array_equal(np.stack(list(video)), frames)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), "u1")]
)
def test_array_of_another_kind_is_refused(array):
    with pytest.raises(ValueError, match="uint8|empty"):
        open_video(array)


def broken_videos(folder):
    """(name, what the message says) of files that are no whole videos."""
    good = write_clip(folder / "good.mp4").read_bytes()
    options = {"movflags": "+faststart"}
    fast = write_clip(folder / "fast.mp4", noise=True, options=options).read_bytes()
    film = write_clip(folder / "good.mkv", noise=True).read_bytes()
    files = {
        "empty.mp4": (b"", "is empty"),
        "text.mp4": (b"hello, this is no video\n" * 50, "not a video"),
        "notes.txt": (b"hello, this is no video\n" * 50, "no video"),
        "half.mp4": (good[: len(good) // 2], "not a video"),
        "half_fast.mp4": (fast[: len(fast) // 2], "truncated"),
        "half.mkv": (film[: len(film) // 2], "truncated"),
        "damaged.mp4": (damage(fast), "damaged"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: message for name, (_, message) in files.items()}


def damage(data):
    middle = len(data) * 2 // 3
    return data[:middle] + bytes(3000) + data[middle + 3000 :]


def test_broken_videos_are_refused(tmp_path):
    for name, message in broken_videos(tmp_path).items():
        with pytest.raises(ValueError, match=message) as error:
            for _ in open_video(tmp_path / name, 32):
                pass
        assert name in str(error.value) and str(error.value).count("\n") < 2


def test_a_damaged_frame_is_told_as_often_as_it_is_asked_for(tmp_path):
    """And what comes before it can be read again."""
    broken_videos(tmp_path)
    with open_video(tmp_path / "damaged.mp4") as video:
        total, read = len(video), []
        with pytest.raises(ValueError, match="damaged at frame"):
            for frame in video:
                read.append(frame)
        for _ in range(2):
            with pytest.raises(ValueError, match="damaged at frame"):
                [video[i] for i in range(total)]
        assert len(video) == total > len(read) > 0
        np.testing.assert_array_equal([video[i] for i in range(len(read))], read)


def test_a_closed_video_says_so(tmp_path):
    with open_video(write_clip(tmp_path / "clip.mp4")) as video:
        reader = FrameReader(video)
        assert number(reader.read(0, ahead=range(1, 6))) == 0
    for read in (video.__getitem__, FrameReader(video).read):
        with pytest.raises(ValueError, match="closed"):
            read(11)


def test_a_forgotten_video_closes_its_file(tmp_path):
    """At once, though FFmpeg's objects know each other."""
    path = write_clip(tmp_path / "clip.mp4")

    def held():
        links = [os.path.realpath(link) for link in glob.glob("/proc/self/fd/*")]
        return links.count(str(path.resolve()))

    gc.collect()
    gc.disable()
    try:
        video = open_video(path)
        video[3]
        assert held() == 1 or not os.path.isdir("/proc/self/fd")
        del video
        assert held() == 0
    finally:
        gc.enable()


def test_too_many_open_files_are_not_the_video_s_fault(tmp_path, monkeypatch):
    def full(*_, **__):
        raise av.error.OSError(errno.EMFILE, "Too many open files", "a.mp4")

    path = write_clip(tmp_path / "clip.mp4")
    monkeypatch.setattr(av, "open", full)
    with pytest.raises(OSError, match="Too many open files: '.*clip.mp4'"):
        open_video(path)


def test_readers_may_share_a_video(tmp_path):
    video = open_video(write_clip(tmp_path / "clip.mp4"), 32)
    readers = FrameReader(video), FrameReader(video)
    for i in range(12):
        there, back = readers[0].read(i, (i + 1,)), readers[1].read(11 - i, (10 - i,))
        assert (number(there), number(back)) == (i, 11 - i)


def test_missing_video_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no video"):
        open_video(tmp_path / "missing.mp4")


def test_sound_alone_is_refused(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as film:
        sound = film.add_stream("aac", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.rate = 44100
        film.mux(sound.encode(silence))
        film.mux(sound.encode(None))
    with pytest.raises(ValueError, match="holds no video"):
        open_video(tmp_path / "sound.mp4")


def test_video_without_frames_is_refused(tmp_path):
    with av.open(str(tmp_path / "none.mkv"), "w") as film:
        stream = film.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        film.start_encoding()
    with pytest.raises(ValueError, match="no frames|not a video"):
        open_video(tmp_path / "none.mkv")


def test_video_of_changing_size_is_refused(tmp_path):
    parts = [write_clip(tmp_path / f"{h}.ts", height=h).read_bytes() for h in (48, 96)]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match="changes its size at frame 12"):
        list(open_video(tmp_path / "both.ts", 32))


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no frames"):
        open_video(write_folder(tmp_path / "empty", []))
    with pytest.raises(ValueError, match="more than one file for frame 1"):
        open_video(write_folder(tmp_path / "twice", ["1.jpg", "1.jpeg"]))
    mixed = write_folder(tmp_path / "mixed", ["0.png"])
    write_folder(mixed, ["1.png"], height=32)
    with pytest.raises(ValueError, match="1.png is 64x32.*same size"):
        open_video(mixed)
    broken = write_folder(tmp_path / "broken", ["0.png", "1.png"])
    (broken / "1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="1.png is not an image"):
        open_video(broken)
    cut = write_folder(tmp_path / "cut", ["0.jpg"])
    (cut / "0.jpg").write_bytes((cut / "0.jpg").read_bytes()[:-200])
    with pytest.raises(ValueError, match="0.jpg is not an image"):
        open_video(cut)[0]


def test_matroska_length():
    header = b"\x1a\x45\xdf\xa3\x84abcd" + b"\x18\x53\x80\x67"
    assert container._matroska_length(header + b"\x01" + (1000).to_bytes(7, "big")) == 1021
    assert container._matroska_length(header + b"\x01" + b"\xff" * 7) is None  # a live stream
    assert container._matroska_length(b"\x00\x00\x00\x18ftypmp42") is None
    for cut in (4, len(header) - 4, len(header)):
        assert container._matroska_length(header[:cut]) is None


@pytest.mark.parametrize("mode,value", [("L", 255), ("L", 1), ("1", 1), ("P", 2), ("RGB", 255)])
def test_mask_prompts_are_read(tmp_path, mode, value):
    mask = np.zeros((20, 30), bool)
    mask[4:9, 5:11] = True
    values = (mask * value).astype(np.uint8)
    image = Image.fromarray(np.stack([values] * 3, -1) if mode == "RGB" else values)
    if mode == "P":
        image.putpalette(davis_palette())
    elif mode == "1":
        image = Image.fromarray(mask)
    assert image.mode == mode
    image.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), mask)


def test_of_a_cut_out_what_is_opaque_is_the_object(tmp_path):
    """Whatever colour lies below what is transparent."""
    inside = np.zeros((30, 40), bool)
    inside[5:20, 10:30] = True
    for name, colour in (("white", 255), ("dark", 20)):
        pixels = np.full((30, 40, 4), colour, np.uint8)
        pixels[..., 3] = np.where(inside, 255, 0)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read_mask(tmp_path / f"{name}.png"), inside)
    opaque = np.where(inside[..., None], 255, np.array([0, 0, 0, 255])).astype(np.uint8)
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "opaque.png"), inside)


def test_bad_mask_prompts_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="empty mask"):
        read_mask(tmp_path / "empty.png")
    several = Image.fromarray(np.arange(4, dtype=np.uint8).repeat(4).reshape(4, 4))
    several.save(tmp_path / "grey.png")
    several.putpalette(davis_palette())
    several.save(tmp_path / "several.png")
    for name in ("grey.png", "several.png"):
        with pytest.raises(ValueError, match=r"several objects \(1, 2, 3\)"):
            read_mask(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_mask(tmp_path / "missing.png")
