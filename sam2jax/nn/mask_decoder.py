"""The mask decoder: a two-way transformer and its heads (official `sam/mask_decoder.py`)."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.nn.layers import (
    MLP,
    LayerNorm,
    Linear,
    Projection,
    UpsampleConv,
    token_init,
)
from sam2jax.ops.attention import MASKED, attention, fold_heads, unfold_heads
from sam2jax.ops.linear import einsum, gelu, linear
from sam2jax.types import Array, MaskCandidates

# Modules whose small kernels are multiplied with each other, exactly.
EXACT = ("cross_attn_token_to_image", "cross_attn_image_to_token", "final_attn_token_to_image")


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller."""

    features: int
    inner: int
    num_heads: int
    dtype: jnp.dtype

    def setup(self) -> None:
        self.q_proj = Linear(self.inner, self.dtype)
        self.k_proj = Linear(self.inner, self.dtype)
        self.v_proj = Linear(self.inner, self.dtype)
        self.out_proj = Linear(self.features, self.dtype, rounded=False)

    def __call__(self, query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
        """[B, T, C], [B, K, C], [B, K, C] -> [B, T, C]; `mask` [B, K] says which keys count."""
        heads = self.num_heads
        if mask is not None:
            mask = jnp.repeat(mask, heads, axis=0)
        out = attention(
            fold_heads(self.q_proj(query), heads),
            fold_heads(self.k_proj(key), heads),
            fold_heads(self.v_proj(value), heads),
            mask=mask,
        )
        return self.out_proj(unfold_heads(out, heads))


class ImageAttention(nn.Module):
    """Multi-head attention between a few tokens and all positions of an image.

    Positions are hundreds of times more than tokens, so nothing is projected there. Keys' and
    queries' projections of the image move to the tokens, q (W x + b) = (q W) x + q b, and those of
    its values behind the sum over it, sum_i a_i (W x_i + b) = W (sum_i a_i x_i) + b. An image that
    is the same for all tokens' owners is given once, with a leading axis of 1.
    """

    features: int
    inner: int
    num_heads: int
    dtype: jnp.dtype
    kernels: bool

    def setup(self) -> None:
        self.q_proj = Projection(self.features, self.inner)
        self.k_proj = Projection(self.features, self.inner)
        self.v_proj = Projection(self.features, self.inner)
        self.out_proj = Projection(self.inner, self.features)

    @property
    def _scale(self) -> float:
        return (self.inner // self.num_heads) ** -0.5

    def _kernel(self, projection: Projection) -> Array:
        """[C, heads, d]"""
        return projection()[0].reshape(self.features, self.num_heads, -1)

    def _project(self, tokens: Array, projection: Projection) -> Array:
        """[N, T, C] -> [N, T, heads, d] float32: tokens are few, so they can be exact."""
        out = linear(tokens, *projection(), jnp.dtype("float32"))
        return out.reshape(*out.shape[:2], self.num_heads, -1)

    def from_image(self, tokens: Array, keys: Array, values: Array) -> Array:
        """Tokens [N, T, C] attend to keys and values [1 or N, HW, C] -> [N, T, C]."""
        count, length, _ = tokens.shape
        query = self._project(tokens, self.q_proj)
        query = einsum("nthd,chd->nhtc", query, self._kernel(self.k_proj))
        pooled = attention(
            query.reshape(keys.shape[0], -1, self.features),
            keys.astype(self.dtype),
            values.astype(self.dtype),
            scale=self._scale,
            kernel=self.kernels,
        )
        pooled = pooled.reshape(count, self.num_heads, length, self.features)
        out = einsum("nhtc,chd->nthd", pooled.astype(jnp.float32), self._kernel(self.v_proj))
        out = out.reshape(count, length, -1) + self.v_proj()[1].reshape(1, 1, -1)
        return linear(out, *self.out_proj(), jnp.dtype("float32"))

    def to_image(self, queries: Array, keys: Array, values: Array, mask: Array) -> Array:
        """Positions [1 or N, HW, C] attend to tokens' keys and values [N, T, C] -> [N, HW, C].

        `mask` [N, T] says which tokens count.
        """
        count, length, _ = keys.shape
        key, value = self._project(keys, self.k_proj), self._project(values, self.v_proj)
        offset = einsum("nthd,hd->nht", key, self.q_proj()[1].reshape(self.num_heads, -1))
        key = einsum("nthd,chd->nhtc", key, self._kernel(self.q_proj))
        kernel, bias = self.out_proj()
        kernel = kernel.reshape(self.num_heads, -1, self.features)
        value = einsum("nthd,hdc->nhtc", value, kernel)

        def flat(x: Array) -> Array:
            return x.reshape(count, -1, self.features).astype(self.dtype)

        queries = jnp.broadcast_to(queries, (count, *queries.shape[1:])).astype(self.dtype)
        scores = einsum("nqc,nsc->nqs", queries, flat(key))
        scores = scores.reshape(count, -1, self.num_heads, length) + offset[:, None]
        scores = jnp.where(mask[:, None, None], scores * self._scale, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        out = einsum("nqs,nsc->nqc", weights.reshape(*weights.shape[:2], -1), flat(value))
        return out + bias.reshape(1, 1, -1)


class TwoWayAttentionBlock(nn.Module):
    """Tokens attend to themselves and to the image, then the image to the tokens."""

    config: SAM2Config
    first: bool

    def setup(self) -> None:
        decoder, dtype = self.config.mask_decoder, jnp.dtype(self.config.dtype)
        width = self.config.hidden_dim
        narrow = width // decoder.attention_downsample_rate
        heads = decoder.num_heads
        self.self_attn = Attention(width, width, heads, dtype)
        self.norm1 = LayerNorm(1e-5)
        image_attention = partial(ImageAttention, width, narrow, heads, dtype, self.config.kernels)
        self.cross_attn_token_to_image = image_attention()
        self.norm2 = LayerNorm(1e-5)
        self.mlp = MLP((decoder.mlp_dim, width), dtype, rounded=False)
        self.norm3 = LayerNorm(1e-5)
        self.cross_attn_image_to_token = image_attention()
        self.norm4 = LayerNorm(1e-5)

    def __call__(self, tokens, image, token_pe, image_pe, token_mask):
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens, token_mask)
        else:
            query = tokens + token_pe
            tokens = tokens + self.self_attn(query, query, tokens, token_mask)
        tokens = self.norm1(tokens)
        query, key = tokens + token_pe, image + image_pe
        tokens = self.norm2(tokens + self.cross_attn_token_to_image.from_image(query, key, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        query = tokens + token_pe
        update = self.cross_attn_image_to_token.to_image(key, query, tokens, token_mask)
        return tokens, self.norm4(image + update)


class TwoWayTransformer(nn.Module):
    config: SAM2Config

    def setup(self) -> None:
        decoder, dtype = self.config.mask_decoder, jnp.dtype(self.config.dtype)
        width = self.config.hidden_dim
        self.layers = [
            TwoWayAttentionBlock(self.config, first=i == 0) for i in range(decoder.num_layers)
        ]
        narrow = width // decoder.attention_downsample_rate
        self.final_attn_token_to_image = ImageAttention(
            width, narrow, decoder.num_heads, dtype, self.config.kernels
        )
        self.norm_final_attn = LayerNorm(1e-5)

    def __call__(self, image: Array, image_pe: Array, tokens: Array, token_mask: Array):
        """Image [1 or N, HW, C], its positions [1, HW, C], tokens [N, T, C], which count [N, T]."""
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe, token_mask)
        update = self.final_attn_token_to_image.from_image(
            tokens + token_pe, image + image_pe, image
        )
        return self.norm_final_attn(tokens + update), image


class MaskDecoder(nn.Module):
    """Prompted features of N objects -> mask candidates."""

    config: SAM2Config

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        decoder, width = config.mask_decoder, config.hidden_dim
        self.num_masks = decoder.num_multimask_outputs + 1
        self.transformer = TwoWayTransformer(config)
        self.obj_score_token = self.param("obj_score_token", token_init, (1, width))
        self.iou_token = self.param("iou_token", token_init, (1, width))
        self.mask_tokens = self.param("mask_tokens", token_init, (self.num_masks, width))
        self.conv_s0 = Linear(width // 8, dtype)
        self.conv_s1 = Linear(width // 4, dtype)
        self.output_upscaling_0 = UpsampleConv(width // 4, dtype)
        self.output_upscaling_1 = LayerNorm(1e-6)
        self.output_upscaling_3 = UpsampleConv(width // 8, dtype)
        self.output_hypernetworks_mlps = [
            MLP((width, width, width // 8), dtype) for _ in range(self.num_masks)
        ]
        hidden = (decoder.iou_head_hidden_dim,) * (decoder.iou_head_depth - 1)
        self.iou_prediction_head = MLP((*hidden, self.num_masks), dtype)
        self.pred_obj_score_head = MLP((width, width, 1), dtype)

    def project_high_res(self, stride4: Array, stride8: Array) -> tuple[Array, Array]:
        """What the decoder adds of the finer maps; depends on the frame alone."""
        return self.conv_s0(stride4), self.conv_s1(stride8)

    def __call__(
        self,
        features: Array,
        high_res: tuple[Array, Array],
        image_pe: Array,
        tokens: Array,
        token_mask: Array,
        dense: Array,
    ) -> MaskCandidates:
        """Decodes.

        Args:
          features: [1 or N, H, W, C], the frame's map, conditioned on memory or not.
          high_res: [1 or N, 4H, 4W, C/8] and [1 or N, 2H, 2W, C/4].
          image_pe: [H, W, C].
          tokens: [N, P, C] prompt tokens; token_mask: [N, P] bool, which are real.
          dense: broadcastable to `features`, the mask prompt's embedding.
        """
        count, (_, height, width, channels) = tokens.shape[0], features.shape
        own = jnp.concatenate([self.obj_score_token, self.iou_token, self.mask_tokens])
        own = jnp.broadcast_to(own[None], (count, *own.shape))
        token_mask = jnp.pad(token_mask, ((0, 0), (own.shape[1], 0)), constant_values=True)
        tokens = jnp.concatenate([own, tokens.astype(own.dtype)], axis=1)
        image = (features + dense).reshape(-1, height * width, channels)
        image_pe = image_pe.reshape(1, height * width, channels)
        tokens, image = self.transformer(image, image_pe, tokens, token_mask)
        mask_tokens = tokens[:, 2 : 2 + self.num_masks]

        stride4, stride8 = high_res
        image = image.reshape(count, height, width, channels)
        upscaled = gelu(self.output_upscaling_1(self.output_upscaling_0(image) + stride8))
        upscaled = gelu(self.output_upscaling_3(upscaled) + stride4)
        weights = jnp.stack(
            [mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], axis=1
        )
        return MaskCandidates(
            masks=einsum("nmc,nhwc->nmhw", weights, upscaled),
            ious=jax.nn.sigmoid(self.iou_prediction_head(tokens[:, 1]).astype(jnp.float32)),
            tokens=mask_tokens,
            object_score=self.pred_obj_score_head(tokens[:, 0])[:, 0].astype(jnp.float32),
        )
