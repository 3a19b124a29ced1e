"""Static configuration: frozen, hashable, and the only place where sizes are written down.

Every width, depth, head count and memory size of the model comes from a `SAM2Config`, so a
smaller model is only another value of it. `VARIANTS` holds the official ones, and the one whose
weights ship with the package.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class HieraConfig:
    """The image encoder's trunk (Hiera, arXiv 2306.00989; official `hieradet.py`)."""

    embed_dim: int = 96
    num_heads: int = 1
    stages: tuple[int, int, int, int] = (1, 2, 7, 2)  # blocks per stage
    global_att_blocks: tuple[int, ...] = (5, 7, 9)
    window_spec: tuple[int, int, int, int] = (8, 4, 14, 7)  # window width per stage
    window_pos_embed_bkg_spatial_size: tuple[int, int] = (7, 7)
    mlp_ratio: int = 4
    drop_path_rate: float = 0.0  # in training: of the last block; earlier ones have less

    @property
    def channel_list(self) -> tuple[int, ...]:
        """Channels of each stage, finest first."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.stages)))


@dataclasses.dataclass(frozen=True)
class MemoryAttentionConfig:
    """The transformer that conditions a frame on the memory bank."""

    num_layers: int = 4
    num_heads: int = 1
    mlp_dim: int = 2048
    rope_theta: float = 10000.0
    dropout: float = 0.0  # in training: of what each sublayer adds


@dataclasses.dataclass(frozen=True)
class MaskDecoderConfig:
    """SAM's two-way transformer and its heads."""

    num_layers: int = 2
    num_heads: int = 8
    mlp_dim: int = 2048
    attention_downsample_rate: int = 2
    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256


@dataclasses.dataclass(frozen=True)
class SAM2Config:
    """A SAM 2 model: its architecture, the size it runs at, and the official inference options.

    Option names are the official ones (`sam2_base.py`, `sam2_video_predictor.py`); their defaults
    are those that the official builders set with `apply_postprocessing=True`.
    """

    name: str = "sam2.1_hiera_tiny"
    trunk: HieraConfig = HieraConfig()
    hidden_dim: int = 256
    mem_dim: int = 64
    memory_attention: MemoryAttentionConfig = MemoryAttentionConfig()
    mask_decoder: MaskDecoderConfig = MaskDecoderConfig()
    mask_in_chans: int = 16  # hidden channels of the mask prompt's encoder
    num_fuser_layers: int = 2  # ConvNeXt blocks of the memory encoder
    num_maskmem: int = 7  # temporal encodings: one for conditioning frames, the rest recent ones
    max_obj_ptrs_in_encoder: int = 16
    # What SAM 2.1 added to SAM 2.0.
    no_obj_embed_spatial: bool = True
    add_tpos_enc_to_obj_ptrs: bool = True
    # A checkpoint without the memory's parts, which can segment images but not track.
    images_only: bool = False

    image_size: int = 1024
    dtype: DType = "float32"
    # Objects that are computed as one batch. One fills a CPU; take more on an accelerator, and all
    # of them where objects are sharded over devices.
    objects_at_once: int = 1
    # In bfloat16 on large NVIDIA GPUs attention to many keys, and within windows, is one kernel.
    kernels: bool = True

    dynamic_multimask_via_stability: bool = True
    dynamic_multimask_stability_delta: float = 0.05
    dynamic_multimask_stability_thresh: float = 0.98
    binarize_mask_from_pts_for_mem_enc: bool = True
    fill_hole_area: int = 8  # largest hole, in pixels of the S/4 mask, that is filled; 0: none
    max_cond_frames_in_attn: int = -1  # -1: all that the bank holds
    memory_temporal_stride_for_eval: int = 1
    # Not official: squares of so many by so many cells of a spatial memory are attended to as one,
    # with the mean of their keys and values (EfficientTAM, arXiv 2411.18933). 1: each cell.
    memory_pooling: int = 1
    only_obj_ptrs_in_the_past_for_eval: bool = True  # training also reads those ahead
    multimask_min_pt_num: int = 0
    multimask_max_pt_num: int = 1

    def __post_init__(self) -> None:
        size = self.image_size
        if not isinstance(size, int) or not 32 <= size <= _MOST_PIXELS or size % 32:
            raise ValueError(
                f"image_size must be a multiple of 32 from 32 to {_MOST_PIXELS}, got {size!r}."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}.")
        if self.max_cond_frames_in_attn != -1 and self.max_cond_frames_in_attn < 2:
            raise ValueError(
                "max_cond_frames_in_attn must be -1 (all) or at least 2, got "
                f"{self.max_cond_frames_in_attn}."
            )
        for name in ("num_maskmem", "max_obj_ptrs_in_encoder"):
            if getattr(self, name) < 2:  # of a conditioning frame and of a recent one
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}.")
        if self.memory_temporal_stride_for_eval < 1:
            raise ValueError(
                "memory_temporal_stride_for_eval must be at least 1, got "
                f"{self.memory_temporal_stride_for_eval}."
            )
        if self.memory_pooling < 1 or self.feature_size % self.memory_pooling:
            raise ValueError(
                f"memory_pooling must divide the {self.feature_size} cells of a memory's side, got "
                f"{self.memory_pooling}."
            )
        if self.objects_at_once < 1:
            raise ValueError(f"objects_at_once must be at least 1, got {self.objects_at_once}.")
        if self.fill_hole_area < 0:
            raise ValueError(f"fill_hole_area must not be negative, got {self.fill_hole_area}.")

    @property
    def feature_size(self) -> int:
        """Width and height of the stride-16 feature map."""
        return self.image_size // 16

    @property
    def mask_size(self) -> int:
        """Width and height of the mask logits (stride 4)."""
        return self.image_size // 4

    @property
    def num_recent(self) -> int:
        """Recent (non-conditioning) frames whose spatial memory is attended to."""
        return self.num_maskmem - 1

    @property
    def num_recent_pointers(self) -> int:
        """Recent (non-conditioning) frames whose object pointer is attended to."""
        return self.max_obj_ptrs_in_encoder - 1

    @property
    def pointer_tokens(self) -> int:
        """Tokens of width `mem_dim` that one object pointer is read as."""
        return self.hidden_dim // self.mem_dim

    def to_dict(self) -> dict[str, Any]:
        """Returns plain nested dicts and lists, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAM2Config:
        """Inverse of `to_dict`.

        Raises:
          ValueError: a name is unknown, or a value of another kind, or larger than in any model:
            who wrote the file may mean harm.
        """
        return _build(cls, values)


_MOST_PIXELS = 8192  # image_size
_MOST_LAYERS = 48  # of any kind, in a row or side by side
_MOST_WIDE = 4096
_MOST = 2**31 - 1  # of all other whole numbers
_LAYERS = (
    *("stages", "num_layers", "num_fuser_layers", "iou_head_depth"),
    *("num_multimask_outputs", "num_maskmem", "max_obj_ptrs_in_encoder", "mlp_ratio"),
)
_WIDTHS = (
    *("embed_dim", "hidden_dim", "mem_dim", "mlp_dim", "iou_head_hidden_dim", "mask_in_chans"),
    *("num_heads", "window_spec", "window_pos_embed_bkg_spatial_size"),
)


def _build(kind: Any, given: Any) -> Any:
    """A dataclass from a mapping; defaults tell what kind of value each field has."""
    if not isinstance(given, dict):
        raise ValueError(f"{kind.__name__} must be a mapping, got {type(given).__name__}.")
    unknown = sorted(set(given) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(map(repr, unknown[:3]))}.")
    return kind(**{name: checked_value(name, getattr(kind, name), v) for name, v in given.items()})


def checked_value(name: str, default: Any, value: Any) -> Any:
    """A field's value, checked against its default."""
    if dataclasses.is_dataclass(default):
        return _build(type(default), value)
    if isinstance(default, tuple):
        free = name == "global_att_blocks"  # all others have a fixed length
        if not isinstance(value, list | tuple) or not (free or len(value) == len(default)):
            count = "a list of" if free else len(default)
            raise ValueError(f"{name} must be {count} whole numbers.")
        if len(value) > 4 * _MOST_LAYERS:
            raise ValueError(f"{name} is longer than that of any model.")
        return tuple(checked_value(name, 0, item) for item in value)
    if type(default) in (int, float, bool) and getattr(value, "shape", None) == ():
        value = value.item()  # of NumPy or JAX
    if isinstance(default, float) and type(value) is int:
        value = float(value) if abs(value) <= _MOST else math.nan
    if type(default) is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not type(default):
        raise ValueError(f"{name} must be {type(default).__name__}, got {str(value)[:50]!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite.")
    most = _MOST_LAYERS if name in _LAYERS else _MOST_WIDE if name in _WIDTHS else _MOST
    if type(value) is int and not -1 <= value <= most:
        raise ValueError(f"{name} must be -1 to {most}, got {str(value)[:50]}.")
    return value


# Inference options of a model without the official post-processing (`apply_postprocessing=False`).
NO_POSTPROCESSING: dict[str, Any] = {
    "dynamic_multimask_via_stability": False,
    "binarize_mask_from_pts_for_mem_enc": False,
    "fill_hole_area": 0,
}

_TRUNKS = {
    "tiny": HieraConfig(),
    "small": HieraConfig(stages=(1, 2, 11, 2), global_att_blocks=(7, 10, 13)),
    "base_plus": HieraConfig(
        embed_dim=112,
        num_heads=2,
        stages=(2, 3, 16, 3),
        global_att_blocks=(12, 16, 20),
        window_pos_embed_bkg_spatial_size=(14, 14),
    ),
    "large": HieraConfig(
        embed_dim=144,
        num_heads=2,
        stages=(2, 6, 36, 4),
        global_att_blocks=(23, 33, 43),
        window_spec=(8, 4, 16, 8),
    ),
}

_OFFICIAL = {
    f"{version}_hiera_{size}": SAM2Config(
        name=f"{version}_hiera_{size}",
        trunk=trunk,
        no_obj_embed_spatial=version == "sam2.1",
        add_tpos_enc_to_obj_ptrs=version == "sam2.1",
    )
    for version in ("sam2", "sam2.1")
    for size, trunk in _TRUNKS.items()
}

# Trained by benchmarks/nano on synthetic clips.
NANO = SAM2Config(
    name="sam2.1_hiera_nano",
    image_size=256,
    hidden_dim=96,
    mem_dim=32,
    num_fuser_layers=1,
    trunk=HieraConfig(
        embed_dim=24,
        stages=(1, 2, 4, 1),
        global_att_blocks=(4, 6),
        window_spec=(8, 8, 8, 8),
        window_pos_embed_bkg_spatial_size=(4, 4),
    ),
    memory_attention=MemoryAttentionConfig(num_layers=2, mlp_dim=384),
    mask_decoder=MaskDecoderConfig(num_heads=4, mlp_dim=384, iou_head_hidden_dim=96),
)

VARIANTS: dict[str, SAM2Config] = {**_OFFICIAL, NANO.name: NANO}
