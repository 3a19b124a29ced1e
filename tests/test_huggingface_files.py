"""The JSON files of `transformers`: written for it, and read where it has saved a model again."""

import dataclasses
from typing import Any

import pytest

from sam2jax.config import NANO, VARIANTS, SAM2Config
from sam2jax.convert import huggingface_files
from tests.conftest import PUBLISHED
from tests.test_convert import SMALL

TINY = VARIANTS["sam2.1_hiera_tiny"]


@pytest.mark.parametrize("size", [1024, 512])
@pytest.mark.parametrize("variant", PUBLISHED)
def test_variants_are_read_from_what_is_written(variant: str, size: int):
    config = dataclasses.replace(VARIANTS[variant], image_size=size)
    assert huggingface_files.config_from_json(huggingface_files.config_json(config)) == config

    # As `transformers` 4.57 made those on the hub: names and omissions are older, heads wrong.
    told = huggingface_files.config_json(config)
    told["memory_attention_rope_theta"] = told.pop("rope_parameters")["rope_theta"]
    del told["max_cond_frame_num"]
    told["vision_config"]["backbone_config"]["num_attention_heads"] = 1
    told["mask_decoder_config"] = {"model_type": ""}
    assert huggingface_files.config_from_json(told) == config

    # Without memory the two versions are the same model, and named as `identify` names it.
    still = dataclasses.replace(config, images_only=True)
    name = variant.replace("sam2.1", "sam2")
    changes = {"name": f"{name}_images", "image_size": size, "images_only": True}
    for each in (huggingface_files.config_json(still), {**told, "model_type": "sam2"}):
        found = huggingface_files.config_from_json(each)
        assert found == dataclasses.replace(VARIANTS[name], **changes)


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(NANO, images_only=True)])
def test_other_models_are_read_from_what_is_written(config: SAM2Config):
    options = {
        "image_size": 192,
        "dynamic_multimask_via_stability": False,
        "dynamic_multimask_stability_thresh": 0.5,
    }
    memory = {"max_cond_frames_in_attn": 3, "multimask_min_pt_num": 1, "multimask_max_pt_num": 4}
    config = dataclasses.replace(config, **options, **({} if config.images_only else memory))
    name = "sam2.1_hiera_nano_images" if config.images_only else "custom"
    found = huggingface_files.config_from_json(huggingface_files.config_json(config))
    assert found == dataclasses.replace(config, name=name)


def test_defaults_of_a_config_json_are_those_of_transformers():
    assert huggingface_files.config_from_json({}) == TINY
    assert huggingface_files.config_from_json({"model_type": "sam2_video"}) == TINY
    for told in ({"model_type": "sam2"}, {}):
        config = huggingface_files.config_from_json(told, images_only=True)
        assert config == dataclasses.replace(
            VARIANTS["sam2_hiera_tiny"], name="sam2_hiera_tiny_images", images_only=True
        )
    told = {"multimask_max_pt_num": 2, "image_size": None, "vision_config": None, "id2label": {}}
    expected = dataclasses.replace(TINY, multimask_max_pt_num=2)
    assert huggingface_files.config_from_json(told) == expected
    for told in ({"rope_theta": 5}, {"rope_parameters": {"rope_theta": 5, "rope_type": "default"}}):
        assert huggingface_files.config_from_json(told).memory_attention.rope_theta == 5.0


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([], "expected a mapping, got a list"),
        ({"model_type": "edgetam_video"}, "expected model_type 'sam2' or .*, got 'edgetam_video'"),
        ({"model_type": ["sam2"]}, "expected model_type"),
        ({"vision_config": 3}, "vision_config must be a mapping, got 3"),
        ({"vision_config": {"model_type": "timm_wrapper"}}, "vision_config.model_type is 'timm_w"),
        ({"vision_config": {"fpn_top_down_levels": [3]}}, r"levels is \[3\], .* must be \[2, 3\]"),
        ({"image_size": 512}, "image_size is 512, and with its other values must be 1024"),
        ({"prompt_encoder_config": {"image_size": 512}}, "image_size is 1024, .* must be 512"),
        ({"prompt_encoder_config": {"image_size": 10**9}}, "image_size must be a multiple"),
        ({"prompt_encoder_config": {"image_size": "big"}}, "image_size must be int, got 'big'"),
        ({"vision_config": {"backbone_feature_sizes": [[8, 8]]}}, "sizes is .* must be .*128, 128"),
        ({"num_maskmem": 10**6}, "num_maskmem must be -1 to 48"),
        ({"memory_encoder_output_channels": 32}, "fixes mem_dim at 64"),
        ({"memory_attention_feed_forward_hidden_act": "gelu"}, "must be 'relu'"),
        ({"sigmoid_scale_for_mem_enc": float("nan")}, "sigmoid_scale_for_mem_enc is nan"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": [1]}, "rope_parameters must be a mapping"),
    ],
)
def test_a_config_json_of_another_model_is_refused(told: Any, words: str):
    with pytest.raises(ValueError, match=words):
        huggingface_files.config_from_json(told)


def test_no_single_value_of_a_config_json_goes_unread():
    """What is not the model's own is refused, or makes another model; nothing is passed over."""
    usual = huggingface_files._description(SAM2Config())
    leaves = [(path, value) for path, value in leaves_of(usual) if path[-1] != "rope_type"]
    assert len(leaves) > 70
    for path, value in leaves:
        told: Any = {"bool": not value, "str": "x"}.get(type(value).__name__, 11)
        for name in reversed(path):
            told = {name: told}
        try:
            found = huggingface_files.config_from_json(told)
        except ValueError:
            continue
        assert found != TINY, path


def leaves_of(tree: dict[str, Any], where: tuple[str, ...] = ()) -> list[tuple[tuple, Any]]:
    return [
        leaf
        for name, value in tree.items()
        for leaf in (
            leaves_of(value, (*where, name))
            if isinstance(value, dict)
            else [((*where, name), value)]
        )
    ]


@pytest.mark.parametrize("size", [1024, 512])
def test_processors_are_written_for_the_size(size: int):
    config = dataclasses.replace(TINY, image_size=size)
    files = huggingface_files.files(config)
    assert set(files) == {
        *("config.json", "preprocessor_config.json"),
        *("processor_config.json", "video_preprocessor_config.json"),
    }
    images, videos = files["preprocessor_config.json"], files["video_preprocessor_config.json"]
    assert images["size"] == videos["size"] == {"height": size, "width": size}
    assert images["mask_size"] == {"height": size // 4, "width": size // 4}
    assert files["processor_config.json"] == {
        "processor_class": "Sam2VideoProcessor",
        "target_size": size,
        "point_pad_value": -10,
    }
    still = huggingface_files.files(dataclasses.replace(config, images_only=True))
    assert files.keys() - still.keys() == {"video_preprocessor_config.json"}
    assert still["processor_config.json"]["processor_class"] == "Sam2Processor"
