"""The loop of `sam2jax track-all`: many videos, several at a time, in chunks of frames.

A batch holds one video, or a few, for each device of this process. Their chunks are decoded in
threads while the devices work on earlier ones, and masks of the chunk before are written
meanwhile, so that what is held does not depend on how long the videos are.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import math
import pathlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sam2jax.cli.loop import prompted_frame
from sam2jax.cli.plan import Shape, Task, make_batches, read_table, shape_of
from sam2jax.cli.prompts import (
    PromptTable,
    check_against_video,
    check_inside,
    read_masks,
    to_prompts,
)
from sam2jax.io.files import remove_leftovers
from sam2jax.io.masks import ArrayWriter, MaskWriter, PaletteWriter, RunLengthWriter
from sam2jax.io.video import Frame, Video, open_video
from sam2jax.memory.policy import MemoryPolicy
from sam2jax.nn.sam2 import SAM2
from sam2jax.ops.resize import resize_masks
from sam2jax.predictors.propagation import frames_at_once
from sam2jax.tracking.scan import track
from sam2jax.tracking.state import TrackState, init_state
from sam2jax.tracking.step import condition
from sam2jax.types import EMPTY, ClipPrompts, Prompts

WRITERS: dict[str, tuple[str, type[MaskWriter]]] = {
    "json": (".json", RunLengthWriter),
    "npz": (".npz", ArrayWriter),
    "png": ("", PaletteWriter),
}
CHUNK = 16  # frames of a video that are tracked by one call
WINDOW = 64  # videos for each one that is tracked, among which those alike are looked for
_PROBES = 4  # threads that look into videos

T = TypeVar("T")


class Job(NamedTuple):
    """How all videos are tracked, and where to."""

    model: Any
    params: Any
    policy: MemoryPolicy
    out: pathlib.Path
    masks: str  # of WRITERS
    common: PromptTable | None  # for videos that have no prompts of their own
    videos_per_device: int = 1
    chunk: int = CHUNK


class Outcome(NamedTuple):
    """What has become of a video."""

    name: str
    problem: str | None  # None: its result is written


def result_path(out: pathlib.Path, name: str, masks: str) -> pathlib.Path:
    """Where a video's masks are once it has been tracked: there, it is done."""
    return out / f"{name}{WRITERS[masks][0]}"


def track_all(job: Job, tasks: Sequence[Task]) -> Generator[Outcome]:
    """Tracks videos on all devices of this process; one that cannot be is told, the rest goes on.

    Closed early, it closes all videos, and removes what is written by half.

    Args:
        job: how and where to; its folder exists.
        tasks: the videos, none of which has a result. No other process may have one of them.
    """
    tracker = Tracker(job)
    size = tracker.num_videos
    with _given_up() as begun, _threads(_PROBES) as probes, _threads(3 * size) as pool:

        def begin(batch: Sequence[Task]) -> list[Future[_Slot]]:
            slots = [pool.submit(_Slot, job, task) for task in batch]
            begun.update(slots)
            return slots

        measured = ((task, probes.submit(_measure, task, job.common)) for task in tasks)
        measured = _ahead(measured, size * WINDOW)
        while window := list(itertools.islice(measured, size * WINDOW)):
            known = []
            for task, future in window:
                try:
                    known.append((task, *future.result()))
                except Exception as error:
                    yield Outcome(task.name, _tell(error))
            batches = ((shape, batch, begin(batch)) for shape, batch in make_batches(known, size))
            for shape, batch, futures in _ahead(batches, 1):
                slots = []
                for task, future in zip(batch, futures, strict=True):
                    try:
                        slots.append(future.result())
                    except Exception as error:
                        yield Outcome(task.name, _tell(error))
                if slots:
                    yield from _run(tracker, shape, slots, pool)
                begun.difference_update(futures)


@contextlib.contextmanager
def _given_up() -> Iterator[set[Future[_Slot]]]:
    """A set for videos that are begun with; in the end, those that it still holds are given up.

    To be entered before the threads are, so that none is at one of them any more.
    """
    begun: set[Future[_Slot]] = set()
    try:
        yield begun
    finally:
        for future in begun:
            if not future.cancelled() and future.exception() is None:
                future.result().close(RuntimeError("stopped."))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that is left at once where something goes wrong: what waits in it is dropped."""
    pool = ThreadPoolExecutor(max_workers=count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, each drawn `count` items before it is needed."""
    items = iter(items)
    drawn = deque(itertools.islice(items, count))
    for item in items:
        drawn.append(item)
        yield drawn.popleft()
    yield from drawn


def _measure(task: Task, common: PromptTable | None) -> tuple[Shape, int]:
    table = read_table(task, common)
    with open_video(task.video) as video:
        check_against_video(table, len(video), video.name)
        check_inside(table, video.height, video.width, video.name)
        return shape_of(table, len(video), video.height, video.width), len(video)


class _Slot:
    """A video on its way, and the file that its masks go to."""

    def __init__(self, job: Job, task: Task):
        """Opens the video and decodes its first chunk."""
        self.name = task.name
        self.problem: str | None = None
        self._path = result_path(job.out, task.name, job.masks)
        self._writer = WRITERS[job.masks][1](self._path)
        self._writing = False
        self._chunk = job.chunk
        self._ahead: Future[list[Frame]] | None = None
        size = job.model.config.image_size
        table = read_table(task, job.common)
        self.object_ids = table.object_ids
        self.video: Video = open_video(task.video, size)
        try:
            masks = read_masks(table, self.video.height, self.video.width)
            scale = (size / self.video.width, size / self.video.height)
            self.prompts = to_prompts(table, masks, scale)
            self.first = min(self.prompts)
            later = sorted(set(self.prompts) - {self.first})
            self.prompted_later = [(i, prompted_frame(self.video, i)) for i in later]
            self._frames = self.video.frames(self.first)
            self.begun = self._take()
            if not self.begun:
                name = self.video.name  # its header counts frames that it does not hold
                raise ValueError(
                    f"there is a prompt on frame {self.first}, but {name} ends before it."
                )
        except BaseException:
            self.video.close()
            raise

    def _take(self) -> list[Frame]:
        return list(itertools.islice(self._frames, self._chunk))

    def decode(self, pool: ThreadPoolExecutor, last: list[Frame]) -> None:
        """Begins with the chunk behind `last`, if there is one."""
        more = len(last) == self._chunk and self.video.reaches(last[-1].index + 1)
        self._ahead = pool.submit(self._take) if more and self.problem is None else None

    def decoded(self) -> list[Frame]:
        """The chunk that was begun with; empty where there is none, or the video is given up."""
        try:
            frames = [] if self._ahead is None else self._ahead.result()
            return frames if self.problem is None else []
        except Exception as error:
            self.fail(error)
            return []

    def write(self, frames: list[Frame], masks: np.ndarray) -> None:
        """Appends masks, bool [T, N or more, H, W] of T or fewer frames; tells no error."""
        if self.problem is not None:
            return
        try:
            if not self._writing:
                remove_leftovers(self._path)
                self._writer.__enter__()
                self._writing = True
            for frame, rows in zip(frames, masks, strict=False):
                name = self.video.frame_name(frame.index)
                self._writer.write(frame.index, name, self.object_ids, rows[: len(self.object_ids)])
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Gives the video up."""
        self.problem = self.problem or _tell(error)

    def close(self, error: BaseException | None = None) -> Outcome:
        """Completes the file, or removes what there is of it."""
        if error is not None:
            self.fail(error)
        if self._writing:
            self._writing = False
            failure = None if self.problem is None else RuntimeError(self.problem)
            try:
                self._writer.__exit__(failure and type(failure), failure, None)
            except Exception as broken:
                self.fail(broken)
        if self._ahead is not None and not self._ahead.cancel():
            concurrent.futures.wait([self._ahead])  # FFmpeg does not survive a file closed under it
        self.video.close()
        return Outcome(self.name, self.problem)


def _run(
    tracker: Tracker, shape: Shape, slots: list[_Slot], pool: ThreadPoolExecutor
) -> Iterator[Outcome]:
    """A batch, from its first chunk to the end of the longest video."""
    try:
        for masks, chunks in _track(tracker, shape, slots, pool):
            rows = np.asarray(masks)
            list(pool.map(_Slot.write, slots, chunks, rows))
    except Exception as error:  # of the devices: all videos are lost
        for slot in slots:
            slot.fail(error)
    yield from [slot.close() for slot in slots]


def _track(
    tracker: Tracker, shape: Shape, slots: list[_Slot], pool: ThreadPoolExecutor
) -> Iterator[tuple[Any, list[list[Frame]]]]:
    """Masks [V, T, N, H, W] and frames of each chunk, while the next one is computed."""
    states, prompts = tracker.start(shape, slots)
    chunks = [slot.begun for slot in slots]
    for slot in slots:
        slot.begun, slot.prompted_later = [], []
    waiting = None
    while any(chunks):
        for slot, frames in zip(slots, chunks, strict=True):
            slot.decode(pool, frames)
        states, logits = tracker.advance(states, chunks, prompts)
        masks = _masks_at_size(logits, (shape.height, shape.width))
        if waiting is not None:
            yield waiting
        waiting = masks, chunks
        chunks = [slot.decoded() for slot in slots]
    if waiting is not None:
        yield waiting


def _tell(error: BaseException) -> str:
    known = isinstance(error, ValueError | OSError)
    return str(error) if known else f"{type(error).__name__}: {error}"


class Tracker:
    """`track` on V videos at a time, split over the devices of this process."""

    def __init__(self, job: Job):
        devices = np.array(jax.local_devices())
        kind = (jax.sharding.AxisType.Auto,)
        mesh = Mesh(devices, ("videos",), axis_types=kind)
        self.num_videos = devices.size * job.videos_per_device
        self._split = NamedSharding(mesh, PartitionSpec("videos"))
        self._model, self._chunk = job.model, job.chunk
        # Masks leave frame by frame, so lineages must not wait for the end.
        self._policy = job.policy.replace(online=True)
        self._params = jax.device_put(job.params, NamedSharding(mesh, PartitionSpec()))
        self._alone = job.params
        at_once = math.gcd(job.chunk, max(1, frames_at_once() // job.videos_per_device))
        self._advance = _program(job.model, at_once, self._split)

    def start(self, shape: Shape, slots: Sequence[_Slot]) -> tuple[TrackState, ClipPrompts]:
        """States that know prompts of later frames, and all prompts; with a leading [V]."""
        states, indices, rows = [], [], []
        for slot in slots:
            state, frames, padded = self._start_one(shape, slot)
            states.append(state)
            indices.append(frames)
            rows += padded
        idle = self.num_videos - len(slots)
        states += states[-1:] * idle
        indices += [[EMPTY] * shape.prompted] * idle
        rows += rows[-shape.prompted :] * idle
        leading = (self.num_videos, shape.prompted)
        prompts = jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), Prompts.stack(rows))
        clip_prompts = ClipPrompts(frames=jnp.asarray(indices, jnp.int32), prompts=prompts)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
        return jax.device_put((stacked, clip_prompts), self._split)

    def _start_one(self, shape: Shape, slot: _Slot) -> tuple[TrackState, list[int], list[Prompts]]:
        """One video's part of that: its prompted frames and their prompts, padded."""
        blank = Prompts.none(shape.objects, shape.points)
        given = {
            frame: jax.tree.map(lambda x: x[0], Prompts.stack([prompts, blank]))
            for frame, prompts in slot.prompts.items()
        }
        state = init_state(
            self._model,
            shape.objects,
            num_frames=len(slot.video),
            max_cond_frames=shape.prompted,
            frame_index=slot.first,
            policy=self._policy,
        )
        for index, image in slot.prompted_later:
            state = condition(
                *(self._model, self._alone, state, jnp.asarray(image), given[index], index),
                policy=self._policy,
            )
        room = shape.prompted - len(given)
        return state, [*given, *[EMPTY] * room], [*given.values(), *[blank] * room]

    def advance(
        self, states: TrackState, chunks: Sequence[Sequence[Frame]], prompts: ClipPrompts
    ) -> tuple[TrackState, Any]:
        """The states behind a chunk of each video, and mask logits [V, T, N, S/4, S/4]."""
        size = self._model.config.image_size
        frames = np.zeros((self.num_videos, self._chunk, size, size, 3), np.uint8)
        lengths = np.zeros(self.num_videos, np.int32)
        for index, chunk in enumerate(chunks):
            lengths[index] = len(chunk)
            for place, frame in enumerate(chunk):
                frames[index, place] = frame.image
        frames, lengths = jax.device_put((frames, lengths), self._split)
        states, out = self._advance(self._params, self._policy, frames, prompts, states, lengths)
        return states, out.masks


@functools.cache
def _program(model: SAM2, at_once: int, split: NamedSharding) -> Callable[..., Any]:
    """`track` from states that know all prompts ahead; each device tracks videos of its own."""

    def program(params, policy, frames, prompts, states, lengths):
        options = {"policy": policy, "look_ahead": False, "frames_at_once": at_once}
        return track(model, params, frames, prompts, states, lengths=lengths, **options)

    everywhere = PartitionSpec()
    specs = (everywhere, everywhere, *4 * [split.spec])
    return jax.jit(
        jax.shard_map(
            program, mesh=split.mesh, in_specs=specs, out_specs=split.spec, check_vma=False
        )
    )


@functools.partial(jax.jit, static_argnums=1)
def _masks_at_size(logits: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Logits [V, T, N, h, w] -> bool [V, T, N, H, W]; a frame at a time, as they are large."""
    by_frame = jax.lax.map(lambda x: resize_masks(x, size) > 0, jnp.moveaxis(logits, 1, 0))
    return jnp.moveaxis(by_frame, 0, 1)
