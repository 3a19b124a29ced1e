"""The pytrees that cross borders between layers: features, prompts, candidates, memory, answers.

Shapes: S is the model's image size, N objects, P points, C the hidden width, D the memory width.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam2jax.tree import Tree

Array = jax.Array
ArrayLike = Any  # array, list or scalar that NumPy understands

EMPTY = -1  # frame index of a memory slot that holds nothing
NO_OBJ_SCORE = -1024.0  # mask logit of an absent object (official `NO_OBJ_SCORE`)
MAX_FED_BACK_LOGIT = 32.0  # of earlier answers beside clicks, as the official predictors have it
_MOST_POINTS = 65536  # of an object, padding included

# Prompts.kind
NONE = 0  # no prompt: the object is tracked
CONDITIONING = 1  # a new conditioning frame: answered without memory, kept for good
REFINEMENT = 2  # clicks that correct a tracked frame: answered with memory


class ImageFeatures(Tree):
    """What the image encoder makes of a batch of frames; all that later stages see of them."""

    high_res_s0: Array  # [B, S/4, S/4, C/8]
    high_res_s1: Array  # [B, S/8, S/8, C/4]
    features: Array  # [B, S/16, S/16, C]


class MaskCandidates(Tree):
    """The mask decoder's answer: token 0 is the single mask, tokens 1..M the alternatives."""

    masks: Array  # [N, 1 + M, S/4, S/4] float32 logits
    ious: Array  # [N, 1 + M] float32, predicted IoU in [0, 1]
    tokens: Array  # [N, 1 + M, C], output tokens that object pointers are made from
    object_score: Array  # [N] float32 logit, above 0: the object is in the frame


class MaskPrediction(Tree):
    """The answer on an image: M masks for each of N prompts."""

    masks: Array  # [N, M, S/4, S/4] float32 logits
    ious: Array  # [N, M] float32, predicted IoU of each
    object_score: Array  # [N] float32 logit; the official image predictor does not use it


class MemoryRead(Tree):
    """What a frame attends to, per object; valid entries come first (leading [N] when vmapped)."""

    spatial: Array  # [K, HW, D] spatial memories
    spatial_tpos: Array  # [K] int32, row of the temporal encoding
    spatial_frame: Array  # [K] int32 frame index, EMPTY past the valid ones
    num_spatial: Array  # [] int32
    pointers: Array  # [Q, C] object pointers
    pointer_position: Array  # [Q] float32, signed distance in time, in units of the longest
    pointer_frame: Array  # [Q] int32 frame index, EMPTY past the valid ones
    num_pointers: Array  # [] int32
    spatial_scale: Array | None = None  # [K] float32, of the keys; None: 1
    pointer_scale: Array | None = None  # [Q] float32


class FrameMemory(Tree):
    """What one frame leaves behind for one object (leading [N] when vmapped)."""

    frame: Array  # [] int32 frame index; EMPTY: NaN or infinity arose, and nothing is left behind
    spatial: Array  # [HW, D] bfloat16
    pointer: Array  # [C] float32
    iou: Array  # [] float32, predicted IoU of the mask that was taken
    object_score: Array  # [] float32 logit


class Explanation(Tree):
    """How the answer on one frame came about (leading [T] after `track`).

    K, Q, L: spatial memories and pointers that are read, and layers of the memory attention. Slots
    are those of `memory_frames` and `pointer_frames` in `FrameOutput`.
    """

    tpos: Array  # [N, K] int32, temporal position of each memory
    mass: Array  # [N, L, K] share of the attention that each memory received
    pointer_mass: Array  # [N, L, Q] that each pointer received
    maps: Array  # [N, K, S/16, S/16] the same by place, mean of the layers
    masks: Array  # [N, 1 + M, S/4, S/4] the decoder's candidates: the single mask, the alternatives
    ious: Array  # [N, 1 + M] predicted IoUs of them
    chosen: Array  # [N] int32, the alternative that the policy took, from 0
    lineage: Array  # [N] int32, the lineage before that it went on from
    carried: Any  # the policy's own state after the frame, with a leading [N]


class FrameOutput(Tree):
    """The answer on one frame (leading [T] after `track`)."""

    masks: Array  # [N, S/4, S/4] float32 logits; `resize_masks` brings them to the frame
    iou: Array  # [N] float32, predicted IoU of each mask
    object_score: Array  # [N] float32 logit, above 0: the object is in the frame
    finite: Array  # [N] bool; False: NaN or infinity arose, and the object counts as out of sight
    memory_frames: Array  # [N, K] int32, frames whose spatial memory was read (EMPTY: none)
    pointer_frames: Array  # [N, Q] int32, frames whose object pointer was read (EMPTY: none)
    explanation: Explanation | None = None  # on request


class Prompts(Tree):
    """Prompts on one frame, for each of N objects. `Prompts.make` builds them from lists.

    Points are (x, y) in pixels of the frame that is given with them. Entries past `num_points`
    are padding, masked out of the decoder. `mask` and `logits` are either absent for all objects
    (None) or present for all, with a flag that says whose are real.
    """

    points: Array  # [N, P, 2] float32
    labels: Array  # [N, P] int32: 1 and 0 clicks, 2 and 3 a box's corners, -1 not a point
    num_points: Array  # [N] int32
    kind: Array  # [N] int32: NONE, CONDITIONING or REFINEMENT
    mask: Array | None = None  # [N, h, w] float32 in [0, 1]: a mask prompt, used as the answer
    has_mask: Array | None = None  # [N] bool
    logits: Array | None = None  # [N, S/4, S/4] float32: earlier answer, fed back beside clicks
    has_logits: Array | None = None  # [N] bool

    @property
    def num_objects(self) -> int:
        return self.labels.shape[-2]

    @classmethod
    def none(cls, num_objects: int, width: int = 1) -> Prompts:
        """No prompt for any object: all are tracked."""
        return cls(
            points=jnp.zeros((num_objects, width, 2), jnp.float32),
            labels=jnp.zeros((num_objects, width), jnp.int32),
            num_points=jnp.zeros(num_objects, jnp.int32),
            kind=jnp.full(num_objects, NONE, jnp.int32),
        )

    @classmethod
    def make(
        cls,
        points: Sequence[ArrayLike | None] | None = None,
        labels: Sequence[ArrayLike | None] | None = None,
        boxes: Sequence[ArrayLike | None] | None = None,
        masks: Sequence[ArrayLike | None] | None = None,
        *,
        logits: Sequence[ArrayLike | None] | None = None,
        refine: bool = False,
        width: int | None = None,
    ) -> Prompts:
        """Builds the prompts of one frame from lists with an entry per object (None: no prompt).

        Args:
          points: per object [P, 2] (x, y) in pixels of the frame given with the prompts.
          labels: per object [P], 1 foreground, 0 background; ones where left out.
          boxes: per object (x0, y0, x1, y1); becomes two points in front of the others.
          masks: per object [h, w], bool or in [0, 1]; excludes points and a box.
          logits: per object [S/4, S/4], an earlier answer on this frame to improve on. In videos
            they go with points; of an object without they are passed over.
          refine: the frame has been tracked and is being corrected with memory; otherwise it
            becomes a conditioning frame.
          width: number of points to pad to; the next power of two where left out.

        Raises:
          ValueError: names the object and what is wrong with its prompt.
        """
        columns = {"points": points, "labels": labels, "boxes": boxes, "masks": masks}
        given = {n: c for n, c in {**columns, "logits": logits}.items() if c is not None}
        lengths = {name: _num_entries(name, column) for name, column in given.items()}
        if not lengths or len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(
                "Prompts need lists with one entry per object, all of one length, got "
                f"{lengths or 'none'}; give None for an object without."
            )
        count = next(iter(lengths.values()))
        rows = [
            point_rows(f"object {i}", *(c[i] if c is not None else None for c in columns.values()))
            for i in range(count)
        ]
        longest = max(max(len(row_labels) for _, row_labels in rows), 1)
        padded = power_of_two(longest) if width is None else width
        if not isinstance(padded, int | np.integer) or padded > _MOST_POINTS:
            raise ValueError(
                f"width must be a whole number, {_MOST_POINTS} at most, got {width!r}."
            )
        if padded < longest:
            raise ValueError(f"width {padded} is too small for {longest} points.")
        point_array = np.zeros((count, padded, 2), np.float32)
        label_array = np.zeros((count, padded), np.int32)
        for i, (row_points, row_labels) in enumerate(rows):
            point_array[i, : len(row_labels)] = row_points
            label_array[i, : len(row_labels)] = row_labels
        num_points = np.array([len(row_labels) for _, row_labels in rows], np.int32)
        mask_array, has_mask = _stack_optional("masks", masks)
        if mask_array is not None and not 0 <= mask_array.min() <= mask_array.max() <= 1:
            raise ValueError(
                "masks must be bool or in [0, 1], got values from "
                f"{mask_array.min():g} to {mask_array.max():g}; compare them with a threshold."
            )
        logit_array, has_logits = _stack_optional("logits", logits)
        prompted = num_points > 0 if has_mask is None else (num_points > 0) | has_mask
        kind = np.where(prompted, REFINEMENT if refine else CONDITIONING, NONE)
        return cls(
            points=jnp.asarray(point_array),
            labels=jnp.asarray(label_array),
            num_points=jnp.asarray(num_points),
            kind=jnp.asarray(kind.astype(np.int32)),
            mask=None if mask_array is None else jnp.asarray(mask_array),
            has_mask=None if has_mask is None else jnp.asarray(has_mask),
            logits=None if logit_array is None else jnp.asarray(logit_array),
            has_logits=None if has_logits is None else jnp.asarray(has_logits),
        )

    @classmethod
    def stack(cls, rows: Sequence[Prompts]) -> Prompts:
        """Prompts of several frames, or of several videos' first frames, with a leading axis.

        Where some are for fewer objects or points than others, they are padded.

        Raises:
          ValueError: there are none, or masks or logits of different sizes.
        """
        if not rows:
            raise ValueError("No prompts: give at least one frame's.")
        count = max(row.num_objects for row in rows)
        width = max(row.labels.shape[-1] for row in rows)
        rows = [_pad(row, count, width) for row in rows]
        for name, flag in (("mask", "has_mask"), ("logits", "has_logits")):
            given = [getattr(row, name) for row in rows if getattr(row, name) is not None]
            if not given:
                continue
            if len({array.shape for array in given}) != 1:
                sizes = [array.shape[1:] for array in given]
                raise ValueError(f"All prompts' {name} must have one size, got {sizes}.")
            blank = {name: jnp.zeros_like(given[0]), flag: jnp.zeros(count, bool)}
            rows = [row if getattr(row, name) is not None else row.replace(**blank) for row in rows]
        return jax.tree.map(lambda *x: jnp.stack(x), *rows)


class ClipPrompts(Tree):
    """Prompts on K frames of a clip; a frame that has none takes no room."""

    frames: Array  # [K] int32 frame index, EMPTY for padding
    prompts: Prompts  # with a leading [K]

    @classmethod
    def make(cls, prompts: Mapping[int, Prompts]) -> ClipPrompts:
        """Stacks the prompts of some frames, given by frame index, for the same objects."""
        if not prompts:
            raise ValueError("No prompts: give at least one frame's.")
        if min(prompts) < 0:
            raise ValueError(f"Frames are counted from 0, got prompts of frame {min(prompts)}.")
        rows = list(prompts.values())
        if len({row.num_objects for row in rows}) != 1:
            raise ValueError(
                "All frames' prompts must be for the same number of objects, got "
                f"{[row.num_objects for row in rows]}."
            )
        frames = jnp.asarray([operator.index(frame) for frame in prompts], jnp.int32)
        return cls(frames=frames, prompts=Prompts.stack(rows))


def _num_entries(name: str, column: Any) -> int:
    try:
        return len([column[i] for i in range(len(column))])
    except (TypeError, LookupError):
        raise ValueError(
            f"{name} must be a list of one entry per object, got {column!r}."
        ) from None


def _pad(prompts: Prompts, count: int, width: int) -> Prompts:
    """With room for more objects, which are not prompted, and for more points."""
    objects, points = count - prompts.num_objects, width - prompts.labels.shape[-1]

    def pad(x: Array, *extra: int) -> Array:
        return jnp.pad(x, [(0, e) for e in (*extra, *[0] * (x.ndim - len(extra)))])

    fields = {name: value for name, value in vars(prompts).items() if value is not None}
    widths = {"points": (objects, points), "labels": (objects, points)}
    padded = {name: pad(x, *widths.get(name, (objects,))) for name, x in fields.items()}
    return prompts.replace(**padded)


def point_rows(owner: str, points: Any, labels: Any, box: Any, mask: Any):
    """One object's points and labels, checked, a box's corners first: [P, 2], [P] in NumPy.

    `owner` names the object, as in "object 3".
    """
    if labels is not None and points is None:
        raise ValueError(f"There are labels but no points of {owner}.")
    if mask is not None and (points is not None or box is not None):
        raise ValueError(f"Give a mask of {owner}, or points and a box, not both.")
    rows, kinds = np.zeros((0, 2), np.float32), np.zeros(0, np.int32)
    if points is not None:
        rows = _numbers(f"points of {owner}", points)
        if rows.ndim != 2 or rows.shape[1] != 2:
            raise ValueError(f"Points of {owner} must be [P, 2] (x, y), got {rows.shape}.")
        kinds = np.ones(len(rows), np.int32) if labels is None else np.asarray(labels)
        if kinds.shape != (len(rows),):
            raise ValueError(
                f"There are {len(rows)} points of {owner}, but labels of shape {kinds.shape}."
            )
        if not np.isin(kinds, (-1, 0, 1, 2, 3)).all():
            raise ValueError(
                f"Labels of {owner} must be 1 (foreground), 0 (background), 2 and 3 (box "
                f"corners) or -1, got {sorted(set(kinds.tolist()), key=str)}."
            )
    if box is not None:
        corners = _numbers(f"box of {owner}", box)
        if corners.size != 4:
            raise ValueError(f"Box of {owner} must be (x0, y0, x1, y1), got {box!r}.")
        rows = np.concatenate([corners.reshape(2, 2), rows])
        kinds = np.concatenate([np.array([2, 3]), kinds])
    if not np.isfinite(rows).all():
        raise ValueError(f"Prompt coordinates of {owner} must be finite, got {rows.tolist()}.")
    return rows, kinds.astype(np.int32)


def _numbers(what: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value, np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what} must be an array of numbers: {error}.") from error


def _stack_optional(name: str, entries: Sequence[Any] | None):
    """Stacks maps [h, w] of the objects that have one: [N, h, w] and which are real, or None."""
    given = [None if e is None else _numbers(name, e) for e in entries or ()]
    shapes = {e.shape for e in given if e is not None}
    if not shapes:
        return None, None
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or 0 in next(iter(shapes)):
        raise ValueError(f"{name} must all be [h, w] of one size, got {sorted(shapes)}.")
    if not all(np.isfinite(e).all() for e in given if e is not None):
        raise ValueError(f"{name} must be finite.")
    blank = np.zeros(next(iter(shapes)), np.float32)
    stacked = np.stack([blank if e is None else e for e in given])
    return stacked, np.array([e is not None for e in given])


def power_of_two(count: int) -> int:
    """The least power of two that holds `count`: few sizes, few compilations."""
    return 1 << max(count - 1, 0).bit_length()
