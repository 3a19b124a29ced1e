"""Hostile input: cases that were found, and a short run of every reader on damaged files."""

import json
import pathlib
import pickle
import zipfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from fuzz import seeds
from fuzz.readers import READERS
from fuzz.worker import Unclear, one
from sam2jax.config import VARIANTS, SAM2Config
from sam2jax.convert.torch_file import load_torch
from sam2jax.io.checkpoints import config_from_header, load_orbax
from sam2jax.io.images import read_image
from sam2jax.io.video import open_video
from sam2jax.training.config import read_config
from sam2jax.training.data.runlengths import decode_masks

# Cases that were found ---------------------------------------------------------------------------


def refused(tmp_path: pathlib.Path, program: bytes) -> str:
    path = tmp_path / "a.pt"
    path.write_bytes(seeds.torch_archive(program))
    with pytest.raises(ValueError) as caught:
        load_torch(path)
    assert len(str(caught.value)) < 500
    return str(caught.value)


# A tuple of itself, thirty times over: 2^30 leaves in 150 bytes.
_DOUBLED = b"(tq\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(30))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"\x80\x02}" + _DOUBLED + b"K\x01s.", "neither a string nor"),
        (b"\x80\x02ctorch\ndevice\n" + _DOUBLED + b"\x85R.", "a device has no name"),
        (b"\x80\x02ctorch\nSize\n]q\x00(" + b"K\x01" * 65 + b"e\x85R.", "no short row"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "fills a mapping"),
        (b"\x80\x02}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u.", "'a' is there twice"),
    ],
)
def test_pickles_that_would_take_for_ever(tmp_path, program, words):
    assert words in refused(tmp_path, program)


def test_archives_with_two_members_of_one_name(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"a": 1}, 2))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/data.pkl", pickle.dumps({"a": 2}, 2))
    with pytest.raises(ValueError, match="two members of one name"):
        load_torch(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trunk": {"stages": [10**9, 1, 1, 1]}}, "stages must be -1 to 48"),
        ({"trunk": {"stages": [1, 2]}}, "stages must be 4 whole numbers"),
        ({"trunk": {"global_att_blocks": 5}}, "global_att_blocks must be a list of whole numbers"),
        ({"hidden_dim": 2**40}, "hidden_dim must be -1 to 4096"),
        ({"hidden_dim": "wide"}, "hidden_dim must be int, got 'wide'"),
        ({"image_size": 2**20}, "multiple of 32 from 32 to 8192"),
        ({"image_size": True}, "image_size must be int"),
        ({"memory_attention": {"rope_theta": float("nan")}}, "rope_theta must be finite"),
        ({"memory_attention": {"rope_theta": 10**400}}, "rope_theta must be finite"),
        ({"memory_attention": None}, "MemoryAttentionConfig must be a mapping"),
    ],
)
def test_configurations_of_no_model(change, words):
    text = json.dumps({"version": 1, "config": change})
    with pytest.raises(ValueError, match=words):
        config_from_header(text, "a.pt")


def test_configurations_of_models_come_back():
    for config in VARIANTS.values():
        assert SAM2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_nesting_without_end(tmp_path):
    with pytest.raises(ValueError, match="a.pt is damaged"):
        config_from_header("[" * 100_000, "a.pt")
    for name, read in (("runs", "input.json"), ("prompts", "input.json")):
        case = b"[" * 100_000 if name == "runs" else b"\n\n" + b"[" * 100_000
        with pytest.raises(ValueError, match=f"{read} is not JSON"):
            READERS[name].read(case, tmp_path)
    path = tmp_path / "a.toml"
    path.write_text("a = " + "[" * 10_000)
    with pytest.raises(ValueError, match="a.toml is no TOML file"):
        read_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a.toml is no TOML file"):
        read_config(path)


def test_polygons_far_off_the_frame():
    for far in (1e9, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="leaves the frame by far"):
            decode_masks([[[0, 0, far, 0, far, 5]]], (6, 8), "a.json")
    assert decode_masks([[[-9, -9, 30, -9, 30, 30, -9, 30]]], (6, 8), "a.json").all()


def test_pictures_that_would_run_a_program(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(ValueError, match="a.png is not an image that can be read"):
        read_image(path)


def test_films_that_are_lists_of_other_files(tmp_path):
    from tests.clips import write_clip

    write_clip(tmp_path / "real.mp4", 2)
    path = tmp_path / "a.mp4"
    path.write_text("ffconcat version 1.0\nfile 'real.mp4'\n")
    with pytest.raises(ValueError, match="a.mp4 is a list of other files"):
        open_video(path)


def test_films_with_huge_frames(tmp_path):
    path = tmp_path / "a.y4m"
    path.write_bytes(b"YUV4MPEG2 W16000 H10000 F25:1 C420\nFRAME\n" + bytes(9))
    with pytest.raises(ValueError, match="a.y4m has frames of 16000x10000, larger than"):
        open_video(path)


def session(tmp_path: pathlib.Path) -> dict[str, np.ndarray]:
    path = tmp_path / "whole.npz"
    path.write_bytes(seeds.session_files(tmp_path)[-1])
    with np.load(path) as archive:
        return dict(archive)


def load_session(path: pathlib.Path):
    return seeds.session_predictor().load_state(path, seeds.session_video())


def test_sessions_come_back(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **session(tmp_path))
    assert load_session(path).obj_ids == [1, "cup"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0/cond/0", lambda x: x[..., :1]),  # masks of another size
        ("0/cond/2", lambda x: x.astype(np.float64)),
        ("0/cond/frames", lambda x: x - 5),
        ("0/points/0", lambda x: x * np.nan),
        ("0/labels/0", lambda x: x + 9),
        ("1/masks/2", lambda x: x[0]),
        ("header", lambda x: np.frombuffer(x.tobytes().replace(b'"all"', b'"aln"'), np.uint8)),
    ],
)
def test_sessions_with_other_arrays_are_refused(tmp_path, name, change):
    arrays = session(tmp_path)
    arrays[name] = change(arrays[name])
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="a.npz is no session"):
        load_session(path)


def test_sessions_that_would_fill_the_memory(tmp_path):
    path = tmp_path / "a.npz"

    def cause() -> str:
        with pytest.raises(ValueError, match="a.npz is no session") as caught:
            load_session(path)
        return str(caught.value.__cause__)

    np.savez_compressed(path, **session(tmp_path), extra=np.zeros(2**20))
    assert "compressed" in cause()
    np.savez(path, **session(tmp_path))
    with zipfile.ZipFile(path, "a") as archive, archive.open("extra.npy", "w") as member:
        says = {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
        np.lib.format.write_array_header_1_0(member, says)
        member.write(bytes(8))
    assert "larger or smaller" in cause()


# Every reader on damaged files -------------------------------------------------------------------

EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(("cut", "insert", "change", "repeat")),
        st.binary(max_size=6),
    ),
    max_size=4,
)


def damaged(case: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    for where, kind, new in edits:
        at = int(where * len(case))
        kept = {"cut": b"", "insert": case[at:], "change": case[at + len(new) :], "repeat": case}
        case = case[:at] + new + kept[kind]
    return case


@pytest.mark.parametrize("name", [n for n in READERS if n not in ("checkpoint", "orbax", "cli")])
def test_readers_refuse_what_is_damaged(name, tmp_path_factory):
    cases = READERS[name].seeds(tmp_path_factory.mktemp("seeds"))
    folder = tmp_path_factory.mktemp("here")

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.sampled_from(cases), EDITS)
    def read(case, edits):
        one(name, damaged(case, edits), folder)

    read()


def test_folders_whose_header_is_no_text(tmp_path):
    folder = seeds.unpack(b"", tmp_path / "orbax")
    (folder / "sam2jax.json").write_bytes(b'{"version": 1, "config": \x97}')
    with pytest.raises(ValueError, match="orbax is damaged"):
        load_orbax(folder)


def test_unclear_refusals_are_told(tmp_path, monkeypatch):
    monkeypatch.setitem(READERS, "runs", READERS["runs"]._replace(read=lambda *_: int("x")))
    with pytest.raises(Unclear, match="names no file"):
        one("runs", b"", tmp_path)
