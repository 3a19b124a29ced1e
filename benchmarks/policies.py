"""Memory policies on clips with distractors, long occlusions and re-entry.

python -m benchmarks.policies [CHECKPOINT] [--clips N]

Each object is tracked from its mask on the first frame. Prints J&F by kind of clip and frames per
second of each policy; writes results/policies-NAME.json.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import time
from functools import partial
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import sam2jax
from benchmarks.timing import RESULTS
from sam2jax.config import NANO
from sam2jax.evaluation.metrics import score_clip
from sam2jax.memory import POLICIES
from sam2jax.training.data.config import HARD, HELD_OUT
from sam2jax.training.data.procedural import clip_kind, procedural_clip

SCENE = dataclasses.replace(HELD_OUT.scene, kinds=("occluded", "distractor", HARD))
NUM_FRAMES = 48


@partial(jax.jit, static_argnums=0)
def tracked(model: sam2jax.SAM2, params: Any, frames: Any, prompts: Any, policy: Any):
    """Masks [T, N, H, W] bool."""
    _, out = sam2jax.track(model, params, frames, prompts, policy=policy)
    return sam2jax.resize_masks(out.masks, frames.shape[1:3]) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=NANO.name)
    parser.add_argument("--clips", type=int, default=60)
    given = parser.parse_args()
    model, params = sam2jax.load(given.checkpoint)
    found: dict[str, dict[str, list[float]]] = {
        name: collections.defaultdict(list) for name in POLICIES
    }
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    policies = {name: make() for name, make in POLICIES.items()}
    for seed in tqdm(range(given.clips), unit="clip", disable=None):
        size = model.config.image_size
        clip = procedural_clip(SCENE, seed, image_size=size, num_frames=NUM_FRAMES)
        prompts = sam2jax.Prompts.make(masks=list(clip.masks[0]))
        for name, policy in policies.items():
            start = time.perf_counter()
            masks = np.asarray(tracked(model, params, clip.frames, prompts, policy))
            seconds[name].append(time.perf_counter() - start)
            for kind in (clip_kind(SCENE, seed), "all"):
                found[name][kind] += score_clip(clip.masks, masks)
    kinds = (*SCENE.kinds, "all")
    print(f"{'J&F':<12}" + "".join(f"{kind:>12}" for kind in kinds) + f"{'frames/s':>12}")
    rows = {}
    for name in POLICIES:
        scores = {kind: float(np.nanmean(found[name][kind])) for kind in kinds if found[name][kind]}
        rate = NUM_FRAMES / float(np.median(seconds[name]))
        rows[name] = {"J&F": scores, "frames per second": rate}
        print(
            f"{name:<12}"
            + "".join(f"{scores.get(kind, np.nan):12.3f}" for kind in kinds)
            + f"{rate:12.1f}"
        )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"policies-{model.config.name}.json"
    settings = {"clips": given.clips, "frames": NUM_FRAMES, "kinds": SCENE.kinds}
    path.write_text(json.dumps({**settings, "policies": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
