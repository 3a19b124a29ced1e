"""A run: model, data, mesh, steps, metrics and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from tqdm import tqdm

import sam2jax.convert as convert
from sam2jax.config import VARIANTS, SAM2Config
from sam2jax.loading import save
from sam2jax.nn.sam2 import SAM2, init_params
from sam2jax.training.checkpoints import Checkpoints
from sam2jax.training.config import TrainConfig
from sam2jax.training.data.clip import Clip
from sam2jax.training.data.pipeline import Loader, make_loader
from sam2jax.training.rollout import training_config
from sam2jax.training.sharding import batch_sharding, make_mesh, state_shardings
from sam2jax.training.step import TrainState, init_train_state, model_params, train_step

MODEL_FILE = "model.safetensors"
CHECKPOINTS = "checkpoints"

_log = logging.getLogger(__name__)


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> pathlib.Path:
    """Trains a model, on all devices of all processes.

    Args:
      config: of the run.
      resume: go on from the newest checkpoint in `config.output`; the parameters at the end are
        those of a run that was never stopped.
      progress: show a bar. Metrics are logged, at the level INFO.

    Returns:
      The file of the trained model, for `load`; `sam2jax convert` makes any other format of it.

    Raises:
      FileNotFoundError: there is nothing to resume from, or a source of data is not there.
      ValueError: the batch cannot be split over the devices, the folder holds another run, or more
        examples are damaged than `config.data.max_damaged`.
      FloatingPointError: the loss or its gradient is no longer finite. No checkpoint has such a
        state.
    """
    mesh = make_mesh(config.shards)
    if config.batch_size % mesh.size:
        raise ValueError(
            f"batch_size must be a multiple of the {mesh.size} devices, got {config.batch_size}."
        )
    output = pathlib.Path(config.output)
    if resume and not (output / CHECKPOINTS).is_dir():  # nor is it made
        raise _nothing_to_resume(output)
    with Checkpoints(output / CHECKPOINTS, config.keep_checkpoints) as checkpoints:
        _check_start(output, checkpoints, resume)
        served, model, loader, state = _start(config, mesh, checkpoints if resume else None)
        with contextlib.closing(loader):
            state = _run(config, model, state, loader, mesh, checkpoints, progress)
    path = output / MODEL_FILE
    params = jax.jit(
        lambda state: model_params(config, state),
        out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )(state)
    if jax.process_index() == 0:
        save(path, served, jax.device_get(params))
    return path


def _check_start(output: pathlib.Path, checkpoints: Checkpoints, resume: bool) -> None:
    if resume and checkpoints.latest is None:
        raise _nothing_to_resume(output)
    if not resume and checkpoints.latest is not None:
        raise ValueError(
            f"{output} holds a run of {checkpoints.latest} steps: resume it, or give another "
            "output."
        )


def _nothing_to_resume(output: pathlib.Path) -> FileNotFoundError:
    return FileNotFoundError(f"{output} holds no checkpoint to resume from; leave resume out.")


def _start(
    config: TrainConfig, mesh: Mesh, resumed: Checkpoints | None
) -> tuple[SAM2, SAM2, Loader, TrainState]:
    """The model as it will be used and as it is trained, the data, and the state: that of what is
    resumed, or the first one."""
    given = config.model.checkpoint
    source = None if given is None else convert.read(given)
    served, model, loader = _prepare(config, source)
    if resumed is None:
        return served, model, loader, _first_state(config, source, served, model, mesh)
    state, data = resumed.load(_abstract_state(config, served, model, mesh))
    loader.set_state(data)
    return served, model, loader, state


def _prepare(config: TrainConfig, source: convert.Checkpoint | None) -> tuple[SAM2, SAM2, Loader]:
    """The model as it will be used, as it is trained, and the data."""
    served = _serving_config(config, source)
    trained = dataclasses.replace(
        training_config(served),
        dtype=config.model.dtype,
        kernels=served.kernels and jax.device_count() == 1,  # they cannot be split over GPUs
        trunk=dataclasses.replace(served.trunk, drop_path_rate=config.model.drop_path_rate),
        memory_attention=dataclasses.replace(served.memory_attention, dropout=config.model.dropout),
    )
    loader = make_loader(
        config.data,
        image_size=served.image_size,
        num_frames=config.num_frames,
        max_objects=config.max_objects,
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.workers,
        processes=config.processes,
    )
    return SAM2(served), SAM2(trained), loader


def _serving_config(config: TrainConfig, source: convert.Checkpoint | None) -> SAM2Config:
    given = config.model
    if source is not None:
        found = source.config
    elif given.variant is not None:
        found = VARIANTS[given.variant]
    else:
        assert given.architecture is not None
        found = given.architecture
    size = found.image_size if given.image_size is None else given.image_size
    return dataclasses.replace(found, image_size=size)


def _first_state(
    config: TrainConfig,
    source: convert.Checkpoint | None,
    served: SAM2,
    model: SAM2,
    mesh: Mesh,
) -> TrainState:
    params_key, lora_key = jax.random.split(jax.random.key(config.seed))
    if source is None:
        params = init_params(served.config, params_key)
    else:
        params = unflatten_dict(source.params(), sep="/")
    state = init_train_state(config, model, params, lora_key)
    return jax.device_put(state, state_shardings(mesh, state))


def _abstract_state(config: TrainConfig, served: SAM2, model: SAM2, mesh: Mesh) -> Any:
    """Shapes and shardings of the state, without any of its values."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(
        lambda: init_train_state(config, model, init_params(served.config, key), key)
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_shardings(mesh, shapes),
    )


def _run(
    config: TrainConfig,
    model: SAM2,
    state: TrainState,
    loader: Loader,
    mesh: Mesh,
    checkpoints: Checkpoints,
    progress: bool,
) -> TrainState:
    """Steps to the end. Metrics are read when the next step has begun, so as not to wait."""
    first = int(state.step)
    placed = batch_sharding(mesh)
    # Where it is written, and when it ends, compiles nothing anew.
    recipe, last = dataclasses.replace(config, output="", stop_after=None), config.last_step
    loud = progress and jax.process_index() == 0
    with (
        _writer(config) as write,
        tqdm(total=last, initial=first, unit="step", disable=not loud) as bar,
    ):
        for step in range(first + 1, last + 1):
            batch = _place(next(loader), placed)
            state, metrics = train_step(recipe, model, state, batch)
            logged = step % config.log_every == 0 or step == last
            saved = step % config.checkpoint_every == 0 or step == last
            if logged or saved:
                values = {name: float(value) for name, value in metrics.items()}
                _check_finite(step, values)
                if logged:
                    write(step, values)
                    bar.set_postfix({k: f"{values[k]:.4g}" for k in ("loss", "iou")}, refresh=False)
            bar.update()
            if saved:
                checkpoints.save(step, state, loader.get_state())
    return state


def _check_finite(step: int, metrics: dict[str, float]) -> None:
    # The loss is of the parameters before the step; a gradient of NaNs spoils those after it.
    for name in ("loss", "gradient_norm"):
        if not np.isfinite(metrics[name]):
            raise FloatingPointError(
                f"the {name} of step {step} is {metrics[name]}; take a lower learning rate."
            )


def _place(batch: Clip, placed: jax.sharding.NamedSharding) -> Clip:
    """A process's part of the batch, on its devices."""
    return Clip(*(jax.make_array_from_process_local_data(placed, part) for part in batch))


@contextlib.contextmanager
def _writer(config: TrainConfig) -> Iterator[Any]:
    """A function that writes metrics: to the log, and to TensorBoard where asked for."""
    board: Any = None
    if config.tensorboard and jax.process_index() == 0:
        from tensorboardX import SummaryWriter

        board = SummaryWriter(str(pathlib.Path(config.output) / "tensorboard"))

    def write(step: int, values: dict[str, float]) -> None:
        if jax.process_index() == 0:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            _log.info("step %d  %s", step, shown)
        if board is not None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

    try:
        yield write
    finally:
        if board is not None:
            board.close()
