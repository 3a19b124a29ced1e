"""The command line as a reader: valid lines, and how far one is taken."""

from __future__ import annotations

import contextlib
import functools
import io
import pathlib
import re
import tempfile
from typing import Any

from fuzz import seeds

OPTIONS = (
    *("track", "track-all", "segment", "auto", "train", "eval", "convert", "export", "info"),
    *("demo", "--process-id", "--num-processes", "--videos-per-device", "--seed"),
    *("--checkpoint", "--point", "--box", "--mask", "--prompts", "--out", "--masks", "--dtype"),
    *("--image-size", "--reverse", "--policy", "--explain", "--raw", "--quiet", "--config"),
    *("--resume", "--output", "--steps", "--video-list", "--shard", "--score", "--truth", "--to"),
    *("--verify", "--shapes", "--workers", "--json", "--platform", "--help"),
    *("\n", "model.safetensors", "clip.mp4", "frame.png", "samurai:", "bfloat16", "0/4"),
)


def command_lines(folder: pathlib.Path) -> list[bytes]:
    lines = (
        "track clip.mp4 --checkpoint model.safetensors --point 2,3 --point 4,5,0@2:1 --out a.mp4",
        "track clip.mp4 --checkpoint model.safetensors --mask frame.png --masks m.npz --reverse",
        "track clip.mp4 --checkpoint model.safetensors --box 1,1,5,5 --masks m --policy samurai",
        "track-all . --checkpoint model.safetensors --point 2,3 --out found --masks npz",
        "track-all list.txt --checkpoint model.safetensors --out found --process-id 0"
        " --num-processes 2",
        "segment frame.png --checkpoint model.safetensors --point 2,3 --out out.png",
        "auto . --checkpoint model.safetensors --out found",
        "train --config mine.toml --steps 3 --output run",
        "train --config lora --show",
        "eval . --masks masks --checkpoint model.safetensors --out out --shard 0/4",
        "eval --score --truth masks --out out",
        "convert model.safetensors model.pt --verify",
        "convert model.safetensors folder --to orbax --dtype bfloat16",
        "export model.safetensors programs --image-size 64",
        "info model.safetensors --shapes",
        "demo --seed 3",
    )
    return [line.replace(" ", "\n").encode() for line in lines]


@functools.cache
def _command_files() -> dict[str, bytes]:
    files = {"model.safetensors": b"", "list.txt": b"clip.mp4\n"}
    files["mine.toml"] = seeds.training_configs(pathlib.Path())[0]
    for maker, kept in (
        (seeds.video_files, {"clip.mp4": 3}),
        (seeds.image_files, {"frame.png": 10}),
    ):
        with tempfile.TemporaryDirectory() as name:
            made = maker(pathlib.Path(name))
            files |= {file: made[place] for file, place in kept.items()}
    return files


class _Reached(ValueError):
    """A command came to where it would read a checkpoint, train or wait for a stream."""


def _stop(*_: Any, **__: Any) -> Any:
    raise _Reached("this is as far as a command is taken here.")


@functools.cache
def _stops() -> None:
    import jax

    import sam2jax.convert as convert
    import sam2jax.io.stream as stream
    import sam2jax.loading as loading
    import sam2jax.training.loop as loop

    # Checkpoints have their own readers here; reading one takes a second each time.
    loading.load = convert.read = convert.convert = _stop
    stream.open_stream = loop.train = jax.distributed.initialize = _stop


@functools.cache
def _command() -> Any:
    """All of `sam2jax`; putting it together takes longer than most cases."""
    import typer.main

    from sam2jax.cli import app

    return typer.main.get_command(app)


def run_command(arguments: list[str], folder: pathlib.Path) -> None:
    """Runs `sam2jax` in a folder with a few files; refusals are a line and exit code 1 or 2."""
    _stops()
    for name, data in _command_files().items():
        (folder / name).write_bytes(data)
    # Slashes stay in fractions alone: whatever is named is in the folder.
    arguments = [re.sub(r"(?<!\d)/|/(?!\d)", "_", argument) for argument in arguments]
    if not arguments or "bench" in arguments:
        return
    code, told = 0, io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(told),
    ):
        try:
            _command().main(arguments, prog_name="sam2jax")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    lines = [line for line in told.getvalue().splitlines() if line.lower().startswith("error")]
    if code not in (0, 1, 2) or (code == 2 and len(lines) != 1):
        raise AssertionError(f"exit code {code}: {told.getvalue()[:500]}")
