"""`.pt` files without PyTorch: what is read, and what is refused without running anything."""

import os
import pathlib
import pickle
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sam2jax.convert.torch_file import _pickled, _Tag, is_torch_file, load_torch, save_torch
from sam2jax.testing import draw


def pickled(value: Any) -> bytes:
    return _pickled(value, [])


def tensor(
    numbers: int = 6,
    offset: int = 0,
    size: tuple[int, ...] = (2, 3),
    stride: tuple[int, ...] = (3, 1),
    kind: str = "FloatStorage",
    key: str = "0",
) -> bytes:
    """A pickle of one tensor, as torch.save writes it."""
    storage = pickled(("storage", _Tag(f"torch.{kind}"), key, "cpu", numbers)) + b"Q"
    parts = b"".join(pickled(part) for part in (offset, size, stride, False, {}))
    return (
        b"\x80\x02"
        + pickled(_Tag("torch._utils._rebuild_tensor_v2"))
        + b"("
        + (storage + parts + b"tR.")
    )


def archive(
    path: pathlib.Path, program: bytes, members: dict[str, bytes] | None = None
) -> pathlib.Path:
    """A file as torch.save writes it, with one storage of the numbers 0 to 5 in float32."""
    numbers = np.arange(6, dtype=np.float32).tobytes()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("name/data.pkl", program)
        for name, data in {"data/0": numbers, "byteorder": b"little", **(members or {})}.items():
            file.writestr(f"name/{name}", data)
    return path


def refusal(path: pathlib.Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_torch(path)
    assert str(caught.value).startswith(path.name)
    return str(caught.value)


# Reading and writing -----------------------------------------------------------------------------


def test_files_are_written_and_read(tmp_path: pathlib.Path):
    values = {
        "model": {"a.weight": draw("a", (3, 4)), "b": np.zeros((0, 3), np.float32)},
        "scalar": np.asarray(2.5, np.float32),
        "transposed": draw("t", (3, 4)).T,
        "numbers": (0, -1, 127, 128, 2**40, -(2**40)),
        "note": "naïve",
        "done": True,
    }
    path = tmp_path / "a.pt"
    save_torch(path, values)
    again = load_torch(path)
    assert is_torch_file(path) and list(again) == list(values)
    for name in ("numbers", "note", "done"):
        assert again[name] == values[name]
    for name in ("scalar", "transposed"):
        np.testing.assert_array_equal(again[name], values[name])
    weight = again["model"]["a.weight"]
    np.testing.assert_array_equal(weight, values["model"]["a.weight"])
    assert weight.flags.aligned and not weight.flags.writeable
    assert again["model"]["b"].shape == (0, 3)
    with pytest.raises(TypeError, match="cannot write a complex"):
        save_torch(path, {"x": 1j})


def test_strides_and_offsets_are_honoured(tmp_path: pathlib.Path):
    path = archive(tmp_path / "a.pt", tensor(offset=1, size=(2, 2), stride=(1, 2)))
    np.testing.assert_array_equal(load_torch(path), [[1, 3], [2, 4]])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("HalfStorage", np.float16),
        ("DoubleStorage", np.float64),
        ("LongStorage", np.int64),
        ("ByteStorage", np.uint8),
    ],
)
def test_other_kinds_of_numbers(tmp_path: pathlib.Path, kind: str, dtype: Any):
    data = np.arange(6).astype(dtype)
    read = load_torch(archive(tmp_path / "a.pt", tensor(kind=kind), {"data/0": data.tobytes()}))
    assert read.dtype == dtype
    np.testing.assert_array_equal(read.astype(np.float64), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_contents_of_every_protocol(tmp_path: pathlib.Path, protocol: int):
    shared = [1, 2]
    values = {
        "optimizer": {"state": {0: {"step": 3.0}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        "steps": {"train": 10**12, "val": -5},
        "flags": [True, False, None, (), {}, []],
        "shared": (shared, shared),
        "many": list(range(2000)),
        "long": "x" * 300,
    }
    path = archive(tmp_path / "a.pt", pickle.dumps(values, protocol))
    assert load_torch(path) == values


# Pickles that ask for more than data -------------------------------------------------------------


class Command:
    """What unpickling would run: a command that leaves a file behind."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {}, "epoch": [x]}])
def test_pickled_commands_are_refused_by_name_and_not_run(
    tmp_path: pathlib.Path, protocol: int, wrap: Any
):
    trace = tmp_path / "trace"
    path = archive(tmp_path / "a.pt", pickle.dumps(wrap(Command(trace)), protocol))
    message = refusal(path)
    assert f"'{os.system.__module__}.system'" in message and "nothing was run" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "builtins.getattr", "torch.load", "collections.namedtuple", "os.posix"],
)
def test_unknown_globals_are_refused(tmp_path: pathlib.Path, name: str):
    program = b"\x80\x02" + pickled(_Tag(name)) + b")R."
    assert f"wants to use {name!r}" in refusal(archive(tmp_path / "a.pt", program))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (b"\x80\x02(S'echo'\nios\nsystem\n.", "pickle opcode"),  # INST: a call by name
        (b"\x80\x02\x82\x01.", "pickle opcode EXT1"),
        (b"\x80\x02ctorch\nfloat32\n)\x81.", "pickle opcode NEWOBJ"),
        (b"\x80\x02ctorch\nfloat32\n)R.", "call something that is no function"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "call something that is no function"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "sets attributes"),
        (b"\x80\x02X\x01\x00\x00\x00aK\x01a.", "adds items to something that holds none"),
        (b"\x80\x02h\x05.", "damaged"),  # what was never remembered
        (b"\x80\x02}", "damaged"),  # no end
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),  # a string longer than the file
        (b"\x80\x02R.", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02K\x01Q.", "damaged"),
    ],
)
def test_other_programs_are_refused(tmp_path: pathlib.Path, program: bytes, words: str):
    assert words in refusal(archive(tmp_path / "a.pt", program))


def test_memory_does_not_follow_what_a_pickle_claims(tmp_path: pathlib.Path):
    # The usual unpickler makes room for two billion entries here.
    path = archive(tmp_path / "a.pt", b"\x80\x02}r\xff\xff\xff\x7f.")
    assert load_torch(path) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"numbers": 7}, "storage '0' should hold 7 numbers of 4 bytes, but has 24 bytes"),
        ({"numbers": 2**40}, "but has 24 bytes"),
        ({"numbers": -1}, "but has 24 bytes"),
        ({"size": (3, 3)}, "shape (3, 3) does not fit its storage of 6 numbers"),
        ({"offset": 1}, "does not fit"),
        ({"size": (2**40, 2**40), "stride": (0, 0)}, "does not fit"),
        ({"size": (7,), "stride": (0,)}, "does not fit"),
        ({"stride": (3, -1)}, "a size that is not a number"),
        ({"stride": (3,)}, "damaged"),
        ({"key": "../../etc/passwd"}, "no storage '../../etc/passwd'"),
        ({"kind": "ComplexFloatStorage"}, "'torch.ComplexFloatStorage'"),
        ({"kind": "float32"}, "not supported (float32)"),
    ],
)
def test_impossible_tensors_are_refused(tmp_path: pathlib.Path, options: dict, words: str):
    assert words in refusal(archive(tmp_path / "a.pt", tensor(**options)))


# Files that are not what they seem ---------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 3, 100, 400, -1, -30])
def test_truncated_files(tmp_path: pathlib.Path, kept: int):
    path = archive(tmp_path / "a.pt", tensor())
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    assert "download or copy it again" in refusal(path)


def test_files_of_other_kinds(tmp_path: pathlib.Path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"\x89PNG and so on")
    assert "no zip archive" in refusal(path)
    path.write_bytes(pickle.dumps(119547037146038801333356, 2))
    assert is_torch_file(path)
    assert "format of before 1.6" in refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    assert "not one that torch.save wrote" in refusal(path)
    assert "TorchScript" in refusal(archive(path, tensor(), {"constants.pkl": b""}))
    assert "big-endian" in refusal(archive(path, tensor(), {"byteorder": b"big"}))
    with pytest.raises(FileNotFoundError):
        load_torch(tmp_path / "none.pt")


def test_damaged_archives(tmp_path: pathlib.Path):
    path = archive(tmp_path / "a.pt", tensor())
    whole = path.read_bytes()
    # A bit of the pickle: the archive's checksum tells.
    at = whole.index(b"_rebuild_tensor_v2")
    path.write_bytes(whole[:at] + b"X" + whole[at + 1 :])
    assert "truncated or damaged" in refusal(path)
    # The header of the member that holds the numbers.
    at = whole.index(b"name/data/0") - 30
    path.write_bytes(whole[:at] + b"XX" + whole[at + 2 :])
    assert "has no header" in refusal(path)
    # Its name's length, which moves where the numbers begin past the end.
    at = whole.index(b"name/data/0") - 4
    path.write_bytes(whole[:at] + struct.pack("<H", 60000) + whole[at + 2 :])
    assert "truncated or damaged: storage '0'" in refusal(path)


def test_compressed_archives_are_refused(tmp_path: pathlib.Path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("name/data.pkl", tensor())
    assert "compressed" in refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("name/data.pkl", tensor(numbers=2**20, size=(2**20,), stride=(1,)))
        file.writestr("name/data/0", bytes(2**22), zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)
