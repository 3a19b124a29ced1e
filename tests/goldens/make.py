"""Writes the golden answers with the official package: python -m tests.goldens.make

They let the test suite check agreement where PyTorch is not installed.
"""

from __future__ import annotations

import pathlib

import numpy as np

from sam2jax.config import SAM2Config
from tests import oracle
from tests.goldens.case import CONFIGS, NUM_OBJECTS, SEED, frames, prompts


def answers(config: SAM2Config) -> dict[str, np.ndarray]:
    model, clip = oracle.build(config, SEED), frames(config)
    levels = model.forward_image(oracle.to_torch(clip[:1]))["backbone_fpn"]
    state = oracle.init_state(model, clip)
    shown = [oracle.prompt(model, state, **given)[given["obj_id"]] for given in prompts(config)]
    order = list(oracle.propagate(model, state, start_frame_idx=0))
    held = [[oracle.outputs(state, t, obj) for obj in range(NUM_OBJECTS)] for t in order]
    return {
        **{f"features_{i}": oracle.to_numpy(level)[0] for i, level in enumerate(levels)},
        "first_answer": shown[0],  # [S, S] logits
        "masks": np.array([[one["masks"] for one in row] for row in held]),
        "object_score": np.array([[one["object_score"] for one in row] for row in held]),
        "pointer": np.array([[one["pointer"] for one in row] for row in held]),
    }


def main() -> None:
    for name, config in CONFIGS.items():
        path = pathlib.Path(__file__).parent / f"{name}.npz"
        np.savez_compressed(path, **answers(config))
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
