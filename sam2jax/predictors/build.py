"""The official builders (`build_sam.py`), for scripts written for the official package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sam2jax.config import NO_POSTPROCESSING, VARIANTS
from sam2jax.loading import check_options, configured, load
from sam2jax.nn.sam2 import SAM2, init_params
from sam2jax.predictors.options import as_options
from sam2jax.predictors.video import PREDICTOR_OPTIONS, SAM2VideoPredictor

SIZES = {"t": "tiny", "s": "small", "b+": "base_plus", "l": "large"}


class LoadedModel(NamedTuple):
    """A model with its parameters, which the image predictors take."""

    model: SAM2
    params: Any


def build_sam2(
    config_file: str,
    ckpt_path: Any = None,
    device: Any = None,
    mode: Any = None,
    hydra_overrides_extra: Sequence[str] = (),
    apply_postprocessing: bool = True,
    **options: Any,
) -> LoadedModel:
    """Loads a model as the official function of this name does.

    Args:
      config_file: the official name, such as `configs/sam2.1/sam2.1_hiera_t.yaml`, or a variant's.
      ckpt_path: of its checkpoint; None: random weights.
      device, mode: mean nothing here; they are accepted with a warning.
      hydra_overrides_extra: such as `++model.image_size=512`, of options that `load` has. They
        come last: officially those of `apply_postprocessing` do.
      apply_postprocessing: as in `load`.
      **options: of `load`.

    Raises:
      ValueError: there is no such configuration, or the checkpoint is of another model.
      TypeError: there is no such option.
    """
    options = _options(options, device, mode, hydra_overrides_extra)
    return _load(config_file, ckpt_path, apply_postprocessing, options)


def build_sam2_hf(model_id: str, **options: Any) -> LoadedModel:
    """As `load`, with the name of the official function; takes `hydra_overrides_extra`, too."""
    return LoadedModel(*load(model_id, **as_options(options)))


def build_sam2_video_predictor(
    config_file: str,
    ckpt_path: Any = None,
    device: Any = None,
    mode: Any = None,
    hydra_overrides_extra: Sequence[str] = (),
    apply_postprocessing: bool = True,
    **options: Any,
) -> SAM2VideoPredictor:
    """Builds a video predictor as the official function of this name does.

    Arguments and errors are those of `build_sam2`; `options` and overrides may also be the
    predictor's own, and `vos_optimized` is accepted with a warning.
    """
    options = _options(options, device, mode, hydra_overrides_extra)
    own = {name: options.pop(name) for name in PREDICTOR_OPTIONS if name in options}
    return SAM2VideoPredictor(*_load(config_file, ckpt_path, apply_postprocessing, options), **own)


def build_sam2_video_predictor_hf(model_id: str, **options: Any) -> SAM2VideoPredictor:
    """As `SAM2VideoPredictor.from_pretrained`, with the name of the official function."""
    return SAM2VideoPredictor.from_pretrained(model_id, **options)


def _options(
    options: dict[str, Any], device: Any, mode: Any, overrides: Sequence[str]
) -> dict[str, Any]:
    torch = {"device": device, "mode": mode}
    torch = {name: value for name, value in torch.items() if value is not None}
    return as_options({**options, **torch, "hydra_overrides_extra": overrides}, stacklevel=4)


def _load(
    config_file: str, ckpt_path: Any, apply_postprocessing: bool, options: dict[str, Any]
) -> LoadedModel:
    name = _variant(config_file)
    check_options(options)
    if ckpt_path is None:
        defaults = {} if apply_postprocessing else NO_POSTPROCESSING
        config = configured(VARIANTS[name], {**defaults, **options})
        return LoadedModel(SAM2(config), init_params(config, jax.random.key(0)))
    model, params = load(ckpt_path, apply_postprocessing=apply_postprocessing, **options)
    if model.config.name != name:
        raise ValueError(f"{ckpt_path} is {model.config.name}, not {name} as {config_file} says.")
    return LoadedModel(model, params)


def _variant(config_file: str) -> str:
    """`configs/sam2.1/sam2.1_hiera_b+.yaml` -> `sam2.1_hiera_base_plus`."""
    stem = str(config_file).rsplit("/", 1)[-1].removesuffix(".yaml")
    version, _, size = stem.partition("_hiera_")
    name = f"{version}_hiera_{SIZES.get(size, size)}"
    if name not in VARIANTS:
        raise ValueError(
            f"There is no configuration {config_file}; there are {', '.join(VARIANTS)}."
        )
    return name
