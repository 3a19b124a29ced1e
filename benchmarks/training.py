"""A training step: the losses of one clip, their gradient, and AdamW's update, in float32; with a
frame's intermediate values kept for its gradient, as officially, and with them computed again. The
official one runs on CPUs here, and stands beside ours on a CPU only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.settings import SEED, Settings
from benchmarks.timing import Row, compare
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.resize import preprocess_image
from sam2jax.testing import random_params
from sam2jax.training.data.config import HELD_OUT
from sam2jax.training.data.procedural import procedural_clip
from sam2jax.training.losses import LossConfig
from sam2jax.training.prompts import Plan, PromptConfig
from sam2jax.training.rollout import clip_losses, training_config

NUM_FRAMES = 4
LOSS_BAR = 1e-4  # of the official loss
PROMPTS, LOSS = PromptConfig(corrections=0), LossConfig()
STILL = 0.0  # the learning rate: a step's work does not depend on it, and all steps stay alike


def rows(settings: Settings) -> Iterator[Row]:
    """Every object is clicked on in the first frame."""
    size = min(settings.first.image_size, settings.train_size)
    config = training_config(dataclasses.replace(settings.exact, image_size=size))
    clip = procedural_clip(HELD_OUT.scene, 0, image_size=size, num_frames=NUM_FRAMES)
    key = jax.random.key(SEED)
    theirs = None
    if settings.official and jax.default_backend() == "cpu":
        theirs = Official(config, clip, key)
    for remat, how in ((False, "kept"), (True, "computed again")):
        ours = Ours(SAM2(config), random_params(config, SEED), clip, key, remat)
        if theirs:
            mine, official = ours.step(), theirs.step()
            if not abs(mine - official) <= LOSS_BAR * official:
                raise AssertionError(f"loss {mine}, official {official}")
        name = f"{NUM_FRAMES} frames, {size} px, {how}"
        yield compare(name, theirs and theirs.step, ours.step, settings.runs)


def first_frame_clicked() -> Plan:
    none = jnp.zeros(NUM_FRAMES, bool)
    return Plan(
        frame=jnp.arange(NUM_FRAMES, dtype=jnp.int32),
        conditioning=none.at[0].set(True),
        points=jnp.bool_(True),
        box=none,
        corrected=none,
        from_truth=jnp.zeros((NUM_FRAMES, 0), bool),
    )


class Ours:
    def __init__(self, model: SAM2, params: Any, clip: Any, key: Any, remat: bool) -> None:
        optimizer = optax.adamw(STILL)
        self.held = params, optimizer.init(params)
        self.frames, self.masks = jnp.asarray(clip.frames), jnp.asarray(clip.masks)
        weights = jnp.full(clip.masks.shape[1], 1 / clip.masks.shape[1])
        plan = first_frame_clicked()

        @jax.jit
        def step(held: Any, frames: Any, masks: Any):
            def loss(params: Any):
                given = (frames, masks, plan, key, PROMPTS, LOSS)
                losses, _ = clip_losses(model, params, *given, remat=remat)
                return jnp.sum(jax.tree.map(lambda x: x @ weights, losses).total(LOSS))

            params, state = held
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        self.program = step

    def step(self) -> float:
        self.held, loss = jax.block_until_ready(self.program(self.held, self.frames, self.masks))
        return float(loss)


class Official:
    def __init__(self, config: Any, clip: Any, key: Any) -> None:
        import torch

        from tests import training_oracle

        self.losses, self.masks = training_oracle.frame_losses, np.asarray(clip.masks)
        self.model = training_oracle.build(config, corrections=0, seed=SEED)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=STILL)
        self.frames = np.asarray(preprocess_image(clip.frames, config.image_size))
        self.script = training_oracle.scripted(self.frames, self.masks, first_frame_clicked(), key)

    def step(self) -> float:
        self.optimizer.zero_grad()
        _, losses = self.losses(self.model, self.frames, self.masks, self.script)
        total = sum(frame["core_loss"] for frame in losses)
        total.backward()
        self.optimizer.step()
        return total.item()
