"""What the tracker carries from one frame to the next."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sam2jax.checks import check_frame_index
from sam2jax.config import SAM2Config
from sam2jax.memory.bank import MemoryBank, empty
from sam2jax.memory.policy import SAM2 as SAM2_POLICY
from sam2jax.memory.policy import MemoryPolicy
from sam2jax.nn.sam2 import SAM2
from sam2jax.tree import Tree
from sam2jax.types import Array


class TrackState(Tree):
    """An immutable value. Its size depends on the model, the policy, and on how many objects and
    prompted frames it has room for; not on the length of the video."""

    bank: MemoryBank  # every field with a leading [N], or [N * P] where a policy has P lineages
    frame_index: Array  # [] int32, the frame to be processed next
    num_frames: Array  # [] int32, length of the clip (16 for a stream)
    carried: Any = ()  # the policy's own state, with the same leading axis
    lineages: int = struct.field(pytree_node=False, default=1)  # P, of the policy

    @property
    def num_objects(self) -> int:
        return self.bank.cond_frame.shape[0] // self.lineages


def require_memory(config: SAM2Config) -> None:
    """Refuses a model whose checkpoint was for images only."""
    if config.images_only:
        raise ValueError(
            f"{config.name} is for images only: it has no memory to track with. Load a "
            "checkpoint for video (an official .pt, or a Sam2VideoModel)."
        )


def init_state(
    model: SAM2,
    num_objects: int,
    num_frames: int | None = None,
    max_cond_frames: int = 4,
    frame_index: int = 0,
    policy: MemoryPolicy = SAM2_POLICY,
) -> TrackState:
    """A tracker that has seen nothing.

    Args:
      model: from `load`.
      num_objects: N, tracked at once.
      num_frames: length of the clip. The official tracker divides pointer distances by
        `min(num_frames, 16) - 1`; None (a stream of unknown length) stands for 16 or more.
      max_cond_frames: prompted frames that are kept. With as many as that, answers equal the
        official ones; of more, the one furthest in time gives way.
      frame_index: of the first frame to be processed.
      policy: what is kept and attended to; `step` and `track` are given the same.

    Raises:
      ValueError: a number is out of range, or the model is for images only.
    """
    require_memory(model.config)
    check_policy(policy)
    if num_objects < 1 or max_cond_frames < 1:
        raise ValueError(
            "num_objects and max_cond_frames must be at least 1, got "
            f"{num_objects} and {max_cond_frames}."
        )
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, or None for a stream, got {num_frames}.")
    check_frame_index(frame_index)
    bank = empty(model.config, max_cond_frames, policy.room)
    held = bank, policy.init(model.config, policy.settings, bank)
    rows = num_objects * policy.lineages
    bank, carried = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *jnp.shape(x))), held)
    return TrackState(
        bank=bank,
        frame_index=jnp.asarray(frame_index, jnp.int32),
        num_frames=jnp.asarray(
            model.config.max_obj_ptrs_in_encoder if num_frames is None else num_frames, jnp.int32
        ),
        carried=carried,
        lineages=policy.lineages,
    )


def check_policy(policy: Any) -> None:
    if not isinstance(policy, MemoryPolicy):
        raise TypeError(f"Expected a policy (see sam2jax.memory), got {type(policy).__name__}.")


def check_state(config: SAM2Config, state: TrackState, policy: MemoryPolicy) -> None:
    """The state was made for this model; cheap, as it is done for every frame."""
    check_policy(policy)
    if not isinstance(state, TrackState):
        raise TypeError(f"Expected a TrackState (see init_state), got {type(state).__name__}.")
    expected = (config.num_recent + policy.room.recent, config.feature_size**2, config.mem_dim)
    if state.bank.recent_spatial.shape[-3:] != expected:
        raise ValueError(
            "The state was made for another model, image size or policy: its recent memories are "
            f"{state.bank.recent_spatial.shape[-3:]}, here they are {expected}."
        )


def check_carried(config: SAM2Config, state: TrackState, policy: MemoryPolicy) -> None:
    """The state was made for this policy; done where a program is traced."""
    carried = jax.eval_shape(jax.vmap(partial(policy.init, config, policy.settings)), state.bank)
    kinds = [jax.tree.structure(x) for x in (carried, state.carried)]
    if state.lineages != policy.lineages or kinds[0] != kinds[1]:
        raise ValueError(
            "The state was made for another policy; give init_state the policy that is used here."
        )
