"""One interactive session with the official video predictor and with ours: the same calls to
both, every answer compared."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import numpy as np
import torch

import sam2jax
from sam2jax.io.video import Video
from tests import oracle
from tests.parity.clips import Bars
from tests.parity.pairs import Pair, assert_close, iou

SIZE = (54, 96)  # height and width that prompts and answers refer to
EDGE = 2e-5  # logits this near 0 may fall to either side


class Refused(Exception):
    """Both predictors refused a call. The official one may be left half changed."""


class Preprocessed(Video):
    """Frames as the model wants them, bit for bit, of a video of another size."""

    name = "frames"

    def __init__(self, frames: np.ndarray, size: tuple[int, int]) -> None:
        self._frames, self.num_frames = frames, len(frames)
        self.height, self.width = size

    def _read(self, index: int) -> np.ndarray:
        return self._frames[index]

    def _image(self, native: np.ndarray) -> np.ndarray:
        return native

    _original = _image


class Both:
    """Calls both predictors and compares what they answer.

    Args:
      both: the model, ours and official.
      frames: preprocessed, [T, S, S, 3] float32.
      bars: how far answers may be apart.
      size: height and width that prompts and answers refer to.
      **options: of the predictors' constructors.
    """

    def __init__(
        self,
        both: Pair,
        frames: np.ndarray,
        bars: Bars,
        size: tuple[int, int] = SIZE,
        **options: bool,
    ) -> None:
        self.bars, self.compared = bars, 0
        self.theirs = copy.copy(both.official)  # shares the weights; options are its own
        for name, value in options.items():
            setattr(self.theirs, name, value)
        # It is the last thing done to an answer, and would hide ties; `compare` does it.
        self.theirs.non_overlap_masks = False
        self.ours = sam2jax.SAM2VideoPredictor(both.model, both.params, **options)
        self.their_state = oracle.init_state(self.theirs, frames, size)
        self.our_state = self.ours.init_state(Preprocessed(frames, size))

    def click(self, frame: int, obj: Any, *points: tuple, **given: Any) -> None:
        """Points are (x, y, label)."""
        rows = {"points": [p[:2] for p in points], "labels": [p[2] for p in points]}
        self.call("add_new_points_or_box", frame_idx=frame, obj_id=obj, **rows, **given)

    def box(self, frame: int, obj: Any, box: tuple) -> None:
        self.call("add_new_points_or_box", frame_idx=frame, obj_id=obj, box=box)

    def mask(self, frame: int, obj: Any, mask: np.ndarray) -> None:
        self.call("add_new_mask", frame_idx=frame, obj_id=obj, mask=mask)

    def propagate(self, start: int | None = None, **given: Any) -> None:
        self.call("propagate_in_video", start_frame_idx=start, **given)

    def clear(self, frame: int, obj: Any) -> None:
        self.call("clear_all_prompts_in_frame", frame_idx=frame, obj_id=obj)

    def remove(self, obj: Any) -> None:
        self.call("remove_object", obj_id=obj, strict=True)

    def call(self, name: str, **given: Any) -> None:
        """Makes one call to both and compares; where both refuse it, raises `Refused`."""
        try:
            theirs = _ask(self.theirs, self.their_state, name, **given)
        except (RuntimeError, ValueError, AssertionError) as error:
            self._check_refusal(name, **given)
            raise Refused(f"{name}: {error}") from error
        ours = _ask(self.ours, self.our_state, name, **given)
        assert list(self.our_state["obj_ids"]) == list(self.their_state["obj_ids"])
        assert [answer[:2] for answer in ours] == [answer[:2] for answer in theirs], name
        for (frame, _, masks), (_, _, their_masks) in zip(ours, theirs, strict=True):
            self.compare(masks, their_masks, f"{name}, frame {frame}")
        self.compared += len(theirs)

    def compare(self, ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
        """Mask logits [N, 1, H, W]."""
        if self.ours.non_overlap_masks and len(theirs) > 1:
            ours, theirs = self._exclusive(ours, theirs)
        assert_close(ours, theirs, self.bars.clip, what)
        decided = np.abs(theirs) > EDGE
        assert iou((ours > 0) & decided, (theirs > 0) & decided) > 0.999, what

    def _exclusive(self, ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Makes the official answers exclusive; where the best two tie, either may win."""
        second, best = np.sort(theirs, axis=0)[-2:]
        tie = best - second <= 2 * self.bars.clip
        theirs = self.theirs._apply_non_overlapping_constraints(torch.from_numpy(theirs)).numpy()
        return tuple(np.where(tie, side.max(axis=0), side) for side in (ours, theirs))

    def is_undecided(self, frame: int, obj: Any) -> bool:
        """Whether rounding has turned a pixel of a mask that was just prompted over.

        Its memory is encoded from signs at the model's size, so that a difference of 1e-9 there
        is one of 1e-4 in what is tracked from it.
        """
        held = self.their_state["temp_output_dict_per_obj"][self.their_state["obj_ids"].index(obj)]
        theirs = next(found[frame] for found in held.values() if frame in found)["pred_masks"]
        ours = np.asarray(self.our_state.objects[obj].latest(frame).masks)
        signs = [
            torch.nn.functional.interpolate(mask, [self.theirs.image_size] * 2, mode="bilinear") > 0
            for mask in (torch.tensor(ours)[None, None], theirs)
        ]
        return not torch.equal(*signs)

    def _check_refusal(self, name: str, **given: Any) -> None:
        before = frozen(self.our_state)
        try:
            _ask(self.ours, self.our_state, name, **given)
        except (RuntimeError, ValueError):
            assert frozen(self.our_state) == before, f"{name} was refused and changed the state"
        else:
            raise AssertionError(f"{name} is refused by the official predictor and not by ours")


def _ask(
    predictor: Any, state: Any, name: str, after: int | None = None, **given: Any
) -> list[tuple[int, list, np.ndarray]]:
    """One call's answers: frame, object ids, masks. Propagation is broken off after `after`."""
    result = getattr(predictor, name)(state, **given)
    if name == "propagate_in_video":
        answers = list(itertools.islice(result, after))
        result.close()
    elif name == "remove_object":  # the official order of frames is a set's
        ids, updated = result
        answers = [(frame, ids, masks) for frame, masks in sorted(updated, key=lambda x: x[0])]
    else:
        answers = [] if result is None else [result]
    return [(frame, list(ids), np.asarray(masks, np.float32)) for frame, ids, masks in answers]


def frozen(value: Any) -> Any:
    """All that is in a state, to be compared with `==`."""
    if dataclasses.is_dataclass(value):
        return [frozen(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        return [(key, frozen(held)) for key, held in value.items()]
    if isinstance(value, list | tuple):
        return [frozen(held) for held in value]
    if hasattr(value, "dtype"):
        return (str(value.dtype), value.shape, np.asarray(value).tobytes())
    return value
