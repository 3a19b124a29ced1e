"""AdamW or Muon with the official recipe's groups: rates, layer decay, weight decay, clipping."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from sam2jax.types import Array

TRUNK, ENCODER = "image_encoder/trunk/", "image_encoder/"
# Scales of the LayerNorms over maps, which the official recipe does decay, unlike all others.
_DECAYED_SCALE = re.compile(
    r"(fuser/layers_\d+/norm|encoder_\d+|output_upscaling_\d+|mask_downscaling_\d+)/scale$"
)

_ADAM_SIZE = 0.2  # root mean square of AdamW's steps, in rates
_FEW = 8  # channels


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The defaults are the official fine-tuning recipe's.

    Muon (arXiv 2502.16982) gives each step of a matrix the same size in all directions. It learns
    from fewer clips where a model starts from nothing. Its steps are as large as AdamW's, so that
    the rates and the weight decay mean the same.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 5e-6
    vision_learning_rate: float | None = 3e-6  # of the image encoder; None: the same
    final_fraction: float = 0.1  # of the rates, where the cosine ends
    warmup_steps: int = 0
    weight_decay: float = 0.1
    layer_decay: float = 0.9  # of the rate, from each block of the trunk to the one before
    clip_norm: float = 0.1  # of all gradients together
    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self) -> None:
        for name in ("learning_rate", "layer_decay", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if self.vision_learning_rate is not None and self.vision_learning_rate < 0:
            raise ValueError(
                f"vision_learning_rate must not be negative, got {self.vision_learning_rate}."
            )
        if self.weight_decay < 0 or self.warmup_steps < 0 or not 0 <= self.final_fraction <= 1:
            raise ValueError(
                "weight_decay and warmup_steps must not be negative, and final_fraction must be "
                f"between 0 and 1, got {self.weight_decay}, {self.warmup_steps} and "
                f"{self.final_fraction}."
            )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: a cosine down to `final_fraction`, after a linear warm-up."""
    if not config.warmup_steps:
        return optax.cosine_decay_schedule(config.learning_rate, steps, config.final_fraction)
    return optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup_steps, steps - 1),
        steps,
        config.learning_rate * config.final_fraction,
    )


def make_optimizer(
    config: OptimizerConfig, paths: Mapping[str, Any], num_blocks: int, steps: int
) -> optax.GradientTransformation:
    """The optimizer of parameters {path: array}.

    Args:
      config: the recipe.
      paths: the parameters, or anything else with their names.
      num_blocks: of the trunk, over which the layer decay counts.
      steps: of the whole run.
    """
    schedule = make_schedule(config, steps)
    factors = {path: rate_factor(config, path, num_blocks) for path in paths}

    def scaled(updates: dict[str, Array], rate: Array) -> dict[str, Array]:
        return {path: -rate * factors[path] * update for path, update in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _preconditioner(config, paths),
        optax.add_decayed_weights(config.weight_decay, {path: is_decayed(path) for path in paths}),
        optax.GradientTransformation(
            init=lambda params: optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32)),
            update=lambda updates, state, params=None: (
                scaled(updates, jnp.asarray(schedule(state.count))),
                optax.ScaleByScheduleState(count=optax.safe_increment(state.count)),
            ),
        ),
    )


def _preconditioner(
    config: OptimizerConfig, paths: Mapping[str, Any]
) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.b1, config.b2)
    if config.kind == "adamw":
        return adam
    muon = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=_axes),
        optax.stateless(lambda updates, _: jax.tree.map(_as_large_as_adam, updates)),
    )
    kinds = {path: "muon" if is_matrix(path, value) else "adam" for path, value in paths.items()}
    return optax.partition({"muon": muon, "adam": adam}, kinds)


def _axes(matrices: Any) -> Any:
    """Kernels as matrices: what is summed over, and the channels that come out."""
    return jax.tree.map(
        lambda x: optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), (x.ndim - 1,)),
        matrices,
    )


def _as_large_as_adam(step: Array) -> Array:
    """An orthogonal matrix [..., out], scaled."""
    wide = step.shape[-1]
    return step * (_ADAM_SIZE * max(wide, step.size // wide) ** 0.5)


def is_matrix(path: str, value: Array) -> bool:
    """Whether Muon steps a parameter: kernels that mix channels, and more than a few of them."""
    mixes = path.endswith("kernel") and value.ndim in (2, 4)
    return mixes and min(value.size // value.shape[-1], value.shape[-1]) >= _FEW


def rate_factor(config: OptimizerConfig, path: str, num_blocks: int) -> float:
    """By what the learning rate of a parameter is multiplied (official
    `layer_decay_param_modifier`; positional maps are left out of the decay)."""
    if not path.startswith(ENCODER):
        return 1.0
    factor = 1.0
    if config.vision_learning_rate is not None:
        factor = config.vision_learning_rate / config.learning_rate
    if not path.startswith(TRUNK) or "pos_embed" in path:
        return factor
    block = re.match(rf"{TRUNK}blocks_(\d+)/", path)
    layer = int(block[1]) + 1 if block else 0  # the patch embedding comes first
    return factor * config.layer_decay ** (num_blocks + 1 - layer)


def is_decayed(path: str) -> bool:
    """Whether a parameter is subject to weight decay."""
    if path.endswith("scale"):
        return _DECAYED_SCALE.search(path) is not None
    return not path.endswith("bias")
