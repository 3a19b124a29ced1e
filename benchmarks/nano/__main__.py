"""The model that ships, trained from scratch.

python -m benchmarks.nano [--stages image clips ...] [--ship]

Runs the stages one after another, each from the model of the one before, in runs/nano; a stage
that was stopped goes on where it was. --ship calibrates the last one's object score
(`benchmarks.nano.calibrate`) and stores that model in the package, in bfloat16. What is printed on
the way is kept beside the models.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

import ml_dtypes

from benchmarks.nano.calibrate import calibrate
from sam2jax.config import NANO
from sam2jax.convert import read, write
from sam2jax.io.checkpoints import WEIGHTS
from sam2jax.training.config import read_config
from sam2jax.training.loop import CHECKPOINTS, MODEL_FILE

HERE = pathlib.Path(__file__).parent
STAGES = ("image", "clips", "long", "full", "wide", "deep", "deeper", "fresh")


def run(stage: str) -> pathlib.Path:
    """Trains a stage, or what is left of it; returns its model."""
    path = HERE / f"{stage}.toml"
    output = pathlib.Path(read_config(path).output)
    model = output / MODEL_FILE
    if not model.exists():
        started = any((output / CHECKPOINTS).glob("[0-9]*"))
        output.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "sam2jax", "train", "--config", str(path), "-q"]
        with open(output / "log.txt", "a") as log:
            subprocess.run(
                command + ["--resume"] * started, stdout=log, stderr=subprocess.STDOUT, check=True
            )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--ship", action="store_true", help="store the model in the package")
    given = parser.parse_args()
    for stage in given.stages:
        model = run(stage)
        print(f"{stage}: {model}", flush=True)
    if given.ship:
        calibrated = model.with_stem("calibrated")
        calibrate(model, calibrated)
        ship(calibrated)


def ship(model: pathlib.Path) -> None:
    """Stores a model in the package, at the size of its last stage."""
    WEIGHTS.mkdir(exist_ok=True)
    params = {k: v.astype(ml_dtypes.bfloat16) for k, v in read(model).params().items()}
    write(WEIGHTS / f"{NANO.name}.safetensors", params, NANO)


if __name__ == "__main__":
    main()
