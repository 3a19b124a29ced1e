"""Reading a checkpoint from any source, and writing it in any format."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from sam2jax.config import VARIANTS, SAM2Config
from sam2jax.convert import huggingface, huggingface_files, torch_file
from sam2jax.convert.layouts import (
    Layout,
    check,
    from_params,
    identify,
    is_images_only,
    layout_of,
    to_params,
    unwrap,
)
from sam2jax.convert.rules import shorten
from sam2jax.io import checkpoints, hub
from sam2jax.io.files import PathLike, atomic_dir, atomic_path

Format = Literal["orbax", "safetensors", "official", "huggingface"]

_HF_WEIGHTS = "model.safetensors"  # as `transformers` names it
_STATES = ("model", "state_dict")  # the official package's key of the weights; Lightning's
_OF_FILES = (".bin", ".ckpt", ".pt2", ".msgpack", ".npz", ".h5", ".onnx")  # not made here
_FILES = {".pt": "official", ".pth": "official", ".safetensors": "safetensors"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are exactly those of a model."""

    name: str  # of its file or folder, for messages
    config: SAM2Config
    layout: Layout
    tensors: Mapping[str, np.ndarray]  # named and shaped as the source has them; may be views

    def params(self) -> dict[str, np.ndarray]:
        """Its parameters as a flat dict, `a/b/c`: new float32 arrays."""
        return {
            name: np.array(value, np.float32, order="C")
            for name, value in to_params(self.tensors, self.layout).items()
        }


def read(source: PathLike) -> Checkpoint:
    """Reads an official `.pt`, a Hugging Face file, folder or hub id, or what sam2jax saved or
    ships.

    What a file is, is seen in its content. Which model, says the configuration that sam2jax saved
    with it, or the `config.json` beside Hugging Face's `model.safetensors`, or else its names and
    shapes.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: it is no checkpoint of SAM 2, or not a whole one.
    """
    path = _locate(source)
    if path.is_dir():
        tensors, config = checkpoints.load_orbax(path)
    elif checkpoints.is_safetensors(path):
        tensors, config = checkpoints.load_safetensors(path)
    elif torch_file.is_torch_file(path):
        tensors, config = _read_torch(path)
    else:
        what = "neither a .pt file nor a safetensors file" if path.stat().st_size else "empty"
        raise ValueError(f"{path.name} is {what}: no checkpoint; download or copy it again.")
    tensors = unwrap(tensors, path.name)
    layout = layout_of(tensors, path.name)
    said = ""
    if layout == "huggingface":
        tensors = huggingface.complete(tensors)
        beside = path.with_name(huggingface_files.CONFIG_FILE)
        if config is None and path.name == _HF_WEIGHTS and beside.is_file():
            images_only = is_images_only(tensors, layout)
            config = huggingface_files.read_config(beside, images_only)
            said = f"the {beside.name} beside it"
    if config is None:
        config = identify(tensors, layout)
        said = f"any official model; the nearest is {config.name}"
    check(tensors, config, layout, path.name, said)
    return Checkpoint(path.name, config, layout, tensors)


def write(
    dest: PathLike, params: Mapping[str, np.ndarray], config: SAM2Config, to: Format | None = None
) -> Format:
    """Writes a flat dict of parameters; what was at `dest` stays until the whole is written.

    Args:
        dest: a file for `safetensors` and `official`, a folder for `orbax` and `huggingface`.
        params: arrays by path, exactly those of the model, written in their own precision.
        config: the model.
        to: the format; by default the one that the suffix of `dest` names, else `orbax`.

    Returns:
        The format.

    Raises:
        ValueError: the parameters are not those of the model, or `dest` cannot hold the format.
    """
    to = format_for(dest, to)
    check(params, config, "sam2jax", "what is to be saved")
    match to:
        case "orbax":
            checkpoints.save_orbax(dest, params, config)
        case "safetensors":
            checkpoints.save_safetensors(dest, params, config)
        case "official":
            if config.images_only:
                raise ValueError(
                    "an official checkpoint has the memory's parameters, and these are for images "
                    "only; use the format huggingface, safetensors or orbax."
                )
            header = checkpoints.header(config)  # the official loader reads "model" alone
            with atomic_path(dest) as temporary:
                state = {"model": from_params(params, to), checkpoints.HEADER: header}
                torch_file.save_torch(temporary, state)
        case "huggingface":
            with atomic_dir(dest) as temporary:
                tensors = from_params(params, to)
                checkpoints.save_safetensors(temporary / _HF_WEIGHTS, tensors, config, format="pt")
                for name, values in huggingface_files.files(config).items():
                    (temporary / name).write_text(json.dumps(values, indent=2) + "\n")
    return to


def format_for(dest: PathLike, to: str | None = None) -> Format:
    """The format to write `dest` in: `to` if given, else by suffix."""
    suffix = pathlib.Path(dest).suffix.lower()
    if to is None:
        to = _FILES.get(suffix, "orbax")
        if suffix in _OF_FILES:
            raise ValueError(
                f"{dest}: expected {', '.join(_FILES)}, or the name of a folder (Orbax); or say "
                "which format it is to be."
            )
    if to not in get_args(Format):
        raise ValueError(f"unknown format {to!r}; choose from {', '.join(get_args(Format))}.")
    if suffix in _FILES and to in ("official", "safetensors") and to != _FILES[suffix]:
        raise ValueError(f"{dest} would hold the format {to}, and {suffix} is {_FILES[suffix]}'s.")
    if to in ("orbax", "huggingface") and suffix in _FILES:
        raise ValueError(f"{dest} names a file, and the format {to} is a folder.")
    return to  # type: ignore[return-value]


def _locate(source: PathLike) -> pathlib.Path:
    """The file, or the Orbax folder, that a source names."""
    path = pathlib.Path(source)
    if not path.exists():
        name = os.fspath(source)
        if hub.is_hub_id(name):
            return hub.download(name)
        if name in VARIANTS:
            shipped = checkpoints.WEIGHTS / f"{name}.safetensors"
            if shipped.is_file():
                return shipped
            raise ValueError(
                f"sam2jax ships no weights of {name!r}; give the path of a checkpoint, or "
                f"'facebook/{name.replace('_', '-')}' to download it."
            )
        raise FileNotFoundError(
            f"there is no file or folder {name!r}; 'facebook/sam2.1-hiera-tiny' would be "
            "downloaded, and 'sam2.1_hiera_nano' ships."
        )
    if not path.is_dir() or checkpoints.is_orbax_folder(path):
        return path
    if (path / _HF_WEIGHTS).is_file():
        return path / _HF_WEIGHTS
    raise ValueError(
        f"the folder {path} holds no checkpoint: neither {checkpoints.HEADER_FILE} (saved by "
        f"sam2jax) nor {_HF_WEIGHTS} (Hugging Face). Give the path of a file instead."
    )


def _read_torch(path: pathlib.Path) -> tuple[dict[str, np.ndarray], SAM2Config | None]:
    """The `model` or `state_dict` of a `.pt` file, or the whole of one that is a bare state."""
    values: Any = torch_file.load_torch(path)
    contents = values if isinstance(values, dict) else {}
    key = next((key for key in _STATES if isinstance(contents.get(key), dict)), None)
    state = contents if key is None else contents[key]
    is_state = isinstance(state, dict) and all(isinstance(v, np.ndarray) for v in state.values())
    if not is_state or not all(isinstance(key, str) for key in state):
        found = (
            f"has {shorten(map(str, contents))}" if contents else f"is a {type(values).__name__}"
        )
        raise ValueError(
            f"{path.name} holds no weights that can be read: expected {{'model': state_dict}}, as "
            f"the official package saves it, or {{'state_dict': state_dict}}, and it {found}."
        )
    if key is not None and checkpoints.HEADER in contents:
        return state, checkpoints.config_from_header(contents[checkpoints.HEADER], path.name)
    return state, None
