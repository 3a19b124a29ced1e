"""python -m fuzz.kills COMMAND --times N: is killed at random moments, and has to come back.

A command runs to its end, and is timed. Then, again and again in an empty folder, it is killed
after a time that is drawn evenly, every third time from the last tenth, where most is written; by
SIGKILL and SIGTERM in turn. What it has written by then must be whole, and a second run must end
with what the first one did.

Commands run in forks of a process that has imported what they need, but not begun to compute.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_CLIP, _FRAMES, _VIDEOS = "clip.mp4", 6, 3
_UNFINISHED = re.compile(r"\..*\.[0-9a-f]{8}(\.\w+)?")  # as `sam2jax.io.files` names it


class Job(NamedTuple):
    """A command, what it writes, and how it goes on where it was stopped."""

    arguments: str
    outputs: tuple[str, ...]
    again: str = ""  # added to a second run, if the first came far enough for it


_MODEL = "--checkpoint ../in/model.safetensors --quiet"
JOBS = {
    "convert": Job("convert ../in/model.safetensors model.pt", ("model.pt",)),
    "track": Job(
        f"track ../in/{_CLIP} {_MODEL} --point 16,16 --out out.mp4 --masks masks.npz",
        ("out.mp4", "masks.npz"),
    ),
    "eval": Job(f"eval ../in/videos --masks ../in/masks {_MODEL} --out out", ("out",)),
    "track-all": Job(
        f"track-all ../in/clips {_MODEL} --point 16,16 --out out",
        tuple(f"out/{i}.json" for i in range(_VIDEOS)),
    ),
    "train": Job(
        "train --config ../in/train.toml --quiet", ("run/model.safetensors",), again="--resume"
    ),
}


class Tally(NamedTuple):
    """What became of the runs that were killed."""

    kills: int  # that came before the end
    before: int  # nothing was there yet
    whole: int  # all was there
    part: int  # some outputs were there, each of them whole
    left: int  # unfinished files, under temporary names


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz.kills", description=__doc__)
    parser.add_argument("command", choices=[*JOBS, "all"])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name in JOBS if given.command == "all" else (given.command,):
        with tempfile.TemporaryDirectory(prefix="sam2jax-kills-") as folder:
            tally, seconds = kill_often(name, given.times, pathlib.Path(folder), given.seed)
        print(f"| {name} | {seconds:.1f} | {' | '.join(map(str, tally))} |", flush=True)


def kill_often(name: str, times: int, folder: pathlib.Path, seed: int) -> tuple[Tally, float]:
    """Kills a command a number of times, and how long it takes undisturbed.

    Raises:
        AssertionError: something half written was taken for whole, or a second run failed.
    """
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # of programs: they are compiled, hardly run
    }
    for setting, value in settings.items():
        os.environ.setdefault(setting, value)
    _import_all()
    job, work = JOBS[name], folder / "work"
    assert _forked(lambda: _write_inputs(folder / "in"), folder) == 0, _log(folder)

    def undisturbed() -> float:
        seconds, code = _timed(lambda: _run(job.arguments, work, fresh=True))
        assert code == 0, _log(work)
        return seconds

    undisturbed()  # compiles
    times_taken = [undisturbed()]
    wanted = {output: digest(work / output) for output in job.outputs}
    chance = random.Random(seed)
    tally = Tally(0, 0, 0, 0, 0)
    while tally.kills < times:
        how = (signal.SIGKILL, signal.SIGTERM)[tally.kills % 2]
        if tally.kills % 10 == 9:  # the machine may be faster or slower by now
            times_taken.append(undisturbed())
        whole = min(times_taken[-3:])
        after = chance.uniform(0.9 if tally.kills % 3 == 2 else 0, 1) * whole
        code = _run(job.arguments, work, fresh=True, after=after, how=how)
        if code == 0:  # it was faster this time
            times_taken.append(undisturbed())
            continue
        there = {output for output in job.outputs if (work / output).exists()}
        assert all(_is_whole(work / output, wanted[output]) for output in there), (name, there)
        left = [path for path in work.rglob(".*") if _UNFINISHED.fullmatch(path.name)]
        assert how == signal.SIGKILL or not left, f"{name}: {left} after SIGTERM"
        code = _run(f"{job.arguments} {job.again}", work)
        if code == 2 and job.again:  # there was nothing to go on from yet
            code = _run(job.arguments, work)
        assert code == 0, (name, code, _log(work))
        found = {output: digest(work / output) for output in job.outputs}
        assert found == wanted, (name, found, wanted)
        tally = Tally(
            tally.kills + 1,
            tally.before + (not there),
            tally.whole + (len(there) == len(wanted)),
            tally.part + (0 < len(there) < len(wanted)),
            tally.left + len(left),
        )
        print(name, *tally, f"{times_taken[-1]:.1f}", file=sys.stderr, flush=True)
    return tally, statistics.median(times_taken)


def _is_whole(path: pathlib.Path, wanted: dict[str, str]) -> bool:
    """A folder of results may lack some of them; none may be other than it should be."""
    found = digest(path)
    return all(wanted.get(name) == value for name, value in found.items()) and (
        path.is_dir() or found == wanted
    )


def digest(path: pathlib.Path) -> dict[str, str]:
    """What each file in a folder says, or the file itself. Dates in archives are no matter."""
    if not path.is_dir():
        return {"": hashlib.sha256(_contents(path)).hexdigest()}
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p, path)]
    return {str(p.relative_to(path)): hashlib.sha256(_contents(p)).hexdigest() for p in files}


def _hidden(path: pathlib.Path, top: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(top).parts)


def _contents(path: pathlib.Path) -> bytes:
    from sam2jax.io.video import open_video

    if path.suffix == ".npz":
        with np.load(path) as archive:
            return b"".join(name.encode() + archive[name].tobytes() for name in archive.files)
    if path.suffix == ".mp4":
        # Its encoder has once in a thousand times taken other bits for the same frames.
        with open_video(path) as video:
            return b"".join(str(frame.shape).encode() for frame in video)
    return path.read_bytes()


# Running -----------------------------------------------------------------------------------------


def _import_all() -> None:
    import sam2jax.cli
    import sam2jax.convert
    import sam2jax.evaluation.vos
    import sam2jax.io.container
    import sam2jax.tracking.scan
    import sam2jax.training.loop  # noqa: F401


def _run(
    arguments: str, work: pathlib.Path, *, fresh: bool = False, after: float = 0, how: int = 0
) -> int:
    """Runs `sam2jax` in a folder; its exit code, below 0 where a signal ended it."""
    if fresh:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)

    def command() -> None:
        from sam2jax.cli import app

        os.chdir(work)
        app(arguments.split())

    return _forked(command, work, after, how)


def _forked(command: Callable[[], None], folder: pathlib.Path, after: float = 0, how: int = 0):
    """Calls a function in a fork, which is sent the signal `how`, if any, `after` some seconds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(log, 1)
            os.dup2(log, 2)
            command()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    if how:
        until = time.monotonic() + after
        while time.monotonic() < until:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, how)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _timed(call: Callable[[], int]) -> tuple[float, int]:
    start = time.monotonic()
    code = call()
    return time.monotonic() - start, code


def _log(folder: pathlib.Path) -> str:
    return (folder / "log").read_text(errors="replace")[-2000:]


# What commands are given -------------------------------------------------------------------------


def _write_inputs(folder: pathlib.Path) -> None:
    import sam2jax
    from fuzz.seeds import small_model
    from sam2jax.io.images import write_image
    from sam2jax.io.masks import PaletteWriter
    from sam2jax.io.writer import VideoWriter
    from sam2jax.testing import random_params

    for name in ("clips", "videos", "masks"):
        (folder / name).mkdir(parents=True)
    sam2jax.save(folder / "model.safetensors", small_model(), random_params(small_model()))
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (_FRAMES, 32, 32, 3), np.uint8)
    for path in (folder / _CLIP, *(folder / "clips" / f"{i}.mp4" for i in range(_VIDEOS))):
        with VideoWriter(path, None, 32, 32) as film:
            for frame in frames:
                film.write(frame)
    mask = np.zeros((1, 32, 32), bool)
    mask[:, 8:20, 8:20] = True
    for i in range(_VIDEOS):
        (folder / "videos" / f"{i}").mkdir()
        for place, frame in enumerate(frames):
            write_image(folder / "videos" / f"{i}" / f"{place:05d}.png", frame)
        with PaletteWriter(folder / "masks" / f"{i}") as writer:
            writer.write(0, "00000", [1], mask)
    (folder / "train.toml").write_text(
        """output = "run"
steps = 4
batch_size = 1
num_frames = 2
max_objects = 1
workers = 0
remat = false
log_every = 1
checkpoint_every = 1
model = {checkpoint = "../in/model.safetensors"}
data = {sources = [{kind = "procedural", num_clips = 4, scene = {num_objects = 1}}]}
"""
    )


if __name__ == "__main__":
    main()
