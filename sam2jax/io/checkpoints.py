"""Checkpoints that sam2jax writes: one safetensors file, or an Orbax folder.

Both carry the model's configuration as JSON, so that any size can be read back. Parameters are a
flat dict here, `a/b/c`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from sam2jax.config import SAM2Config
from sam2jax.io.files import PathLike, atomic_dir, atomic_path

FORMAT_VERSION = 1
HEADER = "sam2jax"  # the key of our JSON in a safetensors header
HEADER_FILE = "sam2jax.json"  # the same beside an Orbax tree
WEIGHTS = pathlib.Path(__file__).parents[1] / "weights"  # what ships with the package
_TREE = "params"


def header(config: SAM2Config) -> str:
    """The JSON that says which model the tensors beside it are."""
    return json.dumps({"version": FORMAT_VERSION, "config": config.to_dict()})


def config_from_header(text: str, name: str) -> SAM2Config:
    """Reads `header`; `name` is the file's, for messages.

    Raises:
        ValueError: it is damaged, or of a later version.
    """
    try:
        values = json.loads(text)
        version, config = values["version"], values["config"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: its configuration cannot be read.") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{name} is of format {version!r:.20}, and this sam2jax reads {FORMAT_VERSION}; "
            "upgrade it."
        )
    try:
        return SAM2Config.from_dict(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} has a configuration that makes no model: {error}") from error


# One file --------------------------------------------------------------------------------------


def is_safetensors(path: PathLike) -> bool:
    """Whether a file begins as a safetensors file does: a length, then a JSON object."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def save_safetensors(
    path: PathLike, tensors: Mapping[str, np.ndarray], config: SAM2Config, **metadata: str
) -> None:
    """Writes tensors of any layout and the configuration.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the library makes a file that only its owner reads
        try:
            safetensors.numpy.save_file(whole, temporary, {HEADER: header(config), **metadata})
            temporary.chmod(mode)
        except safetensors.SafetensorError as error:  # of the disk, which it does not tell apart
            raise OSError(f"{path} cannot be written: {error}.") from error


def load_safetensors(path: PathLike) -> tuple[dict[str, np.ndarray], SAM2Config | None]:
    """Reads tensors, and the configuration where there is one.

    Raises:
        ValueError: the file is damaged.
    """
    path = pathlib.Path(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, TypeError) as error:
        raise ValueError(
            f"{path.name} is a damaged or unsupported safetensors file ({error}); download or copy "
            "it again."
        ) from error
    text = metadata.get(HEADER)
    return tensors, None if text is None else config_from_header(text, path.name)


# A folder --------------------------------------------------------------------------------------


def is_orbax_folder(path: PathLike) -> bool:
    """Whether `save_orbax` wrote it."""
    return (pathlib.Path(path) / HEADER_FILE).is_file()


def save_orbax(path: PathLike, params: Mapping[str, np.ndarray], config: SAM2Config) -> None:
    """Writes a flat dict of parameters as a nested Orbax tree, the configuration beside it."""
    from orbax.checkpoint import v1 as ocp  # seconds to import, and seldom needed

    with atomic_dir(path) as temporary:
        ocp.save(str(temporary / _TREE), jax.device_put(unflatten_dict(params, sep="/")))
        (temporary / HEADER_FILE).write_text(header(config))


def load_orbax(path: PathLike) -> tuple[dict[str, np.ndarray], SAM2Config]:
    """Reads what `save_orbax` wrote.

    Raises:
        ValueError: the folder is damaged.
    """
    from orbax.checkpoint import v1 as ocp

    path = pathlib.Path(path).absolute()
    tree_path = str(path / _TREE)
    text = (path / HEADER_FILE).read_text(encoding="utf-8", errors="replace")
    config = config_from_header(text, path.name)
    # Asked for by shape and device: otherwise Orbax wants the devices that it was saved from.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            ocp.metadata(tree_path).metadata,
        )
        tree = ocp.load(tree_path, wanted)
        return {
            name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()
        }, config
    except Exception as error:  # Orbax and TensorStore raise many kinds, of many lines
        reason = str(error).split(" [", 1)[0].splitlines()[0]
        raise ValueError(f"{path.name} is a damaged Orbax checkpoint: {reason[:200]}") from error
