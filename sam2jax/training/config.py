"""What a training run is: frozen dataclasses, read from a TOML file."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import tomllib
from collections.abc import Mapping
from typing import Any, Literal

from sam2jax.config import VARIANTS, SAM2Config
from sam2jax.training.data.config import DataConfig, build
from sam2jax.training.lora import LoraConfig
from sam2jax.training.losses import LossConfig
from sam2jax.training.optimizer import OptimizerConfig
from sam2jax.training.prompts import PromptConfig

SHIPPED = pathlib.Path(__file__).parent / "configs"
_PATHS = ("output", "images", "masks", "file_list", "checkpoint")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is trained: a checkpoint, or a model from scratch."""

    checkpoint: str | None = None  # anything that `load` takes
    variant: str | None = None  # from scratch: a name in `VARIANTS`
    architecture: SAM2Config | None = None  # from scratch: fields of `SAM2Config` as a table
    image_size: int | None = None  # None: the model's own
    dtype: Literal["float32", "bfloat16"] = "float32"  # to compute in; parameters are float32
    drop_path_rate: float = 0.0
    dropout: float = 0.0  # in memory attention

    def __post_init__(self) -> None:
        given = [self.checkpoint, self.variant, self.architecture]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give one of checkpoint, variant and architecture.")
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}.")
        for name in ("drop_path_rate", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run. Defaults are the official fine-tuning recipe's where it has one.

    The batch is that of all devices together.
    """

    output: str  # folder of the run: checkpoints, and the trained model at the end
    steps: int  # over which the learning rate falls
    model: ModelConfig
    data: DataConfig = DataConfig()
    batch_size: int = 8
    num_frames: int = 8
    max_objects: int = 3
    seed: int = 0
    prompts: PromptConfig = PromptConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None  # trains low-rank updates alone
    freeze: tuple[str, ...] = ()  # regular expressions over names of parameters that stay
    remat: bool = True  # computes a frame again for its gradient, rather than keep it
    shards: int = 1  # devices over which a copy of the parameters is split
    workers: int = 2  # threads that prepare data
    processes: int = 0  # that prepare data beside this one, each with as many threads
    log_every: int = 10
    checkpoint_every: int = 500
    stop_after: int | None = None  # steps after which the run ends, before its rate has fallen
    keep_checkpoints: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in (
            *("steps", "batch_size", "num_frames", "max_objects", "shards"),
            *("log_every", "checkpoint_every", "keep_checkpoints"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.stop_after is not None and not 1 <= self.stop_after <= self.steps:
            raise ValueError(
                f"stop_after must be between 1 and steps, {self.steps}, got {self.stop_after}."
            )
        if min(self.workers, self.processes, self.seed) < 0:
            raise ValueError("workers, processes and seed must not be negative.")
        if self.lora is not None and self.freeze:
            raise ValueError("lora freezes all parameters by itself: leave freeze out.")
        for rule in self.freeze:
            try:
                re.compile(rule)
            except re.error as error:
                raise ValueError(f"freeze: {rule!r} is no regular expression: {error}.") from error

    @property
    def last_step(self) -> int:
        """The number of the run's last step."""
        return self.steps if self.stop_after is None else self.stop_after

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Reads plain nested dicts and lists.

        Raises:
          ValueError: names the entry and what is wrong with it.
        """
        return build(cls, values, "config")


def read_config(source: str | pathlib.Path) -> TrainConfig:
    """Reads a TOML file, or one of those that ship, by its name.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no TOML, or an entry is wrong; names it.
    """
    try:
        return TrainConfig.from_dict(_from_home(tomllib.loads(read_text(source))))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{source} is no TOML file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _from_home(value: Any, name: str = "") -> Any:
    """With the user's folder for `~` in paths, as a shell would have it."""
    if isinstance(value, dict):
        return {key: _from_home(held, key) for key, held in value.items()}
    if isinstance(value, list):
        return [_from_home(held) for held in value]
    is_path = name in _PATHS and isinstance(value, str)
    return os.path.expanduser(value) if is_path else value


def read_text(source: str | pathlib.Path) -> str:
    """The text of a configuration."""
    for path in (pathlib.Path(source), SHIPPED / f"{source}.toml"):
        if path.is_file():
            return path.read_text()
    shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.toml")))
    raise FileNotFoundError(f"no configuration {source}: neither a file, nor one of {shipped}.")
