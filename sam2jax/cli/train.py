"""`sam2jax train`: fine-tunes a checkpoint, or trains a model from scratch."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Annotated

import typer

from sam2jax.cli.session import errors_told, keep_compiled_programs, log_shown


def train(
    config: Annotated[
        str,
        typer.Option(metavar="FILE", help="TOML file, or one that ships: finetune, lora, scratch."),
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")
    ] = False,
    output: Annotated[
        pathlib.Path | None, typer.Option(metavar="DIR", help="In place of the file's own.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="In place of the file's own.")] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the configuration, and stop.")
    ] = False,
    distributed: Annotated[
        bool,
        typer.Option("--distributed", help="One of several processes: Slurm, a TPU pod, ..."),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Of process 0, where --distributed cannot tell."),
    ] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, help="With --coordinator.")] = None,
    process_id: Annotated[int | None, typer.Option(min=0, help="With --coordinator.")] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress bar; metrics are shown as lines.")
    ] = False,
) -> None:
    """Fine-tune a checkpoint on your own videos, or train a model from scratch.

    \b
    Example, with a file to edit in between:
      sam2jax train --config finetune --show > mine.toml
      sam2jax train --config mine.toml
    """
    with errors_told():
        import dataclasses

        from sam2jax.training.config import read_config, read_text

        places = (coordinator, num_processes, process_id)
        if not distributed and any(place is not None for place in places):
            raise ValueError(
                "--coordinator, --num-processes and --process-id are of a run on several "
                "processes; give --distributed too."
            )
        if show and (output is not None or steps is not None):
            raise ValueError("--show prints the file as it is; leave --output and --steps out.")
        if show:
            read_config(config)
            typer.echo(read_text(config), nl=False)
            return
        run = read_config(config)
        changes = {"output": None if output is None else str(output), "steps": steps}
        run = dataclasses.replace(run, **{k: v for k, v in changes.items() if v is not None})
        _require("grain", *(["tensorboardX"] if run.tensorboard else []))
        if distributed:
            import jax

            jax.distributed.initialize(*places)
        keep_compiled_programs()
        from sam2jax.training.loop import train as train_model

        try:
            with log_shown():
                path = train_model(run, resume=resume, progress=not quiet)
        except FloatingPointError as error:
            raise ValueError(str(error)) from error
        typer.echo(f"trained model: {path}")


def _require(*packages: str) -> None:
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"training needs {name}: pip install 'sam2jax[train]'")
