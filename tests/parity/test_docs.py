"""The page on migrating names everything that the official package makes public."""

import ast
import importlib.util
import inspect
import pathlib
import re
import sys

import pytest

import sam2jax
from tests import oracle
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


CLASSES = {
    "SAM2ImagePredictor": oracle.SAM2ImagePredictor,
    "SAM2AutomaticMaskGenerator": oracle.SAM2AutomaticMaskGenerator,
    "SAM2VideoPredictor": oracle.SAM2VideoPredictor,
}
BUILDERS = sys.modules[oracle.build_sam2_video_predictor.__module__]
COLLECTED = ("vos_optimized",)  # in our **options
FUNCTIONS = [f"build_sam2{video}{hub}" for video in ("", "_video_predictor") for hub in ("", "_hf")]


def arguments(function: object) -> dict[str, object]:
    """Names and defaults of those that are not collected."""
    collected = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in given if each.kind not in collected}


@pytest.mark.parametrize("name", [*CLASSES, *FUNCTIONS])
def test_arguments_have_the_official_names_and_defaults(name: str):
    """Each method of ours that the official class has, too."""
    ours = getattr(sam2jax, name)
    if name in FUNCTIONS:
        pairs = {name: (getattr(BUILDERS, name), ours)}
    else:
        theirs = CLASSES[name]
        shared = [n for n in vars(ours) if n in vars(theirs) and callable(getattr(ours, n))]
        shared = [n for n in shared if n[0] != "_" or n == "__init__"]
        if name == "SAM2VideoPredictor":  # built by configuration files
            shared.remove("__init__")
        pairs = {n: (getattr(theirs, n), getattr(ours, n)) for n in shared}
        assert len(pairs) > 2
    for called, (their, own) in pairs.items():
        expected, found = arguments(their), arguments(own)
        torch_only = {"device": None, "mode": None}  # they warn where they are given
        expected = {k: torch_only.get(k, v) for k, v in expected.items() if k not in COLLECTED}
        found = {k: v for k, v in found.items() if k in expected}
        assert list(found) == list(expected), called
        if expected.get("hydra_overrides_extra") == []:
            expected["hydra_overrides_extra"] = ()
        differing = {k: (v, found[k]) for k, v in expected.items() if v != found[k]}
        assert not differing, (called, differing)
