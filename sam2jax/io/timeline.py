"""What a tracker looked at, as a picture: slots of its memory by frames, and maps over frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sam2jax.io.drawing import color
from sam2jax.types import FrameOutput

_CELL, _LINE, _LABEL, _GAP = 14, 15, 92, 8
_INK, _PAPER, _GRID = (30, 30, 30), (255, 255, 255), (225, 225, 225)
# From white over blue to black: as dark as there is much.
_RAMP = np.array([(255, 255, 255), (158, 202, 225), (33, 113, 181), (8, 30, 70)], np.float32)


class Looked(NamedTuple):
    """What one object's answer on a frame was made from."""

    frame: int
    memory_frames: np.ndarray  # [K] int, -1: none
    tpos: np.ndarray  # [K] int
    mass: np.ndarray  # [K] shares of the attention, mean of the layers
    pointer_mass: float  # of all pointers together
    maps: np.ndarray  # [K, h, w] shares by place
    iou: float
    object_score: float


def ramp(values: np.ndarray) -> np.ndarray:
    """Colours of values in [0, 1]: [...] -> uint8 [..., 3]."""
    place = np.clip(values, 0, 1) * (len(_RAMP) - 1)
    low = np.minimum(place.astype(int), len(_RAMP) - 2)
    part = (place - low)[..., None]
    return (_RAMP[low] * (1 - part) + _RAMP[low + 1] * part + 0.5).astype(np.uint8)


def timeline(looked: Sequence[Sequence[Looked]], object_ids: Sequence[int]) -> np.ndarray:
    """A band for each object: rows are its memory's slots, columns are frames.

    The slots are the conditioning frames, in order of their number, and the recent frames, the
    newest first; a cell is as dark as the attention that its memory received, and has the number
    of the frame that it holds where there is room. Rows below have the pointers' share, the
    predicted IoU and whether the object was in sight.

    Args:
      looked: by object, by frame.
      object_ids: of the objects.

    Returns:
      uint8 RGB [H, W, 3].
    """
    from PIL import Image, ImageDraw

    held = [t for row in looked for item in row for t in item.tpos[item.memory_frames >= 0]]
    last = max(held, default=0)
    wide = max(len(str(item.frame)) for row in looked for item in row)
    cell = max(_CELL, 7 * wide + 4)
    bands = [_band(row, int(last)) for row in looked]
    height = sum(len(names) * _LINE + _LINE + _GAP for names, _, _ in bands) + _GAP
    width = _LABEL + cell * max(len(row) for row in looked) + _GAP
    picture = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(picture)
    top = _GAP
    for object_id, row, (names, shares, texts) in zip(object_ids, looked, bands, strict=True):
        draw.rectangle((_GAP, top + 3, _GAP + 8, top + 11), fill=color(object_id))
        draw.text((_GAP + 14, top), f"object {object_id}", _INK, font_size=11)
        for column, item in enumerate(row):
            if column % 5 == 0:
                draw.text((_LABEL + column * cell, top), str(item.frame), _INK, font_size=10)
        top += _LINE
        for name, values, labels in zip(names, shares, texts, strict=True):
            draw.text((_GAP, top), name, _INK, font_size=11)
            for column, (value, label) in enumerate(zip(values, labels, strict=True)):
                left = _LABEL + column * cell
                box = (left, top, left + cell, top + _LINE)
                fill = tuple(ramp(np.asarray(value, np.float32)).tolist()) if value >= 0 else _PAPER
                draw.rectangle(box, fill=fill, outline=_GRID)
                ink = _PAPER if value > 0.5 else _INK
                draw.text((left + 2, top + 1), label, ink, font_size=10)
            top += _LINE
        top += _GAP
    return np.asarray(picture)


def _band(row: Sequence[Looked], last: int) -> tuple[list[str], list[list[float]], list[list[str]]]:
    """Names, shares (below 0: nothing) and texts of an object's rows. `last` is the temporal
    position that conditioning frames have."""
    cond = max(int(((item.tpos == last) & (item.memory_frames >= 0)).sum()) for item in row)
    names = [f"prompted {i + 1}" for i in range(cond)] + [f"recent {i + 1}" for i in range(last)]
    shares = [[-1.0] * len(row) for _ in names]
    texts = [[""] * len(row) for _ in names]
    for column, item in enumerate(row):
        next_cond = 0
        for frame, tpos, mass in zip(item.memory_frames, item.tpos, item.mass, strict=True):
            if frame < 0:
                continue
            slot = next_cond if tpos == last else cond + int(tpos)
            next_cond += tpos == last
            shares[slot][column], texts[slot][column] = float(mass), str(frame)
    extra = {
        "pointers": [item.pointer_mass for item in row],
        "predicted IoU": [item.iou for item in row],
        "in sight": [float(item.object_score > 0) for item in row],
    }
    names += list(extra)
    shares += list(extra.values())
    texts += [[""] * len(row) for _ in extra]
    return names, shares, texts


def heat_maps(frame: np.ndarray, looked: Looked) -> np.ndarray:
    """Where on a frame the attention went to each memory: one picture beside the other.

    Args:
      frame: uint8 RGB [H, W, 3].
      looked: what an object's answer on it was made from.

    Returns:
      uint8 RGB [H, K W, 3], for the K memories that were read; the frame itself where there was
      none. Brighter is more; the frame is seen faintly below.
    """
    from PIL import Image, ImageDraw

    height, width = frame.shape[:2]
    pictures = []
    for source, share in zip(looked.memory_frames, looked.maps, strict=True):
        if source < 0:
            continue
        large = Image.fromarray(share.astype(np.float32)).resize((width, height))
        weight = np.clip(np.asarray(large), 0, 1)[..., None]
        heat = np.array(color(4), np.float32) * weight
        mixed = frame.astype(np.float32) * 0.35 * (1 - weight) + heat + 90 * weight
        picture = Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
        ImageDraw.Draw(picture).text((4, 2), f"to frame {source}", _PAPER, font_size=12)
        pictures.append(np.asarray(picture))
    return np.concatenate(pictures, axis=1) if pictures else frame


def looked_at(frame: int, output: FrameOutput, index: int) -> Looked:
    """Object `index`'s part of the answer on a frame, which came with an explanation."""
    explanation = output.explanation
    if explanation is None:
        raise ValueError("The answer has no explanation: call step or track with explain=True.")
    return Looked(
        frame=frame,
        memory_frames=np.asarray(output.memory_frames[index]),
        tpos=np.asarray(explanation.tpos[index]),
        mass=np.asarray(explanation.mass[index]).mean(axis=0),
        pointer_mass=float(np.asarray(explanation.pointer_mass[index]).mean(axis=0).sum()),
        maps=np.asarray(explanation.maps[index]),
        iou=float(output.iou[index]),
        object_score=float(output.object_score[index]),
    )
