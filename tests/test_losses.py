"""Losses and simulated prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jax.training.losses import LossConfig, Losses, prediction_losses
from sam2jax.training.prompts import PromptConfig, make_plan, sample_box, sample_click
from tests.conftest import ROOT

CONFIG = LossConfig()


@pytest.fixture(scope="module")
def golden():
    """A clip of the official training code: several frames, steps and objects."""
    with np.load(ROOT / "tests" / "goldens" / "losses.npz") as archive:
        return dict(archive)


def steps(golden) -> list[tuple[int, str]]:
    return [(f, f"frame{f}/step{s}") for f, n in enumerate(golden["steps"]) for s in range(n)]


def clip_loss(masks: dict, golden) -> tuple[jax.Array, Losses]:
    """As the official code adds them up, over frames and steps, for a number of objects."""
    count = golden["targets"].shape[1]
    parts = [
        prediction_losses(
            CONFIG,
            masks[name],
            golden[f"{name}/pred_iou"],
            golden[f"{name}/object_score_logits"][:, 0],
            golden["targets"][frame],
        )
        for frame, name in steps(golden)
    ]
    total = jax.tree.map(lambda *x: sum(jnp.sum(part) for part in x) / count, *parts)
    return total.total(CONFIG), total


def test_losses_and_their_gradients_are_the_official_ones(golden):
    masks = {name: golden[f"{name}/mask_logits"] for _, name in steps(golden)}
    (core, parts), gradients = jax.value_and_grad(clip_loss, has_aux=True)(masks, golden)
    np.testing.assert_allclose(core, golden["expected/core_loss"], rtol=1e-5)
    for part, name in (
        ("mask", "mask"),
        ("dice", "dice"),
        ("iou", "iou"),
        ("object_score", "class"),
    ):
        np.testing.assert_allclose(
            getattr(parts, part), golden[f"expected/loss_{name}"], rtol=1e-5, err_msg=part
        )
    for _, name in steps(golden):
        expected = golden[f"{name}/grad_mask_logits"]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(gradients[name], expected, atol=1e-5 * scale, rtol=1e-5)
    assert any(not golden["targets"][f, n].any() for f in range(3) for n in range(4))  # absent ones


def test_clicks_lie_in_the_error():
    rng = np.random.default_rng(0)
    target, shown = rng.uniform(size=(2, 5, 12, 16)) > 0.6
    shown[0] = False
    shown[1] = target[1]  # nothing to correct
    shown[2] |= target[2]  # too much
    target[3] = shown[3] = False  # absent, and known to be
    click = jax.jit(sample_click)
    seen = set()
    for seed in range(40):
        points, labels = click(jax.random.key(seed), target, shown)
        x, y = np.asarray(points).astype(int).T
        at = np.arange(5), y, x
        missed, wrong = target & ~shown, ~target & shown
        assert labels.tolist() == missed[at].astype(int).tolist()
        expected = [True, False, True, False, True]
        assert (missed | wrong)[at].tolist() == expected
        assert not target[at][1] and labels[2] == 0
        seen.add((x[0], y[0]))
    # All over the object, and nowhere twice as a rule.
    assert len(seen) > 20


def test_boxes_are_noisy_but_near():
    target = np.zeros((2, 100, 200), bool)
    target[0, 20:60, 30:130] = True
    target[1, 0:100, 0:200] = True
    corners = np.stack([sample_box(jax.random.key(seed), target) for seed in range(50)])
    exact = np.array([[[30, 20], [129, 59]], [[0, 0], [199, 99]]], np.float32)
    distance = np.abs(corners - exact[None])
    assert distance[:, 0, :, 0].max() <= 9.9 and distance[:, 0, :, 1].max() <= 3.9
    assert distance[:, 0].min(axis=0).max() < 1 and distance[:, 0].max(axis=0).min() > 2
    assert corners.min() >= 0 and (corners.max(axis=(0, 1, 2)) <= [199, 99]).all()


def test_plans():
    config = PromptConfig()
    plans = jax.vmap(lambda seed: make_plan(config, jax.random.key(seed), 8))(jnp.arange(400))
    first = plans.conditioning.sum(axis=1)
    assert set(first.tolist()) == {1, 2}
    for frame, conditioning in zip(plans.frame, plans.conditioning, strict=True):
        cond = frame[conditioning].tolist()
        assert sorted(frame.tolist()) == list(range(8)) and 0 in cond
        assert frame.tolist() == cond + [t for t in range(8) if t not in cond]
    points = np.asarray(plans.points)
    assert 0.4 < points.mean() < 0.6 and 0.4 < np.asarray(plans.box)[points].mean() < 0.6
    assert not np.asarray(plans.corrected)[~points].any()  # masks are not corrected
    corrected = np.asarray(plans.corrected)[points]
    assert (corrected | ~np.asarray(plans.conditioning)[points]).all()
    assert set(corrected.sum(axis=1).tolist()) == {1, 2}
    tracked = corrected & ~np.asarray(plans.conditioning)[points]
    assert set(np.nonzero(tracked)[1].tolist()) == set(range(1, 8))  # any later frame
    assert 0.05 < np.asarray(plans.from_truth).mean() < 0.15
    single = make_plan(config, jax.random.key(1), 1)
    assert bool(single.points) and single.corrected.tolist() == [True]
    assert single.conditioning.tolist() == [True]


def test_refused_prompt_settings():
    with pytest.raises(ValueError, match="box_probability"):
        PromptConfig(box_probability=1.5)
    with pytest.raises(ValueError, match="max_cond_frames"):
        PromptConfig(max_cond_frames=3)
    with pytest.raises(ValueError, match="corrections"):
        PromptConfig(corrections=-1)
