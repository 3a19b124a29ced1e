"""Memories pooled in squares of cells, beside whole ones: what it costs, and what it saves.

python -m benchmarks.pooling [--clips N] [--variant NAME] [--dtype DTYPE] [--runs N]

J&F of the small model on the held-out clips, from a click and from the first mask, and seconds of
`--variant` with a full bank, in turn with those of whole memories. Prints Markdown tables and
writes results/pooling-VARIANT-DTYPE-DEVICE.json.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
from typing import Any

import numpy as np
from tqdm import tqdm

import sam2jax
from benchmarks.heldout import tracked
from benchmarks.timing import Row, compare, machine, save_record
from benchmarks.track import Ours, noise
from sam2jax.config import NANO, VARIANTS, SAM2Config
from sam2jax.evaluation.metrics import score_clip
from sam2jax.training.data.clip import middle
from sam2jax.training.data.config import HELD_OUT
from sam2jax.training.data.procedural import procedural_clip

SIDES = (1, 2, 4)  # of the squares


def accuracy(clips: int) -> dict[str, dict[int, float]]:
    """J&F by method and side."""
    models = {side: sam2jax.load(NANO.name, memory_pooling=side) for side in SIDES}
    found: dict[str, Any] = collections.defaultdict(lambda: collections.defaultdict(list))
    first = HELD_OUT.first_seed
    for seed in tqdm(range(first, first + clips), unit="clip", disable=None):
        clip = procedural_clip(HELD_OUT.scene, seed, image_size=NANO.image_size)
        masks = clip.masks[0]
        methods = {
            "click": sam2jax.Prompts.make(points=[[middle(mask)] for mask in masks]),
            "mask": sam2jax.Prompts.make(masks=list(masks)),
        }
        for method, prompts in methods.items():
            for side, (model, params) in models.items():
                answer, _ = tracked(model, params, clip.frames, prompts)
                found[method][side] += score_clip(clip.masks, np.asarray(answer))
    return {
        method: {side: float(np.nanmean(scores)) for side, scores in by_side.items()}
        for method, by_side in found.items()
    }


def speed(config: SAM2Config, runs: int) -> list[Row]:
    """Rows of memory attention and of a frame, those of whole memories in the official's place."""
    frames = noise(config, config.max_obj_ptrs_in_encoder + 1)
    sides = {n: Ours(dataclasses.replace(config, memory_pooling=n), frames) for n in SIDES}
    whole, memories = sides.pop(1), config.num_maskmem
    rows = []
    for side, pooled in sides.items():
        attend = (lambda: whole.attend(memories)), (lambda pooled=pooled: pooled.attend(memories))
        rows.append(compare(f"attention to {memories}, {side} x {side}", *attend, runs))
        rows.append(compare(f"frame, {side} x {side}", whole.frame, pooled.frame, runs))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=HELD_OUT.num_clips)
    parser.add_argument("--variant", choices=tuple(VARIANTS), default=SAM2Config().name)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    rows = speed(dataclasses.replace(VARIANTS[given.variant], dtype=given.dtype), given.runs)
    print("| | whole | pooled | whole / pooled |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.name} | {row.official:.3f} | {row.ours:.3f} | {row.ratio:.2f} |")
    scores = accuracy(given.clips)
    print("\n| J&F |" + "".join(f" {side} x {side} |" for side in SIDES) + "\n" + "|---" * 4 + "|")
    for method, by_side in scores.items():
        print(f"| {method} |" + "".join(f" {by_side[side]:.3f} |" for side in SIDES))
    record = machine()
    device = re.sub(r"\W+", "-", record["device"].lower())
    record |= {"clips": given.clips, "runs": given.runs, "J&F": scores}
    record |= {"rows": [dataclasses.asdict(row) for row in rows]}
    save_record(f"pooling-{given.variant}-{given.dtype}-{device}", record)


if __name__ == "__main__":
    main()
