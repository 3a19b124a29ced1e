"""Whole clips through our tracker and the official one, on live weights and real frames."""

import pathlib

import numpy as np
import pytest

from sam2jax.config import NO_POSTPROCESSING
from sam2jax.testing import small_config
from tests.parity.clips import (
    REAL,
    SMALL,
    Prompt,
    click,
    compare,
    ellipse,
    load_clip,
    official,
    ours,
    ours_scanned,
)
from tests.parity.pairs import Pair, at, pair

pytestmark = pytest.mark.parity

SEED = 7  # the masks cover a few percent of the frame, and the object stays in it


def agree(both: Pair, frames: np.ndarray, prompts: list[Prompt], **order) -> None:
    bars = SMALL if both.config.name == "small_test" else REAL
    theirs = official(both, frames, prompts, **order)
    compare(ours(both, frames, prompts, **order), theirs, bars)


@pytest.mark.optimised
@pytest.mark.parametrize("name", ["sam2.1_hiera_tiny", "sam2_hiera_tiny"])
def test_one_object_from_a_click(media: pathlib.Path, name: str):
    both, frames = pair(at(name, 256), SEED), load_clip(media, 256, 24)
    theirs = official(both, frames, [click()])
    compare(ours_scanned(both, frames, [click()]), theirs, REAL)


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize(
    ("name", "image_size", "count"),
    [
        ("sam2.1_hiera_tiny", 1024, 8),  # the last frame reads a full bank
        ("sam2.1_hiera_base_plus", 512, 4),
        ("sam2.1_hiera_large", 256, 4),
    ],
)
def test_full_size(media: pathlib.Path, name: str, image_size: int, count: int):
    agree(pair(at(name, image_size), SEED), load_clip(media, image_size, count), [click()])


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("name", "seed", "shift"), [("sam2.1_hiera_tiny", 10, 0.4), ("sam2_hiera_tiny", 3, 0.0)]
)
def test_object_that_comes_and_goes(media: pathlib.Path, name: str, seed: int, shift: float):
    both, frames = pair(at(name, 256), seed, shift), load_clip(media, 256, 24)
    theirs = official(both, frames, [click()])
    present = [bool(theirs.scores[t][0] > 0) for t in range(24)]
    turns = [b for a, b in zip(present, present[1:], strict=False) if a != b]
    assert True in turns and False in turns, "the seed must make the object leave and return"
    compare(ours(both, frames, [click()]), theirs, REAL)


PROMPTS = {
    "two clicks": Prompt(points=((0.2, 0.6), (0.6, 0.3)), labels=(1, 0)),
    "four clicks": Prompt(
        points=((0.2, 0.6), (0.3, 0.7), (0.8, 0.2), (0.25, 0.5)), labels=(1, 1, 0, 1)
    ),
    "negative click": click(label=0),
    "click off the frame": Prompt(points=((1.1, -0.2),), labels=(1,)),
    "box": Prompt(box=(0.1, 0.4, 0.4, 0.9)),
    "box and click": Prompt(points=((0.2, 0.6),), labels=(1,), box=(0.1, 0.4, 0.4, 0.9)),
    "mask": Prompt(mask=ellipse(540, 960)),
    "mask of the model's size": Prompt(mask=ellipse(256, 256)),
    "small mask": Prompt(mask=ellipse(100, 60)),
    "empty mask": Prompt(mask=np.zeros((540, 960), bool)),
}


@pytest.mark.optimised
@pytest.mark.parametrize("name", PROMPTS)
def test_kinds_of_prompt(media: pathlib.Path, name: str):
    both = pair(at("sam2.1_hiera_tiny", 256), SEED)
    agree(both, load_clip(media, 256, 5), [PROMPTS[name]])


@pytest.mark.parametrize("postprocessing", [True, False])
@pytest.mark.parametrize("length", [1, 2, 5, 15, 16, 17])
def test_length_of_the_clip_scales_pointer_distances(
    media: pathlib.Path, length: int, postprocessing: bool
):
    config = small_config(**({} if postprocessing else NO_POSTPROCESSING))
    agree(pair(config, 4), load_clip(media, config.image_size, 24)[:length], [click()])


def on(*frames: int, obj: int = 0) -> list[Prompt]:
    """A click that moves, on each of `frames`."""
    return [click(t, obj, at=(210 + 20 * t + 100 * obj, 350 - 10 * t)) for t in frames]


SCRIPTS = {
    "from the middle": (on(9), {"start": 9}),
    "a second one in the middle": (on(0, 8), {}),
    "the only one lies ahead": (on(6), {"start": 2}),
    "one now and two ahead": (on(3, 7, 12), {"start": 3}),
    "behind the start": (on(1, 5), {"start": 8}),
    "backwards": (on(15), {"start": 15, "reverse": True}),
    "backwards, one behind and one ahead": (on(4, 10, 15), {"start": 12, "reverse": True}),
    "two objects at once": (on(0) + on(0, obj=1), {}),
    "three objects, on frames of their own": (
        on(0) + on(5, obj=1) + on(0, 9, obj=2),
        {},
    ),
    "objects with prompts of other kinds": (
        [click(), Prompt(obj=1, mask=ellipse(540, 960)), Prompt(3, 2, box=(0.1, 0.4, 0.4, 0.9))],
        {},
    ),
}
OPTIONS = {
    "default": {},
    "odd size": {"image_size": 96},
    "two conditioning frames at most": {"max_cond_frames_in_attn": 2},
    "stride 3": {"memory_temporal_stride_for_eval": 3},
    "2.0": {"no_obj_embed_spatial": False, "add_tpos_enc_to_obj_ptrs": False},
    "fewer memories": {"num_maskmem": 4, "max_obj_ptrs_in_encoder": 6},
    "always one mask": {"multimask_max_pt_num": 0},
    "no postprocessing": NO_POSTPROCESSING,
}


SHORTLIST = (
    "one now and two ahead",
    "backwards, one behind and one ahead",
    "three objects, on frames of their own",
)


@pytest.mark.parametrize(
    ("option", "script"),
    [(o, s) for o in OPTIONS for s in SCRIPTS if o == "default" or s in SHORTLIST],
)
def test_scripts(media: pathlib.Path, option: str, script: str):
    config = small_config(**OPTIONS[option])
    prompts, order = SCRIPTS[script]
    agree(pair(config, 4), load_clip(media, config.image_size, 16), prompts, **order)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_many_conditioning_frames(media: pathlib.Path, stride: int, reverse: bool):
    """More than `max_cond_frames_in_attn`: the rest may stand in for recent frames."""
    config = small_config(max_cond_frames_in_attn=3, memory_temporal_stride_for_eval=stride)
    prompts, start = on(0, 2, 3, 7, 8, 11, 15), 15 if reverse else 0
    frames = load_clip(media, config.image_size, 16)
    agree(pair(config, 4), frames, prompts, start=start, reverse=reverse)
