"""Options of predictors: which are whose."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from typing import Any

from sam2jax.loading import load
from sam2jax.nn.sam2 import SAM2

# Of the official builders and their configuration files.
TORCH_OPTIONS = ("device", "mode", "vos_optimized", "compile_image_encoder")


def model_and_params(model: Any, params: Any) -> tuple[SAM2, Any]:
    """What a predictor is made of: a model and its parameters, a pair of them, or what another
    predictor has.

    Raises:
      TypeError: it is none of these.
    """
    if isinstance(model, SAM2):
        if params is None:
            raise TypeError("Expected the model's parameters, too: `load` returns both.")
        return model, params
    if params is not None:
        raise TypeError("The model comes with its parameters: give options by their names.")
    both = getattr(model, "model", None), getattr(model, "params", None)
    both = model if isinstance(model, tuple) else both
    if len(both) == 2 and isinstance(both[0], SAM2):
        return both[0], both[1]
    raise TypeError(
        f"Expected a model and its parameters, as `load` returns them, got {type(model).__name__}."
    )


def load_with(
    source: Any, options: dict[str, Any], own: Iterable[str]
) -> tuple[SAM2, Any, dict[str, Any]]:
    """Loads a checkpoint; also returns the options that are the predictor's `own`."""
    options = as_options(options, stacklevel=4)
    kept = {name: options.pop(name) for name in own if name in options}
    return *load(source, **options), kept


def as_options(options: dict[str, Any], stacklevel: int = 3) -> dict[str, Any]:
    """Options of the official builders as ours: those of `hydra_overrides_extra` by their names,
    and with one warning without those that only mean something to PyTorch."""
    options = dict(options)
    options.update(map(_override, options.pop("hydra_overrides_extra", ())))
    dropped = [name for name in TORCH_OPTIONS if name in options]
    if dropped:
        warnings.warn(
            f"{', '.join(dropped)}: not used here; JAX chooses the device (see JAX_PLATFORMS), and "
            "everything is compiled.",
            stacklevel=stacklevel,
        )
    return {name: value for name, value in options.items() if name not in TORCH_OPTIONS}


def _override(text: str) -> tuple[str, Any]:
    """`++model.image_size=512` -> ("image_size", 512)."""
    match = re.fullmatch(r"\+{0,2}model\.(?:sam_mask_decoder_extra_args\.)?(\w+)=(.+)", text)
    try:
        if match:
            return match[1], json.loads(match[2].lower())
    except json.JSONDecodeError:
        pass
    raise ValueError(f"Expected an override like ++model.image_size=512, got {text!r}.")
