"""The converter against the real things: PyTorch, the official package, and `transformers`."""

import collections
import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch
from sam2.build_sam import _load_checkpoint

from sam2jax import convert
from sam2jax.config import VARIANTS
from sam2jax.convert import huggingface, layouts, torch_file
from sam2jax.loading import load, save
from sam2jax.testing import small_config
from tests import oracle
from tests.conftest import PUBLISHED
from tests.test_convert import hollow, official_shapes, shapes_of

from transformers import (  # isort: skip  (after the oracle, which mends torchvision)
    Sam2Config,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
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
        video = Sam2VideoModel(Sam2VideoConfig(**huggingface.config_json(config)))
        still = dataclasses.replace(config, images_only=True)
        images = Sam2Model(Sam2Config(**huggingface.config_json(still)))
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
    # Without our header the model cannot be told: it is of a size that is nobody's.
    with pytest.raises(ValueError, match="does not fit any official model"):
        load(tmp_path / "again")

    images = Sam2Model.from_pretrained(converted)
    still = dataclasses.replace(SMALL, images_only=True)
    expected = layouts.expected_shapes(still, "huggingface")
    assert {key: tuple(value.shape) for key, value in images.state_dict().items()} == expected


def test_config_json_describes_the_official_models(tmp_path: pathlib.Path):
    """Everything that is not a default of ours agrees with what `transformers` assumes."""
    ours = Sam2VideoConfig(**huggingface.config_json(VARIANTS["sam2.1_hiera_tiny"]))
    ours, theirs = (json.loads(c.to_json_string()) for c in (ours, Sam2VideoConfig()))
    ours.pop("architectures", None), theirs.pop("architectures", None)
    assert ours == theirs


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
