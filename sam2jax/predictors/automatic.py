"""The automatic mask generator (official `automatic_mask_generator.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sam2jax.io.runs import encode_coco, encode_runs
from sam2jax.nn.sam2 import prepare_params
from sam2jax.predictors.grids import Box, crop_boxes, near_crop_edge, point_grids
from sam2jax.predictors.inputs import check_image
from sam2jax.predictors.options import load_with, model_and_params
from sam2jax.predictors.regions import (
    Drawn,
    clean_masks,
    compressed,
    filled,
    kept_boxes,
    restored,
)
from sam2jax.predictors.sizes import jit_for_sizes, preprocess
from sam2jax.segmentation.generate import Canvas, measure_masks, propose_masks
from sam2jax.segmentation.image import encode_image
from sam2jax.types import MAX_FED_BACK_LOGIT

OutputMode = Literal["binary_mask", "uncompressed_rle", "coco_rle"]

GENERATOR_OPTIONS = (
    "points_per_side",
    "points_per_batch",
    "pred_iou_thresh",
    "stability_score_thresh",
    "stability_score_offset",
    "mask_threshold",
    "box_nms_thresh",
    "crop_n_layers",
    "crop_nms_thresh",
    "crop_overlap_ratio",
    "crop_n_points_downscale_factor",
    "point_grids",
    "min_mask_region_area",
    "output_mode",
    "use_m2m",
    "multimask_output",
)
CANVAS_PIXELS = 2**25  # of masks that are judged or drawn at once at the size of the image
MOST_LOGITS = 2048  # masks that are kept as logits (256 KiB each at 1024 px), others compressed


class Found(NamedTuple):
    """Masks that have passed so far, one row each; in pixels of the image."""

    masks: np.ndarray  # [C] of objects: logits [S/4, S/4] of the crop, or `Drawn`
    ious: np.ndarray  # [C] float32
    stability: np.ndarray  # [C] float32
    boxes: np.ndarray  # [C, 4] float32
    points: np.ndarray  # [C, 2] float32
    crops: np.ndarray  # [C, 4] float32, the crop that each comes from

    def take(self, rows: Any) -> Found:
        return Found(*(column[rows] for column in self))


class SAM2AutomaticMaskGenerator:
    """Finds masks of everything in an image, from a grid of points.

    Names, arguments, defaults and records are those of the official class. Masks are looked at in
    the image's size only when they have passed by their predicted IoU, and drawn only when they
    are kept. Memory does not grow with points and crops but by what has passed, compressed.

    Args:
      model: from `load`, or what `build_sam2` returns, or another predictor, to share its model.
      params: the model's parameters, if they do not come with it.
      points_per_side: of the grid; None: `point_grids` has them.
      points_per_batch: decoded at once.
      pred_iou_thresh: masks that the model itself rates no higher are dropped.
      stability_score_thresh: masks whose stability is lower are dropped.
      stability_score_offset: by which the threshold is moved up and down for that.
      mask_threshold: logit above which a pixel belongs to a mask.
      box_nms_thresh: IoU of boxes above which the lower rated mask is dropped; above 1: none is.
      crop_n_layers: layers of crops, of 4, 16, ... each, that are looked at like the image.
      crop_nms_thresh: as `box_nms_thresh`, between crops, where smaller crops come first.
      crop_overlap_ratio: overlap of the first layer's crops, as a share of the shorter side.
      crop_n_points_downscale_factor: by which the grid gets coarser with every layer.
      point_grids: one grid [P, 2] for the image and each layer, as shares of width and height.
      min_mask_region_area: regions and holes of fewer pixels are removed and filled, and
        duplicates that this makes are dropped, as the official documentation says (the official
        code applies the area to its low resolution logits).
      output_mode: `binary_mask`, `uncompressed_rle` or `coco_rle`.
      use_m2m: improve every mask once by feeding it back.
      multimask_output: three masks for each point, or one.
      progress: whether to show a bar over crops and points.

    Raises:
      ValueError: not exactly one of points_per_side and point_grids, a grid for each layer is
        missing, or there is no such output mode.
    """

    def __init__(
        self,
        model: Any,
        params: Any = None,
        *,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.8,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        mask_threshold: float = 0.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[Any] | None = None,
        min_mask_region_area: int = 0,
        output_mode: OutputMode = "binary_mask",
        use_m2m: bool = False,
        multimask_output: bool = True,
        progress: bool = False,
    ) -> None:
        self.model, params = model_and_params(model, params)
        self.params = prepare_params(self.model, params)
        self.point_grids = _check_grids(
            points_per_side, point_grids, crop_n_layers, crop_n_points_downscale_factor
        )
        if output_mode not in ("binary_mask", "uncompressed_rle", "coco_rle"):
            raise ValueError(
                "output_mode must be binary_mask, uncompressed_rle or coco_rle, got "
                f"{output_mode!r}."
            )
        if points_per_batch < 1:
            raise ValueError(f"points_per_batch must be at least 1, got {points_per_batch}.")
        # Batches are filled up, so none is larger than there are points.
        self.points_per_batch = min(points_per_batch, max(1, *map(len, self.point_grids)))
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.mask_threshold = mask_threshold
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode
        self.use_m2m = use_m2m
        self.multimask_output = multimask_output
        self.progress = progress

    @classmethod
    def from_pretrained(cls, model_id: Any, **options: Any) -> SAM2AutomaticMaskGenerator:
        """Loads a checkpoint.

        Args:
          model_id: a file, a folder, a hub id, or the name of a shipped model; `source` of `load`.
          **options: of `load` and of the constructor; `device` and `mode` are accepted with a
            warning.
        """
        model, params, own = load_with(model_id, options, (*GENERATOR_OPTIONS, "progress"))
        return cls(model, params, **own)

    def generate(self, image: Any) -> list[dict[str, Any]]:
        """Finds masks in an image, uint8 RGB [H, W, 3] or an RGB picture of Pillow's.

        Returns:
          A record for each mask, best first within its crop: `segmentation` (bool [H, W], or run
          lengths), `area` in pixels, `bbox` [x, y, w, h], `predicted_iou`, `point_coords` [[x, y]]
          that led to it, `stability_score`, and `crop_box` [x, y, w, h] that it was found in.
        """
        image = check_image(image)
        size = image.shape[:2]
        crops = crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        batches = sum(
            -(-len(self.point_grids[layer]) // self.points_per_batch) for _, layer in crops
        )
        with tqdm(total=batches, unit="batch", disable=not self.progress) as bar:
            # Bits of one crop are few beside answers of a byte a pixel, and not worth the time.
            few = len(crops) == 1 and self.output_mode == "binary_mask"
            hold = np.asarray if few else compressed
            parts = [
                self._process_crop(image, box, layer, hold, bar.update) for box, layer in crops
            ]
        found = Found(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        if len(crops) > 1:
            area = np.prod(found.crops[:, 2:] - found.crops[:, :2], axis=1)
            found = _suppress(found, 1 / area, self.crop_nms_thresh)
        masks, boxes = found.masks, found.boxes
        rows = np.arange(len(masks))
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            area = self.min_mask_region_area
            masks, boxes, rows = clean_masks(masks, boxes, size, area, threshold)
        return [self._record(found.take(row), masks[row], boxes[row], size) for row in rows]

    def _process_crop(
        self,
        image: np.ndarray,
        box: Box,
        layer: int,
        hold: Callable[[np.ndarray], Drawn],
        advance: Callable[[], Any],
    ) -> Found:
        """The masks of a crop that are rated high enough, without duplicates."""
        x0, y0, x1, y1 = box
        pixels = preprocess(image[None, y0:y1, x0:x1], size=self.model.config.image_size)
        features = encode_image(self.model, self.params, pixels)
        canvas = Canvas.make(image.shape[:2], box, self.model.config.mask_size)
        canvas = jax.device_put(canvas)  # once, and not for every few masks
        parts, held = [_nothing()], 0
        grid = self.point_grids[layer]
        for start in range(0, len(grid), self.points_per_batch):
            points = grid[start : start + self.points_per_batch].astype(np.float32)
            parts.append(self._process_batch(features, points, box, canvas))
            held += len(parts[-1].ious)
            if held > MOST_LOGITS:
                parts, held = [self._drawn(part, canvas, compressed) for part in parts], 0
            advance()
        found = Found(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        return self._drawn(_suppress(found, found.ious, self.box_nms_thresh), canvas, hold)

    def _process_batch(self, features: Any, points: np.ndarray, box: Box, canvas: Canvas) -> Found:
        logits, ious = self._propose(features, points)
        repeats = len(ious) // len(points)
        passed = np.arange(len(ious))
        if self.pred_iou_thresh > 0:
            passed = np.flatnonzero(ious > self.pred_iou_thresh)
        size = canvas.size
        stability, boxes = self._measure(logits, passed, canvas)
        x0, y0, x1, y1 = box
        # Boxes of empty masks are the crop's corner, as they are officially.
        boxes = np.where(np.any(boxes, axis=1, keepdims=True), boxes, (x0, y0, x0, y0))
        keep = ~near_crop_edge(boxes, box, size)
        if self.stability_score_thresh > 0:
            keep &= stability >= self.stability_score_thresh
        pixels = points * np.array([x1 - x0, y1 - y0]) + np.array([x0, y0])
        return Found(
            _objects(_rows(logits, passed[keep])),
            ious[passed][keep],
            stability[keep],
            boxes[keep].astype(np.float32),
            pixels.astype(np.float32)[passed[keep] // repeats],
            np.broadcast_to(np.array(box, np.float32), (int(keep.sum()), 4)),
        )

    def _propose(self, features: Any, points: np.ndarray) -> tuple[jax.Array, np.ndarray]:
        """Logits, on the device, and predicted IoUs of all masks of some points."""
        propose = partial(_propose, self.model, self.params, features)
        count, full = len(points), self.points_per_batch
        logits, ious = propose(filled(points, full), None, self.multimask_output)
        repeats = len(ious) // full
        if not self.use_m2m:
            return logits, np.asarray(ious)[: count * repeats]
        logits = np.asarray(logits)[: count * repeats]
        points = np.repeat(points, repeats, axis=0)
        better = []
        for start in range(0, len(points), full):
            part = slice(start, start + full)
            # What is fed back is what the image predictor hands out.
            fed_back = np.clip(logits[part], -MAX_FED_BACK_LOGIT, MAX_FED_BACK_LOGIT)
            earlier = filled(fed_back, full)
            found = propose(filled(points[part], full), earlier, False)
            better.append([np.asarray(x)[: len(points[part])] for x in found])
        logits, ious = (np.concatenate(column) for column in zip(*better, strict=True))
        return jnp.asarray(logits), ious

    def _measure(
        self, logits: jax.Array, rows: np.ndarray, canvas: Canvas
    ) -> tuple[np.ndarray, np.ndarray]:
        """Stability [C] and boxes [C, 4] of some of the masks, a few at a time."""
        threshold, offset = np.float32(self.mask_threshold), np.float32(self.stability_score_offset)
        step = _at_once(canvas.size)
        # All are begun before one is waited for.
        found = [
            _measure(logits, filled(rows[start : start + step], step), canvas, threshold, offset)
            for start in range(0, len(rows), step)
        ]
        stability = [np.zeros(0, np.float32), *(np.asarray(part.stability) for part in found)]
        boxes = [np.zeros((0, 4), np.int32), *(np.asarray(part.boxes) for part in found)]
        return np.concatenate(stability)[: len(rows)], np.concatenate(boxes)[: len(rows)]

    def _drawn(self, found: Found, canvas: Canvas, hold: Callable[[np.ndarray], Drawn]) -> Found:
        """With the masks of a crop drawn in the image."""
        masks, threshold = found.masks.copy(), np.float32(self.mask_threshold)
        step = _at_once(canvas.size)
        logits = [row for row, mask in enumerate(masks) if not isinstance(mask, bytes)]
        for start in range(0, len(logits), step):
            rows = logits[start : start + step]
            given = filled(np.stack([masks[row] for row in rows]), step)
            bits = _draw(given, canvas, threshold)
            for row, drawn in zip(rows, np.asarray(bits), strict=False):
                masks[row] = hold(drawn)
        return found._replace(masks=masks)

    def _record(
        self, found: Found, mask: Drawn, box: np.ndarray, size: tuple[int, int]
    ) -> dict[str, Any]:
        segmentation: Any = restored(mask, size)
        area = int(np.count_nonzero(segmentation))
        if self.output_mode == "uncompressed_rle":
            segmentation = encode_runs(segmentation)
        elif self.output_mode == "coco_rle":
            segmentation = encode_coco(segmentation)
        return {
            "segmentation": segmentation,
            "area": area,
            "bbox": _xywh(box),
            "predicted_iou": float(found.ious),
            "point_coords": [found.points.tolist()],
            "stability_score": float(found.stability),
            "crop_box": _xywh(found.crops),
        }


def _nothing() -> Found:
    """No masks at all, for images in which nothing passes."""
    columns = [np.zeros(shape, np.float32) for shape in ((0,), (0,), (0, 4), (0, 2), (0, 4))]
    return Found(_objects([]), *columns)


def _objects(items: Any) -> np.ndarray:
    """An array [C] of whatever the items are."""
    array = np.empty(len(items), object)
    for place, item in enumerate(items):
        array[place] = item
    return array


def _rows(logits: jax.Array, rows: np.ndarray, step: int = 32) -> list[np.ndarray]:
    """Some of the masks, on the host."""
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]
    found = [_take(logits, filled(part, step)) for part in parts]
    return [mask for part in found for mask in np.asarray(part)][: len(rows)]


def _xywh(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = (float(edge) for edge in box)
    return [x0, y0, x1 - x0, y1 - y0]


def _suppress(found: Found, scores: np.ndarray, threshold: float) -> Found:
    return found.take(kept_boxes(found.boxes, scores, threshold))


def _at_once(size: tuple[int, int]) -> int:
    """How many masks are judged or drawn at once in an image of this size."""
    return int(np.clip(CANVAS_PIXELS // (size[0] * size[1]), 1, 32))


def _check_grids(
    per_side: int | None, grids: Sequence[Any] | None, layers: int, downscale: int
) -> list[np.ndarray]:
    if (per_side is None) == (grids is None):
        raise ValueError("Give points_per_side or point_grids, and not both.")
    if layers < 0 or downscale < 1 or (per_side is not None and per_side < 1):
        raise ValueError(
            "Expected points_per_side and crop_n_points_downscale_factor of at least 1 and "
            f"crop_n_layers of at least 0, got {per_side}, {downscale} and {layers}."
        )
    if grids is None:
        assert per_side is not None
        return point_grids(per_side, layers, downscale)
    checked = [np.asarray(grid, np.float64) for grid in grids]
    if len(checked) <= layers or any(g.ndim != 2 or g.shape[1] != 2 for g in checked):
        raise ValueError(
            f"Expected {layers + 1} point_grids [P, 2], got {[list(g.shape) for g in checked]}."
        )
    return checked


_propose = jax.jit(
    lambda model, params, features, points, logits, multimask: propose_masks(
        model, params, features, points, logits=logits, multimask=multimask
    ),
    static_argnums=(0, 5),
)
_measure = jit_for_sizes(lambda logits, rows, *given: measure_masks(logits[rows], *given))
_take = jax.jit(lambda logits, rows: logits[rows])


@jit_for_sizes
def _draw(logits, canvas, threshold):
    drawn, inside = canvas.draw(logits)
    return jnp.packbits((drawn > threshold) & inside, axis=-1)
