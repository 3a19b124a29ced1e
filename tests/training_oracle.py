"""The official training code on the CPU: the same weights, and a user whose every act is given.

What it imports beside the model is not installed, and of no use here: stand-ins take its place.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch

from sam2jax.config import SAM2Config
from sam2jax.training.prompts import Plan, sample_click
from sam2jax.training.rollout import FrameItem, first_prompts, frame_items
from tests import oracle


def _stand_in(name: str, **names: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(names)
    sys.modules.setdefault(name, module)


_stand_in("tensordict", tensorclass=dataclasses.dataclass)
_stand_in("training.trainer", CORE_LOSS_KEY="core_loss")  # the rest of it trains on GPUs

import training.model.sam2 as official_training  # noqa: E402
from training.loss_fns import MultiStepMultiMasksAndIous  # noqa: E402
from training.utils.data_utils import BatchedVideoDatapoint  # noqa: E402

Click = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Script:
    """What the official code would draw."""

    conditioning: list[int]  # frames that are prompted from the start
    tracked: list[int]  # the others
    corrected: list[int]
    masks: dict[int, np.ndarray]  # {frame: [N, S, S] bool}
    points: dict[int, tuple[np.ndarray, np.ndarray]]  # {frame: ([N, P, 2], [N, P])}
    from_truth: Iterator[bool]  # of each correction, in the order of processing
    clicks: Iterator[Click]  # (target, shown) [N, S, S] bool -> [N, 2], [N]


class ScriptedTrain(official_training.SAM2Train):
    """`SAM2Train` that acts by a script, and stores memory in bfloat16, as its predictor does."""

    script: Script

    def prepare_prompt_inputs(self, backbone_out: dict, input: Any, start_frame_idx: int = 0):
        script = self.script
        # Below the probability of a correction from the truth, or above it.
        self.rng = types.SimpleNamespace(random=lambda: 0.0 if next(script.from_truth) else 1.0)
        return backbone_out | {
            "gt_masks_per_frame": {t: masks[:, None] for t, masks in enumerate(input.masks)},
            "num_frames": input.num_frames,
            "use_pt_input": bool(script.points),
            "init_cond_frames": script.conditioning,
            "frames_not_in_init_cond": script.tracked,
            "frames_to_add_correction_pt": script.corrected,
            "mask_inputs_per_frame": {
                t: torch.from_numpy(masks)[:, None] for t, masks in script.masks.items()
            },
            "point_inputs_per_frame": {
                t: {"point_coords": torch.tensor(points), "point_labels": torch.tensor(labels)}
                for t, (points, labels) in script.points.items()
            },
        }

    def _iter_correct_pt_sampling(self, *args: Any) -> Any:
        original = official_training.get_next_point
        official_training.get_next_point = self._next_point
        try:
            return super()._iter_correct_pt_sampling(*args)
        finally:
            official_training.get_next_point = original

    def _next_point(self, gt_masks: torch.Tensor, pred_masks: torch.Tensor | None, method: str):
        assert method == "uniform"
        shown = torch.zeros_like(gt_masks) if pred_masks is None else pred_masks
        points, labels = next(self.script.clicks)(gt_masks[:, 0].numpy(), shown[:, 0].numpy())
        return torch.tensor(points)[:, None], torch.tensor(labels)[:, None]

    def _encode_new_memory(self, *args: Any, **kwargs: Any) -> Any:
        features, position = super()._encode_new_memory(*args, **kwargs)
        return features.bfloat16().float(), position


def build(config: SAM2Config, corrections: int, seed: int = 0) -> ScriptedTrain:
    """The official training model, with its published recipe's options and nothing dropped out."""
    options = oracle.model_options(config)
    options.pop("fill_hole_area")  # of the predictor
    with torch.random.fork_rng():
        model = ScriptedTrain(
            image_encoder=oracle.image_encoder(config),
            memory_attention=oracle.memory_attention(config),
            memory_encoder=oracle.memory_encoder(config),
            num_correction_pt_per_frame=corrections,
            add_all_frames_to_correct_as_cond=True,
            prob_to_sample_from_gt_for_train=0.1,
            **options,
        )
        oracle.replace_sam_heads(model, config)
    oracle.prepare(model, seed).train().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout_p"):
            module.dropout_p = 0.0
    return model


def scripted(frames: np.ndarray, masks: np.ndarray, plan: Plan, key: jax.Array) -> Script:
    """What our side draws for this plan and key, for the official one."""
    items = frame_items(frames, masks, plan, key)
    by_frame: dict[int, FrameItem] = {
        int(items.index[i]): jax.tree.map(lambda x, i=i: x[i], items) for i in range(len(masks))
    }
    first = {t: first_prompts(item) for t, item in by_frame.items()}
    conditioning = [t for t, item in by_frame.items() if item.conditioning]
    corrections = [
        step
        for item in by_frame.values()
        if item.corrected
        for step in zip(item.click_keys[1:], item.from_truth.tolist(), strict=True)
    ]

    def given(t: int) -> tuple[np.ndarray, np.ndarray]:
        count = int(first[t].num_points[0])
        return np.asarray(first[t].points[:, :count]), np.asarray(first[t].labels[:, :count])

    def click(key: jax.Array):
        return lambda target, shown: jax.device_get(sample_click(key, target, shown))

    return Script(
        conditioning=conditioning,
        tracked=[t for t in by_frame if t not in conditioning],
        corrected=[t for t, item in by_frame.items() if item.corrected],
        masks={t: masks[t] for t in conditioning if not plan.points},
        points={t: given(t) for t in conditioning if plan.points},
        from_truth=iter([from_truth for _, from_truth in corrections]),
        clicks=iter([click(key) for key, _ in corrections]),
    )


def frame_losses(
    model: ScriptedTrain, frames: np.ndarray, masks: np.ndarray, script: Script
) -> tuple[list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
    """The official answers to a clip, frame by frame, and their losses.

    Args:
      model: from `build`.
      frames: [T, S, S, 3] float32, normalised.
      masks: [T, N, S, S] bool.
      script: what the user does.
    """
    num_frames, count = masks.shape[:2]
    index = torch.arange(num_frames)[:, None].expand(num_frames, count)
    clip = BatchedVideoDatapoint(
        img_batch=oracle.to_torch(frames)[:, None],
        obj_to_frame_idx=torch.stack([index, torch.zeros_like(index)], dim=-1),
        masks=torch.from_numpy(masks),
        metadata=None,
        dict_key="clip",
    )
    clip.batch_size = [num_frames]
    model.script = script
    answers = model(clip)
    compare = MultiStepMultiMasksAndIous(
        weight_dict={"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1},
        supervise_all_iou=True,
        iou_use_l1_loss=True,
        pred_obj_scores=True,
        focal_gamma_obj_score=0.0,
        focal_alpha_obj_score=-1.0,
    )
    losses = [
        compare([answer], target[None]) for answer, target in zip(answers, clip.masks, strict=True)
    ]
    return answers, losses
