"""`sam2jax info`: what a checkpoint is."""

from __future__ import annotations

from typing import Annotated

import typer

from sam2jax.cli.session import errors_told


def info(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A file, a folder or a hub id.")
    ],
    shapes: Annotated[bool, typer.Option("--shapes", help="List every parameter.")] = False,
) -> None:
    """Say which model a checkpoint is, and what it holds.

    \b
    Example:
      sam2jax info sam2.1_hiera_tiny.pt
    """
    with errors_told():
        from sam2jax.convert import read

        found = read(checkpoint)
        params = found.params()
        total = sum(value.size for value in params.values())
        images_only = ", images only" if found.config.images_only else ""
        typer.echo(f"variant     {found.config.name}{images_only}")
        typer.echo(f"layout      {found.layout}, {len(found.tensors):,} tensors")
        typer.echo(f"image size  {found.config.image_size}")
        typer.echo(f"parameters  {total:,}")
        parts: dict[str, list[str]] = {}
        for name in params:
            parts.setdefault(name.split("/")[0], []).append(name)
        width = max(map(len, parts))
        typer.echo(f"\n{'part':{width}}  arrays   parameters")
        for part, names in parts.items():
            size = sum(params[name].size for name in names)
            typer.echo(f"{part:{width}}  {len(names):6,}  {size:11,}")
        if shapes:
            typer.echo()
            for name, value in params.items():
                typer.echo(f"{name}  {list(value.shape)}")
