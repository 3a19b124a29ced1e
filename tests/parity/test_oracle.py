"""The oracle itself: that it is the official model, and that its stand-ins do what they replace."""

import dataclasses
import pathlib

import av
import numpy as np
import pytest
import torch

from sam2jax.config import NO_POSTPROCESSING, VARIANTS, SAM2Config
from tests import oracle
from tests.conftest import PUBLISHED

pytestmark = pytest.mark.parity


def at(name: str, image_size: int, **options) -> SAM2Config:
    return dataclasses.replace(VARIANTS[name], image_size=image_size, **options)


def plain_attributes(model: torch.nn.Module) -> dict[str, object]:
    """What decides a model's behaviour besides its weights and its layers."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str) and not name.startswith("_")
    }


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("postprocessing", [True, False])
def test_build_equals_the_official_builder(name: str, postprocessing: bool):
    if postprocessing is False and "tiny" not in name:
        pytest.skip("the option does not depend on the size")
    config = at(name, 256, **({} if postprocessing else NO_POSTPROCESSING))
    ours = oracle.construct(config).eval()
    theirs = oracle.construct_official(config, postprocessing)
    assert str(ours) == str(theirs)
    assert plain_attributes(ours) == plain_attributes(theirs)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_components_are_8_connected():
    mask = np.zeros((2, 1, 5, 5), bool)
    mask[0, 0, [0, 1], [0, 1]] = True  # touch at a corner: one component
    mask[0, 0, 4, 4] = True
    labels, areas = oracle.connected_components(torch.from_numpy(mask))
    assert labels[0, 0, 0, 0] == labels[0, 0, 1, 1] != labels[0, 0, 4, 4]
    assert areas[0, 0, 0, 0] == areas[0, 0, 1, 1] == 2 and areas[0, 0, 4, 4] == 1
    assert not labels[1].any() and not areas[~torch.from_numpy(mask)].any()


def test_video_reader_gives_rgb_at_the_asked_size(tmp_path: pathlib.Path):
    path = str(tmp_path / "red.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        red = np.full((48, 64, 3), (200, 20, 20), np.uint8)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(red)))
        container.mux(stream.encode())
    frames = list(oracle.VideoReader(path, 32, 32))
    assert len(frames) == 3
    assert frames[0].shape == (32, 32, 3) and frames[0].dtype == torch.uint8
    assert abs(frames[0].float().mean((0, 1)) - torch.tensor([200.0, 20, 20])).max() < 8
    assert oracle.VideoReader(path).next().shape == (48, 64, 3)
