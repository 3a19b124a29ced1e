"""Where a model's object score says that an object is hidden.

python -m benchmarks.nano.calibrate MODEL OUTPUT [--clips N]

Of some offsets of the object score's bias the one with which hidden frames are told best (F1, over
clicks and masks), on drawn clips whose seeds come after those of the held-out ones and before those
trained on. Writes the model with that offset.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

import sam2jax
from benchmarks.heldout import tracked
from sam2jax.convert import read, write
from sam2jax.training.data.clip import middle
from sam2jax.training.data.config import HELD_OUT
from sam2jax.training.data.procedural import procedural_clip

BIAS = "sam_mask_decoder/pred_obj_score_head/layers_2/bias"
FIRST_SEED, CLIPS = 500, 48
OFFSETS = (0.0, -0.5, -1.0, -1.5, -2.0)


def hidden_and_told(model: sam2jax.SAM2, params: dict, clips: int) -> list[np.ndarray]:
    """By prompt (a click, a mask): of hidden frames told, of all told, of all hidden ones."""
    counts = [np.zeros(3, int), np.zeros(3, int)]
    for seed in tqdm(range(FIRST_SEED, FIRST_SEED + clips), unit="clip", disable=None):
        clip = procedural_clip(HELD_OUT.scene, seed, image_size=model.config.image_size)
        clicks = sam2jax.Prompts.make(points=[[middle(mask)] for mask in clip.masks[0]])
        given = sam2jax.Prompts.make(masks=list(clip.masks[0]))
        absent = ~clip.masks.any((2, 3))[1:]
        for count, prompts in zip(counts, (clicks, given), strict=True):
            told = np.asarray(tracked(model, params, clip.frames, prompts)[1])[1:] <= 0
            count += [(absent & told).sum(), told.sum(), absent.sum()]
    return counts


def calibrate(path: pathlib.Path, output: pathlib.Path, clips: int = CLIPS) -> None:
    """Writes the model at `path` to `output`, with the best offset."""
    source = read(path)
    flat = source.params()
    model, _ = sam2jax.load(path)
    best = (-1.0, 0.0)
    for offset in OFFSETS:
        params = unflatten_dict({**flat, BIAS: flat[BIAS] + offset}, sep="/")
        f1 = [2 * n[0] / max(n[1] + n[2], 1) for n in hidden_and_told(model, params, clips)]
        print(f"{offset:+.1f}: F1 {f1[0]:.3f} from a click, {f1[1]:.3f} from a mask", flush=True)
        best = max(best, (float(np.mean(f1)), offset))
    write(output, {**flat, BIAS: flat[BIAS] + best[1]}, source.config)
    print(f"{output}: {best[1]:+.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--clips", type=int, default=CLIPS)
    given = parser.parse_args()
    calibrate(given.model, given.output, given.clips)


if __name__ == "__main__":
    main()
