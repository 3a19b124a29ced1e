"""Sessions as files, from which they continue with the same answers to the last bit.

A session's file is a NumPy archive: a header (JSON) and, for every object, its prompts, answers
and memories. The video is not in it.
"""

from __future__ import annotations

import io
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Hashable, Mapping
from typing import Any, get_args

import jax
import ml_dtypes
import numpy as np

from sam2jax.config import SAM2Config
from sam2jax.io.files import PathLike, atomic_path
from sam2jax.predictors.inputs import check_mask
from sam2jax.predictors.programs import Record
from sam2jax.predictors.session import History, InferenceState, ObjectHistory
from sam2jax.types import FrameMemory, point_rows

FORMAT = "sam2jax session 1"
RECORDS = ("cond", "recent", "pending_cond", "pending_recent")
HOW = ("objects_at_once", "kernels")  # how a model is computed, not which it is

# What arrays and entries lead to that are not what they should be.
DAMAGE = (ValueError, LookupError, AttributeError, TypeError, OverflowError)

Arrays = Mapping[str, np.ndarray]


def save(
    path: PathLike,
    config: SAM2Config,
    state: InferenceState,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a session, whole or not at all.

    Args:
      path: of the file.
      config: of the model.
      state: of the session.
      extra: arrays to be kept with it.

    Raises:
      TypeError: an object's id is neither a string, number, bool or None, nor a tuple of such.
    """
    objects = {i: history.copy() for i, history in dict(state.objects).items()}  # it may go on
    header = {
        "format": FORMAT,
        "config": config.to_dict(),
        "video": {"source": state.source, "size": [state.video_height, state.video_width]},
        "clip_length": state.clip_length,
        "history": state.history,
        "offload_state_to_cpu": state.offload_state_to_cpu,
        "ids": [_encode_id(obj_id) for obj_id in objects],
        "tracked": [[*h.tracked.items()] for h in objects.values()],
    }
    arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8), **(extra or {})}
    for place, history in enumerate(objects.values()):
        for name, value in _pack(history).items():
            arrays[f"{place}/{name}"] = value
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load(
    path: PathLike,
    config: SAM2Config,
    open_state: Callable[[dict[str, Any], Arrays], InferenceState],
) -> InferenceState:
    """Reads what `save` wrote.

    Args:
      path: of the file.
      config: of the model.
      open_state: makes the session without objects, from the header and the arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged or no session; it belongs to another model, or to another video.
    """
    header, arrays = _read(path)
    _check_header(path, header)
    ours, theirs = json.loads(json.dumps(config.to_dict())), header["config"]
    differing = [name for name in ours if name not in HOW and ours[name] != theirs.get(name)]
    if differing:
        raise ValueError(
            f"{path} is a session of another model: {', '.join(differing)} differ. Load it into a "
            f"predictor of {theirs.get('name')} with the same options."
        )
    try:
        state = open_state(header, arrays)
    except (LookupError, TypeError, AttributeError) as error:
        raise _damaged(path) from error
    size = [state.video_height, state.video_width]
    try:
        objects = _objects(header, arrays, config, on_device=not state.offload_state_to_cpu)
    except DAMAGE as error:
        raise _damaged(path) from error
    if size != header["video"]["size"] or state.clip_length != header["clip_length"]:
        most = config.max_obj_ptrs_in_encoder
        raise ValueError(
            f"{path} is a session on another video, of height and width {header['video']['size']} "
            f"and {header['clip_length']} frames ({most}: or more); got {size} and "
            f"{state.clip_length}."
        )
    state.objects.update(objects)
    state.version += 1
    return state


def _check_header(path: PathLike, header: dict[str, Any]) -> None:
    """Refuses a header that `save` does not write."""
    kinds = {
        **{"config": dict, "video": dict, "clip_length": int, "history": str},
        **{"offload_state_to_cpu": bool, "ids": list, "tracked": list},
    }
    fit = all(type(header.get(name)) is kind for name, kind in kinds.items())
    fit = fit and header["history"] in get_args(History)
    video: Any = header.get("video")
    if not fit or not isinstance(video.get("source"), str | None) or "size" not in video:
        raise _damaged(path)


def _objects(
    header: dict[str, Any], arrays: Arrays, config: SAM2Config, *, on_device: bool
) -> dict[Hashable, ObjectHistory]:
    """Every object's history, by its id."""
    objects = {}
    for place, (obj_id, tracked) in enumerate(zip(header["ids"], header["tracked"], strict=True)):
        prefix = f"{place}/"
        own = {name[len(prefix) :]: x for name, x in arrays.items() if name.startswith(prefix)}
        history = _unpack(own, config, on_device=on_device)
        history.tracked = {_frame(frame): bool(reverse) for frame, reverse in tracked}
        objects[_decode_id(obj_id)] = history
    if len(objects) < len(header["ids"]):
        raise ValueError("two objects have one id")
    return objects


def _read(path: PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays; what the file's checksums and header let pass is whole."""
    problem: Exception | None = None
    with pathlib.Path(path).open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                arrays = {
                    info.filename.removesuffix(".npy"): _array(archive, info) for info in members
                }
            header = json.loads(arrays.pop("header").tobytes())
            if header["format"] == FORMAT and len(arrays) == len(members) - 1:
                return header, arrays
        except Exception as error:  # whatever a damaged archive leads zipfile, NumPy and JSON to
            problem = error
    raise _damaged(path) from problem


def _damaged(path: PathLike) -> ValueError:
    return ValueError(f"{path} is no session that sam2jax wrote, or it is damaged.")


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """An array of an archive; takes no more memory than the file has bytes."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed, as sessions never are")
    data = archive.read(info)
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, _, kind = read_header(file)
    if kind.hasobject or math.prod(shape) * kind.itemsize != len(data) - file.tell():
        raise ValueError("an array is larger or smaller than it says")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _pack(history: ObjectHistory) -> dict[str, np.ndarray]:
    """An object's history as arrays, frames stacked."""
    arrays = {}
    for frame, (points, labels) in history.points.items():
        arrays[f"points/{frame}"], arrays[f"labels/{frame}"] = points, labels
    for frame, mask in history.masks.items():
        arrays[f"masks/{frame}"] = mask
    for name in RECORDS:
        records = getattr(history, name)
        if records:
            arrays[f"{name}/frames"] = np.array([*records], np.int64)
            leaves = [jax.tree.leaves(jax.device_get(record)) for record in records.values()]
            for index, column in enumerate(zip(*leaves, strict=True)):
                stacked = np.stack(column)
                is_short = stacked.dtype == ml_dtypes.bfloat16  # which NumPy's files do not know
                arrays[f"{name}/{index}"] = stacked.view(np.uint16) if is_short else stacked
    return arrays


def _unpack(arrays: Arrays, config: SAM2Config, *, on_device: bool) -> ObjectHistory:
    history = ObjectHistory()
    for name, value in arrays.items():
        kind, _, rest = name.partition("/")
        if kind == "points":
            labels = arrays[f"labels/{rest}"]
            points = _like(value, np.float32, (len(labels), 2))
            history.points[_frame(rest)] = point_rows("an object", points, labels, None, None)
        elif kind == "masks":
            history.masks[_frame(rest)] = check_mask(_like(value, np.bool_, value.shape))
    for name in RECORDS:
        frames = arrays.get(f"{name}/frames", ())
        leaves, structure = jax.tree.flatten(_record(config))
        columns = [
            _like(arrays[f"{name}/{index}"], leaf.dtype, (len(frames), *leaf.shape))
            for index, leaf in enumerate(leaves if len(frames) else ())
        ]
        for row, frame in enumerate(frames):
            record = jax.tree.unflatten(structure, [column[row] for column in columns])
            getattr(history, name)[_frame(frame)] = jax.device_put(record) if on_device else record
    return history


def _frame(number: Any) -> int:
    frame = int(number)
    if not 0 <= frame < 2**31:
        raise ValueError("a frame has a number that is none")
    return frame


def _like(array: np.ndarray, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array that must have a kind and a shape; bfloat16 is kept as 16 bits."""
    if kind == ml_dtypes.bfloat16 and array.dtype == np.uint16:
        array = array.view(ml_dtypes.bfloat16)
    if array.dtype != kind or array.shape != shape:
        raise ValueError("an array has another shape or kind than in a session of this model")
    return array


def _record(config: SAM2Config) -> Any:
    """What a record of this model looks like."""
    like = jax.ShapeDtypeStruct
    side = config.mask_size
    return Record(
        masks=like((side, side), np.float32),  # type: ignore[arg-type]
        memory=FrameMemory(
            frame=like((), np.int32),  # type: ignore[arg-type]
            spatial=like((config.feature_size**2, config.mem_dim), ml_dtypes.bfloat16),  # type: ignore[arg-type]
            pointer=like((config.hidden_dim,), np.float32),  # type: ignore[arg-type]
            iou=like((), np.float32),  # type: ignore[arg-type]
            object_score=like((), np.float32),  # type: ignore[arg-type]
        ),
    )


def _encode_id(obj_id: Hashable) -> Any:
    """An object's id in JSON."""
    if isinstance(obj_id, tuple):
        return {"tuple": [_encode_id(part) for part in obj_id]}
    if isinstance(obj_id, np.generic):
        obj_id = obj_id.item()
    if obj_id is None or isinstance(obj_id, str | int | float):
        return obj_id
    raise TypeError(
        f"Object id {obj_id!r} cannot be written: use strings, numbers, or tuples of them."
    )


def _decode_id(obj_id: Any) -> Hashable:
    if isinstance(obj_id, dict):
        return tuple(_decode_id(part) for part in obj_id["tuple"])
    return obj_id
