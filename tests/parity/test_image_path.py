"""From a picture's pixels to mask candidates, beside the official image predictor."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.resize import preprocess_image, resize_masks
from tests import oracle
from tests.parity.pairs import FEATURES, LOGITS, Pair, assert_close, at, pair

pytestmark = [pytest.mark.parity, pytest.mark.optimised]

SIZE = 256
BOX = (425.0, 600.0, 700.0, 875.0)
PROMPTS = {
    "click": {"points": [[500, 375]], "labels": [1]},
    "clicks": {"points": [[500, 375], [1125, 625]], "labels": [1, 0]},
    "box": {"box": BOX},
    "box and click": {"points": [[575, 750]], "labels": [0], "box": BOX},
    "click and mask": {"points": [[500, 375]], "labels": [1], "mask": True},
}


@pytest.fixture(scope="module")
def picture(media: pathlib.Path) -> np.ndarray:
    return np.array(Image.open(media / "truck.jpg").convert("RGB"))


@pytest.fixture(scope="module")
def both() -> Pair:
    return pair(at("sam2.1_hiera_tiny", SIZE), 7)


@pytest.fixture(scope="module")
def official(both: Pair, picture: np.ndarray) -> oracle.SAM2ImagePredictor:
    return oracle.image_predictor(both.official, picture)


def answer(model: SAM2, picture, points, labels, num_points, mask, has_mask):
    features = model.encode_image(preprocess_image(picture[None], SIZE))
    return model.decode_masks(
        model.without_memory(features.features),
        (features.high_res_s0, features.high_res_s1),
        points,
        labels,
        num_points,
        mask,
        has_mask,
    )


def test_pictures_are_resized_alike(
    both: Pair, official: oracle.SAM2ImagePredictor, picture: np.ndarray
):
    theirs = official._transforms(picture).numpy().transpose(1, 2, 0)
    assert_close(preprocess_image(picture[None], SIZE)[0], theirs, FEATURES, "pixels")


@pytest.mark.parametrize("name", PROMPTS)
def test_candidates(
    both: Pair, official: oracle.SAM2ImagePredictor, picture: np.ndarray, name: str
):
    given = PROMPTS[name]
    height, width = picture.shape[:2]
    quarter = SIZE // 4
    mask = 4 * np.sin(np.arange(quarter**2, dtype=np.float32) / 99).reshape(1, quarter, quarter)
    points, labels = given.get("points", []), given.get("labels", [])
    masks, ious, low_res = official.predict(
        point_coords=np.float32(points) if points else None,
        point_labels=np.int32(labels) if labels else None,
        box=np.float32(given["box"]) if "box" in given else None,
        mask_input=mask if "mask" in given else None,
        multimask_output=True,
        return_logits=True,
    )
    if "box" in given:
        points, labels = [given["box"][:2], given["box"][2:], *points], [2, 3, *labels]
    padded = np.zeros((1, 4, 2), np.float32)
    padded[0, : len(points)] = (
        np.float32(points).reshape(-1, 2) * SIZE / np.float32([width, height])
    )
    kinds = np.zeros((1, 4), np.int32)
    kinds[0, : len(labels)] = labels
    found = both.apply(
        answer, picture, padded, kinds, np.int32([len(labels)]), mask, np.array(["mask" in given])
    )
    assert_close(found.ious[0, 1:], ious, FEATURES, "ious")
    assert_close(jnp.clip(found.masks[0, 1:], -32, 32), low_res, LOGITS, "masks")
    assert_close(resize_masks(found.masks[0, 1:], (height, width)), masks, LOGITS, "large masks")
