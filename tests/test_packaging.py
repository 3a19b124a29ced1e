"""What is installed is what is in the repository."""

import importlib.metadata
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import sam2jax
from tests.conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_on_disk() -> set[str]:
    kinds = ("__init__.py", "*.toml", "*.safetensors")
    folders = {path.parent for kind in kinds for path in (ROOT / "sam2jax").rglob(kind)}
    return {".".join(path.relative_to(ROOT).parts) for path in folders} | {"sam2jax.convert"}


def test_every_package_is_listed():
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for top in ("sam2jax", "convert") for path in (ROOT / top).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_version_comes_from_one_place():
    assert "version" not in PYPROJECT["project"]
    assert sam2jax.__version__ == importlib.metadata.version("sam2jax")
    assert f"## {sam2jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names_exist():
    assert [name for name in sam2jax.__all__ if not hasattr(sam2jax, name)] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The file lists of a wheel and an sdist, built from a copy of the tracked files."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "copy"
    folders, files = ("sam2jax", "convert", "tests"), ("README.md", "LICENSE")
    for name in (*folders, *files, "pyproject.toml", "MANIFEST.in"):
        source, target = ROOT / name, copy / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    code = (
        "import setuptools.build_meta as backend\n"
        f"backend.build_wheel({str(folder)!r}); backend.build_sdist({str(folder)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = {"wheel": wheel.namelist()}
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
        members = [pathlib.PurePosixPath(member.name) for member in sdist.getmembers()]
    return {**names, "sdist": ["/".join(member.parts[1:]) for member in members]}


def test_wheel_holds_every_module(built: dict[str, list[str]]):
    modules = [path for path in (ROOT / "sam2jax").rglob("*.py")]
    expected = {path.relative_to(ROOT).as_posix() for path in modules} | {
        f"sam2jax/convert/{path.name}" for path in (ROOT / "convert").glob("*.py")
    }
    assert {name for name in built["wheel"] if name.endswith(".py")} == expected
    assert {"sam2jax/py.typed", "sam2jax/weights/sam2.1_hiera_nano.safetensors"} <= set(
        built["wheel"]
    )
    assert not [
        name for name in built["wheel"] + built["sdist"] if name.startswith(("tests", "benchmarks"))
    ]


def test_importing_does_not_read_the_weights():
    code = (
        "import sys; opened = []\n"
        "sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None)\n"
        "import sam2jax; assert opened\n"
        "assert not [path for path in opened if path.endswith('.safetensors')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sdist_holds_the_converter_and_the_licence(built: dict[str, list[str]]):
    expected = {f"convert/{path.name}" for path in (ROOT / "convert").glob("*.py")}
    assert expected | {"LICENSE", "README.md"} <= set(built["sdist"])
