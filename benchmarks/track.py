"""Speed of tracking beside the official package: same weights, same frames, in turn.

python -m benchmarks.track [--variant NAME] [--image-size N] [--dtype bfloat16] [--frames N]

One object, full memory bank: one conditioning frame, six recent ones, sixteen object pointers.
Prints seconds per stage and per frame; the ratio is official time over ours. The weights are
random, which changes nothing about the work. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import sam2jax
from benchmarks.timing import HEADER, Comparison, compare, save
from sam2jax.config import VARIANTS, SAM2Config
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.resize import resize_masks
from sam2jax.testing import random_params
from sam2jax.types import MemoryRead
from tests import oracle

CLICK = (0.22, 0.65)  # as shares of the frame


class Official:
    """The official model with a full bank, and its stages as functions without arguments."""

    def __init__(self, config: SAM2Config, frames: np.ndarray, full: int) -> None:
        self.config, self.full, self.next = config, full, full
        self.model = oracle.build(config, seed=7)
        self.autocast = (
            oracle.autocast() if config.dtype == "bfloat16" else contextlib.nullcontext()
        )
        with torch.inference_mode(), self.autocast:
            self.state = oracle.init_state(self.model, frames)
            point = np.array(CLICK) * config.image_size
            oracle.prompt(self.model, self.state, points=point[None], labels=[1])
            self.model.propagate_in_video_preflight(self.state)
            self._fill()
            self._keep_one_frame()

    def _fill(self) -> None:
        """Puts the prompted frame's memory in the place of those of the frames after it."""
        held = self.state["output_dict_per_obj"][0]
        for index in range(1, self.full):
            held["non_cond_frame_outputs"][index] = held["cond_frame_outputs"][0]

    def _keep_one_frame(self) -> None:
        """What the stages are fed."""
        model, size = self.model, self.config.feature_size
        image = self.state["images"][:1]
        backbone = model._prepare_backbone_features(model.forward_image(image))
        _, self.features, self.positions, self.sizes = backbone
        self.image = image
        self.map = self.features[-1].permute(1, 2, 0).reshape(1, -1, size, size)
        self.high_res = [
            x.permute(1, 2, 0).reshape(1, -1, *s)
            for x, s in zip(self.features[:-1], self.sizes[:-1], strict=True)
        ]
        self.masks = torch.randn(1, 1, self.config.image_size, self.config.image_size)
        self.score = torch.ones(1, 1)

    def stages(self) -> dict[str, Callable[[], Any]]:
        return {
            "image encoder": lambda: self.model.forward_image(self.image),
            "memory attention": lambda: self.model._prepare_memory_conditioned_features(
                frame_idx=self.full,
                is_init_cond_frame=False,
                current_vision_feats=self.features[-1:],
                current_vision_pos_embeds=self.positions[-1:],
                feat_sizes=self.sizes[-1:],
                output_dict=self.state["output_dict_per_obj"][0],
                num_frames=self.state["num_frames"],
            ),
            "heads": lambda: self.model._forward_sam_heads(
                self.map, high_res_features=self.high_res, multimask_output=True
            ),
            "memory encoder": lambda: self.model._encode_new_memory(
                self.features, self.sizes, self.masks, self.score, is_mask_from_pts=False
            ),
        }

    def frame(self) -> Any:
        """Tracks the next frame, with the bank full as ever."""
        self.state["cached_features"] = {}
        out, _ = self.model._run_single_frame_inference(
            inference_state=self.state,
            output_dict=self.state["output_dict_per_obj"][0],
            frame_idx=self.full,
            batch_size=1,
            is_init_cond_frame=False,
            point_inputs=None,
            mask_inputs=None,
            reverse=False,
            run_mem_encoder=True,
        )
        return out

    def run(self, stage: Callable[[], Any]) -> None:
        with torch.inference_mode(), self.autocast:
            stage()


class Ours:
    """Our model in the same situation."""

    def __init__(self, config: SAM2Config, frames: np.ndarray, full: int) -> None:
        self.model, self.params = SAM2(config), random_params(config, seed=7)
        self.frames = jnp.asarray(frames[full:])
        state = sam2jax.init_state(self.model, 1, len(frames), max_cond_frames=1)
        prompts = sam2jax.Prompts.make(points=[[np.array(CLICK) * config.image_size]])
        state, _ = sam2jax.step(self.model, self.params, state, frames[0], prompts)
        self.state = _full_state(state, full)
        self._keep_one_frame(config)

    def _keep_one_frame(self, config: SAM2Config) -> None:
        self.image = self.frames[:1]
        self.features = self._apply(_encode, self.image)
        bank, rng = self.state.bank, np.random.default_rng(0)
        slots, pointers = config.num_maskmem, config.max_obj_ptrs_in_encoder
        self.memory = MemoryRead(
            spatial=jnp.tile(bank.cond_spatial, (1, slots, 1, 1)),
            spatial_tpos=jnp.arange(slots, dtype=jnp.int32)[None],
            spatial_frame=jnp.arange(slots, dtype=jnp.int32)[None],
            num_spatial=jnp.full(1, slots, jnp.int32),
            pointers=jnp.tile(bank.cond_pointer, (1, pointers, 1)),
            pointer_position=jnp.linspace(0, 1, pointers)[None],
            pointer_frame=jnp.arange(pointers, dtype=jnp.int32)[None],
            num_pointers=jnp.full(1, pointers, jnp.int32),
        )
        size = config.image_size
        self.masks = jnp.asarray(rng.standard_normal((1, size, size)), jnp.float32)

    def _apply(self, stage: Callable, *args: Any) -> Any:
        return jax.block_until_ready(_apply(self.model, self.params, *args, stage=stage))

    def stages(self) -> dict[str, Callable[[], Any]]:
        return {
            "image encoder": lambda: self._apply(_encode, self.image),
            "memory attention": lambda: self._apply(_attend, self.features, self.memory),
            "heads": lambda: self._apply(_decode, self.features),
            "memory encoder": lambda: self._apply(_remember, self.features, self.masks),
        }

    def frame(self) -> Any:
        return jax.block_until_ready(
            sam2jax.step(self.model, self.params, self.state, self.frames[0])
        )

    def clip(self) -> Any:
        return jax.block_until_ready(
            sam2jax.track(self.model, self.params, self.frames, None, self.state)
        )


def _full_state(state: sam2jax.TrackState, full: int) -> sam2jax.TrackState:
    """Fills the bank with copies of its conditioning frame, as frames 1 to `full` - 1."""
    bank = state.bank
    recent, pointers = bank.recent_frame.shape[1], bank.pointer_frame.shape[1]
    return state.replace(
        frame_index=jnp.int32(full),
        bank=bank.replace(
            recent_frame=jnp.arange(full - recent, full, dtype=jnp.int32)[None],
            recent_spatial=jnp.tile(bank.cond_spatial, (1, recent, 1, 1)),
            pointer_frame=jnp.arange(full - pointers, full, dtype=jnp.int32)[None],
            pointer=jnp.tile(bank.cond_pointer, (1, pointers, 1)),
        ),
    )


@functools.partial(jax.jit, static_argnames=("model", "stage"))
def _apply(model: SAM2, params: Any, *args: Any, stage: Callable) -> Any:
    return model.apply({"params": params}, *args, method=stage)


def _encode(model, images):
    return model.encode_image(images)


def _attend(model, features, memory):
    return model.condition_on_memory(features.features, memory)


def _decode(model, features):
    """Decoder, choice of a mask, upsampling and pointer, as on a tracked frame."""
    config = model.config
    high_res = (features.high_res_s0, features.high_res_s1)
    points, labels = jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), jnp.int32)
    none = jnp.zeros(1, jnp.int32)
    found = model.decode_masks(features.features, high_res, points, labels, none)
    best = jnp.argmax(found.ious[:, 1:], axis=-1) + 1
    mask = jnp.take_along_axis(found.masks, best[:, None, None, None], axis=1)[:, 0]
    token = jnp.take_along_axis(found.tokens, best[:, None, None], axis=1)[:, 0]
    size = (config.image_size, config.image_size)
    return resize_masks(mask, size), model.object_pointer(token, found.object_score > 0)


def _remember(model, features, masks):
    weights = jax.nn.sigmoid(masks) * 20.0 - 10.0
    return model.encode_memory(features.features, weights, jnp.ones(1))


def rows(config: SAM2Config, frames: np.ndarray, full: int, runs: int) -> Iterator[Comparison]:
    """Times everything, slowly; yields as it goes."""
    official, ours = Official(config, frames, full), Ours(config, frames, full)
    stages = ours.stages()
    for name, stage in official.stages().items():
        yield compare(name, lambda stage=stage: official.run(stage), stages[name], runs)
    yield compare("frame, step by step", lambda: official.run(official.frame), ours.frame, runs)
    count = len(frames) - full

    def official_clip() -> None:
        for _ in range(count):
            official.run(official.frame)

    clip = compare(f"{count} frames, one program", official_clip, ours.clip, max(runs // 2, 1))
    yield clip
    yield dataclasses.replace(
        clip, name="frame of these", official=clip.official / count, ours=clip.ours / count
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="sam2.1_hiera_tiny", choices=VARIANTS)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--frames", type=int, default=4, help="timed in one program")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs per row")
    given = parser.parse_args()
    config = dataclasses.replace(
        VARIANTS[given.variant], image_size=given.image_size, dtype=given.dtype
    )
    full = config.max_obj_ptrs_in_encoder
    shape = (full + given.frames, config.image_size, config.image_size, 3)
    frames = np.random.default_rng(0).standard_normal(shape, np.float32)
    print(f"{given.variant}, {given.image_size} px, {given.dtype}\n{HEADER}", flush=True)
    measured = []
    for row in rows(config, frames, full, given.runs):
        measured.append(row)
        print(row, flush=True)
    name = f"track-{given.variant}-{given.image_size}-{given.dtype}"
    print("written to", save(name, vars(given), measured))


if __name__ == "__main__":
    main()
