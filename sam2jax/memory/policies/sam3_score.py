"""SAM 3's own selection of frames: those in which the object was seen, and seen well."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.memory import official
from sam2jax.memory.bank import MemoryBank
from sam2jax.memory.policies import ranked
from sam2jax.memory.policies.ranked import Accepted
from sam2jax.memory.policy import MemoryPolicy, Now, best_iou, no_judgement
from sam2jax.types import Array, FrameMemory, MemoryRead


def sam3_score(threshold: float | Array = 0.01) -> MemoryPolicy:
    """The filter of SAM 3's tracker (arXiv 2511.16719; its release's temporal disambiguation).

    A frame is remembered if `(2 sigmoid(o) - 1) iou` is above a threshold and the object is in
    sight, for object score o and the predicted IoU of its mask. The last six such frames are
    attended to, whatever lies between, and the pointers of the last fifteen; the previous frame
    always is.

    Args:
      threshold: of that product.
    """
    return MemoryPolicy(
        init=ranked.nothing_accepted,
        read=_read,
        choose=best_iou,
        judge=no_judgement,
        write=_write,
        settings=jnp.asarray(threshold, jnp.float32),
    )


def _read(
    config: SAM2Config, settings: Array, bank: MemoryBank, carried: Accepted, now: Now
) -> MemoryRead:
    longest = official.longest_distance(config, now.num_frames)
    spatial = ranked.select_spatial(config, bank, carried, now)
    room = jnp.int32(config.num_recent_pointers)
    pointers = ranked.select_pointers(config, bank, carried, now, room)
    return official.gather_selected(config, bank, spatial, pointers, longest)


def _write(
    config: SAM2Config,
    settings: Array,
    bank: MemoryBank,
    carried: Accepted,
    memory: FrameMemory,
    now: Now,
) -> tuple[MemoryBank, Accepted]:
    confidence = (2 * jax.nn.sigmoid(memory.object_score) - 1) * memory.iou
    good = (memory.object_score > 0) & (confidence > settings)
    return ranked.write(bank, carried, memory, now, good=good, good_pointer=good)
