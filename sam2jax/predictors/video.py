"""The interactive video predictor (official `sam2_video_predictor.py`)."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from sam2jax.config import SAM2Config
from sam2jax.io.files import PathLike
from sam2jax.io.reader import FrameReader
from sam2jax.io.video import Source, Video, open_video
from sam2jax.memory.policy import SAM2 as SAM2_POLICY
from sam2jax.memory.policy import MemoryPolicy
from sam2jax.nn.sam2 import prepare_params
from sam2jax.ops.masks import non_overlapping
from sam2jax.predictors import saving
from sam2jax.predictors.answers import Scores, masks_on, scores_on
from sam2jax.predictors.inputs import check_mask, check_points
from sam2jax.predictors.options import load_with, model_and_params
from sam2jax.predictors.programs import Record
from sam2jax.predictors.prompting import NO_POINTS, answer
from sam2jax.predictors.propagation import Propagation, frames_at_once, stop_at
from sam2jax.predictors.session import (
    History,
    InferenceState,
    ObjectHistory,
    check_session,
    unknown_object,
)
from sam2jax.tracking.state import check_policy, require_memory

# Options of the predictor itself; all others belong to the model's configuration.
PREDICTOR_OPTIONS = (
    "non_overlap_masks",
    "clear_non_cond_mem_around_input",
    "add_all_frames_to_correct_as_cond",
    "policy",
)
MODEL_OPTIONS = frozenset(field.name for field in dataclasses.fields(SAM2Config))


class SAM2VideoPredictor:
    """Prompts on frames in, masks on all frames out; any number of objects, corrected at will.

    Names, arguments, defaults and results are those of the official class; results are NumPy
    arrays. A frame that was tracked and is then corrected is tracked again by the next
    `propagate_in_video`, unless `add_all_frames_to_correct_as_cond=True`.

    Args:
      model: from `load`, or what `build_sam2` returns, or another predictor, to share its model.
      params: the model's parameters, if they do not come with it.
      non_overlap_masks: leave each pixel of the answers to one object.
      clear_non_cond_mem_around_input: forget tracked memories near a prompted frame, as the
        official option is documented to do (in the official code it raises an AttributeError).
      add_all_frames_to_correct_as_cond: corrected frames become conditioning frames.
      policy: what is remembered and attended to (`sam2jax.memory`). When a session is changed,
        one other than SAM 2's own starts anew from its last 64 frames. Of several lineages the
        best so far answers.
    """

    def __init__(
        self,
        model: Any,
        params: Any = None,
        *,
        non_overlap_masks: bool = False,
        clear_non_cond_mem_around_input: bool = False,
        add_all_frames_to_correct_as_cond: bool = False,
        policy: MemoryPolicy = SAM2_POLICY,
    ) -> None:
        check_policy(policy)
        self.model, params = model_and_params(model, params)
        self.params = prepare_params(self.model, params)
        self.non_overlap_masks = non_overlap_masks
        self.clear_non_cond_mem_around_input = clear_non_cond_mem_around_input
        self.add_all_frames_to_correct_as_cond = add_all_frames_to_correct_as_cond
        self.policy = policy

    @classmethod
    def from_pretrained(cls, model_id: Any, **options: Any) -> SAM2VideoPredictor:
        """Loads a checkpoint.

        Args:
          model_id: a file, a folder, a hub id, or the name of a shipped model; `source` of `load`.
          **options: of `load` (`image_size`, `dtype`, `apply_postprocessing`, and every inference
            option of `SAM2Config`) and of the constructor. `device`, `mode` and `vos_optimized`
            mean nothing here; they are accepted with a warning.
        """
        model, params, own = load_with(model_id, options, PREDICTOR_OPTIONS)
        return cls(model, params, **own)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in MODEL_OPTIONS:
            raise AttributeError(f"{name} is compiled in: give it to `from_pretrained` or `load`.")
        super().__setattr__(name, value)

    @property
    def config(self) -> SAM2Config:
        return self.model.config

    @property
    def image_size(self) -> int:
        return self.config.image_size

    def init_state(
        self,
        video_path: Source | Video,
        offload_video_to_cpu: bool = False,
        offload_state_to_cpu: bool = False,
        async_loading_frames: bool = False,
        *,
        history: History = "all",
    ) -> InferenceState:
        """Opens a video.

        Args:
          video_path: a video file or its bytes, a folder of JPEG or PNG frames, an array, uint8
            RGB [T, H, W, 3], an iterator of uint8 RGB [H, W, 3] frames, or an opened `Video`.
            Of an iterator 16 frames are taken at once, as answers depend on how many there are
            if there are fewer; `SAM2CameraPredictor` waits for none.
          offload_video_to_cpu: accepted; frames are always read when they are needed, a little
            ahead and by a thread of their own, and few are kept.
          offload_state_to_cpu: keep the frames' memories on the host (`InferenceState` says how
            large they are).
          async_loading_frames: accepted; see `offload_video_to_cpu`.
          history: "all" keeps every frame's memory, so that any frame can be corrected and
            tracked from. "none" keeps what the tracker itself looks back at, in constant memory:
            a prompt on a frame further back makes it a conditioning frame, and of more than 16
            of those an object loses the furthest.

        Raises:
          FileNotFoundError, ValueError: there is no such video, or it cannot be read; or the
            checkpoint is for images only.
        """
        require_memory(self.config)
        if history not in ("all", "none"):
            raise ValueError(f"history must be 'all' or 'none', got {history!r}.")
        is_open = isinstance(video_path, Video)
        video = video_path if is_open else open_video(video_path, self.image_size)
        if not video.reaches(0):
            raise ValueError(f"{video.name} has no frames.")
        is_path = isinstance(video_path, str | os.PathLike)
        longest = self.config.max_obj_ptrs_in_encoder
        return InferenceState(
            video=video,
            frames=FrameReader(video),
            video_height=video.height,
            video_width=video.width,
            clip_length=longest if video.reaches(longest - 1) else video.num_frames,
            source=os.path.abspath(video_path) if is_path else None,
            offload_state_to_cpu=offload_state_to_cpu,
            history=history,
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

        An earlier answer on this frame is fed back, even where its points are dropped, so that
        two clicks one by one are not two clicks at once.

        Args:
          inference_state: from `init_state`.
          frame_idx: of the frame.
          obj_id: any hashable; a new one adds an object, at any time.
          points: [P, 2] as (x, y) in pixels of the video.
          labels: [P], 1 foreground, 0 background.
          clear_old_points: whether earlier points of this object on this frame are dropped.
          normalize_coords: False where coordinates are fractions of the video's size.
          box: (x0, y0, x1, y1); comes before the points.

        Returns:
          `frame_idx`, all object ids, and mask logits [N, 1, H, W] float32 at the video's size.

        Raises:
          ValueError: there is no such frame, or the prompt is not one.
          RuntimeError: the frame was tracked, but the object has no conditioning frame any more.
        """
        state, frame, history = self._look_up(inference_state, frame_idx, obj_id)
        points, labels = check_points(f"object {obj_id!r}", points, labels, box, clear_old_points)
        scale = np.array([self.image_size, self.image_size], np.float32)
        if normalize_coords:
            scale /= np.array([state.video_width, state.video_height], np.float32)
        points = points * scale
        if not clear_old_points and frame in history.points:
            old_points, old_labels = history.points[frame]
            points = np.concatenate([old_points, points])
            labels = np.concatenate([old_labels, labels])
        previous = history.answer(frame, cond=self._becomes_cond(history, frame))
        record = self._answer(state, history, frame, (points, labels), previous=previous)
        history.points[frame] = (points, labels)
        history.masks.pop(frame, None)
        return self._store(state, obj_id, history, frame, record)

    def add_new_points(self, *args: Any, **kwargs: Any) -> tuple[int, list[Hashable], np.ndarray]:
        """The older name of `add_new_points_or_box`."""
        return self.add_new_points_or_box(*args, **kwargs)

    def add_new_mask(
        self, inference_state: InferenceState, frame_idx: int, obj_id: Hashable, mask: Any
    ) -> tuple[int, list[Hashable], np.ndarray]:
        """Gives an object's mask on a frame: [h, w] of any size, nonzero where the object is; of a
        PyTorch tensor, as officially, at least 0.5.

        Arguments and results otherwise as in `add_new_points_or_box`.
        """
        state, frame, history = self._look_up(inference_state, frame_idx, obj_id)
        mask = check_mask(mask)
        record = self._answer(state, history, frame, NO_POINTS, mask=mask)
        history.masks[frame] = mask
        history.points.pop(frame, None)
        return self._store(state, obj_id, history, frame, record)

    def propagate_in_video(
        self,
        inference_state: InferenceState,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
    ) -> Iterator[tuple[int, list[Hashable], np.ndarray]]:
        """Tracks all objects, frame by frame.

        The session remembers a frame when it is yielded: the loop can be left at any frame,
        prompts added, and tracking taken up from there.

        Args:
          inference_state: with a prompt for every object.
          start_frame_idx: None: the earliest prompted frame.
          max_frame_num_to_track: how many frames follow the first (so one more is answered, as
            in the official predictor); None: all.
          reverse: towards the first frame; nothing is tracked in reverse from frame 0.

        Yields:
          Frame index, all object ids, and mask logits [N, 1, H, W] float32 at the video's size.
          `scores` has the object scores and predicted IoUs.

        Raises:
          RuntimeError: an object has no prompt; or objects were removed while the loop ran.
        """
        state = check_session(inference_state)
        if start_frame_idx is not None:
            start_frame_idx = self._check_frame(state, start_frame_idx)
        if max_frame_num_to_track is not None:
            max_frame_num_to_track = operator.index(max_frame_num_to_track)
        self.settle(state)
        state.version += 1  # a loop that was left open notices
        start = start_frame_idx
        if start is None:
            start = min(frame for history in state.objects.values() for frame in history.cond)
        if reverse and start == 0:
            return
        stop = stop_at(start, max_frame_num_to_track, reverse)
        run = Propagation(
            *(self.model, self.params, self.policy, state, frames_at_once()), reverse=reverse
        )
        for frame, _, masks in run.run(start, stop):
            self._clear_around_prompts(state, frame)
            yield frame, run.obj_ids, self.video_masks(masks)

    def scores(self, inference_state: InferenceState, frame_idx: int) -> Scores:
        """Object scores and predicted IoUs of the latest answers on a frame.

        An object without an answer there has the score -1024 and the IoU 0.
        """
        state = check_session(inference_state)
        return scores_on(state, self._check_frame(state, frame_idx))

    def clear_all_prompts_in_frame(
        self,
        inference_state: InferenceState,
        frame_idx: int,
        obj_id: Hashable,
        need_output: bool = True,
    ) -> tuple[int, list[Hashable], np.ndarray] | None:
        """Drops an object's prompts on a frame, which is no conditioning frame any more.

        Returns:
          As `add_new_points_or_box`; None without `need_output`.

        Raises:
          RuntimeError: there is no such object (the official code adds one).
        """
        state, frame, history = self._look_up(inference_state, frame_idx, obj_id, known=True)
        history.clear_prompts(frame)
        state.version += 1
        return self._answers_on(state, frame) if need_output else None

    def remove_object(
        self,
        inference_state: InferenceState,
        obj_id: Hashable,
        strict: bool = False,
        need_output: bool = True,
    ) -> tuple[list[Hashable], list[tuple[int, np.ndarray]]]:
        """Forgets an object; the others stay as they are.

        Args:
          inference_state: from `init_state`.
          obj_id: of the object.
          strict: whether an unknown object is an error.
          need_output: whether answers are wanted.

        Returns:
          The ids that are left, and, by frame on which the object had been prompted, the others'
          masks [N, 1, H, W].

        Raises:
          RuntimeError: there is no such object, and `strict`.
        """
        state = check_session(inference_state)
        if obj_id not in state.objects:
            if strict:
                raise unknown_object(state, obj_id)
            return state.obj_ids, []
        history = state.objects.pop(obj_id)
        state.version += 1
        if not need_output or not state.objects:
            return state.obj_ids, []
        frames = sorted({*history.points, *history.masks})
        return state.obj_ids, [(frame, self._answers_on(state, frame)[2]) for frame in frames]

    def reset_state(self, inference_state: InferenceState) -> None:
        """Forgets all objects; the video stays open."""
        state = check_session(inference_state)
        state.objects.clear()
        state.version += 1

    def save_state(self, inference_state: InferenceState, path: PathLike) -> None:
        """Writes a session (prompts, answers and memories) to a file, whole or not at all.

        The video is not written. Object ids must be strings, numbers, or tuples of them.
        """
        saving.save(path, self.config, check_session(inference_state))

    def load_state(
        self, path: PathLike, video_path: Source | Video | None = None
    ) -> InferenceState:
        """Continues a session that `save_state` wrote, with the same answers to the last bit.

        Args:
          path: of the file.
          video_path: where the video is, as in `init_state`; None: where it was.

        Raises:
          FileNotFoundError: there is no such file or video.
          ValueError: the file is damaged or no session, or it belongs to another model or video.
        """

        def open_state(header: dict[str, Any], _: Any) -> InferenceState:
            source = header["video"]["source"] if video_path is None else video_path
            if source is None:
                raise ValueError(f"{path} does not say where its video is; give video_path.")
            return self.init_state(
                source,
                offload_state_to_cpu=header["offload_state_to_cpu"],
                history=header["history"],
            )

        return saving.load(path, self.config, open_state)

    @property
    def _clear_reach(self) -> int | None:
        if not self.clear_non_cond_mem_around_input:
            return None
        return self.config.memory_temporal_stride_for_eval * self.config.num_maskmem

    def _becomes_cond(self, history: ObjectHistory, frame: int) -> bool:
        return frame not in history.tracked or self.add_all_frames_to_correct_as_cond

    def _check_frame(self, state: InferenceState, frame_idx: Any) -> int:
        frame = operator.index(frame_idx)
        if frame < 0:  # without looking for the end, which an iterator may not have
            raise ValueError(f"Frames are counted from 0, there is no frame {frame_idx}.")
        if not state.video.reaches(frame):
            raise ValueError(
                f"The video has frames 0 to {state.num_frames - 1}, there is no frame {frame_idx}."
            )
        return frame

    def _look_up(
        self, inference_state: InferenceState, frame_idx: Any, obj_id: Hashable, known: bool = False
    ) -> tuple[InferenceState, int, ObjectHistory]:
        """The arguments of most calls, checked; a new object's history is empty."""
        state = check_session(inference_state)
        frame = self._check_frame(state, frame_idx)
        if known and obj_id not in state.objects:
            raise unknown_object(state, obj_id)
        return state, frame, state.objects.get(obj_id) or ObjectHistory()

    def _answer(self, *given: Any, **options: Any) -> Record:
        return answer(self.model, self.params, self.policy, *given, **options)

    def _store(
        self,
        state: InferenceState,
        obj_id: Hashable,
        history: ObjectHistory,
        frame: int,
        record: Record,
    ) -> tuple[int, list[Hashable], np.ndarray]:
        is_cond = self._becomes_cond(history, frame)
        (history.pending_cond if is_cond else history.pending_recent)[frame] = record
        state.objects[obj_id] = history
        state.version += 1
        return self._answers_on(state, frame, cond=is_cond)

    def settle(self, state: InferenceState) -> None:
        """Makes answers to prompts memories, once every object is known to have one."""
        if not state.objects:
            raise RuntimeError("No prompts: add points, a box or a mask for an object first.")
        for obj_id, history in state.objects.items():
            if not history.is_prompted:
                raise RuntimeError(f"Object {obj_id!r} has no prompt: add one, or remove it.")
        for history in state.objects.values():
            if history.pending_cond or history.pending_recent:
                history.settle(self._clear_reach)
                state.version += 1

    def _clear_around_prompts(self, state: InferenceState, frame: int) -> None:
        if self._clear_reach is None:
            return
        for history in state.objects.values():
            if frame in history.cond:
                history.forget_around(frame, self._clear_reach)
                state.version += 1

    def _answers_on(
        self, state: InferenceState, frame: int, cond: bool | None = None
    ) -> tuple[int, list[Hashable], np.ndarray]:
        return frame, state.obj_ids, self.video_masks(masks_on(state, frame, cond))

    def video_masks(self, masks: Sequence[Any]) -> np.ndarray:
        """[H, W] of each object -> [N, 1, H, W], exclusive if asked for."""
        stacked = np.stack([np.asarray(mask) for mask in masks])
        return (non_overlapping(stacked) if self.non_overlap_masks else stacked)[:, None]
