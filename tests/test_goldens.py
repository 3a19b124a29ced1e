"""Agreement with the official package where it is not installed: stored answers.

`tests/goldens/make.py` writes them; `tests/parity` compares live.
"""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import sam2jax
from sam2jax.testing import random_params
from tests.goldens.case import CONFIGS, NUM_OBJECTS, SEED, frames, prompts

# The small model's mask logits are of size 0.1, its scores of size 2; both agree to six digits.
FEATURES, LOGITS, SCORES = 1e-5, 2e-5, 2e-4


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def golden(name: str) -> Any:
    with np.load(pathlib.Path(__file__).parent / "goldens" / f"{name}.npz") as stored:
        return dict(stored)


def by_frame(config: sam2jax.SAM2Config) -> dict[int, sam2jax.Prompts]:
    """The prompts, as `track` takes them."""
    made = {}
    for frame in sorted({one["frame_idx"] for one in prompts(config)}):
        rows = {one["obj_id"]: one for one in prompts(config) if one["frame_idx"] == frame}

        def column(name: str, rows: dict = rows) -> list:
            return [rows.get(obj, {}).get(name) for obj in range(NUM_OBJECTS)]

        made[frame] = sam2jax.Prompts.make(
            points=column("points"),
            labels=column("labels"),
            boxes=column("box"),
            masks=column("mask"),
        )
    return made


def close(ours: Any, golden: np.ndarray, bar: float) -> None:
    np.testing.assert_allclose(np.asarray(ours), golden, rtol=0, atol=bar)


def test_image_features(name: str, golden: dict[str, np.ndarray]):
    config = CONFIGS[name]
    model, params = sam2jax.SAM2(config), random_params(config, SEED)

    @jax.jit
    def encode(params, images):
        return model.apply({"params": params}, images, method="encode_image")

    found = encode(params, frames(config)[:1])
    for index, level in enumerate((found.high_res_s0, found.high_res_s1, found.features)):
        close(level[0], golden[f"features_{index}"], FEATURES)


def test_tracking(name: str, golden: dict[str, np.ndarray]):
    config = CONFIGS[name]
    model, params, clip = sam2jax.SAM2(config), random_params(config, SEED), frames(config)
    assert (golden["object_score"] > 0).any() and (golden["object_score"] < 0).any()
    state, out = sam2jax.track(model, params, clip, by_frame(config))
    close(out.masks, golden["masks"], LOGITS)
    close(out.object_score, golden["object_score"], SCORES)
    size = (config.image_size, config.image_size)
    close(sam2jax.resize_masks(out.masks[0], size)[0], golden["first_answer"], LOGITS)
    for obj in (0, 1):  # object pointers of the conditioning frame, and of the last one
        bank = jax.tree.map(lambda x, obj=obj: x[obj], state.bank)
        close(bank.cond_pointer[0], golden["pointer"][0, obj], LOGITS)
        last = int(np.argmax(np.asarray(bank.pointer_frame)))
        close(bank.pointer[last], golden["pointer"][bank.pointer_frame[last], obj], LOGITS)
