"""The JSON files beside the weights in a folder of `transformers`: the model's, and processors'."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from sam2jax.config import VARIANTS, SAM2Config

CONFIG_FILE = "config.json"
_MOST_BYTES = 2**20  # of a config.json, which has a few thousand

_DYNAMIC = tuple(
    f"dynamic_multimask_{name}" for name in ("via_stability", "stability_delta", "stability_thresh")
)
_POINTS = ("multimask_min_pt_num", "multimask_max_pt_num")
# What makes two models the same, of their parts for images and of their memory.
_IMAGES = ("trunk", "hidden_dim", "mask_decoder", "mask_in_chans")
_MEMORY = (
    *("mem_dim", "memory_attention", "num_fuser_layers", "num_maskmem"),
    *("max_obj_ptrs_in_encoder", "no_obj_embed_spatial", "add_tpos_enc_to_obj_ptrs"),
)
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_BILINEAR = 2  # Pillow's number


# Writing ---------------------------------------------------------------------------------------


def files(config: SAM2Config) -> dict[str, dict[str, Any]]:
    """What each file holds: with the weights, all that `from_pretrained` of a class needs."""
    return {CONFIG_FILE: config_json(config), **_processors(config)}


def config_json(config: SAM2Config) -> dict[str, Any]:
    """The `config.json` from which `transformers` builds the same model.

    Raises:
        ValueError: it cannot, because it fixes what this model has otherwise.
    """
    fixed = {"iou_head_depth": (config.mask_decoder.iou_head_depth, 3)}
    if not config.images_only:
        fixed["mem_dim"] = (config.mem_dim, 64)
    for name, (ours, theirs) in fixed.items():
        if ours != theirs:
            raise ValueError(f"transformers fixes {name} at {theirs}, and this model has {ours}.")
    trunk, decoder, width = config.trunk, config.mask_decoder, config.hidden_dim
    doubling = [2**i for i in range(len(trunk.stages))]
    shared = {
        "image_size": config.image_size,
        "vision_config": {
            "backbone_config": {
                "hidden_size": trunk.embed_dim,
                "num_attention_heads": trunk.num_heads,
                "image_size": [config.image_size, config.image_size],
                "blocks_per_stage": list(trunk.stages),
                "embed_dim_per_stage": list(trunk.channel_list),
                "num_attention_heads_per_stage": [trunk.num_heads * n for n in doubling],
                "window_size_per_stage": list(trunk.window_spec),
                "window_positional_embedding_background_size": list(
                    trunk.window_pos_embed_bkg_spatial_size
                ),
                "global_attention_blocks": list(trunk.global_att_blocks),
                "mlp_ratio": float(trunk.mlp_ratio),
                "model_type": "sam2_hiera_det_model",
            },
            "backbone_channel_list": list(trunk.channel_list[::-1]),
            "backbone_feature_sizes": [[config.mask_size // n] * 2 for n in (1, 2, 4)],
            "fpn_hidden_size": width,
            "model_type": "sam2_vision_model",
        },
        "prompt_encoder_config": {
            "hidden_size": width,
            "image_size": config.image_size,
            "mask_input_channels": config.mask_in_chans,
        },
        "mask_decoder_config": {
            "hidden_size": width,
            "num_hidden_layers": decoder.num_layers,
            "num_attention_heads": decoder.num_heads,
            "mlp_dim": decoder.mlp_dim,
            "attention_downsample_rate": decoder.attention_downsample_rate,
            "num_multimask_outputs": decoder.num_multimask_outputs,
            "iou_head_depth": decoder.iou_head_depth,
            "iou_head_hidden_dim": decoder.iou_head_hidden_dim,
            **{name: getattr(config, name) for name in _DYNAMIC},
        },
    }
    if config.images_only:
        return {"model_type": "sam2", "architectures": ["Sam2Model"], **shared}
    attention = config.memory_attention
    return {
        "model_type": "sam2_video",
        "architectures": ["Sam2VideoModel"],
        **shared,
        "num_maskmem": config.num_maskmem,
        "max_object_pointers_in_encoder": config.max_obj_ptrs_in_encoder,
        "max_cond_frame_num": config.max_cond_frames_in_attn,
        **{name: getattr(config, name) for name in _POINTS},
        "enable_occlusion_spatial_embedding": config.no_obj_embed_spatial,
        "enable_temporal_pos_encoding_for_object_pointers": config.add_tpos_enc_to_obj_ptrs,
        "memory_attention_hidden_size": width,
        "memory_attention_num_layers": attention.num_layers,
        "memory_attention_num_attention_heads": attention.num_heads,
        "memory_attention_feed_forward_hidden_size": attention.mlp_dim,
        "memory_attention_rope_feat_sizes": [config.feature_size] * 2,
        "rope_parameters": {"rope_type": "axial", "rope_theta": attention.rope_theta},
        "memory_encoder_hidden_size": width,
        "memory_encoder_output_channels": config.mem_dim,
        "mask_downsampler_embed_dim": width,
        "memory_fuser_num_layers": config.num_fuser_layers,
        "memory_fuser_embed_dim": width,
        "memory_fuser_intermediate_dim": 4 * width,
    }


def _processors(config: SAM2Config) -> dict[str, dict[str, Any]]:
    """Those of images and points, and of videos where the model tracks.

    In three files under the older names, which all versions read.
    """
    size = {"height": config.image_size, "width": config.image_size}
    mask_size = {"height": config.mask_size, "width": config.mask_size}
    steps = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
    name = {"processor_class": "Sam2Processor" if config.images_only else "Sam2VideoProcessor"}
    pixels = {
        **name,
        **dict.fromkeys(steps, True),
        "size": size,
        "resample": _BILINEAR,
        "rescale_factor": 1 / 255,
        "image_mean": _MEAN,
        "image_std": _STD,
    }
    image = {**pixels, "image_processor_type": "Sam2ImageProcessorFast", "mask_size": mask_size}
    video = {**pixels, "video_processor_type": "Sam2VideoVideoProcessor"}
    points = {**name, "target_size": config.image_size, "point_pad_value": -10}
    return {
        "preprocessor_config.json": image,
        "processor_config.json": points,
        **({} if config.images_only else {"video_preprocessor_config.json": video}),
    }


# Reading ---------------------------------------------------------------------------------------

# What `transformers` can vary and the model here cannot, nor do shapes of tensors show it.
_BACKBONE = {
    "num_channels": 3,
    "patch_kernel_size": [7, 7],
    "patch_stride": [4, 4],
    "patch_padding": [3, 3],
    "query_stride": [2, 2],
    "num_query_pool_stages": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
_FIXED: dict[str, Any] = {
    "vision_config": {
        "backbone_config": _BACKBONE,
        "fpn_kernel_size": 1,
        "fpn_stride": 1,
        "fpn_padding": 0,
        "fpn_top_down_levels": [2, 3],
        "num_feature_levels": 3,
    },
    "prompt_encoder_config": {
        "patch_size": 16,
        "num_point_embeddings": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
}
_FIXED_MEMORY: dict[str, Any] = {
    "multimask_output_in_sam": True,
    "multimask_output_for_tracking": True,
    "sigmoid_scale_for_mem_enc": 20.0,
    "sigmoid_bias_for_mem_enc": -10.0,
    "memory_attention_downsample_rate": 1,
    "memory_attention_feed_forward_hidden_act": "relu",
    "mask_downsampler_kernel_size": 3,
    "mask_downsampler_stride": 2,
    "mask_downsampler_padding": 1,
    "mask_downsampler_total_stride": 16,
    "mask_downsampler_hidden_act": "gelu",
    "memory_fuser_kernel_size": 7,
    "memory_fuser_padding": 3,
    "memory_fuser_hidden_act": "gelu",
}


def read_config(path: pathlib.Path, images_only: bool) -> SAM2Config:
    """The model that a `config.json` describes.

    Args:
        path: the file.
        images_only: whether the weights beside it are, where it does not say.

    Raises:
        ValueError: it is damaged, or describes no model of SAM 2, or one of another structure.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        return config_from_json(json.loads(text), images_only)
    except (ValueError, RecursionError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"{path} does not describe a SAM 2 model: {reason}. Correct it, or, to go by the "
            "tensors alone, put the weights where it is not."
        ) from error


def config_from_json(given: Any, images_only: bool = False) -> SAM2Config:
    """Inverse of `config_json`, also of what `transformers` saves, which may leave defaults out.

    A variant keeps its name, at any size. What `transformers` has no setting for is as the
    official builders set it.

    Raises:
        ValueError: what is wrong, for the end of a sentence.
    """
    if not isinstance(given, dict):
        raise ValueError(f"expected a mapping, got a {type(given).__name__}")
    kind = given.get("model_type") or ("sam2" if images_only else "sam2_video")
    if kind not in ("sam2", "sam2_video"):
        raise ValueError(f"expected model_type 'sam2' or 'sam2_video', got {kind!r:.50}")
    images_only = kind == "sam2"
    # Its own defaults, all of SAM 2.1 tiny: `config_json` of it is what `Sam2VideoConfig()` is.
    usual = _description(SAM2Config(images_only=images_only))
    values = _filled(usual, {**given, "rope_parameters": _rope(given)})
    config = _named(_built(values, images_only))
    for name, expected, value in _differences(_description(config), values):
        raise ValueError(f"{name} is {value!r:.60}, and with its other values must be {expected!r}")
    return config


def _built(values: Mapping[str, Any], images_only: bool) -> SAM2Config:
    """The model, from those values that others follow from."""
    vision, prompt, decoder = (
        values[f"{part}_config"] for part in ("vision", "prompt_encoder", "mask_decoder")
    )
    trunk = vision["backbone_config"]
    heads = trunk["num_attention_heads_per_stage"]
    copied = ("num_multimask_outputs", "mlp_dim", "attention_downsample_rate")
    fields: dict[str, Any] = {
        "images_only": images_only,
        "image_size": prompt["image_size"],
        "hidden_dim": vision["fpn_hidden_size"],
        "mask_in_chans": prompt["mask_input_channels"],
        "trunk": {
            "embed_dim": trunk["hidden_size"],
            "num_heads": heads[0] if isinstance(heads, list) and heads else heads,
            "stages": trunk["blocks_per_stage"],
            "global_att_blocks": trunk["global_attention_blocks"],
            "window_spec": trunk["window_size_per_stage"],
            "window_pos_embed_bkg_spatial_size": trunk[
                "window_positional_embedding_background_size"
            ],
            "mlp_ratio": trunk["mlp_ratio"],
        },
        "mask_decoder": {
            "num_layers": decoder["num_hidden_layers"],
            "num_heads": decoder["num_attention_heads"],
            "iou_head_depth": decoder["iou_head_depth"],
            "iou_head_hidden_dim": decoder["iou_head_hidden_dim"],
            **{name: decoder[name] for name in copied},
        },
        **{name: decoder[name] for name in _DYNAMIC},
    }
    if not images_only:
        fields |= {
            "mem_dim": values["memory_encoder_output_channels"],
            "memory_attention": {
                "num_layers": values["memory_attention_num_layers"],
                "num_heads": values["memory_attention_num_attention_heads"],
                "mlp_dim": values["memory_attention_feed_forward_hidden_size"],
                "rope_theta": values["rope_parameters"]["rope_theta"],
            },
            "num_fuser_layers": values["memory_fuser_num_layers"],
            "num_maskmem": values["num_maskmem"],
            "max_obj_ptrs_in_encoder": values["max_object_pointers_in_encoder"],
            "max_cond_frames_in_attn": values["max_cond_frame_num"],
            "no_obj_embed_spatial": values["enable_occlusion_spatial_embedding"],
            "add_tpos_enc_to_obj_ptrs": values["enable_temporal_pos_encoding_for_object_pointers"],
            **{name: values[name] for name in _POINTS},
        }
    return SAM2Config.from_dict(fields)


def _named(config: SAM2Config) -> SAM2Config:
    """The same, under the name of the variant whose parts it has, if there is one."""
    parts = _IMAGES if config.images_only else _IMAGES + _MEMORY
    for variant in VARIANTS.values():
        if all(getattr(config, part) == getattr(variant, part) for part in parts):
            memory = {part: getattr(variant, part) for part in _MEMORY}
            name = f"{variant.name}_images" if config.images_only else variant.name
            return dataclasses.replace(config, name=name, **memory)
    return dataclasses.replace(config, name="custom_images" if config.images_only else "custom")


def _description(config: SAM2Config) -> dict[str, Any]:
    """All that a `config.json` of this model may say and must not say otherwise."""
    told = _merged(config_json(config), _FIXED if config.images_only else _FIXED | _FIXED_MEMORY)
    del told["architectures"]
    backbone = told["vision_config"]["backbone_config"]
    # Nothing reads these there: official checkpoints have one of them wrong.
    del backbone["image_size"], backbone["num_attention_heads"]
    if config.images_only:
        del told["image_size"]
    return told


def _rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the rotary encoding, wherever a version of `transformers` kept them."""
    rope = given.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters must be a mapping, got {rope!r:.50}")
    thetas = (given.get("memory_attention_rope_theta"), rope.get("rope_theta"))
    theta = next((t for t in (*thetas, given.get("rope_theta")) if t is not None), None)
    kind = rope.get("rope_type", rope.get("type", "default"))
    return {"rope_theta": theta, "rope_type": "axial" if kind == "default" else kind}


def _merged(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Both, mapping by mapping."""
    both = {name: _merged(a[name], b[name]) for name in a if isinstance(b.get(name), dict)}
    return {**a, **b, **both}


def _filled(usual: Mapping[str, Any], given: Any, where: str = "") -> dict[str, Any]:
    """What is given of the names in `usual`, and the usual value of those that are not."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a mapping, got {given!r:.50}")
    values = {}
    for name, value in usual.items():
        found = given.get(name)
        if found is None:
            values[name] = value
        else:
            values[name] = _filled(value, found, name) if isinstance(value, dict) else found
    return values


def _differences(
    expected: Mapping[str, Any], values: Mapping[str, Any], where: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(name, expected, value) wherever two descriptions differ."""
    for name, wanted in expected.items():
        if isinstance(wanted, dict):
            yield from _differences(wanted, values[name], f"{where}{name}.")
        elif values[name] != wanted:
            yield f"{where}{name}", wanted, values[name]
