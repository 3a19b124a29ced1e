"""Several videos at once: padded, masked and sharded, with the answers of each alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sam2jax
from sam2jax import ClipPrompts, Prompts, memory
from sam2jax.testing import random_params
from sam2jax.types import EMPTY, NO_OBJ_SCORE
from tests.test_tracking import MODEL, TWO, clip

LENGTHS = 6, 4
LONGEST = max(LENGTHS)
CLIPS = [clip(length, seed=seed) for seed, length in enumerate(LENGTHS)]
ONE = Prompts.make(points=[[(12, 40)]])  # the second video has one object, the first has two
PROMPTS = TWO, ONE
POLICIES = {"sam2": memory.SAM2, "sam2long": memory.sam2long(lineages=2, certainty=1e3)}


def padded(frames: np.ndarray) -> np.ndarray:
    extra = np.full((LONGEST - len(frames), *frames.shape[1:]), 77, np.uint8)
    return np.concatenate([frames, extra])


FRAMES = np.stack([padded(frames) for frames in CLIPS])


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL.config, seed=3)


def agree(out, params, **options) -> None:
    """Each video's answers, up to its length and its number of objects, are those of it alone."""
    for index, (frames, prompts) in enumerate(zip(CLIPS, PROMPTS, strict=True)):
        state, alone = sam2jax.track(MODEL, params, frames, prompts, **options)
        rows = jax.tree.map(lambda x, i=index: x[i], out)
        length, objects = len(frames), prompts.num_objects
        for name in ("masks", "iou", "object_score"):
            ours, expected = getattr(rows, name), getattr(alone, name)
            np.testing.assert_allclose(ours[:length, :objects], expected, atol=1e-4, err_msg=name)
        for name in ("memory_frames", "pointer_frames"):
            ours, expected = getattr(rows, name), getattr(alone, name)
            np.testing.assert_array_equal(ours[:length, :objects], expected)
            assert (ours[length:] == EMPTY).all() and (ours[:, objects:] == EMPTY).all()
        assert (rows.masks[length:] == NO_OBJ_SCORE).all()
        assert (rows.masks[:, objects:] == NO_OBJ_SCORE).all()


@pytest.mark.parametrize("policy", ["sam2", pytest.param("sam2long", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_videos_of_different_lengths(params, policy, reverse):
    options = {"policy": POLICIES[policy], "reverse": reverse}
    states, out = sam2jax.track(
        MODEL, params, FRAMES, Prompts.stack(PROMPTS), lengths=np.array(LENGTHS), **options
    )
    agree(out, params, **options)
    assert states.frame_index.tolist() == ([-1, -1] if reverse else list(LENGTHS))
    for index, (frames, prompts) in enumerate(zip(CLIPS, PROMPTS, strict=True)):
        state, _ = sam2jax.track(MODEL, params, frames, prompts, **options)
        held = jax.tree.map(lambda x, i=index: x[i], states.bank)
        rows = prompts.num_objects * POLICIES[policy].lineages
        np.testing.assert_array_equal(held.recent_frame[:rows], state.bank.recent_frame)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_prompts_on_other_frames(params, reverse):
    """Those behind a video's end are passed over."""
    for frames in ((0, 3), (0, 5)):
        prompts = ClipPrompts.make(dict.fromkeys(frames, ONE))
        both = jax.tree.map(lambda x: jnp.stack([x, x]), prompts)
        given = {"lengths": np.array(LENGTHS), "reverse": reverse}
        _, out = sam2jax.track(MODEL, params, FRAMES, both, **given)
        for index, video in enumerate(CLIPS):
            _, alone = sam2jax.track(MODEL, params, video, prompts, reverse=reverse)
            np.testing.assert_allclose(out.masks[index, : len(video)], alone.masks, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("reverse", "lengths"), [(False, None), (False, LENGTHS), (True, LENGTHS)])
def test_chunks_go_on_from_states(params, reverse, lengths):
    """Two chunks of three frames; the second video ends in one of them."""
    ends = np.array(lengths or [LONGEST] * 2)
    prompts, options = Prompts.stack(PROMPTS), {"reverse": reverse}
    whole_options = options if lengths is None else {**options, "lengths": ends}
    _, whole = sam2jax.track(MODEL, params, FRAMES, prompts, **whole_options)
    state = sam2jax.init_state(MODEL, 2, None, 1, LONGEST - 1 if reverse else 0)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    states = states.replace(num_frames=jnp.asarray(ends, jnp.int32))
    first = ClipPrompts(
        frames=jnp.asarray(ends - 1 if reverse else 0 * ends, jnp.int32)[:, None],
        prompts=jax.tree.map(lambda x: x[:, None], prompts),
    )
    parts = {}
    for start in (3, 0) if reverse else (0, 3):
        if lengths is not None:
            options["lengths"] = np.clip(ends - start, 0, 3)
        frames = FRAMES[:, start : start + 3]
        states, parts[start] = sam2jax.track(MODEL, params, frames, first, states, **options)
    for index, end in enumerate(ends):
        joined = np.concatenate([parts[0].masks[index], parts[3].masks[index]])
        np.testing.assert_allclose(joined[:end], whole.masks[index, :end], atol=1e-4)
        assert (joined[end:] == NO_OBJ_SCORE).all()


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["videos", "objects"])
def test_sharded_over_devices(params, axis):
    """By videos and by objects, through shardings of what goes in."""
    mesh = jax.make_mesh((2,), ("devices",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    prompts = Prompts.stack(PROMPTS)
    if axis == "videos":
        frames = prompt = NamedSharding(mesh, PartitionSpec("devices"))
    else:
        frames, prompt = everywhere, NamedSharding(mesh, PartitionSpec(None, "devices"))

    def run(params, frames, prompts):
        return sam2jax.track(MODEL, params, frames, prompts, lengths=jnp.array(LENGTHS))[1]

    out = jax.jit(run, in_shardings=(everywhere, frames, prompt))(params, FRAMES, prompts)
    if axis == "videos":
        assert len(out.masks.addressable_shards) == 2
        assert out.masks.addressable_shards[0].data.shape[0] == 1
    agree(jax.device_get(out), params)


def test_what_is_refused(params):
    with pytest.raises(ValueError, match="lengths"):
        sam2jax.track(MODEL, params, FRAMES, Prompts.stack(PROMPTS), lengths=np.ones(3, int))
    with pytest.raises(ValueError, match="from 0 to 6"):
        sam2jax.track(MODEL, params, FRAMES, Prompts.stack(PROMPTS), lengths=np.array([7, 4]))
    with pytest.raises(ValueError, match="one for each video"):
        sam2jax.track(MODEL, params, FRAMES, ONE)
    with pytest.raises(ValueError, match="several videos"):
        sam2jax.track(MODEL, params, CLIPS[0], TWO, lengths=np.ones(1, int))
    with pytest.raises(TypeError, match="Prompts.stack"):
        sam2jax.track(MODEL, params, FRAMES, {0: TWO})
    with pytest.raises(ValueError, match="Nothing to track"):
        sam2jax.track(MODEL, params, FRAMES)
    with pytest.raises(ValueError, match="No prompts"):
        Prompts.stack([])
