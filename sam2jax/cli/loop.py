"""The loop of `sam2jax track`: frames in, masks out, one at a time."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from sam2jax.io.masks import ArrayWriter
from sam2jax.io.video import Frame, Video

if TYPE_CHECKING:
    from sam2jax.io.stream import Stream
    from sam2jax.memory import MemoryPolicy
    from sam2jax.types import FrameOutput, Prompts


Bar: TypeAlias = Callable[[Iterable[Any]], Iterable[Any]]


class Job(NamedTuple):
    """What is to be tracked, and by which model."""

    model: Any
    params: Any
    video: Any  # a Video or a Stream, opened with the model's image size
    prompts: dict[int, Prompts]  # by frame, in pixels of the resized frames
    policy: MemoryPolicy
    reverse: bool
    watch: Callable[[int, FrameOutput], None] | None = None  # is told of each frame's answer

    @property
    def indices(self) -> range:
        """The frames that are tracked, in order of time."""
        if self.reverse:
            return range(max(self.prompts) + 1)
        return range(min(self.prompts), len(self.video))


class Result(NamedTuple):
    """A frame of the video, in order of time."""

    index: int
    original: np.ndarray | None  # uint8 RGB [H, W, 3], where it was asked for
    masks: np.ndarray | None  # bool [N, H, W]; None: not tracked


def run(job: Job, *, original: bool, bar: Bar) -> Iterator[Result]:
    """Tracks, and yields every frame in order of time, tracked or not.

    Args:
        job: what to do.
        original: whether the original-size frames are wanted.
        bar: wraps the iterator over tracked frames, to show progress.
    """
    if job.reverse:
        yield from _run_reverse(job, original, bar)
        return
    yield from _untracked(job, range(job.indices.start), original)
    for frame, masks in bar(_track(job, original)):
        yield Result(frame.index, frame.original, masks)


def run_stream(job: Job, *, original: bool, bar: Bar) -> Iterator[Result]:
    """Tracks a live stream, and yields every frame with its masks before the next is waited for.

    Nothing lies ahead: an object is there from its first prompt on, and empty before. Prompts on
    frames that never come are not used.

    Args:
        job: what to do, on a stream.
        original: whether the original-size frames are wanted.
        bar: wraps the iterator over frames, to show progress.
    """
    import jax.numpy as jnp

    import sam2jax

    model, params, stream, prompts, policy, *_ = job
    first = min(prompts)
    state = sam2jax.init_state(
        model,
        prompts[first].num_objects,
        num_frames=None,
        max_cond_frames=len(prompts),
        frame_index=first,
        policy=policy,
    )
    answer = _answer(stream)
    for frame in bar(stream.frames(original=original)):
        masks = None
        if frame.index >= first:
            image = jnp.asarray(frame.image)
            state, output = sam2jax.step(
                model, params, state, image, prompts.get(frame.index), policy=policy
            )
            masks = np.asarray(answer(output.masks))
        yield Result(frame.index, frame.original, masks)


def _run_reverse(job: Job, original: bool, bar: Bar) -> Iterator[Result]:
    """Outputs run forward in time, so masks wait on disk until the first frame is reached."""
    with tempfile.TemporaryDirectory(prefix="sam2jax-") as folder:
        path = pathlib.Path(folder) / "masks.npz"
        with ArrayWriter(path) as spool:
            for frame, masks in bar(_track(job, original=False)):
                spool.write(frame.index, str(frame.index), range(len(masks)), masks)
        with np.load(path) as spooled:
            for result in _untracked(job, job.indices, original):
                name = str(result.index)
                yield result._replace(masks=spooled[name] if name in spooled else None)
    yield from _untracked(job, range(job.indices.stop, len(job.video)), original)


def _untracked(job: Job, indices: range, original: bool) -> Iterator[Result]:
    if not original:
        yield from (Result(index, None, None) for index in indices)
        return
    for frame in job.video.frames(indices.start, indices.stop, original=True):
        yield Result(frame.index, frame.original, None)


def _track(job: Job, original: bool) -> Iterator[tuple[Frame, np.ndarray]]:
    """Frames in the order they are tracked, with their masks: bool [N, H, W]."""
    import jax.numpy as jnp

    import sam2jax

    model, params, video, prompts, policy, reverse, watch = job
    order = sorted(prompts, reverse=reverse)
    num_objects = prompts[order[0]].num_objects
    state = sam2jax.init_state(
        model,
        num_objects,
        num_frames=len(video),
        max_cond_frames=len(order),
        frame_index=order[0],
        policy=policy,
    )
    for index in order:
        image = prompted_frame(video, index)
        if index == order[0]:  # comes up as it is tracked
            continue
        ahead = jnp.asarray(image)
        state = sam2jax.condition(
            *(model, params, state, ahead, prompts[index], index), reverse=reverse, policy=policy
        )
    answer = _answer(video)
    # Results are read one frame late, so that the next one is decoded while they are computed.
    waiting: tuple[Frame, Any] | None = None
    span = job.indices
    for frame in video.frames(span.start, span.stop, reverse=reverse, original=original):
        state, output = sam2jax.step(
            model,
            params,
            state,
            jnp.asarray(frame.image),
            prompts.get(frame.index),
            reverse=reverse,
            policy=policy,
            **({} if watch is None else {"explain": True}),
        )
        if watch is not None:
            watch(frame.index, output)
        masks = answer(output.masks)
        if waiting is not None:
            yield waiting[0], np.asarray(waiting[1])
        waiting = frame, masks
    if waiting is not None:
        yield waiting[0], np.asarray(waiting[1])


def _answer(video: Video | Stream) -> Callable[[Any], Any]:
    """From the tracker's logits to masks of the video's size: bool [N, H, W]."""
    import jax

    import sam2jax

    return jax.jit(lambda logits: sam2jax.resize_masks(logits, (video.height, video.width)) > 0)


def prompted_frame(video: Video, index: int) -> np.ndarray:
    """What the model sees of a frame with a prompt; ValueError where the video ends before it."""
    try:
        return video[index]
    except IndexError as error:
        raise ValueError(f"there is a prompt on frame {index}, but {error}") from error
