"""The video predictor: the official calls, their results, and what they refuse."""

import copy

import jax
import numpy as np
import pytest
from PIL import Image

import sam2jax
from sam2jax.testing import random_params, small_config

CONFIG = small_config(image_size=64)
LENGTH, SIZE = 6, (48, 80)


@pytest.fixture(scope="module")
def predictor():
    params = random_params(CONFIG, seed=3)
    return sam2jax.SAM2VideoPredictor(sam2jax.SAM2(CONFIG), params)


def clip() -> np.ndarray:
    frames = np.random.default_rng(0).integers(0, 90, (LENGTH, *SIZE, 3), np.uint8)
    for t in range(LENGTH):
        frames[t, 10 + t : 26 + t, 20 + 2 * t : 40 + 2 * t] += 150
    return frames


def test_propagation_equals_track(predictor):
    state = predictor.init_state(clip())
    assert (state["num_frames"], state["video_height"], state["video_width"]) == (LENGTH, *SIZE)
    frame, ids, masks = predictor.add_new_points_or_box(state, 0, "cup", [[30, 18]], [1])
    assert (frame, ids) == (0, ["cup"])
    assert masks.shape == (1, 1, *SIZE) and masks.dtype == np.float32
    answers = list(predictor.propagate_in_video(state))
    assert [a[0] for a in answers] == list(range(LENGTH))
    prompts = sam2jax.Prompts.make(points=[[(30, 18)]])
    _, out = sam2jax.track(predictor.model, predictor.params, clip(), prompts)
    expected = sam2jax.resize_masks(out.masks, SIZE)
    np.testing.assert_allclose(np.stack([a[2][:, 0] for a in answers]), expected, atol=1e-3)
    np.testing.assert_allclose(masks[:, 0], expected[0], atol=1e-3)


def test_the_official_ranges(predictor):
    state = predictor.init_state(clip())
    predictor.add_new_mask(state, 3, 1, np.eye(48, 80) > 0)

    def frames(**options):
        return [answer[0] for answer in predictor.propagate_in_video(state, **options)]

    assert frames() == [3, 4, 5]
    assert frames(start_frame_idx=1, max_frame_num_to_track=2) == [1, 2, 3]  # one more than asked
    assert frames(reverse=True) == [3, 2, 1, 0]
    assert frames(start_frame_idx=4, max_frame_num_to_track=1, reverse=True) == [4, 3]
    assert frames(start_frame_idx=0, reverse=True) == []


def test_a_folder_gives_what_its_frames_give(predictor, tmp_path):
    for index, frame in enumerate(clip()[:3]):
        square = np.asarray(Image.fromarray(frame).resize((64, 64)))
        Image.fromarray(square).save(tmp_path / f"{index}.png")
    state = predictor.init_state(str(tmp_path), offload_state_to_cpu=True)
    frames = np.stack([np.asarray(Image.open(tmp_path / f"{i}.png")) for i in range(3)])
    other = predictor.init_state(frames)
    answers = []
    for one in (state, other):
        predictor.add_new_points_or_box(one, frame_idx=0, obj_id=1, box=[10, 10, 50, 40])
        answers.append(np.stack([a[2] for a in predictor.propagate_in_video(one)]))
    np.testing.assert_array_equal(*answers)


def test_clicks_one_by_one_differ_from_clicks_at_once(predictor):
    points, labels = [[30, 18], [60, 40]], [1, 0]
    state = predictor.init_state(clip())
    predictor.add_new_points_or_box(state, 0, 1, points[:1], labels[:1])
    _, _, one_by_one = predictor.add_new_points_or_box(
        state, 0, 1, points[1:], labels[1:], clear_old_points=False
    )
    fresh = predictor.init_state(clip())
    _, _, at_once = predictor.add_new_points_or_box(fresh, 0, 1, points, labels)
    assert not np.allclose(one_by_one, at_once)


def test_normalised_coordinates(predictor):
    answers = []
    for points, normalize in (([[30, 18]], True), ([[30 / 80, 18 / 48]], False)):
        state = predictor.init_state(clip())
        answers.append(
            predictor.add_new_points(state, 0, 1, points, [1], normalize_coords=normalize)[2]
        )
    np.testing.assert_allclose(*answers, atol=1e-4)


def test_an_object_may_be_prompted_after_tracking_began(predictor):
    state = predictor.init_state(clip())
    predictor.add_new_points_or_box(state, 0, "a", [[30, 18]], [1])
    alone = {f: m for f, _, m in predictor.propagate_in_video(state)}
    _, ids, masks = predictor.add_new_points_or_box(state, 4, "b", [[12, 40]], [1])
    assert ids == ["a", "b"] and masks.shape[0] == 2
    np.testing.assert_allclose(masks[0], alone[4][0], atol=1e-5)
    both = {f: m for f, _, m in predictor.propagate_in_video(state)}
    np.testing.assert_allclose(both[5][0], alone[5][0], atol=1e-4)


def snapshot(state):
    return jax.tree.map(np.asarray, copy.deepcopy(vars(state)["objects"]))


@pytest.mark.parametrize(
    "call, error, message",
    [
        ({"frame_idx": 6, "points": [[1, 2]], "labels": [1]}, ValueError, "frames 0 to 5"),
        ({"frame_idx": -1, "points": [[1, 2]], "labels": [1]}, ValueError, "frames 0 to 5"),
        ({"points": [[1, 2]]}, ValueError, "together"),
        ({}, ValueError, "Give points"),
        ({"points": [1, 2], "labels": [1]}, ValueError, r"\[P, 2\]"),
        ({"points": [[1, np.inf]], "labels": [1]}, ValueError, "finite"),
        ({"points": [[1, 2]], "labels": [7]}, ValueError, "Labels"),
        ({"points": [[1, 2]], "labels": [1, 1]}, ValueError, "1 points"),
        ({"box": [1, 2, 3]}, ValueError, "x0, y0, x1, y1"),
        ({"box": [1, 2, 3, 4], "clear_old_points": False}, ValueError, "clear_old_points"),
    ],
)
def test_refused_prompts_leave_no_trace(predictor, call, error, message):
    state = predictor.init_state(clip())
    with pytest.raises(error, match=message):
        predictor.add_new_points_or_box(state, **{"frame_idx": 0, "obj_id": 1, **call})
    assert state["obj_ids"] == [] and snapshot(state) == {}


def test_refused_masks_and_videos(predictor):
    state = predictor.init_state(clip())
    with pytest.raises(ValueError, match=r"\[h, w\]"):
        predictor.add_new_mask(state, 0, 1, np.ones((1, 4, 4)))
    with pytest.raises(TypeError, match="init_state"):
        predictor.add_new_mask({}, 0, 1, np.ones((4, 4)))
    with pytest.raises(RuntimeError, match="No prompts"):
        next(predictor.propagate_in_video(state))
    with pytest.raises(FileNotFoundError):
        predictor.init_state("no/such/video.mp4")
    with pytest.raises(ValueError, match="frames"):
        predictor.init_state(np.zeros((0, 8, 8, 3), np.uint8))


def test_options_reach_the_model_and_the_predictor(tmp_path):
    path = tmp_path / "small.safetensors"
    sam2jax.save(path, CONFIG, random_params(CONFIG))
    loaded = sam2jax.SAM2VideoPredictor.from_pretrained(
        path,
        image_size=96,
        apply_postprocessing=False,
        fill_hole_area=3,
        non_overlap_masks=True,
        add_all_frames_to_correct_as_cond=True,
    )
    assert loaded.image_size == 96 and loaded.non_overlap_masks
    assert loaded.add_all_frames_to_correct_as_cond
    assert not loaded.config.dynamic_multimask_via_stability
    assert loaded.config.fill_hole_area == 3  # given explicitly, wins
    with pytest.raises(TypeError, match="fill_hole"):
        sam2jax.SAM2VideoPredictor.from_pretrained(path, fill_holes=3)
