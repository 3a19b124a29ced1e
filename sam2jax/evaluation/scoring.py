"""J, F and J&F of folders of masks, per object, video and set, by the official rules.

The rules are those of the official SA-V evaluator (`sav_dataset/utils/sav_benchmark.py`) and of
vos-benchmark: the first and the last annotated frame do not count; an object counts from the frame
that first shows it; the set's score is the mean over all objects.
"""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import multiprocessing
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sam2jax.evaluation.layouts import subfolders
from sam2jax.evaluation.metrics import objects_in, score_frames
from sam2jax.io.files import PathLike, atomic_path
from sam2jax.io.images import read_labels

NAMED = 5  # of many things missing


class Score(NamedTuple):
    """In percent."""

    j: float  # region similarity
    f: float  # boundary measure

    @property
    def jf(self) -> float:
        return (self.j + self.f) / 2

    @classmethod
    def mean(cls, scores: Iterable[Score]) -> Score:
        return cls(*np.mean(list(scores), axis=0).tolist())


@dataclasses.dataclass(frozen=True)
class Results:
    """The scores of a set of videos."""

    objects: dict[str, dict[str, Score]]  # by video and object ("001")

    @property
    def videos(self) -> dict[str, Score]:
        """Means over each video's objects."""
        return {video: Score.mean(of.values()) for video, of in self.objects.items()}

    @property
    def overall(self) -> Score:
        """The mean over all objects of all videos."""
        return Score.mean(score for of in self.objects.values() for score in of.values())

    def rows(self) -> Iterator[tuple[str, str, Score]]:
        """Names of video and object, and the score: of the set, then of each video and object."""
        yield "Global score", "", self.overall
        for video, mean in self.videos.items():
            yield video, "", mean
            for obj, score in self.objects[video].items():
                yield video, obj, score

    def write_csv(self, path: PathLike) -> None:
        """Writes `rows` as vos-benchmark does, with rows for videos and more digits."""
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("sequence", "obj", "J&F", "J", "F"))
            for video, obj, score in self.rows():
                writer.writerow((video, obj, *(f"{x:.3f}" for x in (score.jf, score.j, score.f))))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""

        def entry(score: Score) -> dict[str, float]:
            return {"J&F": score.jf, "J": score.j, "F": score.f}

        return {
            **entry(self.overall),
            "videos": {
                video: {
                    **entry(mean),
                    "objects": {obj: entry(score) for obj, score in self.objects[video].items()},
                }
                for video, mean in self.videos.items()
            },
        }


def score_folders(
    truth: PathLike,
    predictions: PathLike,
    names: Sequence[str] | None = None,
    *,
    keep_first_and_last: bool = False,
    strict: bool = True,
    workers: int = 1,
    progress: bool = False,
) -> Results:
    """Scores a folder of predictions, VIDEO/FRAME.png or VIDEO/OBJECT/FRAME.png as the truth is.

    Frames that only the predictions have are not looked at.

    Args:
      truth: the folder with the true masks.
      predictions: the folder with the masks to be scored.
      names: of the videos; None: all.
      keep_first_and_last: whether the first and the last annotated frames count.
      strict: whether both folders must have the same videos, or all of `names`; otherwise those
        that both have are scored.
      workers: processes to share the videos.
      progress: whether to show a bar over videos.

    Raises:
      FileNotFoundError: a folder, a video or a frame is missing.
      ValueError: a frame has another size than the truth's, cannot be read, or holds several
        objects where each has a folder of its own; or there is nothing to score.
    """
    truth, predictions = pathlib.Path(truth), pathlib.Path(predictions)
    videos = _common_videos(truth, predictions, names, strict)
    jobs = [_pair_files(truth / v, predictions / v, keep_first_and_last) for v in videos]
    scores = _mapped(jobs, min(workers, len(jobs)))
    bar = tqdm(scores, "scoring", len(jobs), unit=" videos", leave=False, disable=not progress)
    objects = {video: of for video, of in zip(videos, bar, strict=True) if of}
    if not objects:
        raise ValueError(f"{truth} shows no object on a frame that counts.")
    return Results(objects)


# True and predicted pictures of a video: of each object that has a folder of its own, or of all
# objects together under None.
_Files = dict[str | None, list[tuple[pathlib.Path, pathlib.Path]]]


def _common_videos(
    truth: pathlib.Path, predictions: pathlib.Path, names: Sequence[str] | None, strict: bool
) -> list[str]:
    for folder in (truth, predictions):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}.")
    true, predicted = set(subfolders(truth)), set(subfolders(predictions))
    wanted = true | predicted if names is None else set(names)
    if strict:
        lacking = ((predictions, wanted - predicted), (truth, wanted - true))
        told = [f"{folder} lacks {_named(sorted(names))}" for folder, names in lacking if names]
        if told:
            raise FileNotFoundError(f"{'; '.join(told)}. Complete them, or do without strict.")
    common = sorted(wanted & true & predicted)
    if not common:
        raise ValueError(f"{truth} and {predictions} have no video in common.")
    return common


def _pair_files(truth: pathlib.Path, predictions: pathlib.Path, keep_ends: bool) -> _Files:
    folders = subfolders(truth)
    if not folders:
        return {None: _pair_frames(truth, predictions, keep_ends)}
    return {obj: _pair_frames(truth / obj, predictions / obj, keep_ends) for obj in folders}


def _pair_frames(
    truth: pathlib.Path, predictions: pathlib.Path, keep_ends: bool
) -> list[tuple[pathlib.Path, pathlib.Path]]:
    frames = sorted(path.name for path in truth.glob("[!.]*.png"))
    if not frames:
        raise ValueError(f"{truth} holds no PNG files.")
    frames = frames if keep_ends else frames[1:-1]
    if missing := [frame for frame in frames if not (predictions / frame).exists()]:
        raise FileNotFoundError(f"{predictions} lacks {_named(missing)}.")
    return [(truth / frame, predictions / frame) for frame in frames]


def _named(missing: list[str]) -> str:
    more = len(missing) - NAMED
    return ", ".join(missing[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _mapped(jobs: list[_Files], workers: int) -> Iterator[dict[str, Score]]:
    if workers == 1:
        yield from map(_score_video, jobs)
        return
    spawned = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawned) as pool:
        yield from pool.map(_score_video, jobs)


def _score_video(files: _Files) -> dict[str, Score]:
    found = {}
    for folder, pairs in files.items():
        pictures = (_read_pair(*pair, binary=folder is not None) for pair in pairs)
        for obj, (j, f) in score_frames(pictures).items():
            found[folder or f"{obj:03d}"] = Score(100 * j, 100 * f)
    return found


def _read_pair(
    truth: pathlib.Path, prediction: pathlib.Path, *, binary: bool
) -> tuple[np.ndarray, np.ndarray]:
    pair = read_labels(truth)[0], read_labels(prediction)[0]
    if pair[0].shape != pair[1].shape:
        sizes = (f"{x.shape[1]}x{x.shape[0]}" for x in pair)
        raise ValueError("{1} is {3} and {0} is {2}.".format(truth, prediction, *sizes))
    if not binary:
        return pair
    for path, labels in zip((truth, prediction), pair, strict=True):
        if len(objects_in(labels)) > 1:
            raise ValueError(f"{path} holds several objects; expected one, as its folder says.")
    return pair[0] > 0, pair[1] > 0
