"""Contact sheets: frames of a video side by side, to be judged at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sam2jax.io.drawing import color

_MARGIN = 6
_LINE = 20  # height of a line of text
_INK, _PAPER, _FAINT = (30, 30, 30), (255, 255, 255), (120, 120, 120)


class Cell(NamedTuple):
    """A frame of a contact sheet."""

    picture: np.ndarray  # uint8 RGB [H, W, 3]
    caption: str
    hidden: Sequence[bool]  # of each object, whether it is said to be out of sight


def contact_sheet(
    title: str, cells: Sequence[Cell], object_ids: Sequence[int], columns: int
) -> np.ndarray:
    """Frames in rows, under each its caption and a dot for each object, a ring where it is hidden.

    Args:
        title: a line of text.
        cells: pictures of one size.
        object_ids: they choose the colours of the dots.
        columns: pictures in a row.

    Returns:
        uint8 RGB [H, W, 3].
    """
    from PIL import Image, ImageDraw

    height, width = cells[0].picture.shape[:2]
    rows = -(-len(cells) // columns)
    across, down = width + _MARGIN, height + _LINE + _MARGIN
    size = (columns * across + _MARGIN, rows * down + _LINE + 2 * _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, _INK, font_size=13)
    for i, cell in enumerate(cells):
        left = _MARGIN + i % columns * across
        top = _LINE + 2 * _MARGIN + i // columns * down
        sheet.paste(Image.fromarray(cell.picture), (left, top))
        base = top + height + 2
        draw.text((left, base), cell.caption, _FAINT, font_size=13)
        _draw_dots(draw, left + width, base + 8, object_ids, cell.hidden)
    return np.asarray(sheet)


def _draw_dots(draw, right: int, middle: int, object_ids: Sequence[int], hidden: Sequence[bool]):
    """From the right to the left, a dot or a ring for each object."""
    x = right - 6
    for object_id, is_hidden in reversed(list(zip(object_ids, hidden, strict=True))):
        rgb = color(object_id)
        draw.circle((x, middle), 5, None if is_hidden else rgb, rgb, 2)
        x -= 16
        if is_hidden:
            draw.text((x + 6, middle), "hidden", _INK, font_size=11, anchor="rm")
            x -= 46
