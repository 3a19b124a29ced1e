"""Output that is either complete or absent."""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

PathLike = str | os.PathLike[str]

_TOKEN_BYTES = 4  # of chance in a temporary name


@contextlib.contextmanager
def atomic_path(dest: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `dest`, with its suffix, that becomes `dest` on success.

    The body must create the file. On any failure it is removed, and what `dest` held before stays.
    Of a link it is what it leads to that is written.

    Raises:
        FileNotFoundError: the folder of `dest` does not exist.
        ValueError: `dest` is a folder, or a device or a pipe.
    """
    dest = pathlib.Path(dest)
    if dest.is_dir():
        raise ValueError(f"{dest} is a folder; give the name of a file to write.")
    if dest.exists() and not dest.is_file():
        raise ValueError(f"{dest} is a device or a pipe; give the name of a file to write.")
    dest = dest.resolve()
    temporary = _temporary_name(dest)
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())  # else a power loss may leave the name with nothing in it
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


def remove_leftovers(dest: PathLike) -> None:
    """Removes what a process that was killed while it wrote `dest` has left beside it.

    Nobody else may be writing `dest` at the time.
    """
    dest = pathlib.Path(dest)
    pattern = f".{glob.escape(dest.stem)}.{'[0-9a-f]' * 2 * _TOKEN_BYTES}{glob.escape(dest.suffix)}"
    for left in dest.absolute().parent.glob(pattern):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _temporary_name(dest: pathlib.Path) -> pathlib.Path:
    parent = dest.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"the folder {parent} does not exist; create it first.")
    return parent / f".{dest.stem}.{secrets.token_hex(_TOKEN_BYTES)}{dest.suffix}"
