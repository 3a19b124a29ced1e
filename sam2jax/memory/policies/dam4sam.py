"""DAM4SAM: a memory that resolves distractors beside a recent one (arXiv 2411.17576)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from sam2jax.config import SAM2Config
from sam2jax.memory import official
from sam2jax.memory.bank import (
    FAR,
    MemoryBank,
    Room,
    Selected,
    becomes_recent,
    first_prompted,
    gather,
    put,
    put_cond,
    put_recent,
    release,
    slot_for,
)
from sam2jax.memory.policy import MemoryPolicy, Now, Seen, best_iou
from sam2jax.ops.masks import largest_component
from sam2jax.tree import Tree
from sam2jax.types import EMPTY, Array, FrameMemory, MemoryRead

_AREAS = 10  # of the last visible frames, whose median a new area is held against
_WITHIN = 300  # frames back that they may lie


class Settings(Tree):
    iou_threshold: Array
    area_low: Array
    area_high: Array
    box_threshold: Array
    apart: Array  # frames
    stride: int = struct.field(pytree_node=False)
    most: int = struct.field(pytree_node=False)  # of the distractor-resolving memory


class Carried(Tree):
    start: Array  # [] int32, the first conditioning frame, or EMPTY
    promoted_at: Array  # [] int32, the last promoted frame, or EMPTY
    promote: Array  # [] bool, whether the frame being processed is promoted
    visible: Array  # [] bool, whether it shows the object
    cond_visible: Array  # [C] bool, whether those frames did
    areas: Array  # [10] float32, of the last visible frames
    area_frames: Array  # [10] int32


def dam4sam(
    iou_threshold: float | Array = 0.8,
    area_low: float | Array = 0.8,
    area_high: float | Array = 1.2,
    box_threshold: float | Array = 0.7,
    apart: int | Array = 5,
    stride: int = 5,
    most: int = 4,
) -> MemoryPolicy:
    """Frames in which a distractor was told from the object are kept beside the recent ones.

    A tracked frame is promoted to the distractor-resolving memory (DRM) when its mask is good, of
    a usual size, and an alternative mask claims something else too: the box of the mask and of
    the largest component that the alternative adds is much larger than that of the mask. The
    recent memory (RAM) has the previous frame and every `stride`-th one in which the object is
    visible. Masks are compared at their own resolution, a quarter of the image's.

    Args:
      iou_threshold: predicted IoU above which a mask is good.
      area_low, area_high: of its area, in medians of the last ten.
      box_threshold: IoU of the two boxes up to which there is a distractor.
      apart: frames from one promotion to the next, at least one more than that.
      stride: of the recent memory.
      most: frames of the DRM that are attended to, the first prompted one among them.
    """
    numbers = (iou_threshold, area_low, area_high, box_threshold)
    return MemoryPolicy(
        init=_init,
        read=_read,
        choose=best_iou,
        judge=_judge,
        write=_write,
        settings=Settings(
            *(jnp.asarray(number, jnp.float32) for number in numbers),
            apart=jnp.asarray(apart, jnp.int32),
            stride=stride,
            most=most,
        ),
        room=Room(cond=most),
    )


def _init(config: SAM2Config, settings: Settings, bank: MemoryBank) -> Carried:
    none = jnp.full((), EMPTY, jnp.int32)
    return Carried(
        start=none,
        promoted_at=none,
        promote=jnp.zeros((), bool),
        visible=jnp.zeros((), bool),
        cond_visible=jnp.zeros_like(bank.cond_frame, bool),
        areas=jnp.zeros(_AREAS, jnp.float32),
        area_frames=jnp.full(_AREAS, EMPTY, jnp.int32),
    )


# Reading ------------------------------------------------------------------------------------------


def _read(
    config: SAM2Config, settings: Settings, bank: MemoryBank, carried: Carried, now: Now
) -> MemoryRead:
    resolving = _resolving(settings, bank, carried, now)
    passed = (now.frame - carried.start) * now.direction
    longest = official.longest_distance(config, passed + 1)
    spatial = _select_spatial(config, settings, bank, carried, resolving, now)
    pointers = _select_pointers(bank, carried, resolving, longest, now)
    num_spatial = max(config.num_maskmem, settings.most)
    num_pointers = settings.most + config.num_recent_pointers
    return gather(bank, spatial, num_spatial, pointers, num_pointers, longest)


def _resolving(settings: Settings, bank: MemoryBank, carried: Carried, now: Now) -> Array:
    """The DRM as it is attended to: [C] bool. The first prompted frame, and the newest of the
    others but for the previous frame."""
    first = (bank.cond_frame == carried.start) & (bank.cond_frame != EMPTY)
    age = (now.frame - bank.cond_frame) * now.direction
    other = (bank.cond_frame != EMPTY) & ~first & (age > 1)
    newer = other[None, :] & (age[None, :] < age[:, None])
    return first | (other & (jnp.sum(newer, axis=1) < settings.most - 1))


def _select_spatial(
    config: SAM2Config,
    settings: Settings,
    bank: MemoryBank,
    carried: Carried,
    resolving: Array,
    now: Now,
) -> Selected:
    """The DRM, the newest visible frame beside it, and those of the grid before that one."""
    frames = bank.spatial_frame
    age = (now.frame - frames) * now.direction
    spare = (bank.cond_frame != EMPTY) & ~resolving & carried.cond_visible
    visible = jnp.concatenate([spare, bank.recent_frame != EMPTY]) & (age >= 1)
    newest = jnp.min(jnp.where(visible, age, FAR))
    listed = visible & ((age == newest) | (frames % settings.stride == 0))
    place = jnp.sum(listed[None, :] & (age[None, :] < age[:, None]), axis=1, dtype=jnp.int32)
    room = config.num_maskmem - jnp.sum(resolving, dtype=jnp.int32)
    resolving = jnp.pad(resolving, (0, len(bank.recent_frame)))
    return Selected(
        valid=resolving | (listed & (place < jnp.minimum(room, config.num_recent))),
        rank=jnp.where(resolving, frames - FAR, place),
        position=jnp.where(resolving, config.num_maskmem - 1, place),
    )


def _select_pointers(
    bank: MemoryBank, carried: Carried, resolving: Array, longest: Array, now: Now
) -> Selected:
    """Those of the DRM, and of the visible frames among the last fifteen."""
    distance = (now.frame - bank.pointed_frame) * now.direction
    spare = (bank.cond_frame != EMPTY) & ~resolving & carried.cond_visible
    visible = jnp.concatenate([spare, bank.pointer_frame != EMPTY])
    near = visible & (distance >= 1) & (distance <= longest)
    resolving = jnp.pad(resolving, (0, len(bank.pointer_frame)))
    return Selected(
        valid=resolving | near,
        rank=jnp.where(resolving, bank.pointed_frame - FAR, distance),
        position=distance,
    )


# Writing ------------------------------------------------------------------------------------------


def _judge(
    config: SAM2Config, settings: Settings, carried: Carried, seen: Seen, now: Now
) -> tuple[Carried, Array]:
    """Whether the frame is promoted. A promoted one is encoded from its mask cut at zero."""
    area = jnp.sum(seen.mask > 0).astype(jnp.float32)
    visible = area > 0
    areas = jnp.where(visible, jnp.roll(carried.areas, 1).at[0].set(area), carried.areas)
    area_frames = jnp.roll(carried.area_frames, 1).at[0].set(now.frame)
    area_frames = jnp.where(visible, area_frames, carried.area_frames)
    counted = (area_frames != EMPTY) & ((now.frame - area_frames) * now.direction < _WITHIN)
    usual = area / jnp.nanmedian(jnp.where(counted, areas, jnp.nan))
    promote = (
        now.multimask
        & now.recent
        & ~now.conditioning
        & (seen.iou > settings.iou_threshold)
        & visible
        & (usual >= settings.area_low)
        & (usual <= settings.area_high)
        & _is_apart(settings, carried, now)
        & (_least_box_iou(seen) <= settings.box_threshold)
    )
    carried = carried.replace(
        promote=promote, visible=visible, areas=areas, area_frames=area_frames
    )
    return carried, promote


def _is_apart(settings: Settings, carried: Carried, now: Now) -> Array:
    """Whether the last promotion is long ago, and the frame not the first that is tracked."""
    passed = (now.frame - carried.promoted_at) * now.direction
    tracked_for = (now.frame - carried.start) * now.direction
    never = carried.promoted_at == EMPTY
    return (never | (passed > settings.apart)) & (tracked_for >= 2)


def _least_box_iou(seen: Seen) -> Array:
    """Of the box of the mask and the box with what another alternative adds: the least, []."""
    masks = seen.alternatives > 0
    mask = masks[seen.chosen]
    box = _box(mask)

    def with_other(other: Array) -> Array:
        both = _box(mask | largest_component(other & ~mask))
        return _area(box) / jnp.maximum(_area(both), 1)  # the box lies in the other

    iou = jax.vmap(with_other)(masks)
    return jnp.min(jnp.where(jnp.arange(len(masks), dtype=jnp.int32) == seen.chosen, 1.0, iou))


def _box(mask: Array) -> tuple[Array, Array]:
    """Height and width in pixels of the box around a mask [S, S] bool."""

    def span(inside: Array) -> Array:
        index = jnp.arange(inside.shape[0], dtype=jnp.int32)
        last = jnp.max(jnp.where(inside, index, -1))
        return last - jnp.min(jnp.where(inside, index, last + 1)) + 1

    return span(jnp.any(mask, axis=1)), span(jnp.any(mask, axis=0))


def _area(sides: tuple[Array, Array]) -> Array:
    return (sides[0] * sides[1]).astype(jnp.float32)


def _write(
    config: SAM2Config,
    settings: Settings,
    bank: MemoryBank,
    carried: Carried,
    memory: FrameMemory,
    now: Now,
) -> tuple[MemoryBank, Carried]:
    promote = carried.promote & now.recent  # what was judged of a frame is of that frame alone
    kept = now.conditioning | promote
    recent = becomes_recent(bank, memory.frame, now.recent & carried.visible, kept)
    age = (now.frame - bank.cond_frame) * now.direction
    pinned = bank.cond_frame == carried.start
    cond = slot_for(bank.cond_frame, memory.frame, jnp.where(pinned, FAR // 2, -age)) & kept
    bank = _demote(settings, bank, carried, cond, now)
    bank = put_cond(release(bank, memory.frame, kept), cond, memory)
    spatial = _grid_slot(settings, bank, memory.frame, now) & recent
    distance = (now.frame - bank.pointer_frame) * now.direction
    pointer = slot_for(bank.pointer_frame, memory.frame, -distance) & recent
    return put_recent(bank, spatial, pointer, memory), carried.replace(
        start=first_prompted(carried.start, memory.frame, now.direction, now.conditioning),
        promoted_at=jnp.where(promote, memory.frame, carried.promoted_at),
        cond_visible=put(cond, carried.cond_visible, carried.visible),
    )


def _grid_slot(settings: Settings, bank: MemoryBank, frame: Array, now: Now) -> Array:
    """The recent slot [R] for a frame: of one that is not on the grid, else the oldest."""
    age = (now.frame - bank.recent_frame) * now.direction
    on_grid = bank.recent_frame % settings.stride == 0
    return slot_for(bank.recent_frame, frame, jnp.where(on_grid, 0, -FAR // 2) - age)


def _demote(
    settings: Settings, bank: MemoryBank, carried: Carried, cond: Array, now: Now
) -> MemoryBank:
    """What loses its conditioning slot stays in sight of the recent memory, if on its grid."""
    old = jnp.argmax(cond)
    frame = bank.cond_frame[old]
    memory = FrameMemory(
        frame=frame,
        spatial=bank.cond_spatial[old],
        pointer=bank.cond_pointer[old],
        iou=bank.cond_iou[old],
        object_score=bank.cond_score[old],
    )
    leaves = jnp.any(cond) & (frame != EMPTY) & (frame != now.frame) & carried.cond_visible[old]
    age = (now.frame - bank.recent_frame) * now.direction
    on_grid = (bank.recent_frame != EMPTY) & (bank.recent_frame % settings.stride == 0)
    newest = age == jnp.min(jnp.where(bank.recent_frame == EMPTY, FAR, age))
    keep = jnp.where(on_grid, 0, -FAR // 2) - age
    slot = slot_for(bank.recent_frame, frame, jnp.where(newest, FAR // 2, keep))
    # Only in the place of an older one, or of one that is read no more.
    older = (bank.recent_frame == EMPTY) | (keep < (frame - now.frame) * now.direction)
    slot = slot & older & leaves & (frame % settings.stride == 0)
    return put_recent(bank, slot, jnp.zeros_like(bank.pointer_frame, bool), memory)
