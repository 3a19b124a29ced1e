"""A clip of training: ours and the official code's, with the same weights, clicks and plan."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from sam2jax.convert.layouts import from_params, to_params
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.resize import preprocess_image
from sam2jax.testing import small_config
from sam2jax.training.losses import LossConfig, Losses
from sam2jax.training.prompts import Plan, PromptConfig
from sam2jax.training.rollout import (
    clip_losses,
    training_config,
)
from tests import training_oracle

pytestmark = pytest.mark.parity

SIZE, OBJECTS, CORRECTIONS = 64, 2, 2
NEWER = training_config(small_config(image_size=SIZE))
OLDER = dataclasses.replace(
    NEWER, name="small_2.0", no_obj_embed_spatial=False, add_tpos_enc_to_obj_ptrs=False
)
PROMPTS, LOSS = PromptConfig(corrections=CORRECTIONS), LossConfig()
SEED = 3
LOSS_BAR = 1e-5
GRADIENT_BAR = 2e-3  # of each tensor; memory and what comes back through it are rounded
PARTS = {"mask": "loss_mask", "dice": "loss_dice", "iou": "loss_iou", "object_score": "loss_class"}


class Result(NamedTuple):
    """Of one side."""

    total: float
    losses: Losses  # [T], summed over objects
    ious: np.ndarray | None  # [T, N]
    gradients: dict[str, np.ndarray]  # in the official layout


def make_plan(
    num_frames: int,
    conditioning: tuple[int, ...] = (0,),
    *,
    points: bool = True,
    box: tuple[int, ...] = (),
    corrected: tuple[int, ...] = (),
    from_truth: bool = False,
) -> Plan:
    """A plan from lists of frames."""
    order = [*conditioning, *(t for t in range(num_frames) if t not in conditioning)]
    frame = np.array(order, np.int32)
    return Plan(
        frame=jnp.asarray(frame),
        conditioning=jnp.isin(frame, np.array(conditioning)),
        points=jnp.asarray(points),
        box=jnp.isin(frame, np.array(box, np.int32)),
        corrected=jnp.isin(frame, np.array(corrected, np.int32)),
        from_truth=jnp.full((num_frames, CORRECTIONS), from_truth),
    )


def make_clip(num_frames: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frames [T, S, S, 3] uint8 and masks [T, N, S, S] of two ellipses that move."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (num_frames, SIZE // 8, SIZE // 8, 3), np.uint8)
    y, x = np.mgrid[:SIZE, :SIZE]
    time = np.arange(num_frames)[:, None, None]
    one = ((x - 20 - 4 * time) / 14) ** 2 + ((y - 24) / 10) ** 2 < 1
    other = ((x - 40) / 8) ** 2 + ((y - 40 + 3 * time) / 16) ** 2 < 1
    return np.kron(coarse, np.ones((1, 8, 8, 1), np.uint8)), np.stack([one, other], axis=1)


@functools.partial(jax.jit, static_argnames=("model", "remat"))
def differentiate(model, params, frames, masks, plan, key, weights, remat=False):
    """The loss with a weight for each object: [N]."""

    def loss(params: Any):
        losses, ious = clip_losses(
            model, params, frames, masks, plan, key, PROMPTS, LOSS, remat=remat
        )
        losses = jax.tree.map(lambda x: x @ weights, losses)
        return jnp.sum(losses.total(LOSS)), (losses, ious)

    return jax.value_and_grad(loss, has_aux=True)(params)


def ours(model, params, frames, masks, plan, key, weights=None, remat=False) -> Result:
    if weights is None:
        weights = np.full(OBJECTS, 1 / OBJECTS, np.float32)
    answer = differentiate(model, params, frames, masks, plan, key, weights, remat)
    (total, (losses, ious)), gradients = jax.device_get(answer)
    in_time = np.argsort(plan.frame)
    losses, ious = jax.tree.map(lambda x: x[in_time], (losses, ious))
    return Result(
        float(total), losses, ious, from_params(flatten_dict(gradients, sep="/"), "official")
    )


def theirs(official, frames, masks, plan, key) -> tuple[Result, list]:
    official.zero_grad()
    pixels = np.asarray(preprocess_image(frames, SIZE))
    answers, losses = training_oracle.frame_losses(
        official, pixels, masks, training_oracle.scripted(frames, masks, plan, key)
    )
    total = sum(frame["core_loss"] for frame in losses)
    total.backward()
    parts = Losses(
        **{
            ours: np.array([f[name].detach().item() for f in losses])
            for ours, name in PARTS.items()
        }
    )
    gradients = {
        name: np.zeros(tuple(p.shape), np.float32) if p.grad is None else p.grad.numpy()
        for name, p in official.named_parameters()
    }
    return Result(total.item(), parts, None, gradients), answers


@functools.lru_cache
def pair(config, seed):
    official = training_oracle.build(config, CORRECTIONS, seed)
    tensors = {name: tensor.numpy() for name, tensor in official.state_dict().items()}
    params = jax.tree.map(jnp.asarray, unflatten_dict(to_params(tensors, "official"), sep="/"))
    return SAM2(config), params, official


def agree(config, plan: Plan, frames: np.ndarray, masks: np.ndarray) -> Result:
    """Every part of the loss on every frame, and every gradient."""
    model, params, official = pair(config, SEED)
    key = jax.random.key(7)
    mine = ours(model, params, frames, masks, plan, key)
    other, _ = theirs(official, frames, masks, plan, key)
    np.testing.assert_allclose(mine.total, other.total, rtol=LOSS_BAR)
    for part in PARTS:
        found, expected = getattr(mine.losses, part), getattr(other.losses, part)
        np.testing.assert_allclose(found, expected, rtol=LOSS_BAR, atol=1e-5, err_msg=part)
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in other.gradients.values()))
    for name, expected in other.gradients.items():
        difference = np.linalg.norm((mine.gradients[name] - expected).ravel())
        scale = np.linalg.norm(expected.ravel())
        assert difference <= GRADIENT_BAR * scale + 1e-6 * norm, f"{name}: {difference / scale}"
    return mine


CLICKED = make_plan(4, corrected=(0, 2))
PLANS = {
    "masks, one of them ahead": make_plan(4, (0, 2), points=False),
    "a click, and corrections of two frames": CLICKED,
    "a box, and corrections from the truth": make_plan(
        4, box=(0,), corrected=(0,), from_truth=True
    ),
}


@pytest.mark.parametrize("what", PLANS)
def test_losses_and_gradients_are_the_official_ones(what: str):
    mine = agree(NEWER, PLANS[what], *make_clip(4))
    assert mine.total > 1


def test_an_object_out_of_sight():
    """Only its score learns."""
    frames, masks = make_clip(4)
    masks[2:, 1] = False
    agree(NEWER, CLICKED, frames, masks)


def test_a_single_frame():
    agree(NEWER, make_plan(1, corrected=(0,)), *make_clip(1))


def test_sam_2_0():
    agree(OLDER, CLICKED, *make_clip(4))


def test_rematerialised_and_with_an_object_left_out():
    model, params, _ = pair(NEWER, SEED)
    frames, masks = make_clip(4)
    key, weights = jax.random.key(7), np.array([1.0, 0.0], np.float32)
    plain = ours(model, params, frames, masks, CLICKED, key, weights)
    again = ours(model, params, frames, masks, CLICKED, key, weights, remat=True)
    np.testing.assert_allclose(again.total, plain.total, rtol=1e-5)
    largest = max(np.abs(gradient).max() for gradient in plain.gradients.values())
    for name, expected in plain.gradients.items():
        bar = 1e-4 * np.abs(expected).max() + 1e-7 * largest
        np.testing.assert_allclose(again.gradients[name], expected, atol=bar, err_msg=name)
    masks[:, 1] = False  # padding
    padded = ours(model, params, frames, masks, CLICKED, key, weights)
    np.testing.assert_allclose(padded.total, plain.total, rtol=1e-5)
