"""Output that is either complete or absent."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def atomic_path(dest: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `dest`, with its suffix, that becomes `dest` on success.

    The body must create the file. On any failure it is removed, and what `dest` held before stays.

    Raises:
        FileNotFoundError: the folder of `dest` does not exist.
        ValueError: `dest` is a folder.
    """
    dest = pathlib.Path(dest)
    if dest.is_dir():
        raise ValueError(f"{dest} is a folder; give the name of a file to write.")
    temporary = _temporary_name(dest)
    try:
        yield temporary
        temporary.replace(dest)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(dest: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `dest` that becomes `dest` on success.

    A folder that holds something is never replaced: it may be the user's own.

    Raises:
        FileNotFoundError: the parent folder of `dest` does not exist.
        ValueError: `dest` exists and is not an empty folder.
    """
    dest = pathlib.Path(dest)
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise ValueError(f"{dest} exists already; remove it or choose another folder.")
    temporary = _temporary_name(dest)
    temporary.mkdir()
    try:
        yield temporary
        if dest.exists():
            dest.rmdir()
        temporary.rename(dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_name(dest: pathlib.Path) -> pathlib.Path:
    parent = dest.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"the folder {parent} does not exist; create it first.")
    return parent / f".{dest.stem}.{secrets.token_hex(4)}{dest.suffix}"
