"""`python -m convert SOURCE DEST [--to FORMAT] [--verify] [--dtype DTYPE]`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from sam2jax.config import DType
from sam2jax.convert import Format, convert


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sam2jax.convert",
        description="Convert a SAM 2 checkpoint between PyTorch's, Hugging Face's and sam2jax's.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="an official .pt, a Hugging Face file, folder or hub id, or what sam2jax saved",
    )
    parser.add_argument("dest", metavar="DEST", help="the file or folder to write")
    parser.add_argument(
        "--to",
        choices=get_args(Format),
        help="by default official for .pt, safetensors for .safetensors, else an orbax folder",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read DEST again and compare every number"
    )
    parser.add_argument(
        "--dtype", choices=get_args(DType), default="float32", help="of the numbers in DEST"
    )
    given = parser.parse_args(arguments)
    try:
        print(convert(given.source, given.dest, given.to, given.verify, given.dtype))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
