"""A model on the held-out procedural clips, beside what needs no memory.

python -m benchmarks.heldout [CHECKPOINT] [--clips N]

Objects are tracked from one click on the first frame (at the point deepest inside), or from its
mask. Beside that stand the first mask, copied to all frames, and the image model without memory,
prompted anew on each frame in the middle of its last mask. Prints J&F by kind of clip, and how well
hidden frames are told by the object score (F1); writes results/heldout-NAME.json.
"""

from __future__ import annotations

import argparse
import collections
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import sam2jax
from benchmarks.timing import save_record
from sam2jax.config import NANO
from sam2jax.evaluation.metrics import score_clip
from sam2jax.training.data.clip import Clip, middle
from sam2jax.training.data.config import HELD_OUT
from sam2jax.training.data.procedural import clip_kind, procedural_clip

METHODS = ("click", "mask", "first mask copied", "no memory")
KINDS = (*HELD_OUT.scene.kinds, "all")


@partial(jax.jit, static_argnums=0)
def tracked(model: sam2jax.SAM2, params: Any, frames: Any, prompts: sam2jax.Prompts):
    """Masks [T, N, H, W] bool and object scores [T, N]."""
    _, out = sam2jax.track(model, params, frames, prompts)
    return sam2jax.resize_masks(out.masks, frames.shape[1:3]) > 0, out.object_score


@partial(jax.jit, static_argnums=0)
def segmented(model: sam2jax.SAM2, params: Any, frame: Any, prompts: sam2jax.Prompts):
    """The best of three masks of each object on one frame: [N, H, W] bool."""
    size = frame.shape[:2]
    features = sam2jax.encode_image(model, params, frame[None])
    found = sam2jax.decode_masks(model, params, features, prompts, size=size)
    best = jnp.argmax(found.ious, axis=1)[:, None, None, None]
    masks = jnp.take_along_axis(found.masks, best, axis=1)[:, 0]
    return sam2jax.resize_masks(masks, size) > 0


def without_memory(model: sam2jax.SAM2, params: Any, clip: Clip) -> np.ndarray:
    """[T, N, H, W]: each frame prompted in the middle of the last mask that was not empty."""
    points = [middle(mask) for mask in clip.masks[0]]
    found = []
    for frame in clip.frames:
        prompts = sam2jax.Prompts.make(points=[[point] for point in points])
        masks = np.asarray(segmented(model, params, frame, prompts))
        points = [middle(m) if m.any() else p for m, p in zip(masks, points, strict=True)]
        found.append(masks)
    return np.stack(found)


def evaluate(model: sam2jax.SAM2, params: Any, clips: int) -> dict[str, Any]:
    """J&F by method and kind, and counts of hidden frames by method."""
    found: dict[str, dict[str, list[float]]] = {m: collections.defaultdict(list) for m in METHODS}
    hidden: dict[str, np.ndarray] = {m: np.zeros(3, int) for m in ("click", "mask")}
    scene, first = HELD_OUT.scene, HELD_OUT.first_seed
    size = model.config.image_size
    for seed in tqdm(range(first, first + clips), unit="clip", disable=None):
        clip = procedural_clip(scene, seed, image_size=size)
        answers = {
            "first mask copied": np.broadcast_to(clip.masks[0], clip.masks.shape),
            "no memory": without_memory(model, params, clip),
        }
        clicks = sam2jax.Prompts.make(points=[[middle(mask)] for mask in clip.masks[0]])
        given = sam2jax.Prompts.make(masks=list(clip.masks[0]))
        for method, prompts in (("click", clicks), ("mask", given)):
            masks, score = tracked(model, params, clip.frames, prompts)
            answers[method] = np.asarray(masks)
            absent, told = ~clip.masks.any((2, 3))[1:], np.asarray(score)[1:] <= 0
            hidden[method] += [(absent & told).sum(), told.sum(), absent.sum()]
        for method, masks in answers.items():
            for kind in (clip_kind(scene, seed), "all"):
                found[method][kind] += score_clip(clip.masks, masks)
    return {
        "J&F": {m: {k: float(np.nanmean(v)) for k, v in of.items()} for m, of in found.items()},
        "hidden frames, F1": {m: float(2 * n[0] / max(n[1] + n[2], 1)) for m, n in hidden.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=NANO.name)
    parser.add_argument("--clips", type=int, default=HELD_OUT.num_clips)
    given = parser.parse_args()
    model, params = sam2jax.load(given.checkpoint)
    results = evaluate(model, params, given.clips)
    print(f"{'J&F':<20}" + "".join(f"{kind:>12}" for kind in KINDS))
    for method, row in results["J&F"].items():
        print(f"{method:<20}" + "".join(f"{row.get(kind, np.nan):12.3f}" for kind in KINDS))
    for method, value in results["hidden frames, F1"].items():
        print(f"hidden frames, F1 ({method}): {value:.3f}")
    save_record(f"heldout-{model.config.name}", {"clips": given.clips, **results})


if __name__ == "__main__":
    main()
