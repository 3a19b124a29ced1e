"""The memory encoder: a frame and its mask to a spatial memory (official `memory_encoder.py`)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.nn.layers import Conv, DepthwiseConv, LayerNorm, Linear
from sam2jax.ops.linear import gelu
from sam2jax.types import Array

MASK_CHANNELS = (4, 16, 64, 256)  # each convolution of stride 2 keeps what it folds away


class MaskDownSampler(nn.Module):
    """[N, S, S, 1] -> [N, S/16, S/16, C]."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, channels in enumerate(MASK_CHANNELS):
            x = Conv(channels, 3, stride=2, padding=1, dtype=self.dtype, name=f"encoder_{3 * i}")(x)
            x = gelu(LayerNorm(1e-6, name=f"encoder_{3 * i + 1}")(x))
        return Linear(self.features, self.dtype, name=f"encoder_{3 * len(MASK_CHANNELS)}")(x)


class CXBlock(nn.Module):
    """A ConvNeXt block (arXiv 2201.03545)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        y = DepthwiseConv(7, self.dtype, name="dwconv")(x)
        y = LayerNorm(1e-6, name="norm")(y)
        y = gelu(Linear(4 * width, self.dtype, name="pwconv1")(y))
        y = Linear(width, self.dtype, name="pwconv2")(y)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (width,))
        return x + gamma.reshape(1, 1, 1, -1) * y


class Fuser(nn.Module):
    num_layers: int
    dtype: jnp.dtype

    def setup(self) -> None:
        self.layers = [CXBlock(self.dtype) for _ in range(self.num_layers)]

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x


class MemoryEncoder(nn.Module):
    config: SAM2Config

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.mask_downsampler = MaskDownSampler(config.hidden_dim, dtype)
        self.pix_feat_proj = Linear(config.hidden_dim, dtype)
        self.fuser = Fuser(config.num_fuser_layers, dtype)
        self.out_proj = Linear(config.mem_dim, dtype)

    def __call__(self, features: Array, masks: Array) -> Array:
        """Features [1 or N, H, W, C], mask weights [N, S, S] -> memories [N, H, W, D]."""
        x = self.pix_feat_proj(features) + self.mask_downsampler(masks[..., None])
        return self.out_proj(self.fuser(x))
