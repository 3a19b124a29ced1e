"""`sam2jax eval`: the scores J and F, the benchmarks' folders, and what is tracked in them."""

import csv
import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

import sam2jax
from sam2jax.config import NO_POSTPROCESSING
from sam2jax.evaluation import layouts, vos
from sam2jax.evaluation.metrics import (
    boundary,
    boundary_measure,
    region_similarity,
    score_frames,
)
from sam2jax.evaluation.scoring import score_folders
from sam2jax.evaluation.vos import VOSOptions, segment_video, segment_videos, unfinished
from sam2jax.io.images import read_labels
from sam2jax.io.masks import ObjectWriter, PaletteWriter, davis_palette
from sam2jax.memory import SAM2, samurai
from sam2jax.predictors import session
from sam2jax.testing import random_params, small_config
from tests.conftest import ROOT
from tests.test_cli import CONFIG, commands_in_an_empty_folder, refused, write_checkpoint

SIZE = (48, 80)
LENGTH = 5


# J and F -----------------------------------------------------------------------------------------


def test_official_scores():
    with np.load(ROOT / "tests/goldens/golden_jf.npz") as golden:
        pairs = list(zip(golden["gt"], golden["pred"], strict=True))
        ((j, f),) = score_frames(pairs).values()
        np.testing.assert_allclose([100 * j], golden["J"], rtol=0, atol=1e-6)
        np.testing.assert_allclose([100 * f], golden["F"], rtol=0, atol=1e-6)
    assert len(pairs) == 16


def blobs(seed: int, shape: tuple[int, int], scale: int = 4) -> np.ndarray:
    """Random regions a few pixels wide: bool [H, W]."""
    coarse = np.random.default_rng(seed).random([-(-n // scale) for n in shape]) > 0.6
    return np.kron(coarse, np.ones((scale, scale), bool))[: shape[0], : shape[1]]


def brute_boundary(mask: np.ndarray) -> np.ndarray:
    """The definition, pixel by pixel; the last row and column look along themselves only."""
    height, width = mask.shape
    out = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            steps = [(0, 1), (1, 0), (1, 1)]
            if y == height - 1:
                steps = [(0, 1)]
            if x == width - 1:
                steps = [(1, 0)] if y < height - 1 else []
            out[y, x] = any(mask[y, x] != mask[y + dy, x + dx] for dy, dx in steps)
    return out


def brute_dilation(mask: np.ndarray, radius: int) -> np.ndarray:
    out = np.zeros_like(mask)
    grid = np.indices(mask.shape)
    for y, x in np.argwhere(mask):
        out |= (grid[0] - y) ** 2 + (grid[1] - x) ** 2 <= radius**2
    return out


@pytest.mark.parametrize(
    ("shape", "tolerance"),
    [((37, 53), 0.008), ((40, 40), 0.05), ((30, 60), 0.1), ((1, 20), 0.1), ((20, 1), 0.2)],
)
def test_boundary_measure_is_that_of_dilated_boundaries(shape, tolerance):
    radius = int(np.ceil(tolerance * np.hypot(*shape)))
    for seed in range(6):
        truth, mask = blobs(seed, shape), blobs(seed + 100, shape, scale=3)
        edges = [brute_boundary(m) for m in (truth, mask)]
        np.testing.assert_array_equal(boundary(truth), edges[0])
        precision = (edges[1] & brute_dilation(edges[0], radius)).sum() / max(edges[1].sum(), 1)
        recall = (edges[0] & brute_dilation(edges[1], radius)).sum() / max(edges[0].sum(), 1)
        expected = 2 * precision * recall / max(precision + recall, 1e-9)
        assert boundary_measure(truth, mask, tolerance) == pytest.approx(expected, abs=1e-9)


def test_empty_masks():
    nothing, everything, some = np.zeros(SIZE, bool), np.ones(SIZE, bool), blobs(0, SIZE)
    far = np.zeros(SIZE, bool)
    far[0, 0] = True
    near = np.roll(far, 40, axis=1)
    assert region_similarity(nothing, nothing) == 1 and boundary_measure(nothing, nothing) == 1
    assert region_similarity(nothing, some) == 0 and boundary_measure(nothing, some) == 0
    assert region_similarity(some, nothing) == 0 and boundary_measure(some, nothing) == 0
    # A mask that fills the picture has no boundary.
    assert region_similarity(everything, nothing) == 0 == 1 - boundary_measure(everything, nothing)
    assert region_similarity(some, some) == 1 and boundary_measure(some, some) == 1
    assert region_similarity(far, near) == 0 and boundary_measure(far, near) == 0


def test_which_frames_and_objects_count():
    frame = np.zeros((8, 8), np.uint8)
    one, two = frame.copy(), frame.copy()
    one[2:5, 2:5], two[2:5, 2:5] = 1, 2
    both = one.copy()
    both[6:, 6:] = 2
    # 1 counts from its second frame on; 2 is predicted on the third and true on the last alone.
    pairs = [(frame, frame), (one, one), (one, both), (frame, frame), (both, both)]
    scores = score_frames(pairs)
    assert scores == {1: (1, 1), 2: (pytest.approx(2 / 3), pytest.approx(2 / 3))}
    assert score_frames([(one, two)]) == {1: (0, 0)}  # 2 is in no truth
    assert score_frames([(frame, one)]) == {}


# Folders -----------------------------------------------------------------------------------------


def save_labels(path: pathlib.Path, labels: np.ndarray, palette: bytes | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(labels.astype(np.uint8))
    if palette is not None:
        picture.putpalette(palette)
    picture.save(path)


def write_frames(folder: pathlib.Path, length: int = LENGTH, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for t in range(length):
        frame = generator.integers(0, 90, (*SIZE, 3), np.uint8)
        frame[10 + t : 26 + t, 20 + 2 * t : 40 + 2 * t] += 150
        Image.fromarray(frame).save(folder / f"{t:05d}.jpg", quality=95)


def boxes(*objects: int) -> np.ndarray:
    """A label picture with a box for each object."""
    labels = np.zeros(SIZE, np.uint8)
    for obj in objects:
        labels[6 * obj : 6 * obj + 14, 8 * obj : 8 * obj + 20] = obj
    return labels


GREY = bytes(np.repeat(np.arange(256, dtype=np.uint8), 3))


def write_davis(root: pathlib.Path, names: tuple[str, ...] = ("bear", "camel")) -> None:
    """Videos with true masks on every frame: objects 1 and 3 on the first."""
    for seed, name in enumerate(names):
        write_frames(root / "videos" / name, seed=seed)
        for t in range(LENGTH):
            save_labels(root / "masks" / name / f"{t:05d}.png", boxes(1, 3), GREY)


def pictures(folder: pathlib.Path) -> np.ndarray:
    return np.stack([read_labels(path)[0] for path in sorted(folder.glob("*.png"))])


def test_palettes_and_layouts_of_masks(tmp_path):
    masks = np.array([boxes(1) > 0, boxes(1, 2) > 0])
    with PaletteWriter(tmp_path / "together", bytes(range(9))) as writer:
        writer.write(0, "a", [5, 2], masks)
    labels, palette = read_labels(tmp_path / "together" / "a.png")
    np.testing.assert_array_equal(labels, np.where(masks[1], 2, 0))  # the lower id wins
    assert palette == bytes(range(9)) + davis_palette()[9:]
    with ObjectWriter(tmp_path / "apart") as writer:
        writer.write(0, "a", [0, 12], masks)
    for folder, mask in zip(("000", "012"), masks, strict=True):
        labels, palette = read_labels(tmp_path / "apart" / folder / "a.png")
        np.testing.assert_array_equal(labels, mask)
        assert palette == davis_palette()
    assert sorted(os.listdir(tmp_path / "apart")) == ["000", "012"]


def inputs(folder: pathlib.Path, later: bool = False, every: bool = False) -> dict[int, list[int]]:
    frames = [f"{t:05d}" for t in range(4)]
    masks = layouts.open_masks(folder)
    return layouts.find_inputs(
        masks, frames, objects_appear_later=later, use_all_masks=every
    ).frames


def test_masks_to_start_from_in_one_picture(tmp_path):
    for t, labels in {0: boxes(1, 3), 2: boxes(3), 3: boxes(1)}.items():
        save_labels(tmp_path / f"{t:05d}.png", labels)
    assert inputs(tmp_path) == inputs(tmp_path, later=True) == {1: [0], 3: [0]}
    assert inputs(tmp_path, every=True) == inputs(tmp_path, True, True) == {1: [0, 3], 3: [0, 2]}
    save_labels(tmp_path / "00002.png", boxes(2, 3))
    assert inputs(tmp_path) == {1: [0], 3: [0]}
    assert inputs(tmp_path, later=True) == {1: [0], 3: [0], 2: [2]}
    with pytest.raises(ValueError, match="object 2 has no mask for frame 00000; .*appear_later"):
        inputs(tmp_path, every=True)
    (tmp_path / "00000.png").unlink()
    with pytest.raises(ValueError, match="no object on frame 00000; .*objects_appear_later"):
        inputs(tmp_path)
    assert inputs(tmp_path, later=True) == {2: [2], 3: [2], 1: [3]}
    for t in (2, 3):
        (tmp_path / f"{t:05d}.png").rename(tmp_path / f"{t}.png")
    with pytest.raises(ValueError, match="no object on frames 00000 to 00003"):
        inputs(tmp_path, later=True)


def test_masks_to_start_from_in_a_picture_for_each_object(tmp_path):
    for name, obj, empty in (("000/00000", 1, 0), ("000/00002", 1, 0), ("007/00000", 2, 1)):
        save_labels(tmp_path / f"{name}.png", 255 * (boxes(obj) > 0) * (1 - empty))
    save_labels(tmp_path / "007/00003.png", boxes(2))
    assert inputs(tmp_path) == {0: [0], 7: [0]}  # an empty one too, as in the official tool
    assert inputs(tmp_path, every=True) == {0: [0, 2], 7: [0, 3]}
    assert inputs(tmp_path, later=True) == {0: [0], 7: [3]}
    assert inputs(tmp_path, True, True) == {0: [0, 2], 7: [3]}
    (tmp_path / "007/00000.png").unlink()
    with pytest.raises(ValueError, match="object 7 has no mask for frame 00000"):
        inputs(tmp_path)
    (tmp_path / "seven").mkdir()
    with pytest.raises(ValueError, match="seven: expected folders named by numbers"):
        inputs(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder of masks"):
        inputs(tmp_path / "nowhere")


def test_lists_of_videos(tmp_path):
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text(" b\n\na\r\nb\n")
    assert layouts.list_videos(tmp_path) == ["a", "b"]
    assert layouts.read_video_list(tmp_path / "notes.txt") == ["b", "a"]
    for line in ("/JPEGImages/480p/bear/00000.jpg x", "..", ".hidden"):
        (tmp_path / "notes.txt").write_text(f"{line}\n")
        with pytest.raises(ValueError, match="no name of a video"):
            layouts.read_video_list(tmp_path / "notes.txt")
    (tmp_path / "notes.txt").write_bytes(b"bear\xff\n")
    with pytest.raises(ValueError, match="notes.txt is no list of videos"):
        layouts.read_video_list(tmp_path / "notes.txt")
    (tmp_path / "notes.txt").write_text("\n")
    with pytest.raises(ValueError, match="names no videos"):
        layouts.read_video_list(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="holds no videos"):
        layouts.list_videos(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="no folder"):
        layouts.list_videos(tmp_path / "c")


# Tracking ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predictor():
    config = dataclasses.replace(CONFIG, **NO_POSTPROCESSING)
    return sam2jax.SAM2VideoPredictor(sam2jax.SAM2(config), random_params(config, seed=6))


def alone(predictor, video: pathlib.Path, prompts: dict[int, np.ndarray]) -> np.ndarray:
    """One object's logits on every frame, as the official tool finds them: [T, H, W]."""
    state = predictor.init_state(str(video))
    for frame, mask in prompts.items():
        predictor.add_new_mask(state, frame, "it", mask)
    out = np.full((state.num_frames, *SIZE), -1024, np.float32)
    for frame, _, logits in predictor.propagate_in_video(state, min(prompts)):
        out[frame] = logits[0, 0]
    return out


def exclusive(scores: dict[int, np.ndarray], threshold: float = 0.0) -> np.ndarray:
    """Label pictures [T, H, W]: each pixel is the best object's, if its score suffices."""
    ids, stacked = np.array(list(scores)), np.stack(list(scores.values()))
    return np.where(stacked.max(axis=0) > threshold, ids[stacked.argmax(axis=0)], 0)


def test_objects_of_the_first_frame(predictor, tmp_path):
    write_davis(tmp_path)
    outcomes = list(
        segment_videos(
            predictor,
            *(tmp_path / name for name in ("videos", "masks", "out")),
            ["bear", "camel"],
            VOSOptions(score_threshold=0.02),
        )
    )
    assert outcomes == [("bear", None), ("camel", None)]
    assert sorted(os.listdir(tmp_path / "out")) == ["bear", "camel"]
    for name in ("bear", "camel"):
        scores = {
            obj: alone(predictor, tmp_path / "videos" / name, {0: boxes(1, 3) == obj})
            for obj in (1, 3)
        }
        found = pictures(tmp_path / "out" / name)
        np.testing.assert_array_equal(found, exclusive(scores, threshold=0.02))
        assert not np.array_equal(found, exclusive(scores)) and {1, 3} <= set(found.flat)
        paths = sorted((tmp_path / "out" / name).iterdir())
        assert [path.name for path in paths] == [f"{t:05d}.png" for t in range(LENGTH)]
        assert read_labels(paths[0])[1] == GREY


def test_a_folder_for_each_object(predictor, tmp_path):
    """SA-V: sparse masks, object 0, overlapping objects."""
    write_frames(tmp_path / "video")
    truth = {0: boxes(1) > 0, 4: boxes(1, 2) > 0}
    for obj, mask in truth.items():
        for t in (0, 4):
            save_labels(tmp_path / f"masks/{obj:03d}/{t:05d}.png", 255 * mask)
    segment_video(predictor, tmp_path / "video", tmp_path / "masks", tmp_path / "out", VOSOptions())
    found = {obj: pictures(tmp_path / "out" / f"{obj:03d}") for obj in truth}
    for obj, mask in truth.items():
        expected = alone(predictor, tmp_path / "video", {0: mask}) > 0
        np.testing.assert_array_equal(found[obj], expected)
    assert (found[0] & found[4]).any()
    together = VOSOptions(per_object_png=False)
    paths = [tmp_path / name for name in ("video", "masks", "together")]
    with pytest.raises(ValueError, match="hold object ids 1 to 255"):
        segment_video(predictor, *paths, together)
    (tmp_path / "masks/000").rename(tmp_path / "masks/002")
    segment_video(predictor, *paths, together)
    scores = {i: alone(predictor, tmp_path / "video", {0: truth[o]}) for i, o in ((2, 0), (4, 4))}
    np.testing.assert_array_equal(pictures(paths[-1]), exclusive(scores))


@pytest.mark.parametrize("every", [False, True])
def test_objects_that_appear_later(predictor, tmp_path, every):
    """LVOS, YouTube-VOS: each object from its own first mask, as if it were alone."""
    write_frames(tmp_path / "video", length=7)
    given = {1: boxes(2), 3: boxes(1, 2), 5: boxes(2, 1, 4)}
    for t, labels in given.items():
        save_labels(tmp_path / f"masks/{t:05d}.png", labels)
    options = VOSOptions(objects_appear_later=True, use_all_masks=every)
    segment_video(predictor, tmp_path / "video", tmp_path / "masks", tmp_path / "out", options)
    scores = {}
    for obj in (1, 2, 4):
        masks = {t: labels == obj for t, labels in given.items() if (labels == obj).any()}
        masks = masks if every else dict([min(masks.items())])
        scores[obj] = alone(predictor, tmp_path / "video", masks)
    found = pictures(tmp_path / "out")
    np.testing.assert_array_equal(found, exclusive(scores))
    assert len(found) == 7 and not found[0].any() and 4 not in found[:5] and 4 in found[5]
    apart = VOSOptions(objects_appear_later=True, use_all_masks=every, per_object_png=True)
    segment_video(predictor, tmp_path / "video", tmp_path / "masks", tmp_path / "apart", apart)
    for obj, logits in scores.items():
        np.testing.assert_array_equal(pictures(tmp_path / "apart" / f"{obj:03d}"), logits > 0)


def test_sessions_hold_what_tracking_needs(predictor, tmp_path, monkeypatch):
    """Memory is constant in the length, unless more masks are given than a session then keeps."""
    states = []
    real = sam2jax.SAM2VideoPredictor.init_state

    def init_state(*args, **kwargs):
        states.append(real(*args, **kwargs))
        return states[-1]

    for module in (session, vos):
        monkeypatch.setattr(module, "MOST_COND_FRAMES", 2)
    write_frames(tmp_path / "video", length=20)
    for t in range(3):
        save_labels(tmp_path / f"masks/{t:05d}.png", boxes(2))
    monkeypatch.setattr(sam2jax.SAM2VideoPredictor, "init_state", init_state)
    for every in (False, True):
        out, options = tmp_path / str(every), VOSOptions(use_all_masks=every)
        segment_video(predictor, tmp_path / "video", tmp_path / "masks", out, options)
    constant, whole = (state.objects[2] for state in states)
    assert len(constant.recent) == 16 and len(constant.cond) == 1
    assert len(whole.recent) == 17 and len(whole.cond) == 3
    masks = {t: boxes(2) > 0 for t in whole.cond}
    expected = alone(predictor, tmp_path / "video", masks) > 0
    np.testing.assert_array_equal(pictures(tmp_path / "True") > 0, expected)


class Stopped(sam2jax.SAM2VideoPredictor):
    """Is stopped on the third frame of the second video."""

    def __init__(self, predictor):
        super().__init__(predictor.model, predictor.params)
        self.videos = 0

    def propagate_in_video(self, *args, **kwargs):
        self.videos += 1
        for answer in super().propagate_in_video(*args, **kwargs):
            if self.videos == 2 and answer[0] == 2:
                raise KeyboardInterrupt
            yield answer


def test_a_stopped_run_goes_on_where_it_was(predictor, tmp_path):
    names = ["ant", "bear", "camel"]
    write_davis(tmp_path, tuple(names))
    folders = [tmp_path / name for name in ("videos", "masks", "out")]
    with pytest.raises(KeyboardInterrupt):
        list(segment_videos(Stopped(predictor), *folders, names, VOSOptions()))
    assert os.listdir(tmp_path / "out") == ["ant"]
    left = tmp_path / "out" / ".bear.0123abcd"  # as by a process that was killed
    left.mkdir()
    (tmp_path / "out" / "camel").mkdir()  # is empty
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "ant").iterdir()}
    todo = unfinished(tmp_path / "out", names)
    assert todo == ["bear", "camel"]
    assert [o.problem for o in segment_videos(predictor, *folders, todo, VOSOptions())] == [
        None
    ] * 2
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "ant").iterdir()} == before
    assert unfinished(tmp_path / "out", names) == []
    assert all(len(list((tmp_path / "out" / name).iterdir())) == LENGTH for name in names)


# Scoring -----------------------------------------------------------------------------------------


def write_scored(root: pathlib.Path) -> None:
    """Truth and predictions of three videos, one of them with a folder for each object."""
    for t in range(LENGTH):
        frame = f"{t:05d}.png"
        save_labels(root / "truth/bear" / frame, boxes(1, 3), GREY)
        save_labels(root / "found/bear" / frame, np.roll(boxes(1, 3), t, axis=1), GREY)
        save_labels(root / "found/bear" / f"{t + 100:05d}.png", boxes(2))  # is not looked at
        save_labels(root / "truth/camel" / frame, boxes(1) * (t > 2))
        save_labels(root / "found/camel" / frame, boxes(1))
        for obj in (0, 2):
            save_labels(root / f"truth/sav/{obj:03d}" / frame, 255 * (boxes(obj + 1) > 0))
            save_labels(root / f"found/sav/{obj:03d}" / frame, boxes(obj + 1) > 0)
        save_labels(root / f"truth/sav/009/{frame}", 0 * boxes())  # never there
        save_labels(root / f"found/sav/009/{frame}", boxes(1))


def test_scores_of_folders(tmp_path):
    write_scored(tmp_path)
    results = score_folders(tmp_path / "truth", tmp_path / "found")
    assert {v: list(of) for v, of in results.objects.items()} == {
        "bear": ["001", "003"],
        "camel": ["001"],
        "sav": ["000", "002"],
    }
    truth = [boxes(1, 3)] * (LENGTH - 2)
    found = [np.roll(boxes(1, 3), t, axis=1) for t in range(1, LENGTH - 1)]
    expected = score_frames(zip(truth, found, strict=True))
    for obj in (1, 3):
        score = results.objects["bear"][f"{obj:03d}"]
        np.testing.assert_allclose(score, 100 * np.array(expected[obj]))
        assert score.jf == pytest.approx(sum(score) / 2) and 20 < score.j < 95
    assert results.objects["camel"]["001"] == pytest.approx((100 / 3, 100 / 3))
    assert results.videos["sav"] == (100, 100)
    every = [score for of in results.objects.values() for score in of.values()]
    np.testing.assert_allclose(results.overall, np.mean(every, axis=0))
    both_ends = score_folders(tmp_path / "truth", tmp_path / "found", keep_first_and_last=True)
    assert both_ends.objects["camel"]["001"] == pytest.approx((40, 40))
    shared = score_folders(tmp_path / "truth", tmp_path / "found", workers=2)
    assert shared == results


def test_what_cannot_be_scored(tmp_path):
    write_scored(tmp_path)
    truth, found = tmp_path / "truth", tmp_path / "found"
    os.rename(found / "camel", found / "extra")
    with pytest.raises(FileNotFoundError, match="found lacks camel; .*truth lacks extra"):
        score_folders(truth, found)
    with pytest.raises(FileNotFoundError, match="found lacks cow, dog; .*truth lacks cow, dog"):
        score_folders(truth, found, ["dog", "cow", "bear"])
    assert list(score_folders(truth, found, strict=False).objects) == ["bear", "sav"]
    assert list(score_folders(truth, found, ["bear"]).objects) == ["bear"]
    with pytest.raises(ValueError, match="no video in common"):
        score_folders(truth, found, ["camel"], strict=False)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        score_folders(truth, tmp_path / "nowhere")
    (found / "bear/00000.png").unlink()  # does not count
    assert len(score_folders(truth, found, ["bear"]).objects) == 1
    for t in (1, 3):
        (found / f"bear/{t:05d}.png").unlink()
    with pytest.raises(FileNotFoundError, match="bear lacks 00001.png, 00003.png"):
        score_folders(truth, found, ["bear"])
    save_labels(found / "sav/000/00002.png", boxes(1)[:-1])
    with pytest.raises(ValueError, match="found/sav/000/00002.png is 80x47 and .* is 80x48"):
        score_folders(truth, found, ["sav"])
    save_labels(found / "sav/000/00002.png", boxes(1, 2))
    with pytest.raises(ValueError, match="00002.png holds several objects"):
        score_folders(truth, found, ["sav"])
    Image.new("RGB", (80, 48)).save(found / "sav/000/00002.png")
    with pytest.raises(ValueError, match="mode RGB; expected"):
        score_folders(truth, found, ["sav"])
    shutil.rmtree(found / "sav/000")
    with pytest.raises(FileNotFoundError, match="000 lacks 00001.png, 00002.png, 00003.png"):
        score_folders(truth, found, ["sav"])
    for path in (truth / "camel").iterdir():
        save_labels(path, boxes())
    os.rename(found / "extra", found / "camel")
    with pytest.raises(ValueError, match="no object on a frame that counts"):
        score_folders(truth, found, ["camel"])
    for path in (truth / "camel").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="camel holds no PNG files"):
        score_folders(truth, found, ["camel"])


# The command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(tmp_path, monkeypatch):
    return commands_in_an_empty_folder(tmp_path, monkeypatch)


def test_tracking_and_scoring_in_one_command(command, checkpoint, tmp_path):
    write_davis(tmp_path, ("bear", "camel", "dog"))
    (tmp_path / "val.txt").write_text("camel\nbear\n")
    result = command(
        *["eval", tmp_path / "videos", "--masks", tmp_path / "masks", "--out", "out"],
        *["--checkpoint", checkpoint, "--video-list", tmp_path / "val.txt"],
        *["--score", "--json", "scores.json", "--workers", 1],
    )
    assert result.exit_code == 0, result.output
    assert "(4 objects, 2 videos)" in result.stdout and result.stdout.startswith("J&F ")
    assert sorted(os.listdir("out")) == ["bear", "camel", "results.csv"]
    scores = json.loads(pathlib.Path("scores.json").read_text())
    direct = score_folders(tmp_path / "masks", "out", ["bear", "camel"])
    assert scores == direct.to_dict() and set(scores["videos"]["bear"]["objects"]) == {"001", "003"}
    rows = list(csv.reader(pathlib.Path("out/results.csv").read_text().splitlines()))
    assert rows[0] == ["sequence", "obj", "J&F", "J", "F"]
    assert [row[:2] for row in rows[1:]] == [
        ["Global score", ""],
        *(["bear", obj] for obj in ("", "001", "003")),
        *(["camel", obj] for obj in ("", "001", "003")),
    ]
    assert float(rows[1][3]) == pytest.approx(direct.overall.j, abs=6e-4)
    again = command(
        *["eval", "--score", "--truth", tmp_path / "masks", "--out", "out", "-q"],
        *["--no-strict", "--keep-first-and-last", "--workers", 1],
    )
    assert again.exit_code == 0 and again.stdout != result.stdout


@pytest.mark.parametrize(
    "option", [["--json", "a.json"], ["--truth", "."], ["--keep-first-and-last"], ["--workers", 2]]
)
def test_options_of_scoring_need_a_score(command, checkpoint, tmp_path, option):
    write_davis(tmp_path, ("bear",))
    given = ["eval", tmp_path / "videos", "--masks", tmp_path / "masks", "--checkpoint", checkpoint]
    result = command(*given, "--out", "found", *option)
    assert result.exit_code == 2 and f"{option[0]} is for scoring" in result.output
    result = command(*given, "--out", "found", "--score", "--json", "no/a.json")
    assert result.exit_code == 2 and "no folder for --json no/a.json" in result.output
    assert not pathlib.Path("found").exists()


def test_shards_and_damaged_videos(command, checkpoint, tmp_path):
    names = ["ant", "bear", "camel", "dog"]
    write_davis(tmp_path, tuple(names))
    (tmp_path / "videos/bear/00003.jpg").write_bytes(b"no picture")
    shutil.rmtree(tmp_path / "masks/dog")
    given = ["eval", tmp_path / "videos", "--masks", tmp_path / "masks", "--out", "out"]
    given += ["--checkpoint", checkpoint, "-q", "--shard"]
    first = command(*given, "0/2")
    assert first.exit_code == 0 and sorted(os.listdir("out")) == ["ant", "camel"]
    second = command(*given, "1/2")
    assert second.exit_code == 1 and sorted(os.listdir("out")) == ["ant", "camel"]
    told = second.stderr.splitlines()
    assert told[0].startswith("error: bear: ") and "00003.jpg" in told[0]
    assert told[1].startswith("error: dog: there is no folder of masks")
    assert told[2].startswith("2 of 2 videos failed")
    write_frames(tmp_path / "videos/new")
    shutil.rmtree(tmp_path / "videos/bear")
    (tmp_path / "videos/new").rename(tmp_path / "videos/bear")
    (tmp_path / "list.txt").write_text("bear\nelk\n")
    tried = command(*given, "0/1", "--video-list", tmp_path / "list.txt")
    assert tried.exit_code == 1 and "there is no folder of frames" in tried.stderr
    assert "1 of 2 videos failed" in tried.stderr
    assert sorted(os.listdir("out")) == ["ant", "bear", "camel"]


def test_what_is_there_is_scored_if_not_all_need_be(command, checkpoint, tmp_path):
    write_davis(tmp_path, ("ant", "bear"))
    (tmp_path / "videos/bear/00003.jpg").write_bytes(b"no picture")
    given = ["eval", tmp_path / "videos", "--masks", tmp_path / "masks", "--out", "out"]
    given += ["--checkpoint", checkpoint, "-q", "--score", "--workers", 1]
    strict = command(*given)
    assert strict.exit_code == 1 and "J&F" not in strict.stdout
    tolerant = command(*given, "--no-strict")
    assert tolerant.exit_code == 1 and "1 videos)" in tolerant.stdout


def test_masks_of_another_layout_are_not_scored(command, checkpoint, tmp_path):
    write_davis(tmp_path, ("ant",))
    given = ["eval", tmp_path / "videos", "--masks", tmp_path / "masks", "--out", "out"]
    result = command(*given, "--checkpoint", checkpoint, "--score", "--per-object-png")
    assert result.exit_code == 2 and "--per-object-png writes another layout" in result.output
    assert not pathlib.Path("out").exists()


def test_another_policy(command, checkpoint, tmp_path, monkeypatch):
    predictors = []
    monkeypatch.setattr(vos, "segment_videos", lambda used, *_, **__: predictors.append(used) or [])
    write_davis(tmp_path)
    given = ["eval", tmp_path / "videos", "--masks", tmp_path / "masks", "--out", "out"]
    for more in ((), ("--policy", "samurai:alpha=0.15")):
        result = command(*given, "--checkpoint", checkpoint, *more)
        assert result.exit_code == 0, result.output
    assert [used.policy for used in predictors] == [SAM2, samurai(alpha=0.15)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "nothing to do"),
        (["--score"], "--out"),
        (["--score", "--out", "out"], "--truth"),
        (["VIDEOS", "--out", "out"], "--masks and --checkpoint"),
        (["VIDEOS", "--masks", "MASKS", "--out", "MASKS"], "holds the given masks"),
        (["VIDEOS", "--masks", "MASKS", "--out", "VIDEOS"], "holds the videos"),
        (["--score", "--truth", "MASKS", "--out", "MASKS"], "holds the given masks"),
        (["--score", "--truth", "MASKS", "--out", "out", "--shard", "0/2"], "shard"),
        (["--score", "--truth", "MASKS", "--out", "out", "--shard", "2/2"], "I from 0 to N-1"),
        (["--score", "--truth", "MASKS", "--out", "out"], "no folder out"),
        (["NOWHERE", "--masks", "MASKS", "--out", "out"], "no folder"),
        (["VIDEOS", "--masks", "NOWHERE", "--checkpoint", "MODEL", "--out", "out"], "no folder"),
        (
            ["VIDEOS", *("--masks", "MASKS", "--checkpoint", "MODEL", "--out", "out")]
            + ["--policy", "nothing"],
            "there are sam2, sam3_score",
        ),
    ],
)
def test_refused(command, checkpoint, tmp_path, given, words):
    write_davis(tmp_path, ("bear",))
    places = {"VIDEOS": "videos", "MASKS": "masks", "NOWHERE": "nowhere"}
    paths = {word: tmp_path / name for word, name in places.items()} | {"MODEL": checkpoint}
    refused(command("eval", *(paths.get(word, word) for word in given)), words)


def test_a_model_for_images_only_is_refused_once(command, tmp_path):
    write_davis(tmp_path)
    config = small_config(image_size=32, images_only=True)
    sam2jax.save(tmp_path / "model.safetensors", config, random_params(config))
    given = ["eval", tmp_path / "videos", "--masks", tmp_path / "masks", "--out", "out"]
    refused(command(*given, "--checkpoint", tmp_path / "model.safetensors"), "images only")
