"""The image predictor and the automatic mask generator beside the official ones."""

import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

import sam2jax
from sam2jax.config import VARIANTS
from tests import oracle
from tests.parity.pairs import Pair, assert_close, at, iou, pair

pytestmark = [pytest.mark.parity, pytest.mark.optimised]

SIZE = 256  # where not the models' own
MODELS = [("sam2.1_hiera_tiny", 3), ("sam2_hiera_base_plus", 5)]
BOXES = [[75, 275, 425, 550], [425, 300, 700, 575], [375, 250, 650, 500]]
SCRIPT: dict[str, dict[str, Any]] = {
    "point": {"point_coords": [[500, 375]], "point_labels": [1]},
    "points": {"point_coords": [[500, 375], [525, 225], [20, 30]], "point_labels": [1, 0, 1]},
    "one mask": {"point_coords": [[500, 375]], "point_labels": [1], "multimask_output": False},
    "box": {"box": BOXES[0], "multimask_output": False},
    "three boxes": {"box": BOXES},
    "box with point": {"box": BOXES[1], "point_coords": [[575, 450]], "point_labels": [0]},
    "boxes with points": {
        "box": BOXES,
        "point_coords": [[[200, 400]], [[500, 400]], [[400, 300]]],
        "point_labels": [[1], [0], [1]],
    },
    "as shares": {"point_coords": [[0.5, 0.4]], "point_labels": [1], "normalize_coords": False},
}


@pytest.fixture(scope="module", params=MODELS)
def both(request) -> Pair:
    name, seed = request.param
    return pair(at(name, SIZE), seed)


def picture(media: pathlib.Path, name: str, height: int | None = None) -> np.ndarray:
    """A whole picture, or a corner of it."""
    whole = np.array(Image.open(media / f"{name}.jpg").convert("RGB"))
    return whole if height is None else whole[:height, : 3 * height // 2]


def arrays(given: dict[str, Any]) -> dict[str, Any]:
    return {k: np.array(v, np.float32) if isinstance(v, list) else v for k, v in given.items()}


def rows(ours: tuple, theirs: tuple) -> zip:
    """Answers to a batch, image by image."""
    return zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)


def agree(ours: tuple, theirs: tuple, what: str) -> None:
    """Logits at the picture's size, IoUs, and logits to be fed back."""
    assert [x.shape for x in ours] == [x.shape for x in theirs], what
    assert_close(ours[0], theirs[0], 2e-3, f"{what}: masks")
    assert_close(ours[1], theirs[1], 1e-4, f"{what}: ious")
    assert_close(ours[2], theirs[2], 2e-3, f"{what}: logits")
    assert iou(ours[0] > 0, theirs[0] > 0) > 0.999, what


@pytest.mark.parametrize(
    ("model", "name"), [(MODELS[0], "truck"), (MODELS[1], "groceries")], ids=["2.1", "2.0"]
)
def test_the_same_script(media: pathlib.Path, model: tuple[str, int], name: str):
    """At the model's own size."""
    both, image = pair(VARIANTS[model[0]], model[1]), picture(media, name)
    ours = sam2jax.SAM2ImagePredictor(both.model, both.params)
    theirs = oracle.image_predictor(both.official, image)
    ours.set_image(Image.fromarray(image))
    embedding = theirs.get_image_embedding().numpy().transpose(0, 2, 3, 1)
    assert_close(ours.get_image_embedding(), embedding, 5e-5, "embedding")
    for what, given in SCRIPT.items():
        given = arrays(given)
        agree(
            ours.predict(return_logits=True, **given),
            theirs.predict(return_logits=True, **given),
            what,
        )
    point = arrays(SCRIPT["point"])
    earlier = theirs.predict(**point)[2]
    for what, given in {
        "fed back": {**point, "mask_input": earlier[:1]},
        "fed back alone": {"mask_input": earlier[1:2], "multimask_output": False},
        "boxes fed back": {"box": np.float32(BOXES), "mask_input": earlier[:1]},
        "nothing": {},
    }.items():
        agree(
            ours.predict(return_logits=True, **given),
            theirs.predict(return_logits=True, **given),
            what,
        )
    masks, their_masks = ours.predict(**point)[0], theirs.predict(**point)[0]
    assert masks.dtype == their_masks.dtype and set(np.unique(masks)) <= {0, 1}
    assert iou(masks > 0, their_masks > 0) > 0.999


def test_batches_and_small_regions(both: Pair, media: pathlib.Path):
    images = [picture(media, "truck", 600), picture(media, "groceries", 400)]
    options = {"max_hole_area": 9, "max_sprinkle_area": 5, "mask_threshold": 0.5}
    ours = sam2jax.SAM2ImagePredictor(both.model, both.params, **options)
    theirs = oracle.image_predictor(both.official, **options)
    points = [np.float32([[500, 375]]), np.float32([[100, 100], [300, 200]])]
    labels = [np.ones(1), np.array([1, 0])]
    for predictor in (ours, theirs):
        predictor.set_image_batch(images)
    answers = ours.predict_batch(points, labels, return_logits=True)
    expected = theirs.predict_batch(points, labels, return_logits=True)
    for index, (mine, other) in enumerate(rows(answers, expected)):
        agree(mine, other, f"image {index}")
    boxes = [np.float32(BOXES), np.float32(BOXES[:1])]
    answers = ours.predict_batch(box_batch=boxes, multimask_output=False, return_logits=True)
    expected = theirs.predict_batch(box_batch=boxes, multimask_output=False, return_logits=True)
    for index, (mine, other) in enumerate(rows(answers, expected)):
        agree(mine, other, f"boxes on image {index}")


# Random weights draw whole-image masks; a high threshold leaves peaks, of which several survive.
PEAKS = {
    "points_per_side": 8,
    "points_per_batch": 48,
    "mask_threshold": 1.6,
    "stability_score_offset": 0.02,
    "stability_score_thresh": 0.5,
    "pred_iou_thresh": 0.47,
}
GENERATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without suppression": {"box_nms_thresh": 1.1, "output_mode": "uncompressed_rle"},
    "crops": {
        "crop_n_layers": 1,
        "crop_n_points_downscale_factor": 2,
        "output_mode": "coco_rle",
        "crop_nms_thresh": 0.5,
    },
    "crops with empty masks": {
        "crop_n_layers": 1,
        "crop_n_points_downscale_factor": 2,
        "mask_threshold": 50.0,
        "pred_iou_thresh": 0.0,
        "stability_score_thresh": 0.0,
    },
    "fed back": {"use_m2m": True, "stability_score_thresh": 0.3},
    "one mask each": {"multimask_output": False},
    "own points": {
        "points_per_side": None,
        "point_grids": [np.random.default_rng(0).uniform(size=(30, 2))],
    },
}


def pixels(segmentation: Any) -> np.ndarray:
    """Whatever the output mode: [H, W] bool."""
    if isinstance(segmentation, np.ndarray):
        return segmentation.astype(bool)
    if isinstance(segmentation["counts"], list):
        segmentation = coco.frPyObjects(segmentation, *segmentation["size"])
    return coco.decode(segmentation).astype(bool)


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_same_records(media: pathlib.Path, name: str):
    both = pair(at("sam2.1_hiera_tiny", SIZE), 3)
    image, options = picture(media, "truck", 400), {**PEAKS, **GENERATIONS[name]}
    theirs = oracle.mask_generator(both.official, **options).generate(image)
    ours = sam2jax.SAM2AutomaticMaskGenerator(both.model, both.params, **options).generate(image)
    assert len(theirs) >= 5, "too few survive to prove anything"
    assert len({tuple(record["crop_box"]) for record in theirs}) >= (2 if name == "crops" else 1)
    same_records(ours, theirs)


def same_records(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Up to their order, and what rounding does to masks."""
    assert len(ours) == len(theirs)

    def key(record: dict[str, Any]) -> tuple:
        return (*record["crop_box"], *np.round(record["point_coords"][0], 2), record["area"] // 50)

    def by_key(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(records, key=lambda record: (key(record), record["predicted_iou"]))

    for mine, other in zip(by_key(ours), by_key(theirs), strict=True):
        assert set(mine) == set(other)
        assert type(mine["segmentation"]) is type(other["segmentation"])
        assert iou(pixels(mine["segmentation"]), pixels(other["segmentation"])) > 0.99
        assert abs(mine["area"] - other["area"]) <= 0.01 * other["area"] + 1
        for field in ("bbox", "crop_box"):
            np.testing.assert_allclose(mine[field], other[field], atol=1)
        np.testing.assert_allclose(mine["point_coords"], other["point_coords"], atol=1e-3)
        np.testing.assert_allclose(mine["predicted_iou"], other["predicted_iou"], atol=1e-4)
        np.testing.assert_allclose(mine["stability_score"], other["stability_score"], atol=2e-2)
