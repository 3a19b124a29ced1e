"""One step of training: a batch of clips, their losses, and new parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from sam2jax.nn.sam2 import SAM2
from sam2jax.training.config import TrainConfig
from sam2jax.training.data.clip import Clip
from sam2jax.training.lora import init_lora, merge_lora
from sam2jax.training.optimizer import make_optimizer, make_schedule
from sam2jax.training.prompts import make_plan
from sam2jax.training.rollout import clip_losses
from sam2jax.tree import Tree
from sam2jax.types import Array

# The random frequencies of positions, and what no forward pass reads.
NEVER_TRAINED = r"positional_encoding_gaussian_matrix$|^no_mem_pos_enc$"


class TrainState(Tree):
    """What a run carries from step to step. Parameters are float32, {path: array}."""

    step: Array  # [] int32, steps taken
    trainable: dict[str, Array]  # what is learnt: parameters, or low-rank updates of them
    frozen: dict[str, Array]  # the parameters that stay
    opt_state: optax.OptState


def init_train_state(config: TrainConfig, model: SAM2, params: Any, key: Array) -> TrainState:
    """A run that has taken no step.

    Args:
      config: of the run.
      model: to be trained.
      params: nested parameters to start from.
      key: random, for low-rank updates.

    Raises:
      ValueError: nothing is left to be trained, or a rule of `freeze` is for no parameter.
    """
    flat = {path: jnp.asarray(value, jnp.float32) for path, value in _flat(params).items()}
    if config.lora is not None:
        trainable, frozen = init_lora(config.lora, flat, key), flat
    else:
        for rule in config.freeze:
            if not any(re.search(rule, path) for path in flat):
                raise ValueError(
                    f"freeze: {rule!r} is in no parameter's name; they begin with "
                    f"{', '.join(sorted(params))}."
                )
        stays = re.compile("|".join([NEVER_TRAINED, *config.freeze]))
        frozen = {path: value for path, value in flat.items() if stays.search(path)}
        trainable = {path: value for path, value in flat.items() if path not in frozen}
    if not trainable:
        raise ValueError(f"freeze = {list(config.freeze)} leaves nothing to be trained.")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=frozen,
        opt_state=_optimizer(config, model, trainable).init(trainable),
    )


def model_params(config: TrainConfig, state: TrainState) -> Any:
    """The nested parameters that a state stands for."""
    return unflatten_dict(_assemble(config, state.trainable, state.frozen), sep="/")


@partial(jax.jit, static_argnames=("config", "model"), donate_argnames="state")
def train_step(
    config: TrainConfig, model: SAM2, state: TrainState, batch: Clip
) -> tuple[TrainState, dict[str, Array]]:
    """One step on a batch of clips.

    Everything random in it is drawn from the configuration's seed and the step's number, so that
    a run can be taken up again.

    Args:
      config: of the run.
      model: with the options of `training_config`.
      state: donated.
      batch: frames [B, T, S, S, 3] uint8, masks [B, T, M, S, S] bool and objects [B, M] bool.

    Returns:
      The next state, and metrics: each loss, their weighted sum (`loss`), the mean IoU over frames
      in which objects are seen, the norm of the gradient and the learning rate.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    loss = partial(batch_loss, config, model, batch=batch, key=key)
    (_, metrics), gradient = jax.value_and_grad(
        lambda trainable: loss(_assemble(config, trainable, state.frozen)), has_aux=True
    )(state.trainable)
    optimizer = _optimizer(config, model, state.trainable)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    schedule = make_schedule(config.optimizer, config.steps)
    metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
    state = state.replace(
        step=state.step + 1,
        trainable=optax.apply_updates(state.trainable, updates),
        opt_state=opt_state,
    )
    return state, metrics


def batch_loss(
    config: TrainConfig, model: SAM2, flat_params: Mapping[str, Array], *, batch: Clip, key: Array
) -> tuple[Array, dict[str, Array]]:
    """The weighted loss of a batch, per object, and its parts."""
    params = unflatten_dict(dict(flat_params), sep="/")
    plan_key, clip_key = jax.random.split(key)
    count, num_frames = batch.frames.shape[:2]
    plan = make_plan(config.prompts, plan_key, num_frames)

    def one(frames: Any, masks: Any, key: Array):
        return clip_losses(
            model,
            params,
            frames,
            masks,
            plan,
            key,
            config.prompts,
            config.loss,
            remat=config.remat,
        )

    losses, ious = jax.vmap(one)(batch.frames, batch.masks, jax.random.split(clip_key, count))
    objects = jnp.asarray(batch.objects)
    number = jnp.maximum(jnp.sum(objects), 1).astype(jnp.float32)
    real = objects[:, None]
    losses = jax.tree.map(lambda x: jnp.sum(jnp.where(real, x, 0.0)) / number, losses)
    total = losses.total(config.loss)
    seen = jnp.any(batch.masks, axis=(3, 4))[:, plan.frame]  # [B, T, M]
    iou = jnp.sum(jnp.where(seen, ious, 0.0)) / jnp.maximum(jnp.sum(seen), 1).astype(jnp.float32)
    parts = {f"loss_{name}": value for name, value in vars(losses).items()}
    return total, {"loss": total, **parts, "iou": iou}


def _assemble(
    config: TrainConfig, trainable: Mapping[str, Array], frozen: Mapping[str, Array]
) -> dict[str, Array]:
    if config.lora is not None:
        return merge_lora(config.lora, frozen, trainable)
    return {**frozen, **trainable}


def _optimizer(
    config: TrainConfig, model: SAM2, trainable: Mapping[str, Array]
) -> optax.GradientTransformation:
    num_blocks = sum(model.config.trunk.stages)
    return make_optimizer(config.optimizer, trainable, num_blocks, config.steps)


def _flat(params: Any) -> dict[str, Any]:
    return flatten_dict(params, sep="/")
