"""How far answers are from the official package's: same live weights, same real frames.

python -m benchmarks.fidelity MEDIA [--full]

MEDIA holds the official clip as a folder `bedroom` of JPEG frames. Each row tracks one object from
a click. Prints the largest difference of mask logits and object scores over the clip and the
smallest IoU of the masks; `--full` adds 1024 px. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from tests.parity.clips import click, load_clip, official, ours_scanned
from tests.parity.pairs import at, iou, pair

ROWS = [
    ("sam2.1_hiera_tiny", 256, 24),
    ("sam2_hiera_tiny", 256, 24),
    ("sam2.1_hiera_base_plus", 512, 4),
    ("sam2.1_hiera_large", 256, 4),
]
FULL = [("sam2.1_hiera_tiny", 1024, 9)]
SEED = 7  # of the weights; the object stays in the frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("media", type=pathlib.Path)
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    columns = ("px", "frames", "logits", "largest", "score", "IoU")
    print(f"{'variant':24}" + "".join(f"{column:>9}" for column in columns))
    for name, size, count in ROWS + FULL * given.full:
        both, frames = pair(at(name, size), SEED), load_clip(given.media, size, count)
        theirs = official(both, frames, [click()])
        mine = ours_scanned(both, frames, [click()])
        logits = max(np.abs(mine.masks[t] - theirs.masks[t]).max() for t in theirs.masks)
        scores = max(np.abs(mine.scores[t] - theirs.scores[t]).max() for t in theirs.masks)
        largest = max(np.abs(theirs.masks[t]).max() for t in theirs.masks)
        overlap = min(iou(mine.masks[t] > 0, theirs.masks[t] > 0) for t in theirs.masks)
        row = (f"{logits:.1e}", f"{largest:.2f}", f"{scores:.1e}", f"{overlap:.5f}")
        print(f"{name:24}" + "".join(f"{cell:>9}" for cell in (size, count, *row)), flush=True)


if __name__ == "__main__":
    main()
