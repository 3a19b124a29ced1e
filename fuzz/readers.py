"""Everything that reads what others wrote: how to feed it, valid examples, and what it may answer.

A case is a file's bytes, or text. A reader takes it, or refuses it with a `ValueError` or an
`OSError` that names the file; anything else is a finding.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from fuzz import commands, seeds

NAME = "input"  # of the file that a case is written to


class Reader(NamedTuple):
    """How a reader is fuzzed."""

    seeds: Callable[[pathlib.Path], list[bytes]]  # valid cases, made in an empty folder
    read: Callable[[bytes, pathlib.Path], Any]  # in an empty folder that it may write to
    modules: tuple[str, ...]  # whose branches guide the fuzzer, and whose lines are counted
    tokens: tuple[str, ...] = ()  # words that the format knows
    longest: int = 4096  # bytes of a case
    names_file: bool = True  # whether refusals must name the file


def _file(case: bytes, folder: pathlib.Path, suffix: str = "") -> pathlib.Path:
    path = folder / f"{NAME}{suffix}"
    path.write_bytes(case)
    return path


# Checkpoints -------------------------------------------------------------------------------------


def _torch(case: bytes, folder: pathlib.Path) -> None:
    from sam2jax.convert.torch_file import load_torch

    _use(load_torch(_file(case, folder, ".pt")))


def _pickle(case: bytes, folder: pathlib.Path) -> None:
    _torch(seeds.torch_archive(case), folder)


def _use(value: Any) -> None:
    """Reads every number: arrays may be views of a file."""
    import numpy as np

    if isinstance(value, dict):
        for item in value.values():
            _use(item)
    elif isinstance(value, np.ndarray):
        value.astype(np.float32, copy=True)


def _safetensors(case: bytes, folder: pathlib.Path) -> None:
    from sam2jax.io.checkpoints import load_safetensors

    load_safetensors(_file(case, folder, ".safetensors"))


def _checkpoint(case: bytes, folder: pathlib.Path) -> None:
    """The header of a safetensors file, before as many zeros as a whole one has."""
    from sam2jax.convert.checkpoint import read

    header = len(case).to_bytes(8, "little") + case
    read(_file(header + bytes(seeds.CHECKPOINT_BYTES), folder)).params()


def _config(case: bytes, folder: pathlib.Path) -> None:
    from sam2jax.io.checkpoints import config_from_header

    config_from_header(case.decode("utf-8", "replace"), NAME)


def _huggingface(case: bytes, folder: pathlib.Path) -> None:
    from sam2jax.convert.huggingface_files import read_config

    read_config(_file(case, folder, ".json"), images_only=False)


def _orbax(case: bytes, folder: pathlib.Path) -> None:
    from sam2jax.io.checkpoints import load_orbax

    load_orbax(seeds.unpack(case, folder / NAME))


# Pictures and films ------------------------------------------------------------------------------


def _image(case: bytes, folder: pathlib.Path) -> None:
    from sam2jax.io import images

    path = _file(case, folder, ".png")
    refusals = []
    for read in (images.read_image, images.read_mask, images.read_labels, images.image_dimensions):
        try:
            read(path)
        except ValueError as error:  # one may take what another refuses
            refusals.append(error)
    if refusals:
        raise refusals[0]


def _video(case: bytes, folder: pathlib.Path) -> None:
    from sam2jax.io.video import open_video

    with open_video(_file(case, folder, ".mp4"), 32) as video:
        for frame in video.frames(original=True):
            if frame.index == 7:
                break
        with contextlib.suppress(IndexError):  # it ended before its last frame, and said so
            video[len(video) - 1]


# Masks in JSON, prompts, configurations ----------------------------------------------------------


def _runs(case: bytes, folder: pathlib.Path) -> None:
    from sam2jax.training.data.runlengths import decode_masks, read_json

    given = read_json(_file(case, folder, ".json"))
    decode_masks(given if isinstance(given, list) else [given], seeds.MASK_SIZE, NAME)


def _annotations(case: bytes, folder: pathlib.Path) -> None:
    from sam2jax.training.data.config import ImagesSource
    from sam2jax.training.data.images import ImagesReader
    from sam2jax.training.data.sav import SAVVideo

    path = _file(case, folder, ".json")
    rng = seeds.generator()
    pictures = seeds.pictures()
    refusals = []
    try:
        with SAVVideo(pictures, path, 1) as video:
            for frame in range(len(video)):
                video.masks(frame, video.visible(frame) or [0])
    except ValueError as error:
        refusals.append(error)
    try:
        reader = ImagesReader(ImagesSource(str(pictures), str(path)))
        reader.read(0, rng, 2, 2)
    except (ValueError, OSError) as error:
        refusals.append(error)
    if len(refusals) == 2:
        raise refusals[0]


def _prompts(case: bytes, folder: pathlib.Path) -> None:
    """A line is a --point, a --box or a --mask; what follows an empty line is a file of prompts."""
    from sam2jax.cli.prompts import (
        check_against_video,
        check_inside,
        read_masks,
        read_prompts,
        to_prompts,
    )

    lines, _, text = case.decode("utf-8", "replace").partition("\n\n")
    given: dict[str, list[str]] = {"point": [], "box": [], "mask": []}
    for line in lines.splitlines():
        kind, _, value = line.partition(" ")
        given.get(kind, []).append(value)
    file = _file(text.encode(), folder, ".json") if text else None
    table = read_prompts(given["point"], given["box"], given["mask"], file)
    check_against_video(table, 8, "the video")
    check_inside(table, *seeds.MASK_SIZE, "the video")
    to_prompts(table, read_masks(table, *seeds.MASK_SIZE), (0.5, 0.5))


def _make(case: bytes, folder: pathlib.Path) -> None:
    """`Prompts.make` with arguments as JSON has them."""
    import json

    from sam2jax.types import Prompts

    try:
        given = json.loads(case)
    except (ValueError, RecursionError):
        return
    if isinstance(given, dict):
        names = ("points", "labels", "boxes", "masks", "logits", "width", "refine")
        Prompts.make(**{name: value for name, value in given.items() if name in names})


def _list(case: bytes, folder: pathlib.Path) -> None:
    """As the list of `track-all`, with each video's prompts, and as that of `eval`."""
    from sam2jax.cli.plan import read_list, read_table
    from sam2jax.evaluation.layouts import read_video_list

    path = _file(case, folder, ".txt")
    refusals = []
    try:
        for task in read_list(path):
            with contextlib.suppress(ValueError, OSError):  # names the video, not the list
                read_table(task, None)
    except ValueError as error:
        refusals.append(error)
    try:
        read_video_list(path)
    except ValueError as error:
        refusals.append(error)
    if len(refusals) == 2:
        raise refusals[0]


def _training(case: bytes, folder: pathlib.Path) -> None:
    from sam2jax.training.config import read_config

    read_config(_file(case, folder, ".toml"))


def _session(case: bytes, folder: pathlib.Path) -> None:
    seeds.session_predictor().load_state(_file(case, folder, ".npz"), seeds.session_video())


def _cli(case: bytes, folder: pathlib.Path) -> None:
    """A line is an argument. Commands stop where they would read a checkpoint."""
    commands.run_command(case.decode("utf-8", "replace").split("\n"), folder)


_JSON = ("[", "]", "{", "}", '""', ":", ",", "null", "true", "NaN", "1e999", "-1", "99999999999")

READERS: dict[str, Reader] = {
    "torch": Reader(
        seeds.torch_files, _torch, ("sam2jax.convert.torch_file", "zipfile"), longest=8192
    ),
    "pickle": Reader(
        seeds.pickles,
        _pickle,
        ("sam2jax.convert.torch_file", "pickletools"),
        tokens=(
            *("ctorch\nFloatStorage\n", "ctorch._utils\n_rebuild_tensor_v2\n", "ctorch\nSize\n"),
            *("ccollections\nOrderedDict\n", "cos\nsystem\n", "ctorch\ndevice\n", "X\1\0\0\0"),
        ),
    ),
    "safetensors": Reader(
        seeds.safetensors_files, _safetensors, ("sam2jax.io.checkpoints", "sam2jax.config")
    ),
    "checkpoint": Reader(
        seeds.checkpoint_headers,
        _checkpoint,
        (
            *("sam2jax.convert.checkpoint", "sam2jax.convert.layouts", "sam2jax.convert.rules"),
            *("sam2jax.convert.huggingface", "sam2jax.io.checkpoints"),
        ),
        longest=65536,
    ),
    "config": Reader(
        seeds.configs, _config, ("sam2jax.config", "sam2jax.io.checkpoints"), tokens=_JSON
    ),
    "huggingface": Reader(
        seeds.huggingface_configs,
        _huggingface,
        ("sam2jax.config", "sam2jax.convert.huggingface_files"),
        tokens=_JSON,
    ),
    "orbax": Reader(seeds.orbax_folders, _orbax, ("sam2jax.io.checkpoints",), longest=65536),
    "image": Reader(
        seeds.image_files,
        _image,
        ("sam2jax.io.images", "PIL.PngImagePlugin", "PIL.JpegImagePlugin"),
    ),
    "video": Reader(
        seeds.video_files, _video, ("sam2jax.io.container", "sam2jax.io.video"), longest=16384
    ),
    "runs": Reader(
        seeds.run_lengths,
        _runs,
        ("sam2jax.training.data.runlengths",),
        tokens=(*_JSON, '"size"', '"counts"'),
    ),
    "annotations": Reader(
        seeds.annotation_files,
        _annotations,
        (
            *("sam2jax.training.data.sav", "sam2jax.training.data.images"),
            "sam2jax.training.data.runlengths",
        ),
        tokens=(*_JSON, '"masklet"', '"annotations"', '"images"', '"segmentation"', '"area"'),
    ),
    "prompts": Reader(
        seeds.prompt_texts,
        _prompts,
        ("sam2jax.cli.prompts",),
        tokens=(*_JSON, "point ", "box ", "mask ", "\n\n", '"points"', '"labels"', '"object"'),
        names_file=False,
    ),
    "make": Reader(
        seeds.prompt_arguments,
        _make,
        ("sam2jax.types",),
        tokens=(*_JSON, '"points"', '"labels"', '"boxes"', '"masks"', '"logits"', '"width"'),
        names_file=False,
    ),
    "list": Reader(
        seeds.video_lists,
        _list,
        ("sam2jax.cli.plan", "sam2jax.cli.prompts", "sam2jax.evaluation.layouts"),
        tokens=(*_JSON, '"video"', '"prompts"', '"name"', '"points"', '"object"', "\n", ".."),
    ),
    "training": Reader(
        seeds.training_configs,
        _training,
        ("sam2jax.training.config", "sam2jax.training.data.config", "sam2jax.config", "tomllib"),
    ),
    "session": Reader(
        seeds.session_files,
        _session,
        ("sam2jax.predictors.saving", "zipfile", "numpy.lib._format_impl"),
        longest=32768,
    ),
    "cli": Reader(
        commands.command_lines,
        _cli,
        ("sam2jax.cli",),
        tokens=commands.OPTIONS,
        names_file=False,
    ),
}


@functools.cache
def own_modules(name: str) -> tuple[str, ...]:
    """The modules of a reader that are this project's."""
    return tuple(module for module in READERS[name].modules if module.startswith("sam2jax"))
