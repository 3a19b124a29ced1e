"""Memory policies on clips with distractors, long occlusions and re-entry.

python -m benchmarks.policies [CHECKPOINT] [--clips N]

Each of a clip's three objects is tracked from its mask on the first frame. Prints J&F by kind of
clip and frames per second as a Markdown table, and writes results/policies-NAME.json.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import time
from functools import partial
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import sam2jax
from benchmarks.timing import save_record
from sam2jax.config import NANO
from sam2jax.evaluation.metrics import score_clip
from sam2jax.memory import POLICIES
from sam2jax.training.data.config import HARD, HELD_OUT
from sam2jax.training.data.procedural import clip_kind, procedural_clip

# Out of sight for longer than the six frames that SAM 2 looks back, and in sight again.
NUM_FRAMES, HIDDEN = 48, 12
SCENE = dataclasses.replace(
    HELD_OUT.scene, kinds=("occluded", "distractor", HARD), hidden_frames=HIDDEN
)


@partial(jax.jit, static_argnums=0)
def tracked(model: sam2jax.SAM2, params: Any, frames: Any, prompts: Any, policy: Any):
    """Masks [T, N, H, W] bool."""
    _, out = sam2jax.track(model, params, frames, prompts, policy=policy)
    return sam2jax.resize_masks(out.masks, frames.shape[1:3]) > 0


def evaluate(model: sam2jax.SAM2, params: Any, clips: int) -> dict[str, dict[str, Any]]:
    """By policy: J&F by kind of clip, and frames per second."""
    policies = {name: make() for name, make in POLICIES.items()}
    found: dict[str, Any] = {name: collections.defaultdict(list) for name in policies}
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    first, size = HELD_OUT.first_seed, model.config.image_size
    for seed in tqdm(range(first, first + clips), unit="clip", disable=None):
        clip = procedural_clip(SCENE, seed, image_size=size, num_frames=NUM_FRAMES)
        prompts = sam2jax.Prompts.make(masks=list(clip.masks[0]))
        for name, policy in policies.items():
            if seed == first:  # compiled before it is timed
                jax.block_until_ready(tracked(model, params, clip.frames, prompts, policy))
            start = time.perf_counter()
            masks = np.asarray(tracked(model, params, clip.frames, prompts, policy))
            seconds[name].append(time.perf_counter() - start)
            for kind in (clip_kind(SCENE, seed), "all"):
                found[name][kind] += score_clip(clip.masks, masks)
    return {
        name: {
            "J&F": {kind: float(np.nanmean(scores)) for kind, scores in found[name].items()},
            "frames per second": NUM_FRAMES / float(np.median(seconds[name])),
        }
        for name in policies
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """In Markdown, a row for each policy."""
    kinds = (*SCENE.kinds, "all")
    rows = [("", *kinds, "frames/s"), ("---", *["---:"] * (len(kinds) + 1))]
    for name, result in results.items():
        scores = [f"{result['J&F'].get(kind, np.nan):.3f}" for kind in kinds]
        rows.append((f"`{name}`", *scores, f"{result['frames per second']:.1f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=NANO.name)
    parser.add_argument("--clips", type=int, default=60)
    given = parser.parse_args()
    model, params = sam2jax.load(given.checkpoint)
    results = evaluate(model, params, given.clips)
    print(table(results))
    settings = {
        "clips": given.clips,
        "frames": NUM_FRAMES,
        "hidden frames": HIDDEN,
        "kinds": SCENE.kinds,
        "device": jax.devices()[0].device_kind,
    }
    save_record(f"policies-{model.config.name}", {**settings, "policies": results})


if __name__ == "__main__":
    main()
