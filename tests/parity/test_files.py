"""From files to masks: folders and containers, read and tracked by both predictors."""

import os
import pathlib

import numpy as np
import pytest

import sam2jax
from sam2jax.io.video import open_video
from tests import oracle
from tests.parity.clips import CLICK
from tests.parity.pairs import CLIP, at, iou, pair

pytestmark = [pytest.mark.parity, pytest.mark.optimised]

COUNT = 6
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@pytest.fixture(params=["folder", "container"])
def clip(request: pytest.FixtureRequest, media: pathlib.Path, tmp_path: pathlib.Path) -> str:
    """`bedroom`: its first frames as JPEG files, or the mp4."""
    if request.param == "folder":
        for index in range(COUNT):
            os.symlink(media / "bedroom" / f"{index:05d}.jpg", tmp_path / f"{index:05d}.jpg")
        return str(tmp_path)
    return str(media / "bedroom.mp4")


@pytest.mark.parametrize("image_size", [96, 256])
def test_frames_are_the_official_ones(clip: str, image_size: int):
    theirs, height, width = oracle.sam2.utils.misc.load_video_frames(
        clip, image_size, offload_video_to_cpu=True, compute_device="cpu"
    )
    with open_video(clip, image_size) as video:
        assert (video.height, video.width, len(video)) == (height, width, len(theirs))
        frames = np.stack(list(video))
    assert frames.dtype == np.uint8
    # uint8 frames that normalise to the same floats are the same frames.
    np.testing.assert_allclose(
        (frames / np.float32(255) - MEAN) / STD, oracle.to_numpy(theirs), atol=1e-6
    )


def test_both_predictors_from_a_file(clip: str):
    both = pair(at("sam2.1_hiera_tiny", 256), 7)
    ours = sam2jax.SAM2VideoPredictor(both.model, both.params)
    prompt = {"frame_idx": 1, "obj_id": 5, "points": np.float32([CLICK]), "labels": [1]}
    states = ours.init_state(clip), both.official.init_state(clip)
    for name in ("num_frames", "video_height", "video_width"):
        assert states[0][name] == states[1][name]
    answers = [
        [
            predictor.add_new_points_or_box(state, **prompt),
            *predictor.propagate_in_video(state, max_frame_num_to_track=3),
            *predictor.propagate_in_video(state, start_frame_idx=1, reverse=True),
        ]
        for predictor, state in zip((ours, both.official), states, strict=True)
    ]
    assert len(answers[0]) == len(answers[1]) == 1 + 4 + 2
    for (frame, ids, masks), (their_frame, their_ids, theirs) in zip(*answers, strict=True):
        theirs = theirs.float().numpy()
        assert (frame, ids) == (their_frame, their_ids) and masks.dtype == np.float32
        assert masks.shape == theirs.shape == (1, 1, 540, 960)
        np.testing.assert_allclose(masks, theirs, rtol=0, atol=CLIP)
        assert iou(masks > 0, theirs > 0) > 0.999
