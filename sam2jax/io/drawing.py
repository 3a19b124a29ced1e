"""Masks and prompts drawn on a frame."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Okabe and Ito's colours, which stay apart under the common colour blindnesses; without black.
_OKABE_ITO = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
_GOLDEN = 0.618033988749895  # steps of this fraction of the colour circle never come close


class Marks(NamedTuple):
    """The prompts of one object on one frame, in pixels of the frame."""

    object_id: int
    points: Sequence[tuple[float, float]] = ()
    labels: Sequence[int] = ()
    box: tuple[float, float, float, float] | None = None


def color(object_id: int) -> tuple[int, int, int]:
    """The RGB colour of an object: distinct for the first seven, then spread over the circle."""
    if 1 <= object_id <= len(_OKABE_ITO):
        return _OKABE_ITO[object_id - 1]
    value = 0.95 if object_id % 2 else 0.7
    r, g, b = colorsys.hsv_to_rgb(object_id * _GOLDEN % 1, 0.75, value)
    return round(255 * r), round(255 * g), round(255 * b)


def overlay(
    frame: np.ndarray,
    masks: np.ndarray,
    object_ids: Sequence[int],
    marks: Sequence[Marks] = (),
    opacity: float = 0.45,
) -> np.ndarray:
    """Draws masks as translucent fills with a contour, and prompts on top.

    Args:
        frame: uint8 RGB [H, W, 3]; not changed.
        masks: bool [N, H, W].
        object_ids: N ids; they choose the colours.
        marks: prompts to draw.
        opacity: of the fill, 0 to 1.

    Returns:
        uint8 RGB [H, W, 3].
    """
    if masks.shape != (len(object_ids), *frame.shape[:2]):
        raise ValueError(
            f"masks must be [{len(object_ids)}, {frame.shape[0]}, {frame.shape[1]}] for these "
            f"ids and this frame, got {list(masks.shape)}."
        )
    drawn = frame.copy()
    width = _line_width(frame)
    for mask, object_id in zip(masks, object_ids, strict=True):
        window = _window(mask, width)
        if window is None:
            continue
        inside, picture = mask[window], drawn[window]  # views
        rgb = np.array(color(object_id), np.float32)
        filled = picture[inside] * np.float32(1 - opacity) + rgb * np.float32(opacity)
        picture[inside] = (filled + np.float32(0.5)).astype(np.uint8)
        picture[contour(inside, width)] = color(object_id)
    return _draw_marks(drawn, marks, width) if marks else drawn


def contour(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask within `width` of its edge; the border of the picture is no edge."""
    core = mask
    for _ in range(width):
        padded = np.pad(core, 1, mode="edge")
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~core


def _line_width(frame: np.ndarray) -> int:
    return max(1, round(min(frame.shape[:2]) / 270))


def _window(mask: np.ndarray, margin: int) -> tuple[slice, slice] | None:
    """The part of the picture that a mask covers, with a margin for its contour."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return None
    return (
        slice(max(rows[0] - margin, 0), rows[-1] + 1 + margin),
        slice(max(columns[0] - margin, 0), columns[-1] + 1 + margin),
    )


def _draw_marks(frame: np.ndarray, marks: Sequence[Marks], width: int) -> np.ndarray:
    from PIL import Image, ImageDraw

    picture = Image.fromarray(frame)
    draw = ImageDraw.Draw(picture)
    radius = 5 * width
    for mark in marks:
        if mark.box is not None:
            x0, y0, x1, y1 = mark.box
            draw.rectangle((x0, y0, x1, y1), outline=(255, 255, 255), width=3 * width)
            draw.rectangle(
                (x0 + width, y0 + width, x1 - width, y1 - width)
                if min(x1 - x0, y1 - y0) > 2 * width
                else (x0, y0, x1, y1),
                outline=color(mark.object_id),
                width=width,
            )
        for (x, y), label in zip(mark.points, mark.labels, strict=True):
            draw.circle((x, y), radius, color(mark.object_id), (255, 255, 255), width)
            bar, arm = width, radius - 2 * width
            draw.rectangle((x - arm, y - bar / 2, x + arm, y + bar / 2), fill=(255, 255, 255))
            if label == 1:  # a plus; anything else is a minus
                draw.rectangle((x - bar / 2, y - arm, x + bar / 2, y + arm), fill=(255, 255, 255))
    return np.array(picture)
