"""Several videos at once: ours in one program, the official package one after another."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import sam2jax
from benchmarks.checks import believe, believed
from benchmarks.settings import Settings
from benchmarks.timing import Row, compare
from benchmarks.track import Official, Ours, noise


def rows(settings: Settings) -> Iterator[Row]:
    """Seconds for a frame of every video, all with one object and a full bank."""
    config = settings.first
    frames = noise(config, config.max_obj_ptrs_in_encoder + 1)
    ours = Ours(config, frames)
    theirs = Official(config, frames, settings.compiled) if settings.official else None
    one = theirs.frame() if theirs else None

    @jax.jit
    def together(params, states, images):
        def track(state, image):
            return sam2jax.step(ours.model, params, state, image)[1].masks

        return jax.vmap(track)(states, images)

    for count in settings.videos:
        states = jax.tree.map(lambda x, n=count: jnp.stack([x] * n), ours.full)
        images = jnp.stack([ours.frames[0]] * count)

        def mine(states=states, images=images):
            return jax.block_until_ready(together(ours.params, states, images))

        row = compare(
            f"{count} videos: frame of all",
            one and (lambda n=count: [one() for _ in range(n)]),
            mine,
            settings.runs,
        )
        # That bfloat16 is near enough is seen where one video is tracked.
        if one and config.dtype == "float32":
            given = f"{count} videos", np.asarray(mine())[-1], one()
            row = believed(row, functools.partial(believe, *given))
        yield row
