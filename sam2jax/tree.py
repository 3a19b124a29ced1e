"""The base of the pytrees: immutable dataclasses that show shapes and dtypes, not numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import export
from jax.core import Tracer

_LONG = 160  # characters


class Tree(struct.PyTreeNode):
    """A `flax.struct` dataclass with a short repr, also of what is traced."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(repr=False, **kwargs)
        # So that functions of states and prompts can be exported. Ours alone: in notebooks names
        # come again and again.
        if cls.__module__.partition(".")[0] == __package__:
            with contextlib.suppress(ValueError):  # the module is loaded once more
                export.register_pytree_node_serialization(
                    cls,
                    serialized_name=f"{cls.__module__}.{cls.__qualname__}",
                    serialize_auxdata=lambda static: json.dumps(static).encode(),
                    deserialize_auxdata=lambda static: tuple(json.loads(static)),
                )

    def __repr__(self) -> str:
        return describe(self)


def describe(value: Any) -> str:
    """A dataclass in few words: `FrameOutput(masks=float32[2, 64, 64], ...)`.

    Arrays are shown as dtype and shape, single numbers as they are, where they are known, and what
    lies inside, where it is long, by its arrays. Fields that are None are left out.
    """
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    shown = (f"{name}={_describe_part(x)}" for name, x in fields.items() if x is not None)
    return f"{type(value).__name__}({', '.join(shown)})"


def _describe_part(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _describe_array(value)
    if callable(value):
        return getattr(value, "__qualname__", repr(value))
    leaves = jax.tree.leaves(value)
    shapes = [np.shape(leaf) for leaf in leaves]
    is_ours = dataclasses.is_dataclass(value)
    text = describe(value) if is_ours else repr(value) if not any(shapes) else None
    if text is not None and len(text) <= _LONG:
        return text
    shared = os.path.commonprefix(shapes) if is_ours else ()
    size = sum(map(math.prod, shapes))
    leading = f" [{', '.join(map(str, shared))}, ...]" if shared else ""
    return f"{type(value).__name__}({len(shapes)} arrays{leading} of {size:,} numbers)"


def _describe_array(array: Any) -> str:
    if array.shape == () and _is_known(array):
        return f"{array.item():.6g}" if jnp.issubdtype(array.dtype, jnp.floating) else str(array)
    return f"{array.dtype}{list(array.shape)}"


def _is_known(array: Any) -> bool:
    """Whether there are numbers here: not of what is traced, given away, or only a shape."""
    if isinstance(array, jax.Array):
        is_traced = isinstance(array, Tracer)
        return not is_traced and not array.is_deleted() and array.is_fully_addressable
    return isinstance(array, np.ndarray | np.generic)
