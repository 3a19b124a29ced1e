"""Semi-supervised video object segmentation: masks on first frames in, masks on all frames out.

The official tool is `tools/vos_inference.py`. It tracks objects that appear later one by one; here
all objects of a video share its frames' features, with the same answers.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from sam2jax.evaluation.layouts import ObjectMasks, PaletteMasks, find_inputs, open_masks
from sam2jax.io.files import PathLike, remove_leftovers
from sam2jax.io.masks import ObjectWriter, PaletteWriter
from sam2jax.io.video import Video, open_video
from sam2jax.ops.masks import non_overlapping
from sam2jax.predictors.session import MOST_COND_FRAMES, InferenceState
from sam2jax.predictors.video import SAM2VideoPredictor
from sam2jax.types import NO_OBJ_SCORE


@dataclasses.dataclass(frozen=True)
class VOSOptions:
    """Options of the official tool."""

    objects_appear_later: bool = False  # objects may be missing on the first frame
    use_all_masks: bool = False  # not only the first one of each object
    per_object_png: bool | None = None  # and objects may overlap; None: as the given masks are
    score_threshold: float = 0.0  # logit above which a pixel is on the object


class Outcome(NamedTuple):
    """What has become of a video."""

    video: str
    problem: str | None  # None: its masks are written


def segment_videos(
    predictor: SAM2VideoPredictor,
    videos: PathLike,
    masks: PathLike,
    out: PathLike,
    names: Sequence[str],
    options: VOSOptions,
    *,
    progress: bool = False,
) -> Iterator[Outcome]:
    """Segments videos one after the other; one that cannot be is named, and the rest goes on.

    Args:
      predictor: any; it need not have `non_overlap_masks`.
      videos: the folder that holds VIDEO/FRAME.jpg.
      masks: the folder that holds VIDEO/FRAME.png or VIDEO/OBJECT/FRAME.png.
      out: the folder to write the same into. A video's folder appears there when it is whole.
      names: of the videos.
      options: of the official tool.
      progress: whether to show a bar over each video's frames.

    Raises:
      FileNotFoundError: there is no folder `videos` or `masks`.
    """
    videos, masks, out = (pathlib.Path(folder) for folder in (videos, masks, out))
    for folder in (videos, masks):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}.")
    out.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, start=1):
        title = f"{number}/{len(names)} {name}" if progress else None
        try:
            segment_video(predictor, videos / name, masks / name, out / name, options, title=title)
        except (ValueError, OSError, RuntimeError) as error:  # XLA's are RuntimeErrors
            yield Outcome(name, str(error))
        else:
            yield Outcome(name, None)


def segment_video(
    predictor: SAM2VideoPredictor,
    frames: PathLike,
    masks: PathLike,
    out: PathLike,
    options: VOSOptions,
    *,
    title: str | None = None,
) -> None:
    """Segments one video: a folder of PNGs with a name for every frame, whole or not at all.

    On frames before an object's first mask it is absent. `title` asks for a progress bar.

    Raises:
      FileNotFoundError: there is no such video, or there are no masks for it.
      ValueError: one of these cannot be read, or they do not fit (see `find_inputs`).
    """
    if not pathlib.Path(frames).is_dir():
        raise FileNotFoundError(f"there is no folder of frames {frames}.")
    with open_video(frames, predictor.image_size) as video:
        given = open_masks(masks)
        names = [video.frame_name(index) for index in range(len(video))]
        inputs = find_inputs(
            given,
            names,
            objects_appear_later=options.objects_appear_later,
            use_all_masks=options.use_all_masks,
        )
        per_object = options.per_object_png
        per_object = given.per_object if per_object is None else per_object
        objects = sorted(inputs.frames)
        remove_leftovers(out)
        answers = track_objects(predictor, video, given, inputs.frames)
        bar = tqdm(answers, title, len(video), leave=False, disable=title is None, unit=" frames")
        with (ObjectWriter if per_object else PaletteWriter)(out, inputs.palette) as writer:
            for index, scores in bar:
                exclusive = scores if per_object else non_overlapping(scores)
                writer.write(index, names[index], objects, exclusive > options.score_threshold)


def track_objects(
    predictor: SAM2VideoPredictor,
    video: Video,
    masks: PaletteMasks | ObjectMasks,
    inputs: Mapping[int, Sequence[int]],
) -> Iterator[tuple[int, np.ndarray]]:
    """Tracks every object from its first mask to the end of the video.

    Objects do not look at each other, so that each is tracked as if it were alone. One joins when
    its first frame is reached: it must not be tracked, and remembered, before.

    Args:
      predictor: without `non_overlap_masks`.
      video: opened at the model's size.
      masks: of the video.
      inputs: by object, the frames whose masks are given, in order.

    Yields:
      Index of each frame of the video, and mask logits [N, H, W] of all objects by their ids;
      -1024 where one has not appeared.
    """
    places: dict[Hashable, int] = {obj: place for place, obj in enumerate(sorted(inputs))}
    absent = np.full((len(places), video.height, video.width), NO_OBJ_SCORE, np.float32)
    # Without a history a session forgets conditioning frames past a number.
    is_short = max(map(len, inputs.values())) <= MOST_COND_FRAMES
    state = predictor.init_state(
        video, offload_state_to_cpu=not is_short, history="none" if is_short else "all"
    )
    starts = sorted({frames[0] for frames in inputs.values()})
    for frame in range(starts[0]):
        yield frame, absent
    for start, stop in zip(starts, [*starts[1:], len(video)], strict=True):
        _join(predictor, state, masks, {o: f for o, f in inputs.items() if f[0] == start})
        last = stop - start - 1  # counted from the first
        for frame, present, logits in predictor.propagate_in_video(state, start, last):
            scores = absent.copy()
            scores[[places[obj] for obj in present]] = logits[:, 0]
            yield frame, scores


def _join(
    predictor: SAM2VideoPredictor,
    state: InferenceState,
    masks: PaletteMasks | ObjectMasks,
    inputs: Mapping[int, Sequence[int]],
) -> None:
    """Gives the session the masks of some objects, reading every picture once."""
    for frame in sorted({frame for frames in inputs.values() for frame in frames}):
        found = masks.read(state.video.frame_name(frame)).masks
        for obj, frames in inputs.items():
            if frame in frames:
                predictor.add_new_mask(state, frame, obj, found[obj])


def unfinished(out: PathLike, names: Sequence[str]) -> list[str]:
    """The videos that have no masks in `out` yet."""
    folders = {name: pathlib.Path(out) / name for name in names}
    return [n for n, folder in folders.items() if not (folder.is_dir() and any(folder.iterdir()))]
