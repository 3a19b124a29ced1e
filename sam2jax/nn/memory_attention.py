"""Memory attention: features conditioned on the memory bank (official `memory_attention.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.nn.layers import LayerNorm, Linear, Projection, dropout
from sam2jax.ops.attention import MASKED, attention, fold_heads
from sam2jax.ops.conv import average_pool
from sam2jax.ops.linear import einsum, linear, mlp
from sam2jax.ops.memory import attend_to_maps, place_after, place_in
from sam2jax.ops.position import sine_2d
from sam2jax.ops.rope import project_and_rotate, rope_table, split_pairs
from sam2jax.tree import Tree
from sam2jax.types import Array

WATCHED = "watched"  # the collection that holds what memories received, on request
IN_PAIRS = "{}_in_pairs"  # in prepared parameters, a projection after `split_pairs`


class MemoryTokens(Tree):
    """What N objects' memories are attended to by: spatial ones first, pointers behind them."""

    spatial_keys: Array  # [N, K * HW, D] spatial memories with their positions, valid ones first
    pointer_keys: Array  # [N, Q, D] pointer tokens with their positions, valid ones first
    # Both without positions, the valid ones at the front: [N, K * HW + Q, D]. With cells pooled in
    # squares of P: [N, K * HW / P + Q, D + 1], times the share that each has of a cell's weight,
    # and that share behind them.
    values: Array
    spatial_length: Array  # [N] int32, how many spatial tokens are valid
    length: Array  # [N] int32, how many tokens are valid in all

    @classmethod
    def make(
        cls,
        spatial: Array,  # [N, K, HW, D]
        spatial_position: Array,  # [N, K, HW, D]
        num_spatial: Array,  # [N] int32, valid memories
        pointers: Array,  # [N, Q, D]
        pointer_position: Array,  # [N, Q, D]
        num_pointers: Array,  # [N] int32, valid tokens
        spatial_scale: Array | None = None,  # [N, K] of keys
        pointer_scale: Array | None = None,  # [N, Q] of keys
        pooling: int = 1,  # side of the squares of cells that are one
        dtype: jnp.dtype = jnp.float32,  # of values
    ) -> MemoryTokens:
        count, slots, cells, width = spatial.shape
        spatial_length = num_spatial * (cells // pooling**2)
        spatial_keys, pointer_keys = spatial + spatial_position, pointers + pointer_position
        if spatial_scale is not None:
            spatial_keys = spatial_keys * spatial_scale[:, :, None, None]
        if pointer_scale is not None:
            pointer_keys = pointer_keys * pointer_scale[:, :, None]
        values, pointers = spatial.reshape(count, -1, width).astype(dtype), pointers.astype(dtype)
        if pooling > 1:
            values = _with_share(pool_squares(values, cells, pooling), 1.0)
            pointers = _with_share(pointers, pooling**-2)
        return cls(
            spatial_keys=spatial_keys.reshape(count, slots * cells, width),
            pointer_keys=pointer_keys,
            values=place_after(values, pointers, spatial_length),
            spatial_length=spatial_length,
            length=spatial_length + num_pointers,
        )


def pool_squares(x: Array, cells: int, pooling: int) -> Array:
    """Maps of `cells`, one behind another, averaged over squares of cells: [N, K * HW, C] ->
    [N, K * HW / pooling**2, C]."""
    count, side = x.shape[0], math.isqrt(cells)
    maps = x.reshape(-1, side, side, x.shape[-1])
    return average_pool(maps, pooling).reshape(count, -1, x.shape[-1])


def _with_share(x: Array, share: float) -> Array:
    return jnp.pad(x * share, ((0, 0), (0, 0), (0, 1)), constant_values=share)


class RoPEAttention(nn.Module):
    """Attention with rotary positions, to the frame itself or to the memory bank."""

    config: SAM2Config
    in_features: int  # of keys and values

    def setup(self) -> None:
        width = self.config.hidden_dim
        self.q_proj = Projection(width, width)
        self.k_proj = Projection(self.in_features, width)
        self.v_proj = Projection(self.in_features, width)
        self.out_proj = Linear(width, jnp.dtype(self.config.dtype), rounded=False)

    def _query(self, x: Array) -> Array:
        """[B, HW, C] -> [B, HW, C], scaled."""
        width = self.config.hidden_dim // self.config.memory_attention.num_heads
        return self._rotated(x, self.q_proj, scale=width**-0.5)

    def _rotated(
        self, x: Array, projection: Projection, *, scale: float = 1.0, room: int = 0
    ) -> Array:
        """Projects and rotates maps, [B, maps * HW, I] -> [B, maps * HW + room, C], heads side by
        side, and zeros behind them."""
        sizes, dtype = self.config.memory_attention, jnp.dtype(self.config.dtype)
        kernel, bias = self._in_pairs(projection)
        heads, width = sizes.num_heads, kernel.shape[-1] // sizes.num_heads
        table = rope_table(self.config.feature_size, width, sizes.rope_theta)
        rotated = [
            project_and_rotate(
                x,
                kernel[:, head],
                bias[head],
                table,
                dtype,
                scale=scale,
                room=room,
                in_one=self.config.kernels,
            )
            for head in (slice(h * width, (h + 1) * width) for h in range(heads))
        ]
        return rotated[0] if heads == 1 else jnp.concatenate(rotated, axis=-1)

    def _in_pairs(self, projection: Projection) -> tuple[Array, Array]:
        """[I, C] and [C], within a head in `split_pairs` order."""
        prepared = self.get_variable("params", IN_PAIRS.format(projection.name))
        if prepared is not None:
            return prepared["kernel"], prepared["bias"]
        kernel, bias = projection()
        heads = self.config.memory_attention.num_heads
        return split_pairs(kernel, heads), split_pairs(bias, heads)

    def _attend(self, query: Array, key: Array, value: Array, length: Array | None) -> Array:
        heads = self.config.memory_attention.num_heads
        dtype = jnp.dtype(self.config.dtype)
        if heads > 1 and length is not None:
            length = jnp.repeat(length, heads, axis=0)
        return attention(
            fold_heads(query, heads),
            fold_heads(key, heads),
            jnp.repeat(value.astype(dtype), heads, axis=0),
            length=length,
            scale=1.0,
            kernel=self.config.kernels,
        )

    def _projected(self, out: Array) -> Array:
        """[N * heads, T, I or I + 1] -> [N, T, C]. Values are attended to as they are and projected
        after, at their own, smaller width: the rows of a softmax sum to one, so
        softmax(.) (M W + b) = (softmax(.) M) W + b."""
        heads = self.config.memory_attention.num_heads
        dtype = jnp.dtype(self.config.dtype)
        kernel, bias = self.v_proj()
        if out.shape[-1] > self.in_features:  # shares behind the values, and none is smaller
            share = jnp.maximum(out[..., -1:].astype(jnp.float32), self.config.memory_pooling**-2)
            out = out[..., :-1].astype(jnp.float32) / share
        out = out.reshape(-1, heads, *out.shape[1:])
        kernel, bias = kernel.reshape(self.in_features, heads, -1), bias.reshape(heads, -1)
        projected = [linear(out[:, h], kernel[:, h], bias[h], dtype) for h in range(heads)]
        return self.out_proj(jnp.concatenate(projected, axis=-1))

    def attend_self(self, x: Array) -> Array:
        """[N, HW, C] -> [N, HW, C]."""
        return self._projected(
            self._attend(self._query(x), self._rotated(x, self.k_proj), x, length=None)
        )

    def attend_memory(self, x: Array, memory: MemoryTokens) -> Array:
        """[1 or N, HW, C] -> [N, HW, C]. Pointers' keys are not rotated.

        Where the collection WATCHED is mutable, it is told what the memories received.
        """
        query = self._query(x)
        query = jnp.broadcast_to(query, (memory.values.shape[0], *query.shape[1:]))
        sizes, dtype = self.config.memory_attention, jnp.dtype(self.config.dtype)
        kernel, bias = self._in_pairs(self.k_proj)
        watched = self.is_mutable_collection(WATCHED) and not self.is_initializing()
        pooling = self.config.memory_pooling
        if sizes.num_heads == 1 and pooling == 1 and not watched:
            out = attend_to_maps(
                query,
                memory.spatial_keys,
                memory.pointer_keys,
                memory.values.astype(dtype),
                kernel,
                bias,
                rope_table(self.config.feature_size, query.shape[-1], sizes.rope_theta),
                memory.spatial_length,
                memory.length,
                self.config.kernels,
            )
            return self._projected(out)
        pointers = linear(memory.pointer_keys, kernel, bias, dtype)
        room = pointers.shape[1]
        keys = self._rotated(memory.spatial_keys, self.k_proj, room=room if pooling == 1 else 0)
        if pooling > 1:
            keys = pool_squares(keys, x.shape[1], pooling)
            keys = jnp.pad(keys, ((0, 0), (0, room), (0, 0)))
        if watched:
            self.sow(WATCHED, "mass", self._mass(query, keys, pointers, memory))
        keys = place_in(keys, pointers, memory.spatial_length)
        return self._projected(self._attend(query, keys, memory.values, memory.length))

    def _mass(
        self, query: Array, keys: Array, pointers: Array, memory: MemoryTokens
    ) -> tuple[Array, Array]:
        """The share of each cell's attention that each memory has: [N, K, HW], and of each pointer:
        [N, Q, HW]. Computed a memory at a time, as the weights of all would not fit."""
        heads, (count, cells, width) = self.config.memory_attention.num_heads, query.shape
        query = query.reshape(count, cells, heads, -1)
        pooled = self.config.memory_pooling**2
        cells //= pooled
        keys = keys[:, : keys.shape[1] - pointers.shape[1]].reshape(count, -1, cells, width)

        def received(key: Array, valid: Array) -> Array:
            """Logarithm of the summed weights of keys [N, M, C]: [N, heads, HW]."""
            key = key.reshape(*key.shape[:-1], heads, -1)
            scores = einsum("bthd,bmhd->bhtm", query, key)
            scores = jnp.where(valid[:, None, None], scores, MASKED)
            return jax.nn.logsumexp(scores, axis=-1)

        slots = keys.shape[1]
        starts = jnp.arange(slots, dtype=jnp.int32) * cells
        valid = starts[:, None, None] < memory.spatial_length[None, :, None]
        spatial = jax.lax.map(lambda item: received(*item), (jnp.moveaxis(keys, 1, 0), valid))
        spatial = spatial + math.log(pooled)  # a square has the weight of its cells
        pieces = self.config.pointer_tokens
        grouped = jnp.moveaxis(
            pointers.reshape(len(pointers), -1, pieces, pointers.shape[-1]), 1, 0
        )
        starts = jnp.arange(len(grouped), dtype=jnp.int32) * pieces
        held = (memory.length - memory.spatial_length)[None, :, None]
        pointed = jax.lax.map(lambda item: received(*item), (grouped, starts[:, None, None] < held))
        weights = jax.nn.softmax(jnp.concatenate([spatial, pointed]), axis=0)
        weights = jnp.moveaxis(jnp.mean(weights, axis=2), 0, 1)
        return weights[:, :slots], weights[:, slots:]


class MemoryAttentionLayer(nn.Module):
    """Self-attention, attention to the memory, MLP; pre-normalised."""

    config: SAM2Config

    def setup(self) -> None:
        config = self.config
        self.self_attn = RoPEAttention(config, config.hidden_dim)
        self.cross_attn_image = RoPEAttention(config, config.mem_dim)
        hidden = config.memory_attention.mlp_dim
        self.linear1 = Projection(config.hidden_dim, hidden)
        self.linear2 = Projection(hidden, config.hidden_dim)
        self.norm1 = LayerNorm(1e-5)
        self.norm2 = LayerNorm(1e-5)
        self.norm3 = LayerNorm(1e-5)

    def __call__(self, x: Array, memory: MemoryTokens) -> Array:
        rate, dtype = self.config.memory_attention.dropout, jnp.dtype(self.config.dtype)

        def drop(part: Array) -> Array:
            return dropout(self, part, rate)

        x = x + drop(self.self_attn.attend_self(self.norm1(x)))
        x = x + drop(self.cross_attn_image.attend_memory(self.norm2(x), memory))
        first, last, normed = self.linear1(), self.linear2(), self.norm3(x)
        if not rate or not self.has_rng("dropout"):
            return x + mlp(normed, (first, last), jax.nn.relu, dtype, rounded=False)
        hidden = drop(jax.nn.relu(linear(normed, *first, dtype)))
        return x + drop(linear(hidden, *last, dtype, rounded=False))


def pairs_split(params: Mapping[str, Any], num_heads: int) -> dict[str, Any]:
    """Parameters of a `MemoryAttention`, with each rotated projection also as it is applied."""

    def attention(tree: Mapping[str, Any]) -> dict[str, Any]:
        return dict(tree) | {
            IN_PAIRS.format(name): {k: split_pairs(v, num_heads) for k, v in tree[name].items()}
            for name in ("q_proj", "k_proj")
        }

    def layer(tree: Mapping[str, Any]) -> dict[str, Any]:
        return {k: attention(v) if "k_proj" in v else v for k, v in tree.items()}

    return {k: layer(v) if k.startswith("layers") else v for k, v in params.items()}


class MemoryAttention(nn.Module):
    config: SAM2Config

    def setup(self) -> None:
        self.layers = [
            MemoryAttentionLayer(self.config)
            for _ in range(self.config.memory_attention.num_layers)
        ]
        self.norm = LayerNorm(1e-5)

    def __call__(self, features: Array, memory: MemoryTokens) -> Array:
        """Features [1 or N, H, W, C] of a frame -> [N, H, W, C], conditioned on N memories."""
        _, height, width, channels = features.shape
        position = sine_2d(height, channels).reshape(1, height * width, channels)
        x = features.reshape(-1, height * width, channels) + 0.1 * position
        if self.has_rng("dropout"):  # every object drops its own
            x = jnp.broadcast_to(x, (memory.values.shape[0], *x.shape[1:]))
        # Else objects share a frame until the first of its layers reads their memories.
        for layer in self.layers:
            x = layer(x, memory)
        return self.norm(x).reshape(-1, height, width, channels)
