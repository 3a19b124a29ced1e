"""A fine-tuned model goes back into the official package, and the optimizer is PyTorch's."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

import sam2jax
from sam2jax.ops.resize import preprocess_image
from sam2jax.training.loop import train
from sam2jax.training.optimizer import OptimizerConfig, make_optimizer
from tests import oracle
from tests.parity.pairs import CLIP, assert_close
from tests.training import SIZE, run_config

pytestmark = pytest.mark.parity


def test_a_fine_tuned_model_in_the_official_package(tmp_path: pathlib.Path, media: pathlib.Path):
    """A video folder, a step, an export, `strict=True`, and the same masks on the same frames."""
    for kind in ("images", "masks"):
        (tmp_path / kind / "bedroom").mkdir(parents=True)
    mask = np.zeros((540, 960), np.uint8)
    mask[200:480, 120:330] = 1
    for index in range(2):
        frame = Image.open(media / "bedroom" / f"{index:05d}.jpg")
        frame.save(tmp_path / "images" / "bedroom" / f"{index:05d}.jpg")
        Image.fromarray(mask).save(tmp_path / "masks" / "bedroom" / f"{index:05d}.png")
    source = {"kind": "folder", "multiplier": 4}
    folders = {kind: str(tmp_path / kind) for kind in ("images", "masks")}
    config = run_config(
        tmp_path,
        steps=1,
        num_frames=1,
        max_objects=1,
        data={"sources": [{**source, **folders}]},
        prompts={"corrections": 0},
        freeze=["^image_encoder/trunk/"],
    )
    path = train(config, progress=False)
    model, params = sam2jax.load(path)
    start = sam2jax.load(tmp_path / "start.safetensors")[1]
    moved = params["sam_mask_decoder"]["mask_tokens"] - start["sam_mask_decoder"]["mask_tokens"]
    assert np.abs(moved).max() > 1e-4
    trunk = [tree["image_encoder"]["trunk"]["pos_embed"] for tree in (params, start)]
    np.testing.assert_array_equal(*trunk)

    exported = tmp_path / "tuned.pt"
    sam2jax.save(exported, model, params)
    official = oracle.construct(model.config).eval()
    weights = torch.load(exported, weights_only=True)["model"]
    official.load_state_dict(weights, strict=True)
    frames = np.stack([np.array(Image.open(media / "bedroom" / f"{i:05d}.jpg")) for i in range(3)])
    prompt = {"frame_idx": 0, "obj_id": 1, "points": [[210, 350]], "labels": [1]}
    ours = sam2jax.SAM2VideoPredictor(model, params)
    state = ours.init_state(frames)
    ours.add_new_points_or_box(state, **prompt)
    answers = {index: masks[:, 0] for index, _, masks in ours.propagate_in_video(state)}
    ready = np.asarray(preprocess_image(jnp.asarray(frames), SIZE))
    theirs = oracle.init_state(official, ready, frames.shape[1:3])
    oracle.prompt(official, theirs, points=np.float32([[210, 350]]), labels=[1])
    for index, masks in oracle.propagate(official, theirs).items():
        assert_close(answers[index], masks, CLIP, f"frame {index}")


def test_the_optimizer_is_pytorchs():
    """AdamW with clipping, cosine rates by group, layer decay and weight decay: 20 steps."""
    config = OptimizerConfig(learning_rate=1e-2, vision_learning_rate=4e-3, clip_norm=0.5)
    shapes = {
        "memory_attention/norm/scale": (5,),
        "memory_encoder/out_proj/kernel": (4, 3),
        "image_encoder/neck/convs_0/bias": (6,),
        "image_encoder/trunk/pos_embed": (2, 2, 3),
        "image_encoder/trunk/blocks_2/mlp/layers_0/kernel": (3, 4),
        "image_encoder/trunk/patch_embed/proj/kernel": (2, 2, 3, 2),
    }
    rates = dict.fromkeys(shapes, 4e-3)
    rates.update({name: 1e-2 for name in list(shapes)[:2]})
    rates["image_encoder/trunk/blocks_2/mlp/layers_0/kernel"] *= 0.9 ** (12 + 1 - 3)
    rates["image_encoder/trunk/patch_embed/proj/kernel"] *= 0.9 ** (12 + 1)
    undecayed = ("memory_attention/norm/scale", "image_encoder/neck/convs_0/bias")
    rng, steps = np.random.default_rng(0), 20
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    groups = [
        {"params": [tensor], "lr": rates[name], "weight_decay": 0.0 if name in undecayed else 0.1}
        for name, tensor in tensors.items()
    ]
    theirs = torch.optim.AdamW(groups)
    params = {name: jnp.asarray(value) for name, value in values.items()}
    ours = make_optimizer(config, params, num_blocks=12, steps=steps)
    state = ours.init(params)
    for step in range(steps):
        gradient = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[name])
        for group, rate in zip(theirs.param_groups, rates.values(), strict=True):
            group["lr"] = rate * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * step / steps)))
        torch.nn.utils.clip_grad_norm_(tensors.values(), 0.5)
        theirs.step()
        updates, state = ours.update(
            {n: jnp.asarray(g) for n, g in gradient.items()}, state, params
        )
        params = {name: params[name] + updates[name] for name in params}
    for name, tensor in tensors.items():
        np.testing.assert_allclose(params[name], tensor.detach(), atol=2e-5, err_msg=name)
