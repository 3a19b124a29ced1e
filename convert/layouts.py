"""The namings a checkpoint can have, which model it is, and whether it is whole.

A checkpoint is judged by names and shapes before any number is read. What the model needs is
named and shaped as the checkpoint would have it, so that what is wrong is said in its own words.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from sam2jax.config import VARIANTS, SAM2Config
from sam2jax.convert import huggingface
from sam2jax.convert.rules import OFFICIAL, rename, shorten
from sam2jax.nn.sam2 import param_shapes

Layout = Literal["sam2jax", "official", "huggingface"]
Tensors = Mapping[str, np.ndarray]

_OFFICIAL_BACK = tuple(rule.reversed() for rule in OFFICIAL)
_FLOATS = {np.dtype(kind) for kind in ("f2", "f4", "f8", ml_dtypes.bfloat16)}


class _Landmarks(NamedTuple):
    """Names that tell checkpoints apart."""

    pos_embed: str  # in every checkpoint of this layout, and of no other
    channels: int  # its axis of channels
    newer: str  # in SAM 2.1, not in 2.0


_LANDMARKS: dict[Layout, _Landmarks] = {
    "sam2jax": _Landmarks("image_encoder/trunk/pos_embed", 2, "no_obj_embed_spatial"),
    "official": _Landmarks("image_encoder.trunk.pos_embed", 1, "no_obj_embed_spatial"),
    "huggingface": _Landmarks(
        "vision_encoder.backbone.pos_embed", 1, "occlusion_spatial_embedding_parameter"
    ),
}


def layout_of(tensors: Tensors, name: str) -> Layout:
    """Which naming a set of tensors has. `name` is its source's, for messages, here and below."""
    for layout, landmarks in _LANDMARKS.items():
        if landmarks.pos_embed in tensors:
            return layout
    raise ValueError(
        f"{name} is not a SAM 2 checkpoint: none of its {len(tensors):,} tensors "
        f"({shorten(tensors) or 'there are none'}) is SAM 2's image encoder."
    )


def unwrap(tensors: Tensors, name: str) -> Tensors:
    """Takes off what a wrapper put before every name: `module.`, `_orig_mod.`, `model.`, several.

    Raises:
        ValueError: there are other tensors beside the model's, or two models.
    """
    marks = [landmarks.pos_embed for landmarks in _LANDMARKS.values()]
    if any(mark in tensors for mark in marks):
        return tensors
    prefixes = {
        key.removesuffix(mark) for key in tensors for mark in marks if key.endswith(f".{mark}")
    }
    if not prefixes:
        return tensors
    if len(prefixes) > 1:
        raise ValueError(
            f"{name} holds {len(prefixes)} models, named {shorten(map(repr, sorted(prefixes)))}; "
            "save the tensors of one of them alone."
        )
    (prefix,) = prefixes
    others = [key for key in tensors if not key.startswith(prefix)]
    if others:
        raise ValueError(
            f"{name} holds a model whose names begin with {prefix!r}, and other tensors "
            f"({shorten(others)}); save the model's alone."
        )
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def to_params(tensors: Tensors, layout: Layout) -> dict[str, np.ndarray]:
    """Tensors of any layout as a flat dict of parameters, `a/b/c`; arrays are views."""
    match layout:
        case "sam2jax":
            return dict(tensors)
        case "official":
            return rename(tensors, OFFICIAL)
        case "huggingface":
            return rename(huggingface.to_official(tensors), OFFICIAL)


def from_params(params: Tensors, layout: Layout) -> dict[str, np.ndarray]:
    """The way back."""
    match layout:
        case "sam2jax":
            return dict(params)
        case "official":
            return rename(params, _OFFICIAL_BACK)
        case "huggingface":
            return huggingface.from_official(rename(params, _OFFICIAL_BACK))


def is_images_only(tensors: Tensors, layout: Layout) -> bool:
    """Whether it has no memory at all, as `Sam2Model` of `transformers` has none.

    An official checkpoint is always whole: one without memory is damaged.
    """
    return layout != "official" and not any(key.startswith("memory_") for key in tensors)


def identify(tensors: Tensors, layout: Layout) -> SAM2Config:
    """The variant nearest to a set of tensors by depth, width and version; `check` has the word."""
    landmarks = _LANDMARKS[layout]
    shape = tensors[landmarks.pos_embed].shape
    width = shape[landmarks.channels] if len(shape) > landmarks.channels else 0
    blocks = {found[1] for key in tensors if (found := re.search(r"\bblocks[._](\d+)", key))}
    images_only = is_images_only(tensors, layout)
    version = "sam2.1" if landmarks.newer in tensors else "sam2"

    def distance(config: SAM2Config) -> tuple[int, int]:
        trunk = config.trunk
        return abs(sum(trunk.stages) - len(blocks)), abs(trunk.embed_dim - width)

    candidates = (c for c in VARIANTS.values() if c.name.startswith(f"{version}_"))
    nearest = min(candidates, key=distance)
    # Without memory the two versions are the same model.
    if not images_only:
        return nearest
    return dataclasses.replace(nearest, name=f"{nearest.name}_images", images_only=True)


def check(tensors: Tensors, config: SAM2Config, layout: Layout, name: str, model: str = "") -> None:
    """Fails unless names, shapes and kinds are exactly those of the model.

    Args:
        model: what the message calls the model; by default its name.

    Raises:
        ValueError: with the number and the first few of what is missing, unexpected and misshapen.
    """
    expected = expected_shapes(config, layout)
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    misshapen = [
        f"{key} {list(value.shape)} instead of {list(expected[key])}"
        for key, value in tensors.items()
        if key in expected and value.shape != expected[key]
    ]
    strange = [
        f"{key} of {value.dtype}" for key, value in tensors.items() if value.dtype not in _FLOATS
    ]
    wrong = {
        "missing": missing,
        "unexpected": unexpected,
        "misshapen": misshapen,
        "not floating point": strange,
    }
    parts = [f"{len(keys)} {what} ({shorten(keys)})" for what, keys in wrong.items() if keys]
    if parts:
        raise ValueError(
            f"{name} does not fit {model or config.name}. Of its {len(expected):,} tensors: "
            f"{'; '.join(parts)}."
        )


def expected_shapes(config: SAM2Config, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model has.

    Raises:
        ValueError: the configuration's numbers do not go together.
    """
    params = {
        # A view of one number: it has a shape, and costs nothing.
        name: np.broadcast_to(np.float32(0), shape)
        for name, shape in _param_shapes(config).items()
    }
    return {key: value.shape for key, value in from_params(params, layout).items()}


def _param_shapes(config: SAM2Config) -> dict[str, tuple[int, ...]]:
    try:
        tree = param_shapes(config)
    except Exception as error:  # the configuration may come from a file's header
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the configuration {config.name!r} makes no model: {reason}") from error
    leaves: dict[str, Any] = flatten_dict(tree, sep="/")
    return {name: leaf.shape for name, leaf in leaves.items()}
