"""The naming of Hugging Face `transformers` (Sam2VideoModel, Sam2Model), onto official names.

Two things are more than renaming: the four point embeddings are the rows of one matrix there, and
the positional frequencies are stored twice.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sam2jax.convert.rules import Rule, rename

Pairs = tuple[tuple[str, str], ...]


def _attention(theirs: str, ours: str) -> Pairs:
    names = (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"))
    return tuple((f"{theirs}.{a}", f"{ours}.{b}") for a, b in (*names, ("o_proj", "out_proj")))


def _mlp(theirs: str, ours: str, names: tuple[str, ...] = ("proj_in", "proj_out")) -> Pairs:
    return tuple((f"{theirs}.{name}", f"{ours}.layers.{i}") for i, name in enumerate(names))


def _head(theirs: str, ours: str) -> Pairs:
    return _mlp(theirs, ours, ("proj_in", "layers.0", "proj_out"))


_BLOCK, _OUR_BLOCK = "vision_encoder.backbone.blocks.#", "image_encoder.trunk.blocks.#"
_TWO_WAY, _OUR_TWO_WAY = "mask_decoder.transformer", "sam_mask_decoder.transformer"
_MASK, _OUR_MASK = "prompt_encoder.mask_embed", "sam_prompt_encoder.mask_downscaling"
_FUSER, _OUR_FUSER = "memory_encoder.memory_fuser.layers.#", "memory_encoder.fuser.layers.#"
_DOWN = "memory_encoder.mask_downsampler"
_LAYER = "memory_attention.layers.#"

LAYERS: Pairs = (  # (theirs, official): modules with a weight and a bias
    ("vision_encoder.backbone.patch_embed.projection", "image_encoder.trunk.patch_embed.proj"),
    (f"{_BLOCK}.layer_norm#", f"{_OUR_BLOCK}.norm#"),
    (f"{_BLOCK}.attn.*", f"{_OUR_BLOCK}.attn.*"),
    *_mlp(f"{_BLOCK}.mlp", f"{_OUR_BLOCK}.mlp"),
    (f"{_BLOCK}.proj", f"{_OUR_BLOCK}.proj"),
    ("vision_encoder.neck.convs.#", "image_encoder.neck.convs.#.conv"),
    (f"{_MASK}.conv1", f"{_OUR_MASK}.0"),
    (f"{_MASK}.layer_norm1", f"{_OUR_MASK}.1"),
    (f"{_MASK}.conv2", f"{_OUR_MASK}.3"),
    (f"{_MASK}.layer_norm2", f"{_OUR_MASK}.4"),
    (f"{_MASK}.conv3", f"{_OUR_MASK}.6"),
    *_attention(f"{_TWO_WAY}.layers.#.self_attn", f"{_OUR_TWO_WAY}.layers.#.self_attn"),
    *(
        pair
        for name in ("layers.#.cross_attn_token_to_image", "layers.#.cross_attn_image_to_token")
        for pair in _attention(f"{_TWO_WAY}.{name}", f"{_OUR_TWO_WAY}.{name}")
    ),
    *_mlp(f"{_TWO_WAY}.layers.#.mlp", f"{_OUR_TWO_WAY}.layers.#.mlp"),
    (f"{_TWO_WAY}.layers.#.layer_norm#", f"{_OUR_TWO_WAY}.layers.#.norm#"),
    *_attention(
        f"{_TWO_WAY}.final_attn_token_to_image", f"{_OUR_TWO_WAY}.final_attn_token_to_image"
    ),
    (f"{_TWO_WAY}.layer_norm_final_attn", f"{_OUR_TWO_WAY}.norm_final_attn"),
    ("mask_decoder.upscale_conv1", "sam_mask_decoder.output_upscaling.0"),
    ("mask_decoder.upscale_layer_norm", "sam_mask_decoder.output_upscaling.1"),
    ("mask_decoder.upscale_conv2", "sam_mask_decoder.output_upscaling.3"),
    ("mask_decoder.conv_s#", "sam_mask_decoder.conv_s#"),
    *_head(
        "mask_decoder.output_hypernetworks_mlps.#", "sam_mask_decoder.output_hypernetworks_mlps.#"
    ),
    *_head("mask_decoder.iou_prediction_head", "sam_mask_decoder.iou_prediction_head"),
    *_head("mask_decoder.pred_obj_score_head", "sam_mask_decoder.pred_obj_score_head"),
    *_attention(f"{_LAYER}.self_attn", f"{_LAYER}.self_attn"),
    *_attention(f"{_LAYER}.cross_attn_image", f"{_LAYER}.cross_attn_image"),
    (f"{_LAYER}.linear#", f"{_LAYER}.linear#"),
    (f"{_LAYER}.layer_norm#", f"{_LAYER}.norm#"),
    ("memory_attention.layer_norm", "memory_attention.norm"),
    *((f"{_DOWN}.layers.{i}.conv", f"{_DOWN}.encoder.{3 * i}") for i in range(4)),
    *((f"{_DOWN}.layers.{i}.layer_norm", f"{_DOWN}.encoder.{3 * i + 1}") for i in range(4)),
    (f"{_DOWN}.final_conv", f"{_DOWN}.encoder.12"),
    ("memory_encoder.feature_projection", "memory_encoder.pix_feat_proj"),
    (f"{_FUSER}.depthwise_conv", f"{_OUR_FUSER}.dwconv"),
    (f"{_FUSER}.layer_norm", f"{_OUR_FUSER}.norm"),
    (f"{_FUSER}.pointwise_conv#", f"{_OUR_FUSER}.pwconv#"),
    ("memory_encoder.projection", "memory_encoder.out_proj"),
    ("mask_downsample", "mask_downsample"),
    *_head("object_pointer_proj", "obj_ptr_proj"),
    ("temporal_positional_encoding_projection_layer", "obj_ptr_tpos_proj"),
)

_FREQUENCIES = "prompt_encoder.shared_embedding.positional_embedding"
_FREQUENCIES_AGAIN = "shared_image_embedding.positional_embedding"
_POINTS = "prompt_encoder.point_embed.weight"
_OUR_POINT = "sam_prompt_encoder.point_embeddings.{}.weight"
_NUM_POINTS = 4

TENSORS: Pairs = (
    ("vision_encoder.backbone.pos_embed", "image_encoder.trunk.pos_embed"),
    ("vision_encoder.backbone.pos_embed_window", "image_encoder.trunk.pos_embed_window"),
    (_FREQUENCIES, "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    ("prompt_encoder.not_a_point_embed.weight", "sam_prompt_encoder.not_a_point_embed.weight"),
    ("prompt_encoder.no_mask_embed.weight", "sam_prompt_encoder.no_mask_embed.weight"),
    ("mask_decoder.iou_token.weight", "sam_mask_decoder.iou_token.weight"),
    ("mask_decoder.mask_tokens.weight", "sam_mask_decoder.mask_tokens.weight"),
    ("mask_decoder.obj_score_token.weight", "sam_mask_decoder.obj_score_token.weight"),
    (f"{_FUSER}.scale", f"{_OUR_FUSER}.gamma"),
    ("memory_temporal_positional_encoding", "maskmem_tpos_enc"),
    ("no_memory_embedding", "no_mem_embed"),
    ("no_memory_positional_encoding", "no_mem_pos_enc"),
    ("no_object_pointer", "no_obj_ptr"),
    ("occlusion_spatial_embedding_parameter", "no_obj_embed_spatial"),
)

HUGGINGFACE: tuple[Rule, ...] = (
    *(Rule(f"{a}.{leaf}", f"{b}.{leaf}") for a, b in LAYERS for leaf in ("weight", "bias")),
    *(Rule(a, b) for a, b in TENSORS),
)
_BACK = tuple(rule.reversed() for rule in HUGGINGFACE)


def complete(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names the positional frequencies both ways: some versions of `transformers` save one."""
    tensors = dict(tensors)
    for name, other in ((_FREQUENCIES, _FREQUENCIES_AGAIN), (_FREQUENCIES_AGAIN, _FREQUENCIES)):
        if name in tensors:
            tensors.setdefault(other, tensors[name])
    return tensors


def to_official(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A complete Hugging Face state dict in official names.

    Raises:
        ValueError: a key is unknown, or the two copies of the frequencies differ.
    """
    tensors = dict(tensors)
    points, again = tensors.pop(_POINTS), tensors.pop(_FREQUENCIES_AGAIN)
    if not np.array_equal(tensors[_FREQUENCIES], again):
        raise ValueError(
            f"{_FREQUENCIES!r} and {_FREQUENCIES_AGAIN!r} should be equal, and differ."
        )
    rows = {_OUR_POINT.format(i): points[i : i + 1] for i in range(_NUM_POINTS)}
    return rename(tensors, HUGGINGFACE) | rows


def from_official(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The way back."""
    tensors = dict(tensors)
    rows = [tensors.pop(_OUR_POINT.format(i)) for i in range(_NUM_POINTS)]
    renamed = rename(tensors, _BACK)
    return renamed | {
        _POINTS: np.concatenate(rows),
        _FREQUENCIES_AGAIN: renamed[_FREQUENCIES],
    }
