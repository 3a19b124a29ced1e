"""Checkpoints from one format to another: official PyTorch, Hugging Face, and sam2jax's own.

python -m sam2jax.convert SOURCE DEST [--to FORMAT] [--verify] [--dtype DTYPE]
"""

from __future__ import annotations

import dataclasses
import os

import ml_dtypes
import numpy as np

from sam2jax.config import DType
from sam2jax.convert.checkpoint import Checkpoint, Format, format_for, read, write
from sam2jax.convert.verify import largest_difference
from sam2jax.io.files import PathLike

__all__ = ["Checkpoint", "Format", "Summary", "convert", "format_for", "read", "write"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was converted."""

    variant: str
    source_format: str
    dest_format: str
    num_tensors: int  # in the source
    num_parameters: int  # numbers in the model
    images_only: bool
    largest_difference: float | None  # of what was written and is read, if it was asked for

    def __str__(self) -> str:
        lines = [
            f"{self.variant}: {self.num_tensors:,} tensors, {self.num_parameters:,} parameters"
            f"{', for images only' if self.images_only else ''}",
            f"{self.source_format} -> {self.dest_format}",
        ]
        if self.largest_difference is not None:
            lines.append(f"largest difference when read again: {self.largest_difference:g}")
        return "\n".join(lines)


def convert(
    source: PathLike,
    dest: PathLike,
    to: str | None = None,
    verify: bool = False,
    dtype: DType = "float32",
) -> Summary:
    """Reads a checkpoint and writes it in another format.

    Args:
        source: an official `.pt`, a Hugging Face file, folder or hub id, what sam2jax saved, or
            the name of the model that ships.
        dest: the file or folder to write. Nothing is left there when something fails.
        to: orbax, safetensors, official or huggingface; by default what the suffix of `dest` says
            (.pt: official, .safetensors: safetensors), else orbax.
        verify: whether to read `dest` again and compare.
        dtype: of the numbers in `dest`; bfloat16 halves its size, and rounds.

    Returns:
        What was converted.

    Raises:
        FileNotFoundError, ValueError: in one or two lines, what is wrong.
    """
    form = format_for(dest, to)
    if os.path.exists(source) and os.path.exists(dest) and os.path.samefile(source, dest):
        raise ValueError(f"{dest} is the source; give the result another name.")
    checkpoint = read(source)
    params = checkpoint.params()
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    rounded = {name: value.astype(stored, copy=False) for name, value in params.items()}
    write(dest, rounded, checkpoint.config, form)
    return Summary(
        variant=checkpoint.config.name,
        source_format=checkpoint.layout,
        dest_format=form,
        num_tensors=len(checkpoint.tensors),
        num_parameters=sum(value.size for value in params.values()),
        images_only=checkpoint.config.images_only,
        largest_difference=largest_difference(checkpoint, dest) if verify else None,
    )
