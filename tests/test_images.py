"""Images: the predictor, the mask generator, and the pure functions below them."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

import sam2jax
from sam2jax.io.runs import encode_coco, encode_runs
from sam2jax.ops.boxes import mask_boxes, non_maximum_suppression
from sam2jax.predictors import automatic, sizes
from sam2jax.predictors.grids import crop_boxes, near_crop_edge, point_grid
from sam2jax.predictors.regions import clean_masks, compressed, restored
from sam2jax.testing import random_params, small_config

CONFIG = small_config(image_size=64)
MODEL = sam2jax.SAM2(CONFIG)
SIZE = (48, 80)
POINT = {"point_coords": [[30, 18]], "point_labels": [1]}


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, seed=3)


@pytest.fixture(scope="module")
def predictor(params):
    return sam2jax.SAM2ImagePredictor(MODEL, params)


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 90, (*size, 3), np.uint8)
    image[10:30, 20:45] += 150
    return image


def test_shapes_are_the_official_ones(predictor):
    predictor.set_image(Image.fromarray(picture()))
    masks, ious, logits = predictor.predict(**POINT)
    assert (masks.shape, ious.shape, logits.shape) == ((3, *SIZE), (3,), (3, 16, 16))
    assert {x.dtype for x in (masks, ious, logits)} == {np.dtype(np.float32)}
    assert set(np.unique(masks)) <= {0.0, 1.0} and np.abs(logits).max() <= 32
    masks, ious, logits = predictor.predict(
        box=[[0, 0, 20, 20], [5, 5, 40, 40]], multimask_output=False, return_logits=True
    )
    assert (masks.shape, ious.shape, logits.shape) == ((2, 1, *SIZE), (2, 1), (2, 1, 16, 16))
    assert predictor.get_image_embedding().shape == (1, 4, 4, CONFIG.hidden_dim)


def test_many_boxes_are_answered_as_one_by_one(predictor):
    predictor.set_image(picture())
    boxes = [[i, i % 7, 20 + i, 25 + i % 5] for i in range(19)]
    together = predictor.predict(box=boxes, return_logits=True)
    for index in (0, 7, 15, 16, 18):
        alone = predictor.predict(box=boxes[index], return_logits=True)
        for one, all_ in zip(alone, together, strict=True):
            np.testing.assert_allclose(one, all_[index], atol=1e-4)


def test_batches_equal_single_images_and_nothing_is_stale(predictor):
    images = [picture(0), picture(1, (60, 50)), picture(2)]
    points = [[[30, 18]], [[10, 20], [30, 30]], [[5, 5]]]
    labels = [[1], [1, 0], [1]]
    predictor.set_image_batch(images)
    boxes = np.array([[5, 5, 30, 30]] * 3)
    assert [x.shape[0] for x in predictor.predict_batch(box_batch=boxes)[0]] == [3] * 3
    masks, ious, logits = predictor.predict_batch(points, labels, return_logits=True)
    for index, image in enumerate(images):
        predictor.set_image(image)
        one = predictor.predict(points[index], labels[index], return_logits=True)
        np.testing.assert_allclose(one[0], masks[index], atol=1e-4)
        np.testing.assert_allclose(one[1], ious[index], atol=1e-5)
        np.testing.assert_allclose(one[2], logits[index], atol=1e-4)
    predictor.set_image(images[0])
    other = predictor.predict(points[2], labels[2], return_logits=True)
    assert not np.allclose(other[2], logits[2], atol=1e-3)


def test_other_numbers_of_points_and_boxes_compile_nothing_new(predictor):
    compiled = []

    def note(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def ask(image: np.ndarray, points: int, boxes: int) -> None:
        predictor.set_image(image)
        predictor.predict(np.full((points, 2), 7), np.ones(points))
        predictor.predict(box=np.tile([1, 2, 30, 40], (boxes, 1)))

    ask(picture(), 1, 3)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        ask(picture(1), 4, 4)
        ask(picture(2), 2, 3)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros(SIZE, np.uint8),
        np.zeros((*SIZE, 4), np.uint8),
        np.zeros((*SIZE, 3), np.uint16),
        np.zeros((*SIZE, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
        Image.new("L", (8, 8)),
        Image.new("RGBA", (8, 8)),
        "picture.jpg",
    ],
    ids=["grey", "rgba", "16 bit", "float", "empty", "L", "RGBA", "path"],
)
def test_refused_images(predictor, params, image):
    """And, as officially, nothing is answered for the image before."""
    for call in (predictor.set_image, lambda x: predictor.set_image_batch([picture(), x])):
        predictor.set_image(picture())
        with pytest.raises(ValueError, match="image"):
            call(image)
        with pytest.raises(RuntimeError, match="No image"):
            predictor.predict(**POINT)


def test_refused_prompts(predictor, params):
    predictor.set_image(picture())
    for given, message in (
        ({"point_coords": [[1, 2]]}, "together"),
        ({"point_labels": [1]}, "together"),
        ({"point_coords": [[1, np.nan]], "point_labels": [1]}, "finite"),
        ({"point_coords": [[1, 2]], "point_labels": [5]}, "Labels"),
        ({"box": [1, 2, 3]}, "box"),
        ({**POINT, "box": [[1, 2, 3, 4]] * 2}, "number of objects"),
        ({"mask_input": np.zeros((1, 8, 8))}, "mask_input"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.predict(**given)
    with pytest.raises(RuntimeError, match="set_image_batch"):
        predictor.predict_batch()
    with pytest.raises(ValueError, match="list of images"):
        predictor.set_image_batch([])
    predictor.set_image_batch([picture()])
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(**POINT)
    with pytest.raises(ValueError, match="1 images"):
        predictor.predict_batch([[[1, 2]]] * 2, [[1]] * 2)
    predictor.reset_predictor()
    for call in (predictor.predict, predictor.get_image_embedding):
        with pytest.raises(RuntimeError, match="No image"):
            call()


def test_loading(tmp_path, params):
    path = tmp_path / "small.safetensors"
    sam2jax.save(path, MODEL, params)
    with pytest.warns(UserWarning, match="device"):
        loaded = sam2jax.SAM2ImagePredictor.from_pretrained(
            path, device="cpu", mask_threshold=0.5, max_hole_area=3
        )
    assert loaded.mask_threshold == 0.5 and loaded.max_hole_area == 3
    built = sam2jax.build_sam2_hf(path, image_size=96)
    assert sam2jax.SAM2ImagePredictor(built).config.image_size == 96
    generator = sam2jax.SAM2AutomaticMaskGenerator.from_pretrained(path, points_per_side=4)
    assert [grid.shape for grid in generator.point_grids] == [(16, 2)]


def test_what_predictors_are_made_of(params):
    """A model and its parameters in one, or another predictor; official options in their places
    are refused, not passed over."""
    video = sam2jax.SAM2VideoPredictor(MODEL, params)
    for predictor in (
        sam2jax.SAM2ImagePredictor,
        sam2jax.SAM2AutomaticMaskGenerator,
        sam2jax.SAM2VideoPredictor,
        sam2jax.SAM2CameraPredictor,
    ):
        assert predictor(video).model is predictor((MODEL, params)).model is MODEL
        assert sam2jax.SAM2ImagePredictor(predictor(video)).model is MODEL
        for given, message in (
            (((MODEL, params), 0.5), "by their names"),
            ((MODEL,), "parameters, too"),
            (("sam2.1_hiera_tiny.pt",), "got str"),
        ):
            with pytest.raises(TypeError, match=message):
                predictor(*given)
    shared, own = sam2jax.SAM2ImagePredictor(video), sam2jax.SAM2ImagePredictor(MODEL, params)
    for each in (shared, own):
        each.set_image(picture())
    np.testing.assert_array_equal(shared.predict(**POINT)[2], own.predict(**POINT)[2])


# The automatic mask generator. Masks of random weights fill the image: only their peaks differ.
PEAKS = {
    "pred_iou_thresh": 0.4,
    "mask_threshold": 0.6,
    "stability_score_offset": 0.02,
    "stability_score_thresh": 0.5,
}


def test_records(params):
    generator = sam2jax.SAM2AutomaticMaskGenerator(MODEL, params, points_per_side=5, **PEAKS)
    image = picture()
    records = generator.generate(image)
    assert records
    for record in records:
        mask = record["segmentation"]
        assert mask.shape == SIZE and mask.dtype == bool and record["area"] == mask.sum()
        x, y, width, height = record["bbox"]
        rows, columns = np.nonzero(mask)
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max(), rows.max())
        assert record["predicted_iou"] > 0.4 and record["stability_score"] >= 0.5
        assert record["crop_box"] == [0, 0, 80, 48]
    for mode, counts in (("uncompressed_rle", list), ("coco_rle", str)):
        generator.output_mode = mode
        for record, plain in zip(generator.generate(image), records, strict=True):
            runs = record["segmentation"]
            assert isinstance(runs["counts"], counts)
            runs = coco.frPyObjects(runs, *SIZE) if counts is list else runs
            np.testing.assert_array_equal(np.array(coco.decode(runs)), plain["segmentation"])


@pytest.mark.parametrize("layers", [0, 1])
def test_specks_are_gone_from_records(params, monkeypatch, layers):
    options = {"points_per_side": 5, "crop_n_layers": layers, **PEAKS}
    expected = sam2jax.SAM2AutomaticMaskGenerator(MODEL, params, **options).generate(picture())
    draw = automatic._draw

    def speckled(*given):
        bits = np.array(draw(*given))
        bits[:, :2, :1] |= 0xC0  # four pixels in the corner
        return bits

    monkeypatch.setattr(automatic, "_draw", speckled)
    generator = sam2jax.SAM2AutomaticMaskGenerator(MODEL, params, **options)
    assert all(record["segmentation"][0, 0] for record in generator.generate(picture()))
    generator.min_mask_region_area = 10
    found = generator.generate(picture())
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one["segmentation"], other["segmentation"])
        assert (one["area"], one["bbox"]) == (other["area"], other["bbox"])


def test_programs_of_a_few_sizes_are_kept(monkeypatch):
    """The last ones; what is asked for again soon is not compiled again."""
    monkeypatch.setattr(sizes, "MOST_SIZES", 3)
    traced = []

    def total(x, *, times):
        traced.append(x.shape)
        return times * x.sum()

    program, client = sizes.jit_for_sizes(total), jax.devices()[0].client
    gc.collect()
    before = len(client.live_executables())
    for width in (5, 6, 5, 7, 6, 5, 8, 9, 10, 11, 12, 5):
        assert float(program(np.ones(width, np.float32), times=2)) == 2 * width
    gc.collect()
    assert len(client.live_executables()) - before <= 3
    assert [shape[0] for shape in traced] == [5, 6, 7, 8, 9, 10, 11, 12, 5]


def test_images_that_are_preprocessed_before(params):
    images = np.stack([picture(0), picture(1)])
    ready = sam2jax.preprocess_images(MODEL, images)
    size = MODEL.config.image_size
    assert ready.shape == (2, size, size, 3) and ready.dtype == np.float32
    one, other = (sam2jax.encode_image(MODEL, params, x).features for x in (ready, images))
    np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_array_equal(sam2jax.preprocess_images(MODEL, ready), ready)
    mean = np.full((1, 9, 7, 3), np.round(255 * np.array([0.485, 0.456, 0.406])), np.uint8)
    np.testing.assert_allclose(sam2jax.preprocess_images(MODEL, mean), 0, atol=0.01)
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\].* got shape \(48,"):
        sam2jax.preprocess_images(MODEL, np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="already normalised; got float32"):
        sam2jax.preprocess_images(MODEL, np.zeros((1, 48, 64, 3), np.float32))
    with pytest.raises(TypeError, match="got int32"):
        sam2jax.preprocess_images(MODEL, np.zeros((1, 48, 64, 3), np.int32))


def test_the_pure_function_finds_the_same(params):
    grid = point_grid(4).astype(np.float32)
    generator = sam2jax.SAM2AutomaticMaskGenerator(
        MODEL, params, points_per_side=4, points_per_batch=8, **PEAKS
    )
    images = np.stack([picture(0), picture(1)])
    features = sam2jax.encode_image(MODEL, params, images)

    def generate(features):
        return sam2jax.generate_masks(
            MODEL, params, features, grid, SIZE, max_masks=20, points_per_batch=8, **PEAKS
        )

    found = jax.vmap(generate)(features)
    for index, image in enumerate(images):
        records = generator.generate(image)
        count = int(found.valid[index].sum())
        assert count == len(records) > 0
        ious = [record["predicted_iou"] for record in records]
        np.testing.assert_allclose(found.ious[index, :count], ious, atol=1e-5)
        assert found.masks[index].shape == (20, 16, 16)
    with pytest.raises(ValueError, match="points_per_batch"):
        sam2jax.generate_masks(MODEL, params, features, grid, SIZE, points_per_batch=7)


def test_images_sharded_over_devices(params):
    """Encoded, prompted and searched for masks, each half of a batch on a device of its own."""
    mesh = jax.make_mesh((2,), ("images",), axis_types=(jax.sharding.AxisType.Auto,))
    over_images = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("images"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    images = np.stack([picture(seed) for seed in range(4)])
    grid = point_grid(2).astype(np.float32)
    prompts = sam2jax.Prompts.make(points=[[[30, 20]], [[50, 40]]])

    def answer(params, images):
        features = sam2jax.encode_image(MODEL, params, images)

        def one(features):
            masks = sam2jax.decode_masks(MODEL, params, features, prompts).masks
            found = sam2jax.generate_masks(
                MODEL, params, features, grid, SIZE, points_per_batch=4, max_masks=4, **PEAKS
            )
            return masks, found

        return jax.vmap(one)(features)

    expected = jax.jit(answer)(params, images)
    sharded = jax.jit(answer, out_shardings=over_images)(
        jax.device_put(params, everywhere), jax.device_put(images, over_images)
    )
    assert len(sharded[0].devices()) == 2
    assert sharded[0].addressable_shards[0].data.shape[0] == 2  # images on each
    assert expected[1].valid.any()
    for one, other in zip(jax.tree.leaves(sharded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_few_masks_are_held_as_logits(params, monkeypatch):
    """However many pass, few are held as logits; the records are the same."""
    options = {"points_per_side": 8, "points_per_batch": 8, "box_nms_thresh": 1.1, **PEAKS}
    generator = sam2jax.SAM2AutomaticMaskGenerator(MODEL, params, **options)
    expected = generator.generate(picture())
    most, held = 10, []
    process = generator._process_batch

    def counted(*given):
        found = process(*given)
        held.append(sum(isinstance(mask, np.ndarray) for mask in found.masks))
        return found

    draw, drawn = generator._drawn, []
    monkeypatch.setattr(automatic, "MOST_LOGITS", most)
    monkeypatch.setattr(generator, "_process_batch", counted)
    monkeypatch.setattr(generator, "_drawn", lambda *given: (drawn.append(1), draw(*given))[1])
    found = generator.generate(picture())
    assert sum(held) > 3 * most and len(drawn) > 3
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one["segmentation"], other["segmentation"])


def test_an_image_in_which_nothing_passes(params):
    options = {"points_per_side": 3, "pred_iou_thresh": 1.0, "crop_n_layers": 1}
    generator = sam2jax.SAM2AutomaticMaskGenerator(MODEL, params, **options)
    assert generator.generate(picture()) == []


def test_batches_are_no_larger_than_the_grid(params):
    generator = sam2jax.SAM2AutomaticMaskGenerator(
        MODEL, params, points_per_side=2, points_per_batch=2**40
    )
    assert generator.points_per_batch == 4


def test_refused_generators(params):
    for given, message in (
        ({"points_per_side": None}, "points_per_side or point_grids"),
        ({"point_grids": [np.zeros((1, 2))]}, "not both"),
        ({"points_per_side": None, "point_grids": [np.zeros((1, 3))]}, "point_grids"),
        (
            {"points_per_side": None, "point_grids": [np.zeros((1, 2))], "crop_n_layers": 1},
            "2 point_grids",
        ),
        ({"output_mode": "png"}, "output_mode"),
        ({"points_per_side": 0}, "at least 1"),
        ({"crop_n_layers": -1}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sam2jax.SAM2AutomaticMaskGenerator(MODEL, params, **given)


def test_crops():
    boxes = crop_boxes((600, 900), 2, 512 / 1500)
    assert [layer for _, layer in boxes] == [0] + [1] * 4 + [2] * 16
    assert boxes[0][0] == (0, 0, 900, 600) and boxes[4][0][2:] == (900, 600)
    assert all(0 <= x0 < x1 <= 900 and 0 <= y0 < y1 <= 600 for (x0, y0, x1, y1), _ in boxes)
    assert len(crop_boxes((3, 1), 1, 512 / 1500)) < 5  # none of no pixels
    found = np.array([[300, 100, 552, 200], [300, 100, 500, 200], [0, 0, 100, 100]])
    assert near_crop_edge(found, (0, 0, 552, 402), (600, 900)).tolist() == [True, False, False]


@pytest.mark.parametrize("hold", [np.asarray, compressed])
def test_small_regions_are_mended(hold):
    large = np.zeros((40, 42), bool)  # not whole bytes
    large[5:30, 5:30] = True
    mended = large.copy()
    mended[10:12, 10:12] = False  # a hole
    mended[35, 35] = True  # a speck
    small = np.zeros_like(large)
    small[2:4, 2:5] = True  # all there is
    boxes = np.array([[5, 5, 29, 29], [5, 5, 35, 35], [2, 2, 4, 3]], np.float32)
    given = [hold(np.packbits(mask, axis=1)) for mask in (large, mended, small)]
    masks, changed, rows = clean_masks(given, boxes, large.shape, 10, 0.7)
    np.testing.assert_array_equal(restored(masks[1], large.shape), large)
    assert changed[1].tolist() == [5, 5, 29, 29]
    assert rows.tolist() == [0, 2]  # the one that had to be mended is a duplicate now


def test_boxes_and_runs():
    rng = np.random.default_rng(0)
    masks = rng.uniform(size=(6, 9, 13)) > 0.8
    masks[0] = False
    boxes = np.asarray(mask_boxes(masks))
    assert boxes[0].tolist() == [0, 0, 0, 0]
    for mask, box in zip(masks[1:], boxes[1:], strict=True):
        rows, columns = np.nonzero(mask)
        assert box.tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]
        assert encode_coco(mask) == {
            **coco.frPyObjects(encode_runs(mask), 9, 13),
            "counts": coco.frPyObjects(encode_runs(mask), 9, 13)["counts"].decode(),
        }
    corners = jnp.array([[0, 0, 10, 10], [1, 0, 10, 10], [20, 0, 30, 10], [0, 1, 10, 10]])
    valid = jnp.array([True, True, True, False])
    kept = non_maximum_suppression(corners, jnp.array([0.5, 0.9, 0.1, 1.0]), valid, 0.7)
    assert kept.tolist() == [False, True, True, False]
