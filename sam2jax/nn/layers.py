"""The few layers that everything is made of; float32 parameters, computed in `dtype`."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jax.ops import conv as conv_ops
from sam2jax.ops.linear import layer_norm, linear, mlp
from sam2jax.types import Array

# PyTorch's default for linear layers and convolutions.
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
embedding_init = nn.initializers.truncated_normal(0.02)
token_init = nn.initializers.normal(1.0)  # of what the decoder takes beside image features
# How paths of layers end whose results join a residual stream: it is in float32, and so are they.
UNROUNDED = ("/proj", "mlp/layers_1", "attn/out_proj", "cross_attn_image/out_proj", "linear2")


class Linear(nn.Module):
    """[..., I] -> [..., features]; also every 1x1 convolution. Not `rounded`: see `UNROUNDED`."""

    features: int
    dtype: jnp.dtype
    rounded: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return linear(x, kernel, bias, self.dtype, rounded=self.rounded)


class Conv(nn.Module):
    """[B, H, W, I] -> [B, H', W', features]."""

    features: int
    kernel_size: int
    stride: int
    padding: int
    dtype: jnp.dtype
    rounded: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = self.kernel_size
        kernel = self.param("kernel", kernel_init, (size, size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return conv_ops.conv(
            x,
            kernel,
            bias,
            stride=self.stride,
            padding=self.padding,
            dtype=self.dtype,
            rounded=self.rounded,
        )


class DepthwiseConv(nn.Module):
    """[B, H, W, C] -> [B, H, W, C]."""

    kernel_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = self.kernel_size
        kernel = self.param(
            "kernel",
            nn.initializers.variance_scaling(
                1 / 3, "fan_in", "uniform", in_axis=(0, 1), out_axis=2
            ),
            (size, size, x.shape[-1]),
        )
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return conv_ops.depthwise_conv(x, kernel, bias, self.dtype)


class UpsampleConv(nn.Module):
    """Transposed convolution of width and stride 2: [B, H, W, I] -> [B, 2H, 2W, features]."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param(
            "kernel",
            nn.initializers.variance_scaling(
                1 / 3, "fan_in", "uniform", in_axis=(1, 2, 3), out_axis=0
            ),
            (x.shape[-1], 2, 2, self.features),
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return conv_ops.upsample_conv(x, kernel, bias, self.dtype)


class LayerNorm(nn.Module):
    """Over the last axis, in float32. PyTorch's `LayerNorm` and the official `LayerNorm2d`."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.eps)


class Projection(nn.Module):
    """The parameters of a linear layer, for callers that apply them in another order."""

    in_features: int
    features: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        kernel = self.param("kernel", kernel_init, (self.in_features, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


class MLP(nn.Module):
    """Linear layers with an activation between them; the last one's result may stay unrounded."""

    features: tuple[int, ...]
    dtype: jnp.dtype
    activation: Callable[[Array], Array] = jax.nn.relu
    rounded: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        widths = zip((x.shape[-1], *self.features), self.features, strict=False)
        layers = [Projection(*width, name=f"layers_{i}")() for i, width in enumerate(widths)]
        return mlp(x, layers, self.activation, self.dtype, rounded=self.rounded)


def dropout(module: nn.Module, x: Array, rate: float) -> Array:
    """Drops single values, where `module` is applied with a random key named "dropout"."""
    return _dropped(module, x, rate, x.shape)


def drop_path(module: nn.Module, x: Array, rate: float) -> Array:
    """Drops what a residual branch adds, for whole images of [B, ...] (arXiv 1603.09382)."""
    return _dropped(module, x, rate, (x.shape[0],) + (1,) * (x.ndim - 1))


def _dropped(module: nn.Module, x: Array, rate: float, shape: tuple[int, ...]) -> Array:
    if not rate or not module.has_rng("dropout"):
        return x
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
