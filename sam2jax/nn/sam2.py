"""SAM 2: the boxes of the paper's figure, composed (official `sam2_base.py`).

A module is a description; parameters are an argument. `model.apply({"params": params}, ...,
method="encode_image")` runs one box. N objects share a frame's features; the leading axis of
everything else is objects.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.nn.hiera import POSITION
from sam2jax.nn.image_encoder import ImageEncoder
from sam2jax.nn.layers import MLP, UNROUNDED, Conv, Linear, embedding_init
from sam2jax.nn.mask_decoder import EXACT, MaskDecoder
from sam2jax.nn.memory_attention import MemoryAttention, MemoryTokens, pairs_split
from sam2jax.nn.memory_encoder import MemoryEncoder
from sam2jax.nn.prompt_encoder import PromptEncoder
from sam2jax.ops.position import sine_1d, sine_2d
from sam2jax.types import Array, ImageFeatures, MaskCandidates, MemoryRead


class SAM2(nn.Module):
    """A SAM 2 model without parameters: hashable, immutable, fit to be a static argument."""

    config: SAM2Config

    def __repr__(self) -> str:
        config = self.config
        return f"SAM2({config.name}, image_size={config.image_size}, dtype={config.dtype})"

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = config.hidden_dim
        self.image_encoder = ImageEncoder(config)
        self.sam_prompt_encoder = PromptEncoder(config)
        self.sam_mask_decoder = MaskDecoder(config)
        self.no_mem_embed = self.param("no_mem_embed", embedding_init, (width,))
        if config.images_only:
            return
        self.memory_encoder = MemoryEncoder(config)
        self.memory_attention = MemoryAttention(config)
        self.mask_downsample = Conv(1, 4, stride=4, padding=0, dtype=dtype)
        self.obj_ptr_proj = MLP((width, width, width), dtype)
        self.maskmem_tpos_enc = self.param(
            "maskmem_tpos_enc", embedding_init, (config.num_maskmem, config.mem_dim)
        )
        # Part of every official checkpoint, read by no forward pass.
        self.no_mem_pos_enc = self.param("no_mem_pos_enc", embedding_init, (width,))
        self.no_obj_ptr = self.param("no_obj_ptr", embedding_init, (width,))
        if config.no_obj_embed_spatial:
            self.no_obj_embed_spatial = self.param(
                "no_obj_embed_spatial", embedding_init, (config.mem_dim,)
            )
        if config.add_tpos_enc_to_obj_ptrs:
            self.obj_ptr_tpos_proj = Linear(config.mem_dim, dtype)

    def encode_image(self, images: Array) -> ImageFeatures:
        """Normalised frames [B, S, S, 3] -> features, all that later stages see of them."""
        stride4, stride8, stride16 = self.image_encoder(images)
        high_res = self.sam_mask_decoder.project_high_res(stride4, stride8)
        return ImageFeatures(*high_res, features=stride16)

    def without_memory(self, features: Array) -> Array:
        """What the decoder sees of a frame that is answered without memory: [B, H, W, C]."""
        return features + self.no_mem_embed.reshape(1, 1, 1, -1)

    def condition_on_memory(self, features: Array, memory: MemoryRead) -> Array:
        """A frame's features [1, H, W, C], conditioned on N objects' memories: [N, H, W, C].

        `memory` has a leading [N]; every object needs at least one valid spatial memory, and what
        comes out for one that has none means nothing.
        """
        config = self.config
        place = sine_2d(config.feature_size, config.mem_dim).reshape(1, 1, -1, config.mem_dim)
        time = self.maskmem_tpos_enc[memory.spatial_tpos]
        spatial_position = jnp.asarray(place) + time[:, :, None]
        count, slots, width = memory.pointers.shape
        pieces = config.pointer_tokens
        pointers = memory.pointers.reshape(count, slots * pieces, config.mem_dim)
        pointer_position = jnp.zeros_like(pointers)
        if config.add_tpos_enc_to_obj_ptrs:
            encoded = self.obj_ptr_tpos_proj(sine_1d(memory.pointer_position, width))
            pointer_position = jnp.repeat(encoded, pieces, axis=1)
        pointer_scale = memory.pointer_scale
        if pointer_scale is not None:
            pointer_scale = jnp.repeat(pointer_scale, pieces, axis=1)
        tokens = MemoryTokens.make(
            memory.spatial,
            spatial_position,
            memory.num_spatial,
            pointers,
            pointer_position,
            memory.num_pointers * pieces,
            memory.spatial_scale,
            pointer_scale,
            config.memory_pooling,
            jnp.dtype(config.dtype),
        )
        return self.memory_attention(features, tokens)

    def decode_masks(
        self,
        features: Array,
        high_res: tuple[Array, Array],
        points: Array,
        labels: Array,
        num_points: Array,
        mask: Array | None = None,
        has_mask: Array | None = None,
    ) -> MaskCandidates:
        """Prompted features -> mask candidates.

        Args:
          features: [1 or N, H, W, C], conditioned on memory or not.
          high_res: the frame's `high_res_s0` and `high_res_s1`, leading axis 1 or N.
          points: [N, P, 2] as (x, y) in pixels of the S x S image.
          labels: [N, P] int32 in {-1, 0, 1, 2, 3}.
          num_points: [N] int32; entries past it are padding. -1: no prompt tokens at all.
          mask: [N, S/4, S/4] mask prompt as logits, of the objects marked in `has_mask` [N] bool.

        As in the official code a "not a point" token (label -1) follows the points, and an object
        without points is given one such token in their place, hence two.
        """
        index = jnp.arange(labels.shape[1], dtype=jnp.int32)[None]
        labels = jnp.where((index == 0) & (num_points == 0)[:, None], -1, labels)
        prompted = (num_points >= 0)[:, None]
        real = prompted & (index < jnp.maximum(num_points, 1)[:, None])
        points = jnp.pad(points, ((0, 0), (0, 1), (0, 0)))
        labels = jnp.pad(labels, ((0, 0), (0, 1)), constant_values=-1)
        real = jnp.concatenate([real, prompted], axis=1)
        tokens, dense = self.sam_prompt_encoder(points, labels, mask, has_mask)
        image_pe = self.sam_prompt_encoder.dense_position()
        return self.sam_mask_decoder(features, high_res, image_pe, tokens, real, dense)

    def downsample_mask(self, mask: Array) -> Array:
        """A mask prompt [N, S, S] as the decoder takes it: [N, S/4, S/4] logits, learned."""
        return self.mask_downsample(mask[..., None])[..., 0]

    def object_pointer(self, token: Array, present: Array) -> Array:
        """A mask's output token [N, C] -> object pointer [N, C] float32."""
        return self.absent_pointer(self.obj_ptr_proj(token).astype(jnp.float32), present)

    def absent_pointer(self, pointer: Array, present: Array) -> Array:
        """Puts the learned pointer of absence where `present` [N] is false."""
        return jnp.where(present[:, None], pointer, self.no_obj_ptr[None])

    def encode_memory(self, features: Array, mask_weights: Array, object_score: Array) -> Array:
        """A frame and its masks -> spatial memories.

        Args:
          features: [1, H, W, C], not conditioned.
          mask_weights: [N, S, S], between -10 and 10.
          object_score: [N] logits; SAM 2.1 marks the memory of an absent object.

        Returns:
          [N, HW, D] bfloat16, which the official tracker stores even in float32.
        """
        config = self.config
        memory = self.memory_encoder(features, mask_weights).astype(jnp.float32)
        if config.no_obj_embed_spatial:
            absent = (object_score <= 0).astype(jnp.float32)[:, None, None, None]
            memory = memory + absent * self.no_obj_embed_spatial.reshape(1, 1, 1, -1)
        memory = memory.reshape(memory.shape[0], -1, config.mem_dim)
        return memory.astype(jnp.bfloat16)

    def __call__(self, images: Array) -> MaskCandidates:
        """Touches every parameter; only for `init`."""
        config = self.config
        frame = self.encode_image(images)
        mask = jnp.zeros((1, config.image_size, config.image_size), jnp.float32)
        features, logits = self.without_memory(frame.features), mask[:, ::4, ::4]
        if not config.images_only:
            memory = self.encode_memory(frame.features, mask, jnp.ones(1, jnp.float32))
            pointer = self.object_pointer(
                jnp.zeros((1, config.hidden_dim), jnp.float32), jnp.ones(1, bool)
            )
            one = jnp.ones(1, jnp.int32)
            read = MemoryRead(
                spatial=memory[:, None],
                spatial_tpos=one[:, None],
                spatial_frame=one[:, None],
                num_spatial=one,
                pointers=pointer[:, None],
                pointer_position=jnp.ones((1, 1), jnp.float32),
                pointer_frame=one[:, None],
                num_pointers=one,
            )
            features = self.condition_on_memory(frame.features, read)
            logits = self.downsample_mask(mask)
        return self.decode_masks(
            features,
            (frame.high_res_s0, frame.high_res_s1),
            jnp.zeros((1, 1, 2), jnp.float32),
            jnp.zeros((1, 1), jnp.int32),
            jnp.ones(1, jnp.int32),
            logits,
            jnp.ones(1, bool),
        )


@functools.lru_cache(maxsize=16)
def param_shapes(config: SAM2Config) -> Any:
    """The parameter tree of a model as nested dicts of `jax.ShapeDtypeStruct`."""
    # It does not depend on the image's size, and tracing a small one takes half the time.
    small = dataclasses.replace(config, image_size=64, memory_pooling=1)
    return jax.eval_shape(lambda: init_params(small, jax.random.key(0)))


def init_params(config: SAM2Config, key: Array) -> Any:
    """Random parameters, as a plain nested dict of float32 arrays."""
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    return SAM2(config).lazy_init(key, images)["params"]


def prepare_params(model: SAM2, params: Any) -> Any:
    """Parameters for inference: what a frame makes of them alone is made once and for all.

    Kernels and biases of a bfloat16 model are rounded, the position map is resized, projections
    that are rotated are reordered. Answers stay the same; a GPU is spared hundreds of small
    operations a frame, a tenth of its time. Not for training or saving: gradients would be summed
    in bfloat16, and of what is made in advance nothing reaches the parameters it is made of.
    """
    config = model.config
    side = config.image_size // 4
    position = model.apply(
        {"params": params}, method=lambda m: m.image_encoder.trunk.position(side, side)
    )
    encoder = params["image_encoder"]
    trunk = {**encoder["trunk"], POSITION: position}
    params = {**params, "image_encoder": {**encoder, "trunk": trunk}}
    if not config.images_only:
        heads = config.memory_attention.num_heads
        params["memory_attention"] = pairs_split(params["memory_attention"], heads)
    return params if config.dtype == "float32" else _rounded(params, config.dtype)


def _rounded(params: Any, dtype: str, path: str = "") -> Any:
    """Kernels and biases in `dtype`, but for what is used in float32: biases that are added to a
    residual stream (`UNROUNDED`), and the modules that are computed in it (`EXACT`)."""
    if "kernel" in params:
        kept = ("bias",) if path.endswith(UNROUNDED) else ()
        return {k: v if k in kept else jnp.asarray(v, dtype) for k, v in params.items()}
    parts = {k: v for k, v in params.items() if isinstance(v, Mapping) and k not in EXACT}
    return {**params, **{k: _rounded(v, dtype, f"{path}/{k}") for k, v in parts.items()}}
