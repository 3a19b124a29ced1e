"""Random sequences of calls to the official video predictor and to ours.

$SAM2JAX_SESSIONS asks for more sequences (of each model) than these few.
"""

import contextlib
import os
import pathlib
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sam2jax.config import NO_POSTPROCESSING
from sam2jax.predictors.video import PREDICTOR_OPTIONS
from sam2jax.testing import small_config
from tests.parity.clips import SMALL, ellipse, load_clip
from tests.parity.pairs import pair
from tests.parity.sessions import SIZE, Both, Refused

pytestmark = pytest.mark.parity

LENGTH = 8  # of the clip, in frames
MODELS = {
    "2.1": {},
    "2.0": {"no_obj_embed_spatial": False, "add_tpos_enc_to_obj_ptrs": False},
    "2.1, no postprocessing": NO_POSTPROCESSING,
    "2.1, few memories": {
        "num_maskmem": 3,
        "memory_temporal_stride_for_eval": 2,
        "max_cond_frames_in_attn": 3,
    },
}
MASKS = [ellipse(*SIZE), ellipse(64, 64), ~ellipse(20, 30), np.zeros((8, 8), bool)]

frames = st.integers(0, LENGTH - 1)
objects = st.sampled_from(["a", 7, "m"])
x, y = st.integers(0, SIZE[1]), st.integers(0, SIZE[0])
points = st.lists(st.tuples(x, y, st.integers(0, 1)), min_size=1, max_size=3)
# Width and height are drawn, so that corners are in order.
boxes = st.tuples(
    st.integers(0, 50), st.integers(0, 30), st.integers(5, 40), st.integers(5, 20)
).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


def prompt(name: str, **given: Any) -> st.SearchStrategy:
    where = {"frame_idx": frames, "obj_id": objects}
    return st.tuples(st.just(name), st.fixed_dictionaries({**where, **given}))


def clicks(**given: Any) -> st.SearchStrategy:
    """Points are split into positions and labels."""

    def split(call: tuple) -> tuple:
        name, arguments = call
        rows = arguments.pop("rows")
        arguments |= {"points": [p[:2] for p in rows], "labels": [p[2] for p in rows]}
        return name, arguments

    return prompt("add_new_points_or_box", rows=points, **given).map(split)


PROMPTS = st.one_of(
    clicks(),
    clicks(clear_old_points=st.just(False)),
    clicks(box=boxes),
    prompt("add_new_points_or_box", box=boxes),
    prompt("add_new_mask", mask=st.sampled_from(MASKS)),
)
TRACKING = st.tuples(
    st.just("propagate_in_video"),
    st.fixed_dictionaries(
        {"reverse": st.booleans()},
        optional={
            "start_frame_idx": frames,
            "max_frame_num_to_track": st.integers(0, LENGTH),
            "after": st.integers(1, 5),  # frames, then it is broken off
        },
    ),
)
CLEARING = prompt("clear_all_prompts_in_frame")
REMOVAL = st.tuples(st.just("remove_object"), st.fixed_dictionaries({"obj_id": objects}))
RESET = st.just(("reset_state", {}))
OTHERS = st.one_of(CLEARING, REMOVAL, RESET)
ROUND = st.tuples(
    st.lists(PROMPTS, min_size=1, max_size=3),
    st.lists(CLEARING, max_size=1),
    st.lists(TRACKING, min_size=1, max_size=2),
    st.lists(OTHERS, max_size=1),
).map(lambda parts: [call for part in parts for call in part])
SEQUENCES = st.lists(ROUND, min_size=2, max_size=3).map(lambda rounds: sum(rounds, []))
SWITCHES = [name for name in PREDICTOR_OPTIONS if name != "policy"]
OPTIONS = st.fixed_dictionaries({name: st.booleans() for name in SWITCHES})


@pytest.mark.parametrize("model", MODELS)
def test_random_sessions(media: pathlib.Path, model: str):
    config = small_config(image_size=64, **MODELS[model])
    clip = load_clip(media, config.image_size, LENGTH)

    @hypothesis.seed(list(MODELS).index(model))
    @hypothesis.settings(
        max_examples=int(os.environ.get("SAM2JAX_SESSIONS", 15)), deadline=None, database=None
    )
    @hypothesis.given(calls=SEQUENCES, options=OPTIONS)
    def agree(calls: list[tuple[str, dict]], options: dict[str, bool]) -> None:
        both = Both(pair(config, seed=4), clip, SMALL, **options)
        with contextlib.suppress(Refused):
            run(both, calls)

    agree()


def run(both: Both, calls: list[tuple[str, dict]]) -> None:
    """Makes the calls, up to one that is refused or that rounding decides."""
    for name, given in calls:
        frame, obj = given.get("frame_idx"), given.get("obj_id")
        if name == "clear_all_prompts_in_frame" and obj not in both.our_state["obj_ids"]:
            continue  # the official predictor adds an object that has nothing; ours refuses
        both.call(name, **given)
        if name.startswith("add_new") and both.is_undecided(frame, obj):
            return
