"""A small model and live weights, for tests here and in projects that build on sam2jax."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sam2jax.config import HieraConfig, MaskDecoderConfig, MemoryAttentionConfig, SAM2Config
from sam2jax.convert.layouts import from_params, to_params
from sam2jax.nn.sam2 import param_shapes

# Gain of a matrix over 1/sqrt(fan_in). The exceptions are louder where few tokens among many, or
# a hard threshold, would hide a parameter; the last layer before the masks is quieter, so that
# logits stay within a few units and the closed tracking loop is not chaotic.
_GAIN = 0.7
_GAINS = {
    "output_hypernetworks_mlps": 0.25,  # its last layer only
    "obj_ptr_proj.layers.2": 4 * _GAIN,
    "obj_ptr_tpos_proj": 5 * _GAIN,
    "pred_obj_score_head.layers.2": 20 * _GAIN,
    "mask_downsample.": 8 * _GAIN,
    "output_upscaling": 1.0,
    "mask_downscaling": 1.0,
}
_EMBEDDING = 0.3
_LOUD_EMBEDDINGS = ("maskmem_tpos_enc", "no_obj_ptr", "no_obj_embed_spatial")


def small_config(**overrides: Any) -> SAM2Config:
    """A SAM 2.1 with every part of the real one, small enough to compile in seconds.

    Its windows do not divide the feature maps, and one block attends globally.
    """
    config = SAM2Config(
        name="small_test",
        trunk=HieraConfig(
            embed_dim=16,
            num_heads=1,
            stages=(1, 2, 3, 1),
            global_att_blocks=(4,),
            window_spec=(4, 2, 6, 3),
            window_pos_embed_bkg_spatial_size=(7, 7),
        ),
        hidden_dim=32,
        mem_dim=16,
        memory_attention=MemoryAttentionConfig(num_layers=2, mlp_dim=64),
        mask_decoder=MaskDecoderConfig(num_heads=4, mlp_dim=64, iou_head_hidden_dim=32),
        image_size=128,
    )
    return dataclasses.replace(config, **overrides)


def random_params(config: SAM2Config, seed: int = 0) -> Any:
    """Live parameters (see `draw`) for any model: nested dicts of float32 arrays."""
    shapes: dict[str, Any] = flatten_dict(param_shapes(config), sep="/")
    blank = {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in shapes.items()}
    official = from_params(blank, "official")
    drawn = {name: draw(name, value.shape, seed) for name, value in official.items()}
    return jax.tree.map(jnp.asarray, unflatten_dict(to_params(drawn, "official"), sep="/"))


def draw(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Draws the official state-dict entry `name`: float32, from (name, shape, seed) alone.

    The official initialisation leaves embeddings, biases and layer scales at or near zero, where
    a model that ignores them would still agree. These weights are *live*: dropping any shows.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    noise = generator.standard_normal(shape).astype(np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "positional_encoding_gaussian_matrix":
        return noise
    if leaf == "gamma":  # layer scale
        return (0.4 + 0.1 * noise).astype(np.float32)
    if leaf == "bias":
        shift = 0.1 if "pred_obj_score_head.layers.2" in name else 0.0
        return (0.1 * noise + shift).astype(np.float32)
    if leaf == "weight" and len(shape) == 1:  # normalisation
        return (1.0 + 0.1 * noise).astype(np.float32)
    if leaf in _LOUD_EMBEDDINGS:
        return (5 * _EMBEDDING * noise).astype(np.float32)
    if "embed" in name or "token" in name or leaf in ("no_mem_embed", "no_mem_pos_enc"):
        return (_EMBEDDING * noise).astype(np.float32)
    fan_in = int(np.prod(shape[1:] or shape))
    return (noise * _gain(name) / np.sqrt(fan_in)).astype(np.float32)


def _gain(name: str) -> float:
    if "output_hypernetworks_mlps" in name and ".layers.2." not in name:
        return _GAIN
    return next((gain for part, gain in _GAINS.items() if part in name), _GAIN)
