"""From any checkpoint to a model and its parameters, and back to a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import sam2jax.convert as convert
from sam2jax.config import NO_POSTPROCESSING, DType, SAM2Config, checked_value
from sam2jax.io.files import PathLike
from sam2jax.nn.sam2 import SAM2

OPTIONS = (  # what can be chosen for a model that is already trained
    "dynamic_multimask_via_stability",
    "dynamic_multimask_stability_delta",
    "dynamic_multimask_stability_thresh",
    "binarize_mask_from_pts_for_mem_enc",
    "fill_hole_area",
    "max_cond_frames_in_attn",
    "memory_temporal_stride_for_eval",
    "memory_pooling",
    "multimask_min_pt_num",
    "multimask_max_pt_num",
    "objects_at_once",
    "kernels",
)


def load(
    source: PathLike,
    *,
    image_size: int | None = None,
    dtype: DType = "float32",
    apply_postprocessing: bool = True,
    **options: Any,
) -> tuple[SAM2, Any]:
    """Loads a checkpoint; which model it is, is read off its own names and shapes.

    Args:
        source: an official `.pt` (2.0 or 2.1, fine-tuned ones too), a Hugging Face safetensors
            file, folder or hub id (`facebook/sam2.1-hiera-tiny`, `owner/name@revision`), what
            `save` wrote, or the name of the model that ships (`sam2.1_hiera_nano`).
        image_size: the size that frames are resized to; None: the model's own, 1024 for official
            ones.
        dtype: what to compute in. Parameters are float32 either way.
        apply_postprocessing: False turns off what the official builders add to a model: falling
            back to several masks, binarised clicks, and hole filling.
        **options: fields of `SAM2Config` that say how to infer (`OPTIONS`); they have the last
            word.

    Returns:
        The model, and its parameters as a nested dict of float32 arrays. A checkpoint for images
        only gives a model without the memory's parts (`model.config.images_only`).

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: it is no whole checkpoint of SAM 2, or an option has a value that cannot be.
        TypeError: there is no option of that name.
    """
    check_options(options)
    checkpoint = convert.read(source)
    config = configured(
        checkpoint.config,
        {
            "image_size": checkpoint.config.image_size if image_size is None else image_size,
            "dtype": dtype,
            **({} if apply_postprocessing else NO_POSTPROCESSING),
            **options,
        },
    )
    return SAM2(config), jax.device_put(unflatten_dict(checkpoint.params(), sep="/"))


def configured(config: SAM2Config, options: Mapping[str, Any]) -> SAM2Config:
    """A configuration with some of its fields set.

    Raises:
      ValueError: a value is of another kind, or cannot be.
    """
    values = {name: checked_value(name, getattr(config, name), v) for name, v in options.items()}
    return dataclasses.replace(config, **values)


def check_options(options: Iterable[str]) -> None:
    """Refuses names that are no option of `load`."""
    unknown = sorted({*options} - {*OPTIONS, "image_size", "dtype"})
    if unknown:
        raise TypeError(
            f"There is no option {', '.join(map(repr, unknown))} of a model; there are image_size, "
            f"dtype, apply_postprocessing, {', '.join(OPTIONS)}."
        )


def save(
    path: PathLike, model: SAM2 | SAM2Config, params: Any, *, to: convert.Format | None = None
) -> None:
    """Saves a model's parameters with its configuration, whole or not at all.

    Args:
        path: the file or folder to write.
        model: the model, or its configuration.
        params: its parameters, as `load` returns them.
        to: `safetensors` (the default for that suffix), `official` (the default for `.pt`; the
            official package loads it), `huggingface` (a folder for `transformers`), or `orbax`
            (a folder; the default for any other name).

    Raises:
        TypeError: what is given is no model, or no parameters.
        ValueError: the parameters are not those of the model, or `path` cannot be written.
    """
    if not (isinstance(model, SAM2 | SAM2Config) and isinstance(params, Mapping)):
        kinds = ", ".join(type(given).__name__ for given in (path, model, params))
        raise TypeError(f"save takes a path, a model and its parameters, got {kinds}.")
    config = model.config if isinstance(model, SAM2) else model
    flat = flatten_dict(params, sep="/")
    convert.write(path, {k: np.asarray(v, np.float32) for k, v in flat.items()}, config, to)
