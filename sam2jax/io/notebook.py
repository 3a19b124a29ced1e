"""Pictures and clicks in notebooks."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam2jax.io.drawing import Marks, overlay

_QUALITY = 80  # of JPEG: pictures stay small in the notebook's file
_GAP = 4


class Picture:
    """A picture that a notebook shows where it is a cell's last expression."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels  # uint8 RGB [H, W, 3]

    def __repr__(self) -> str:
        return f"Picture({self.pixels.shape[1]} x {self.pixels.shape[0]})"

    def _repr_jpeg_(self) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "JPEG", quality=_QUALITY, optimize=True)
        return buffer.getvalue()


def show(
    pictures: np.ndarray | Sequence[np.ndarray], *, columns: int = 4, width: int = 190
) -> Picture:
    """Pictures in rows, as a cell's last expression.

    Args:
      pictures: uint8 RGB [H, W, 3], or several of one size.
      columns: pictures in a row.
      width: of each, in pixels.

    Raises:
      ValueError: there is none, or they are of several sizes.
    """
    from PIL import Image

    several = [pictures] if isinstance(pictures, np.ndarray) and pictures.ndim == 3 else pictures
    if not len(several) or len({np.shape(picture) for picture in several}) != 1:
        raise ValueError(
            f"Expected pictures of one size, got {[np.shape(picture) for picture in several]}."
        )
    height = round(width * several[0].shape[0] / several[0].shape[1])
    columns = min(columns, len(several))
    rows = -(-len(several) // columns)
    size = (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP)
    sheet = Image.new("RGB", size, (255, 255, 255))
    for i, picture in enumerate(several):
        place = (i % columns * (width + _GAP), i // columns * (height + _GAP))
        sheet.paste(Image.fromarray(picture).resize((width, height)), place)
    return Picture(np.asarray(sheet))


class Clicks:
    """Points of one object on a picture, as they were given; a notebook shows them drawn in."""

    def __init__(self, picture: np.ndarray, points: Any, labels: Any, object_id: int) -> None:
        self.picture, self.object_id = picture, object_id
        self.points, self.labels = points, labels

    def __repr__(self) -> str:
        return f"Clicks(points={self.points}, labels={self.labels})"

    def _repr_jpeg_(self) -> bytes:
        marks = Marks(self.object_id, self.points, self.labels)
        nothing = np.zeros((0, *self.picture.shape[:2]), bool)
        drawn = overlay(self.picture, nothing, [], [marks])
        return show(drawn, width=min(drawn.shape[1], 380))._repr_jpeg_()


def clicks(picture: np.ndarray, points: Any = (), labels: Any = None, *, object_id: int = 1) -> Any:
    """Asks for points of one object on a picture; what is returned is a cell's last expression.

    A click adds a point on the object, a click with Shift one on what it is not, and a click on a
    point takes it away; later cells read `points` and `labels`. Without `anywidget`, or where no
    one clicks, these are the ones that were given.

    Args:
      picture: uint8 RGB [H, W, 3].
      points: [P, 2] (x, y) to begin with.
      labels: [P], 1 on the object, 0 on what it is not; ones where left out.
      object_id: chooses the colour.

    Returns:
      An object with `points` and `labels`, lists, in pixels of the picture.
    """
    points = np.asarray(points, np.float32).reshape(-1, 2).tolist()
    labels = [1] * len(points) if labels is None else [int(label) for label in labels]
    if len(labels) != len(points):
        raise ValueError(f"Expected a label for each of {len(points)} points, got {len(labels)}.")
    given = Clicks(picture, points, labels, object_id)
    if importlib.util.find_spec("anywidget") is None:
        return given
    from sam2jax.io.click_widget import make_widget

    return make_widget(given)
