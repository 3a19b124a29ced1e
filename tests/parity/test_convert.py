"""The converter against the real things: PyTorch, the official package, and `transformers`."""

import collections
import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image
from sam2.build_sam import _load_checkpoint

from sam2jax import convert
from sam2jax.config import VARIANTS, SAM2Config
from sam2jax.convert import huggingface, huggingface_files, layouts, torch_file
from sam2jax.loading import load, save
from sam2jax.testing import small_config
from tests import oracle
from tests.conftest import PUBLISHED
from tests.test_convert import hollow, official_shapes, shapes_of

from transformers import (  # isort: skip  (after the oracle, which mends torchvision)
    AutoProcessor,
    Sam2Config,
    Sam2Model,
    Sam2Processor,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VideoProcessor,
    pipeline,
)
from transformers.models.sam2_video.modeling_sam2_video import (  # isort: skip
    Sam2VideoInferenceSession,
)

pytestmark = pytest.mark.parity

# `transformers` fixes the memory's width, and fills no holes.
SMALL = small_config(hidden_dim=128, mem_dim=64, fill_hole_area=0)
SEED = 4  # with which the object is there
CLICK = (40.0, 50.0)


@pytest.fixture(scope="module")
def official() -> torch.nn.Module:
    return oracle.build(SMALL, SEED)


@pytest.fixture
def converted(tmp_path: pathlib.Path, official: torch.nn.Module) -> pathlib.Path:
    """The official model in the format of `transformers`."""
    params = layouts.to_params(state_of(official), "official")
    convert.write(tmp_path / "hf", params, SMALL, "huggingface")
    return tmp_path / "hf"


def state_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in model.state_dict().items()}


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key].numpy(), err_msg=key)


# PyTorch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_the_official_trainer_saves_is_read(tmp_path: pathlib.Path, protocol: int):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    model.to(memory_format=torch.channels_last)  # strides that are not those of the shape
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(1, 3, 3, 3)).sum().backward()
    optimizer.step()
    numbers = torch.arange(20.0)
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "loss": {"all": collections.OrderedDict()},
        "steps": {"train": 10**12, "val": 0},
        "time_elapsed": 12.5,
        "best_meter_values": {},
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "parameter": torch.nn.Parameter(numbers[3:9].view(2, 3)),
        "strided": numbers[2:].as_strided((3, 4), (4, 1)).t(),
        "half": torch.randn(3).half(),
        "scalar": torch.tensor(5),
        "empty": torch.zeros(0, 3),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
    }
    path = tmp_path / "checkpoint.pt"
    torch.save(checkpoint, path, pickle_protocol=protocol)
    read = torch_file.load_torch(path)
    assert read.keys() == checkpoint.keys()
    assert_equal(read["model"], checkpoint["model"])
    for name in ("parameter", "strided", "half", "scalar", "empty"):
        np.testing.assert_array_equal(read[name], checkpoint[name].detach().numpy())
    for name in ("epoch", "steps", "time_elapsed", "best_meter_values", "scaler", "size", "loss"):
        assert read[name] == checkpoint[name]
    assert read["optimizer"]["param_groups"] == checkpoint["optimizer"]["param_groups"]
    moments = checkpoint["optimizer"]["state"][0]["exp_avg"]
    np.testing.assert_array_equal(read["optimizer"]["state"][0]["exp_avg"], moments.numpy())


@pytest.mark.parametrize("mapped", [False, True])
def test_what_we_write_torch_reads(tmp_path: pathlib.Path, mapped: bool):
    values = {"model": {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T}, "note": "x", "n": 7}
    torch_file.save_torch(tmp_path / "a.pt", values)
    read = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mapped)
    np.testing.assert_array_equal(read["model"]["a"].numpy(), values["model"]["a"])
    assert (read["note"], read["n"]) == ("x", 7)


# The official package ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sam2.1_hiera_tiny", "sam2_hiera_tiny"])
def test_tuned_here_it_loads_into_the_official_package(tmp_path: pathlib.Path, name: str):
    official = oracle.prepare(oracle.construct_official(VARIANTS[name], True), seed=0)
    torch.save({"model": official.state_dict()}, tmp_path / "official.pt")
    model, params = load(tmp_path / "official.pt")
    assert model.config == VARIANTS[name]
    params["no_obj_ptr"] = params["no_obj_ptr"] + 1.0
    save(tmp_path / "tuned.pt", model, params)

    before = {key: value.clone() for key, value in official.state_dict().items()}
    _load_checkpoint(official, tmp_path / "tuned.pt")  # strict
    after = official.state_dict()
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert changed == ["no_obj_ptr"]
    assert torch.equal(after["no_obj_ptr"], before["no_obj_ptr"] + 1.0)


# transformers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_transformers(name: str):
    config = VARIANTS[name]
    ours = shapes_of(huggingface.from_official(hollow(official_shapes(name))))
    with torch.device("meta"):
        video = Sam2VideoModel(Sam2VideoConfig(**huggingface_files.config_json(config)))
        still = dataclasses.replace(config, images_only=True)
        images = Sam2Model(Sam2Config(**huggingface_files.config_json(still)))
    assert {key: tuple(value.shape) for key, value in video.state_dict().items()} == ours
    theirs = {key: tuple(value.shape) for key, value in images.state_dict().items()}
    assert layouts.is_images_only(hollow(theirs), "huggingface")
    guess = layouts.identify(hollow(theirs), "huggingface")
    assert layouts.expected_shapes(guess, "huggingface") == theirs


def test_what_transformers_saves_loads_back(converted: pathlib.Path, tmp_path: pathlib.Path):
    theirs = Sam2VideoModel.from_pretrained(converted)
    theirs.save_pretrained(tmp_path / "again")
    weights = convert.read(converted).tensors
    assert_equal(dict(weights), theirs.state_dict())
    # Our header is gone, and with it what config.json has no word for.
    usual = {"name": "custom", "fill_hole_area": 8}
    again = convert.read(tmp_path / "again")
    assert again.config == dataclasses.replace(SMALL, **usual)
    assert_equal(dict(again.tensors), theirs.state_dict())

    images = Sam2Model.from_pretrained(converted)
    still = dataclasses.replace(SMALL, images_only=True)
    expected = layouts.expected_shapes(still, "huggingface")
    assert {key: tuple(value.shape) for key, value in images.state_dict().items()} == expected
    images.save_pretrained(tmp_path / "images")
    found = load(tmp_path / "images")[0].config
    assert (found.name, found.image_size, found.trunk, found.images_only) == (
        *("custom_images", SMALL.image_size, SMALL.trunk, True),
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_json_that_transformers_saves_is_read(tmp_path: pathlib.Path, name: str):
    options = {"image_size": 512, "multimask_max_pt_num": 2, "max_cond_frames_in_attn": 4}
    for config in (VARIANTS[name], dataclasses.replace(VARIANTS[name], **options)):
        Sam2VideoConfig(**huggingface_files.config_json(config)).save_pretrained(tmp_path)
        assert huggingface_files.read_config(tmp_path / "config.json", False) == config
    Sam2Config.from_pretrained(tmp_path).save_pretrained(tmp_path)
    found = huggingface_files.read_config(tmp_path / "config.json", True)
    assert (found.image_size, found.trunk, found.images_only) == (512, config.trunk, True)


def test_defaults_are_those_of_transformers(tmp_path: pathlib.Path):
    """All that we demand of a config.json is what its own defaults are."""
    for theirs, images_only in ((Sam2VideoConfig(), False), (Sam2Config(), True)):
        ours = huggingface_files._description(SAM2Config(images_only=images_only))
        told = json.loads(theirs.to_json_string())
        assert huggingface_files._filled(ours, told) == ours
        merged = huggingface_files._merged(told, ours)
        assert merged == told  # no name of ours is unknown there


def test_config_json_describes_the_official_models(tmp_path: pathlib.Path):
    """Everything that is not a default of ours agrees with what `transformers` assumes."""
    ours = Sam2VideoConfig(**huggingface_files.config_json(VARIANTS["sam2.1_hiera_tiny"]))
    ours, theirs = (json.loads(c.to_json_string()) for c in (ours, Sam2VideoConfig()))
    ours.pop("architectures", None), theirs.pop("architectures", None)
    assert ours == theirs


@pytest.mark.parametrize("size", [1024, 512])
def test_processors_load_and_scale_to_the_size(tmp_path: pathlib.Path, size: int):
    config = dataclasses.replace(VARIANTS["sam2.1_hiera_tiny"], image_size=size)
    still = dataclasses.replace(config, images_only=True)
    for folder, model in (("video", config), ("images", still)):
        (tmp_path / folder).mkdir()
        for name, values in huggingface_files.files(model).items():
            (tmp_path / folder / name).write_text(json.dumps(values))
    video = Sam2VideoProcessor.from_pretrained(tmp_path / "video")
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((pixels / 255 - mean) / std).transpose(2, 0, 1)
    kinds = [AutoProcessor.from_pretrained(tmp_path / folder) for folder in ("video", "images")]
    assert [type(kind) for kind in kinds] == [Sam2VideoProcessor, Sam2Processor]
    for processor in (video, Sam2Processor.from_pretrained(tmp_path / "video"), *kinds):
        assert processor.target_size == size
        given = processor(images=pixels, return_tensors="pt")
        np.testing.assert_allclose(given["pixel_values"][0], expected, atol=1e-5)
        mask = np.zeros((600, 800), np.uint8)
        wide = processor(
            images=np.zeros((600, 800, 3), np.uint8),
            segmentation_maps=mask,
            input_points=[[[[200, 150]]]],
            input_labels=[[[1]]],
            input_boxes=[[[0, 300, 800, 600]]],
            return_tensors="pt",
        )
        assert wide["pixel_values"].shape == (1, 3, size, size)
        assert wide["labels"].shape[-2:] == (size // 4, size // 4)
        np.testing.assert_allclose(wide["input_points"].flatten(), [size / 4, size / 4])
        np.testing.assert_allclose(wide["input_boxes"].flatten(), [0, size / 2, size, size])
    session = video.init_video_session(video=[pixels, pixels], inference_device="cpu")
    np.testing.assert_allclose(session.get_frame(1).numpy(), expected, atol=1e-5)


def test_a_pipeline_runs_on_a_folder_of_ours(converted: pathlib.Path):
    generate = pipeline("mask-generation", model=str(converted), device="cpu")
    image = Image.fromarray(np.zeros((60, 80, 3), np.uint8))
    found = generate(
        image,
        points_per_crop=2,
        pred_iou_thresh=-1e9,
        stability_score_thresh=0.0,
        crops_nms_thresh=1,
    )
    assert found.keys() >= {"masks", "scores"}
    assert all(np.shape(mask) == (60, 80) for mask in found["masks"])


def test_transformers_gives_the_official_answers(
    converted: pathlib.Path, official: torch.nn.Module
):
    """On a click, and on the frames that follow: so every weight is where it belongs."""
    theirs, info = Sam2VideoModel.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values())
    size = SMALL.image_size
    frames = np.random.default_rng(0).standard_normal((5, size, size, 3)).astype(np.float32)
    state = oracle.init_state(official, frames)
    oracle.prompt(official, state, points=np.array([CLICK]), labels=np.array([1]))
    oracle.propagate(official, state)

    session = Sam2VideoInferenceSession(
        oracle.to_torch(frames),
        size,
        size,
        inference_device="cpu",
        inference_state_device="cpu",
        video_storage_device="cpu",
        dtype=torch.float32,
    )
    points = {"point_coords": torch.tensor([[[CLICK]]]), "point_labels": torch.tensor([[[1]]])}
    session.add_point_inputs(session.obj_id_to_idx(1), 0, points)
    session.obj_with_new_inputs.append(1)
    theirs.eval()(session, frame_idx=0)
    for output in theirs.propagate_in_video_iterator(session):
        expected = oracle.outputs(state, output.frame_idx)["masks"]
        assert expected.max() > -1024  # the object is there
        found = output.pred_masks[0, 0].float().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)
