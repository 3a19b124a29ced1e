"""The same model twice: ours and the official one, with the same live weights."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import unflatten_dict

from sam2jax.config import NANO, VARIANTS, SAM2Config
from sam2jax.convert import convert, read
from sam2jax.convert.layouts import to_params
from sam2jax.nn.sam2 import SAM2
from tests import oracle

# design: features within 5e-5, logits within 1e-3 on a frame and 5e-3 after a whole clip.
FEATURES, LOGITS, CLIP = 5e-5, 1e-3, 5e-3


@dataclasses.dataclass(frozen=True)
class Pair:
    """Our description and parameters beside the official module that holds the same weights."""

    model: SAM2
    params: Any
    official: Any

    @property
    def config(self) -> SAM2Config:
        return self.model.config

    def apply(self, method: str | Callable, *args: Any) -> Any:
        """Runs one box of our model, compiled."""
        return _apply(self.model, self.params, *args, method=method)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _apply(model: SAM2, params: Any, *args: Any, method: str | Callable) -> Any:
    return model.apply({"params": params}, *args, method=method)


def at(name: str, image_size: int, **options: Any) -> SAM2Config:
    """A named variant at another image size."""
    return dataclasses.replace(VARIANTS[name], image_size=image_size, **options)


@functools.lru_cache(maxsize=2)  # the larger ones take a gigabyte each
def pair(config: SAM2Config, seed: int = 0, score_shift: float = 0.0) -> Pair:
    """Builds both sides. `score_shift` moves the object score, so that objects come and go."""
    official = oracle.build(config, seed)
    official.sam_mask_decoder.pred_obj_score_head.layers[2].bias += score_shift
    tensors = {name: tensor.numpy() for name, tensor in official.state_dict().items()}
    params = jax.tree.map(jnp.asarray, unflatten_dict(to_params(tensors, "official"), sep="/"))
    return Pair(SAM2(config), params, official)


def shipped() -> Pair:
    """The model that ships: ours as it is loaded, and the official one from a `.pt` made of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "nano.pt"
        convert(NANO.name, path)
        state = torch.load(path, weights_only=True)["model"]
    params = jax.device_put(unflatten_dict(read(NANO.name).params(), sep="/"))
    return Pair(SAM2(NANO), params, oracle.filled(oracle.construct(NANO), state))


def assert_close(ours: Any, theirs: Any, bar: float, what: str = "") -> None:
    """Largest absolute difference within `bar`."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape, f"{what}: shapes {ours.shape} and {theirs.shape}"
    worst = float(np.abs(ours - theirs).max())
    assert worst <= bar, f"{what} differs by {worst:.2e}, more than {bar:.0e}"


def iou(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of two masks, 1 where both are empty."""
    union = np.logical_or(ours, theirs).sum()
    return float(np.logical_and(ours, theirs).sum() / union) if union else 1.0
