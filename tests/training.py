"""A training run small enough to compile in half a minute, for tests."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

import sam2jax
from sam2jax.config import HieraConfig, MaskDecoderConfig, MemoryAttentionConfig, SAM2Config
from sam2jax.testing import random_params
from sam2jax.training.config import TrainConfig
from sam2jax.training.data.clip import Clip
from sam2jax.training.data.config import SceneConfig
from sam2jax.training.data.procedural import procedural_clip
from sam2jax.training.rollout import training_config
from sam2jax.training.step import TrainState, init_train_state

SIZE = 64
CONFIG = SAM2Config(
    name="tiny_test",
    trunk=HieraConfig(
        embed_dim=8, stages=(1, 1, 2, 1), global_att_blocks=(3,), window_spec=(4, 2, 2, 2)
    ),
    hidden_dim=32,
    mem_dim=16,
    memory_attention=MemoryAttentionConfig(num_layers=1, mlp_dim=32),
    mask_decoder=MaskDecoderConfig(num_heads=4, mlp_dim=32, iou_head_hidden_dim=32),
    num_fuser_layers=1,
    image_size=SIZE,
)
MODEL = sam2jax.SAM2(training_config(CONFIG))


def run_values(folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
    """A configuration as a TOML file has it, from a checkpoint that is written for it."""
    checkpoint = folder / "start.safetensors"
    if not checkpoint.exists():
        sam2jax.save(checkpoint, CONFIG, random_params(CONFIG, seed=1))
    return {
        "output": str(folder / "run"),
        "steps": 6,
        "model": {"checkpoint": str(checkpoint)},
        "data": {"sources": [{"kind": "procedural", "num_clips": 50}]},
        "batch_size": 2,
        "num_frames": 3,
        "max_objects": 2,
        "prompts": {"corrections": 1},
        "optimizer": {"learning_rate": 1e-3, "vision_learning_rate": 1e-3, "clip_norm": 1.0},
        "workers": 0,
        "remat": False,
        "log_every": 1,
        "checkpoint_every": 2,
        **changes,
    }


def run_config(folder: pathlib.Path, **changes: Any) -> TrainConfig:
    return TrainConfig.from_dict(run_values(folder, **changes))


def first_state(config: TrainConfig, seed: int = 1) -> TrainState:
    return init_train_state(config, MODEL, random_params(CONFIG, seed), jax.random.key(seed))


def batch(count: int = 2, num_frames: int = 3, first_seed: int = 0) -> Clip:
    scene = SceneConfig(num_objects=2)
    clips = [
        procedural_clip(scene, first_seed + i, image_size=SIZE, num_frames=num_frames)
        for i in range(count)
    ]
    return Clip(*(np.stack(parts) for parts in zip(*clips, strict=True)))


def without_output(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, output="")
