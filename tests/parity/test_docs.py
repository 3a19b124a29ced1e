"""The page on migrating names everything that the official package makes public."""

import ast
import importlib.util
import pathlib
import re

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.parity

FILES = (
    "build_sam",
    "sam2_image_predictor",
    "automatic_mask_generator",
    "sam2_video_predictor",
)


def public(body: list[ast.stmt]) -> list[str]:
    """Names of functions and classes, and of classes' methods."""
    names = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            names.append(node.name)
        if isinstance(node, ast.ClassDef):
            names += public(node.body)
    return names


def test_every_official_name_is_there():
    spec = importlib.util.find_spec("sam2")
    assert spec is not None and spec.origin is not None
    folder = pathlib.Path(spec.origin).parent
    trees = [ast.parse((folder / f"{name}.py").read_text()) for name in FILES]
    names = {name for tree in trees for name in public(tree.body)}
    assert len(names) > 25
    # What its class for compiled models replaces of the model, inside.
    names -= {"forward_image"}
    page = (ROOT / "docs/migrating.md").read_text()
    told = set(re.findall(r"\w+", " ".join(re.findall(r"^\|(.+?)\|", page, re.MULTILINE))))
    assert names - told == set()
