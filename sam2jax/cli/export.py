"""`sam2jax export`: programs that need nothing but JAX."""

from __future__ import annotations

import enum
import pathlib
import re
from typing import Annotated

import typer

from sam2jax.cli.session import ComputeType, DType, ImageSize, errors_told, load_model


class Platform(enum.StrEnum):
    cpu = "cpu"
    cuda = "cuda"
    tpu = "tpu"


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="An official .pt, safetensors, folder or hub id."
        ),
    ],
    dest: Annotated[pathlib.Path, typer.Argument(metavar="DEST", help="The folder to write.")],
    frame_size: Annotated[
        str, typer.Option(metavar="HEIGHTxWIDTH", help="Of the frames and images to come.")
    ] = "720x1280",
    objects: Annotated[int, typer.Option(help="Tracked at once.")] = 1,
    points: Annotated[int, typer.Option(help="Clicks an object; a box is two.")] = 1,
    platform: Annotated[
        list[Platform] | None, typer.Option(help="Kinds of devices; by default all three.")
    ] = None,
    embed: Annotated[
        bool, typer.Option("--embed", help="Put the weights into the programs.")
    ] = False,
    dtype: ComputeType = DType.float32,
    image_size: ImageSize = None,
) -> None:
    """Write the tracker and the image path as StableHLO, which JAX alone can run.

    The folder's metadata.json says what each program takes and returns. Clips may have any length.

    \b
    Example:
      sam2jax export sam2.1_hiera_tiny.pt tiny --frame-size 480x854 --objects 3 --points 2
    """
    with errors_told():
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", frame_size)
        if not found:
            raise ValueError(f"--frame-size is HEIGHTxWIDTH, such as 720x1280; got {frame_size!r}.")
        from sam2jax.export import PLATFORMS, Sizes, export_programs

        sizes = Sizes((int(found[1]), int(found[2])), objects, points)
        model, params = load_model(checkpoint, image_size, dtype)
        platforms = [p.value for p in platform] if platform else PLATFORMS
        export_programs(model, params, dest, sizes=sizes, platforms=platforms, embed=embed)
        typer.echo(str(dest))
