"""The tracker: one step in all its forms, prompts, directions, and what it costs."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sam2jax
from sam2jax import ClipPrompts, Prompts
from sam2jax.ops.resize import preprocess_image
from sam2jax.testing import random_params, small_config
from sam2jax.tracking import frame as one_frame
from sam2jax.tracking import scan
from sam2jax.types import EMPTY, NO_OBJ_SCORE

CONFIG = small_config(image_size=64)
MODEL = sam2jax.SAM2(CONFIG)
SIZE = (48, 80)  # height and width of the clip


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, seed=3)


@functools.cache
def clip(length: int, seed: int = 0) -> np.ndarray:
    """A bright square that wanders over noise: uint8 [T, H, W, 3]."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 90, (length, *SIZE, 3), np.uint8)
    for t in range(length):
        frames[t, 10 + t : 26 + t, 20 + 2 * t : 40 + 2 * t] += 150
    return frames


def click(*points, labels=None) -> Prompts:
    """Clicks on the first of two objects."""
    labels = None if labels is None else [labels, None]
    return Prompts.make(points=[list(points), None], labels=labels, width=2)


# Most tests share one program: six frames, two objects, two points.
LENGTH = 6
NOTHING = Prompts.none(2, width=2)
FIRST = click((30, 18))
TWO = Prompts.make(points=[[(30, 18)], None], boxes=[None, (5, 5, 40, 30)])


def assert_same(one: sam2jax.FrameOutput, other: sam2jax.FrameOutput) -> None:
    """Within rounding, with the same discrete choices."""
    chex.assert_trees_all_close(one, other, atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_equal(one.memory_frames, other.memory_frames)
    chex.assert_trees_all_equal(one.pointer_frames, other.pointer_frames)
    np.testing.assert_array_equal(one.masks > 0, other.masks > 0)


def stack(outputs):
    return jax.tree.map(lambda *x: jnp.stack(x), *outputs)


def test_step_track_and_chunks_agree(params):
    frames = clip(LENGTH)
    _, whole = sam2jax.track(MODEL, params, frames, TWO)
    assert whole.masks.shape == (LENGTH, 2, 16, 16)
    assert float(jnp.max(whole.object_score[1:])) > 0  # there is something to compare

    state, singles = sam2jax.init_state(MODEL, 2, LENGTH, 1), []
    for t, frame in enumerate(frames):
        state, out = sam2jax.step(MODEL, params, state, frame, TWO if t == 0 else NOTHING)
        singles.append(out)
    assert_same(stack(singles), whole)

    state = sam2jax.init_state(MODEL, 2, LENGTH, 1)
    state, first = sam2jax.track(MODEL, params, frames[:3], TWO, state)
    state, second = sam2jax.track(MODEL, params, frames[3:], NOTHING, state)
    assert int(state.frame_index) == LENGTH
    assert_same(jax.tree.map(lambda *x: jnp.concatenate(x), first, second), whole)


def test_prompts_ahead_are_seen_by_earlier_frames(params):
    frames, later = clip(LENGTH), Prompts.make(points=[None, [(45, 25)]], width=2)
    prompts = {0: FIRST, 4: later}
    _, whole = sam2jax.track(MODEL, params, frames, prompts)
    assert whole.memory_frames[1, 1, 0] == 4  # the second object is tracked from its future

    state = sam2jax.init_state(MODEL, 2, LENGTH, 2)
    state = sam2jax.condition(MODEL, params, state, frames[4], later, 4)
    outputs = []
    for t, frame in enumerate(frames):
        state, out = sam2jax.step(MODEL, params, state, frame, prompts.get(t, NOTHING))
        outputs.append(out)
    assert_same(stack(outputs), whole)


def test_reverse_mirrors_forward_but_for_the_order_of_answers(params):
    frames = clip(LENGTH)
    _, backward = sam2jax.track(MODEL, params, frames[::-1], FIRST, reverse=True)
    _, forward = sam2jax.track(MODEL, params, frames, FIRST)
    chex.assert_trees_all_close(backward.masks[::-1], forward.masks, atol=1e-5)
    state, _ = sam2jax.track(MODEL, params, frames, FIRST, reverse=True)
    assert int(state.frame_index) == -1


def test_objects_together_give_what_they_give_alone(params):
    frames = clip(LENGTH)
    _, both = sam2jax.track(MODEL, params, frames, TWO)
    for index in range(2):
        alone = jax.tree.map(lambda x, i=index: x[i : i + 1], TWO)  # the same shapes: one program
        _, out = sam2jax.track(MODEL, params, frames, alone)
        assert_same(out, jax.tree.map(lambda x, i=index: x[:, i : i + 1], both))


def test_wider_padding_changes_nothing(params):
    frames = clip(LENGTH)
    given = {"points": [[(30, 18), (60, 40)], None], "labels": [[1, 0], None]}
    _, narrow = sam2jax.track(MODEL, params, frames, Prompts.make(**given))
    wide = Prompts.make(**given, width=8)
    assert_same(sam2jax.track(MODEL, params, frames, wide)[1], narrow)


def test_an_object_without_memory_answers_absent_and_writes_nothing(params):
    state, out = sam2jax.track(MODEL, params, clip(LENGTH), FIRST)
    np.testing.assert_array_equal(out.masks[:, 1], NO_OBJ_SCORE)
    assert float(jnp.max(out.object_score[:, 1])) < 0
    assert bool(jnp.all(state.bank.recent_frame[1] == EMPTY))
    assert state.bank.recent_frame[0].max() == LENGTH - 1


def test_a_mask_prompt_is_the_answer(params):
    mask = np.zeros(SIZE, bool)
    mask[8:32, 16:48] = True
    prompts = Prompts.make(masks=[mask, np.zeros(SIZE, bool)])
    state = sam2jax.init_state(MODEL, 2, LENGTH, 1)
    _, out = sam2jax.step(MODEL, params, state, clip(LENGTH)[0], prompts)
    answer = sam2jax.resize_masks(out.masks[:1], SIZE)[0] > 0
    assert (answer == mask).mean() > 0.97
    assert out.object_score[0] == 10 and out.iou[0] == 1
    # An empty mask is an object that is absent.
    assert out.object_score[1] == -10 and float(out.masks[1].max()) < 0


def test_frames_may_be_preprocessed(params):
    frame = clip(LENGTH)[0]
    ready = preprocess_image(jnp.asarray(frame)[None], CONFIG.image_size)[0]
    scaled = click((30 * 64 / SIZE[1], 18 * 64 / SIZE[0]))
    state = sam2jax.init_state(MODEL, 2, LENGTH, 1)
    _, one = sam2jax.step(MODEL, params, state, frame, FIRST)
    _, other = sam2jax.step(MODEL, params, state, ready, scaled)
    chex.assert_trees_all_close(one.masks, other.masks, atol=1e-4)


def test_a_second_video_compiles_nothing(params):
    sam2jax.track(MODEL, params, clip(LENGTH), FIRST)
    before = scan._track._cache_size()
    sam2jax.track(MODEL, params, clip(LENGTH, seed=1), click((50, 30)))
    other = jax.tree.map(lambda x: x * 0.9, params)
    sam2jax.track(MODEL, other, clip(LENGTH, seed=2), click((10, 30), labels=[0]))
    assert scan._track._cache_size() == before


def test_one_trace_serves_every_frame_prompted_or_not(params):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, state, frame, prompts):
        return sam2jax.step(MODEL, params, state, frame, prompts)

    state = sam2jax.init_state(MODEL, 2, LENGTH, 1)
    for frame, prompts in zip(clip(LENGTH), (FIRST, NOTHING, TWO), strict=False):
        state, _ = run(params, state, frame, prompts)
    assert state.bank.cond_frame.tolist() == [[2], [2]]


def test_memory_does_not_grow_with_the_clip(params):
    def temporary_bytes(length: int) -> int:
        frames = jax.ShapeDtypeStruct((length, *SIZE, 3), jnp.uint8)
        compiled = jax.jit(lambda p, f: sam2jax.track(MODEL, p, f, FIRST)).lower(params, frames)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(200) == temporary_bytes(50)


def test_videos_can_be_vmapped(params):
    frames = np.stack([clip(LENGTH), clip(LENGTH, seed=1)])
    prompts = [click((30, 18)), click((12, 40))]
    run = jax.jit(jax.vmap(lambda f, p: sam2jax.track(MODEL, params, f, p)[1]))
    together = run(frames, stack(prompts))
    for index in range(2):
        _, alone = sam2jax.track(MODEL, params, frames[index], prompts[index])
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=index: x[i], together).masks, alone.masks, atol=1e-4
        )


def test_refinement_feeds_back_an_earlier_answer(params):
    frames = clip(LENGTH)
    state, out = sam2jax.track(MODEL, params, frames, FIRST)
    again = state.replace(frame_index=jnp.int32(2))
    clicks = {"points": [[(30, 18)], None], "labels": [[0], None], "refine": True}
    answers = []
    for logits in (out.masks[2, 0], out.masks[2, 0] * 0 + 5):
        prompts = Prompts.make(**clicks, logits=[logits, None], width=2)
        refined, answer = sam2jax.step(MODEL, params, again, frames[2], prompts)
        answers.append(answer.iou[0])
    assert abs(answers[0] - answers[1]) > 1e-4
    assert refined.bank.cond_frame[0].tolist() == [0]  # a corrected frame is not conditioning


def test_logits_without_points_are_no_prompt(params):
    """Those of an object that is only tracked are passed over."""
    frames = clip(LENGTH)
    state, out = sam2jax.track(MODEL, params, frames[:2], TWO)
    clicks = {"points": [[(30, 18)], None], "labels": [[0], None], "refine": True}
    answers = []
    for logits in (out.masks[1, 1], None):
        prompts = Prompts.make(**clicks, logits=[out.masks[1, 0], logits], width=2)
        answers.append(sam2jax.step(MODEL, params, state, frames[2], prompts)[1])
    assert_same(*answers)
    assert answers[0].object_score[1] > NO_OBJ_SCORE


@pytest.mark.parametrize("together, rows", [(2, 2), (3, 3), (4, 3), (8, 5)])
def test_objects_are_taken_a_few_at_a_time(params, together, rows, monkeypatch):
    """In as few and as equal groups as there can be, whatever their number."""
    frames = clip(3)
    prompts = Prompts.make(points=[[(30 + 4 * i, 18)] for i in range(5)])
    _, expected = sam2jax.track(MODEL, params, frames, prompts)
    answer, seen = one_frame._answer_group, []

    def noted(*given):
        seen.append(given[4].num_objects)
        return answer(*given)

    monkeypatch.setattr(one_frame, "_answer_group", noted)
    model = sam2jax.SAM2(dataclasses.replace(CONFIG, objects_at_once=together))
    _, found = sam2jax.track(model, params, frames, prompts)
    assert set(seen) == {rows}
    chex.assert_trees_all_close(found, expected, atol=1e-4)


def test_frames_are_counted_from_zero(params):
    with pytest.raises(ValueError, match="prompts of frame -1"):
        sam2jax.track(MODEL, params, clip(2), {0: FIRST, -1: FIRST})
    state = sam2jax.init_state(MODEL, 2)
    with pytest.raises(ValueError, match="frame_index -1"):
        sam2jax.condition(MODEL, params, state, clip(1)[0], FIRST, -1)
    with pytest.raises(ValueError, match="frame_index -2"):
        sam2jax.init_state(MODEL, 2, frame_index=-2)


def test_memories_may_be_read_pooled(params):
    """What is written stays whole, so that only frames that read memory are answered otherwise."""
    frames = clip(LENGTH)
    pooling = sam2jax.SAM2(dataclasses.replace(CONFIG, memory_pooling=2))
    _, whole = sam2jax.track(MODEL, params, frames, TWO)
    state, pooled = sam2jax.track(pooling, params, frames, TWO)
    assert bool(jnp.all(pooled.finite))
    np.testing.assert_array_equal(pooled.memory_frames, whole.memory_frames)
    difference = jnp.max(jnp.abs(pooled.masks - whole.masks), axis=(1, 2, 3))
    assert difference[0] < 1e-5 and jnp.all(difference[1:] > 1e-3)
    assert state.bank.recent_spatial.shape[-2] == CONFIG.feature_size**2


def test_bfloat16_computes_and_answers_in_float32(params):
    model = sam2jax.SAM2(small_config(image_size=64, dtype="bfloat16"))
    state = sam2jax.init_state(model, 2, LENGTH, 1)
    state, _ = sam2jax.step(model, params, state, clip(LENGTH)[0], FIRST)
    _, out = sam2jax.step(model, params, state, clip(LENGTH)[1], NOTHING)
    assert out.masks.dtype == jnp.float32 and bool(jnp.isfinite(out.masks).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prepared_parameters_answer_alike(params, dtype):
    model = sam2jax.SAM2(small_config(image_size=64, dtype=dtype))
    prepared = sam2jax.prepare_params(model, params)
    again = sam2jax.prepare_params(model, prepared)
    jax.tree.map(np.testing.assert_array_equal, again, prepared)
    state = sam2jax.init_state(model, 2, LENGTH, 1)
    state, _ = sam2jax.step(model, params, state, clip(LENGTH)[0], FIRST)
    step = functools.partial(sam2jax.step, model)
    given = state, clip(LENGTH)[1], NOTHING
    answers = [step(p, *given)[1] for p in (params, prepared)]
    jax.tree.map(np.testing.assert_array_equal, *answers)
    programs = [jax.make_jaxpr(step)(p, *given) for p in (params, prepared)]
    transposes, casts = (
        [str(p).count(name) for p in programs] for name in ("transpose[", "new_dtype=bfloat16")
    )
    assert transposes[1] < transposes[0]
    assert dtype == "float32" or casts[1] < casts[0]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s, f: (s, f[0]), ValueError, "uint8"),
        (lambda s, f: (s, f.astype(np.float32)), ValueError, "pass uint8"),
        (lambda s, f: (s, f.astype(np.int32)), TypeError, "int32"),
        (lambda s, f: (s, f.tolist()), TypeError, "list"),
        (lambda s, f: (s, f, Prompts.none(3)), ValueError, "2 objects"),
        (lambda s, f: (s, f, "click"), TypeError, "Prompts"),
        (lambda s, f: (None, f), TypeError, "init_state"),
    ],
)
def test_what_does_not_fit_is_refused_before_compiling(params, call, error, message):
    state = sam2jax.init_state(MODEL, 2)
    with pytest.raises(error, match=message):
        sam2jax.step(MODEL, params, *call(state, clip(1)[0]))


def test_model_and_parameters_are_told_apart(params):
    state, frame = sam2jax.init_state(MODEL, 2), clip(1)[0]
    features = sam2jax.encode_image(MODEL, params, frame[None])
    for call in (
        lambda model, params: sam2jax.step(model, params, state, frame),
        lambda model, params: sam2jax.condition(model, params, state, frame, FIRST, 0),
        lambda model, params: sam2jax.track(model, params, frame[None], FIRST),
        lambda model, params: sam2jax.track(model, params, frame[None, None], FIRST),
        lambda model, params: sam2jax.encode_image(model, params, frame[None]),
        lambda model, params: sam2jax.decode_masks(model, params, features, FIRST),
    ):
        for given, message in (
            ((params, MODEL), "a model, .* got a dict"),
            ((MODEL, None), "parameters, .* got a NoneType"),
            ((MODEL, {"params": params}), r"got a dict of \['params'\]"),
        ):
            with pytest.raises(TypeError, match=message):
                call(*given)


def test_a_state_of_another_model_is_refused(params):
    state = sam2jax.init_state(sam2jax.SAM2(small_config(image_size=128)), 1)
    with pytest.raises(ValueError, match="another model"):
        sam2jax.step(MODEL, params, state, clip(1)[0])


def test_nothing_to_track_is_refused(params):
    with pytest.raises(ValueError, match="give prompts"):
        sam2jax.track(MODEL, params, clip(2))
    with pytest.raises(ValueError, match="None of the prompted frames"):
        sam2jax.track(MODEL, params, clip(2), {7: FIRST})


def test_a_policy_is_not_a_name(params):
    state, frame = sam2jax.init_state(MODEL, 2), clip(1)[0]
    for call in (
        lambda: sam2jax.init_state(MODEL, 2, policy="samurai"),
        lambda: sam2jax.step(MODEL, params, state, frame, policy="samurai"),
        lambda: sam2jax.track(MODEL, params, frame[None], FIRST, policy="samurai"),
        lambda: sam2jax.SAM2VideoPredictor(MODEL, params, policy="samurai"),
    ):
        with pytest.raises(TypeError, match="a policy"):
            call()


def test_masks_of_bytes_are_refused():
    with pytest.raises(ValueError, match="from 0 to 255"):
        Prompts.make(masks=[np.eye(8) * 255])


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "one entry per object"),
        ({"points": []}, "one entry per object"),
        ({"points": [[(1, 2)], None], "boxes": [None]}, "one length"),
        ({"points": [(1, 2)]}, r"\[P, 2\]"),
        ({"points": [[(1, float("nan"))]]}, "finite"),
        ({"points": [[(1, 2)]], "labels": [[4]]}, "Labels"),
        ({"points": [[(1, 2)]], "labels": [[1, 0]]}, "1 points"),
        ({"points": [None], "labels": [[1]]}, "no points"),
        ({"boxes": [(1, 2, 3)]}, "x0, y0, x1, y1"),
        ({"masks": [np.ones((2, 2, 2))]}, r"\[h, w\]"),
        ({"masks": [np.ones((2, 2))], "points": [[(1, 2)]]}, "both"),
        ({"points": [[(1, 2), (3, 4)]], "width": 1}, "too small"),
        ({"points": [[(1, 2)]], "width": float("inf")}, "width must be a whole number"),
        ({"points": [[(1, 2)]], "width": 10**12}, "whole number, 65536 at most"),
        ({"boxes": [[0, 0, 4, {}]]}, "box of object 0 must be an array of numbers"),
        ({"points": [[(1, 2), (3, 4)]], "labels": [[None, 7]]}, "Labels of object 0"),
        ({"boxes": 2}, "boxes must be a list of one entry per object, got 2"),
        ({"masks": {"a": 1}}, "masks must be a list"),
    ],
)
def test_prompts_say_what_is_wrong_with_them(given, message):
    with pytest.raises(ValueError, match=message):
        Prompts.make(**given)


def test_clip_prompts_widen_to_the_widest():
    prompts = ClipPrompts.make({2: FIRST, 5: Prompts.make(points=[[(1, 2), (3, 4), (5, 6)], None])})
    assert prompts.frames.tolist() == [2, 5]
    assert prompts.prompts.points.shape == (2, 2, 4, 2)
    assert prompts.prompts.num_points.tolist() == [[1, 0], [3, 0]]


@pytest.mark.parametrize("number", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_a_frame_with_nan_or_infinity_leaves_nothing_behind(params, number):
    """It counts as one without the object; those after it are as if it had been skipped."""
    frames = np.asarray(preprocess_image(jnp.asarray(clip(6)), CONFIG.image_size))
    broken = frames.copy()
    broken[3, 5, 7] = number
    state, out = sam2jax.track(MODEL, params, broken, TWO)
    for values in jax.tree.leaves((state, out)):
        assert np.isfinite(np.asarray(values, np.float32)).all()
    np.testing.assert_array_equal(out.finite.sum(axis=1), [2, 2, 2, 0, 2, 2])
    assert (out.masks[3] < 0).all() and (out.object_score[3] < 0).all()
    assert (out.memory_frames[4:] != 3).all() and (out.pointer_frames[4:] != 3).all()
    _, whole = sam2jax.track(MODEL, params, frames, TWO)
    assert_same(jax.tree.map(lambda x: x[:3], out), jax.tree.map(lambda x: x[:3], whole))

    # A prompted frame that is broken leaves the object unknown.
    broken[0, 0, 0] = number
    state, out = sam2jax.track(MODEL, params, broken[:2], TWO)
    assert not out.finite[0].any() and (out.masks < 0).all()
    assert not np.asarray(state.bank.has_memory).any()


def test_one_object_does_not_poison_the_other(params):
    broken = TWO.replace(points=TWO.points.at[1].set(np.nan))
    _, out = sam2jax.track(MODEL, params, clip(LENGTH), broken)
    _, expected = sam2jax.track(MODEL, params, clip(LENGTH), TWO)
    np.testing.assert_allclose(out.masks[:, 0], expected.masks[:, 0], atol=1e-4)
    assert np.isfinite(out.masks).all() and out.finite[:, 0].all() and not out.finite[0, 1]
    assert (out.masks[:, 1] < 0).all()
