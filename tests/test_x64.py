"""With JAX's 64-bit types switched on, everything computes in the 32 bits of the model."""

import jax
import numpy as np
import pytest

import sam2jax
from sam2jax.memory import POLICIES
from sam2jax.testing import random_params, small_config
from tests.test_tracking import FIRST, clip

MODEL = sam2jax.SAM2(small_config(image_size=64))
CLICK = {"points": [[20, 30]], "labels": [1]}


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL.config, 1)


def assert_same_wide(run):
    """What `run` returns, to the dtype, with 64 bits and without."""
    expected = run()
    with jax.enable_x64(True):
        found = run()

    def alike(one, other):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=1e-4)

    jax.tree.map(alike, found, expected)


@pytest.mark.parametrize(
    "policy",
    [name if name == "sam2" else pytest.param(name, marks=pytest.mark.slow) for name in POLICIES],
)
def test_tracking(params, policy):
    frames = clip(4)
    assert_same_wide(
        lambda: sam2jax.track(MODEL, params, frames, {0: FIRST}, policy=POLICIES[policy]())
    )


@pytest.mark.slow
def test_gradients(params):
    frames = clip(2)

    def loss(params):
        masks = sam2jax.track(MODEL, params, frames, {0: FIRST})[1].masks
        return (masks**2).mean()

    assert_same_wide(lambda: jax.grad(loss)(params)["memory_encoder"])


def test_videos(params):
    def run():
        predictor = sam2jax.SAM2VideoPredictor(MODEL, params)
        state = predictor.init_state(clip(4))
        predictor.add_new_points_or_box(state, 0, 1, **CLICK)
        return [masks for _, _, masks in predictor.propagate_in_video(state)]

    assert_same_wide(run)


def test_pictures(params):
    picture = clip(1)[0]

    def run():
        predictor = sam2jax.SAM2ImagePredictor(MODEL, params)
        predictor.set_image(picture)
        return predictor.predict(CLICK["points"], CLICK["labels"], return_logits=True)

    assert_same_wide(run)


def test_automatic_masks(params):
    options = {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}

    def run():
        generator = sam2jax.SAM2AutomaticMaskGenerator(MODEL, params, **options)
        return generator.generate(clip(1)[0])

    assert_same_wide(run)


def test_parameters():
    assert_same_wide(lambda: sam2jax.load("sam2.1_hiera_nano")[1])
