"""The model that ships, in the official package: what it has learnt makes local masks, where random
weights make none."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

import sam2jax
from sam2jax.config import NANO
from sam2jax.evaluation.metrics import region_similarity
from sam2jax.training.data.clip import Clip, middle
from sam2jax.training.data.config import HARD, SceneConfig
from sam2jax.training.data.procedural import procedural_clip
from tests import oracle
from tests.parity.clips import REAL
from tests.parity.pairs import Pair, shipped
from tests.parity.sessions import Both
from tests.parity.test_images import agree, same_records

pytestmark = [pytest.mark.parity, pytest.mark.optimised]

SIZE = NANO.image_size
LENGTH = 16
# Memories are held in bfloat16: frames that differ by a millionth move the official answers, of
# size 50, by up to 0.12.
BARS = dataclasses.replace(REAL, clip=0.12)
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def nano() -> Pair:
    return shipped()


@pytest.fixture(scope="module", params=["plain", HARD])
def clip(request) -> Clip:
    scene = SceneConfig(kinds=(request.param,))
    return procedural_clip(scene, 3, image_size=SIZE, num_frames=LENGTH)


def preprocessed(frames: np.ndarray) -> np.ndarray:
    return (frames.astype(np.float32) / 255 - MEAN) / STD


def prompt_decidedly(both: Both, frame: int, obj: str, prompt: Callable[[int], None]) -> None:
    """Prompts a pixel further, where rounding decides about a pixel of the answer: memories are
    encoded from signs. `prompt` is given by how many pixels."""
    for shift in range(4):
        prompt(shift)
        if not both.is_undecided(frame, obj):
            return
    raise AssertionError(f"{obj}, frame {frame}: no answer is decided")


def click_decidedly(both: Both, frame: int, obj: str, at: tuple, *others: tuple) -> None:
    x, y = at
    prompt_decidedly(both, frame, obj, lambda by: both.click(frame, obj, (x + by, y, 1), *others))


def test_tracking_and_corrections(nano: Pair, clip: Clip):
    """From clicks, a box and a mask; then a correction of each on a frame that was tracked."""
    both = Both(nano, preprocessed(clip.frames), BARS, size=(SIZE, SIZE))
    clicked, boxed, masked = clip.masks[0]
    click_decidedly(both, 0, "clicked", middle(clicked))
    rows, columns = np.nonzero(boxed)
    left, top, right, low = columns.min(), rows.min(), columns.max(), rows.max()
    prompt_decidedly(
        both, 0, "boxed", lambda by: both.box(0, "boxed", (left, top, right + by, low))
    )
    both.mask(0, "masked", masked)
    both.propagate()
    for obj, truth in zip(("clicked", "boxed", "masked"), clip.masks[8], strict=True):
        if truth.any():
            outside = (*middle(~clip.masks[8].any(0)), 0)
            click_decidedly(both, 8, obj, middle(truth), outside)
    both.propagate(4)
    click_decidedly(both, 2, "late", middle(clip.masks[2].any(0)))
    both.propagate(LENGTH - 1, reverse=True)
    assert both.compared >= 3 + 2 + 3 * LENGTH - 4

    prompts = sam2jax.Prompts.make(masks=[mask for mask in clip.masks[0]])
    _, out = sam2jax.track(nano.model, nano.params, clip.frames, prompts)
    found = np.asarray(sam2jax.resize_masks(out.masks, (SIZE, SIZE)) > 0)
    ious = [region_similarity(*pair) for pair in zip(clip.masks[1], found[1], strict=True)]
    assert np.mean(ious) > 0.3, "the masks that were compared are nobody's objects"


def test_images(nano: Pair, clip: Clip):
    image = clip.frames[0]
    ours = sam2jax.SAM2ImagePredictor(nano.model, nano.params)
    theirs = oracle.image_predictor(nano.official, image)
    ours.set_image(image)
    ious = []
    for truth in clip.masks[0]:
        rows, columns = np.nonzero(truth)
        corners = [columns.min(), rows.min(), columns.max(), rows.max()]
        point = {"point_coords": np.float32([middle(truth)]), "point_labels": np.ones(1)}
        for what, given in {
            "point": point,
            "box": {"box": np.float32(corners), "multimask_output": False},
            "corrected": {
                "point_coords": np.float32([middle(truth), middle(~truth)]),
                "point_labels": np.array([1, 0]),
                "mask_input": theirs.predict(**point)[2][:1],
                "multimask_output": False,
            },
        }.items():
            answer = ours.predict(return_logits=True, **given)
            agree(answer, theirs.predict(return_logits=True, **given), what)
        ious.append(max(region_similarity(truth, mask > 0) for mask in ours.predict(**point)[0]))
    assert np.mean(ious) > 0.3


@pytest.mark.parametrize("options", [{}, {"crop_n_layers": 1, "use_m2m": True}])
def test_automatic_masks(nano: Pair, clip: Clip, options: dict):
    options = {
        "points_per_side": 16,
        "pred_iou_thresh": 0.3,
        "stability_score_thresh": 0.5,
        **options,
    }
    theirs = oracle.mask_generator(nano.official, **options).generate(clip.frames[0])
    ours = sam2jax.SAM2AutomaticMaskGenerator(nano.model, nano.params, **options)
    assert len(theirs) >= 3
    same_records(ours.generate(clip.frames[0]), theirs)
