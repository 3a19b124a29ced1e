"""The compiled programs of a session.

Each is compiled once for a model and a size of video: for any number of clicks, either direction
in time and, up to a power of two, any number of objects and of prompted frames.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sam2jax.config import SAM2Config
from sam2jax.memory.bank import MemoryBank, empty
from sam2jax.memory.policy import MemoryPolicy, Now, Seen
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.resize import resize_masks
from sam2jax.predictors.sizes import jit_for_sizes
from sam2jax.tracking.frame import process_frame
from sam2jax.tracking.segment import fit_mask_prompt
from sam2jax.tracking.state import TrackState
from sam2jax.tracking.step import encode_frames
from sam2jax.tree import Tree
from sam2jax.types import EMPTY, Array, FrameMemory, ImageFeatures, MaskCandidates, Prompts


class Record(Tree):
    """One object's answer on one frame, and what it leaves behind."""

    masks: Array  # [S/4, S/4] float32 logits, holes filled
    memory: FrameMemory  # of one object, with the predicted IoU and the object score


@partial(jax.jit, static_argnums=0)
def encode(model: SAM2, params: Any, frames: Array) -> ImageFeatures:
    """Frames [K, H, W, 3] as one batch."""
    return encode_frames(model, params, frames)


@partial(jax.jit, static_argnums=0)
def answer_prompt(
    model: SAM2,
    params: Any,
    policy: MemoryPolicy,
    state: TrackState,
    features: ImageFeatures,
    prompts: Prompts,
    direction: Array,
) -> Record:
    """One object's answer to a prompt; the state, of that object alone, stays what it is."""
    _, result = process_frame(model, params, state, features, prompts, direction, policy)
    return jax.tree.map(lambda x: x[0], Record(masks=result.output.masks, memory=result.memory))


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def track_frames(
    model: SAM2,
    params: Any,
    policy: MemoryPolicy,
    state: TrackState,
    features: ImageFeatures,
    busy: Array,
    direction: Array,
) -> tuple[TrackState, Record]:
    """Tracks N objects through K encoded frames.

    `busy` [K, N] bool: objects that are to be tracked on a frame. The others are passed over, at
    no cost: padding, and objects that are prompted there.

    Returns the state after the frames, and the answers with leading [K, N].
    """

    def with_cond(state: TrackState, frames: Array) -> TrackState:
        return state.replace(bank=state.bank.replace(cond_frame=frames))

    def body(state: TrackState, item):
        features, busy = item
        features = jax.tree.map(lambda x: x[None], features)
        busy = jnp.repeat(busy, policy.lineages)[:, None]
        before = state.bank.cond_frame
        # An object without conditioning frames is not tracked.
        state = with_cond(state, jnp.where(busy, before, EMPTY))
        state, result = process_frame(model, params, state, features, None, direction, policy)
        state = with_cond(state, jnp.where(busy, state.bank.cond_frame, before))
        result = result.best(policy.lineages)
        return state, Record(masks=result.output.masks, memory=result.memory)

    return jax.lax.scan(body, state, (features, busy))


@jax.jit
def take(records: Record, frame: Array, place: Array) -> Record:
    """One object's answer on one frame, of `track_frames`."""
    return jax.tree.map(lambda x: x[frame, place], records)


@jit_for_sizes
def at_size(masks: Array, *, size: tuple[int, int]) -> Array:
    """One object's mask logits [S/4, S/4] at the size of the video: [H, W]."""
    return resize_masks(masks[None], size)[0]


@jit_for_sizes
def fit_mask(mask: Array, *, size: int) -> Array:
    """A mask prompt [h, w] at the model's size: [S, S] float32, 0 or 1."""
    return fit_mask_prompt(mask[None], size)[0]


class Held(Tree):
    """What the tracker holds of one object."""

    bank: MemoryBank
    carried: Any  # the policy's own state


@partial(jax.jit, static_argnums=(0, 2))
def nothing_held(config: SAM2Config, policy: MemoryPolicy, room: int) -> Held:
    """Of an object that was never seen, with room for so many prompted frames."""
    bank = empty(config, room, policy.room)
    return Held(bank=bank, carried=policy.init(config, policy.settings, bank))


@partial(jax.jit, static_argnums=0)
def remember(
    config: SAM2Config,
    policy: MemoryPolicy,
    held: Held,
    record: Record,
    direction: Array,
    conditioning: Array,
    multimask: Array,
    due: Array,
) -> Held:
    """With a frame's memory put in, as a conditioning or a recent one.

    What the policy makes of the answer is worked out again, if it is `due`: frames that lie ahead
    wait for their turn. What it made of the decoder's other masks is not known any more.
    """
    memory = record.memory
    now = Now(
        frame=memory.frame,
        direction=direction,
        num_frames=jnp.int32(config.max_obj_ptrs_in_encoder),
        conditioning=conditioning,
        recent=~conditioning,
        multimask=multimask,
    )
    # An answer without a pixel is no motion to follow.
    iou = jnp.where(jnp.any(record.masks > 0), memory.iou, 0.0)
    count = 1 + config.mask_decoder.num_multimask_outputs
    candidates = MaskCandidates(
        masks=jnp.broadcast_to(record.masks, (count, *record.masks.shape)),
        ious=jnp.broadcast_to(iou, count),
        tokens=jnp.zeros((count, config.hidden_dim), jnp.float32),
        object_score=memory.object_score,
    )
    carried, of_each = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (policy.lineages, *jnp.shape(x))), (held.carried, candidates)
    )
    _, carried = policy.choose(config, policy.settings, carried, of_each, now)
    seen = Seen(
        alternatives=candidates.masks[1:],
        chosen=jnp.int32(0),
        mask=record.masks,
        iou=memory.iou,
        object_score=memory.object_score,
    )
    first = jax.tree.map(lambda x: x[0], carried)
    judged, _ = policy.judge(config, policy.settings, first, seen, now)
    carried = jax.tree.map(partial(jnp.where, due), judged, held.carried)
    bank, carried = policy.write(config, policy.settings, held.bank, carried, memory, now)
    # A frame on which NaN or infinity arose has left nothing behind.
    something = partial(jnp.where, memory.frame != EMPTY)
    return jax.tree.map(something, Held(bank=bank, carried=carried), held)


@partial(jax.jit, static_argnums=0)
def take_turn(
    config: SAM2Config,
    policy: MemoryPolicy,
    state: TrackState,
    place: Array,
    record: Record,
    direction: Array,
    multimask: Array,
) -> TrackState:
    """With an object's prompted frame told to the policy, when tracking has come to it."""
    rows = place * policy.lineages + jnp.arange(policy.lineages, dtype=jnp.int32)
    held = Held(bank=state.bank, carried=state.carried)
    told = jax.vmap(
        lambda held: remember(
            config, policy, held, record, direction, jnp.bool_(True), multimask, jnp.bool_(True)
        )
    )(jax.tree.map(lambda x: x[rows], held))
    held = jax.tree.map(lambda old, new: old.at[rows].set(new), held, told)
    return state.replace(bank=held.bank, carried=held.carried)


def carries(config: SAM2Config, policy: MemoryPolicy) -> bool:
    """Whether the policy has a state of its own."""
    return bool(jax.tree.leaves(jax.eval_shape(lambda: nothing_held(config, policy, 1).carried)))


@partial(jax.jit, static_argnums=0)
def stack(lineages: int, *held: Held) -> Held:
    """Of N objects, each in so many lineages: leading [N * P]."""
    return jax.tree.map(lambda *x: jnp.repeat(jnp.stack(x), lineages, axis=0), *held)
