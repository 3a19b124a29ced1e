"""Hiera, the trunk of the image encoder (arXiv 2306.00989; official `backbones/hieradet.py`)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from sam2jax.config import HieraConfig
from sam2jax.nn.layers import (
    MLP,
    Conv,
    LayerNorm,
    Linear,
    Projection,
    drop_path,
    embedding_init,
)
from sam2jax.ops.attention import self_attention
from sam2jax.ops.conv import max_pool_2x2
from sam2jax.ops.linear import gelu, linear
from sam2jax.ops.pieces import by_pieces
from sam2jax.ops.resize import resize_bicubic
from sam2jax.types import Array

POSITION = "position"  # in prepared parameters, the map that is added to an image


class MultiScaleAttention(nn.Module):
    """Self-attention within windows, or over the whole map; queries may be pooled 2x2 first."""

    in_features: int
    features: int
    num_heads: int
    window: int
    pool: bool
    dtype: jnp.dtype
    kernels: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        qkv = Projection(self.in_features, 3 * self.features, name="qkv")()
        proj = Projection(self.features, self.features, name="proj")()
        attend = functools.partial(
            _attend,
            num_heads=self.num_heads,
            window=self.window,
            pool=self.pool,
            dtype=self.dtype,
            kernels=self.kernels,
        )
        _, height, width, channels = x.shape
        if not self.window or height % self.window:
            return attend(x, qkv, proj)
        # A row of windows is as good as an image.
        item, values = (self.window, width, channels), self.window * width * 3 * self.features
        return by_pieces(attend, x, qkv, proj, item=item, values=values)


def _attend(
    x: Array,
    qkv: tuple[Array, Array],
    proj: tuple[Array, Array],
    *,
    num_heads: int,
    window: int,
    pool: bool,
    dtype: jnp.dtype,
    kernels: bool,
) -> Array:
    features = len(proj[1])
    projected = linear(x, *qkv, dtype)
    query = max_pool_2x2(projected[..., :features]) if pool else None
    # Official windows are filled up with zeros before they are projected.
    out = self_attention(projected, qkv[1], num_heads, window=window, query=query, kernel=kernels)
    return linear(out, *proj, dtype, rounded=False)


class MultiScaleBlock(nn.Module):
    """A transformer block over windows (`window` 0: over the whole map)."""

    features: int
    num_heads: int
    window: int
    pool: bool
    mlp_ratio: int
    drop_path: float
    dtype: jnp.dtype
    kernels: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shortcut = x
        x = LayerNorm(1e-6, name="norm1")(x).astype(self.dtype)
        if x.shape[-1] != self.features:
            # Or XLA makes one product of this one and `qkv`, and a copy to part them again.
            apart = lax.optimization_barrier(x)
            shortcut = Linear(self.features, self.dtype, rounded=False, name="proj")(apart)
            if self.pool:
                shortcut = max_pool_2x2(shortcut)
        x = MultiScaleAttention(
            x.shape[-1],
            self.features,
            self.num_heads,
            self.window,
            self.pool,
            self.dtype,
            self.kernels,
            name="attn",
        )(x)
        x = shortcut + drop_path(self, x, self.drop_path)
        widths = (self.mlp_ratio * self.features, self.features)
        mlp = MLP(widths, self.dtype, gelu, rounded=False, name="mlp")
        return x + drop_path(self, mlp(LayerNorm(1e-6, name="norm2")(x)), self.drop_path)


class Hiera(nn.Module):
    """Images [B, S, S, 3] -> a map per stage, [B, S/4, S/4, C] to [B, S/32, S/32, 8C]."""

    config: HieraConfig
    dtype: jnp.dtype
    kernels: bool = True

    def setup(self) -> None:
        config = self.config
        self.patch_embed = PatchEmbed(config.embed_dim, self.dtype)
        background = config.window_pos_embed_bkg_spatial_size
        window = config.window_spec[0]
        self.pos_embed = self.param("pos_embed", embedding_init, (*background, config.embed_dim))
        self.pos_embed_window = self.param(
            "pos_embed_window", embedding_init, (window, window, config.embed_dim)
        )
        blocks, index = [], 0
        for stage, depth in enumerate(config.stages):
            for first in (True,) + (False,) * (depth - 1):
                new_stage = first and stage > 0
                # The block that opens a stage still works in the windows of the stage before.
                window = config.window_spec[stage - 1 if new_stage else stage]
                blocks.append(
                    MultiScaleBlock(
                        features=config.embed_dim * 2**stage,
                        num_heads=config.num_heads * 2**stage,
                        window=0 if index in config.global_att_blocks else window,
                        pool=new_stage,
                        mlp_ratio=config.mlp_ratio,
                        drop_path=config.drop_path_rate * index / max(sum(config.stages) - 1, 1),
                        dtype=self.dtype,
                        kernels=self.kernels,
                    )
                )
                index += 1
        self.blocks = blocks

    def __call__(self, images: Array) -> list[Array]:
        x = self.patch_embed(images)
        x = x + self.position(*x.shape[1:3])
        stage_ends = {sum(self.config.stages[: i + 1]) - 1 for i in range(len(self.config.stages))}
        stages = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in stage_ends:
                stages.append(x)
        return stages

    def position(self, height: int, width: int) -> Array:
        """A coarse map, resized, plus a window's map, tiled (arXiv 2311.05613)."""
        if self.has_variable("params", POSITION):
            return self.get_variable("params", POSITION)
        background = resize_bicubic(self.pos_embed[None], height, width)
        window = self.pos_embed_window
        tiles = (height // window.shape[0], width // window.shape[1], 1)
        return background + jnp.tile(window, tiles)[None]


class PatchEmbed(nn.Module):
    """[B, S, S, 3] -> [B, S/4, S/4, features]."""

    features: int
    dtype: jnp.dtype

    def setup(self) -> None:
        self.proj = Conv(
            self.features, kernel_size=7, stride=4, padding=3, dtype=self.dtype, rounded=False
        )

    def __call__(self, images: Array) -> Array:
        return self.proj(images)
