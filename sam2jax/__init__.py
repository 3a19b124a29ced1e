"""SAM 2 and SAM 2.1 in JAX: promptable segmentation in images and videos, as pure functions."""

from sam2jax.config import VARIANTS, HieraConfig, SAM2Config
from sam2jax.loading import load, save
from sam2jax.nn.sam2 import SAM2, init_params
from sam2jax.ops.resize import resize_masks
from sam2jax.predictors.build import build_sam2_video_predictor, build_sam2_video_predictor_hf
from sam2jax.predictors.camera import SAM2CameraPredictor
from sam2jax.predictors.video import SAM2VideoPredictor
from sam2jax.tracking.scan import track
from sam2jax.tracking.state import TrackState, init_state
from sam2jax.tracking.step import condition, step
from sam2jax.types import ClipPrompts, FrameOutput, ImageFeatures, Prompts
from sam2jax.version import __version__

__all__ = [
    "SAM2",
    "VARIANTS",
    "ClipPrompts",
    "FrameOutput",
    "HieraConfig",
    "ImageFeatures",
    "Prompts",
    "SAM2Config",
    "SAM2CameraPredictor",
    "SAM2VideoPredictor",
    "TrackState",
    "build_sam2_video_predictor",
    "build_sam2_video_predictor_hf",
    "condition",
    "init_params",
    "init_state",
    "__version__",
    "load",
    "save",
    "resize_masks",
    "step",
    "track",
]
