"""One object, tracked: the image encoder, memory attention with one memory and with all, the whole
frame step by step, and several frames as one program.

The bank is full: a conditioning frame, six recent ones, sixteen object pointers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sam2jax
from benchmarks.checks import believe, believed
from benchmarks.settings import SEED, Settings
from benchmarks.timing import Row, compare, matrix_rate, operations, with_share
from sam2jax.config import SAM2Config
from sam2jax.memory import official as official_rule
from sam2jax.nn.sam2 import SAM2
from sam2jax.testing import random_params

CLICK = (0.22, 0.65)  # as shares of the frame


def noise(config: SAM2Config, count: int) -> np.ndarray:
    """Frames as the models see them, resized and normalised: [T, S, S, 3] float32."""
    shape = (count, config.image_size, config.image_size, 3)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


class Ours:
    """Our model, with a bank of one memory and with a full one."""

    def __init__(self, config: SAM2Config, frames: np.ndarray) -> None:
        full = config.max_obj_ptrs_in_encoder
        self.model = SAM2(config)
        self.params = sam2jax.prepare_params(self.model, random_params(config, SEED))
        self.frames = jnp.asarray(frames[full:])
        self.image = self.frames[:1]
        state = sam2jax.init_state(self.model, 1, len(frames), max_cond_frames=1)
        point = np.array(CLICK) * config.image_size
        prompts = sam2jax.Prompts.make(points=[[point]])
        one, _ = sam2jax.step(self.model, self.params, state, frames[0], prompts)
        self.states = {1: one, config.num_maskmem: fill(one, full)}
        self.full = self.states[config.num_maskmem]
        self.features = self._run(encode, self.image)

    def _run(self, stage: Callable, *args: Any) -> Any:
        return jax.block_until_ready(run_stage(self.model, self.params, *args, stage=stage))

    def encode(self) -> jax.Array:
        """[1, H, W, C]"""
        return self._run(encode, self.image).features

    def attend(self, memories: int) -> jax.Array:
        """[1, H, W, C]"""
        return self._run(attend, self.features, self.states[memories])

    def frame(self) -> jax.Array:
        """Mask logits [1, S/4, S/4] of the next frame."""
        answer = sam2jax.step(self.model, self.params, self.full, self.frames[0])
        return jax.block_until_ready(answer)[1].masks

    def clip(self) -> Any:
        answer = sam2jax.track(self.model, self.params, self.frames, None, self.full)
        return jax.block_until_ready(answer)[1].masks

    def work(self, memories: int) -> dict[str, float]:
        """Operations of what is timed."""
        config = self.model.config
        count = functools.partial(operations, run_stage, self.model, self.params)
        encoder = count(self.image, stage=encode)
        attention = attention_work(config, memories)
        masks = jnp.zeros((1, config.image_size, config.image_size))
        rest = count(self.features, stage=decode) + count(self.features, masks, stage=remember)
        return {"encoder": encoder, "attention": attention, "frame": encoder + attention + rest}


def attention_work(config: SAM2Config, memories: int) -> float:
    """Of memory attention, as it is done here: values are attended to before they are projected.
    XLA counts the body of a loop once, and would be wrong."""
    sizes, queries, width = config.memory_attention, config.feature_size**2, config.hidden_dim
    pointers = config.pointer_tokens * (config.max_obj_ptrs_in_encoder if memories > 1 else 1)
    total = 0.0
    for keys, depth in ((queries, width), (queries * memories + pointers, config.mem_dim)):
        projections = 2 * queries * width * width + keys * depth * width + queries * depth * width
        total += projections + queries * keys * (width + depth)
    total += 2 * queries * width * sizes.mlp_dim
    return 2 * total * sizes.num_layers


def fill(state: sam2jax.TrackState, full: int) -> sam2jax.TrackState:
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
def run_stage(model: SAM2, params: Any, *args: Any, stage: Callable) -> Any:
    return model.apply({"params": params}, *args, method=stage)


def encode(model, images):
    return model.encode_image(images)


def attend(model, features, state):
    read = jax.vmap(official_rule.read, in_axes=(None, 0, None, None, None))(
        model.config, state.bank, state.frame_index, jnp.int32(1), state.num_frames
    )
    return model.condition_on_memory(features.features, read)


def decode(model, features):
    high_res = (features.high_res_s0, features.high_res_s1)
    points, labels = jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), jnp.int32)
    return model.decode_masks(features.features, high_res, points, labels, jnp.zeros(1, jnp.int32))


def remember(model, features, masks):
    return model.encode_memory(features.features, masks, jnp.ones(1))


class Official:
    """The official model in the same situations."""

    def __init__(self, config: SAM2Config, frames: np.ndarray, compiled: str | None) -> None:
        from benchmarks import official
        from tests import oracle

        self.config, self.full = config, config.max_obj_ptrs_in_encoder
        self.model = official.build(config, compiled)
        self.runner = functools.partial(official.runner, config)
        with official.running(config):
            self.state = oracle.init_state(self.model, frames)
            self.state["images"] = self.state["images"].to(official.DEVICE)
            point = np.array([CLICK], np.float32) * config.image_size
            self.model.add_new_points_or_box(self.state, 0, 1, points=point, labels=[1])
            self.model.propagate_in_video_preflight(self.state)
            first = self.state["output_dict_per_obj"][0]["cond_frame_outputs"][0]
            self.image = self.state["images"][self.full : self.full + 1]
            backbone = self.model.forward_image(self.image)
            _, self.features, self.positions, self.sizes = self.model._prepare_backbone_features(
                backbone
            )
        before = dict.fromkeys(range(1, self.full), first)
        one = {"cond_frame_outputs": {0: first}, "non_cond_frame_outputs": {}}
        self.held = {1: one, config.num_maskmem: one | {"non_cond_frame_outputs": before}}
        self.state["output_dict_per_obj"][0] = self.held[config.num_maskmem]

    def encode(self) -> Callable[[], Any]:
        return self.runner(lambda: self.model.forward_image(self.image)["backbone_fpn"][-1])

    def attend(self, memories: int) -> Callable[[], Any]:
        return self.runner(
            lambda: self.model._prepare_memory_conditioned_features(
                frame_idx=1 if memories == 1 else self.full,
                is_init_cond_frame=False,
                current_vision_feats=self.features[-1:],
                current_vision_pos_embeds=self.positions[-1:],
                feat_sizes=self.sizes[-1:],
                output_dict=self.held[memories],
                num_frames=self.state["num_frames"],
            )
        )

    def frame(self) -> Callable[[], Any]:
        """Tracks the next frame, with the bank full as ever."""

        def run() -> Any:
            self.state["cached_features"] = {}
            out, _ = self.model._run_single_frame_inference(
                inference_state=self.state,
                output_dict=self.held[self.config.num_maskmem],
                frame_idx=self.full,
                batch_size=1,
                is_init_cond_frame=False,
                point_inputs=None,
                mask_inputs=None,
                reverse=False,
                run_mem_encoder=True,
            )
            return out["pred_masks"][0]

        return self.runner(run)

    def clip(self, count: int) -> Callable[[], Any]:
        run = self.frame()
        return lambda: [run() for _ in range(count)]


def rows(settings: Settings) -> Iterator[Row]:
    rate = matrix_rate(settings.dtype)
    for variant in settings.variants:
        yield from of_variant(settings, variant, rate)


def of_variant(settings: Settings, variant: str, rate: float) -> Iterator[Row]:
    config = settings.config(variant)
    frames, runs = noise(config, config.max_obj_ptrs_in_encoder + settings.frames), settings.runs
    ours, theirs, exact = Ours(config, frames), None, None
    if settings.official:
        theirs = Official(config, frames, settings.compiled)
        if config.dtype != "float32":
            exact = Official(dataclasses.replace(config, dtype="float32"), frames, compiled=None)

    def row(name: str, stage: str, *args: int) -> Row:
        mine = functools.partial(getattr(ours, stage), *args)
        official = getattr(theirs, stage)(*args) if theirs else None

        def check() -> None:
            reference = getattr(exact, stage)(*args)() if exact else None
            believe(name, mine(), official(), reference, channels_last=stage != "frame")

        found = compare(name, official, mine, runs)
        return believed(found, check) if official else found

    most = config.num_maskmem
    work = ours.work(most)
    yield with_share(row(f"{variant}: image encoder", "encode"), work["encoder"], rate)
    for memories in (1, most):
        name = f"{variant}: attention to {memories}"
        yield with_share(row(name, "attend", memories), attention_work(config, memories), rate)
    yield with_share(row(f"{variant}: frame", "frame"), work["frame"], rate)
    count = settings.frames
    clip = compare("", theirs and theirs.clip(count), ours.clip, max(runs // 2, 1))
    name = f"{variant}: frame of {count} in one program"
    yield with_share(clip.per(count, name), work["frame"], rate)
