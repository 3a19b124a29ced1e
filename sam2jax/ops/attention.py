"""Scaled dot-product attention: one function for every attention of the model.

Small problems are written out. Large ones run over blocks of keys with an online softmax
(FlashAttention, arXiv 2205.14135), which keeps the weights out of memory and stops at the number
of valid keys; in bfloat16 on an NVIDIA GPU as one kernel. Values may be narrower than keys.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sam2jax.ops.linear import einsum, rounded_einsum
from sam2jax.ops.windows import window_partition, window_unpartition
from sam2jax.types import Array

BLOCK = 1024  # keys at a time
CPU_BLOCK = 256  # on a CPU: what is in work stays in its cache
BLOCKWISE_FROM = 2**22  # weights per query set from which they are not written out
KERNEL_FITS = ("9.0", "10.0")  # compute capabilities: Hopper, and Blackwell of data centres
MASKED = -1e30  # finite, so that a fully masked block stays free of NaN


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    length: Array | None = None,
    mask: Array | None = None,
    scale: float | None = None,
    kernel: bool = True,
) -> Array:
    """Attends with `softmax(scale query key^T) value`.

    Args:
      query: [B, T, d]; heads, windows and objects are all folded into B.
      key: [B, K, d].
      value: [B, K, e].
      length: [B] int32, how many keys are valid, from the front; None: all.
      mask: [B, K] bool, which keys are valid, for small problems only.
      scale: of the products; None: 1 / sqrt(d).
      kernel: large problems in bfloat16 are one kernel on NVIDIA GPUs.

    Returns:
      [B, T, e] in the dtype of `value`. Without a valid key: zeros for large problems, the mean
      of `value` for small ones; callers gate that case.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    query = (query * factor).astype(key.dtype)
    if query.shape[1] * key.shape[1] >= BLOCKWISE_FROM:
        if mask is not None:
            raise ValueError("mask is for small problems; give a length instead.")
        if length is None:
            length = jnp.full(query.shape[:1], key.shape[1], jnp.int32)
        return _blockwise(query, key, value, length, kernel)
    scores = einsum("btd,bkd->btk", query, key)
    if length is not None:
        mask = jnp.arange(key.shape[1], dtype=jnp.int32)[None] < length[:, None]
    if mask is not None:
        scores = jnp.where(mask[:, None, :], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return rounded_einsum("btk,bke->bte", weights, value)


def self_attention(
    qkv: Array,
    outside: Array,
    num_heads: int,
    *,
    window: int = 0,
    query: Array | None = None,
    kernel: bool = True,
) -> Array:
    """Cells of a map attend to each other, within square windows or all to all.

    Args:
      qkv: [B, H, W, 3 * heads * d], queries, keys and values, heads side by side in each.
      outside: [3 * heads * d], what windows hold of it where they reach beyond the map.
      num_heads: side by side.
      window: its side; 0: the whole map is one.
      query: [B, H / p, W / p, heads * d], pooled, in place of the cells' own queries.
      kernel: in bfloat16 it is one kernel on NVIDIA GPUs.

    Returns:
      [B, H, W, heads * d], or as `query`.
    """
    if kernel and qkv.dtype == jnp.bfloat16:
        return _as_they_lie(num_heads, window, qkv, outside, query)
    return _by_heads(num_heads, window, False, qkv, outside, query)


def _by_heads(
    num_heads: int, window: int, kernel: bool, qkv: Array, outside: Array, query: Array | None
) -> Array:
    height, width, channels = qkv.shape[1:]
    if query is None:
        query = qkv[..., : channels // 3]
    rows, columns = query.shape[1:3]
    side = (window, window) if window else (height, width)
    asked = (side[0] * rows // height, side[1] * columns // width)
    key, value = (
        window_partition(x, side, num_heads, beyond)
        for x, beyond in zip(jnp.split(qkv, 3, -1)[1:], jnp.split(outside, 3)[1:], strict=True)
    )
    out = attention(window_partition(query, asked, num_heads), key, value, kernel=kernel)
    return window_unpartition(out, asked, num_heads, rows, columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _as_they_lie(
    num_heads: int, window: int, qkv: Array, outside: Array, query: Array | None
) -> Array:
    by_heads = functools.partial(_by_heads, num_heads, window, False)
    kernels = kernels_of_gpus()
    if kernels is None:
        return by_heads(qkv, outside, query)
    in_one = functools.partial(kernels.self_attention, num_heads=num_heads, window=window)
    return lax.platform_dependent(qkv, outside, query, cuda=in_one, default=by_heads)


_as_they_lie.defvjp(
    lambda num_heads, window, *given: (_as_they_lie(num_heads, window, *given), given),
    lambda num_heads, window, given, gradient: jax.vjp(
        functools.partial(_by_heads, num_heads, window, True), *given
    )[1](gradient),
)


def fold_heads(x: Array, num_heads: int) -> Array:
    """[B, T, heads * d] -> [B * heads, T, d]."""
    batch, tokens, width = x.shape
    x = x.reshape(batch, tokens, num_heads, width // num_heads)
    return x.transpose(0, 2, 1, 3).reshape(batch * num_heads, tokens, -1)


def unfold_heads(x: Array, num_heads: int) -> Array:
    """[B * heads, T, d] -> [B, T, heads * d]."""
    x = x.reshape(-1, num_heads, *x.shape[1:]).transpose(0, 2, 1, 3)
    return x.reshape(*x.shape[:2], -1)


def _num_blocks(length: Array, block: int) -> Array:
    return (jnp.max(length) + block - 1) // block


def _block(index: Array, block: int, num_keys: int, length: Array) -> tuple[Array, Array]:
    """Start of a block and which of its keys count: [B, 1, block]. The last one overlaps its
    neighbour rather than reach past the end, and leaves the overlap to it."""
    start = jnp.minimum(index * block, num_keys - block)
    position = start + jnp.arange(block, dtype=jnp.int32)
    valid = (position >= index * block)[None] & (position[None] < length[:, None])
    return start, valid[:, None, :]


def take(x: Array, start: Array, block: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, block, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(query: Array, key: Array, value: Array, length: Array, kernel: bool) -> Array:
    return _blockwise_forward(query, key, value, length, kernel)[0]


def _blockwise_forward(query: Array, key: Array, value: Array, length: Array, kernel: bool):
    given = query, key, value, length
    kernels = kernels_of_gpus() if kernel and key.dtype == value.dtype == jnp.bfloat16 else None
    others = {} if kernels is None else {"cuda": kernels.flash_attention}
    out, log_sum = lax.platform_dependent(*given, cpu=_row_by_row, default=_online, **others)
    return out, (*given, out, log_sum)


def kernels_of_gpus() -> Any:
    """The module of kernels, if it is to be had.

    Older GPUs have too little memory beside each processor. Without a GPU here, it is asked for
    others.
    """
    gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
    if any(getattr(gpu, "compute_capability", "") not in KERNEL_FITS for gpu in gpus):
        return None
    try:
        import sam2jax.ops.flash as flash  # half a second: Pallas
    except ImportError:  # JAX 0.12 announces that Pallas will do without Triton
        return None
    return flash


def _row_by_row(query: Array, key: Array, value: Array, length: Array) -> tuple[Array, Array]:
    """`_online` in small blocks, one row of the batch after another."""

    def one(row: tuple[Array, ...]) -> tuple[Array, Array]:
        out, log_sum = _online(*(x[None] for x in row), block=CPU_BLOCK)
        return out[0], log_sum[0]

    return lax.map(one, (query, key, value, length))


def _online(
    query: Array, key: Array, value: Array, length: Array, block: int = BLOCK
) -> tuple[Array, Array]:
    """The answer [B, T, e], and the logarithm of the summed weights [B, T]."""
    keys, values = _whole_keys(key, length, block), whole_values(value, length, block)

    def body(index: Array, seen: Seen) -> Seen:
        start = index * block
        return look_at(seen, query, take(keys, start, block), take(values, start, block))

    seen = lax.fori_loop(0, _num_blocks(length, block), body, nothing_seen(query, values))
    return answer(seen, value.shape[-1], value.dtype)


Seen = tuple[Array, Array]  # of an online softmax: summed values [B, T, e'], largest scores [B, T]


def nothing_seen(query: Array, values: Array) -> Seen:
    rows = query.shape[:2]
    total = jnp.zeros((*rows, values.shape[-1]), jnp.float32)
    return total, jnp.full(rows, MASKED, jnp.float32)


def look_at(
    seen: Seen, query: Array, keys: Array, values: Array, valid: Array | None = None
) -> Seen:
    """Takes in more keys [B, M, d] with their `whole_values` [B, M, e'].

    `valid` [B, M] tells which count; None: all do, or the rest have zeros for values and do not
    change the largest score.
    """
    total, row_max = seen
    scores = einsum("btd,bkd->btk", query, keys)
    if valid is not None:
        scores = jnp.where(valid[:, None], scores, MASKED)
    new_max = jnp.maximum(row_max, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - new_max[..., None]).astype(values.dtype)
    part = einsum("btk,bke->bte", weights, values)
    return total * jnp.exp(row_max - new_max)[..., None] + part, new_max


def answer(seen: Seen, width: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    """The answer [B, T, width], and the logarithm of the summed weights [B, T]."""
    total, row_max = seen
    row_sum = jnp.maximum(total[..., width], jnp.finfo(jnp.float32).tiny)
    out = (total[..., :width] / row_sum[..., None]).astype(dtype)
    return out, row_max + jnp.log(row_sum)


def _whole_keys(key: Array, length: Array, block: int) -> Array:
    """Keys in whole blocks; those that do not count repeat the first one."""
    count, num_keys, width = key.shape
    key = jnp.where(_valid(num_keys, length), key, key[:, :1])
    rest = -num_keys % block
    if not rest:
        return key
    return jnp.concatenate([key, jnp.broadcast_to(key[:, :1], (count, rest, width))], axis=1)


def whole_values(value: Array, length: Array, block: int) -> Array:
    """Values in whole blocks, zeros where keys do not count. A column of ones behind those that
    count adds the weights up."""
    count, num_keys, width = value.shape
    ones = jnp.ones((count, num_keys, 1), value.dtype)
    extra = jnp.zeros((count, num_keys, -(width + 1) % 8), value.dtype)  # units like it even
    value = jnp.concatenate([value, ones, extra], axis=-1)
    value = jnp.where(_valid(num_keys, length), value, 0)
    rest = -num_keys % block
    return jnp.pad(value, ((0, 0), (0, rest), (0, 0))) if rest else value


def _valid(count: int, length: Array) -> Array:
    """Which of `count` keys are valid: [B, count, 1]."""
    return (jnp.arange(count, dtype=jnp.int32)[None] < length[:, None])[..., None]


def _blockwise_backward(kernel: bool, residuals, grad: Array):
    query, key, value, length, out, log_sum = residuals
    num_keys = key.shape[1]
    block = min(BLOCK, num_keys)
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def add(into: Array, part: Array, start: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(into, take(into, start, block) + part, start, axis=1)

    def body(index: Array, carry):
        d_query, d_key, d_value = carry
        start, valid = _block(index, block, num_keys, length)
        keys, values = take(key, start, block), take(value, start, block)
        scores = einsum("btd,bkd->btk", query, keys)
        weights = jnp.where(valid, jnp.exp(scores - log_sum[..., None]), 0.0)
        d_weights = einsum("bte,bke->btk", grad, values)
        d_scores = (weights * (d_weights - delta[..., None])).astype(key.dtype)
        d_query = d_query + einsum("btk,bkd->btd", d_scores, keys)
        d_key = add(d_key, einsum("btk,btd->bkd", d_scores, query), start)
        part = einsum("btk,bte->bke", weights.astype(grad.dtype), grad)
        return d_query, d_key, add(d_value, part, start)

    zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    d_query, d_key, d_value = lax.fori_loop(
        0, _num_blocks(length, block), body, (zeros(query), zeros(key), zeros(value))
    )
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        None,
    )


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
