"""The video predictor: the official calls, their results, and what they refuse."""

import copy
import dataclasses
import itertools
import pickle
import threading

import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw

import sam2jax
from sam2jax.predictors import programs, propagation, video
from sam2jax.predictors.inputs import check_mask
from sam2jax.testing import random_params, small_config

CONFIG = small_config(image_size=64)
LENGTH, SIZE = 6, (48, 80)
CLICK = {"points": [[30, 18]], "labels": [1]}


@pytest.fixture(scope="module")
def predictor():
    params = random_params(CONFIG, seed=3)
    return sam2jax.SAM2VideoPredictor(sam2jax.SAM2(CONFIG), params)


def clip(length: int = LENGTH) -> np.ndarray:
    frames = np.random.default_rng(0).integers(0, 90, (length, *SIZE, 3), np.uint8)
    for t in range(length):
        frames[t, 10 + t : 26 + t, 20 + 2 * t : 40 + 2 * t] += 150
    return frames


def masks_of(answers) -> np.ndarray:
    return np.stack([masks for _, _, masks in answers])


def test_propagation_equals_track(predictor):
    state = predictor.init_state(clip())
    assert (state["num_frames"], state["video_height"], state["video_width"]) == (LENGTH, *SIZE)
    frame, ids, masks = predictor.add_new_points_or_box(state, 0, "cup", **CLICK)
    assert (frame, ids) == (0, ["cup"])
    assert masks.shape == (1, 1, *SIZE) and masks.dtype == np.float32
    answers = list(predictor.propagate_in_video(state))
    assert [a[0] for a in answers] == list(range(LENGTH))
    prompts = sam2jax.Prompts.make(points=[[(30, 18)]])
    _, out = sam2jax.track(predictor.model, predictor.params, clip(), prompts)
    expected = sam2jax.resize_masks(out.masks, SIZE)
    np.testing.assert_allclose(masks_of(answers)[:, :, 0], expected, atol=1e-3)
    np.testing.assert_allclose(masks[:, 0], expected[0], atol=1e-3)
    for frame in range(LENGTH):
        ids, scores, ious, _ = predictor.scores(state, frame)
        assert ids == ["cup"]
        np.testing.assert_allclose(scores, out.object_score[frame], atol=1e-4)
        np.testing.assert_allclose(ious, out.iou[frame], atol=1e-4)


def test_bilevel_pictures_are_masks():
    """Pillow gives bools whose bytes are 255, which XLA may add up as they are."""
    drawn = Image.new("1", (8, 6))
    ImageDraw.Draw(drawn).rectangle((2, 1, 4, 3), fill=1)
    bilevel = np.asarray(drawn)
    assert bilevel.dtype == bool and bilevel.view(np.uint8).max() == 255
    mask = check_mask(bilevel)
    np.testing.assert_array_equal(mask, bilevel)
    assert mask.view(np.uint8).max() == 1


def test_pytorch_masks_are_cut_where_the_official_ones_are():
    class Tensor(np.ndarray):  # as far as it is looked at
        is_floating_point = None

    soft = np.float32([[-1, 0, 0.3], [0.5, 0.7, 1]])
    np.testing.assert_array_equal(check_mask(soft), soft != 0)
    np.testing.assert_array_equal(check_mask(soft.view(Tensor)), soft >= 0.5)


def test_a_session_copied(predictor):
    """What is tried in a copy leaves the session as it was, and the other way round."""
    state = predictor.init_state(clip())
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    before = masks_of(predictor.propagate_in_video(state, max_frame_num_to_track=2))
    twin = copy.deepcopy(state)
    predictor.add_new_points_or_box(twin, 1, 2, points=[[60, 40]], labels=[1])
    predictor.add_new_points_or_box(twin, 1, 1, points=[[60, 40]], labels=[0])
    tried = masks_of(predictor.propagate_in_video(twin))
    assert state.obj_ids == [1] and twin.obj_ids == [1, 2] and 1 not in state.objects[1].points
    np.testing.assert_array_equal(masks_of(predictor.propagate_in_video(state))[:3], before)
    np.testing.assert_array_equal(masks_of(predictor.propagate_in_video(twin)), tried)
    for refused in (copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="save_state"):
            refused(state)


def test_what_is_compiled_in_cannot_be_set(predictor):
    with pytest.raises(AttributeError, match="from_pretrained"):
        predictor.fill_hole_area = 0


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
    frames = [np.asarray(Image.open(tmp_path / f"{i}.png")) for i in range(3)]
    answers = []
    for one in (state, predictor.init_state(np.stack(frames)), predictor.init_state(iter(frames))):
        predictor.add_new_points_or_box(one, frame_idx=0, obj_id=1, box=[10, 10, 50, 40])
        answers.append(masks_of(predictor.propagate_in_video(one)))
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[1], answers[2])
    kept = state.objects[1].recent[2]
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(kept))


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
    predictor.add_new_points_or_box(state, 0, "a", **CLICK)
    alone = {f: m for f, _, m in predictor.propagate_in_video(state)}
    _, ids, masks = predictor.add_new_points_or_box(state, 4, "b", [[12, 40]], [1])
    assert ids == ["a", "b"] and masks.shape[0] == 2
    np.testing.assert_array_equal(masks[0], alone[4][0])
    both = {f: m for f, _, m in predictor.propagate_in_video(state)}
    np.testing.assert_array_equal(both[5][0], alone[5][0])
    absent = predictor.scores(state, 0)
    both = predictor.add_new_points_or_box(state, 0, "c", [[12, 40]], [1])[2]
    assert absent.object_scores[1] != -1024 and (both[2] != -1024).all()


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_session_holds_what_was_yielded(predictor, monkeypatch, chunk):
    """Leaving the loop and taking it up again changes nothing, though frames are computed ahead."""
    monkeypatch.setattr(video, "frames_at_once", lambda: chunk)
    whole, parts = predictor.init_state(clip()), predictor.init_state(clip())
    for state in (whole, parts):
        predictor.add_new_points_or_box(state, 0, "a", **CLICK)
        predictor.add_new_points_or_box(state, 2, "b", [[12, 40]], [1])
    expected = masks_of(predictor.propagate_in_video(whole))
    loop = predictor.propagate_in_video(parts)
    answers = [next(loop) for _ in range(2)]
    assert set(parts.objects["a"].tracked) == {0, 1} and set(parts.objects["a"].recent) == {1}
    with pytest.raises(KeyboardInterrupt):
        loop.throw(KeyboardInterrupt)
    answers += predictor.propagate_in_video(parts, start_frame_idx=2)
    np.testing.assert_allclose(masks_of(answers), expected, atol=1e-4)
    if chunk == 1:
        np.testing.assert_array_equal(masks_of(answers), expected)


def test_a_loop_follows_what_is_changed_while_it_runs(predictor):
    state = predictor.init_state(clip())
    predictor.add_new_points_or_box(state, 0, "a", **CLICK)
    predictor.add_new_points_or_box(state, 0, "b", [[12, 40]], [1])
    loop = predictor.propagate_in_video(state)
    next(loop)
    predictor.add_new_points_or_box(state, 0, "c", [[12, 10]], [1])
    assert next(loop)[1] == ["a", "b"]  # who comes late waits for the next loop
    predictor.remove_object(state, "a")
    with pytest.raises(RuntimeError, match="'a'"):
        next(loop)
    assert [a[1] for a in predictor.propagate_in_video(state)] == [["b", "c"]] * LENGTH


def test_history_none_keeps_what_the_bank_keeps(predictor):
    frames, answers, states = clip(40), [], []
    for history in ("all", "none"):
        state = predictor.init_state(frames, history=history)
        predictor.add_new_points_or_box(state, 0, 1, **CLICK)
        predictor.add_new_points_or_box(state, 20, 1, [[60, 30]], [1])
        answers.append(masks_of(predictor.propagate_in_video(state)))
        states.append(state.objects[1])
    np.testing.assert_array_equal(*answers)
    assert len(states[0].recent) == 38 and len(states[0].tracked) == 40
    assert sorted(states[1].recent) == list(range(24, 40)) and len(states[1].tracked) == 16
    assert sorted(states[1].cond) == [0, 20]
    with pytest.raises(ValueError, match="history"):
        predictor.init_state(frames, history="some")


def test_clearing_removing_resetting(predictor):
    state = predictor.init_state(clip())
    for frame, obj_id in ((0, "a"), (0, "b"), (3, "b")):
        predictor.add_new_points_or_box(state, frame, obj_id, **CLICK)
    before = {frame: masks for frame, _, masks in predictor.propagate_in_video(state)}
    frame, ids, masks = predictor.clear_all_prompts_in_frame(state, 3, "b")
    assert (frame, ids, masks.shape) == (3, ["a", "b"], (2, 1, *SIZE))
    np.testing.assert_array_equal(masks, before[3])  # the answer stays, as a tracked one
    assert predictor.clear_all_prompts_in_frame(state, 3, "b", need_output=False) is None
    after = {frame: masks for frame, _, masks in predictor.propagate_in_video(state)}
    assert not np.allclose(after[3][1], before[3][1])
    assert np.array_equal(after[3][0], before[3][0])

    predictor.clear_all_prompts_in_frame(state, 0, "b")
    with pytest.raises(RuntimeError, match="prompts that are gone"):
        predictor.add_new_points_or_box(state, 5, "b", **CLICK)
    with pytest.raises(RuntimeError, match="'b' has no prompt"):
        next(predictor.propagate_in_video(state))
    assert predictor.remove_object(state, "nobody") == (["a", "b"], [])
    with pytest.raises(RuntimeError, match="nobody"):
        predictor.remove_object(state, "nobody", strict=True)
    with pytest.raises(RuntimeError, match="nobody"):
        predictor.clear_all_prompts_in_frame(state, 0, "nobody")
    ids, updated = predictor.remove_object(state, "a")
    assert ids == ["b"] and [(f, m.shape) for f, m in updated] == [(0, (1, 1, *SIZE))]
    np.testing.assert_array_equal(updated[0][1][0], after[0][1])
    assert predictor.remove_object(state, "b") == ([], [])
    predictor.add_new_points_or_box(state, 0, "a", **CLICK)
    predictor.reset_state(state)
    assert state["obj_ids"] == [] and predictor.scores(state, 0).obj_ids == []


def test_options_of_the_predictor(predictor):
    """Exclusive masks; memories cleared around prompts; corrections that stay."""

    def session(**options):
        one = sam2jax.SAM2VideoPredictor(predictor.model, predictor.params, **options)
        state = one.init_state(clip())
        one.add_new_points_or_box(state, 0, "a", **CLICK)
        one.add_new_points_or_box(state, 0, "b", [[33, 20]], [1])
        list(one.propagate_in_video(state))
        corrected = one.add_new_points_or_box(state, 3, "a", [[50, 30]], [0])[2]
        return state, corrected, masks_of(one.propagate_in_video(state))

    _, corrected, plain = session()
    assert ((plain > 0).sum(axis=1) > 1).any() and not np.array_equal(plain[3], corrected)
    assert ((session(non_overlap_masks=True)[2] > 0).sum(axis=1) <= 1).all()
    state, corrected, kept = session(add_all_frames_to_correct_as_cond=True)
    assert sorted(state.objects["a"].cond) == [0, 3] and sorted(state.objects["b"].cond) == [0]
    np.testing.assert_array_equal(kept[3], corrected)
    assert not np.allclose(kept[4, 0], plain[4, 0]) and np.array_equal(kept[4, 1], plain[4, 1])
    cleared = session(clear_non_cond_mem_around_input=True, add_all_frames_to_correct_as_cond=True)
    assert not np.allclose(cleared[2][4, 0], kept[4, 0])  # without memory of frames 1 and 2


def test_nothing_is_compiled_twice(predictor):
    """More objects, other numbers of clicks, another direction, another video of the same size."""
    compiled = []

    def note(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    def session(length: int, ids: str, clicks: int) -> None:
        state = predictor.init_state(clip(length))
        points = [[20 + i, 18] for i in range(clicks)]
        for frame, obj_id in enumerate(ids):
            predictor.add_new_points_or_box(state, frame, obj_id, points, [1] * clicks)
        predictor.add_new_mask(state, 1, ids[0], np.eye(*SIZE))
        list(predictor.propagate_in_video(state, max_frame_num_to_track=4))
        predictor.add_new_points_or_box(state, 2, ids[0], points, [0] * clicks)
        list(predictor.propagate_in_video(state, start_frame_idx=4, reverse=True))

    session(5, "ab", 1)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        jax.jit(lambda x: x + 1)(0)
        assert len(compiled) == 1  # this is how it shows
        session(6, "abcd", 3)
        session(7, "abc", 2)
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("together, rows", [(1, (8, 8)), (8, (1, 4))])
def test_objects_that_are_not_there_are_not_computed(predictor, monkeypatch, together, rows):
    """Taken one by one they cost nothing, taken together they would cost what others do."""
    config = dataclasses.replace(CONFIG, objects_at_once=together)
    other = sam2jax.SAM2VideoPredictor(sam2jax.SAM2(config), predictor.params)
    track, seen = propagation.track_frames, []

    def noted(*given):
        seen.append(given[5].shape[1])
        return track(*given)

    monkeypatch.setattr(propagation, "track_frames", noted)
    for count, room in zip((1, 3), rows, strict=True):
        answers = []
        for one in (other, predictor):
            state = one.init_state(clip(3))
            for obj_id in range(count):
                one.add_new_points_or_box(state, 0, obj_id, [[30 + obj_id, 18]], [1])
            seen.clear()
            answers.append(masks_of(one.propagate_in_video(state)))
            if one is other:
                assert set(seen) == {room}
        np.testing.assert_allclose(*answers, atol=1e-4)


def snapshot(state):
    return jax.tree.map(
        np.asarray, [(i, dict(vars(h))) for i, h in copy.deepcopy(state.objects).items()]
    )


REFUSED = [
    ("add_new_points_or_box", {"frame_idx": 6, **CLICK}, ValueError, "frames 0 to 5"),
    ("add_new_points_or_box", {"frame_idx": -1, **CLICK}, ValueError, "counted from 0, .* -1"),
    ("add_new_points_or_box", {"frame_idx": 1.5, **CLICK}, TypeError, "float"),
    ("add_new_points_or_box", {"obj_id": ["a"], **CLICK}, TypeError, "unhashable"),
    ("add_new_points_or_box", {"points": [[1, 2]]}, ValueError, "together"),
    ("add_new_points_or_box", {}, ValueError, "Give points"),
    ("add_new_points_or_box", {"points": np.zeros((0, 2)), "labels": []}, ValueError, "empty"),
    ("add_new_points_or_box", {"points": [1, 2], "labels": [1]}, ValueError, r"\[P, 2\]"),
    ("add_new_points_or_box", {"points": [[1, np.inf]], "labels": [1]}, ValueError, "finite"),
    ("add_new_points_or_box", {"points": [[1, 2]], "labels": [7]}, ValueError, "Labels"),
    ("add_new_points_or_box", {"points": [[1, 2]], "labels": [1, 1]}, ValueError, "1 points"),
    ("add_new_points_or_box", {"box": [1, 2, 3]}, ValueError, "x0, y0, x1, y1"),
    (
        "add_new_points_or_box",
        {"box": [1, 2, 3, 4], "clear_old_points": False},
        ValueError,
        "clear_old_points",
    ),
    ("add_new_mask", {"mask": np.ones((1, 4, 4))}, ValueError, r"\[h, w\]"),
    ("add_new_mask", {"mask": np.full((4, 4), np.nan)}, ValueError, "finite"),
    ("add_new_mask", {"mask": np.full((4, 4), "x")}, TypeError, "numbers"),
    ("clear_all_prompts_in_frame", {"obj_id": "nobody"}, RuntimeError, "nobody"),
    ("clear_all_prompts_in_frame", {"frame_idx": 9}, ValueError, "frames 0 to 5"),
    ("remove_object", {"obj_id": "nobody", "strict": True}, RuntimeError, "nobody"),
    ("scores", {"frame_idx": 6}, ValueError, "frames 0 to 5"),
    ("propagate_in_video", {"start_frame_idx": 6}, ValueError, "frames 0 to 5"),
    ("propagate_in_video", {"max_frame_num_to_track": 2.5}, TypeError, "float"),
]


@pytest.mark.parametrize("name, given, error, message", REFUSED)
def test_refused_calls_leave_no_trace(predictor, name, given, error, message):
    state = predictor.init_state(clip())
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    list(predictor.propagate_in_video(state, max_frame_num_to_track=1))
    predictor.add_new_points_or_box(state, 1, 1, **CLICK)
    before = snapshot(state)
    needs = {"frame_idx", "obj_id"} - {
        "propagate_in_video": {"frame_idx", "obj_id"},
        "remove_object": {"frame_idx"},
        "scores": {"obj_id"},
    }.get(name, set())
    arguments = {key: value for key, value in {"frame_idx": 0, "obj_id": 2}.items() if key in needs}
    with pytest.raises(error, match=message):
        answer = getattr(predictor, name)(state, **{**arguments, **given})
        next(answer)  # of a generator
    jax.tree.map(np.testing.assert_array_equal, snapshot(state), before)


def test_refused_sessions(predictor):
    with pytest.raises(TypeError, match="init_state"):
        predictor.add_new_mask({}, 0, 1, np.ones((4, 4)))
    with pytest.raises(RuntimeError, match="No prompts"):
        next(predictor.propagate_in_video(predictor.init_state(clip())))
    with pytest.raises(FileNotFoundError):
        predictor.init_state("no/such/video.mp4")
    with pytest.raises(ValueError, match="frames"):
        predictor.init_state(np.zeros((0, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="empty"):
        predictor.init_state(iter([]))


def test_options_reach_the_model_and_the_predictor(tmp_path):
    path = tmp_path / "small.safetensors"
    sam2jax.save(path, CONFIG, random_params(CONFIG))
    with pytest.warns(UserWarning, match="device, vos_optimized"):
        loaded = sam2jax.SAM2VideoPredictor.from_pretrained(
            path,
            device="cuda",
            vos_optimized=True,
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


def test_the_end_of_an_endless_source_is_not_looked_for(predictor):
    state = predictor.init_state(itertools.cycle(clip(2)))
    for call in (
        lambda: predictor.scores(state, -1),
        lambda: predictor.add_new_points_or_box(state, -1, 1, **CLICK),
        lambda: next(predictor.propagate_in_video(state, -1)),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call()
    assert state.video.reaches(40)


def test_the_encoder_is_compiled_once_for_frames_of_all_sizes(predictor):
    config = dataclasses.replace(CONFIG, image_size=96)
    other = sam2jax.SAM2VideoPredictor(sam2jax.SAM2(config), random_params(config))
    before = programs.encode._cache_size()
    for width in (70, 71, 96):
        state = other.init_state(np.zeros((1, 96, width, 3), np.uint8))
        other.add_new_points_or_box(state, 0, 1, **CLICK)
    assert programs.encode._cache_size() == before + 2  # preprocessed, and of the model's size


def test_frames_may_be_tensors(predictor):
    torch = pytest.importorskip("torch")
    state = predictor.init_state(list(torch.from_numpy(clip(2))))
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    expected = predictor.init_state(clip(2))
    predictor.add_new_points_or_box(expected, 0, 1, **CLICK)
    both = [masks_of(predictor.propagate_in_video(s)) for s in (state, expected)]
    np.testing.assert_array_equal(*both)


def test_a_session_is_saved_while_it_is_tracked(predictor, tmp_path):
    """In another thread: what it is at some moment, and no error."""
    state = predictor.init_state(clip())
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    going, failed = threading.Event(), []

    def save():
        try:
            while going.is_set():
                predictor.save_state(state, tmp_path / "a.npz")
        except Exception as error:
            failed.append(error)

    going.set()
    thread = threading.Thread(target=save)
    thread.start()
    for _ in range(20):
        list(predictor.propagate_in_video(state))
        predictor.clear_all_prompts_in_frame(state, 0, 1)
        predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    going.clear()
    thread.join()
    assert not failed
    assert predictor.load_state(tmp_path / "a.npz", clip()).obj_ids == [1]


def test_a_frame_with_nan_poisons_nothing(predictor, monkeypatch):
    """Nor does it when memories are written once more, after a correction."""
    real = propagation.frame_features

    def broken(model, params, state, frame):
        features = real(model, params, state, frame)
        return jax.tree.map(lambda x: x * np.nan, features) if frame == 2 else features

    monkeypatch.setattr(propagation, "frame_features", broken)
    state = predictor.init_state(clip())
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    masks = masks_of(predictor.propagate_in_video(state))
    assert np.isfinite(masks).all() and (masks[2] < 0).all()
    told = [predictor.scores(state, frame).finite.all() for frame in range(len(masks))]
    assert told == [frame != 2 for frame in range(len(masks))]
    predictor.add_new_points_or_box(state, 3, 1, **CLICK)
    again = masks_of(predictor.propagate_in_video(state, start_frame_idx=3))
    assert np.isfinite(again).all()
