"""Live streams beside the offline tracker, and sessions that survive in files."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import sam2jax
from sam2jax import memory
from sam2jax.config import VARIANTS
from sam2jax.predictors import build as build_module
from sam2jax.predictors import propagation, session
from sam2jax.testing import random_params, small_config

CONFIG = small_config(image_size=64)
SIZE = (48, 80)
MODEL = sam2jax.SAM2(CONFIG)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, seed=3)


@pytest.fixture
def camera(params):
    return sam2jax.SAM2CameraPredictor(MODEL, params)


@pytest.fixture(scope="module")
def predictor(params):
    return sam2jax.SAM2VideoPredictor(MODEL, params)


def clip(length: int) -> np.ndarray:
    frames = np.random.default_rng(0).integers(0, 90, (length, *SIZE, 3), np.uint8)
    for t in range(length):
        frames[t, 10 + t % 20 : 26 + t % 20, 20 + t : 40 + t] += 150
    return frames


class Offline:
    """The video predictor, used as a camera: left and taken up again around every prompt."""

    def __init__(self, predictor, frames):
        self.predictor, self.state, self.at = predictor, predictor.init_state(frames), 0

    def prompt(self, frame, obj_id, **given):
        return self.predictor.add_new_points_or_box(self.state, frame, obj_id, **given)

    def to(self, frame):
        loop = self.predictor.propagate_in_video(self.state, self.at, frame - self.at)
        answers = {index: (ids, masks) for index, ids, masks in loop}
        self.at = frame + 1
        return answers


def test_a_stream_answers_as_the_offline_tracker(camera, predictor):
    """To the last bit: objects that come and go, and corrections, while it runs."""
    frames = clip(24)
    offline = Offline(predictor, frames)
    camera.load_first_frame(frames[0])
    assert camera.frame_idx == 0 and camera.obj_ids == []

    def run(first, last):
        expected = offline.to(last)
        for frame in range(first, last + 1):
            ids, masks = camera.track(Image.fromarray(frames[frame]))
            assert ids == expected[frame][0] and masks.dtype == np.float32
            np.testing.assert_array_equal(masks, expected[frame][1])

    def prompt(frame, obj_id, box=None, **given):
        ours = camera.add_new_prompt(frame, obj_id, bbox=box, **given)
        chex.assert_trees_all_equal(ours, offline.prompt(frame, obj_id, box=box, **given))

    prompt(0, "a", points=[[25, 15]], labels=[1])
    offline.to(0)
    run(1, 7)
    prompt(7, "b", box=[20, 10, 50, 40])
    prompt(7, "a", points=[[50, 10]], labels=[0])
    prompt(7, "a", points=[[30, 20]], labels=[1], clear_old_points=False)
    offline.at = 8
    run(8, 12)
    assert camera.remove_object("a") == ["b"]
    predictor.remove_object(offline.state, "a")
    run(13, 18)
    mask = np.eye(*SIZE) > 0
    chex.assert_trees_all_equal(
        camera.add_new_mask(18, "c", mask), predictor.add_new_mask(offline.state, 18, "c", mask)
    )
    run(19, 23)
    chex.assert_trees_all_equal(camera.scores(), predictor.scores(offline.state, 23))


def test_a_stream_keeps_its_tracker_between_prompts(params, monkeypatch):
    """A policy's own state is more than what frames leave behind, from which it is built anew."""
    built, build_state = [], propagation.build_state

    def build(*given):
        built.append(given[4])
        return build_state(*given)

    monkeypatch.setattr(propagation, "build_state", build)
    policy = memory.sam2long(lineages=2, certainty=1e3, online=True)
    frames, click = clip(16), {"points": [[30, 18]], "labels": [1]}
    camera = sam2jax.SAM2CameraPredictor(MODEL, params, policy=policy)
    camera.load_first_frame(frames[0])
    camera.add_new_prompt(0, 1, **click)
    found = [camera.track(frame)[1] for frame in frames[1:]]
    assert built == [1]
    predictor = sam2jax.SAM2VideoPredictor(MODEL, params, policy=policy)
    state = predictor.init_state(frames)
    predictor.add_new_points_or_box(state, 0, 1, **click)
    expected = [masks for _, _, masks in predictor.propagate_in_video(state)][1:]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_memory_of_a_stream_is_constant(camera):
    frames = clip(40)
    camera.load_first_frame(frames[0])
    camera.add_new_prompt(0, 1, [[25, 15]], [1])
    held = []
    for frame in range(1, 200):
        camera.track(frames[frame % 40])
        if frame % 60 == 0:
            camera.add_new_points(frame, frame, [[25, 15]], [1])
            camera.remove_object(frame)
        held.append(sum(array.nbytes for array in jax.live_arrays()))
    assert max(held[20:]) <= max(held[:20]) * 1.01


def test_of_many_conditioning_frames_some_are_kept(params, monkeypatch):
    monkeypatch.setattr(session, "MOST_COND_FRAMES", 2)
    camera = sam2jax.SAM2CameraPredictor(MODEL, params, add_all_frames_to_correct_as_cond=True)
    frames = clip(40)
    camera.load_first_frame(frames[0])
    for index in range(6):
        camera.add_new_prompt(index, 1, [[25, 15]], [1])
        _, masks = camera.track(frames[index + 1])
    assert np.isfinite(masks).all()
    held = camera._state.objects[1].cond
    assert sorted(held) == [4, 5]


def test_a_stream_without_objects_goes_on(camera):
    frames = clip(5)
    camera.load_first_frame(frames[0])
    ids, masks = camera.track(frames[1])
    assert ids == [] and masks.shape == (0, 1, *SIZE) and camera.frame_idx == 1
    camera.add_new_prompt(1, "late", [[25, 15]], [1])
    assert camera.track(frames[2])[0] == ["late"]
    camera.reset_state()
    assert camera.track(frames[3])[0] == [] and camera.frame_idx == 3
    camera.load_first_frame(frames[0])
    assert camera.frame_idx == 0


def test_refused_by_the_camera(camera):
    with pytest.raises(RuntimeError, match="load_first_frame"):
        camera.track(clip(1)[0])
    with pytest.raises(ValueError, match="uint8 RGB"):
        camera.load_first_frame(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="mode L"):
        camera.load_first_frame(Image.new("L", (4, 4)))
    camera.load_first_frame(clip(1)[0])
    camera.add_new_prompt(0, 1, [[25, 15]], [1])
    with pytest.raises(ValueError, match="last frame only"):
        camera.add_new_prompt(1, 1, [[25, 15]], [1])
    with pytest.raises(ValueError, match="80x48, got 4x5"):
        camera.track(np.zeros((5, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="clear_old_points"):
        camera.add_new_prompt(0, 1, bbox=[1, 2, 3, 4], clear_old_points=False)
    with pytest.raises(RuntimeError, match="nobody"):
        camera.remove_object("nobody", strict=True)
    assert camera.frame_idx == 0 and camera.obj_ids == [1]


def test_a_saved_stream_continues(camera, params, tmp_path):
    frames = clip(12)
    camera.load_first_frame(frames[0])
    camera.add_new_prompt(0, 1, [[25, 15]], [1])
    for frame in frames[1:6]:
        camera.track(frame)
    camera.add_new_prompt(5, 2, [[50, 30]], [1])  # waits for the next frame
    camera.save_state(tmp_path / "stream")
    other = sam2jax.SAM2CameraPredictor(MODEL, params)
    other.load_state(tmp_path / "stream")
    assert other.frame_idx == 5
    chex.assert_trees_all_equal(
        camera.add_new_prompt(5, 1, [[60, 30]], [0]), other.add_new_prompt(5, 1, [[60, 30]], [0])
    )
    for frame in frames[6:]:
        chex.assert_trees_all_equal(camera.track(frame), other.track(frame))


@pytest.mark.parametrize("history", ["all", "none"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_saved_session_continues(predictor, tmp_path, history, offload):
    """On a video in a file, in the middle of a loop, with prompts that wait."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(clip(10)):
        Image.fromarray(frame).save(folder / f"{index}.png")
    options = {"history": history, "offload_state_to_cpu": offload}
    state = predictor.init_state(folder, **options)
    predictor.add_new_points_or_box(state, 0, ("cup", 1), [[25, 15]], [1])
    predictor.add_new_mask(state, 3, "b", np.eye(*SIZE))
    list(predictor.propagate_in_video(state, 0, 5))
    predictor.add_new_points_or_box(state, 4, ("cup", 1), [[60, 30], [10, 10]], [0, 1])
    predictor.save_state(state, tmp_path / "session")
    again = predictor.load_state(tmp_path / "session")
    assert again["obj_ids"] == [("cup", 1), "b"] and again.offload_state_to_cpu == offload

    def go_on(state):
        click = {"points": [[40, 20]], "labels": [1], "clear_old_points": False}
        yield predictor.add_new_points_or_box(state, 4, ("cup", 1), **click)
        yield predictor.add_new_points_or_box(state, 5, "b", **click)
        yield from predictor.propagate_in_video(state, 3)
        yield predictor.clear_all_prompts_in_frame(state, 0, ("cup", 1))
        yield from predictor.propagate_in_video(state, 9, reverse=True)

    try:
        expected = list(go_on(state))
    except RuntimeError as error:  # the cup's only conditioning frame was cleared
        with pytest.raises(RuntimeError) as same:
            list(go_on(again))
        assert str(same.value) == str(error)
    else:
        chex.assert_trees_all_equal(list(go_on(again)), expected)


def test_refused_files(predictor, params, camera, tmp_path):
    frames = clip(3)
    state = predictor.init_state(frames)
    predictor.add_new_points_or_box(state, 0, 1, [[25, 15]], [1])
    path = tmp_path / "session"
    predictor.save_state(state, path)
    with pytest.raises(ValueError, match="video_path"):
        predictor.load_state(path)
    with pytest.raises(ValueError, match="another video"):
        predictor.load_state(path, frames[:, :40])
    with pytest.raises(ValueError, match="SAM2VideoPredictor"):
        camera.load_state(path)
    other = sam2jax.SAM2VideoPredictor(sam2jax.SAM2(small_config(image_size=96)), params)
    with pytest.raises(ValueError, match="image_size"):
        other.load_state(path, frames)
    config = dataclasses.replace(predictor.model.config, objects_at_once=2)
    same = sam2jax.SAM2VideoPredictor(sam2jax.SAM2(config), params)
    assert same.load_state(path, frames)["obj_ids"] == [1]
    with pytest.raises(FileNotFoundError):
        predictor.load_state(tmp_path / "nothing", frames)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + b"x" + whole[middle + 1 :], b"", b"text"):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            predictor.load_state(tmp_path / "damaged", frames)
    np.savez(tmp_path / "foreign.npz", header=np.frombuffer(json.dumps([1]).encode(), np.uint8))
    with pytest.raises(ValueError, match="damaged"):
        predictor.load_state(tmp_path / "foreign.npz", frames)

    camera.load_first_frame(frames[0])
    camera.save_state(tmp_path / "stream")
    for name, value in (("image", np.zeros(3)), ("index", np.array(np.nan))):
        with np.load(tmp_path / "stream") as stream:
            np.savez(tmp_path / "stream.npz", **{**stream, name: value})
        with pytest.raises(ValueError, match="stream.npz holds no frame of a stream"):
            camera.load_state(tmp_path / "stream.npz")

    predictor.add_new_points_or_box(state, 0, frozenset(), [[25, 15]], [1])
    with pytest.raises(TypeError, match="frozenset"):
        predictor.save_state(state, path)
    assert path.read_bytes() == whole  # whole or not at all
    with pytest.raises(FileNotFoundError):
        predictor.save_state(predictor.init_state(frames), tmp_path / "no" / "folder")


def test_the_official_builders(tmp_path, monkeypatch):
    build = sam2jax.build_sam2_video_predictor
    with pytest.raises(ValueError, match="no configuration"):
        build("configs/sam2.1/sam2.1_hiera_x.yaml")
    with pytest.raises(ValueError, match="override"):
        build("sam2_hiera_t.yaml", hydra_overrides_extra=["model.image_size"])
    config = dataclasses.replace(CONFIG, name="sam2.1_hiera_base_plus")
    path = tmp_path / "small.safetensors"
    sam2jax.save(path, config, random_params(config))
    with pytest.raises(ValueError, match="not sam2.1_hiera_tiny"):
        build("configs/sam2.1/sam2.1_hiera_t.yaml", path)
    # Smaller and without the usual initialisation, to be quick.
    monkeypatch.setitem(VARIANTS, config.name, config)
    monkeypatch.setattr(build_module, "init_params", lambda config, key: random_params(config))
    for given in (path, None):
        with pytest.warns(UserWarning, match="device, mode, compile_image_encoder"):
            built = build(
                "configs/sam2.1/sam2.1_hiera_b+.yaml",
                given,
                "cpu",
                "eval",
                apply_postprocessing=False,
                hydra_overrides_extra=[
                    "++model.image_size=96",
                    "++model.non_overlap_masks=true",
                    "++model.compile_image_encoder=true",
                ],
            )
        assert built.config.name == config.name and built.image_size == 96
        assert built.non_overlap_masks and built.config.fill_hole_area == 0
        assert set(built.params) == set(random_params(config))
    assert sam2jax.build_sam2_video_predictor_hf(path).image_size == 64
    larger = {"hydra_overrides_extra": ["++model.image_size=96"]}
    for build in (
        sam2jax.build_sam2_video_predictor_hf,
        sam2jax.SAM2ImagePredictor.from_pretrained,
    ):
        assert build(path, **larger).config.image_size == 96
    model = sam2jax.build_sam2_hf(model_id=path, **larger)
    assert sam2jax.SAM2ImagePredictor(sam_model=model).config.image_size == 96
