"""Low-rank updates of attention projections (LoRA, arXiv 2106.09685), as a function of parameters.

No module knows of it: `W + scale * A B` is taken in the place of W before the model is run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sam2jax.types import Array

PROJECTIONS = r"(q_proj|k_proj|v_proj|out_proj|attn/qkv|attn/proj)/kernel$"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Everything else is frozen."""

    rank: int = 8
    alpha: float = 16.0  # the update is scaled by alpha / rank
    targets: str = PROJECTIONS  # regular expression over parameter names

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}.")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"targets is no regular expression: {error}.") from error


def init_lora(config: LoraConfig, params: Mapping[str, Array], key: Array) -> dict[str, Array]:
    """Updates that are zero: {path/lora_a: [in, r], path/lora_b: [r, out]} of kernels [in, out].

    Raises:
      ValueError: no parameter is meant.
    """
    paths = [
        path
        for path, value in sorted(params.items())
        if re.search(config.targets, path) and value.ndim == 2
    ]
    if not paths:
        raise ValueError(f"targets {config.targets!r} is the name of no matrix.")
    lora = {}
    for path, path_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        rows, columns = params[path].shape
        normal = jax.random.normal(path_key, (rows, config.rank))
        lora[f"{path}/lora_a"] = normal / jnp.sqrt(float(rows))
        lora[f"{path}/lora_b"] = jnp.zeros((config.rank, columns))
    return lora


def merge_lora(
    config: LoraConfig, params: Mapping[str, Array], lora: Mapping[str, Array]
) -> dict[str, Array]:
    """The parameters {path: array} with the updates added."""
    merged, scale = dict(params), config.alpha / config.rank
    for name, low in lora.items():
        if name.endswith("/lora_a"):
            path = name.removesuffix("/lora_a")
            update = jnp.matmul(low, lora[f"{path}/lora_b"], precision="highest")
            merged[path] = params[path] + scale * update
    return merged
