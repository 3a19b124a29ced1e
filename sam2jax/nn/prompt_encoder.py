"""The prompt encoder: points, boxes and masks to embeddings (official `sam/prompt_encoder.py`)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.nn.layers import Conv, LayerNorm, Linear, token_init
from sam2jax.ops.linear import gelu
from sam2jax.ops.position import pixel_centres, random_fourier
from sam2jax.types import Array

NUM_POINT_KINDS = 4  # background, foreground, and a box's two corners


class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features of (x, y) in [0, 1]; the frequencies are part of the checkpoint."""

    features: int

    @nn.compact
    def __call__(self, coords: Array) -> Array:
        gaussian = self.param(
            "positional_encoding_gaussian_matrix",
            nn.initializers.normal(1.0),
            (2, self.features // 2),
        )
        return random_fourier(coords, gaussian)


class PromptEncoder(nn.Module):
    """Embeds prompts of N objects on one frame."""

    config: SAM2Config

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = config.hidden_dim
        self.pe_layer = PositionEmbeddingRandom(width)
        self.point_embeddings = [
            self.param(f"point_embeddings_{i}", token_init, (1, width))
            for i in range(NUM_POINT_KINDS)
        ]
        self.not_a_point_embed = self.param("not_a_point_embed", token_init, (1, width))
        self.no_mask_embed = self.param("no_mask_embed", token_init, (1, width))
        hidden = config.mask_in_chans
        self.mask_downscaling_0 = Conv(hidden // 4, 2, stride=2, padding=0, dtype=dtype)
        self.mask_downscaling_1 = LayerNorm(1e-6)
        self.mask_downscaling_3 = Conv(hidden, 2, stride=2, padding=0, dtype=dtype)
        self.mask_downscaling_4 = LayerNorm(1e-6)
        self.mask_downscaling_6 = Linear(width, dtype)

    def embed_points(self, points: Array, labels: Array) -> Array:
        """Points as tokens: (x, y) in the model's pixels [N, P, 2], labels [N, P] -> [N, P, C].

        Label -1 is a learned "not a point" token; it replaces the position.
        """
        position = self.pe_layer((points + 0.5) / self.config.image_size)
        kinds = jnp.concatenate([self.not_a_point_embed, *self.point_embeddings])
        not_a_point = (labels == -1)[..., None]
        return jnp.where(not_a_point, 0.0, position) + kinds[labels + 1]

    def embed_masks(self, masks: Array) -> Array:
        """Mask logits [N, S/4, S/4] -> [N, S/16, S/16, C]."""
        x = self.mask_downscaling_0(masks[..., None])
        x = gelu(self.mask_downscaling_1(x))
        x = gelu(self.mask_downscaling_4(self.mask_downscaling_3(x)))
        return self.mask_downscaling_6(x)

    def dense_position(self) -> Array:
        """Position of every feature-map cell, in the points' own encoding: [S/16, S/16, C]."""
        return self.pe_layer(jnp.asarray(pixel_centres(self.config.feature_size)))

    def __call__(self, points: Array, labels: Array, masks: Array | None, has_mask: Array | None):
        """Returns tokens [N, P, C] and dense embeddings [N, S/16, S/16, C] (or [1, 1, 1, C])."""
        dense = self.no_mask_embed[:, None, None]
        if masks is not None and has_mask is not None:
            embedded = self.embed_masks(masks)
            dense = jnp.where(has_mask[:, None, None, None], embedded, dense)
        return self.embed_points(points, labels), dense
