"""The interactive video predictor (official `sam2_video_predictor.py`)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam2jax.config import SAM2Config
from sam2jax.io.video import Source, open_video
from sam2jax.loading import load
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.masks import non_overlapping
from sam2jax.ops.resize import resize_masks
from sam2jax.predictors.session import (
    InferenceState,
    ObjectHistory,
    Record,
    build_state,
    power_of_two,
)
from sam2jax.tracking.state import require_memory
from sam2jax.tracking.step import encode_frame, process_ahead, process_frame, time_direction
from sam2jax.types import NO_OBJ_SCORE, ImageFeatures, Prompts

# Options of the predictor itself; all others belong to the model's configuration.
PREDICTOR_OPTIONS = (
    "non_overlap_masks",
    "clear_non_cond_mem_around_input",
    "add_all_frames_to_correct_as_cond",
)


class SAM2VideoPredictor:
    """Prompts on frames in, masks on all frames out; any number of objects, corrected at will.

    Names, arguments, defaults and results are those of the official class; results are NumPy
    arrays. A frame that was tracked and is then corrected is tracked again by the next
    `propagate_in_video`, unless `add_all_frames_to_correct_as_cond=True`.

    Args:
      model: from `load`.
      params: its parameters.
      non_overlap_masks: leave each pixel of the answers to one object.
      clear_non_cond_mem_around_input: forget tracked memories near a prompted frame, as the
        official option is documented to do (in the official code it raises an AttributeError).
      add_all_frames_to_correct_as_cond: corrected frames become conditioning frames.
    """

    def __init__(
        self,
        model: SAM2,
        params: Any,
        *,
        non_overlap_masks: bool = False,
        clear_non_cond_mem_around_input: bool = False,
        add_all_frames_to_correct_as_cond: bool = False,
    ) -> None:
        self.model = model
        self.params = params
        self.non_overlap_masks = non_overlap_masks
        self.clear_non_cond_mem_around_input = clear_non_cond_mem_around_input
        self.add_all_frames_to_correct_as_cond = add_all_frames_to_correct_as_cond

    @classmethod
    def from_pretrained(cls, source: Any, **options: Any) -> SAM2VideoPredictor:
        """Loads a checkpoint.

        Args:
          source: as in `load`: a file, a folder, a hub id, or the name of a shipped model.
          **options: of `load` (`image_size`, `dtype`, `apply_postprocessing`, and every inference
            option of `SAM2Config`) and of the constructor.
        """
        own = {name: options.pop(name) for name in PREDICTOR_OPTIONS if name in options}
        return cls(*load(source, **options), **own)

    @property
    def config(self) -> SAM2Config:
        return self.model.config

    @property
    def image_size(self) -> int:
        return self.config.image_size

    def init_state(
        self,
        video_path: Source,
        offload_video_to_cpu: bool = False,
        offload_state_to_cpu: bool = False,
        async_loading_frames: bool = False,
    ) -> InferenceState:
        """Opens a video.

        Args:
          video_path: a video file or its bytes, a folder of JPEG or PNG frames, or an array,
            uint8 RGB [T, H, W, 3].
          offload_video_to_cpu: accepted; frames are decoded when they are needed, and stay on the
            host until then.
          offload_state_to_cpu: keep the frames' memories on the host.
          async_loading_frames: accepted; see `offload_video_to_cpu`.

        Raises:
          FileNotFoundError, ValueError: there is no such video, or it cannot be read; or the
            checkpoint is for images only.
        """
        require_memory(self.config)
        video = open_video(video_path, self.image_size)
        if video.num_frames == 0:
            raise ValueError(f"{video.name} has no frames.")
        return InferenceState(
            video=video,
            num_frames=video.num_frames,
            video_height=video.height,
            video_width=video.width,
            offload_state_to_cpu=offload_state_to_cpu,
        )

    def add_new_points_or_box(
        self,
        inference_state: InferenceState,
        frame_idx: int,
        obj_id: Hashable,
        points: Any = None,
        labels: Any = None,
        clear_old_points: bool = True,
        normalize_coords: bool = True,
        box: Any = None,
    ) -> tuple[int, list[Hashable], np.ndarray]:
        """Adds clicks or a box on a frame, and answers at once.

        Args:
          inference_state: from `init_state`.
          frame_idx: of the frame.
          obj_id: any hashable; a new one adds an object.
          points: [P, 2] as (x, y) in pixels of the video.
          labels: [P], 1 foreground, 0 background.
          clear_old_points: whether earlier points of this object on this frame are dropped.
          normalize_coords: False where coordinates are fractions of the video's size.
          box: (x0, y0, x1, y1); comes before the points.

        Returns:
          `frame_idx`, all object ids, and mask logits [N, 1, H, W] float32 at the video's size.
        """
        frame = self._check_frame(inference_state, frame_idx)
        new_points, new_labels = _check_points(points, labels, box, clear_old_points)
        scale = np.array([self.image_size, self.image_size], np.float32)
        if normalize_coords:
            size = (inference_state.video_width, inference_state.video_height)
            scale = scale / np.array(size, np.float32)
        new_points = new_points * scale

        history = inference_state.objects.get(obj_id) or ObjectHistory()
        if not clear_old_points and frame in history.points:
            old_points, old_labels = history.points[frame]
            new_points = np.concatenate([old_points, new_points])
            new_labels = np.concatenate([old_labels, new_labels])
        is_cond = self._becomes_cond(history, frame)
        previous = history.answer(frame, cond=is_cond)
        prompts = Prompts.make(
            points=[new_points],
            labels=[new_labels],
            logits=None if previous is None else [previous.masks],
            refine=frame in history.tracked,
        )
        record = self._answer_prompt(inference_state, history, frame, prompts)
        history.points[frame] = (new_points, new_labels)
        history.masks.pop(frame, None)
        return self._store_prompted(inference_state, obj_id, history, frame, record)

    def add_new_points(self, *args: Any, **kwargs: Any) -> tuple[int, list[Hashable], np.ndarray]:
        """The older name of `add_new_points_or_box`."""
        return self.add_new_points_or_box(*args, **kwargs)

    def add_new_mask(
        self, inference_state: InferenceState, frame_idx: int, obj_id: Hashable, mask: Any
    ) -> tuple[int, list[Hashable], np.ndarray]:
        """Gives an object's mask on a frame: [h, w] of any size, nonzero where the object is.

        Arguments and results otherwise as in `add_new_points_or_box`.
        """
        frame = self._check_frame(inference_state, frame_idx)
        mask = np.asarray(mask)
        if mask.ndim != 2 or 0 in mask.shape:
            raise ValueError(f"Expected a mask [h, w], got shape {mask.shape}.")
        history = inference_state.objects.get(obj_id) or ObjectHistory()
        mask = mask.astype(bool)
        prompts = Prompts.make(masks=[mask], refine=frame in history.tracked)
        record = self._answer_prompt(inference_state, history, frame, prompts)
        history.masks[frame] = mask
        history.points.pop(frame, None)
        return self._store_prompted(inference_state, obj_id, history, frame, record)

    def propagate_in_video(
        self,
        inference_state: InferenceState,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
    ) -> Iterator[tuple[int, list[Hashable], np.ndarray]]:
        """Tracks all objects, frame by frame.

        Args:
          inference_state: with a prompt for every object.
          start_frame_idx: None: the earliest prompted frame.
          max_frame_num_to_track: how many frames follow the first (so one more is answered, as
            in the official predictor); None: all.
          reverse: towards the first frame; nothing is tracked in reverse from frame 0.

        Yields:
          Frame index, all object ids, and mask logits [N, 1, H, W] float32 at the video's size.

        Raises:
          RuntimeError: an object has no prompt.
        """
        state = inference_state
        if not state.objects:
            raise RuntimeError("No prompts: add points, a box or a mask for an object first.")
        for obj_id, history in state.objects.items():
            history.settle(self._clear_reach)
            if not history.cond:
                raise RuntimeError(f"Object {obj_id!r} has no prompt: add one, or remove it.")
        order = _processing_order(state, start_frame_idx, max_frame_num_to_track, reverse)
        obj_ids = state.obj_ids
        histories = list(state.objects.values())
        capacity = power_of_two(len(histories))
        tracker = None  # the compiled tracker's state, where it follows on from the frame before
        for frame in order:
            if all(frame in history.cond for history in histories):
                tracker = None
            else:
                if tracker is None:
                    tracker = build_state(
                        self.config, histories, capacity, frame, state.num_frames, reverse=reverse
                    )
                features = self._features(state, frame)
                tracker, output, memory = _process(
                    self.model, self.params, tracker, features, None, time_direction(reverse)
                )
                records = _records(output.masks, memory, state.offload_state_to_cpu)
                for history, record in zip(histories, records, strict=False):
                    if frame not in history.cond:
                        history.recent[frame] = record
            for history in histories:
                history.tracked[frame] = reverse
                if self._clear_reach is not None and frame in history.cond:
                    history.forget_around(frame, self._clear_reach)
                    tracker = None
            records = [history.cond.get(frame) or history.recent[frame] for history in histories]
            yield frame, obj_ids, self._at_video_size(state, records)

    @property
    def _clear_reach(self) -> int | None:
        if not self.clear_non_cond_mem_around_input:
            return None
        return self.config.memory_temporal_stride_for_eval * self.config.num_maskmem

    def _becomes_cond(self, history: ObjectHistory, frame: int) -> bool:
        return frame not in history.tracked or self.add_all_frames_to_correct_as_cond

    def _check_frame(self, state: InferenceState, frame_idx: Any) -> int:
        if not isinstance(state, InferenceState):
            raise TypeError(f"Expected what init_state returned, got {type(state).__name__}.")
        frame = int(frame_idx)
        if not 0 <= frame < state.num_frames:
            raise ValueError(
                f"The video has frames 0 to {state.num_frames - 1}, there is no frame {frame_idx}."
            )
        return frame

    def _features(self, state: InferenceState, frame: int) -> ImageFeatures:
        """A frame's features; the last ones are kept, for click after click on one frame."""
        if state.cached_features is None or state.cached_features[0] != frame:
            features = _encode(self.model, self.params, jnp.asarray(state.video[frame]))
            state.cached_features = (frame, features)
        return state.cached_features[1]

    def _answer_prompt(
        self, state: InferenceState, history: ObjectHistory, frame: int, prompts: Prompts
    ) -> Record:
        """Answers one object's prompt: without memory on a new frame, else with what is settled."""
        features = self._features(state, frame)
        refine = frame in history.tracked
        tracker = build_state(
            self.config,
            [history],
            1,
            frame,
            state.num_frames,
            reverse=history.tracked.get(frame, False),
        )
        if refine:
            _, output, memory = _process(
                self.model,
                self.params,
                tracker,
                features,
                prompts,
                time_direction(history.tracked[frame]),
            )
        else:
            output, memory = _process_ahead(self.model, self.params, tracker, features, prompts)
        return _records(output.masks, memory, state.offload_state_to_cpu)[0]

    def _store_prompted(self, state, obj_id, history, frame, record):
        is_cond = self._becomes_cond(history, frame)
        (history.pending_cond if is_cond else history.pending_recent)[frame] = record
        state.objects[obj_id] = history
        answers = [h.answer(frame, cond=is_cond) for h in state.objects.values()]
        return frame, state.obj_ids, self._at_video_size(state, answers)

    def _at_video_size(self, state: InferenceState, records: Sequence[Record | None]) -> np.ndarray:
        """Answers at the video's size, of -1024 where an object has none: [N, 1, H, W]."""
        size = (self.config.mask_size,) * 2
        absent = jnp.full(size, NO_OBJ_SCORE)
        masks = jnp.stack([absent if r is None else jnp.asarray(r.masks) for r in records])
        video_size = (state.video_height, state.video_width)
        masks = _finish(masks, video_size, self.non_overlap_masks)
        return np.asarray(masks)[:, None]


_encode = jax.jit(encode_frame, static_argnames="model")
_process = jax.jit(process_frame, static_argnames="model")


@partial(jax.jit, static_argnums=0)
def _process_ahead(model, params, tracker, features, prompts):
    _, output, memory = process_ahead(
        model, params, tracker, features, prompts, tracker.frame_index
    )
    return output, memory


@partial(jax.jit, static_argnums=(1, 2))
def _finish(masks, size, exclusive):
    masks = resize_masks(masks, size)
    return non_overlapping(masks) if exclusive else masks


def _records(masks, memory, offload: bool) -> list[Record]:
    """Takes the objects apart."""
    if offload:
        masks, memory = jax.device_get((masks, memory))
    return [
        Record(masks=masks[i], memory=jax.tree.map(lambda x, i=i: x[i], memory))
        for i in range(masks.shape[0])
    ]


def _processing_order(
    state: InferenceState, start: int | None, count: int | None, reverse: bool
) -> range:
    if start is None:
        start = min(frame for history in state.objects.values() for frame in history.cond)
    count = state.num_frames if count is None else count
    if reverse:
        return range(start, max(start - count, 0) - 1, -1) if start > 0 else range(0)
    return range(start, min(start + count, state.num_frames - 1) + 1)


def _check_points(points: Any, labels: Any, box: Any, clear_old_points: bool):
    """Points and labels with a box's corners in front: [P, 2] float32, [P] int32."""
    if (points is None) != (labels is None):
        raise ValueError("points and labels must be given together.")
    if points is None and box is None:
        raise ValueError("Give points, a box, or both.")
    if box is not None and not clear_old_points:
        raise ValueError(
            "A box must come before any point: it cannot be added with clear_old_points=False."
        )
    rows = np.zeros((0, 2), np.float32)
    kinds = np.zeros(0, np.int32)
    if points is not None:
        rows = np.asarray(points, np.float32)
        kinds = np.asarray(labels)
        rows = rows[0] if rows.ndim == 3 and len(rows) == 1 else rows
        kinds = kinds[0] if kinds.ndim == 2 and len(kinds) == 1 else kinds
    checked = Prompts.make(points=[rows], labels=[kinds], boxes=[box])
    count = int(checked.num_points[0])
    return np.asarray(checked.points[0, :count]), np.asarray(checked.labels[0, :count])
