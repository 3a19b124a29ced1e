"""Live streams: the calls that the real-time forks of the official package made known."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from sam2jax.config import SAM2Config
from sam2jax.io.files import PathLike
from sam2jax.predictors import saving
from sam2jax.predictors.answers import Scores
from sam2jax.predictors.inputs import check_image
from sam2jax.predictors.options import load_with
from sam2jax.predictors.propagation import Propagation
from sam2jax.predictors.session import InferenceState
from sam2jax.predictors.video import PREDICTOR_OPTIONS, SAM2VideoPredictor
from sam2jax.tracking.state import require_memory


class SAM2CameraPredictor:
    """Frames in, one by one and for ever; masks out. Memory is constant.

    The last frame can be prompted at any time, for objects old and new, and objects removed. With
    the same frames and prompts the answers are those of `SAM2VideoPredictor` on a video of 16
    frames or more, left and taken up again at each prompt. Of an object's conditioning frames
    the nearest 16 are kept.

    Args:
      model: from `load`, or what `build_sam2` returns, or another predictor, to share its model.
      params: the model's parameters, if they do not come with it.
      **options: of `SAM2VideoPredictor`.

    Example:
      predictor.load_first_frame(next(camera))
      predictor.add_new_prompt(0, "cup", points=[[210, 350]], labels=[1])
      for frame in camera:
          obj_ids, mask_logits = predictor.track(frame)
    """

    def __init__(self, model: Any, params: Any = None, **options: Any) -> None:
        self._predictor = SAM2VideoPredictor(model, params, **options)
        self.model, self.params = self._predictor.model, self._predictor.params
        require_memory(self.config)
        self._state: InferenceState | None = None
        self._run: Propagation | None = None

    @classmethod
    def from_pretrained(cls, model_id: Any, **options: Any) -> SAM2CameraPredictor:
        """Loads a checkpoint; as `SAM2VideoPredictor.from_pretrained`."""
        model, params, own = load_with(model_id, options, PREDICTOR_OPTIONS)
        return cls(model, params, **own)

    @property
    def config(self) -> SAM2Config:
        return self._predictor.config

    @property
    def frame_idx(self) -> int:
        """Index of the last frame; the first one is 0."""
        return self._started().video.index

    @property
    def obj_ids(self) -> list[Hashable]:
        return self._started().obj_ids

    def load_first_frame(self, img: Any) -> None:
        """Begins a stream, and forgets the one before.

        Args:
          img: uint8 RGB [H, W, 3], or an RGB picture of Pillow's.
        """
        self._begin(LastFrame(check_image(img)))

    def add_new_prompt(
        self,
        frame_idx: int,
        obj_id: Hashable,
        points: Any = None,
        labels: Any = None,
        bbox: Any = None,
        clear_old_points: bool = True,
        normalize_coords: bool = True,
    ) -> tuple[int, list[Hashable], np.ndarray]:
        """Adds clicks or a box on the last frame, and answers at once.

        Arguments and results are those of `SAM2VideoPredictor.add_new_points_or_box`; `bbox` is
        its `box`, and `frame_idx` must be that of the last frame: no other is held.
        """
        return self._predictor.add_new_points_or_box(
            self._at(frame_idx),
            frame_idx,
            obj_id,
            points,
            labels,
            clear_old_points,
            normalize_coords,
            bbox,
        )

    def add_new_points(
        self,
        frame_idx: int,
        obj_id: Hashable,
        points: Any,
        labels: Any,
        clear_old_points: bool = True,
        normalize_coords: bool = True,
    ) -> tuple[int, list[Hashable], np.ndarray]:
        """`add_new_prompt` without a box."""
        return self.add_new_prompt(
            frame_idx, obj_id, points, labels, None, clear_old_points, normalize_coords
        )

    def add_new_mask(
        self, frame_idx: int, obj_id: Hashable, mask: Any
    ) -> tuple[int, list[Hashable], np.ndarray]:
        """Gives an object's mask on the last frame; see `SAM2VideoPredictor.add_new_mask`."""
        return self._predictor.add_new_mask(self._at(frame_idx), frame_idx, obj_id, mask)

    def track(self, img: Any) -> tuple[list[Hashable], np.ndarray]:
        """Takes the next frame, and finds all objects on it.

        Args:
          img: as in `load_first_frame`, of the same size.

        Returns:
          All object ids, and mask logits [N, 1, H, W] float32 at the frame's size. Without an
          object the frame is only taken note of.
        """
        state = self._started()
        image = check_image(img)
        if image.shape[:2] != (state.video_height, state.video_width):
            raise ValueError(
                f"Frames of this stream are {state.video_width}x{state.video_height}, got "
                f"{image.shape[1]}x{image.shape[0]}; begin another with load_first_frame."
            )
        if state.objects:
            self._predictor.settle(state)
        state.video.push(image)
        if not state.objects:
            return [], np.zeros((0, 1, state.video_height, state.video_width), np.float32)
        if self._run is None or self._run.is_outdated:
            self._run = Propagation(
                self._predictor.model,
                self._predictor.params,
                self._predictor.policy,
                state,
                frames_at_once=1,
                reverse=False,
            )
        answer = self._run.advance([state.video.index])[0]
        self._run.remember(answer)
        return self._run.obj_ids, self._predictor.video_masks(answer.masks)

    def scores(self) -> Scores:
        """Object scores and predicted IoUs of the answers on the last frame."""
        return self._predictor.scores(self._started(), self.frame_idx)

    def remove_object(self, obj_id: Hashable, strict: bool = False) -> list[Hashable]:
        """Forgets an object, and returns the ids that are left.

        Raises:
          RuntimeError: there is no such object, and `strict`.
        """
        return self._predictor.remove_object(self._started(), obj_id, strict, False)[0]

    def reset_state(self) -> None:
        """Forgets all objects; the stream goes on."""
        self._predictor.reset_state(self._started())

    def save_state(self, path: PathLike) -> None:
        """Writes what is remembered, and the last frame, to a file, whole or not at all."""
        state = self._started()
        extra = {"image": state.video.image, "index": np.asarray(state.video.index)}
        saving.save(path, self.config, state, extra)

    def load_state(self, path: PathLike) -> None:
        """Goes on where `save_state` left, with the same answers to the last bit."""

        def open_state(_: Any, arrays: saving.Arrays) -> InferenceState:
            if "image" not in arrays:
                raise ValueError(
                    f"{path} is a session on a video: load it with SAM2VideoPredictor."
                )
            try:
                last = LastFrame(check_image(arrays["image"]), int(arrays["index"]))
            except (ValueError, OverflowError) as error:
                raise ValueError(f"{path} holds no frame of a stream: {error}") from error
            return self._new_state(last)

        self._state = saving.load(path, self.config, open_state)
        self._run = None

    def _begin(self, last: LastFrame) -> None:
        self._state, self._run = self._new_state(last), None

    def _new_state(self, last: LastFrame) -> InferenceState:
        height, width = last.image.shape[:2]
        return InferenceState(
            video=last,
            frames=last,
            video_height=height,
            video_width=width,
            clip_length=self.config.max_obj_ptrs_in_encoder,
            history="none",
        )

    def _started(self) -> InferenceState:
        if self._state is None:
            raise RuntimeError("No frame yet: call load_first_frame.")
        return self._state

    def _at(self, frame_idx: int) -> InferenceState:
        state = self._started()
        if frame_idx != state.video.index:
            raise ValueError(
                f"A stream holds its last frame only, number {state.video.index}; frame "
                f"{frame_idx} cannot be prompted."
            )
        return state


class LastFrame:
    """The last frame of a stream, in the place of a video and of its reader."""

    name = "the stream"

    def __init__(self, image: np.ndarray, index: int = 0) -> None:
        self.image, self.index = image, index

    @property
    def num_frames(self) -> int:
        return self.index + 1

    def push(self, image: np.ndarray) -> None:
        self.image, self.index = image, self.index + 1

    def reaches(self, index: int) -> bool:
        return index == self.index

    def read(self, index: int, ahead: Iterable[int] = ()) -> np.ndarray:
        if not self.reaches(index):
            raise IndexError(index)
        return self.image
