"""The command line: `sam2jax COMMAND`. Each command is a file; they import what is heavy late."""

from __future__ import annotations

from typing import Annotated

import typer

from sam2jax.cli.auto import auto
from sam2jax.cli.bench import bench
from sam2jax.cli.convert import convert
from sam2jax.cli.demo import demo
from sam2jax.cli.evaluate import evaluate
from sam2jax.cli.export import export
from sam2jax.cli.info import info
from sam2jax.cli.segment import segment
from sam2jax.cli.track import track
from sam2jax.cli.track_all import track_all
from sam2jax.cli.train import train
from sam2jax.version import __version__

app = typer.Typer(
    name="sam2jax",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command()(demo)
app.command()(track)
app.command()(track_all)
app.command()(segment)
app.command()(auto)
app.command()(train)
app.command("eval")(evaluate)
app.command()(convert)
app.command()(export)
app.command()(info)
app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sam2jax {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Segment Anything 2 in JAX: click on an object, get its mask in every frame.

    \b
    Examples:
      sam2jax demo
      sam2jax track clip.mp4 --checkpoint sam2.1_hiera_tiny.pt --point 210,350 --out out.mp4
      sam2jax track --help
    """
