"""Which tensor of the official state dict is which parameter, as data, read in both directions.

A rule pairs an official key with a parameter path and says how axes move. In patterns `#` stands
for a number and `*` for a word; axes are written as names, and `1` for an axis of size one that
the other side does not have. The way back is the same table with its sides exchanged.

Names differ by one habit: an index of a list or of an `nn.Sequential` joins the name before it
(`blocks.3.attn` -> `blocks_3/attn`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """One line of a table: `source` keys become `target` names, their axes as `axes` says."""

    source: str
    target: str
    axes: str = ""  # "from -> to"; empty: unchanged

    def reversed(self) -> Rule:
        """The same rule, read from right to left."""
        return Rule(self.target, self.source, " -> ".join(reversed(self.axes.split(" -> "))))


# What layers are made of: (official leaf, our leaf, axes).
_BIAS = ("bias", "bias", "")
LINEAR = (("weight", "kernel", "out in -> in out"), _BIAS)
CONV = (("weight", "kernel", "out in h w -> h w in out"), _BIAS)
POINTWISE = (("weight", "kernel", "out in 1 1 -> in out"), _BIAS)  # a 1x1 convolution
DEPTHWISE = (("weight", "kernel", "c 1 h w -> h w c"), _BIAS)
# Applied as a matrix product followed by depth-to-space, so nothing is flipped.
TRANSPOSED = (("weight", "kernel", "in out h w -> in h w out"), _BIAS)
NORM = (("weight", "scale", ""), _BIAS)

_TRUNK, _ATTENTION = "image_encoder.trunk", "memory_attention.layers.#"
_MEMORY, _PROMPT, _DECODER = "memory_encoder", "sam_prompt_encoder", "sam_mask_decoder"
_TWO_WAY = f"{_DECODER}.transformer"

LAYERS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (f"{_TRUNK}.patch_embed.proj", CONV),
    (f"{_TRUNK}.blocks.#.norm#", NORM),
    (f"{_TRUNK}.blocks.#.attn.*", LINEAR),
    (f"{_TRUNK}.blocks.#.mlp.layers.#", LINEAR),
    (f"{_TRUNK}.blocks.#.proj", LINEAR),
    ("image_encoder.neck.convs.#.conv", POINTWISE),
    (f"{_ATTENTION}.self_attn.*", LINEAR),
    (f"{_ATTENTION}.cross_attn_image.*", LINEAR),
    (f"{_ATTENTION}.linear#", LINEAR),
    (f"{_ATTENTION}.norm#", NORM),
    ("memory_attention.norm", NORM),
    *((f"{_MEMORY}.mask_downsampler.encoder.{i}", CONV) for i in (0, 3, 6, 9)),
    *((f"{_MEMORY}.mask_downsampler.encoder.{i}", NORM) for i in (1, 4, 7, 10)),
    (f"{_MEMORY}.mask_downsampler.encoder.12", POINTWISE),
    (f"{_MEMORY}.pix_feat_proj", POINTWISE),
    (f"{_MEMORY}.fuser.layers.#.dwconv", DEPTHWISE),
    (f"{_MEMORY}.fuser.layers.#.norm", NORM),
    (f"{_MEMORY}.fuser.layers.#.pwconv#", LINEAR),
    (f"{_MEMORY}.out_proj", POINTWISE),
    *((f"{_PROMPT}.mask_downscaling.{i}", CONV) for i in (0, 3)),
    *((f"{_PROMPT}.mask_downscaling.{i}", NORM) for i in (1, 4)),
    (f"{_PROMPT}.mask_downscaling.6", POINTWISE),
    (f"{_TWO_WAY}.layers.#.self_attn.*", LINEAR),
    (f"{_TWO_WAY}.layers.#.cross_attn_token_to_image.*", LINEAR),
    (f"{_TWO_WAY}.layers.#.cross_attn_image_to_token.*", LINEAR),
    (f"{_TWO_WAY}.layers.#.mlp.layers.#", LINEAR),
    (f"{_TWO_WAY}.layers.#.norm#", NORM),
    (f"{_TWO_WAY}.final_attn_token_to_image.*", LINEAR),
    (f"{_TWO_WAY}.norm_final_attn", NORM),
    *((f"{_DECODER}.output_upscaling.{i}", TRANSPOSED) for i in (0, 3)),
    (f"{_DECODER}.output_upscaling.1", NORM),
    (f"{_DECODER}.conv_s#", POINTWISE),
    (f"{_DECODER}.output_hypernetworks_mlps.#.layers.#", LINEAR),
    (f"{_DECODER}.iou_prediction_head.layers.#", LINEAR),
    (f"{_DECODER}.pred_obj_score_head.layers.#", LINEAR),
    ("mask_downsample", CONV),
    ("obj_ptr_proj.layers.#", LINEAR),
    ("obj_ptr_tpos_proj", LINEAR),
)

_GRID, _ROW, _PIXEL = "1 c h w -> h w c", "1 c -> c", "1 1 c -> c"

TENSORS: tuple[tuple[str, str], ...] = (
    ("maskmem_tpos_enc", "slot 1 1 c -> slot c"),
    ("no_mem_embed", _PIXEL),
    ("no_mem_pos_enc", _PIXEL),
    ("no_obj_ptr", _ROW),
    ("no_obj_embed_spatial", _ROW),
    (f"{_TRUNK}.pos_embed", _GRID),
    (f"{_TRUNK}.pos_embed_window", _GRID),
    (f"{_MEMORY}.fuser.layers.#.gamma", ""),
    (f"{_PROMPT}.pe_layer.positional_encoding_gaussian_matrix", ""),
)

EMBEDDINGS: tuple[str, ...] = (  # `nn.Embedding`: its `weight` is the parameter itself
    f"{_PROMPT}.point_embeddings.#",
    f"{_PROMPT}.not_a_point_embed",
    f"{_PROMPT}.no_mask_embed",
    f"{_DECODER}.iou_token",
    f"{_DECODER}.mask_tokens",
    f"{_DECODER}.obj_score_token",
)


def _path(key: str) -> str:
    """`neck.convs.#.conv` -> `neck/convs_#`: the name of a module here."""
    key = key.replace("neck.convs.#.conv", "neck.convs.#")
    return re.sub(r"\.(#|\d+)(?=\.|$)", r"_\1", key).replace(".", "/")


OFFICIAL: tuple[Rule, ...] = (
    *(
        Rule(f"{key}.{theirs}", f"{_path(key)}/{ours}", axes)
        for key, leaves in LAYERS
        for theirs, ours, axes in leaves
    ),
    *(Rule(key, _path(key), axes) for key, axes in TENSORS),
    *(Rule(f"{key}.weight", _path(key)) for key in EMBEDDINGS),
)


# Applying tables -------------------------------------------------------------------------------


def rename(tensors: Mapping[str, np.ndarray], rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """Applies a table to every entry; arrays come back as views.

    Raises:
        ValueError: a key that no rule covers, or that two rules claim, or an array whose axes are
            not those of its rule.
    """
    rules = tuple(rules)
    renamed: dict[str, np.ndarray] = {}
    unknown = []
    for key, value in tensors.items():
        found = [(rule, match) for rule in rules if (match := _regex(rule.source).fullmatch(key))]
        if not found:
            unknown.append(key)
            continue
        if len(found) > 1:
            raise ValueError(f"two rules claim {key!r}: {[rule.source for rule, _ in found]}.")
        ((rule, match),) = found
        name = _fill(rule.target, match.groups())
        if name in renamed:
            raise ValueError(f"{key!r} is not the only key that becomes {name!r}.")
        renamed[name] = move_axes(value, rule.axes, key)
    if unknown:
        raise ValueError(f"no rule for {shorten(unknown)}.")
    return renamed


def move_axes(value: np.ndarray, axes: str, name: str = "tensor") -> np.ndarray:
    """Transposes, drops and adds axes of size one: `"out in 1 1 -> in out"`."""
    if not axes:
        return value
    before, after = (side.split() for side in axes.split(" -> "))
    if value.ndim != len(before) or any(
        size != 1 for size, axis in zip(value.shape, before, strict=True) if axis == "1"
    ):
        raise ValueError(f"{name!r} has shape {list(value.shape)}, expected ({' '.join(before)}).")
    kept = [axis for axis in before if axis != "1"]
    value = value.reshape([n for n, axis in zip(value.shape, before, strict=True) if axis != "1"])
    value = value.transpose([kept.index(axis) for axis in after if axis != "1"])
    return np.expand_dims(value, [i for i, axis in enumerate(after) if axis == "1"])


def shorten(names: Iterable[str], most: int = 3) -> str:
    """`a, b, c and 5 more`"""
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", r"(\w+)"))


def _fill(pattern: str, words: Iterable[str | None]) -> str:
    remaining = iter(words)
    return re.sub(r"[#*]", lambda _: str(next(remaining)), pattern)
