"""What to train on: frozen dataclasses, read from plain dicts as a TOML file gives them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias, TypeVar

from sam2jax.config import SAM2Config

KINDS = ("plain", "occluded", "distractor")  # of procedural clips
HARD = "hard"  # occluded, with a distractor: not drawn unless asked for

_T = TypeVar("_T")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def _check_probability(config: Any, name: str) -> None:
    if not 0 <= getattr(config, name) <= 1:
        raise ValueError(f"{name} must be a probability, got {getattr(config, name)}.")


def _check_share(source: Any) -> None:
    _at_least("multiplier", source.multiplier, 1)
    if source.weight is not None and source.weight <= 0:
        raise ValueError(f"weight must be above 0, got {source.weight}.")


def _check_time(source: Any) -> None:
    _at_least("stride", source.stride, 1)
    _check_probability(source, "reverse_time_prob")


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """What a procedural clip shows; the clip is a function of this, a seed and its size."""

    num_objects: int = 3  # annotated ones
    kinds: tuple[str, ...] = KINDS  # seeds take them in turn
    min_area: float = 0.01  # of an object in the first frame, as a share of the frame
    max_area: float = 0.2
    hidden_frames: int = 8  # how long an `occluded` target is out of sight, at least

    def __post_init__(self) -> None:
        if not 1 <= self.num_objects <= 100:
            raise ValueError(f"num_objects must be 1 to 100, got {self.num_objects}.")
        known = (*KINDS, HARD)
        if not self.kinds or not set(self.kinds) <= set(known):
            raise ValueError(f"kinds must be some of {', '.join(known)}, got {list(self.kinds)}.")
        if not 0 < self.min_area < self.max_area <= 0.5:
            raise ValueError(
                "areas must be 0 < min_area < max_area <= 0.5 of the frame, got "
                f"{self.min_area} and {self.max_area}."
            )
        _at_least("hidden_frames", self.hidden_frames, 1)

    def hidden_in(self, num_frames: int) -> int:
        """How many frames the target of an `occluded` clip is hidden: a quarter of a short clip."""
        return min(self.hidden_frames, num_frames // 4)


@dataclasses.dataclass(frozen=True)
class ProceduralSource:
    """Clips that are drawn: the seeds from `first_seed` on. Those below are for held-out sets."""

    kind: ClassVar[str] = "procedural"
    num_clips: int = 10_000
    first_seed: int = 1_000_000
    scene: SceneConfig = SceneConfig()
    multiplier: int = 1
    weight: float | None = None
    augment: bool = False

    def __post_init__(self) -> None:
        _at_least("num_clips", self.num_clips, 1)
        _at_least("first_seed", self.first_seed, 0)
        _check_share(self)


# What models trained on procedural clips are judged by: 32 frames at 256 px of the seeds 0 to 99.
HELD_OUT = ProceduralSource(num_clips=100, first_seed=0)


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Folders as those of DAVIS, MOSE and SA-V val (official `PNGRawDataset`).

    `images` holds a folder of JPEGs for each video. `masks` holds a folder of the same name, with
    a palette PNG for each annotated frame, or a folder of PNGs for each object.
    """

    kind: ClassVar[str] = "folder"
    images: str
    masks: str
    file_list: str | None = None  # text file with the names of the videos to take, one a line
    stride: int = 1  # takes every n-th annotated frame
    reverse_time_prob: float = 0.0
    multiplier: int = 1  # how often a video is seen in an epoch
    weight: float | None = None  # share of this source; None: its number of clips
    augment: bool = True

    def __post_init__(self) -> None:
        _check_share(self)
        _check_time(self)


@dataclasses.dataclass(frozen=True)
class SAVSource:
    """SA-V's training set: `{video}_manual.json` beside frames or films.

    `images` holds a folder of JPEGs for each video, named by their number in the film, or the
    film itself, `{video}.mp4` (official `JSONRawDataset`).
    """

    kind: ClassVar[str] = "sav"
    images: str
    masks: str
    file_list: str | None = None
    frames_per_annotation: int = 4  # 24 frames a second, annotated at 6
    stride: int = 1
    reverse_time_prob: float = 0.0
    multiplier: int = 1
    weight: float | None = None
    augment: bool = True

    def __post_init__(self) -> None:
        _at_least("frames_per_annotation", self.frames_per_annotation, 1)
        _check_share(self)
        _check_time(self)


@dataclasses.dataclass(frozen=True)
class ImagesSource:
    """Images: SA-1B's (a folder with `{image}.json` for each) or COCO's (one instances file).

    An image is a clip of one frame; a longer clip repeats it.
    """

    kind: ClassVar[str] = "images"
    images: str
    masks: str  # a folder, or a COCO instances JSON
    file_list: str | None = None
    max_area: float = 1.0  # leaves out masks that cover more of the image
    multiplier: int = 1
    weight: float | None = None
    augment: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.max_area <= 1:
            raise ValueError(f"max_area must be above 0 and at most 1, got {self.max_area}.")
        _check_share(self)


Source: TypeAlias = FolderSource | SAVSource | ImagesSource | ProceduralSource
_SOURCES = {kind.kind: kind for kind in typing.get_args(Source)}


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Augmentation; the defaults are the official recipe's (MOSE fine-tuning).

    Jitter of 0.1 multiplies by 0.9 to 1.1. What is not named `frame_` is the same for all frames.
    """

    flip_prob: float = 0.5
    degrees: float = 25.0  # rotation, either way
    shear: float = 20.0  # degrees along x, either way
    brightness: float = 0.1
    contrast: float = 0.03
    saturation: float = 0.03
    grayscale_prob: float = 0.05
    frame_brightness: float = 0.1
    frame_contrast: float = 0.05
    frame_saturation: float = 0.05

    def __post_init__(self) -> None:
        for name in ("flip_prob", "grayscale_prob"):
            _check_probability(self, name)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"{field.name} must not be negative.")
        if self.degrees > 180 or self.shear >= 90:
            raise ValueError(
                f"degrees must be at most 180 and shear below 90, got {self.degrees} and "
                f"{self.shear}."
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, how they are augmented, and how many damaged examples are put up with.

    Either every source has a `weight`, which says how large a share of the clips it gives, or
    none, and then an epoch shows each of its clips `multiplier` times.
    """

    sources: tuple[Source, ...] = (ProceduralSource(),)
    augment: AugmentConfig = AugmentConfig()
    max_damaged: int = 10  # damaged examples that a process skips before it stops

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty: give at least one.")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("give every source a weight, or none.")
        _at_least("max_damaged", self.max_damaged, 0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """Reads plain nested dicts and lists; each source is named by its `kind`.

        Raises:
          ValueError: names the entry and what is wrong with it.
        """
        return build(cls, values, "data")


# From plain values --------------------------------------------------------------------------------


def build(kind: type[_T], values: Any, where: str) -> _T:
    """A dataclass from a mapping; `where` is what the mapping is called in messages."""
    _table(values, where)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(
            f"{where} has no key {', '.join(map(repr, unknown))}; it has {', '.join(fields)}."
        )
    needed = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in values
    ]
    if needed:
        raise ValueError(f"{where} needs {', '.join(map(repr, needed))}.")
    hints = typing.get_type_hints(kind)
    given = {name: _convert(hints[name], v, f"{where}.{name}") for name, v in values.items()}
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint == tuple[Source, ...]:
        return tuple(
            _build_source(entry, f"{where}[{i}]") for i, entry in enumerate(_list(value, where))
        )
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, v, f"{where}[{i}]") for i, v in enumerate(_list(value, where)))
    if hint is SAM2Config:
        return SAM2Config.from_dict(_table(value, where))
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            choices = ", ".join(map(repr, typing.get_args(hint)))
            raise ValueError(f"{where} must be one of {choices}, got {value!r}.")
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if isinstance(hint, types.UnionType):  # of a type and None
        return None if value is None else _convert(typing.get_args(hint)[0], value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} must be {hint.__name__}, got {value!r}.")
    return value


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a table, got {value!r}.")
    return dict(value)


def _list(value: Any, where: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} must be a list, got {value!r}.")
    return value


def _build_source(values: Any, where: str) -> Any:
    kind = _table(values, where).get("kind")
    if kind not in _SOURCES:
        raise ValueError(f"{where}.kind must be one of {', '.join(_SOURCES)}, got {kind!r}.")
    return build(_SOURCES[kind], {k: v for k, v in values.items() if k != "kind"}, where)
