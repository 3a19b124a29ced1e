"""`sam2jax convert`: a checkpoint in another format."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from sam2jax.cli.session import DType, errors_told


class Format(enum.StrEnum):
    orbax = "orbax"
    safetensors = "safetensors"
    official = "official"
    huggingface = "huggingface"


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="An official .pt, safetensors, folder or hub id."),
    ],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="The file or folder to write.")],
    to: Annotated[
        Format | None,
        typer.Option(help="The format to write; by default what the suffix of DEST says."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read DEST again and compare every number.")
    ] = False,
    dtype: Annotated[
        DType, typer.Option(help="Of the numbers in DEST; bfloat16 halves the file, and rounds.")
    ] = DType.float32,
) -> None:
    """Convert a checkpoint between PyTorch's, Hugging Face's and sam2jax's formats.

    \b
    Examples:
      sam2jax convert sam2.1_hiera_tiny.pt tiny.safetensors --verify
      sam2jax convert tuned.safetensors tuned.pt --to official
    """
    with errors_told():
        from sam2jax.convert import convert as run

        typer.echo(str(run(source, dest, to, verify, dtype.value)))
