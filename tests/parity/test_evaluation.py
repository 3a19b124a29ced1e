"""Masks as the official `tools/vos_inference.py` finds them, scores as vos-benchmark gives them."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import sam2jax
from sam2jax.config import NO_POSTPROCESSING
from sam2jax.evaluation.scoring import score_folders
from sam2jax.evaluation.vos import VOSOptions, segment_video
from sam2jax.io.images import read_labels
from sam2jax.io.masks import ObjectWriter, PaletteWriter
from sam2jax.testing import small_config
from tests.parity.clips import SIZE, ellipse
from tests.parity.pairs import iou, pair

pytestmark = pytest.mark.parity

LENGTH = 8  # of the clip, in frames
EDGE = 2e-5  # logits this near to the threshold, or to another object's, may fall to either side


# Tracking ----------------------------------------------------------------------------------------


def shapes(*objects: int) -> np.ndarray:
    """An ellipse for each object: bool [N, H, W]."""
    whole = ellipse(*SIZE)
    return np.stack([np.roll(whole, (40 * obj - 60, 150 * obj - 300), (0, 1)) for obj in objects])


# By frame, the objects whose masks are given; and the options.
CASES: dict[str, tuple[dict[int, tuple[int, ...]], VOSOptions]] = {
    "the first frame": ({0: (1, 2, 4), 5: (1, 2)}, VOSOptions()),
    "all masks": ({0: (1, 2), 3: (2,), 6: (1,)}, VOSOptions(use_all_masks=True)),
    "a threshold": ({0: (1, 2)}, VOSOptions(score_threshold=0.05)),
    "later": (
        {0: (2,), 3: (1, 2), 4: (1, 4)},
        VOSOptions(objects_appear_later=True),
    ),
    "later, all masks": (
        {1: (2,), 3: (1, 2), 4: (1, 4), 6: (2,)},
        VOSOptions(objects_appear_later=True, use_all_masks=True),
    ),
    "a folder for each": ({0: (1, 2, 4)}, VOSOptions(per_object_png=True)),
    "a folder for each, later": (
        {0: (2,), 4: (1,)},
        VOSOptions(per_object_png=True, objects_appear_later=True),
    ),
}


def official_scores(
    model: Any,
    video: pathlib.Path,
    given: dict[int, dict[int, np.ndarray]],
    options: VOSOptions,
) -> dict[int, np.ndarray]:
    """What the tool's calls to the official predictor give: [T, H, W] logits by object.

    `given` has the masks by frame and object. Without `objects_appear_later` all objects share a
    session; with it each has its own, and scores are put together afterwards.
    """
    objects = sorted({obj for masks in given.values() for obj in masks})
    state = model.init_state(str(video))
    scores = np.full((len(objects), LENGTH, *SIZE), -1024, np.float32)
    sessions = [[obj] for obj in objects] if options.objects_appear_later else [objects]
    for session in sessions:
        model.reset_state(state)
        own = {f: {o: m for o, m in masks.items() if o in session} for f, masks in given.items()}
        prompted = [frame for frame in sorted(own) if own[frame]]
        for frame in prompted if options.use_all_masks else prompted[:1]:
            for obj, mask in own[frame].items():
                model.add_new_mask(state, frame, obj, mask)
        for frame, ids, logits in model.propagate_in_video(state, start_frame_idx=prompted[0]):
            for obj, found in zip(ids, logits, strict=True):
                scores[objects.index(obj), frame] = found[0]
    return dict(zip(objects, scores, strict=True))


def official_masks(
    model: Any, scores: dict[int, np.ndarray], options: VOSOptions
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """What the tool writes: [T, H, W] bool by object; and which pixels rounding cannot turn."""
    stacked = np.stack(list(scores.values()))
    decided = (np.abs(stacked - options.score_threshold) > EDGE).all(axis=0)
    if not options.per_object_png:
        second, best = np.sort(stacked, axis=0)[-2:]
        decided &= (best - second > 2 * EDGE) | (best < options.score_threshold)
        stacked = model._apply_non_overlapping_constraints(torch.from_numpy(stacked)).numpy()
    return dict(zip(scores, stacked > options.score_threshold, strict=True)), decided


@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_of_the_official_tool(media, tmp_path, case: str):
    frames, options = CASES[case]
    both = pair(small_config(**NO_POSTPROCESSING), seed=4)
    video = tmp_path / "video"
    video.mkdir()
    for index in range(LENGTH):
        shutil.copy(media / "bedroom" / f"{index:05d}.jpg", video)
    given = {}
    with (ObjectWriter if options.per_object_png else PaletteWriter)(tmp_path / "in") as writer:
        for frame, objects in frames.items():
            masks = shapes(*objects)
            writer.write(frame, f"{frame:05d}", objects, masks)
            if not options.per_object_png:  # the picture shows what lies on top
                masks = masks & (np.cumsum(masks, axis=0) == 1)
            given[frame] = dict(zip(objects, masks, strict=True))

    predictor = sam2jax.SAM2VideoPredictor(both.model, both.params)
    segment_video(predictor, video, tmp_path / "in", tmp_path / "out", options)
    scores = official_scores(both.official, video, given, options)
    theirs, decided = official_masks(both.official, scores, options)
    assert decided.mean() > 0.75
    shown = 0
    for obj, masks in theirs.items():
        for index, mask in enumerate(masks):
            ours = written(tmp_path / "out", f"{index:05d}.png", obj, options)
            assert iou(ours, mask) > 0.99, f"object {obj}, frame {index}"
            sure = decided[index]
            assert np.array_equal(ours[sure], mask[sure]), f"object {obj}, frame {index}"
            shown += bool(mask.any())
    assert shown >= 1.5 * LENGTH


def written(out: pathlib.Path, name: str, obj: int, options: VOSOptions) -> np.ndarray:
    if options.per_object_png:
        return read_labels(out / f"{obj:03d}" / name)[0] > 0
    return read_labels(out / name)[0] == obj


# Scores ------------------------------------------------------------------------------------------

OFFICIAL = """
import json, sys
from vos_benchmark.benchmark import benchmark
truth, found, skip = [sys.argv[1]], [sys.argv[2]], sys.argv[3] == "1"
answers = benchmark(truth, found, True, 2, verbose=False, skip_first_and_last=skip)
print(json.dumps([answer[0] for answer in answers]))
"""


def benchmark(truth: pathlib.Path, found: pathlib.Path, skip: bool) -> list:
    """J&F, J and F of the set, and J and F by video and object. It forks, hence a process."""
    arguments = [str(truth), str(found), str(int(skip))]
    done = subprocess.run(
        [sys.executable, "-c", OFFICIAL, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def wander(seed: int, shape: tuple[int, int], length: int) -> tuple[list, list]:
    """Label pictures of ellipses that wander, overlap, leave and come back; and a worse copy."""
    generator = np.random.default_rng(seed)
    y, x = np.indices(shape)
    truth, found = [], []
    for t in range(length):
        pictures = []
        for blur in (0.0, 4.0):
            labels = np.zeros(shape, np.uint8)
            for obj in (1, 2, 7):
                shift = generator.normal(0, blur, 4) if blur else np.zeros(4)
                top, left = 30 + 9 * obj + 3 * t + shift[0], 12 * obj + 9 * t + shift[1]
                inside = ((y - top) / (15 + shift[2])) ** 2 + (
                    (x - left) / (25 + shift[3])
                ) ** 2 < 1
                if (t + obj + seed) % 4:
                    labels[inside] = obj
            pictures.append(labels)
        truth.append(pictures[0])
        found.append(np.where(pictures[1] == 2, 2 + 3 * (t == 2), pictures[1]).astype(np.uint8))
    return truth, found


def write(folder: pathlib.Path, pictures: list[np.ndarray], objects: list[int]) -> None:
    with PaletteWriter(folder) as writer:
        for index, labels in enumerate(pictures):
            writer.write(index, f"{index:05d}", objects, np.stack([labels == o for o in objects]))


@pytest.mark.parametrize("skip", [True, False])
def test_scores_are_those_of_vos_benchmark(tmp_path, skip):
    pytest.importorskip("vos_benchmark")
    truth, found = tmp_path / "truth", tmp_path / "found"
    for folder in (truth, found):
        folder.mkdir()
    for seed, shape in enumerate([(120, 213), (121, 160), (240, 131)]):
        true, predicted = wander(seed, shape, 8)
        write(truth / f"video{seed}", true, [1, 2, 7])
        write(found / f"video{seed}", predicted, [1, 2, 5, 7])
    results = score_folders(truth, found, keep_first_and_last=not skip)
    jf, j, f, videos = benchmark(truth, found, skip)
    np.testing.assert_allclose(
        [results.overall.jf, *results.overall], [jf, j, f], rtol=0, atol=1e-9
    )
    assert len(results.objects) == 3 and 20 < results.overall.f < 95
    for video, (js, fs) in videos.items():
        ours = {int(obj): score for obj, score in results.objects[video].items()}
        assert set(ours) == {int(obj) for obj in js} and len(ours) == 3
        for obj, score in ours.items():
            np.testing.assert_allclose(score, [js[str(obj)], fs[str(obj)]], rtol=0, atol=1e-9)


def test_scores_of_a_folder_for_each_object(tmp_path):
    """vos-benchmark reads such a video if its objects are taken for videos."""
    pytest.importorskip("vos_benchmark")
    true, predicted = wander(5, (120, 213), 8)
    for root, pictures in (("truth", true), ("found", predicted)):
        (tmp_path / root).mkdir()
        with ObjectWriter(tmp_path / root / "video") as writer:
            for index, labels in enumerate(pictures):
                masks = np.stack([labels == obj for obj in (1, 2, 7)])
                writer.write(index, f"{index:05d}", [1, 2, 7], masks)
    results = score_folders(tmp_path / "truth", tmp_path / "found").objects["video"]
    _, _, _, objects = benchmark(tmp_path / "truth/video", tmp_path / "found/video", True)
    assert set(results) == set(objects) == {"001", "002", "007"}
    for name, (j, f) in objects.items():
        np.testing.assert_allclose(results[name], [j["1"], f["1"]], rtol=0, atol=1e-9)
