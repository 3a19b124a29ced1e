"""What `sam2jax track-all` is to do: which videos, by which process, and which of them together."""

from __future__ import annotations

import json
import os
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sam2jax.cli.prompts import PromptTable, add_entries, read_prompts
from sam2jax.types import power_of_two

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .mxf .vob"
    " .gif".split()
)


class Task(NamedTuple):
    """A video of the list."""

    name: str  # of its result, without suffix
    video: pathlib.Path
    prompts: list[Any] | pathlib.Path | None  # entries, or a file of them; None: not in the list
    folder: pathlib.Path  # that paths of masks are relative to


class Shape(NamedTuple):
    """What a bucket's videos have in common; all of one bucket run as one program."""

    height: int
    width: int
    frames: int  # to be tracked, rounded up to a power of two, as are all that follow
    objects: int
    points: int  # an object
    prompted: int  # frames
    masked: bool  # whether some prompts are masks


def read_list(source: pathlib.Path) -> list[Task]:
    """The videos of a folder, or of a list with one a line.

    In a folder, video files and folders of frames count. A line is a path, or a JSON object with
    `video`, and maybe `prompts` (a list as in a file of prompts, or the path of such a file) and
    `name` (of the result; by default the video's, without suffix). Paths are relative to the list.

    Raises:
        FileNotFoundError: there is no such list or folder.
        ValueError: a line cannot be understood, two results have one name, or there is no video.
    """
    if source.is_dir():
        tasks = [
            _task({"video": path.name}, source)
            for path in sorted(source.iterdir())
            if not path.name.startswith(".")
            and (path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES)
        ]
    elif source.suffix.lower() in VIDEO_SUFFIXES and source.is_file():
        raise ValueError(f"{source} is a video; use sam2jax track, or give its folder.")
    else:
        try:
            lines = source.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no list or folder {source}.") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is no list of videos: {error}.") from error
        tasks = [
            _parse(line.strip(), source, number)
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    if not tasks:
        raise ValueError(f"{source} names no video.")
    _check_names(tasks, source)
    return tasks


def _parse(line: str, source: pathlib.Path, number: int) -> Task:
    try:
        given = json.loads(line) if line.startswith("{") else {"video": line}
        return _task(given, source.parent)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}, line {number}: {error}") from error


def _task(given: Mapping[str, Any], folder: pathlib.Path) -> Task:
    known = {"video", "prompts", "name"}
    if not isinstance(given.get("video"), str) or not set(given) <= known:
        raise ValueError('expected a path, or {"video": PATH} with maybe "prompts" and "name".')
    video = folder / os.path.expanduser(given["video"])
    name = given.get("name", _stem(video))
    whole = isinstance(name, str) and name and pathlib.PurePath(name).name == name
    if not whole or name.startswith("."):
        raise ValueError(f"the name {name!r} must be that of a file, without a folder.")
    prompts = given.get("prompts")
    if isinstance(prompts, str):
        path = folder / os.path.expanduser(prompts)
        return Task(name, video, path, path.parent)
    return Task(name, video, prompts, folder)


def _stem(video: pathlib.Path) -> str:
    """A folder of frames may have a dot in its name, which begins no suffix."""
    return video.stem if video.suffix.lower() in VIDEO_SUFFIXES else video.name


def _check_names(tasks: Sequence[Task], source: pathlib.Path) -> None:
    seen: dict[str, pathlib.Path] = {}
    for task in tasks:
        if task.name in seen:
            raise ValueError(
                f"{source}: {seen[task.name]} and {task.video} would both be written as "
                f'{task.name}; give one another "name" in the list.'
            )
        seen[task.name] = task.video


def read_table(task: Task, common: PromptTable | None) -> PromptTable:
    """A video's own prompts, from the list or from VIDEO.json beside it; or those given for all.

    Raises:
        FileNotFoundError: there is no such file of prompts.
        ValueError: they cannot be understood, or there are none.
    """
    if isinstance(task.prompts, pathlib.Path):
        return read_prompts(file=task.prompts)
    if task.prompts is not None:
        table = PromptTable()
        add_entries(table, task.prompts, task.folder, "its prompts")
        if table.frames:
            return table
    beside = task.video.with_name(f"{_stem(task.video)}.json")
    if beside.is_file():
        return read_prompts(file=beside)
    if common is not None:
        return common
    raise ValueError(
        f"there is no prompt: give some in the list, in {beside}, or for all videos with --point, "
        "--box or --prompts."
    )


def find_process(
    environment: Mapping[str, str], process_id: int | None, num_processes: int | None
) -> tuple[int, int]:
    """Which of how many processes this is: as told, or else from what a scheduler has set.

    TPU pods set TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, of several slices MEGASCALE_SLICE_ID and
    MEGASCALE_NUM_SLICES too; Slurm sets SLURM_PROCID and SLURM_NTASKS; Kubernetes sets
    JOB_COMPLETION_INDEX but not the number of processes. Alone where nothing says otherwise.

    Raises:
        ValueError: one of the two numbers is missing, or they do not fit.
    """
    found = _from_scheduler(environment) if process_id is None else (process_id, None)
    index, count = found[0], num_processes if num_processes is not None else found[1]
    if index is None and count is None:
        return 0, 1
    if index is None or count is None:
        missing = "--process-id" if index is None else "--num-processes"
        raise ValueError(f"say which of how many processes this is: {missing} is missing.")
    if not 0 <= index < count:
        raise ValueError(f"process {index} of {count}: processes are numbered 0 to N-1.")
    return index, count


def _from_scheduler(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    def number(name: str) -> int | None:
        text = environment.get(name, "").strip()
        if text and not text.isdecimal():
            raise ValueError(f"${name} is {text!r}; expected a number.")
        return int(text) if text else None

    worker = number("TPU_WORKER_ID")
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if worker is not None and hosts:
        slices = number("MEGASCALE_NUM_SLICES") or 1
        return (number("MEGASCALE_SLICE_ID") or 0) * len(hosts) + worker, slices * len(hosts)
    rank = number("SLURM_PROCID")
    if rank is not None:
        return rank, number("SLURM_NTASKS")
    return number("JOB_COMPLETION_INDEX"), None


def share(tasks: Sequence[Task], index: int, count: int) -> list[Task]:
    """Process `index`'s part of the list: always the same, so that it finds its own again."""
    return list(tasks[index::count])


def shape_of(table: PromptTable, num_frames: int, height: int, width: int) -> Shape:
    """The bucket of a video: its prompts, length and size."""
    prompts = [prompt for frame in table.frames.values() for prompt in frame.values()]
    return Shape(
        height,
        width,
        frames=power_of_two(num_frames - min(table.frames)),
        objects=power_of_two(len(table.object_ids)),
        points=power_of_two(max(prompt.num_points for prompt in prompts)),
        prompted=power_of_two(len(table.frames)),
        masked=any(prompt.mask is not None for prompt in prompts),
    )


def make_batches(
    measured: Iterable[tuple[Task, Shape, int]], size: int
) -> list[tuple[Shape, list[Task]]]:
    """Groups of at most `size` videos, each of one shape and of lengths as close as can be.

    Args:
        measured: videos, their shapes and their numbers of frames.
        size: videos that are tracked at once.
    """
    buckets: dict[Shape, list[tuple[int, Task]]] = defaultdict(list)
    for task, shape, num_frames in measured:
        buckets[shape].append((num_frames, task))
    batches = []
    for shape, entries in buckets.items():
        tasks = [task for _, task in sorted(entries, key=lambda entry: entry[0])]
        batches += [(shape, tasks[i : i + size]) for i in range(0, len(tasks), size)]
    return batches
