"""The tracker under policies other than SAM 2's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam2jax
from sam2jax import Prompts, memory
from sam2jax.io.video import open_video
from sam2jax.memory import POLICIES
from sam2jax.testing import random_params
from sam2jax.tracking import scan
from sam2jax.tracking.frame import process_frame
from sam2jax.tracking.step import encode_frame
from sam2jax.types import EMPTY
from tests.test_tracking import CONFIG, MODEL, TWO, assert_same, clip, stack

LENGTH = 9
OTHERS = {
    "sam3_score": memory.sam3_score(threshold=0.3),
    "samurai": memory.samurai(stable_frames=2, iou_threshold=0.4),
    "dam4sam": memory.dam4sam(iou_threshold=0.1, area_low=0.1, area_high=9.0, apart=1),
    "rcms": memory.rcms(threshold=0.2),
    "sam2long": memory.sam2long(lineages=2, certainty=1e3, online=True),
}


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, seed=3)


def test_every_policy_is_tried():
    assert set(POLICIES) == {"sam2", *OTHERS}


@pytest.mark.slow  # each takes half a minute of compiling
@pytest.mark.parametrize("name", OTHERS)
def test_steps_chunks_and_objects_agree(params, name):
    """A whole clip in one program, and frame by frame; in constant memory."""
    policy, frames = OTHERS[name], clip(LENGTH)
    before = scan._track._cache_size()
    last, whole = sam2jax.track(MODEL, params, frames, TWO, policy=policy)
    state = sam2jax.init_state(MODEL, 2, LENGTH, 1, policy=policy)
    shapes = [jax.tree.map(jnp.shape, x) for x in (state, last)]
    assert shapes[0] == shapes[1]
    singles = []
    for t, frame in enumerate(frames):
        given = TWO if t == 0 else Prompts.none(2, width=2)
        state, out = sam2jax.step(MODEL, params, state, frame, given, policy=policy)
        singles.append(out)
    assert_same(stack(singles), whole)
    sam2jax.track(MODEL, params, frames[::-1], TWO, policy=policy)
    assert scan._track._cache_size() == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_one_program_tracks_a_real_clip(params, media, name):
    """Chunk after chunk, objects together, in constant memory."""
    with open_video(media / "bedroom.mp4", CONFIG.image_size) as video:
        frames = np.stack([frame.image for frame in video.frames(0, 48)])
    policy, before = OTHERS[name], scan._track._cache_size()
    boxes = np.array([[20, 20, 50, 60], [40, 10, 60, 40], [5, 30, 30, 62]])
    state = sam2jax.init_state(MODEL, 3, policy=policy)
    prompts, sizes = Prompts.make(boxes=boxes), []
    for start in range(0, len(frames), 16):
        state, out = sam2jax.track(
            MODEL, params, frames[start : start + 16], prompts, state, policy=policy
        )
        prompts = Prompts.none(3, width=2)
        sizes.append(jax.tree.map(jnp.shape, state))
        assert np.isfinite(out.masks).all() and int(state.frame_index) == start + 16
    assert sizes == sizes[:1] * 3
    assert scan._track._cache_size() == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["samurai", "sam2long"])
def test_objects_do_not_know_of_each_other(params, name):
    policy, frames = OTHERS[name], clip(LENGTH)
    _, both = sam2jax.track(MODEL, params, frames, TWO, policy=policy)
    alone = Prompts.make(points=[[(30, 18)]], width=2)
    _, one = sam2jax.track(MODEL, params, frames, alone, policy=policy)
    np.testing.assert_allclose(one.masks[:, 0], both.masks[:, 0], atol=1e-4)


@pytest.mark.slow
def test_reverse_mirrors_forward(params):
    """Also before the first prompted frame, when several are known ahead."""
    policy, frames = OTHERS["dam4sam"], clip(6)  # its grid of every fifth frame has its mirror
    others = {2: TWO, 4: Prompts.make(points=[[(34, 22)], [(20, 15)]], width=2)}
    mirrored = {5 - index: prompts for index, prompts in others.items()}
    _, forward = sam2jax.track(MODEL, params, frames, others, policy=policy)
    _, found = sam2jax.track(MODEL, params, frames[::-1], mirrored, reverse=True, policy=policy)
    np.testing.assert_allclose(found.masks[::-1], forward.masks, atol=1e-4)
    seen = np.asarray(forward.memory_frames)
    expected = np.where(seen == EMPTY, EMPTY, 5 - seen)
    np.testing.assert_array_equal(np.sort(found.memory_frames[::-1]), np.sort(expected))


@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_known_ahead_begins_with_the_first_in_time(params, reverse):
    policy, frame = OTHERS["samurai"], clip(6)[2]
    state = sam2jax.init_state(MODEL, 2, 6, 2, 5 if reverse else 0, policy=policy)
    for index in (2, 4, 3):
        state = sam2jax.condition(
            MODEL, params, state, frame, TWO, index, reverse=reverse, policy=policy
        )
    first = 4 if reverse else 2
    assert state.carried.accepted.start.tolist() == [first, first]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_policies_differ(params, name):
    """What is compared above is not SAM 2's rule again."""
    frames = clip(LENGTH)
    _, plain = sam2jax.track(MODEL, params, frames, TWO)
    _, out = sam2jax.track(MODEL, params, frames, TWO, policy=OTHERS[name])
    difference = float(np.abs(np.asarray(out.masks) - plain.masks).max())
    if name == "rcms":  # no object is lost here, and until then it is SAM 2's rule
        assert difference < 1e-5
    else:
        assert difference > 1e-3, f"{name} is SAM 2's rule with these settings; see OTHERS"


@pytest.mark.slow
def test_sam2_with_its_options(params):
    """As the same options of the model."""
    frames, options = clip(LENGTH), {"memory_temporal_stride_for_eval": 2}
    model = sam2jax.SAM2(dataclasses.replace(CONFIG, **options))
    _, expected = sam2jax.track(model, params, frames, TWO)
    _, found = sam2jax.track(MODEL, params, frames, TWO, policy=memory.sam2(2))
    assert_same(found, expected)


def test_settings_are_vmapped(params):
    frames, thresholds = clip(LENGTH), jnp.array([0.0, 0.45, 1.0])

    def masks(threshold):
        policy = memory.samurai(iou_threshold=threshold, stable_frames=2)
        return sam2jax.track(MODEL, params, frames, TWO, policy=policy)[1].masks

    together = jax.jit(jax.vmap(masks))(thresholds)
    for row, threshold in zip(together, thresholds, strict=True):
        np.testing.assert_allclose(row, masks(threshold), atol=1e-4)
    assert np.abs(together[0] - together[2]).max() > 1e-3


def crossing(config, settings, carried, candidates, now):
    """Two lineages: each goes on from the other, with another mask."""
    choice = memory.Choice(
        parent=jnp.array([1, 0]),
        best=jnp.array([0, 2]),
        present=candidates.object_score[::-1] > 0,
    )
    return choice, jax.tree.map(lambda x: x[::-1], carried)


def test_answers_are_read_back_along_the_best_lineage(params):
    frames, policy = clip(LENGTH), OTHERS["sam2long"].replace(online=False, choose=crossing)
    _, found = sam2jax.track(MODEL, params, frames, TWO, policy=policy)
    state = sam2jax.init_state(MODEL, 2, LENGTH, 1, policy=policy)
    outputs, parents = [], []

    @jax.jit
    def advance(state, frame, prompts):
        features = encode_frame(MODEL, params, frame)
        return process_frame(MODEL, params, state, features, prompts, jnp.int32(1), policy)

    scaled = sam2jax.tracking.step.scale_prompts(CONFIG, TWO, frames[0])
    for t, frame in enumerate(frames):
        state, result = advance(state, frame, scaled if t == 0 else Prompts.none(2, width=2))
        outputs.append(np.asarray(result.output.masks))
        parents.append(np.asarray(result.parent))
    rows = np.array([0, 2])
    for t in reversed(range(LENGTH)):
        np.testing.assert_allclose(found.masks[t], outputs[t][rows], atol=1e-4)
        others = outputs[t][rows ^ 1]
        assert t == 0 or np.abs(found.masks[t] - others).max() > 1e-2
        rows = parents[t][rows]


@pytest.mark.slow
def test_gradients_pass(params):
    frames = np.asarray(sam2jax.ops.resize.preprocess_image(jnp.asarray(clip(3)), 64))

    def presence(frames, policy):
        return sam2jax.track(MODEL, params, frames, TWO, policy=policy)[1].object_score.sum()

    gradient = jax.jit(jax.grad(presence))(frames, OTHERS["dam4sam"])
    assert np.isfinite(gradient).all() and np.abs(gradient[0]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_predictor_answers_as_track_does(params, name):
    """Also past a frame that was prompted ahead, which the policy is told of in its turn."""
    policy, frames = OTHERS[name], clip(LENGTH)
    predictor = sam2jax.SAM2VideoPredictor(MODEL, params, policy=policy)
    state = predictor.init_state(frames)
    predictor.add_new_points_or_box(state, 0, 1, points=[(30, 18)], labels=[1])
    predictor.add_new_points_or_box(state, 0, 2, box=(5, 5, 40, 30))
    predictor.add_new_points_or_box(state, 4, 1, points=[(34, 22)], labels=[1])
    answers = [masks[:, 0] for _, _, masks in predictor.propagate_in_video(state)]
    prompts = {0: TWO, 4: Prompts.make(points=[[(34, 22)], None], width=2)}
    _, out = sam2jax.track(MODEL, params, frames, prompts, policy=policy)
    expected = sam2jax.resize_masks(out.masks, frames.shape[1:3])
    np.testing.assert_allclose(answers, expected, atol=1e-3)
    # Left and taken up again, it starts from what is remembered.
    again = list(predictor.propagate_in_video(state, start_frame_idx=4))
    assert len(again) == LENGTH - 4 and np.isfinite(again[-1][2]).all()


def test_a_state_of_another_policy_is_refused(params):
    frame = clip(1)[0]
    for name in ("samurai", "rcms", "sam2long"):
        state = sam2jax.init_state(MODEL, 2, policy=OTHERS[name])
        with pytest.raises(ValueError, match="another"):
            sam2jax.step(MODEL, params, state, frame, TWO)
        with pytest.raises(ValueError, match="another"):
            plain = sam2jax.init_state(MODEL, 2)
            sam2jax.step(MODEL, params, plain, frame, TWO, policy=OTHERS[name])


@pytest.mark.slow
def test_a_frame_with_nan_leaves_every_lineage_as_it_was(params):
    policy = OTHERS["sam2long"]
    frames = np.asarray(sam2jax.ops.resize.preprocess_image(jnp.asarray(clip(4)), 64))
    state, _ = sam2jax.track(MODEL, params, frames, TWO, policy=policy)
    after, out = sam2jax.step(MODEL, params, state, frames[0] * np.nan, policy=policy)
    assert not out.finite.any() and int(after.frame_index) == 5
    jax.tree.map(
        np.testing.assert_array_equal, (after.bank, after.carried), (state.bank, state.carried)
    )
