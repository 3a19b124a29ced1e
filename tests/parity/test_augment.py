"""Augmentation is what torchvision, which the official recipe uses, makes of the same numbers."""

import importlib

import numpy as np
import pytest
from PIL import Image

from sam2jax.io.images import open_image
from sam2jax.training.data import augment
from sam2jax.training.data.clip import RawClip
from tests import oracle

pytestmark = pytest.mark.parity

# Only once the oracle is there: it makes torchvision work beside a torch of another build.
torch, functional = oracle.torch, importlib.import_module("torchvision.transforms.functional")


@pytest.fixture(scope="module")
def clip(media):
    picture = open_image(media / "truck.jpg").resize((360, 250))
    y, x = np.mgrid[:250, :360]
    ring = abs(np.hypot(x - 200, y - 120) - 70) < 25
    return RawClip([picture], np.stack([ring, (x > 31) & (x < 90) & (y > 77)])[None])


@pytest.mark.parametrize(("angle", "shear"), [(13.7, -8.2), (-25.0, 20.0), (0.0, 11.1)])
def test_affine(clip, angle, shear):
    moved = augment.affine(clip, angle, shear)
    numbers = {"angle": angle, "translate": [0, 0], "scale": 1.0, "shear": [shear, 0.0]}
    bilinear = functional.InterpolationMode.BILINEAR
    expected = functional.affine(
        clip.frames[0], **numbers, interpolation=bilinear, fill=list(augment.FILL)
    )
    np.testing.assert_array_equal(np.asarray(moved.frames[0]), np.asarray(expected))
    masks = functional.affine(torch.from_numpy(clip.masks[0].astype(np.uint8)), **numbers)
    assert (moved.masks[0] != (masks.numpy() > 0)).mean() < 1e-3


@pytest.mark.parametrize("size", [96, 125, 256, 512])
def test_resize(clip, size):
    square = augment.resize(clip, size)
    np.testing.assert_array_equal(
        np.asarray(square.frames[0]), np.asarray(functional.resize(clip.frames[0], [size, size]))
    )
    expected = functional.resize(torch.from_numpy(clip.masks[0].astype(np.uint8)), [size, size])
    assert (square.masks[0] != (expected.numpy() > 0)).mean() < 1e-3


def test_colours(clip):
    picture: Image.Image = clip.frames[0]
    found = augment.adjust(picture, [("Color", 0.4), ("Brightness", 1.3), ("Contrast", 0.7)])
    expected = functional.adjust_contrast(
        functional.adjust_brightness(functional.adjust_saturation(picture, 0.4), 1.3), 0.7
    )
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    grey = picture.convert("L").convert("RGB")
    expected = functional.to_grayscale(picture, num_output_channels=3)
    np.testing.assert_array_equal(np.asarray(grey), np.asarray(expected))
