"""Speed and memory beside the official package: same weights, same input, in turn, in one call.

python -m benchmarks [SECTION ...] [options], or `sam2jax bench`. Sections:

  track     image encoder, memory attention, whole tracking of one object (per variant)
  objects   1 to 32 objects
  videos    several videos at once
  images    a picture: encoding, points, automatic masks
  training  a training step
  cold      from a new process to the first mask
  memory    of device and host, against the number of frames

Times are medians of paired runs; ratio is official over ours, above 1 ours is faster; share is of
the rate that the device reaches in one large matrix product. Answers are compared before a time is
believed; where they differ the row says so, and the command fails in the end. The official package
needs the parity extra; where it is missing ours is timed alone. A table is printed, and the clone's
benchmarks/results/SECTION-VARIANT-SIZE-DTYPE-DEVICE[-compiled].json written.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Sequence

import jax

from benchmarks.settings import Settings
from benchmarks.timing import HEADER, matrix_rate, save
from sam2jax.config import NANO, VARIANTS

SECTIONS = ("track", "objects", "videos", "images", "training", "cold", "memory")
NEEDED = ("torch", "torchvision", "sam2", "hydra", "scipy")  # to run the official package
SMALL = {  # for a look at whether everything runs
    "variants": (NANO.name,),
    "image_size": 128,
    "frames": 2,
    "objects": (1, 2),
    "videos": (1, 2),
    "runs": 1,
    "lengths": (2, 4),
    "train_size": 64,
    "side": 4,
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sam2jax bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help="all of them where none is named")
    add("--variants", nargs="+", choices=VARIANTS, metavar="NAME", default=("sam2.1_hiera_tiny",))
    add("--image-size", type=int, help="each variant's own where left out")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--frames", type=int, default=4, help="tracked in one program")
    add("--objects", type=int, nargs="+", default=(1, 2, 4, 8, 16, 32))
    add("--videos", type=int, nargs="+", default=(1, 2, 4))
    add("--runs", type=int, default=5, help="pairs of runs per row")
    add("--lengths", type=int, nargs="+", default=(8, 32), help="frames, for their memory")
    add("--train-size", type=int, default=256, help="pixels a side of frames in training")
    add("--side", type=int, default=32, help="points per side of automatic masks")
    add("--picture", help="for images; a drawn one where left out")
    add(
        "--compiled",
        nargs="?",
        const="max-autotune",
        choices=("max-autotune", "reduce-overhead"),
        help="the official package under torch.compile, in max-autotune, as it asks for, or in "
        "another mode, which compiles sooner",
    )
    add("--alone", action="store_true", help="time ours only")
    add("--small", action="store_true", help="a small model, once: does everything run?")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    # PyTorch, and processes of our own, need room on the device beside JAX.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parsed = parser()
    if parsed.parse_args(arguments).small:
        parsed.set_defaults(**SMALL)
    given = vars(parsed.parse_args(arguments))
    sections, alone = given.pop("sections"), given.pop("alone")
    del given["small"]
    for name in set(sections) - set(SECTIONS):
        parser().error(f"there is no section {name!r}; choose from {', '.join(SECTIONS)}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing and not alone:
        print(f"No {', '.join(missing)}: sam2jax is timed alone.")
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
    settings = Settings(**given, official=not (alone or missing))
    device = jax.devices()[0].device_kind
    rate = matrix_rate(settings.dtype)
    print(f"{device}, {settings.dtype}, {rate / 1e12:.2f} Tflop/s in a matrix product")
    print(HEADER, flush=True)
    chip = re.sub(r"\W+", "-", device.lower()).strip("-")
    names = "+".join(settings.variants)
    slug = f"{names}-{settings.first.image_size}-{settings.dtype}-{chip}"
    slug += "-compiled" if settings.compiled else ""
    refused = 0
    for section in sections or SECTIONS:
        rows = []
        for row in importlib.import_module(f"benchmarks.{section}").rows(settings):
            rows.append(row)
            print(row, flush=True)
            refused += row.ours is None
        told = dataclasses.asdict(settings)
        told["picture"] = settings.picture and pathlib.Path(settings.picture).name
        print(save(f"{section}-{slug}", told, rows), flush=True)
    if refused:
        sys.exit(f"{refused} times were not believed: answers differ by more than is allowed.")


if __name__ == "__main__":
    main()
