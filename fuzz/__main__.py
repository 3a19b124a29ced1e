"""python -m fuzz READER --cases N: coverage-guided, from valid files on; prints a table's row.

Needs atheris and coverage. The cases that led somewhere new, and all findings, are kept in --folder
and the next run goes on from them.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys
import time

from fuzz.readers import READERS, own_modules

TIMEOUT = 20  # seconds that a case may take
_RESTARTS = 50


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("reader", choices=[*READERS, "all"])
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("fuzz-results"))
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    for name in READERS if given.reader == "all" else (given.reader,):
        print(run(name, given.cases, given.folder / name, given.seed), flush=True)


def run(name: str, cases: int, folder: pathlib.Path, seed: int) -> str:
    """Fuzzes a reader, in as many processes as it takes; a row of the table."""
    corpus, found = folder / "corpus", folder / "findings"
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(exist_ok=True)
    words = folder / "words"
    words.write_text("".join(map(_dictionary_entry, READERS[name].tokens or ("\0",))))
    begun, done = time.monotonic(), 0
    for attempt in range(_RESTARTS):
        options = (
            *(f"-runs={cases - done}", f"-timeout={TIMEOUT}", "-rss_limit_mb=4096"),
            *(f"-max_len={READERS[name].longest}", f"-seed={seed + attempt}"),
            *(f"-dict={words}", f"-artifact_prefix={found}/"),
            "-print_final_stats=1",
        )
        modules = ",".join(READERS[name].modules)
        output = _worker("fuzz", name, corpus, found, modules, *options)
        (folder / "log").write_text(output)
        counts = re.findall(r"number_of_executed_units: (\d+)", output)
        if not counts:
            raise RuntimeError(f"the fuzzer of {name} does not run; see {folder / 'log'}.")
        done += int(counts[-1])
        if done >= cases:
            break
    seconds = time.monotonic() - begun
    told = _worker("cover", name, corpus, found, ",".join(own_modules(name)))
    (folder / "coverage").write_text(told)
    covered = re.findall(r"covered (\S+) (\d+) (\d+)", told)
    shares = ", ".join(f"{file} {100 * int(a) // int(b)}" for file, a, b in covered)
    findings = len([path for path in found.iterdir() if path.suffix != ".txt"])
    return f"| {name} | {done:,} | {seconds:.0f} | {shares} | {findings} |"


def _dictionary_entry(token: str) -> str:
    """As libFuzzer reads it."""
    letters = "".join(f"\\x{byte:02x}" for byte in token.encode("latin-1"))
    return f'"{letters}"\n'


def _worker(what: str, *given: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.worker", what, *map(str, given)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.stdout


if __name__ == "__main__":
    main()
