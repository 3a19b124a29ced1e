"""How far answers are from the official package's: same live weights, same real frames.

python -m benchmarks.fidelity MEDIA [--full] [--bfloat16]

MEDIA holds the official clip as a folder `bedroom` of JPEG frames. Each row tracks one object from
a click. Prints the largest difference of mask logits and object scores over the clip and the
smallest IoU of the masks; `--full` adds 1024 px. The model that ships, which has learnt something,
makes larger differences of small ones: memories are held in bfloat16. So beside it stands the
official package on frames that are moved by a millionth. With `--bfloat16` instead: how far each
variant's image features are from official float32, at 1024 px on a CPU, under autocast, under
autocast and `torch.compile`, and ours. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
import torch

from sam2jax.config import NANO
from sam2jax.nn.sam2 import SAM2
from tests import oracle
from tests.parity.clips import Result, click, load_clip, official, ours_scanned
from tests.parity.pairs import Pair, at, iou, pair, shipped

ROWS = [
    ("sam2.1_hiera_tiny", 256, 24),
    ("sam2_hiera_tiny", 256, 24),
    ("sam2.1_hiera_base_plus", 512, 4),
    ("sam2.1_hiera_large", 256, 4),
]
FULL = [("sam2.1_hiera_tiny", 1024, 9)]
SEED = 7  # of the weights; the object stays in the frame
MOVED = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("media", type=pathlib.Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    given = parser.parse_args()
    if given.bfloat16:
        in_bfloat16(given.media)
    else:
        clips(ROWS + FULL * given.full, given.media)


def clips(rows: list[tuple[str, int, int]], media: pathlib.Path) -> None:
    columns = ("px", "frames", "logits", "largest", "score", "IoU")
    print(f"{'variant':24}" + "".join(f"{column:>9}" for column in columns))
    for name, size, count in rows:
        both, frames = pair(at(name, size), SEED), load_clip(media, size, count)
        theirs = official(both, frames, [click()])
        tell(name, frames, ours_scanned(both, frames, [click()]), theirs)
    both, frames = shipped(), load_clip(media, NANO.image_size, 24)
    theirs = official(both, frames, [click()])
    tell(NANO.name, frames, ours_scanned(both, frames, [click()]), theirs)
    noise = np.random.default_rng(0).uniform(-MOVED, MOVED, frames.shape).astype(np.float32)
    tell("official, moved", frames, official(both, frames + noise, [click()]), theirs)


def tell(name: str, frames: np.ndarray, found: Result, exact: Result) -> None:
    logits = max(np.abs(found.masks[t] - exact.masks[t]).max() for t in exact.masks)
    scores = max(np.abs(found.scores[t] - exact.scores[t]).max() for t in exact.masks)
    largest = max(np.abs(exact.masks[t]).max() for t in exact.masks)
    overlap = min(iou(found.masks[t] > 0, exact.masks[t] > 0) for t in exact.masks)
    row = (f"{logits:.1e}", f"{largest:.2f}", f"{scores:.1e}", f"{overlap:.5f}")
    cells = (frames.shape[1], len(frames), *row)
    print(f"{name:24}" + "".join(f"{cell:>9}" for cell in cells), flush=True)


def in_bfloat16(media: pathlib.Path) -> None:
    image = load_clip(media, 1024, 1)
    print(f"{'variant':24}{'size':>9}{'autocast':>10}{'compiled':>10}{'ours':>10}")
    for name in (f"sam2.1_hiera_{size}" for size in ("tiny", "small", "base_plus", "large")):
        config = at(name, 1024)
        both = pair(config, SEED)
        exact = features(both)(image)
        with oracle.autocast():
            found = [features(both)(image), features(both, compiled=True)(image)]
        narrow = SAM2(dataclasses.replace(config, dtype="bfloat16"))
        ours = dataclasses.replace(both, model=narrow).apply("encode_image", image).features
        found.append(np.asarray(ours, np.float32))
        distances = "".join(f"{rms(answer - exact):10.4f}" for answer in found)
        print(f"{name:24}{rms(exact):9.2f}{distances}", flush=True)


def features(both: Pair, *, compiled: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """The official image features [1, H, W, C] of an image [1, S, S, 3]."""
    encode = both.official.forward_image
    encode = torch.compile(encode, dynamic=False) if compiled else encode
    return lambda image: oracle.to_numpy(encode(oracle.to_torch(image))["backbone_fpn"][-1])


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


if __name__ == "__main__":
    main()
