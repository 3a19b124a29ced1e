"""The image predictor (official `sam2_image_predictor.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam2jax.config import SAM2Config
from sam2jax.nn.sam2 import prepare_params
from sam2jax.ops.masks import fill_regions
from sam2jax.ops.resize import resize_masks
from sam2jax.predictors.inputs import check_image
from sam2jax.predictors.options import load_with, model_and_params
from sam2jax.predictors.sizes import jit_for_sizes, preprocess
from sam2jax.segmentation.image import decode_masks, encode_image
from sam2jax.types import (
    MAX_FED_BACK_LOGIT,
    Array,
    ImageFeatures,
    MaskPrediction,
    Prompts,
    point_rows,
    power_of_two,
)

IMAGE_OPTIONS = ("mask_threshold", "max_hole_area", "max_sprinkle_area")
MOST_AT_ONCE = 16  # prompts that are decoded as one batch, whose memory grows with them
POINTS = 4  # that programs are compiled for at first; beyond them, powers of two
Answer = tuple[np.ndarray, np.ndarray, np.ndarray]  # masks, predicted IoUs, logits


class SAM2ImagePredictor:
    """Encodes an image once, and answers prompts on it.

    Names, arguments, defaults and results are those of the official class; results are NumPy
    arrays.

    Args:
      sam_model: the model, from `load`, or what `build_sam2` returns, or another predictor, to
        share its model.
      params: the model's parameters, if they do not come with it.
      mask_threshold: logit from which a pixel belongs to a mask.
      max_hole_area: holes of at most so many pixels of the S/4 mask are filled.
      max_sprinkle_area: regions of at most so many pixels of the S/4 mask are removed.
    """

    def __init__(
        self,
        sam_model: Any,
        params: Any = None,
        *,
        mask_threshold: float = 0.0,
        max_hole_area: int = 0,
        max_sprinkle_area: int = 0,
    ) -> None:
        self.model, params = model_and_params(sam_model, params)
        self.params = prepare_params(self.model, params)
        self.mask_threshold = mask_threshold
        self.max_hole_area = int(max_hole_area)
        self.max_sprinkle_area = int(max_sprinkle_area)
        self.reset_predictor()

    @classmethod
    def from_pretrained(cls, model_id: Any, **options: Any) -> SAM2ImagePredictor:
        """Loads a checkpoint.

        Args:
          model_id: a file, a folder, a hub id, or the name of a shipped model; `source` of `load`.
          **options: of `load` and of the constructor; `device` and `mode` are accepted with a
            warning.
        """
        model, params, own = load_with(model_id, options, IMAGE_OPTIONS)
        return cls(model, params, **own)

    @property
    def config(self) -> SAM2Config:
        return self.model.config

    def reset_predictor(self) -> None:
        """Forgets the image."""
        self._features: ImageFeatures | None = None
        self._sizes: list[tuple[int, int]] = []  # (height, width) of each image
        self._is_batch = False

    def set_image(self, image: Any) -> None:
        """Encodes an image, uint8 RGB [H, W, 3] or an RGB picture of Pillow's."""
        self._set([image], is_batch=False)

    def set_image_batch(self, image_list: Sequence[Any]) -> None:
        """Encodes several images, of any sizes, as one batch; for `predict_batch`."""
        if not isinstance(image_list, list | tuple) or not image_list:
            raise ValueError("Expected a list of images, with one at least.")
        self._set(image_list, is_batch=True)

    def predict(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        box: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> Answer:
        """Masks for prompts on the image: for one object, or for N of them.

        Args:
          point_coords: [P, 2] or [N, P, 2] as (x, y) in pixels of the image.
          point_labels: [P] or [N, P], 1 foreground, 0 background.
          box: [4] or [N, 4] as (x0, y0, x1, y1); comes before the points.
          mask_input: [1, S/4, S/4] or [N, 1, S/4, S/4], logits of an earlier answer.
          multimask_output: three masks per object, or one.
          return_logits: logits instead of 0 and 1.
          normalize_coords: False where coordinates are fractions of the image's size.

        Returns:
          Masks [C, H, W], predicted IoUs [C], and logits [C, S/4, S/4] to be fed back, all
          float32; with a leading [N] for more than one object.

        Raises:
          RuntimeError: there is no image.
          ValueError: a prompt is not one.
        """
        features = self._require(batch=False)
        given = [point_coords, point_labels, box, mask_input]
        prompts = self._prompts(given, normalize_coords, self._sizes[0])
        return self._answer(features, prompts, self._sizes[0], multimask_output, return_logits)

    def predict_batch(
        self,
        point_coords_batch: Sequence[Any] | None = None,
        point_labels_batch: Sequence[Any] | None = None,
        box_batch: Sequence[Any] | None = None,
        mask_input_batch: Sequence[Any] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """`predict` on every image of `set_image_batch`.

        Each argument is a list or an array with an entry per image, and each result a list.

        Raises:
          RuntimeError: there are no images.
          ValueError: a prompt is not one, or there are not as many as images.
        """
        features = self._require(batch=True)
        count = len(self._sizes)
        given = (point_coords_batch, point_labels_batch, box_batch, mask_input_batch)
        columns = [[None] * count if column is None else column for column in given]
        for column in columns:
            if len(column) != count:
                raise ValueError(f"There are {count} images, but prompts for {len(column)}.")
        rows = [
            self._prompts(prompts, normalize_coords, size)
            for *prompts, size in zip(*columns, self._sizes, strict=True)
        ]
        answers = []
        for i, (prompts, size) in enumerate(zip(rows, self._sizes, strict=True)):
            one = jax.tree.map(lambda x, i=i: x[i : i + 1], features)
            answers.append(self._answer(one, prompts, size, multimask_output, return_logits))
        masks, ious, logits = zip(*answers, strict=True)
        return list(masks), list(ious), list(logits)

    def get_image_embedding(self) -> np.ndarray:
        """What the decoder sees of the image: [1, S/16, S/16, C], channels last."""
        if self._features is None:
            raise RuntimeError("No image yet: call set_image first.")
        return np.asarray(_embedding(self.model, self.params, self._features))

    def _set(self, images: Sequence[Any], *, is_batch: bool) -> None:
        self.reset_predictor()  # first: nothing is answered for an image before one that failed
        arrays = [check_image(image) for image in images]
        ready = [preprocess(array[None], size=self.config.image_size) for array in arrays]
        self._features = encode_image(self.model, self.params, jnp.concatenate(ready))
        self._sizes, self._is_batch = [array.shape[:2] for array in arrays], is_batch

    def _require(self, *, batch: bool) -> ImageFeatures:
        setter, call = ("set_image_batch", "predict_batch") if batch else ("set_image", "predict")
        if self._features is None:
            raise RuntimeError(f"No image yet: call {setter} first.")
        if batch != self._is_batch:
            raise RuntimeError(f"{call} answers on what {setter} was given: call that first.")
        return self._features

    def _prompts(self, given: Sequence[Any], normalize: bool, size: tuple[int, int]) -> Prompts:
        """Of N objects, in pixels of the model's image, in NumPy."""
        coords, labels, box, logits = given
        if (coords is None) != (labels is None):
            raise ValueError("point_coords and point_labels must be given together.")
        scale = np.array([self.config.image_size] * 2, np.float32)
        if normalize:
            scale /= np.array(size[::-1], np.float32)
        parts = {}
        if coords is not None:
            coords, labels = np.asarray(coords, np.float32), np.asarray(labels)
            parts["points"] = coords if coords.ndim == 3 else coords[None]
            parts["labels"] = labels if labels.ndim == 2 else labels[None]
        if box is not None:
            box = np.asarray(box, np.float32)
            if box.size == 0 or box.size % 4 or box.ndim > 3:
                raise ValueError(f"Expected a box [4] or boxes [N, 4], got shape {box.shape}.")
            parts["boxes"] = box.reshape(-1, 4)
        if logits is not None:
            parts["logits"] = self._check_logits(logits)
        count = max([1, *(len(part) for part in parts.values())])
        for name, rows in parts.items():
            # A single earlier answer goes for all objects, as in the official predictor.
            if len(rows) != count and not (name == "logits" and len(rows) == 1):
                raise ValueError(
                    "Prompts must be for one number of objects, got "
                    + ", ".join(f"{len(p)} {n}" for n, p in parts.items())
                    + "."
                )

        def part(name: str, i: int) -> np.ndarray | None:
            return parts[name][i] if name in parts else None

        rows = [
            point_rows(f"object {i}", part("points", i), part("labels", i), part("boxes", i), None)
            for i in range(count)
        ]
        shape = (count, self.config.mask_size, self.config.mask_size)
        return _as_prompts(
            [(row * scale, kinds) for row, kinds in rows],
            np.broadcast_to(parts.get("logits", np.float32(0)), shape),
            "logits" in parts,
        )

    def _check_logits(self, logits: Any) -> np.ndarray:
        """[N, S/4, S/4]"""
        logits, size = np.asarray(logits, np.float32), self.config.mask_size
        if logits.ndim not in (3, 4) or logits.shape[-3:] != (1, size, size):
            raise ValueError(
                f"Expected mask_input [1, {size}, {size}] or [N, 1, {size}, {size}], got "
                f"{list(logits.shape)}."
            )
        if not np.isfinite(logits).all():
            raise ValueError("mask_input must be finite.")
        return logits.reshape(-1, size, size)

    def _answer(
        self,
        features: ImageFeatures,
        prompts: Prompts,
        size: tuple[int, int],
        multimask: bool,
        return_logits: bool,
    ) -> Answer:
        """Masks of N objects at the image's size; those of a single one without a leading axis."""
        count = prompts.num_objects
        batch = min(power_of_two(count), MOST_AT_ONCE)
        parts = []
        for start in range(0, count, batch):
            part = _padded(jax.tree.map(lambda x, s=start: x[s : s + batch], prompts), batch)
            parts.append(_decode(self.model, self.params, features, part, multimask))
        found: MaskPrediction = jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)
        options: dict[str, Any] = {
            "size": size,
            "hole_area": self.max_hole_area,
            "sprinkle_area": self.max_sprinkle_area,
            "return_logits": return_logits,
        }
        full = np.empty((*found.ious.shape, *size), np.float32)
        for place, masks in enumerate(found.masks):  # one by one, since these are large
            full[place] = _at_image_size(masks, np.float32(self.mask_threshold), **options)
        logits = np.clip(found.masks, -MAX_FED_BACK_LOGIT, MAX_FED_BACK_LOGIT)
        answer = full, np.asarray(found.ious), logits
        return answer if len(full) > 1 else (full[0], answer[1][0], answer[2][0])


@partial(jax.jit, static_argnums=(0, 4))
def _decode(model, params, features, prompts, multimask):
    return decode_masks(model, params, features, prompts, multimask=multimask)


@partial(jax.jit, static_argnums=0)
def _embedding(model, params, features):
    return model.apply({"params": params}, features.features, method="without_memory")


@jit_for_sizes
def _at_image_size(
    masks: Array,
    threshold: Array,
    *,
    size: tuple[int, int],
    hole_area: int,
    sprinkle_area: int,
    return_logits: bool,
) -> Array:
    """[C, h, w] logits without small holes and regions -> [C, H, W]: logits, or 0 and 1."""
    full = resize_masks(fill_regions(masks, hole_area, sprinkle_area, threshold), size)
    return full if return_logits else (full > threshold).astype(jnp.float32)


def _as_prompts(
    rows: list[tuple[np.ndarray, np.ndarray]], logits: np.ndarray, has_logits: bool
) -> Prompts:
    count, width = len(rows), power_of_two(max(POINTS, *(len(kinds) for _, kinds in rows)))
    points, labels = np.zeros((count, width, 2), np.float32), np.zeros((count, width), np.int32)
    for i, (row, kinds) in enumerate(rows):
        points[i, : len(row)], labels[i, : len(kinds)] = row, kinds
    fields: dict[str, Any] = {
        "points": points,
        "labels": labels,
        "num_points": np.array([len(kinds) for _, kinds in rows], np.int32),
        "kind": np.ones(count, np.int32),
        "logits": logits,
        "has_logits": np.full(count, has_logits),
    }
    return Prompts(**fields)


def _padded(prompts: Prompts, count: int) -> Prompts:
    """Prompts of `count` objects; those added mean nothing."""
    missing = count - prompts.num_objects
    return jax.tree.map(lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), prompts)
