"""Images: encoding, one point, 64 points, and automatic masks.

The weights draw masks over the whole picture, so automatic masks are cut where their peaks are,
with stability and overlap thresholds under which 100 to 300 of them survive on both sides.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

import sam2jax
from benchmarks.checks import believe, believed
from benchmarks.settings import SEED, Settings
from benchmarks.timing import Row, compare, seconds
from sam2jax.config import SAM2Config
from sam2jax.io.images import read_image
from sam2jax.nn.sam2 import SAM2
from sam2jax.testing import random_params

AUTOMATIC = {
    "pred_iou_thresh": 0.5,
    "mask_threshold": 2.0,
    "stability_score_offset": 0.02,
    "stability_score_thresh": 0.5,
    "box_nms_thresh": 0.95,  # these masks are much alike
}
WARM_SIDE = 8  # points per side of the run that compiles


def points(count: int, image: np.ndarray) -> dict[str, np.ndarray]:
    """Prompts of `count` objects, a point each."""
    size = np.array([image.shape[1], image.shape[0]], np.float32)
    coords = np.random.default_rng(0).uniform(0.1, 0.9, (count, 1, 2)).astype(np.float32)
    return {"point_coords": coords * size, "point_labels": np.ones((count, 1), np.int32)}


def picture(settings: Settings) -> np.ndarray:
    if settings.picture:
        return np.array(read_image(settings.picture))  # writable, as PyTorch likes it
    from sam2jax.training.data.config import HELD_OUT
    from sam2jax.training.data.procedural import procedural_clip

    size = settings.first.image_size
    return procedural_clip(HELD_OUT.scene, 0, image_size=size, num_frames=1).frames[0]


def rows(settings: Settings) -> Iterator[Row]:
    config, image = settings.first, picture(settings)
    model, params = SAM2(config), random_params(config, SEED)
    ours = sam2jax.SAM2ImagePredictor(model, params)
    theirs = Official(config, settings.compiled) if settings.official else None
    exact = None
    if theirs and config.dtype != "float32":
        exact = Official(settings.exact, compiled=None)
        exact.set_image(image)

    def embed() -> None:
        ours.set_image(image)
        ours.get_image_embedding()  # waits

    official = theirs and functools.partial(theirs.set_image, image)
    yield compare("encode a picture", official, embed, settings.runs)
    for count in (1, 64):
        given = points(count, image)
        name = f"{count} points"
        official = theirs and functools.partial(theirs.predict, **given)
        if theirs:
            answers = [
                side and side.predict(**given, return_logits=True)[2]
                for side in (ours, theirs, exact)
            ]
        row = compare(name, official, functools.partial(ours.predict, **given), settings.runs)
        yield believed(row, functools.partial(believe, name, *answers)) if theirs else row
    yield automatic(theirs, model, params, image, settings.side)


class Official:
    """The official image predictor and mask generator."""

    def __init__(self, config: SAM2Config, compiled: str | None) -> None:
        from benchmarks import official
        from tests import oracle

        self.model = official.build(config, compiled)
        self.runner = functools.partial(official.runner, config)
        self.predictor = oracle.image_predictor(self.model)
        self.generator = functools.partial(oracle.mask_generator, self.model)

    def set_image(self, image: np.ndarray) -> None:
        self.runner(lambda: self.predictor.set_image(image))()

    def predict(self, **given: Any) -> Any:
        return self.runner(lambda: self.predictor.predict(**given))()

    def generate(self, image: np.ndarray, **options: Any) -> list[dict[str, Any]]:
        return self.runner(lambda: self.generator(**options).generate(image))()


def automatic(
    theirs: Official | None, model: SAM2, params: Any, image: np.ndarray, side: int
) -> Row:
    """Timed once: it takes minutes."""

    def ours(side: int) -> list[dict[str, Any]]:
        options = AUTOMATIC | {"points_per_side": side}
        return sam2jax.SAM2AutomaticMaskGenerator(model, params, **options).generate(image)

    ours(WARM_SIDE)
    found: list[int] = []
    mine = seconds(lambda: found.append(len(ours(side))))
    if theirs is None:
        return Row(f"automatic masks ({found[0]})", None, mine)
    theirs.generate(image, **AUTOMATIC, points_per_side=WARM_SIDE)
    official = seconds(
        lambda: found.append(len(theirs.generate(image, **AUTOMATIC, points_per_side=side)))
    )
    # In bfloat16 the stability of a mask is within rounding of its threshold.
    if model.config.dtype == "float32" and abs(found[0] - found[1]) > max(0.02 * found[1], 1):
        why = f"{found[1]} official ones, {found[0]} of ours"
        return Row("automatic masks", None, None, refused=why)
    name = f"automatic masks ({found[1]} and {found[0]})"
    return Row(name, official, mine, official / mine)
