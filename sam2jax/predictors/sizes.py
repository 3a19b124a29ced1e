"""Programs for images of many sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from sam2jax.ops.resize import preprocess_image
from sam2jax.types import Array

MOST_SIZES = 32  # for which a function's programs are kept: those of an image and all its crops

_Result = TypeVar("_Result")


def jit_for_sizes(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """As `jax.jit`, for functions that are called with ever new sizes of images: keeps the programs
    of the last few, where `jax.jit` keeps thousands, each of some MiB.

    Arguments by position are arrays, those by name are static.
    """

    @functools.lru_cache(maxsize=MOST_SIZES)
    def program(kinds: Any, **static: Any) -> Callable[..., _Result]:
        # A function of its own: programs live as long as what was jitted.
        return jax.jit(lambda *arrays: function(*arrays, **static))

    @functools.wraps(function)
    def call(*arrays: Any, **static: Any) -> _Result:
        leaves, structure = jax.tree.flatten(arrays)
        kinds = structure, tuple((x.shape, x.dtype) for x in leaves)
        return program(kinds, **static)(*arrays)

    return call


@jit_for_sizes
def preprocess(images: Array, *, size: int) -> Array:
    """Apart from the encoder, which thus is compiled once for images of all sizes."""
    return preprocess_image(images, size)
