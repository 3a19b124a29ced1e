"""The tracker is differentiable from end to end, and every parameter learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import sam2jax
from sam2jax.testing import random_params, small_config

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

# The stability fallback is off so that the answer to several clicks is token 0's mask.
CONFIG = small_config(dynamic_multimask_via_stability=False)
MODEL = sam2jax.SAM2(CONFIG)
NUM_FRAMES = 8


def has_no_gradient(path: str) -> bool:
    """What no answer depends on, while the objects are in the frame."""
    if path == "no_mem_pos_enc":  # read by no forward pass
        return True
    if path in ("no_obj_ptr", "no_obj_embed_spatial"):  # for absent objects
        return True
    # A constant added to all keys leaves a softmax as it is. Memory attention rotates its keys,
    # each by another angle, so its own biases do learn.
    return path.startswith("sam_mask_decoder") and path.endswith("k_proj/bias")


def clip() -> tuple[np.ndarray, sam2jax.Prompts]:
    """Frames and prompts of every kind, an object each."""
    rng, size = np.random.default_rng(0), CONFIG.image_size
    coarse = rng.standard_normal((NUM_FRAMES, size // 8, size // 8, 3)).astype(np.float32)
    mask = np.zeros((size, size), bool)
    mask[30:70, 40:90] = True
    quarter = CONFIG.mask_size
    return np.kron(coarse, np.ones((1, 8, 8, 1), np.float32)), sam2jax.Prompts.make(
        points=[[(40, 60)], None, [(30, 90)], [(20, 20), (100, 90), (60, 60)]],
        labels=[[1], None, [0], [1, 0, 1]],
        boxes=[None, None, (20, 30, 70, 90), None],
        masks=[None, mask, None, None],
        logits=[None, None, None, rng.standard_normal((quarter, quarter))],
    )


def prefer(params, token: int):
    """The parameters, with the IoU head in favour of one alternative mask."""
    head = params["sam_mask_decoder"]["iou_prediction_head"]["layers_2"]
    shifted = {**head, "bias": head["bias"].at[token].add(2.0)}
    heads = {**params["sam_mask_decoder"]["iou_prediction_head"], "layers_2": shifted}
    decoder = {**params["sam_mask_decoder"], "iou_prediction_head": heads}
    return {**params, "sam_mask_decoder": decoder}


@jax.jit
def loss(params, frames, weights, prompts):
    """On masks, IoUs and scores, frame by frame; also the lowest object score."""
    _, out = sam2jax.track(MODEL, params, frames, prompts)
    parts = (out.masks, out.iou, out.object_score)
    by_frame = sum(jnp.mean(part.reshape(NUM_FRAMES, -1) ** 2, axis=1) for part in parts)
    return jnp.dot(by_frame, weights), jnp.min(out.object_score)


@pytest.fixture(scope="module")
def differentiate():
    """One program for all tests: (params, weights) -> gradients by parameter, and by pixel."""
    frames, prompts = clip()
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def gradients(params, weights):
        (_, lowest), (by_param, by_pixel) = run(params, frames, weights, prompts)
        assert lowest > 0, "an object left the frame; choose another seed"
        return flatten_dict(jax.device_get(by_param), sep="/"), np.asarray(by_pixel)

    return gradients


def test_gradient_reaches_every_parameter(differentiate):
    params, weights = (
        random_params(CONFIG, seed=21),
        np.full(NUM_FRAMES, 1 / NUM_FRAMES, np.float32),
    )
    # Only the mask that is chosen learns: let each of the three be the best one once.
    parts = [differentiate(prefer(params, token), weights)[0] for token in (1, 2, 3)]
    total = {path: sum(part[path] for part in parts) for path in parts[0]}
    assert [path for path, value in total.items() if not np.isfinite(value).all()] == []

    largest = {path: float(np.abs(value).max()) for path, value in total.items()}
    # Rounding leaves a trace of gradient where there is none.
    silent = {path for path, value in largest.items() if value < 1e-4}
    assert silent == {path for path in largest if has_no_gradient(path)}
    assert all(largest[path] < 1e-5 for path in silent)


def test_gradient_reaches_the_pixels_of_earlier_frames(differentiate):
    """The last answer depends on the first frame through the memory bank."""
    last = np.eye(NUM_FRAMES, dtype=np.float32)[-1]
    by_frame = np.abs(differentiate(random_params(CONFIG, seed=21), last)[1]).max(axis=(1, 2, 3))
    assert np.isfinite(by_frame).all() and (by_frame > 0).all()
