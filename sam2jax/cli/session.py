"""What every command shares: how errors are told, and where compiled programs are kept."""

from __future__ import annotations

import contextlib
import enum
import inspect
import json
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import typer

# Exit codes.
SOME_FAILED = 1  # images or videos were passed over
BAD_INPUT = 2  # as for a mistyped option
BROKEN_PIPE = 141  # as of a program that SIGPIPE ends


class DType(enum.StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


# Options that several commands have.
_CHECKPOINT = typer.Option(
    help="An official .pt, safetensors, what sam2jax saved, a hub id, or sam2.1_hiera_nano, which "
    "ships."
)
Checkpoint = Annotated[str, _CHECKPOINT]
OptionalCheckpoint = Annotated[str | None, _CHECKPOINT]
ComputeType = Annotated[DType, typer.Option(help="What to compute in.")]
ImageSize = Annotated[
    int | None, typer.Option(help="What pictures are resized to; by default the model's own.")
]
Postprocessing = Annotated[
    bool,
    typer.Option(
        "--apply-postprocessing/--no-postprocessing",
        help="Whether to do as the official builders: fill holes, pick stable masks.",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bar, nor names of the files written.")
]
Policy = Annotated[
    str,
    typer.Option(
        metavar="NAME[:SETTING=VALUE,...]",
        help="What is remembered: sam2, sam3_score, samurai, dam4sam, rcms or sam2long.",
    ),
]


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """Ends the program with one or two lines, and no traceback, where its input is at fault.

    Termination (by a batch system, say) is made an exception, so that unfinished files go.
    """
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on
        raise typer.Exit(BROKEN_PIPE) from None
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from error


def refuse_overwriting(
    read: Iterable[pathlib.Path | None], written: Mapping[str, pathlib.Path | None]
) -> None:
    """Raises where an output, by the option that names it, is a file that is read."""
    read = [path for path in read if path is not None and path.is_file()]
    for option, path in written.items():
        if path is not None and path.exists() and any(path.samefile(other) for other in read):
            raise ValueError(f"{path} is the input; give {option} another name.")


def make_folder(path: pathlib.Path) -> None:
    """Makes the folder that results go to.

    Raises:
      ValueError: there is a file of that name.
    """
    if path.is_file():
        raise ValueError(f"{path} is a file; give --out a folder.")
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def log_shown() -> Iterator[None]:
    """Puts what the library logs on stdout, above a progress bar."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    log = logging.getLogger("sam2jax")
    level, passed_on = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False  # or a library's handler of all logs shows it once more
    handler = logging.StreamHandler(sys.stdout)
    log.addHandler(handler)
    try:
        with logging_redirect_tqdm([log]):
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = passed_on


def cache_folder() -> pathlib.Path:
    """Where things are kept between runs: $SAM2JAX_CACHE, or sam2jax in the user's cache."""
    given = os.environ.get("SAM2JAX_CACHE")
    if given:
        return pathlib.Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "sam2jax"


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs on disk, unless the user has told it where already."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))


def load_model(
    checkpoint: str,
    image_size: int | None,
    dtype: DType,
    apply_postprocessing: bool = True,
    *,
    memory: bool = False,
) -> tuple[Any, Any]:
    """A model and its parameters, whose compiled programs are kept.

    Raises:
      ValueError: also where `memory` is asked for, and the model is for images only.
    """
    keep_compiled_programs()
    from sam2jax.loading import load

    model, params = load(
        checkpoint,
        image_size=image_size,
        dtype=dtype.value,
        apply_postprocessing=apply_postprocessing,
    )
    if memory:
        from sam2jax.tracking.state import require_memory

        require_memory(model.config)
    return model, params


def read_policy(text: str) -> Any:
    """A memory policy from `name` or `name:setting=value,...`.

    Raises:
      ValueError: there is no such policy, or it has no such setting.
    """
    from sam2jax.memory import POLICIES

    name, _, settings = text.partition(":")
    if name not in POLICIES:
        raise ValueError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}.")
    try:
        pairs = [entry.split("=") for entry in settings.split(",") if entry]
        given = {key.strip(): json.loads(value) for key, value in pairs}
        return POLICIES[name](**given)
    except (ValueError, TypeError) as error:
        known = ", ".join(inspect.signature(POLICIES[name]).parameters)
        raise ValueError(
            f"--policy {text!r}: expected {name}:setting=number,... with settings among {known}."
        ) from error
