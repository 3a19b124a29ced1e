"""`sam2jax bench`: speed and memory beside the official package."""

from __future__ import annotations

import importlib
import pathlib
import sys

import typer

from sam2jax.cli.session import errors_told

ROOT = pathlib.Path(__file__).resolve().parents[2]


def bench(context: typer.Context) -> None:
    """Time everything, beside the official package where it is installed.

    Needs a clone of the repository, as benchmarks do not ship.

    Example: sam2jax bench track objects --dtype bfloat16
    """
    if not (ROOT / "benchmarks" / "__main__.py").is_file():
        raise typer.BadParameter(
            "benchmarks do not ship with the package: clone the repository and install it with "
            "`pip install -e .`."
        )
    sys.path.insert(0, str(ROOT))
    with errors_told():
        importlib.import_module("benchmarks.__main__").main(context.args)
