"""Reading and writing PyTorch's `.pt` files without PyTorch, and without running what they hold.

A `.pt` file is an uncompressed zip archive: a pickle (`data.pkl`) that describes the objects, and
one member (`data/<key>`) for the bytes of each storage. A pickle is a program, and the usual way
to read it is to run it. Here its opcodes are interpreted: only those that plain containers and
tensors need, and only a closed table of functions, none of which does more than build an array.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pathlib
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_WRITTEN = {_STORAGES[name]: name for name in ("FloatStorage", "BFloat16Storage")}
_COMPRESSED = "is compressed or encrypted, as torch.save never does; save it again with torch.save."
_MAX_PICKLE_BYTES = 16 * 2**20  # the description of a few thousand tensors takes below one
_MOST_DIMENSIONS = 64  # as in NumPy


def is_torch_file(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins as `torch.save` begins one, today's format or the old one."""
    with open(path, "rb") as file:
        return file.read(4)[:2] in (b"PK", b"\x80\x02", b"\x80\x04")


def load_torch(path: str | os.PathLike[str]) -> Any:
    """Reads what `torch.save` wrote: containers, numbers, strings, and tensors as NumPy arrays.

    Arrays are read-only views of the file, mapped into memory: nothing is read before it is used.

    Raises:
        ValueError: the file is damaged, of another kind, or holds something other than data.
    """
    path = pathlib.Path(path)
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                storages = _Storages(file, archive)
                program = storages.program(archive)
            return _interpret(program, storages.tensor_storage)
        except Refused as error:
            raise ValueError(f"{path.name} {error}") from error
        except Exception as error:  # whatever a damaged archive leads zipfile to
            raise ValueError(f"{path.name} {_what_is_wrong(path)}") from error


class Refused(Exception):
    """The file asks for something that reading weights does not need."""


def _what_is_wrong(path: pathlib.Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(4)
    if size == 0:
        return "is empty; download or copy it again."
    if start[:1] == b"\x80":
        return (
            "is in PyTorch's format of before 1.6, which can only be read by running it. "
            "With a file you trust: torch.save(torch.load(old), new)."
        )
    if start[:2] == b"PK":
        return f"is truncated or damaged ({size:,} bytes); download or copy it again."
    return "is not a PyTorch checkpoint: it is no zip archive, as torch.save writes."


# The archive -----------------------------------------------------------------------------------


class _Storages:
    """The members of an archive, as arrays mapped from the file."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile) -> None:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise Refused("is damaged: its archive has two members of one name.")
        programs = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        if len(programs) != 1:
            raise Refused("is a zip archive, but not one that torch.save wrote.")
        self._members = members
        self._prefix = programs[0].removesuffix("data.pkl")
        if f"{self._prefix}constants.pkl" in members:
            raise Refused("is a TorchScript program; a checkpoint of its state_dict is needed.")
        byteorder = members.get(f"{self._prefix}byteorder")
        if byteorder is not None and byteorder.file_size == 3:  # "big", against "little"
            raise Refused("was saved on a big-endian machine; save it on another.")
        self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def program(self, archive: zipfile.ZipFile) -> bytes:
        """The pickle; the archive's checksum for it is verified."""
        info = self._members[f"{self._prefix}data.pkl"]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Refused(_COMPRESSED)
        if info.file_size > _MAX_PICKLE_BYTES:
            raise Refused(f"describes its tensors in {info.file_size:,} bytes: no checkpoint.")
        return archive.read(info)

    def tensor_storage(self, kind: np.dtype, key: str, count: int) -> np.ndarray:
        """The `count` numbers of storage `key`."""
        info = self._members.get(f"{self._prefix}data/{key}")
        if info is None:
            raise Refused(f"is damaged: it has no storage {key[:100]!r}.")
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused(_COMPRESSED)
        header = self._bytes[info.header_offset : info.header_offset + 30]
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise Refused("is damaged: a member of its archive has no header.")
        name_length, extra_length = struct.unpack("<HH", header[26:])
        start = info.header_offset + 30 + name_length + extra_length
        available = min(info.file_size, len(self._bytes) - start)
        if count < 0 or count * kind.itemsize > available:
            raise Refused(
                f"is truncated or damaged: storage {key!r} should hold {count:,} numbers of "
                f"{kind.itemsize} bytes, but has {max(available, 0):,} bytes."
            )
        if count == 0:
            return np.zeros(0, kind)
        return np.frombuffer(self._bytes, kind, count, start)


# What a pickle may name ------------------------------------------------------------------------


class _Tag(NamedTuple):
    """A global that stands for itself: it is passed about, never called."""

    name: str


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """`torch._utils._rebuild_tensor_v2`: a strided view, checked against its storage."""
    numbers = (offset, *_short(size), *_short(stride))
    fit = all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    if not isinstance(storage, np.ndarray) or not fit:
        raise Refused("is damaged: a tensor has no storage, or a size that is not a number.")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    empty = math.prod(size) == 0
    if not empty and (last >= storage.size or math.prod(size) > storage.size):
        raise Refused(
            f"is damaged: a tensor of shape {tuple(size)} does not fit its storage of "
            f"{storage.size:,} numbers."
        )
    if empty:
        return np.zeros(size, storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _short(sizes: Any) -> tuple[Any, ...]:
    """`torch.Size`. Long ones would let a few bytes that refer to them fill the memory."""
    if not isinstance(sizes, tuple | list) or len(sizes) > _MOST_DIMENSIONS:
        raise Refused("is damaged: a size is no short row of numbers.")
    return tuple(sizes)


def _device(*parts: Any) -> _Tag:
    if len(parts) > 2 or not all(type(part) in (str, int) for part in parts):
        raise Refused("is damaged: a device has no name.")
    return _Tag("device")


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.Size": lambda sizes=(): _short(sizes),
    "torch.device": _device,
}
_DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "bool", "uint8"),
    *("int8", "int16", "int32", "int64"),
)
_TAGS = {f"torch.{name}" for name in (*_STORAGES, *_DTYPES)}


def _global(module: str, name: str) -> Any:
    full = f"{module}.{name}"
    if full in _TAGS or full in _CALLS:
        return _Tag(full)
    raise Refused(
        f"wants to use {full!r:.200}, which weights do not need: refused, nothing was run. With a "
        'file you trust, in PyTorch: torch.save({"model": torch.load(file, weights_only=False)'
        '["model"]}, new); Lightning has it under "state_dict".'
    )


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Tag) or function.name not in _CALLS:
        raise Refused("wants to call something that is no function: refused, nothing was run.")
    if function.name == "collections.OrderedDict" and arguments:
        raise Refused("is damaged: it fills a mapping in a way that torch.save does not.")
    return _CALLS[function.name](*arguments)


# The interpreter -------------------------------------------------------------------------------

_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_IGNORED = {"PROTO", "FRAME"}


def _interpret(program: bytes, storage: Callable[[np.dtype, str, int], np.ndarray]) -> Any:
    """Follows the pickle's opcodes; `storage` answers its references to bytes."""
    try:
        return _follow(program, storage)
    except Refused:
        raise
    except Exception as error:  # whatever a damaged pickle leads to, the pickle is damaged
        raise Refused(f"is damaged: its pickle cannot be read ({str(error)[:200]}).") from error


def _follow(program: bytes, storage: Callable[[np.dtype, str, int], np.ndarray]) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    marks: list[int] = []  # where in the stack the open groups begin

    def take(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    def last(count: int) -> list[Any]:
        return take(len(stack) - count)

    def fill(items: list[Any]) -> None:
        target = stack[-1]
        if type(target) is dict:
            for key, value in zip(items[::2], items[1::2], strict=True):
                # A tuple that holds itself many times over takes for ever to hash.
                if type(key) not in (str, int):
                    raise Refused("is damaged: a key is neither a string nor a whole number.")
                if key in target:
                    raise Refused(f"is damaged: the key {str(key)[:100]!r} is there twice.")
                target[key] = value
        elif type(target) is list:
            target.extend(items)
        else:
            raise Refused("is damaged: it adds items to something that holds none.")

    argument: Any
    for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
        match opcode.name:
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            case name if name in _LITERALS:
                stack.append(argument)
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(take(marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(last(int(opcode.name[-1]))))
            case "SETITEMS" | "APPENDS":
                fill(take(marks.pop()))
            case "SETITEM":
                fill(last(2))
            case "APPEND":
                fill(last(1))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_global(*last(2)))
            case "REDUCE":
                stack.append(_call(*last(2)))
            case "BUILD":  # an OrderedDict's attributes: a state dict's version numbers
                stack.pop()
                if type(stack[-1]) is not dict:
                    raise Refused("sets attributes of an object: refused, nothing was run.")
            case "BINPERSID":
                stack.append(_storage_of(stack.pop(), storage))
            case name if name in _IGNORED:
                pass
            case "STOP":
                return stack.pop()
            case name:
                raise Refused(f"uses the pickle opcode {name}, which weights do not need: refused.")
    raise Refused("is damaged: its pickle has no end.")


def _storage_of(reference: Any, storage: Callable[[np.dtype, str, int], np.ndarray]) -> np.ndarray:
    """Resolves ("storage", kind, key, location, count), which is how tensors name their bytes."""
    kind_of, kind, key, _, count = reference
    name = kind.name.removeprefix("torch.") if isinstance(kind, _Tag) else ""
    if kind_of != "storage" or name not in _STORAGES or type(key) is not str:
        raise Refused(f"holds numbers of a kind that is not supported ({name[:100] or 'unknown'}).")
    return storage(_STORAGES[name], key, count)


# Writing ---------------------------------------------------------------------------------------

_ALIGNMENT = 64  # bytes, as torch.save aligns storages: they can then be mapped into memory


def save_torch(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Writes a `.pt` file that `torch.load(path, weights_only=True)` reads.

    Args:
        path: the file to write.
        values: a mapping of strings to mappings, strings, integers, or float32 or bfloat16 NumPy
            arrays, which become CPU tensors.
    """
    storages: list[np.ndarray] = []
    program = b"\x80\x02" + _pickled(values, storages) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "archive/data.pkl", program)
        _add(archive, "archive/byteorder", b"little")
        for key, storage in enumerate(storages):
            _add(archive, f"archive/data/{key}", storage.tobytes())
        _add(archive, "archive/version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name)
    start = archive.fp.tell() + 30 + len(name) + 4 if archive.fp else 0
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(info, data)


def _pickled(value: Any, storages: list[np.ndarray]) -> bytes:
    """The opcodes that build `value`; its arrays are appended to `storages`."""

    def several(*values: Any) -> bytes:
        return b"".join(_pickled(item, storages) for item in values)

    match value:
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case str():
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case _Tag(name):
            return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()
        case tuple():
            return b"(" + several(*value) + b"t"
        case Mapping():
            items = several(*(part for item in value.items() for part in item))
            return several(_Tag("collections.OrderedDict")) + b")R(" + items + b"u"
        case np.ndarray() if value.dtype in _WRITTEN:
            array = np.ascontiguousarray(value).reshape(value.shape)
            strides = tuple(step // array.itemsize for step in array.strides)
            key = str(len(storages))
            storages.append(array)
            storage = ("storage", _Tag(f"torch.{_WRITTEN[value.dtype]}"), key, "cpu", array.size)
            return b"".join(
                [
                    several(_Tag("torch._utils._rebuild_tensor_v2")) + b"(",
                    several(storage) + b"Q" + several(0, array.shape, strides, False, {}),
                    b"tR",
                ]
            )
    raise TypeError(f"cannot write a {type(value).__name__} to a .pt file.")
