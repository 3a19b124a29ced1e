"""The pytrees that cross borders between layers: features, prompts, candidates, memory, answers.

Shapes: S is the model's image size, N objects, P points, C the hidden width, D the memory width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
ArrayLike = Any  # array, list or scalar that NumPy understands

EMPTY = -1  # frame index of a memory slot that holds nothing
NO_OBJ_SCORE = -1024.0  # mask logit of an absent object (official `NO_OBJ_SCORE`)

# Prompts.kind
NONE = 0  # no prompt: the object is tracked
CONDITIONING = 1  # a new conditioning frame: answered without memory, kept for good
REFINEMENT = 2  # clicks that correct a tracked frame: answered with memory


@struct.dataclass
class ImageFeatures:
    """What the image encoder makes of a batch of frames; all that later stages see of them."""

    high_res_s0: Array  # [B, S/4, S/4, C/8]
    high_res_s1: Array  # [B, S/8, S/8, C/4]
    features: Array  # [B, S/16, S/16, C]


@struct.dataclass
class MaskCandidates:
    """The mask decoder's answer: token 0 is the single mask, tokens 1..M the alternatives."""

    masks: Array  # [N, 1 + M, S/4, S/4] float32 logits
    ious: Array  # [N, 1 + M] float32, predicted IoU in [0, 1]
    tokens: Array  # [N, 1 + M, C], output tokens that object pointers are made from
    object_score: Array  # [N] float32 logit, above 0: the object is in the frame


@struct.dataclass
class MemoryRead:
    """What a frame attends to, per object; valid entries come first (leading [N] when vmapped)."""

    spatial: Array  # [K, HW, D] spatial memories
    spatial_tpos: Array  # [K] int32, row of the temporal encoding
    spatial_frame: Array  # [K] int32 frame index, EMPTY past the valid ones
    num_spatial: Array  # [] int32
    pointers: Array  # [Q, C] object pointers
    pointer_position: Array  # [Q] float32, signed distance in time, in units of the longest
    pointer_frame: Array  # [Q] int32 frame index, EMPTY past the valid ones
    num_pointers: Array  # [] int32


@struct.dataclass
class FrameMemory:
    """What one frame leaves behind for one object (leading [N] when vmapped)."""

    frame: Array  # [] int32 frame index
    spatial: Array  # [HW, D] bfloat16
    pointer: Array  # [C] float32
    iou: Array  # [] float32, predicted IoU of the mask that was taken
    object_score: Array  # [] float32 logit


@struct.dataclass
class FrameOutput:
    """The answer on one frame (leading [T] after `track`)."""

    masks: Array  # [N, S/4, S/4] float32 logits; `resize_masks` brings them to the frame
    iou: Array  # [N] float32, predicted IoU of each mask
    object_score: Array  # [N] float32 logit, above 0: the object is in the frame
    memory_frames: Array  # [N, K] int32, frames whose spatial memory was read (EMPTY: none)
    pointer_frames: Array  # [N, Q] int32, frames whose object pointer was read (EMPTY: none)


@struct.dataclass
class Prompts:
    """Prompts on one frame, for each of N objects. `Prompts.make` builds them from lists.

    Points are (x, y) in pixels of the frame that is given with them. Entries past `num_points`
    are padding, masked out of the decoder. `mask` and `logits` are either absent for all objects
    (None) or present for all, with a flag that says whose are real.
    """

    points: Array  # [N, P, 2] float32
    labels: Array  # [N, P] int32: 1 foreground, 0 background, 2 and 3 a box's corners, -1 not a point
    num_points: Array  # [N] int32
    kind: Array  # [N] int32: NONE, CONDITIONING or REFINEMENT
    mask: Array | None = None  # [N, h, w] float32 in [0, 1]: a mask prompt, used as the answer
    has_mask: Array | None = None  # [N] bool
    logits: Array | None = None  # [N, S/4, S/4] float32: earlier answer, fed back beside clicks
    has_logits: Array | None = None  # [N] bool

    @property
    def num_objects(self) -> int:
        return self.labels.shape[-2]


@struct.dataclass
class ClipPrompts:
    """Prompts on K frames of a clip; a frame that has none takes no room."""

    frames: Array  # [K] int32 frame index, EMPTY for padding
    prompts: Prompts  # with a leading [K]
