"""Imports run one way, and importing the package stays cheap."""

import ast
import pathlib
import subprocess
import sys

from tests.conftest import ROOT

BASE = {"config", "tree", "types", "version"}
NN = BASE | {"ops"}
TRACKING = NN | {"nn", "memory", "checks"}
FILES = BASE | {"io"}
CONVERT = FILES | {"nn"}
LOADING = CONVERT | {"convert"}
HOST = TRACKING | LOADING | {"tracking", "segmentation", "loading"}
APPLICATIONS = {"predictors", "training", "evaluation"}

# What each part of the package may import, besides itself.
SEES = {
    "config": set(),
    "tree": set(),
    "types": {"config", "tree"},
    "checks": BASE,
    "version": set(),
    "ops": BASE,
    "nn": NN,
    "memory": NN,
    "tracking": TRACKING,
    "segmentation": TRACKING,
    "io": BASE,
    "convert": CONVERT,
    "loading": LOADING,
    "testing": CONVERT | {"convert"},
    "export": HOST,
    **dict.fromkeys(APPLICATIONS, HOST),
    "evaluation": HOST | {"predictors"},
    "cli": HOST | APPLICATIONS | {"export"},
    "__main__": {"cli"},
    "__init__": HOST | APPLICATIONS,
}


def sources() -> list[tuple[str, pathlib.Path]]:
    """(part, file) for everything that ships."""
    package, convert = ROOT / "sam2jax", ROOT / "convert"
    inside = [(path.relative_to(package).parts[0], path) for path in package.rglob("*.py")]
    return [(part.removesuffix(".py"), path) for part, path in inside] + [
        ("convert", path) for path in convert.rglob("*.py")
    ]


def imported_parts(text: str) -> set[str]:
    """Parts of sam2jax that a file imports, at its head or inside a function."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    split = [name.split(".") for name in names]
    # The folder convert/ is also on the path under its own name.
    return {parts[1] for parts in split if parts[0] == "sam2jax" and len(parts) > 1} | {
        "convert" for parts in split if parts[0] == "convert"
    }


def test_every_part_has_a_place():
    assert {part for part, _ in sources()} <= set(SEES)


def test_imports_run_one_way():
    backwards = [
        f"{path.relative_to(ROOT)} imports {target}"
        for part, path in sources()
        for target in imported_parts(path.read_text())
        if target in SEES and target != part and target not in SEES[part]
    ]
    assert not backwards, "\n".join(backwards)


def test_walk_sees_imports_inside_functions():
    text = """
import sam2jax.nn.hiera
from sam2jax import io
def late():
    from sam2jax.cli import app
"""
    assert imported_parts(text) == {"cli", "nn", "io"}


def test_importing_the_package_loads_no_heavy_library():
    heavy = ("torch", "av", "optax", "orbax", "transformers", "PIL", "typer", "grain")
    code = f"import sys, sam2jax; print(*[n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
