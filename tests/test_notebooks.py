"""The notebooks run from the first cell to the last, and are stored as they ran."""

import ast
import json
import pathlib
import re
from typing import Any

import jax
import pytest

import sam2jax
from sam2jax.io.notebook import Clicks, Picture
from sam2jax.testing import random_params
from tests.conftest import ROOT
from tests.test_readme import SMALL

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
DESCENTS = {"functional", "finetuning"}
LARGEST = 300_000  # bytes of a file
SETTINGS = r"^(CHECKPOINT|STEPS) = .*$"


def code_cells(path: pathlib.Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_stored_as_it_ran(name: str):
    path = NOTEBOOKS[name]
    text, cells = path.read_text(), code_cells(path)
    assert len(text) < LARGEST
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert kinds and "error" not in kinds
    assert "image/jpeg" in text
    assert "/home/" not in text and "Traceback" not in text
    assert re.search(SETTINGS, "".join(cells[0]["source"]), re.MULTILINE)


def run(cells: list[dict[str, Any]], settings: dict[str, Any]) -> list[Any]:
    """Executes cells, with other values of their settings; what their last expressions are."""
    names: dict[str, Any] = {}
    shown = []
    for index, cell in enumerate(cells):
        tree = ast.parse("".join(cell["source"]))
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                if index == 0 and node.targets[0].id in settings:
                    node.value = ast.copy_location(
                        ast.Constant(settings[node.targets[0].id]), node.value
                    )
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {index}", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), f"cell {index}", "eval"), names))
    return shown


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another model, in a file as the official ones: the only thing to change."""
    path = tmp_path_factory.mktemp("notebooks") / "small.pt"
    sam2jax.save(path, SMALL, random_params(SMALL, seed=3))
    return str(path)


def check_run(name: str, settings: dict[str, Any]) -> None:
    with jax.numpy_rank_promotion("allow"):  # as it is for users
        shown = run(code_cells(NOTEBOOKS[name]), settings)
    pictures = [value for value in shown if isinstance(value, Picture)]
    assert pictures and all(picture._repr_jpeg_()[:2] == b"\xff\xd8" for picture in pictures)
    assert not any(isinstance(value, Clicks) and not value.points for value in shown)


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("name", sorted(set(NOTEBOOKS) - DESCENTS))
def test_it_runs(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_run(name, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DESCENTS))
def test_descent_runs(name: str, other_checkpoint: str, tmp_path, monkeypatch):
    """With a smaller model and in two steps: gradients take long to compile."""
    monkeypatch.chdir(tmp_path)
    check_run(name, {"CHECKPOINT": other_checkpoint, "STEPS": 2})
