"""Speed on images beside the official package: same weights, same picture, in turn.

python -m benchmarks.images PICTURE [--variant NAME] [--image-size N] [--runs N] [--side N]

Encoding, one point, 64 points, and automatic masks. Weights are random and draw masks over the
whole picture, so automatic masks are thresholded where their peaks are: at `--threshold`, with
stability thresholds under which the printed numbers of masks survive on both sides. Answers are
compared before a time is believed. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import sam2jax
from benchmarks.timing import HEADER, Comparison, compare, save
from sam2jax.config import VARIANTS, SAM2Config
from sam2jax.io.images import read_image
from sam2jax.nn.sam2 import SAM2
from sam2jax.testing import random_params
from tests import oracle
from tests.parity.pairs import LOGITS, assert_close

SEED = 3  # of the weights


def points(count: int, image: np.ndarray) -> dict[str, np.ndarray]:
    """Prompts of `count` objects, a point each."""
    size = np.array([image.shape[1], image.shape[0]], np.float32)
    coords = np.random.default_rng(0).uniform(0.1, 0.9, (count, 1, 2)).astype(np.float32)
    return {"point_coords": coords * size, "point_labels": np.ones((count, 1), np.int32)}


def rows(config: SAM2Config, image: np.ndarray, given: Any) -> Iterator[Comparison]:
    official = oracle.build(config, SEED)
    model, params = SAM2(config), random_params(config, SEED)
    theirs = oracle.image_predictor(official)
    ours = sam2jax.SAM2ImagePredictor(model, params)

    def embed() -> None:
        ours.set_image(image)
        ours.get_image_embedding()  # waits

    with torch.inference_mode():
        yield compare("encode", lambda: theirs.set_image(image), embed, given.runs)
        for count in (1, 64):
            prompts = points(count, image)
            answers = [p.predict(**prompts, return_logits=True)[2] for p in (theirs, ours)]
            assert_close(answers[1], answers[0], LOGITS, f"{count} points")
            yield compare(
                f"points: {count}",
                lambda prompts=prompts: theirs.predict(**prompts),
                lambda prompts=prompts: ours.predict(**prompts),
                given.runs,
            )
        yield automatic(official, model, params, image, given)


def automatic(official: Any, model: SAM2, params: Any, image: np.ndarray, given: Any) -> Comparison:
    """Timed once: it takes minutes."""
    options = {
        "points_per_side": given.side,
        "pred_iou_thresh": given.iou,
        "mask_threshold": given.threshold,
        "stability_score_offset": 0.02,
        "stability_score_thresh": given.stability,
        "box_nms_thresh": given.nms,
    }
    theirs = oracle.mask_generator(official, **options)
    ours = sam2jax.SAM2AutomaticMaskGenerator(model, params, **options)
    # Compiles everything, and is not timed.
    few = {**options, "points_per_side": 8}
    sam2jax.SAM2AutomaticMaskGenerator(model, params, **few).generate(image)
    seconds, found = [], []
    for side in (theirs, ours):
        start = time.perf_counter()
        found.append(len(side.generate(image)))
        seconds.append(time.perf_counter() - start)
    print(f"automatic masks: {found[0]} official, {found[1]} ours")
    if abs(found[0] - found[1]) > 0.02 * found[0]:
        raise AssertionError("the numbers of masks differ")
    return Comparison("automatic", seconds[0], seconds[1], seconds[0] / seconds[1], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture")
    parser.add_argument("--variant", default="sam2.1_hiera_tiny", choices=VARIANTS)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs per row")
    parser.add_argument("--side", type=int, default=32, help="points per side")
    parser.add_argument("--iou", type=float, default=0.5)
    parser.add_argument("--threshold", type=float, default=1.6)
    parser.add_argument("--stability", type=float, default=0.5)
    parser.add_argument("--nms", type=float, default=0.95, help="random masks are much alike")
    given = parser.parse_args()
    config = dataclasses.replace(VARIANTS[given.variant], image_size=given.image_size)
    print(f"{given.variant}, {given.image_size} px\n{HEADER}", flush=True)
    measured = []
    for row in rows(config, read_image(given.picture), given):
        measured.append(row)
        print(row, flush=True)
    settings = {name: value for name, value in vars(given).items() if name != "picture"}
    print("written to", save(f"images-{given.variant}-{given.image_size}", settings, measured))


if __name__ == "__main__":
    main()
