"""Scripts of calls to the official video predictor and to ours."""

import pathlib
from collections.abc import Callable

import pytest
import torch

from sam2jax.config import NO_POSTPROCESSING
from sam2jax.testing import small_config
from tests.parity.clips import REAL, SMALL, ellipse, load_clip
from tests.parity.pairs import at, iou, pair
from tests.parity.sessions import SIZE, Both, Refused

pytestmark = pytest.mark.parity

LENGTH = 12  # of the clip, in frames


def corrections(both: Both) -> int:
    """Every kind of prompt, on several frames; tracked frames are corrected. Returns how many
    answers there must have been, as all scripts do."""
    both.click(3, "a", (21, 35, 1))
    both.click(3, "a", (40, 30, 0), clear_old_points=False)
    both.box(5, 7, (10, 10, 50, 45))
    both.mask(0, "m", ellipse(*SIZE))
    both.propagate(3)
    both.propagate(5, reverse=True)
    both.click(6, "a", (50, 20, 0))
    both.click(6, "a", (20, 20, 1), clear_old_points=False)
    both.click(3, 7, (30, 20, 1))  # a second conditioning frame, or a correction of a tracked one
    both.mask(8, "a", ellipse(30, 30))
    both.propagate(max_frame_num_to_track=9)
    both.propagate(10, max_frame_num_to_track=4, reverse=True)
    return 8 + 9 + 6 + 10 + 5


def objects_leave(both: Both) -> int:
    """Prompts are cleared, before and after they were tracked; objects are removed."""
    both.click(2, "a", (21, 35, 1), (60, 10, 0), (30, 40, 1))
    both.box(4, 7, (10, 10, 50, 45))
    both.mask(4, "m", ellipse(*SIZE))
    both.click(6, "m", (30, 30, 1))
    both.clear(6, "m")  # while it waits for tracking
    both.clear(9, "a")  # there is nothing
    both.propagate(2, max_frame_num_to_track=5)
    both.click(4, "a", (50, 20, 1))
    both.click(9, 7, (20, 20, 1))
    both.clear(4, "a")
    both.clear(4, 7)  # another prompt is left
    both.click(4, 7, (30, 20, 1))  # as if that frame had never been tracked
    both.clear(4, 7)
    both.propagate()
    both.remove("m")  # answers on frame 4
    both.click(5, "new", (50, 20, 1))
    both.propagate(7, reverse=True)
    both.remove("a")
    return 4 + 2 + 6 + 2 + 4 + 10 + 1 + 1 + 8 + 1


def broken_off(both: Both) -> int:
    """Tracking is broken off, prompts are added, and it goes on."""
    both.click(1, "a", (21, 35, 1))
    both.propagate(after=4)
    both.click(3, "a", (50, 20, 0))  # was tracked
    both.box(6, "a", (10, 10, 50, 45))  # was not
    both.propagate(4, after=2)
    both.mask(8, 7, ellipse(*SIZE))  # a new object
    both.propagate(11, reverse=True, after=5)
    both.propagate(3, max_frame_num_to_track=0)
    both.propagate(0, reverse=True)  # nothing
    both.call("reset_state")
    both.click(5, 7, (21, 35, 1))
    both.propagate()
    return 1 + 4 + 2 + 2 + 1 + 5 + 1 + 1 + 7


SCRIPTS = [corrections, objects_leave, broken_off]
OLDER = {"no_obj_embed_spatial": False, "add_tpos_enc_to_obj_ptrs": False}
CASES = {  # options of the model and of the predictor
    "2.1": ({}, {}),
    "2.0": (OLDER, {}),
    "corrections stay": ({}, {"add_all_frames_to_correct_as_cond": True}),
    "exclusive": ({}, {"non_overlap_masks": True}),
    "forgets around prompts": ({"num_maskmem": 3}, {"clear_non_cond_mem_around_input": True}),
    "no postprocessing": (NO_POSTPROCESSING, {}),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", CASES)
def test_an_interactive_session(media: pathlib.Path, case: str, script: Callable[[Both], int]):
    model, options = CASES[case]
    config = small_config(**model)
    frames = load_clip(media, config.image_size, LENGTH)
    both = Both(pair(config, seed=4), frames, SMALL, **options)
    assert script(both) == both.compared


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize(
    ("name", "script"),
    [*(("sam2.1_hiera_tiny", script) for script in SCRIPTS), ("sam2_hiera_tiny", objects_leave)],
)
def test_a_session_of_real_size(media: pathlib.Path, name: str, script: Callable[[Both], int]):
    both = Both(pair(at(name, 256), seed=7), load_clip(media, 256, LENGTH), REAL)
    assert script(both) == both.compared


def no_prompt(both: Both) -> None:
    both.propagate()


def an_object_without_a_prompt(both: Both) -> None:
    both.click(1, "a", (21, 35, 1))
    both.click(2, 7, (50, 20, 1))
    both.clear(2, 7)
    both.propagate()


def a_correction_without_memory(both: Both) -> None:
    both.click(1, "a", (21, 35, 1))
    both.propagate()
    both.clear(1, "a")
    both.click(4, "a", (50, 20, 1))


def an_unknown_object(both: Both) -> None:
    both.click(1, "a", (21, 35, 1))
    both.remove(7)


def a_late_box(both: Both) -> None:
    both.click(1, "a", (21, 35, 1))
    box = {"box": (10, 10, 50, 45), "clear_old_points": False}
    both.call("add_new_points_or_box", frame_idx=1, obj_id=7, **box)


@pytest.mark.parametrize(
    "script",
    [
        no_prompt,
        an_object_without_a_prompt,
        a_correction_without_memory,
        an_unknown_object,
        a_late_box,
    ],
)
def test_refused_calls_change_nothing(media: pathlib.Path, script: Callable[[Both], None]):
    config = small_config()
    both = Both(pair(config, seed=4), load_clip(media, config.image_size, LENGTH), SMALL)
    with pytest.raises(Refused):
        script(both)


@pytest.mark.parametrize("stays", [False, True])
def test_a_mask_on_a_tracked_frame_whose_prompts_are_gone(media: pathlib.Path, stays: bool):
    """It is answered without memory; if corrections stay, it is tracked from."""
    config = small_config()
    options = {"add_all_frames_to_correct_as_cond": stays}
    frames = load_clip(media, config.image_size, LENGTH)
    both = Both(pair(config, seed=4), frames, SMALL, **options)
    both.mask(0, "a", ellipse(*SIZE))
    both.propagate()
    both.clear(0, "a")
    both.mask(3, "a", ellipse(30, 30))
    if stays:
        both.propagate()
    else:
        with pytest.raises(Refused):
            both.propagate()


def test_removing_an_object_that_is_not_there_does_nothing(media: pathlib.Path):
    config = small_config()
    both = Both(pair(config, seed=4), load_clip(media, config.image_size, LENGTH), SMALL)
    both.click(1, "a", (21, 35, 1))
    both.call("remove_object", obj_id=7)
    assert both.compared == 1 and list(both.our_state["obj_ids"]) == ["a"]


@pytest.mark.parametrize("scale", ["soft", "signed"])
def test_of_a_tensor_the_object_is_where_it_is_at_least_half(media: pathlib.Path, scale: str):
    """Official masks that are tensors keep their values; resized, they are cut at 0.5."""
    config = small_config()
    both = Both(pair(config, seed=4), load_clip(media, config.image_size, LENGTH), SMALL)
    rows, columns = torch.meshgrid(*(torch.linspace(-3, 3, n) for n in SIZE), indexing="ij")
    mask = torch.sigmoid(3 - rows**2 - columns**2)
    if scale == "signed":
        mask = torch.where(mask >= 0.5, 1.0, -1.0)
    given = {"frame_idx": 0, "obj_id": 1, "mask": mask}
    theirs = both.theirs.add_new_mask(both.their_state, **given)[2].numpy() > 0
    ours = both.ours.add_new_mask(both.our_state, **given)[2] > 0
    assert 0.2 < theirs.mean() < 0.5
    assert iou(ours, theirs) > 0.97  # ours is cut before it is resized: some of its edge differs


def test_of_conditioning_frames_equally_far_the_first_prompted_is_read(media: pathlib.Path):
    config = small_config(max_cond_frames_in_attn=3)
    both = Both(pair(config, seed=4), load_clip(media, config.image_size, LENGTH), SMALL)
    for frame in (8, 6, 2, 0):
        both.click(frame, "a", (20 + 4 * frame, 30 + frame, 1))
    both.propagate(4, max_frame_num_to_track=0)
    assert both.compared == 5
