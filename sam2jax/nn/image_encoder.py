"""The image encoder: Hiera and a feature pyramid (official `backbones/image_encoder.py`)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.nn.hiera import Hiera
from sam2jax.nn.layers import Linear
from sam2jax.ops.conv import upsample_nearest_2x
from sam2jax.types import Array


class FpnNeck(nn.Module):
    """Brings the trunk's four maps to one width and sums the coarsest two.

    The stride-4 and stride-8 maps stay lateral; stride 16 adds stride 32, which is then dropped.
    """

    features: int
    dtype: jnp.dtype

    def setup(self) -> None:
        self.convs = [Linear(self.features, self.dtype) for _ in range(4)]  # coarsest first

    def __call__(self, stages: list[Array]) -> list[Array]:
        stride4, stride8, stride16, stride32 = (
            conv(x) for conv, x in zip(reversed(self.convs), stages, strict=True)
        )
        coarse = upsample_nearest_2x(stride32.astype(jnp.float32))
        return [stride4, stride8, stride16 + coarse]


class ImageEncoder(nn.Module):
    """Normalised images [B, S, S, 3] -> maps of width C and strides 4, 8 and 16, finest first."""

    config: SAM2Config

    def setup(self) -> None:
        dtype = jnp.dtype(self.config.dtype)
        self.trunk = Hiera(self.config.trunk, dtype, self.config.kernels)
        self.neck = FpnNeck(self.config.hidden_dim, dtype)

    def __call__(self, images: Array) -> list[Array]:
        return self.neck(self.trunk(images))
