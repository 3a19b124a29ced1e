"""Augmentation as in the official recipe (`training/dataset/transforms.py`), with Pillow.

The order is the official one: flip, affine, resize, jitter, grey, jitter of each frame. Pillow
does what torchvision does on its pictures, to the bit. Masks differ in one place: torchvision
turns and shears tensors by its own nearest-neighbour sampling, and here it is Pillow's, as for
the pictures; single pixels along an outline may differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sam2jax.training.data.clip import RawClip
from sam2jax.training.data.config import AugmentConfig

if TYPE_CHECKING:
    from PIL.Image import Image

FILL = (123, 116, 103)  # what lies beyond a picture's edges: the mean of ImageNet


def augment(clip: RawClip, config: AugmentConfig, size: int, rng: np.random.Generator) -> RawClip:
    """Draws an augmentation and applies it; the clip comes out `size` pixels wide and high."""
    flipped = rng.random() < config.flip_prob
    angle = rng.uniform(-config.degrees, config.degrees)
    shear = rng.uniform(-config.shear, config.shear)
    clip = flip(clip) if flipped else clip
    clip = resize(affine(clip, angle, shear), size)
    frames: Sequence[Image] = clip.frames
    jitter = _draw_jitter(rng, config.brightness, config.contrast, config.saturation)
    frames = [adjust(frame, jitter) for frame in frames]
    if rng.random() < config.grayscale_prob:
        frames = [frame.convert("L").convert("RGB") for frame in frames]
    strengths = (config.frame_brightness, config.frame_contrast, config.frame_saturation)
    frames = [adjust(frame, _draw_jitter(rng, *strengths)) for frame in frames]
    return RawClip(frames, clip.masks)


def flip(clip: RawClip) -> RawClip:
    """Left becomes right, in all frames."""
    from PIL import Image

    turned = [frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for frame in clip.frames]
    return RawClip(turned, clip.masks[..., ::-1])


def affine(clip: RawClip, angle: float, shear: float) -> RawClip:
    """Turns and shears all frames about their middle (torchvision's `RandomAffine`).

    Where an object would be gone from the first frame the clip stays as it is, as in the official
    code.

    Args:
      clip: at any size, which is kept.
      angle: degrees, clockwise.
      shear: degrees, along x.
    """
    from PIL import Image

    width, height = clip.frames[0].size
    matrix = inverse_matrix(angle, shear, width, height)

    def move_mask(mask: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(mask.astype(np.uint8))
        moved = picture.transform(picture.size, Image.Transform.AFFINE, matrix)
        return np.asarray(moved) > 0

    first = np.stack([move_mask(mask) for mask in clip.masks[0]])
    if not first.any((1, 2)).all():
        return clip
    rest = [np.stack([move_mask(mask) for mask in masks]) for masks in clip.masks[1:]]
    frames = [
        frame.transform(
            frame.size,
            Image.Transform.AFFINE,
            matrix,
            Image.Resampling.BILINEAR,
            fillcolor=FILL,
        )
        for frame in clip.frames
    ]
    return RawClip(frames, np.stack([first, *rest]))


def inverse_matrix(angle: float, shear: float, width: int, height: int) -> tuple[float, ...]:
    """Where pixels come from when a picture is sheared along x, then turned, about its middle.

    Six numbers as Pillow takes them: x' = a x + b y + c, y' = d x + e y + f.
    """
    turn, slant = math.radians(angle), math.tan(math.radians(shear))
    cosine, sine = math.cos(turn), math.sin(turn)
    # The inverse of the rotation times the shear [[1, -slant], [0, 1]]; their determinant is 1.
    a, b = cosine - sine * slant, sine + cosine * slant
    d, e = -sine, cosine
    x, y = width / 2, height / 2
    return (a, b, x - a * x - b * y, d, e, y - d * x - e * y)


def resize(clip: RawClip, size: int) -> RawClip:
    """Makes a clip square: antialiased bilinear, as torchvision resizes pictures.

    A mask keeps the pixels of which it covers more than half, in the sense of the same filter;
    this is what rounding makes of the official resized masks.
    """
    from PIL import Image

    if clip.frames[0].size == (size, size):
        return clip
    how = Image.Resampling.BILINEAR

    def resize_mask(mask: np.ndarray) -> np.ndarray:
        shares = Image.fromarray(mask.astype(np.float32)).resize((size, size), how)
        return np.asarray(shares) > 0.5

    masks = np.stack([np.stack([resize_mask(m) for m in masks]) for masks in clip.masks])
    return RawClip([frame.resize((size, size), how) for frame in clip.frames], masks)


def adjust(picture: Image, jitter: Sequence[tuple[str, float]]) -> Image:
    """Changes the colours of a picture by named factors, in the order given.

    The names are Pillow's: Brightness, Contrast, Color (saturation).
    """
    from PIL import ImageEnhance

    for name, factor in jitter:
        picture = getattr(ImageEnhance, name)(picture).enhance(factor)
    return picture


def _draw_jitter(
    rng: np.random.Generator, brightness: float, contrast: float, saturation: float
) -> list[tuple[str, float]]:
    strengths = {"Brightness": brightness, "Contrast": contrast, "Color": saturation}
    drawn = [(name, rng.uniform(max(0, 1 - s), 1 + s)) for name, s in strengths.items()]
    return [drawn[i] for i in rng.permutation(len(drawn)) if strengths[drawn[i][0]]]
