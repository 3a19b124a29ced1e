"""Where the mask generator looks: points and crops (official `utils/amg.py`)."""

from __future__ import annotations

import itertools
import math

import numpy as np

Box = tuple[int, int, int, int]  # x0, y0, x1, y1


def point_grid(per_side: int) -> np.ndarray:
    """Centres of `per_side` x `per_side` cells, as shares of width and height: [P, 2]."""
    centres = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(centres, centres)
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def point_grids(per_side: int, layers: int, downscale: int) -> list[np.ndarray]:
    """A grid for the image and one for each layer of crops, coarser by `downscale` every time."""
    return [point_grid(int(per_side / downscale**layer)) for layer in range(layers + 1)]


def crop_boxes(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[tuple[Box, int]]:
    """The whole image, then 4, 16, ... overlapping crops of it: boxes with their layer.

    Args:
      size: (height, width) of the image.
      layers: of crops.
      overlap_ratio: of the first layer's crops, as a share of the shorter side; it halves with
        every layer.
    """
    height, width = size
    boxes: list[tuple[Box, int]] = [((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / per_side))
        crop_width, crop_height = (
            math.ceil((overlap * (per_side - 1) + length) / per_side) for length in (width, height)
        )
        for i, j in itertools.product(range(per_side), repeat=2):
            x0, y0 = i * (crop_width - overlap), j * (crop_height - overlap)
            box = (x0, y0, min(x0 + crop_width, width), min(y0 + crop_height, height))
            if box[0] < box[2] and box[1] < box[3]:  # images of a few pixels have less
                boxes.append((box, layer))
    return boxes


def near_crop_edge(boxes: np.ndarray, crop: Box, size: tuple[int, int]) -> np.ndarray:
    """Boxes [C, 4] that end where the crop does, and not the image: cut-off things. [C] bool."""
    tolerance = 20.0
    whole = np.array([0, 0, size[1], size[0]])
    at_crop = np.abs(boxes - np.array(crop)) <= tolerance
    return np.any(at_crop & (np.abs(boxes - whole) > tolerance), axis=1)
