"""Checkpoints of a run (Orbax): written while training goes on, and taken up again exactly."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from sam2jax.training.step import TrainState


class Checkpoints:
    """The folder of a run's checkpoints, of which the latest `keep` stay.

    One is the state, its frozen parameters too, and where the data were. It appears whole or not
    at all. Leave with `close`, or as a context, so that what is being written is waited for.
    """

    def __init__(self, folder: pathlib.Path, keep: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        training: Any = ocp.training
        self._checkpointer = training.Checkpointer(
            folder.absolute(),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        with _undisturbed():
            self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """After how many steps the newest one was written."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Begins to write; training may go on, and give the state's memory away."""
        with _undisturbed():
            self._checkpointer.save_async(step, state, custom_metadata={"data": json.dumps(data)})

    def load(self, like: Any) -> tuple[TrainState, dict[str, Any]]:
        """The newest one, with the shapes and shardings of `like`, and where the data were.

        Raises:
          ValueError: it has other parts or shapes than `like`, or is damaged.
        """
        metadata: Any = self._checkpointer.metadata(self.latest).custom_metadata
        try:
            state: Any = self._checkpointer.load(self.latest, like)
        except Exception as error:  # of kinds that Orbax does not tell
            raise ValueError(
                f"the checkpoint after step {self.latest} in {self._folder} is not of this "
                "configuration (its model, freeze, lora or optimizer), or is damaged; resume with "
                "the configuration that it was written with, or start in another folder."
            ) from error
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(state)), json.loads(
            metadata["data"]
        )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Puts off Ctrl-C and termination: where Orbax is left while it begins to write, or before it
    has ended, its threads keep the process for ever."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])
