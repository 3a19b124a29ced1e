"""The same script of calls to the official video predictor and to ours."""

import contextlib
import pathlib
from typing import Any

import numpy as np
import pytest

import sam2jax
from sam2jax.testing import small_config
from tests import oracle
from tests.parity.clips import SMALL, ellipse, load_clip
from tests.parity.pairs import iou, pair

pytestmark = pytest.mark.parity

SIZE = (54, 96)  # what prompts and answers refer to


class Both:
    """Calls both predictors and compares what they answer."""

    def __init__(self, media: pathlib.Path, config: sam2jax.SAM2Config, **options: Any) -> None:
        both = pair(config, seed=4)
        frames = load_clip(media, config.image_size, 12)
        self.theirs = both.official
        for name, value in options.items():
            setattr(self.theirs, name, value)
        self.ours = sam2jax.SAM2VideoPredictor(both.model, both.params, **options)
        self.their_state = oracle.init_state(self.theirs, frames, SIZE)
        self.our_state = self.ours.init_state(np.zeros((12, *SIZE, 3), np.uint8))
        self.our_state.video = frames  # what the official one sees, bit for bit
        self.compared = 0

    def agree(self, mine: Any, other: Any) -> None:
        (frame, ids, masks), (their_frame, their_ids, their_masks) = mine, other
        their_masks = their_masks.float().numpy()
        assert (frame, ids) == (their_frame, list(their_ids)) and masks.shape == their_masks.shape
        self.compared += 1
        if self.ours.non_overlap_masks:  # a pixel where two objects tie may go to either
            assert (np.abs(masks - their_masks) > SMALL.clip).mean() < 1e-3
            masks, their_masks = masks.max(axis=0), their_masks.max(axis=0)
        np.testing.assert_allclose(masks, their_masks, rtol=0, atol=SMALL.clip)
        assert iou(masks > 0, their_masks > 0) > 0.999

    def call(self, name: str, **given: Any) -> None:
        mine = getattr(self.ours, name)(self.our_state, **given)
        self.agree(mine, getattr(self.theirs, name)(self.their_state, **given))

    def propagate(self, **given: Any) -> None:
        mine = list(self.ours.propagate_in_video(self.our_state, **given))
        theirs = list(self.theirs.propagate_in_video(self.their_state, **given))
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            self.agree(one, other)


@contextlib.contextmanager
def restored(official: Any, names: Any):
    """The official model is shared between tests."""
    kept = {name: getattr(official, name) for name in names}
    yield
    for name, value in kept.items():
        setattr(official, name, value)


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ("2.1", {}),
        ("2.1", {"add_all_frames_to_correct_as_cond": True}),
        ("2.1", {"non_overlap_masks": True}),
        ("2.0", {}),
    ],
    ids=["2.1", "corrections stay", "exclusive", "2.0"],
)
def test_an_interactive_session(media: pathlib.Path, version: str, options: dict[str, bool]):
    new = version == "2.1"
    config = small_config(no_obj_embed_spatial=new, add_tpos_enc_to_obj_ptrs=new)
    with restored(pair(config, seed=4).official, options):
        both = Both(media, config, **options)
        click, mask = "add_new_points_or_box", "add_new_mask"
        both.call(click, frame_idx=3, obj_id="a", points=[[21, 35]], labels=[1])
        more = {"clear_old_points": False}
        both.call(click, frame_idx=3, obj_id="a", points=[[40, 30]], labels=[0], **more)
        both.call(click, frame_idx=5, obj_id=7, box=[10, 10, 50, 45])
        both.call(mask, frame_idx=0, obj_id="m", mask=ellipse(*SIZE))
        both.propagate(start_frame_idx=3)
        both.propagate(start_frame_idx=5, reverse=True)
        both.call(click, frame_idx=6, obj_id="a", points=[[50, 20]], labels=[0])
        both.call(click, frame_idx=6, obj_id="a", points=[[20, 20]], labels=[1], **more)
        both.call(click, frame_idx=3, obj_id=7, points=[[30, 20]], labels=[1])
        both.call(mask, frame_idx=8, obj_id="a", mask=ellipse(30, 30))
        both.propagate(max_frame_num_to_track=9)
        both.propagate(start_frame_idx=10, max_frame_num_to_track=4, reverse=True)
        assert both.compared == 8 + 9 + 6 + 10 + 5
