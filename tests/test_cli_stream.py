"""`sam2jax track` on live streams: the same masks, files that are finished, and what is refused."""

import glob
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sam2jax
from sam2jax.io.stream import RawFormat, open_stream
from sam2jax.io.video import open_video
from sam2jax.loading import load
from tests.clips import picture, write_clip
from tests.conftest import ROOT
from tests.streams import piped, served
from tests.test_cli import commands_in_an_empty_folder, refused, write_checkpoint
from tests.test_io import damage

LONG = 18  # frames; from 16 on the tracker does not care how many there are
PROMPT = ("--point", "20,30", "--point", "40,20,0", "--box", "5,5,40,40@2")
OUTPUTS = ("--out", "out.mkv", "--masks", "masks.npz")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def track(tmp_path, monkeypatch, checkpoint):
    run = commands_in_an_empty_folder(tmp_path, monkeypatch)
    return lambda video, *options: run("track", video, "--checkpoint", checkpoint, *options)


def outputs():
    """What was written: masks by frame, and the frames of the film. The files go."""
    with np.load("masks.npz") as saved:
        masks = {name: saved[name] for name in saved}
    film = np.stack(list(open_video("out.mkv")))
    for name in os.listdir():
        os.remove(name)
    return masks, film


def same(ours, theirs):
    np.testing.assert_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_file_and_pipe_and_url_give_the_same(tmp_path, track):
    path = write_clip(tmp_path / "clip.ts", LONG)
    done = track(path, *PROMPT, *OUTPUTS)
    assert done.exit_code == 0, done.output
    expected = outputs()
    assert len(expected[1]) == LONG and list(expected[0]["frames"]) == list(range(LONG))
    assert expected[0]["00017"].any() and not expected[0]["00017"].all()
    with piped(path.read_bytes()):
        done = track("-", *PROMPT, *OUTPUTS)
    assert done.exit_code == 0, done.output
    assert "18 frames" in done.output and "%" not in done.output and "warning" not in done.output
    same(outputs(), expected)
    with served(path.read_bytes()) as url:
        done = track(url, *PROMPT, *OUTPUTS, "--quiet")
    assert done.exit_code == 0 and done.output == ""
    same(outputs(), expected)


def test_prompts_count_from_their_frame_on(tmp_path, track, checkpoint):
    """Object 2 is clicked on at frame 3, 5 painted at 4, and 2 again at 9, which never comes."""
    frames = np.stack([picture(i, 48, 64) for i in range(7)])
    mask = np.zeros((48, 64), bool)
    mask[10:30, 5:40] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    raw = ("--raw", "64x48@30")
    with piped(frames.tobytes()):
        clicks = ("--point", "20,30@2:3", "--point", "40,20,0@2:3", "--point", "9,9@2:9")
        paint = ("--mask", f"{tmp_path / 'mask.png'}@5:4")
        done = track("-", *raw, *clicks, *paint, *OUTPUTS, "--quiet")
    assert done.exit_code == 0, done.output
    assert done.output == (
        "warning: there is a prompt on frame 9, but the stream ended after 7 frames.\n"
    )
    assert open_video("out.mkv").fps == 30
    masks, film = outputs()
    assert len(film) == 7 and masks["object_ids"].tolist() == [2, 5]
    assert masks["frames"].tolist() == [3, 4, 5, 6]
    np.testing.assert_array_equal(masks["00003"][1], np.zeros((48, 64), bool))
    assert (masks["00004"][1] ^ mask).mean() < 0.05

    model, params = load(checkpoint)
    prompts = {
        3: sam2jax.Prompts.make(
            points=[[(20, 30 * 64 / 48), (40, 20 * 64 / 48)], None], labels=[[1, 0], None], width=2
        ),
        4: sam2jax.Prompts.make(masks=[None, mask], width=2),
    }
    state = sam2jax.init_state(model, 2, max_cond_frames=3, frame_index=3)
    with piped(frames.tobytes()):
        for frame in itertools.islice(open_stream("-", 64, RawFormat(64, 48)), 3, None):
            image = jnp.asarray(frame.image)
            state, answer = sam2jax.step(model, params, state, image, prompts.get(frame.index))
            logits = np.asarray(sam2jax.resize_masks(answer.masks, (48, 64)))
            np.testing.assert_array_equal(masks[f"{frame.index:05d}"], logits > 0)


def test_connection_that_breaks_finishes_the_files(tmp_path, track):
    data = write_clip(tmp_path / "clip.mkv", LONG, noise=True).read_bytes()
    broken = threading.Event()
    threading.Timer(1, broken.set).start()
    with served(data[:-5000], broken=broken) as url:
        done = track(url, *PROMPT, *OUTPUTS, "--quiet")
    assert done.exit_code == 0
    assert re.fullmatch(r"warning: tcp://.* was lost after \d+ frames: .*\n", done.output)
    assert len(outputs()[1]) > 10


def test_bad_streams_are_refused(tmp_path, track):
    clip = write_clip(tmp_path / "clip.mkv", noise=True)
    out = (*PROMPT, "--quiet", *OUTPUTS)
    refused(track(clip, "--raw", "64x48", *out), "raw frames come through stdin", "clip.mkv")
    refused(track("tcp://127.0.0.1:1", "--raw", "64x48", *out), "raw frames come through stdin")
    refused(track("-", "--raw", "64", *out), "expected WIDTHxHEIGHT")
    refused(track("-", "--reverse", *out), "--reverse needs an end")
    refused(track("tcp://127.0.0.1:1", *out), "cannot be opened (Connection refused)")
    refused(track("/dev/video99", *out), "/dev/video99 cannot be opened")
    with piped(b""):
        refused(track("-", *out), "the stream cannot be opened")
    with piped(bytes(3 * 48 * 64 * 3 + 1)):
        refused(track("-", "--raw", "64x48", *out), "incomplete after 3 frames")
    with piped(damage(clip.read_bytes())):
        refused(track("-", *out), "damaged or incomplete")
    with piped(clip.read_bytes()):
        refused(track("-", *PROMPT), "nothing to write")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "small.png")
    with piped(clip.read_bytes()):
        refused(track("-", "--mask", tmp_path / "small.png", "--masks", "m"), "8x8", "64x48")


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_finishes_the_files(track, way):
    """While the camera is silent, by Ctrl-C, a service manager or a lost terminal: the files hold
    all frames up to there."""
    seen = []

    def interrupt():
        seen.extend(wait_for_files(".masks.*/*.png", 3))
        seen.extend(os.listdir())
        os.kill(os.getpid(), way)

    before = signal.getsignal(signal.SIGINT)
    with piped() as pipe:
        pipe.write(b"".join(picture(i, 48, 64).tobytes() for i in range(3)))
        threading.Thread(target=interrupt).start()
        done = track("-", "--raw", "64x48", *PROMPT, "--out", "out.mp4", "--masks", "masks", "-q")
    assert done.exit_code == 0 and done.output == "", done.output
    assert "masks" not in seen and "out.mp4" not in seen
    assert sorted(os.listdir()) == ["masks", "out.mp4"]
    assert sorted(os.listdir("masks")) == [f"{i:05d}.png" for i in range(3)]
    assert len(open_video("out.mp4")) == 3
    assert signal.getsignal(signal.SIGINT) is before


def wait_for_files(pattern, count):
    found, pause = [], threading.Event()
    for _ in range(600):
        found = glob.glob(pattern)
        if len(found) >= count:
            break
        pause.wait(0.1)
    return found


def test_second_interrupt_breaks_off(track, monkeypatch):
    def interrupted_twice(*_, **__):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("sam2jax.init_state", interrupted_twice)
    with piped(bytes(48 * 64 * 3)):
        done = track("-", "--raw", "64x48", *PROMPT, *OUTPUTS)
    assert done.exit_code not in (0, 2) and os.listdir() == []


def test_program_ends_while_the_stream_is_silent():
    code = """
from sam2jax.io.stream import RawFormat, open_stream
with open_stream("-", raw=RawFormat(8, 6)) as stream:
    print(next(iter(stream)).original.sum())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(bytes([1]) * 8 * 6 * 3)
        process.stdin.flush()
        assert process.wait(60) == 0 and process.stdout.read() == b"144\n"
