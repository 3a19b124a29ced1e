"""Every block of the documentation is run or checked, and its figures are those of results."""

import json
import pathlib
import re
import shlex
import tomllib

import pytest
import typer

import sam2jax
from sam2jax.cli import app
from tests.conftest import ROOT
from tests.test_readme import README, folder, python_in  # noqa: F401

PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
RUN_ELSEWHERE = {"policies", "export"}  # in test_readme, which looks at what comes of them
RESULTS = ROOT / "benchmarks/results"
OTHER_PROGRAMS = {"pip", "pytest"}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    assert text.count("```") % 2 == 0
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def console_lines(text: str) -> list[str]:
    shown = [block for kind, block in blocks(text) if kind == "console"]
    return [line for block in shown for line in block.splitlines() if line]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_kinds_that_are_checked(page: str):
    kinds = {kind for kind, _ in blocks(PAGES[page])}
    assert kinds <= {"python", "console", "toml"}
    assert len(blocks(PAGES[page])) == PAGES[page].count("```") / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in RUN_ELSEWHERE and python_in(PAGES[page])]
)
def test_python_runs(page: str, folder: pathlib.Path, monkeypatch):  # noqa: F811
    """On a smaller model than the one that ships, which is quicker to compile."""
    monkeypatch.chdir(folder)
    code = python_in(PAGES[page]).replace('"sam2.1_hiera_nano"', '"sam2.1_hiera_tiny.pt"')
    exec(compile(code, f"docs/{page}.md", "exec"), {"__name__": "docs"})


def check_command(line: str) -> None:
    """Parses a `sam2jax` line as the program would, without running it."""
    group = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    try:
        with group.make_context("sam2jax", words) as context:
            name, command, rest = group.resolve_command(context, words)
            command.make_context(name, rest, parent=context).close()
    except typer.Exit:
        pass  # it asked for help or the version


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str):
    for line in console_lines(PAGES[page]):
        words = shlex.split(line)
        while "=" in words[0] or words[0] == "srun":  # a variable of the environment, Slurm
            words = words[1:]
        if words[0] == "sam2jax":
            check_command(shlex.join(words))
        elif words[0] == "python":
            assert words[1] == "-m"
            module = ROOT / words[2].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), line
        else:
            assert words[0] in OTHER_PROGRAMS, line


@pytest.mark.parametrize("line", ["sam2jax track a.mp4 --wrong 1", "sam2jax wrong", "sam2jax info"])
def test_wrong_commands_are_noticed(line: str):
    with pytest.raises(Exception, match="(?i)no such|missing"):
        check_command(line)


@pytest.mark.parametrize("page", PAGES)
def test_toml_is_read(page: str):
    for kind, block in blocks(PAGES[page]):
        if kind == "toml":
            assert tomllib.loads(block)


def test_links_between_pages_lead_somewhere():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (ROOT / "docs" / link).exists(), f"{page}: {link}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w-]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(PAGES)


def test_names_to_migrate_to_exist():
    rows = re.findall(r"^\|(.+?)\|(.+?)\|", PAGES["migrating"], re.MULTILINE)
    names = [name for _, here in rows for name in re.findall(r"`([\w.]+)`", here)]
    ours = [name.removeprefix("sam2jax.") for name in names if name[:3] in ("sam", "SAM")]
    assert len(ours) > 30
    for name in ours:
        found = sam2jax
        for part in name.split("."):
            found = getattr(found, part)


def test_fidelity_is_that_of_the_readme():
    rows = re.findall(r"^\| SAM 2.+\|$", README, re.MULTILINE)
    assert len(rows) == 4
    assert [row for row in rows if row not in PAGES["fidelity"]] == []


@pytest.mark.parametrize("file", re.findall(r"^`(.+)\.json`:$", PAGES["performance"], re.MULTILINE))
def test_tables_are_those_of_the_results(file: str):
    """To the last digit that is shown."""
    table = PAGES["performance"].split(f"`{file}.json`:")[1].split("\n\n")[1]
    shown = {cells[1].strip(): cells[2:5] for cells in map(_cells, table.splitlines()[2:])}
    rows = json.loads((RESULTS / f"{file}.json").read_text())["rows"]
    assert len(shown) == len(rows)
    for row in rows:
        name = re.sub(r"^sam2\S+: ", "", row["name"])
        name = row["name"] if row["name"] in shown else name  # where there are several variants
        for cell, measured in zip(shown[name], ("official", "ours", "ratio"), strict=True):
            digits = len(cell.strip().partition(".")[2])
            assert cell.strip() == f"{row[measured]:.{digits}f}", (name, measured)


def test_scores_of_pooled_memories_are_those_of_the_results():
    results = json.loads((RESULTS / "pooling-sam2.1_hiera_tiny-float32-cpu.json").read_text())
    shown = re.findall(r"^\| (click|mask) \|(.+)\|$", PAGES["performance"], re.MULTILINE)
    found = {name: [float(cell) for cell in _cells(row)] for name, row in shown}
    expected = {name: [round(x, 3) for x in of.values()] for name, of in results["J&F"].items()}
    assert found == expected


def _cells(row: str) -> list[str]:
    return row.split("|")
