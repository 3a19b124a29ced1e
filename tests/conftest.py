"""What every test shares: a strict JAX on the CPU, and real media where there are some."""

import importlib.metadata
import importlib.util
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones lack the switch
    # XLA's newer code generation for CPUs takes twice as long to compile these programs.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # PyTorch's idle threads leave JAX the cores

import jax
import pytest

from sam2jax.config import NANO, VARIANTS

PUBLISHED = [name for name in VARIANTS if name != NANO.name]  # by Meta
ROOT = pathlib.Path(__file__).resolve().parent.parent
ORACLE_PACKAGES = ("torch", "torchvision", "sam2", "scipy", "transformers", "hypothesis")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)  # for what is sharded; all else runs on the first


def pytest_report_header() -> list[str]:
    missing = [name for name in ORACLE_PACKAGES if importlib.util.find_spec(name) is None]
    return [f"parity tests are left out: no {', '.join(missing)}"] if missing else []


@pytest.fixture(autouse=True)
def quick_compilation(request: pytest.FixtureRequest):
    """Compiling is most of the time of tests on small models; longer runs are worth optimising."""
    thorough = request.node.get_closest_marker("optimised")
    jax.config.update("jax_disable_most_optimizations", not thorough)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def programs_let_go():
    """Each compiled program takes memory maps, of which a process may have 65,530 on Linux."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def media() -> pathlib.Path:
    """The folder of real clips and images: $SAM2JAX_MEDIA, or shared/media beside the checkout."""
    folder = pathlib.Path(os.environ.get("SAM2JAX_MEDIA", ROOT.parent / "shared" / "media"))
    if not folder.is_dir():
        pytest.skip("no real media here; set SAM2JAX_MEDIA")
    return folder
