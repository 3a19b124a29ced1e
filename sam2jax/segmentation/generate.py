"""Masks of everything in an image, from a grid of points (official
`automatic_mask_generator.py`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.boxes import mask_boxes, non_maximum_suppression
from sam2jax.ops.linear import einsum
from sam2jax.ops.resize import bilinear_weights, blend_rows, taps
from sam2jax.segmentation.image import decode_masks
from sam2jax.tree import Tree
from sam2jax.types import Array, ImageFeatures, Prompts


class Canvas(Tree):
    """Where in an image a crop lies, as the weights that bring its masks there."""

    rows: Array  # [2, H] int32, rows of the mask that each row of the image lies between
    shares: Array  # [2, H] float32, their weights, zero outside of the crop
    columns: Array  # [W, S/4] float32, zero outside of the crop

    @classmethod
    def make(cls, size: tuple[int, int], box: tuple[int, int, int, int], mask_size: int) -> Canvas:
        """Of the crop `box` (x0, y0, x1, y1) of an image of `size` (height, width), in NumPy."""
        x0, y0, x1, y1 = box
        rows, shares = taps(bilinear_weights(mask_size, y1 - y0))
        missing = ((0, 2 - len(rows)), (y0, size[0] - y1))
        columns = np.zeros((size[1], mask_size), np.float32)
        columns[x0:x1] = bilinear_weights(mask_size, x1 - x0)
        fields: dict[str, Any] = {
            "rows": np.pad(rows, missing),
            "shares": np.pad(shares, missing),
            "columns": columns,
        }
        return cls(**fields)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.rows.shape[1], self.columns.shape[0]

    def draw(self, masks: Array) -> tuple[Array, Array]:
        """Mask logits [C, S/4, S/4] in the image [C, H, W], and where the crop is: [1, H, W]."""
        wide = einsum("chw,xw->chx", masks, self.columns)
        inside = jnp.any(self.shares, axis=0)[:, None] & jnp.any(self.columns, axis=1)[None]
        return blend_rows(wide[..., None], self.rows, self.shares)[..., 0], inside[None]


class MaskMeasures(Tree):
    """What masks are judged by, at the size of the image."""

    stability: Array  # [C] float32; NaN for a mask that is empty even at the lower threshold
    boxes: Array  # [C, 4] int32


class GeneratedMasks(Tree):
    """The best masks of an image, best first."""

    masks: Array  # [K, S/4, S/4] float32 logits
    ious: Array  # [K] float32, predicted
    stability: Array  # [K] float32
    boxes: Array  # [K, 4] int32, (x0, y0, x1, y1) in pixels of the image
    points: Array  # [K, 2] float32, prompts that led to them, as shares of width and height
    valid: Array  # [K] bool, which of the K there are; they come first


def propose_masks(
    model: SAM2,
    params: Any,
    features: ImageFeatures,
    points: Array,
    *,
    logits: Array | None = None,
    multimask: bool = True,
) -> tuple[Array, Array]:
    """Masks for points, one by one.

    Args:
      model, params, features: as in `decode_masks`.
      points: [K, 2] as shares of the image's width and height.
      logits: [K, S/4, S/4], an earlier answer to each point, to improve on.
      multimask: three masks for each point, or one.

    Returns:
      Logits [K * M, S/4, S/4] and predicted IoUs [K * M], a point's masks side by side.
    """
    count, size = points.shape[0], model.config.image_size
    prompts = Prompts(
        points=(points * size)[:, None],
        labels=jnp.ones((count, 1), jnp.int32),
        num_points=jnp.ones(count, jnp.int32),
        kind=jnp.ones(count, jnp.int32),
        logits=logits,
        has_logits=None if logits is None else jnp.ones(count, bool),
    )
    found = decode_masks(model, params, features, prompts, multimask=multimask)
    return found.masks.reshape(-1, *found.masks.shape[2:]), found.ious.reshape(-1)


def measure_masks(masks: Array, canvas: Canvas, threshold: Array, offset: Array) -> MaskMeasures:
    """Judges mask logits [C, S/4, S/4] where they lie in the image.

    Args:
      masks: of a crop.
      canvas: of that crop.
      threshold: [] logit above which a pixel belongs to a mask.
      offset: [] by which it is moved for the stability score: the IoU of what is left then.
    """
    drawn, inside = canvas.draw(masks)

    def area(above: Array) -> Array:
        return jnp.sum((drawn > above) & inside, axis=(1, 2), dtype=jnp.int32).astype(jnp.float32)

    return MaskMeasures(
        stability=area(threshold + offset) / area(threshold - offset),
        boxes=mask_boxes((drawn > threshold) & inside),
    )


@partial(
    jax.jit,
    static_argnames=("model", "size", "max_masks", "points_per_batch", "multimask"),
)
def generate_masks(
    model: SAM2,
    params: Any,
    features: ImageFeatures,
    points: Array,
    size: tuple[int, int],
    *,
    max_masks: int = 256,
    points_per_batch: int = 64,
    pred_iou_thresh: float = 0.8,
    stability_score_thresh: float = 0.95,
    stability_score_offset: float = 1.0,
    mask_threshold: float = 0.0,
    box_nms_thresh: float = 0.7,
    multimask: bool = True,
) -> GeneratedMasks:
    """Masks of everything in an image, as one program.

    Pure, with static shapes; batches of images go through `jax.vmap` over features. Its defaults
    are those of `SAM2AutomaticMaskGenerator`, which adds crops, takes less memory, and does less
    work where few masks pass.

    Args:
      model, params, features: as in `decode_masks`.
      points: [P, 2] as shares of the image's width and height, a multiple of `points_per_batch`.
      size: (height, width) of the image.
      max_masks: K, how many masks are returned at most.
      points_per_batch: decoded at once.
      pred_iou_thresh, mask_threshold, box_nms_thresh: as in `SAM2AutomaticMaskGenerator`.
      stability_score_thresh, stability_score_offset: likewise.
      multimask: three masks for each point, or one.

    Raises:
      ValueError: the points do not fill whole batches.
    """
    if points_per_batch < 1 or points.shape[0] % points_per_batch:
        raise ValueError(
            f"Expected a multiple of points_per_batch={points_per_batch} points, got "
            f"{points.shape[0]}."
        )
    height, width = size
    canvas = Canvas.make(size, (0, 0, width, height), model.config.mask_size)

    def batch(points: Array):
        masks, ious = propose_masks(model, params, features, points, multimask=multimask)
        judged = jax.lax.map(
            lambda mask: measure_masks(
                mask[None], canvas, jnp.float32(mask_threshold), jnp.float32(stability_score_offset)
            ),
            masks,
        )
        repeated = jnp.repeat(points, masks.shape[0] // points.shape[0], axis=0)
        return masks, ious, judged.stability[:, 0], judged.boxes[:, 0], repeated

    found = jax.lax.map(batch, points.reshape(-1, points_per_batch, 2))
    masks, ious, stability, boxes, points = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), found
    )
    valid = (ious > pred_iou_thresh) & (stability >= stability_score_thresh)
    kept = non_maximum_suppression(boxes, ious, valid, box_nms_thresh)
    best = jnp.argsort(jnp.where(kept, -ious, 1.0), stable=True)[:max_masks]
    return GeneratedMasks(
        masks=masks[best],
        ious=ious[best],
        stability=stability[best],
        boxes=boxes[best],
        points=points[best],
        valid=kept[best],
    )
