"""Live streams: the frames of the file, as they arrive, and what is refused."""

import contextlib
import itertools
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest

from sam2jax.io.stream import RawFormat, is_stream, open_stream
from sam2jax.io.video import open_video
from tests.clips import number, picture, write_clip
from tests.streams import piped, served
from tests.test_io import damage


def same_frames(stream, video):
    frames = list(stream)
    assert [frame.index for frame in frames] == list(range(len(video)))
    for frame, expected in zip(frames, video.frames(original=True), strict=True):
        np.testing.assert_array_equal(frame.image, expected.image)
        np.testing.assert_array_equal(frame.original, expected.original)


@pytest.mark.parametrize("name", ["clip.ts", "clip.mkv", "clip.h264", "turned.mp4"])
def test_pipe_gives_the_frames_of_the_file(tmp_path, name):
    turned = {"rotation": 90, "options": {"movflags": "+faststart"}}
    path = write_clip(tmp_path / name, **(turned if name == "turned.mp4" else {}))
    video = open_video(path, 32)
    with piped(path.read_bytes()), open_stream("-") as stream:
        stream.size = 32
        assert (stream.height, stream.width) == (video.height, video.width)
        assert stream.fps == video.fps and stream.name == "the stream"
        same_frames(stream, video)
        assert list(stream) == [] and stream.num_taken == 12 and stream.lost is None


def test_raw_frames():
    frames = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)
    with piped(frames.tobytes()):
        stream = open_stream("-", 32, RawFormat.parse("8x6@30000/1001"))
        assert (stream.height, stream.width, stream.fps) == (6, 8, Fraction(30000, 1001))
        got = list(stream)
    np.testing.assert_array_equal(np.stack([frame.original for frame in got]), frames)
    assert {frame.image.shape for frame in got} == {(32, 32, 3)}
    assert [round(f.image.mean()) for f in got] == pytest.approx(frames.mean((1, 2, 3)), abs=6)


def test_frame_rate_may_be_unknown(monkeypatch):
    monkeypatch.setattr("sam2jax.io.stream.frame_rate", lambda stream: None)
    with piped(bytes(2 * 8 * 6 * 3)):
        stream = open_stream("-", 32, RawFormat(8, 6))
        assert stream.fps is None and len(list(stream)) == 2


def test_frames_come_as_they_arrive_and_no_faster():
    """A frame is there before the next one is sent, and few are taken from who sends many."""
    with piped() as pipe:
        pipe.write(picture(0, 96, 128).tobytes())
        stream = open_stream("-", 32, RawFormat(128, 96))
        frames = stream.frames(original=False)
        assert number(next(frames).image) == 0
        pipe.write(picture(1, 96, 128).tobytes())
        frame = next(frames)
        assert number(frame.image) == 1 and frame.original is None
        sent = []

        def feed():
            with contextlib.suppress(OSError, ValueError):  # when nobody reads any more
                for index in range(2, 20):
                    pipe.write(picture(index, 96, 128).tobytes())
                    sent.append(index)

        thread = threading.Thread(target=feed)
        thread.start()
        for frame in itertools.islice(stream, 5):
            assert number(frame.original) == frame.index
            time.sleep(0.02)
        assert 5 <= len(sent) < 15
        stream.close()
    thread.join(10)


@pytest.mark.parametrize("scheme", ["tcp", "http"])
def test_url(tmp_path, scheme):
    path = write_clip(tmp_path / "clip.ts")
    with served(path.read_bytes(), scheme) as url, open_stream(url, 32) as stream:
        assert stream.name == url
        same_frames(stream, open_video(path, 32))
        assert stream.lost is None


def test_what_the_network_loses_is_passed_over(tmp_path):
    data = write_clip(tmp_path / "clip.ts", 20, gop=5, noise=True).read_bytes()
    middle = len(data) // 2 // 188 * 188
    cut = data[:middle] + bytes(188 * 80) + data[middle + 188 * 80 :]
    with served(cut) as url, open_stream(url, 32) as stream:
        assert 10 < len(list(stream)) <= 20


def test_connection_that_breaks_ends_the_stream(tmp_path):
    data = write_clip(tmp_path / "clip.mkv", 20, noise=True).read_bytes()
    broken = threading.Event()
    with served(data[:-5000], broken=broken) as url, open_stream(url, 32) as stream:
        frames = iter(stream)
        assert next(frames).index == 0
        broken.set()
        count = 1 + len(list(frames))
        assert 1 < count < 20
        assert stream.lost == f"{url} was lost after {count} frames: Connection reset by peer."


def test_stop_ends_a_silent_stream():
    with piped() as pipe:
        pipe.write(picture(0, 48, 64).tobytes())
        stream = open_stream("-", 32, RawFormat(64, 48))
        frames = iter(stream)
        assert next(frames).index == 0
        threading.Timer(0.05, stream.stop).start()
        assert list(frames) == [] == list(stream)


def test_closed_stream_lets_go_of_its_source():
    before = set(threading.enumerate())
    with piped(bytes(48 * 64 * 3 * 50)):
        stream = open_stream("-", 32, RawFormat(64, 48))
        new = set(threading.enumerate()) - before
        (thread,) = (t for t in new if t.name == "reads the stream")
        stream.close()
        thread.join(10)
        assert not thread.is_alive() and len(list(stream)) <= 1


def broken_streams(folder):
    """(what comes through stdin, how raw frames look, what the message says)."""
    plain = write_clip(folder / "plain.mp4", height=192, width=256, noise=True).read_bytes()
    film = write_clip(folder / "film.mkv", noise=True).read_bytes()
    parts = [write_clip(folder / f"{h}.ts", height=h).read_bytes() for h in (48, 96)]
    with av.open(str(folder / "sound.ts"), "w") as sound:
        track = sound.add_stream("aac", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.rate = 44100
        sound.mux(track.encode(silence))
        sound.mux(track.encode(None))
    raw = RawFormat(8, 6)
    return [
        (b"", None, "the stream cannot be opened"),
        (b"hello, this is no video\n" * 50, None, "cannot be opened"),
        (plain, None, "after 0 frames; .*faststart"),
        ((folder / "sound.ts").read_bytes(), None, "holds no video"),
        (b"".join(parts), None, "changes its size at frame 12"),
        (damage(film), None, r"damaged or incomplete after \d+ frames"),
        (b"", raw, "ended before its first frame"),
        (
            bytes(8 * 6 * 3 * 2 + 7),
            raw,
            "incomplete after 2 frames; raw frames of 8x6 have 144 bytes",
        ),
        (bytes(7), raw, "incomplete after 0 frames"),
    ]


def test_broken_streams_are_refused(tmp_path):
    for data, raw, words in broken_streams(tmp_path):
        with piped(data), pytest.raises(ValueError, match=words) as error:
            list(open_stream("-", 32, raw))
        assert str(error.value).count("\n") < 2


@pytest.mark.parametrize(
    "address,words",
    [
        ("tcp://127.0.0.1:1", "tcp://127.0.0.1:1 cannot be opened .*refused"),
        ("rtsp://127.0.0.1:1/live", "cannot be opened .*refused"),
        ("http://127.0.0.1:1/a.mp4", "cannot be opened .*refused"),
        ("nothing://a", "cannot be opened .*Protocol not found"),
        ("/dev/video99", "/dev/video99 cannot be opened .*No such file"),
    ],
)
def test_streams_that_cannot_be_reached_are_refused(address, words):
    with pytest.raises(ValueError, match=words):
        open_stream(address)
    with pytest.raises(ValueError, match="raw frames come through stdin"):
        open_stream(address, raw=RawFormat(8, 6))


def test_terminal_is_refused(monkeypatch):
    monkeypatch.setattr("os.isatty", lambda descriptor: descriptor == 0)
    with pytest.raises(ValueError, match="but the keyboard"):
        open_stream("-")


def test_raw_format():
    assert RawFormat.parse("640x480") == (640, 480, 25)
    assert RawFormat.parse("640x480@29.97") == (640, 480, Fraction(2997, 100))
    for text in ("640", "0x480", "640x480@0", "640x480@1/0", "640x480@x", "-1x2", "1x2x3", ""):
        with pytest.raises(ValueError, match="expected WIDTHxHEIGHT"):
            RawFormat.parse(text)


def test_is_stream():
    for address in ("-", "rtsp://a", "HTTP://a/b.mp4", "/dev/video0", "tcp://127.0.0.1:5"):
        assert is_stream(address)
    for address in ("a.mp4", "./-", "/dev/null", "C:\\a.mp4", "folder/", "a://b"[1:]):
        assert not is_stream(address)
