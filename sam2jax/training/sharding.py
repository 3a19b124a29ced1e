"""Where arrays lie on a mesh of devices: clips are split over all, large kernels over some."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA, SHARDS = "data", "shards"  # axes: of copies of the parameters, and of the parts of one

_SPLIT = re.compile(r"(kernel|lora_a|lora_b)'?\]?$")  # names of what is split; all else is copied


def make_mesh(shards: int = 1) -> Mesh:
    """A mesh [data, shards] of all devices, each copy of the parameters split over `shards`.

    Raises:
      ValueError: the number of devices is no multiple of `shards`.
    """
    devices = np.array(jax.devices())
    if shards < 1 or devices.size % shards:
        raise ValueError(f"shards must divide the {devices.size} devices, got {shards}.")
    kind = (jax.sharding.AxisType.Auto,) * 2
    return Mesh(devices.reshape(-1, shards), (DATA, SHARDS), axis_types=kind)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, P((DATA, SHARDS)))


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """A sharding for each leaf of a training state, by its name and shape."""

    def place(path: Any, leaf: Any) -> NamedSharding:
        split = _SPLIT.search(jax.tree_util.keystr(path))
        return NamedSharding(mesh, _largest_axis(mesh, leaf.shape) if split else P())

    return jax.tree_util.tree_map_with_path(place, tree)


def _largest_axis(mesh: Mesh, shape: tuple[int, ...]) -> P:
    """Splits the largest axis that can be split evenly."""
    parts = mesh.shape[SHARDS]
    fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not fitting:
        return P()
    best = max(fitting, key=lambda axis: shape[axis])
    return P(*(SHARDS if axis == best else None for axis in range(best + 1)))
