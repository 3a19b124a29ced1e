"""The clip and the prompts that the golden answers are for."""

from __future__ import annotations

from typing import Any

import numpy as np

from sam2jax.config import SAM2Config
from sam2jax.testing import small_config

SEED = 22  # of the weights; objects come and go
NUM_FRAMES = 8
NUM_OBJECTS = 3

CONFIGS: dict[str, SAM2Config] = {
    "sam2.1": small_config(),
    "sam2": small_config(no_obj_embed_spatial=False, add_tpos_enc_to_obj_ptrs=False),
}


def frames(config: SAM2Config) -> np.ndarray:
    """Normalised frames of large soft blocks that drift: [T, S, S, 3] float32."""
    size = config.image_size
    blocks = np.random.default_rng(0).uniform(-2, 2, (size // 16, size // 16, 3))
    still = np.kron(blocks, np.ones((16, 16, 1))).astype(np.float32)
    return np.stack([np.roll(still, (3 * t, 5 * t), axis=(0, 1)) for t in range(NUM_FRAMES)])


def prompts(config: SAM2Config) -> list[dict[str, Any]]:
    """One per object, as arguments of the official predictor; object 2 is prompted ahead."""
    size = config.image_size
    mask = np.zeros((size, size), bool)
    mask[size // 4 : size // 2, size // 3 : 3 * size // 4] = True
    mask[size // 3, size // 2] = False  # a hole
    return [
        {"frame_idx": 0, "obj_id": 0, "points": [[30.0, 80.0]], "labels": [1]},
        {"frame_idx": 0, "obj_id": 1, "mask": mask},
        {
            "frame_idx": 2,
            "obj_id": 2,
            "points": [[90.0, 40.0]],
            "labels": [0],
            "box": [12.0, 50.0, 60.0, 110.0],
        },
    ]
