"""Masks as run lengths, the way COCO counts them: down the columns, background first."""

from __future__ import annotations

from typing import Any

import numpy as np


def encode_runs(mask: np.ndarray) -> dict[str, Any]:
    """[H, W] bool -> {"size": [H, W], "counts": [...]}, uncompressed."""
    pixels = mask.ravel(order="F")
    edges = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [len(pixels)]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


def encode_coco(mask: np.ndarray) -> dict[str, Any]:
    """[H, W] bool -> {"size": [H, W], "counts": "..."}, compressed, for JSON and pycocotools."""
    from pycocotools import mask as coco

    runs: Any = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": runs["counts"].decode("ascii")}
