"""What a frame would take on an NVIDIA H200, read from programs that are compiled without one.

python -m benchmarks.deviceless [VARIANT ...] [--objects N] [--text FILE]

Needs JAX's CUDA wheels (`pip install "jax[cuda13]"`), and no GPU. Of each operation of a compiled
`step` in bfloat16 with a full memory bank the bytes in and out are added up, at `BANDWIDTH` and at
least `LEAST` seconds; products also at `RATE`. Kernels of our own are counted by their bytes alone,
and told apart, as products bound them. For one program that was measured fused operations came
within 5 % of this (`benchmarks/NOTES.md`); XLA's search among algorithms needs a device and is left
out. `--text` keeps the compiled program of the last variant.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

import sam2jax
from sam2jax.config import VARIANTS, SAM2Config
from sam2jax.nn.sam2 import SAM2, param_shapes

BANDWIDTH, RATE, LEAST = 2.5e12, 500e12, 2e-6  # bytes and operations a second, seconds
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  clock_rate_ghz: 1.98 device_address_bits: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H200"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
ALL = [f"sam2.1_hiera_{name}" for name in ("tiny", "small", "base_plus", "large")]
OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
KINDS = ("product", "other", "kernel")
UPDATES = {"scatter": 2, "dynamic-update-slice": 1}  # operands that are written in place
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"}
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}


class Operation(NamedTuple):
    name: str
    kind: str  # one of KINDS
    seconds: float


def compiled_step(config: SAM2Config, objects: int) -> str:
    """The program of a step without prompts, for an H200."""
    described = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
    mesh = jax.sharding.Mesh(np.array(described.devices[:1]), ("device",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = SAM2(config)

    def shapes(params: Any) -> Any:
        state = sam2jax.init_state(model, objects, max_cond_frames=1)
        return sam2jax.prepare_params(model, params), state

    params, state = jax.eval_shape(shapes, param_shapes(config))
    frame = jax.ShapeDtypeStruct((config.image_size, config.image_size, 3), jnp.uint8)
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (params, state, frame)
    )
    step = jax.jit(lambda params, state, frame: sam2jax.step(model, params, state, frame))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask it for their device
        lowered = step.lower(*given)
    return lowered.compile(compiler_options=OPTIONS).as_text()


class Instruction(NamedTuple):
    name: str
    shape: str
    operation: str  # its opcode
    operands: tuple[str, ...]
    line: str


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Every computation of a compiled program by its name, and the name of the entry."""
    found, entry, name = {}, "", ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif read := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line):
            operands = tuple(re.findall(r"%([\w.\-]+)", read[4].split(")", 1)[0]))
            found[name].append(Instruction(read[1], read[2], read[3], operands, line))
    return found, entry


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """`(f32[2,3]{1,0}, s8[4])` -> [("f32", (2, 3)), ("s8", (4,))]."""
    read = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return [(kind, tuple(map(int, filter(None, sizes.split(","))))) for kind, sizes in read]


def size(shape: str) -> int:
    """Bytes; the library's room to work in is none of them."""
    return sum(
        WIDTHS.get(kind, 4) * math.prod(sizes)
        for kind, sizes in arrays(shape)
        if not (kind == "s8" and len(sizes) == 1)
    )


def operations(found: dict[str, list[Instruction]], name: str) -> list[Operation]:
    """What runs when a computation does: of a conditional the dearer branch."""
    result: list[Operation] = []
    shapes = {x.name: x.shape for x in found[name]}
    for x in found[name]:
        if x.operation == "conditional":
            branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", x.line)
            listed = re.search(r"branch_computations=\{([^}]*)\}", x.line)
            branches = re.findall(r"[\w.\-]+", listed[1]) if listed else branches
            result += max((operations(found, branch) for branch in branches), key=total)
        elif x.operation == "while":
            body = re.search(r"body=%?([\w.\-]+)", x.line)
            count = re.search(r'known_trip_count":\{"n":"(\d+)"', x.line)
            assert body
            result += operations(found, body[1]) * int(count[1] if count else 1)
        elif x.operation not in FREE:
            result.append(operation(found, x, [shapes[operand] for operand in x.operands]))
    return result


def operation(found: dict[str, list[Instruction]], x: Instruction, given: list[str]) -> Operation:
    moved = size(x.shape) + sum(map(size, given))
    if "cublas" in x.line:
        contracted = re.search(r'lhs_contracting_dimensions":\["(\d)"\]', x.line)
        depth = arrays(given[0])[0][1][int(contracted[1])] if contracted else 1
        work = 2 * math.prod(arrays(x.shape)[0][1]) * depth
        return Operation(x.name, "product", max(moved / BANDWIDTH, work / RATE, LEAST))
    if called := re.search(r"calls=%?([\w.\-]+)", x.line):
        moved = moved_by(found[called[1]])
    kind = "kernel" if "triton" in x.line and x.operation == "custom-call" else "other"
    return Operation(x.name, kind, max(moved / BANDWIDTH, LEAST))


def moved_by(fused: list[Instruction]) -> int:
    """Bytes of a fusion: of what is only sliced, the slices; of what is written in place, that."""
    shapes = {x.name: x.shape for x in fused}
    (root,) = (x for x in fused if x.line.lstrip().startswith("ROOT"))
    place = root.operation in UPDATES and root.operands[0]
    moved = size(shapes[root.operands[UPDATES[root.operation]]] if place else root.shape)
    for x in fused:
        if x.operation == "parameter" and x.name != place:
            uses = [y for y in fused if x.name in y.operands]
            sliced = all(y.operation in ("slice", "dynamic-slice", "gather") for y in uses)
            moved += sum(size(y.shape) for y in uses) if uses and sliced else size(x.shape)
    return moved


def total(found: list[Operation]) -> float:
    return sum(x.seconds for x in found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", metavar="VARIANT")
    parser.add_argument("--objects", type=int, default=1)
    parser.add_argument("--text", type=pathlib.Path)
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # there is no other
    columns = ("operations", "products", "other", "sum", "kernels")
    print(f"{'ms a frame':24}" + "".join(f"{column:>11}" for column in columns))
    for name in given.variants or ALL:
        options = {"dtype": "bfloat16", "fill_hole_area": 0, "objects_at_once": 8}
        text = compiled_step(dataclasses.replace(VARIANTS[name], **options), given.objects)
        if given.text:
            given.text.write_text(text)
        found = operations(*computations(text))
        parts = [total([x for x in found if x.kind == kind]) * 1e3 for kind in KINDS]
        told = (*parts[:2], sum(parts[:2]), parts[2])
        cells = "".join(f"{value:11.2f}" for value in told)
        print(f"{name:24}{len(found):11}{cells}", flush=True)


if __name__ == "__main__":
    main()
