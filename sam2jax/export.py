"""Programs that need nothing but JAX: StableHLO of the tracker and of the image path.

A folder holds one file per program (`jax.export`, for several kinds of devices at once), the
weights, and `metadata.json`, which says what goes in and what comes out.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export as jax_export

from sam2jax.io.files import PathLike, atomic_dir
from sam2jax.nn.sam2 import SAM2, param_shapes
from sam2jax.segmentation.image import decode_masks, encode_image
from sam2jax.tracking.scan import track
from sam2jax.tracking.state import TrackState, init_state
from sam2jax.tracking.step import step
from sam2jax.types import CONDITIONING, NONE, Array, ImageFeatures, Prompts
from sam2jax.version import __version__

FORMAT, VERSION = "sam2jax-programs", 1
PLATFORMS = ("cpu", "cuda", "tpu")
METADATA, WEIGHTS = "metadata.json", "weights.npz"

FlatTree = Mapping[str, Any]  # paths with slashes, to arrays


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is fixed in the programs' shapes; the number of frames is not."""

    frame: tuple[int, int] = (720, 1280)  # height and width
    num_objects: int = 1
    num_points: int = 1  # an object; corners of a box are two

    def __post_init__(self) -> None:
        numbers = (*self.frame, self.num_objects, self.num_points)
        if len(self.frame) != 2 or any(number < 1 for number in numbers):
            raise ValueError(f"Sizes must be at least 1, got {self}.")


def export_programs(
    model: SAM2,
    params: Any,
    dest: PathLike,
    *,
    sizes: Sizes = Sizes(),
    platforms: Sequence[str] = PLATFORMS,
    embed: bool = False,
) -> None:
    """Writes the programs of a model, all or none.

    - `track(weights, frames [T, H, W, 3], points, labels)`: a clip, prompted on its first frame.
    - `start()`: the state of a tracker that has seen nothing, and
      `step(weights, state, frame [H, W, 3], points, labels)`: the next state, and the next frame of
      a stream.
    - `encode(weights, image [H, W, 3])` and `decode(weights, features, points, labels)`: an image.

    Frames are uint8 RGB. points are [N, P, 2] as (x, y) in pixels of the frame, labels [N, P]
    int32: 1 foreground, 0 background, 2 and 3 a box's corners, -1 padding behind those; an object
    whose labels are all -1 is not prompted. Trees are flat dicts, results too.

    Args:
      model: static description, from `load`.
      params: its parameters.
      dest: the folder to write.
      sizes: of frames and prompts.
      platforms: kinds of devices, of "cpu", "cuda", "tpu".
      embed: weights become part of the programs, which then do not take them.

    Raises:
      ValueError: an unknown platform, or `dest` is taken.
    """
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown or not platforms:
        raise ValueError(f"platforms are of {', '.join(PLATFORMS)}; got {', '.join(platforms)}.")
    # Kernels are for one kind of device, and not promised to be readable by later versions.
    model = SAM2(dataclasses.replace(model.config, kernels=False))
    weights = {k: jnp.asarray(v, jnp.float32) for k, v in flatten_dict(params, sep="/").items()}
    state = init_state(model, sizes.num_objects)
    described = {}
    with atomic_dir(dest) as folder:
        for name, (program, given) in _programs(model, state, sizes).items():
            held = None if name == "start" else weights
            exported = _export(program, held, tuple(given.values()), platforms, embed)
            (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
            results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
            described[name] = {
                "takes weights": held is not None and not embed,
                "arguments": {argument: _describe(x) for argument, x in given.items()},
                "results": _describe(results),
            }
        if not embed:
            arrays: Any = {name: np.asarray(x) for name, x in weights.items()}
            np.savez(folder / WEIGHTS, **arrays)
        record = {
            "format": FORMAT,
            "format_version": VERSION,
            "sam2jax": __version__,
            "jax": jax.__version__,
            "calling_convention_version": jax_export.maximum_supported_calling_convention_version,
            "platforms": list(platforms),
            "weights": "inside" if embed else WEIGHTS,
            "sizes": dataclasses.asdict(sizes),
            "model": model.config.to_dict(),
            "parameters": _describe(weights),
            "programs": described,
        }
        (folder / METADATA).write_text(json.dumps(record, indent=2) + "\n")


def _programs(
    model: SAM2, first: TrackState, sizes: Sizes
) -> dict[str, tuple[Callable, dict[str, Any]]]:
    """Each program, with shapes of what it takes beside weights, in their order."""
    height, width = sizes.frame
    frame = jax.ShapeDtypeStruct((height, width, 3), jnp.uint8)
    (length,) = jax_export.symbolic_shape("T", constraints=["T >= 1"])
    frames = jax.ShapeDtypeStruct((length, *frame.shape), jnp.uint8)
    shape = (sizes.num_objects, sizes.num_points)
    prompts = {
        "points": jax.ShapeDtypeStruct((*shape, 2), jnp.float32),
        "labels": jax.ShapeDtypeStruct(shape, jnp.int32),
    }

    def track_clip(params: Any, frames: Array, points: Array, labels: Array) -> FlatTree:
        state = init_state(model, sizes.num_objects, max_cond_frames=1)
        state = state.replace(num_frames=jnp.asarray(frames.shape[0], jnp.int32))
        _, out = track(model, params, frames, _prompts(points, labels), state)
        return to_tree(out)

    def step_once(params: Any, state: FlatTree, frame: Array, points: Array, labels: Array):
        held = from_tree(first, state)
        held, out = step(model, params, held, frame, _prompts(points, labels))
        return to_tree(held), to_tree(out)

    def encode(params: Any, image: Array) -> FlatTree:
        return to_tree(encode_image(model, params, image[None]))

    def decode(params: Any, features: FlatTree, points: Array, labels: Array) -> FlatTree:
        given = ImageFeatures(**features)
        found = decode_masks(model, params, given, _prompts(points, labels), size=sizes.frame)
        return to_tree(found)

    def start() -> FlatTree:
        return to_tree(init_state(model, sizes.num_objects))

    features = jax.eval_shape(encode, param_shapes(model.config), frame)
    return {
        "track": (track_clip, {"frames": frames, **prompts}),
        "start": (start, {}),
        "step": (step_once, {"state": _shapes(to_tree(first)), "frame": frame, **prompts}),
        "encode": (encode, {"image": frame}),
        "decode": (decode, {"features": features, **prompts}),
    }


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _export(
    program: Callable,
    weights: FlatTree | None,
    given: tuple[Any, ...],
    platforms: Sequence[str],
    embed: bool,
) -> jax_export.Exported:
    """A program that takes weights first, unless it needs none or they are to be inside."""
    if weights is None:
        return jax_export.export(jax.jit(program), platforms=platforms)(*given)

    def with_weights(weights: FlatTree, *given: Any):
        return program(unflatten_dict(dict(weights), sep="/"), *given)

    if embed:
        run = jax.jit(functools.partial(with_weights, weights))
        return jax_export.export(run, platforms=platforms)(*given)
    return jax_export.export(jax.jit(with_weights), platforms=platforms)(_shapes(weights), *given)


def _prompts(points: Array, labels: Array) -> Prompts:
    count = jnp.sum(labels >= 0, axis=1, dtype=jnp.int32)
    kind = jnp.where(count > 0, CONDITIONING, NONE).astype(jnp.int32)
    return Prompts(points=points, labels=labels, num_points=count, kind=kind)


def to_tree(value: Any) -> dict[str, Any]:
    """A state or an answer as a flat dict of its arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(value)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def from_tree(like: Any, tree: FlatTree) -> Any:
    """The opposite of `to_tree`, for a value of the same structure."""
    return jax.tree.unflatten(jax.tree.structure(like), [tree[name] for name in to_tree(like)])


def _describe(tree: Any) -> Any:
    """The same tree of strings like `float32[1,256,256]`."""
    return jax.tree.map(lambda x: f"{x.dtype}[{','.join(map(str, x.shape))}]", tree)
