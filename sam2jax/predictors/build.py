"""The official builders (`build_sam.py`), for scripts written for the official package."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import jax

from sam2jax.config import NO_POSTPROCESSING, VARIANTS, SAM2Config
from sam2jax.nn.sam2 import SAM2, init_params
from sam2jax.predictors.options import without_torch
from sam2jax.predictors.video import PREDICTOR_OPTIONS, SAM2VideoPredictor

SIZES = {"t": "tiny", "s": "small", "b+": "base_plus", "l": "large"}


def build_sam2_video_predictor(
    config_file: str,
    ckpt_path: Any = None,
    *,
    hydra_overrides_extra: Sequence[str] = (),
    apply_postprocessing: bool = True,
    **options: Any,
) -> SAM2VideoPredictor:
    """Builds a video predictor as the official function of this name does.

    Args:
      config_file: the official name, such as `configs/sam2.1/sam2.1_hiera_t.yaml`, or a variant's.
      ckpt_path: of its checkpoint; None: random weights.
      hydra_overrides_extra: such as `++model.image_size=512`, of options that
        `SAM2VideoPredictor.from_pretrained` has.
      apply_postprocessing: as in `load`.
      **options: of `SAM2VideoPredictor.from_pretrained`. `device`, `mode` and `vos_optimized` are
        accepted with a warning.

    Raises:
      ValueError: there is no such configuration or option, or the checkpoint is of another model.
    """
    name = _variant(config_file)
    options = without_torch({**options, **dict(map(_override, hydra_overrides_extra))})
    if ckpt_path is None:
        return _untrained(VARIANTS[name], apply_postprocessing, options)
    predictor = SAM2VideoPredictor.from_pretrained(
        ckpt_path, apply_postprocessing=apply_postprocessing, **options
    )
    if predictor.config.name != name:
        raise ValueError(
            f"{ckpt_path} is {predictor.config.name}, not {name} as {config_file} says."
        )
    return predictor


def build_sam2_video_predictor_hf(model_id: str, **options: Any) -> SAM2VideoPredictor:
    """As `SAM2VideoPredictor.from_pretrained`, with the name of the official function."""
    return SAM2VideoPredictor.from_pretrained(model_id, **options)


def _untrained(
    config: SAM2Config, apply_postprocessing: bool, options: dict[str, Any]
) -> SAM2VideoPredictor:
    own = {name: options.pop(name) for name in PREDICTOR_OPTIONS if name in options}
    defaults = {} if apply_postprocessing else NO_POSTPROCESSING
    config = dataclasses.replace(config, **{**defaults, **options})
    return SAM2VideoPredictor(SAM2(config), init_params(config, jax.random.key(0)), **own)


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


def _override(text: str) -> tuple[str, Any]:
    """`++model.image_size=512` -> ("image_size", 512)."""
    match = re.fullmatch(r"\+{0,2}model\.(?:sam_mask_decoder_extra_args\.)?(\w+)=(.+)", text)
    try:
        if match:
            return match[1], json.loads(match[2].lower())
    except json.JSONDecodeError:
        pass
    raise ValueError(f"Expected an override like ++model.image_size=512, got {text!r}.")
