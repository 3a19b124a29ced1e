"""A process that reads cases: under the fuzzer, or those that it kept, for coverage.

It is started anew when a case ends it; what it finds is in the findings folder by then.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
MEMORY = 6 * 2**30  # bytes of addresses that a process may have, its libraries' included
LONGEST_MESSAGE = 2000
_RUNS_SOMETHING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
_REACHES_OUT = ("socket.connect", "pickle.find_class")
_WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")


class Escaped(BaseException):
    """A case made its reader run something, connect to something, or write outside its folder."""


def watch(*folders: pathlib.Path) -> None:
    """Raises `Escaped` from now on."""
    inside = ("/dev/null", *(str(folder.resolve()) for folder in folders))

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event in _RUNS_SOMETHING or event in _REACHES_OUT:
            raise Escaped(f"{event}: {given!r:.200}")
        if event == "open":
            path, _, flags = given
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            paths = [path] if writes and isinstance(path, str | bytes) else []
        elif event in _WRITES:
            folder = given[-1]  # open, of os.remove and such within it
            base = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else ""
            paths = [
                os.path.join(base, os.fsdecode(p)) for p in given if isinstance(p, str | bytes)
            ]
        else:
            return
        for path in map(os.fsdecode, paths):
            if not os.path.realpath(path).startswith(inside):
                raise Escaped(f"{event} of {path}")

    sys.addaudithook(hook)


def one(name: str, case: bytes, folder: pathlib.Path) -> None:
    """Reads a case in an emptied folder; raises what is a finding."""
    from fuzz.readers import NAME, READERS

    reader = READERS[name]
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(case, folder)
    except (ValueError, OSError) as error:
        message = str(error)
        if reader.names_file and NAME not in message:
            raise Unclear(f"{type(error).__name__} names no file: {message[:200]}") from error
        if not message or len(message) > LONGEST_MESSAGE or message.count("\n") > 2:
            raise Unclear(f"{type(error).__name__} of {len(message)} letters") from error


class Unclear(Exception):
    """A refusal that does not say which file is at fault, or says too much."""


def keep_finding(found: pathlib.Path, case: bytes, error: BaseException) -> bool:
    """Writes a finding, once for each place in the code; whether it is new."""
    cause = error.__cause__ if isinstance(error, Unclear) and error.__cause__ else error
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if "/fuzz/" not in f.filename]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
    ours = [f for f in frames if re.search(r"/(sam2jax|convert)/", f.filename)]
    where = f"{ours[-1].filename}:{ours[-1].lineno}" if ours else place
    key = hashlib.sha256(f"{type(error).__name__}{where}{place}".encode()).hexdigest()[:10]
    path = found / f"{type(error).__name__}-{key}"
    if path.exists():
        return False
    path.write_bytes(case)
    text = "".join(traceback.format_exception(error))
    path.with_suffix(".txt").write_text(text[-6000:])
    return True


def target(name: str, found: pathlib.Path, folder: pathlib.Path) -> Callable[[bytes], None]:
    def read(case: bytes) -> None:
        try:
            one(name, case, folder)
        except BaseException as error:
            keep_finding(found, case, error)

    return read


def trust_checksums() -> None:
    """Damage must get past the checksums of archives: who makes files can make those too."""
    import zipfile

    zipfile.ZipExtFile._update_crc = lambda self, data: None  # type: ignore[attr-defined]


def prepare(name: str, corpus: pathlib.Path) -> None:
    """Makes the seeds and reads them, so that all that is imported late has been."""
    from fuzz.readers import READERS

    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as folder:
        for place, case in enumerate(READERS[name].seeds(pathlib.Path(made))):
            (corpus / f"seed-{place}").write_bytes(case)
            with contextlib.suppress(Exception):
                one(name, case, pathlib.Path(folder))


def fuzz(name: str, corpus: str, found: str, modules: str, *options: str) -> None:
    import atheris

    # Before anything else imports them.
    with atheris.instrument_imports(include=modules.split(",")):
        for module in modules.split(","):
            __import__(module)
    trust_checksums()
    prepare(name, pathlib.Path(corpus))
    folder = pathlib.Path(tempfile.mkdtemp(prefix="sam2jax-fuzz-"))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    watch(folder, pathlib.Path(found))
    arguments = [sys.argv[0], *options, corpus]
    atheris.Setup(arguments, target(name, pathlib.Path(found), folder))
    atheris.Fuzz()


def cover(name: str, corpus: str, found: str, modules: str) -> None:
    """Prints how many lines of the reader's own modules the kept cases run through."""
    import coverage

    places = [m.replace(".", "/").replace("sam2jax/convert", "convert") for m in modules.split(",")]
    files = [str(ROOT / f"{place}{end}") for place in places for end in (".py", "/*.py")]
    measure = coverage.Coverage(data_file=None, include=files)
    measure.start()  # before anything imports them
    trust_checksums()
    prepare(name, pathlib.Path(corpus))
    with tempfile.TemporaryDirectory() as folder:
        read = target(name, pathlib.Path(found), pathlib.Path(folder))
        for path in sorted(pathlib.Path(corpus).iterdir()):
            read(path.read_bytes())
    measure.stop()
    for path in sorted(measure.get_data().measured_files()):
        _, lines, _, missing, _ = measure.analysis2(path)
        print(f"covered {os.path.relpath(path)} {len(lines) - len(missing)} {len(lines)} {missing}")


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    {"fuzz": fuzz, "cover": cover}[what](*given)
