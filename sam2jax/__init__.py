"""SAM 2 and SAM 2.1 in JAX: promptable segmentation in images and videos, as pure functions."""

from sam2jax.config import VARIANTS, HieraConfig, SAM2Config
from sam2jax.loading import load, save
from sam2jax.nn.sam2 import SAM2, init_params, prepare_params
from sam2jax.ops.resize import resize_masks
from sam2jax.predictors.automatic import SAM2AutomaticMaskGenerator
from sam2jax.predictors.build import (
    build_sam2,
    build_sam2_hf,
    build_sam2_video_predictor,
    build_sam2_video_predictor_hf,
)
from sam2jax.predictors.camera import SAM2CameraPredictor
from sam2jax.predictors.image import SAM2ImagePredictor
from sam2jax.predictors.video import SAM2VideoPredictor
from sam2jax.segmentation.generate import GeneratedMasks, generate_masks
from sam2jax.segmentation.image import decode_masks, encode_image, preprocess_images
from sam2jax.tracking.scan import track
from sam2jax.tracking.state import TrackState, init_state
from sam2jax.tracking.step import condition, step
from sam2jax.types import ClipPrompts, FrameOutput, ImageFeatures, MaskPrediction, Prompts
from sam2jax.version import __version__

__all__ = [
    "SAM2",
    "VARIANTS",
    "ClipPrompts",
    "FrameOutput",
    "HieraConfig",
    "GeneratedMasks",
    "ImageFeatures",
    "MaskPrediction",
    "Prompts",
    "SAM2Config",
    "SAM2AutomaticMaskGenerator",
    "SAM2CameraPredictor",
    "SAM2ImagePredictor",
    "SAM2VideoPredictor",
    "TrackState",
    "build_sam2",
    "build_sam2_hf",
    "build_sam2_video_predictor",
    "build_sam2_video_predictor_hf",
    "condition",
    "decode_masks",
    "encode_image",
    "generate_masks",
    "init_params",
    "init_state",
    "__version__",
    "load",
    "save",
    "resize_masks",
    "prepare_params",
    "preprocess_images",
    "step",
    "track",
]
