"""What a memory policy is: a handful of pure functions, and the numbers that they are given.

The tracker calls them on every frame, in this order: `read` (what the frame attends to), `choose`
(which of the decoder's masks is taken), `judge` (what the policy makes of the answer), `write`
(what is kept). All shapes are static, so that a policy runs under jit, scan, vmap and grad.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct

from sam2jax.config import SAM2Config
from sam2jax.memory import official
from sam2jax.memory.bank import MemoryBank, Room
from sam2jax.tree import Tree
from sam2jax.types import Array, FrameMemory, MaskCandidates, MemoryRead


class Now(Tree):
    """The frame that is being processed, for one object."""

    frame: Array  # [] int32
    direction: Array  # [] int32: 1 forward, -1 in reverse
    num_frames: Array  # [] int32, length of the clip (16 for a stream)
    conditioning: Array  # [] bool, the user prompts it, and it is answered without memory
    recent: Array  # [] bool, there is memory; also of a conditioning frame (`becomes_recent`)
    multimask: Array  # [] bool, one of the M alternatives is taken, not the single mask


class Choice(Tree):
    """What is taken of the decoder's masks, for an object of P lineages, the best first."""

    parent: Array  # [P] int32, the lineage that each goes on from
    best: Array  # [P] int32, of that lineage's M alternatives
    present: Array  # [P] bool, whether that lineage's object is in sight


class Seen(Tree):
    """The answer on a frame, for one object."""

    alternatives: Array  # [M, S/4, S/4] logits
    chosen: Array  # [] int32, which of them was taken; it counts where there is a choice
    mask: Array  # [S/4, S/4] logits of the answer, before holes are filled
    iou: Array  # [] predicted, of the answer
    object_score: Array  # [] logit


class MemoryPolicy(Tree):
    """What is kept and what is attended to: pure functions over the bank of one object.

    `carried` is the policy's own state, any pytree of arrays; `settings` are its numbers, which
    may be traced: one program serves all values, and they can be vmapped over and differentiated.
    """

    # (config, settings, empty bank) -> carried
    init: Callable[[SAM2Config, Any, MemoryBank], Any] = struct.field(pytree_node=False)
    # (config, settings, bank, carried, now) -> what is attended to
    read: Callable[[SAM2Config, Any, MemoryBank, Any, Now], MemoryRead] = struct.field(
        pytree_node=False
    )
    # (config, settings, carried, candidates, now) -> choice, carried; all with a leading [P]
    choose: Callable[[SAM2Config, Any, Any, MaskCandidates, Now], tuple[Choice, Any]] = (
        struct.field(pytree_node=False)
    )
    # (config, settings, carried, seen, now) -> carried, and whether the memory is to be encoded
    # from the mask cut at zero
    judge: Callable[[SAM2Config, Any, Any, Seen, Now], tuple[Any, Array]] = struct.field(
        pytree_node=False
    )
    # (config, settings, bank, carried, memory, now) -> bank, carried
    write: Callable[
        [SAM2Config, Any, MemoryBank, Any, FrameMemory, Now], tuple[MemoryBank, Any]
    ] = struct.field(pytree_node=False)
    settings: Any = ()
    room: Room = struct.field(pytree_node=False, default=Room())  # slots beside the official ones
    lineages: int = struct.field(pytree_node=False, default=1)  # histories followed at a time
    online: bool = struct.field(pytree_node=False, default=True)  # answers do not wait for the end


def sam2(
    memory_temporal_stride: int | None = None, max_cond_frames: int | None = None
) -> MemoryPolicy:
    """SAM 2's own rule (arXiv 2408.00714, section 4): prompted frames, and the last six.

    Args:
      memory_temporal_stride: every n-th frame is attended to; None: as the model says.
      max_cond_frames: prompted frames that are attended to, the nearest; None: as the model says.
    """
    return SAM2.replace(settings=Reach(memory_temporal_stride, max_cond_frames))


class Reach(Tree):
    """How far back SAM 2's rule looks: static, as shapes depend on it."""

    memory_temporal_stride: int | None = struct.field(pytree_node=False, default=None)
    max_cond_frames: int | None = struct.field(pytree_node=False, default=None)

    def of(self, config: SAM2Config) -> SAM2Config:
        """The configuration of a model that looks so far."""
        given = {
            "memory_temporal_stride_for_eval": self.memory_temporal_stride,
            "max_cond_frames_in_attn": self.max_cond_frames,
        }
        return dataclasses.replace(config, **{k: v for k, v in given.items() if v is not None})


# The parts of the default, for other policies to build on ---------------------------------------


def no_state(config: SAM2Config, settings: Any, bank: MemoryBank) -> tuple[()]:
    """Nothing is carried."""
    return ()


def reach(config: SAM2Config, settings: Any) -> SAM2Config:
    """The model as SAM 2's rule sees it; a policy with settings of its own leaves it as it is."""
    return settings.of(config) if isinstance(settings, Reach) else config


def official_read(
    config: SAM2Config, settings: Any, bank: MemoryBank, carried: Any, now: Now
) -> MemoryRead:
    return official.read(reach(config, settings), bank, now.frame, now.direction, now.num_frames)


def best_iou(
    config: SAM2Config, settings: Any, carried: Any, candidates: MaskCandidates, now: Now
) -> tuple[Choice, Any]:
    """The alternative with the highest predicted IoU."""
    choice = Choice(
        parent=jnp.arange(candidates.ious.shape[0], dtype=jnp.int32),
        best=jnp.argmax(candidates.ious[:, 1:], axis=-1).astype(jnp.int32),
        present=candidates.object_score > 0,
    )
    return choice, carried


def no_judgement(
    config: SAM2Config, settings: Any, carried: Any, seen: Seen, now: Now
) -> tuple[Any, Array]:
    return carried, jnp.zeros((), bool)


def official_write(
    config: SAM2Config,
    settings: Any,
    bank: MemoryBank,
    carried: Any,
    memory: FrameMemory,
    now: Now,
) -> tuple[MemoryBank, Any]:
    flags = {"conditioning": now.conditioning, "recent": now.recent}
    return official.write(reach(config, settings), bank, memory, now.direction, **flags), carried


SAM2 = MemoryPolicy(
    init=no_state,
    read=official_read,
    choose=best_iou,
    judge=no_judgement,
    write=official_write,
    settings=Reach(),
)
