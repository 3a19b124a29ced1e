"""The official package's side: the same weights, on the same kind of device as ours.

Importing this fails where PyTorch or the official package is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sam2.sam2_video_predictor import SAM2VideoPredictorVOS

from benchmarks.settings import SEED
from sam2jax.config import SAM2Config
from tests import oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32 is float32 on both sides.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def build(config: SAM2Config, compiled: str | None) -> Any:
    """The official video predictor; `compiled`: a mode of `torch.compile`, for what it compiles
    with `vos_optimized=True` and the encoder."""
    model = oracle.build(config, SEED).to(DEVICE)
    if compiled:
        model.__class__ = SAM2VideoPredictorVOS
        with compiling(compiled):
            model._compile_all_components()
            options = {"fullgraph": True, "dynamic": False}
            model.image_encoder.forward = torch.compile(model.image_encoder.forward, **options)
        model.track_step = marked(model.track_step)
    return model


@contextlib.contextmanager
def compiling(mode: str) -> Iterator[None]:
    """Has what asks for another mode compile in this one."""
    as_asked = torch.compile
    torch.compile = lambda function, **options: as_asked(function, **options | {"mode": mode})
    try:
        yield
    finally:
        torch.compile = as_asked


def marked(step: Callable[..., Any]) -> Callable[..., Any]:
    """On a GPU: what an earlier call returned from CUDA graphs is no longer needed."""
    if DEVICE != "cuda":
        return step

    def run(*args: Any, **options: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return step(*args, **options)

    return run


@contextlib.contextmanager
def running(config: SAM2Config) -> Iterator[None]:
    """Inference, under autocast where the model computes in bfloat16."""
    autocast = torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")
    with torch.inference_mode(), autocast:
        yield


def runner(config: SAM2Config, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as something to be timed: it returns when the device is done."""
    run = marked(run)

    def timed() -> Any:
        with running(config):
            answer = run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return answer

    return timed
