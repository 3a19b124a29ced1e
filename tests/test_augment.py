"""Augmentation keeps frames and masks together."""

import numpy as np
from PIL import Image

from sam2jax.training.data import augment
from sam2jax.training.data.clip import RawClip
from sam2jax.training.data.config import AugmentConfig
from tests.datasets import rng


def painted(num_frames=3, size=(120, 160)):
    """A clip whose frames show its two masks in red and green."""
    y, x = np.mgrid[: size[0], : size[1]]
    masks = np.stack(
        [
            [abs(x - 50 - 4 * t) + abs(y - 60) < 30, np.hypot(x - 110, y - 55 + 3 * t) < 25]
            for t in range(num_frames)
        ]
    )
    colors = np.stack([*np.moveaxis(masks, 1, 0), np.zeros_like(masks[:, 0])], -1)
    return RawClip([Image.fromarray(c.astype(np.uint8) * 255) for c in colors], masks)


def aligned(clip, below=0.02):
    """Whether the masks are where the frames show them."""
    for frame, masks in zip(clip.frames, clip.masks, strict=True):
        shown = np.moveaxis(np.asarray(frame)[..., :2], -1, 0) > 115
        inside = np.asarray(frame)[..., 2] < 50  # not what lies beyond the edges
        if ((shown != masks) & inside).mean() > below or not masks.any():
            return False
    return True


def test_masks_stay_with_their_frames():
    plain = AugmentConfig(grayscale_prob=0)
    results = [augment.augment(painted(), plain, 96, rng(seed)) for seed in range(12)]
    for clip in results:
        assert clip.frames[0].size == (96, 96) and clip.masks.shape == (3, 2, 96, 96)
        assert aligned(clip)
    assert len({clip.masks.tobytes() for clip in results}) == 12
    assert not aligned(RawClip(results[0].frames, augment.flip(results[0]).masks))


def test_flip():
    clip = painted()
    flipped = augment.flip(clip)
    np.testing.assert_array_equal(flipped.masks, clip.masks[..., ::-1])
    np.testing.assert_array_equal(
        np.asarray(flipped.frames[1]), np.asarray(clip.frames[1])[:, ::-1]
    )
    still = AugmentConfig(degrees=0, shear=0)
    sides = [augment.augment(clip, still, 96, rng(s)).masks[0, 0, :, :48].sum() for s in range(40)]
    kept = np.array(sides) > 200
    assert 8 < kept.sum() < 32


def test_affine_turns_about_the_middle():
    clip = painted(1)
    turned = augment.affine(clip, 180.0, 0.0)
    assert (turned.masks != clip.masks[..., ::-1, ::-1]).mean() < 0.005
    assert (augment.affine(clip, 0.0, 0.0).masks == clip.masks).all()
    corner = np.asarray(augment.affine(clip, 25.0, 0.0).frames[0])[0, 0]
    assert tuple(corner) == augment.FILL


def test_affine_is_left_out_where_an_object_would_be_gone():
    clip = painted(2)
    masks = clip.masks.copy()
    masks[:, 1] = False
    masks[:, 1, :3, :3] = True  # a corner, which turning moves out of the frame
    lost = RawClip(clip.frames, masks)
    assert augment.affine(lost, 20.0, 0.0) is lost
    masks = masks.copy()
    masks[0] = clip.masks[0]
    assert augment.affine(RawClip(clip.frames, masks), 20.0, 0.0).masks[1, 1].sum() == 0


def test_resize_keeps_what_is_more_than_half_covered():
    mask = np.zeros((1, 1, 8, 8), bool)
    mask[..., :5] = True  # of the third pixel of four: exactly a half
    small = augment.resize(RawClip([Image.new("RGB", (8, 8))], mask), 4).masks[0, 0]
    np.testing.assert_array_equal(small, np.arange(4) < np.full((4, 1), 2))


def test_grey_is_for_all_frames_and_jitter_for_each():
    clip = painted(3)
    flat = {"degrees": 0, "shear": 0, "flip_prob": 0}
    grey = augment.augment(clip, AugmentConfig(**flat, grayscale_prob=1.0), 120, rng())
    assert all(np.ptp(np.asarray(frame), axis=-1).max() == 0 for frame in grey.frames)
    still = RawClip([clip.frames[0]] * 3, clip.masks[[0] * 3])
    one = augment.augment(
        still,
        AugmentConfig(**flat, frame_brightness=0, frame_contrast=0, frame_saturation=0),
        120,
        rng(),
    )
    assert len({frame.tobytes() for frame in one.frames}) == 1
    each = augment.augment(still, AugmentConfig(**flat), 120, rng())
    assert len({frame.tobytes() for frame in each.frames}) == 3
