"""Sessions as files, from which they continue with the same answers to the last bit.

A session's file is a NumPy archive: a header (JSON) and, for every object, its prompts, answers
and memories. The video is not in it.
"""

from __future__ import annotations

import json
import pathlib
import zipfile
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from sam2jax.config import SAM2Config
from sam2jax.io.files import PathLike, atomic_path
from sam2jax.predictors.programs import Record
from sam2jax.predictors.session import InferenceState, ObjectHistory
from sam2jax.types import FrameMemory

FORMAT = "sam2jax session 1"
RECORDS = ("cond", "recent", "pending_cond", "pending_recent")

# What NumPy and JSON raise for files that are not what they should be.
DAMAGE = (ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile)

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
    header = {
        "format": FORMAT,
        "config": config.to_dict(),
        "video": {"source": state.source, "size": [state.video_height, state.video_width]},
        "clip_length": state.clip_length,
        "history": state.history,
        "offload_state_to_cpu": state.offload_state_to_cpu,
        "ids": [_encode_id(obj_id) for obj_id in state.objects],
        "tracked": [[*h.tracked.items()] for h in state.objects.values()],
    }
    arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8), **(extra or {})}
    for place, history in enumerate(state.objects.values()):
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
    ours, theirs = config.to_dict(), header["config"]
    differing = [name for name in ours if json.loads(json.dumps(ours[name])) != theirs.get(name)]
    if differing:
        raise ValueError(
            f"{path} is a session of another model: {', '.join(differing)} differ. Load it into a "
            f"predictor of {theirs.get('name')} with the same options."
        )
    state = open_state(header, arrays)
    size = [state.video_height, state.video_width]
    if size != header["video"]["size"] or state.clip_length != header["clip_length"]:
        raise ValueError(
            f"{path} is a session on another video, of height and width "
            f"{header['video']['size']}; got {size}."
        )
    for place, (obj_id, tracked) in enumerate(zip(header["ids"], header["tracked"], strict=True)):
        prefix = f"{place}/"
        own = {name[len(prefix) :]: x for name, x in arrays.items() if name.startswith(prefix)}
        history = _unpack(own, on_device=not state.offload_state_to_cpu)
        history.tracked = {frame: reverse for frame, reverse in tracked}
        state.objects[_decode_id(obj_id)] = history
    state.version += 1
    return state


def _read(path: PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays; what the file's checksums and header let pass is whole."""
    problem: Exception | None = None
    with pathlib.Path(path).open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            header = json.loads(arrays.pop("header").tobytes())
            if header["format"] == FORMAT:
                return header, arrays
        except DAMAGE as error:
            problem = error
    raise ValueError(f"{path} is no session that sam2jax wrote, or it is damaged.") from problem


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


def _unpack(arrays: Arrays, *, on_device: bool) -> ObjectHistory:
    history = ObjectHistory()
    for name, value in arrays.items():
        kind, _, rest = name.partition("/")
        if kind == "points":
            history.points[int(rest)] = (value, arrays[f"labels/{rest}"])
        elif kind == "masks":
            history.masks[int(rest)] = value
    for name in RECORDS:
        for row, frame in enumerate(arrays.get(f"{name}/frames", ())):
            leaves = []
            for index in range(len(jax.tree.leaves(_SHAPE))):
                leaf = arrays[f"{name}/{index}"][row]
                leaves.append(leaf.view(ml_dtypes.bfloat16) if leaf.dtype == np.uint16 else leaf)
            record = jax.tree.unflatten(jax.tree.structure(_SHAPE), leaves)
            getattr(history, name)[int(frame)] = jax.device_put(record) if on_device else record
    return history


# A record's structure, to take it apart by.
_SHAPE: Any = Record(
    masks=0,  # type: ignore[arg-type]
    memory=FrameMemory(frame=0, spatial=0, pointer=0, iou=0, object_score=0),  # type: ignore[arg-type]
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
