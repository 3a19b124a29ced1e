"""From sources to batches, with Grain: shuffled, sharded over processes, resumable.

The order of examples and what is drawn for each are functions of the seed and of an example's
place in the order alone: they do not depend on threads, nor on how often a run was stopped.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from sam2jax.training.data.augment import augment, resize
from sam2jax.training.data.clip import Clip, RawClip, pad_objects
from sam2jax.training.data.config import (
    DataConfig,
    FolderSource,
    ImagesSource,
    ProceduralSource,
    SAVSource,
    Source,
)
from sam2jax.training.data.folders import FolderReader
from sam2jax.training.data.images import ImagesReader
from sam2jax.training.data.procedural import procedural_clip
from sam2jax.training.data.sampling import NothingToSample, Reader
from sam2jax.training.data.sav import SAVReader

_log = logging.getLogger(__name__)

_REPLACEMENTS = 100  # examples in a row that cannot be used and are replaced, as officially


class Loader(Iterator[Clip]):
    """Batches of clips, [B] in front. `make_loader` makes one."""

    def __init__(self, iterator: Any, examples: Examples, order: dict[str, Any]):
        self._iterator, self._examples, self._order = iterator, examples, order

    def __next__(self) -> Clip:
        return next(self._iterator)

    def close(self) -> None:
        """Ends what prepares batches ahead."""
        self._iterator.close()

    @property
    def damaged(self) -> tuple[str, ...]:
        """What was skipped so far, one message for each damaged file."""
        return tuple(self._examples.damaged)

    def get_state(self) -> dict[str, Any]:
        """Where the loader is, for JSON: Grain's state, and what the order depends on."""
        return {"order": dict(self._order), "grain": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from where `get_state` was called.

        Raises:
          ValueError: that loader put its examples in another order.
        """
        if state["order"] != self._order:
            raise ValueError(
                f"the saved data order is {state['order']}, and this run's is {self._order}; "
                "resume with the same seed, data, batch size and numbers of processes."
            )
        self._iterator.set_state(state["grain"])


def make_loader(
    config: DataConfig,
    *,
    image_size: int,
    num_frames: int,
    max_objects: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_epochs: int | None = None,
    workers: int = 0,
    processes: int = 0,
) -> Loader:
    """An iterator over batches of clips.

    Every process sees other clips, and the same number of batches; what is left at the end of the
    last epoch and fills no batch on every process is dropped.

    Args:
      config: the sources.
      image_size: S, of frames and masks.
      num_frames: T.
      max_objects: M; sources give at most so many objects.
      batch_size: B, for each process.
      seed: of the order, of what is drawn from each example, and of augmentation.
      process_index: of this process.
      process_count: of processes that train together.
      num_epochs: when to stop; None: never.
      workers: threads that read and augment ahead; 0: none.
      processes: that share the batches among them, each with as many workers, for data that take
        Python's time; 0: this one alone. What they skip as damaged, each counts for itself.

    Raises:
      FileNotFoundError: a source's folder or list does not exist.
      ValueError: a source is empty, sizes are not positive, or the epochs fill no batch; while
        iterating, more than `config.max_damaged` examples are damaged, or too many in a row.
    """
    import grain

    sizes = {
        "image_size": image_size,
        "num_frames": num_frames,
        "max_objects": max_objects,
        "batch_size": batch_size,
        "process_count": process_count,
        "num_epochs": 1 if num_epochs is None else num_epochs,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not 0 <= process_index < process_count or min(workers, processes, seed) < 0:
        raise ValueError(
            f"expected 0 <= process_index < {process_count}, and workers, processes and seed of at "
            f"least 0, got {process_index}, {workers}, {processes} and {seed}."
        )
    examples = Examples(config, image_size, num_frames, max_objects, seed)
    counts = [
        len(reader) * source.multiplier
        for reader, source in zip(examples.readers, config.sources, strict=True)
    ]
    places = _places(counts, [source.weight for source in config.sources], seed)
    if num_epochs is not None:
        together = batch_size * process_count
        whole = sum(counts) * num_epochs // together * together
        if not whole:
            raise ValueError(
                f"{num_epochs} epochs of {sum(counts)} clips do not fill a batch of {batch_size} "
                f"on {process_count} processes."
            )
        places = places[:whole]
    # A batch of all processes is the same clips in the same order, however many there are.
    batches = places.map_with_index(examples.load).batch(
        batch_size, drop_remainder=True, batch_fn=_stack
    )[process_index::process_count]
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    batches = batches.to_iter_dataset(options)
    if processes:
        _let_grain_start_processes()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(processes))
    order = {
        "seed": seed,
        "counts": counts,
        "weights": [source.weight for source in config.sources],
        "batch_size": batch_size,
        "process_count": process_count,
        "processes": processes,
    }
    return Loader(iter(batches), examples, order)


def _let_grain_start_processes() -> None:
    """It reads command line flags of Abseil's there, which are only set in programs of Abseil's."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class Examples:
    """Reads examples, and replaces what cannot be used; what is damaged is counted. Safe to share
    between threads."""

    def __init__(
        self, config: DataConfig, image_size: int, num_frames: int, max_objects: int, seed: int
    ):
        self._config, self._seed = config, seed
        self._size, self._num_frames, self._max_objects = image_size, num_frames, max_objects
        self.readers = [_reader(source, image_size) for source in config.sources]
        self.damaged: dict[str, None] = {}  # messages, in the order they came
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values, _lock=threading.Lock())

    def load(self, position: int, place: tuple[int, int]) -> Clip:
        """The clip at a position of the order: of a source's example, or of one in its stead."""
        which, index = place
        last: Exception | None = None
        source, reader = self._config.sources[which], self.readers[which]
        for attempt in range(_REPLACEMENTS):
            rng = _generator(self._seed, position, attempt)
            index = int(rng.integers(len(reader))) if attempt else index % len(reader)
            try:
                clip = reader.read(index, rng, self._num_frames, self._max_objects)
            except NothingToSample as error:
                _log.info("passed over an example: %s", error)
                last = error
                continue
            except (ValueError, OSError) as error:
                self._skip(str(error))
                last = error
                continue
            if source.augment:
                clip = augment(clip, self._config.augment, self._size, rng)
            return _finish(resize(clip, self._size), self._max_objects)
        raise ValueError(f"{_REPLACEMENTS} examples in a row cannot be used; the last: {last}")

    def _skip(self, message: str) -> None:
        with self._lock:
            known = message in self.damaged
            self.damaged[message] = None
            count, most = len(self.damaged), self._config.max_damaged
        if not known:
            _log.warning("skipped a damaged example (%d of at most %d): %s", count, most, message)
        if count > most:  # known or not: another thread may be the first, and far ahead
            raise ValueError(
                f"{count} damaged examples, and max_damaged is {most}; the last: {message}"
            )


class ProceduralReader:
    """Clips of a `ProceduralSource`, with the first of a scene's objects: the target and others."""

    def __init__(self, source: ProceduralSource, image_size: int):
        self._source, self._size = source, image_size

    def __len__(self) -> int:
        return self._source.num_clips

    def read(
        self, index: int, rng: np.random.Generator, num_frames: int, max_objects: int
    ) -> RawClip:
        from PIL import Image

        seed = self._source.first_seed + index
        clip = procedural_clip(
            self._source.scene, seed, image_size=self._size, num_frames=num_frames
        )
        return RawClip([Image.fromarray(f) for f in clip.frames], clip.masks[:, :max_objects])


def _reader(source: Source, image_size: int) -> Reader:
    match source:
        case FolderSource():
            return FolderReader(source)
        case SAVSource():
            return SAVReader(source)
        case ImagesSource():
            return ImagesReader(source)
        case ProceduralSource():
            return ProceduralReader(source, image_size)


def _places(counts: list[int], weights: list[float | None], seed: int) -> Any:
    """The endless order of examples: (source, example), shuffled anew each epoch.

    Without weights an epoch has every example once; with them sources take turns in proportion,
    and each is gone through at its own pace.
    """
    import grain

    seeds = np.random.SeedSequence(seed).generate_state(len(counts) + 1).tolist()
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        ends = list(itertools.accumulate(counts))

        def locate(number: int) -> tuple[int, int]:
            which = bisect.bisect_right(ends, number)
            return which, number - (ends[which] - counts[which])

        return grain.MapDataset.range(sum(counts)).shuffle(seed=seeds[0]).map(locate).repeat()
    streams = [
        grain.MapDataset.range(count)
        .shuffle(seed=seeds[which + 1])
        .map(lambda number, which=which: (which, number))
        .repeat()
        for which, count in enumerate(counts)
    ]
    return grain.MapDataset.mix(streams, shares)


def _generator(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))


def _finish(clip: RawClip, max_objects: int) -> Clip:
    frames = np.stack([np.asarray(frame) for frame in clip.frames])
    return pad_objects(frames, clip.masks, max_objects)


def _stack(clips: Any) -> Clip:
    return Clip(*(np.stack(arrays) for arrays in zip(*clips, strict=True)))
