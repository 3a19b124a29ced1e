"""How things show themselves: short reprs, quiet libraries."""

import ast
import logging

import jax
import jax.numpy as jnp
import numpy as np

import sam2jax
from sam2jax import Prompts, memory
from sam2jax.cli.session import log_shown
from sam2jax.testing import random_params, small_config
from tests.conftest import ROOT

MODEL = sam2jax.SAM2(small_config(image_size=64))
STATE = sam2jax.init_state(MODEL, 2, 9, policy=memory.samurai())


def test_model_state_and_outputs_show_themselves_in_short():
    assert repr(MODEL) == "SAM2(small_test, image_size=64, dtype=float32)"
    shown = repr(STATE)
    assert shown.startswith("TrackState(bank=MemoryBank(13 arrays [2, ...] of ")
    assert "frame_index=0, num_frames=9" in shown and len(shown) < 300
    bank = repr(STATE.bank)
    assert "recent_spatial=bfloat16[2, 6, 16, 16]" in bank and len(bank) < 500
    shapes = [(2, 16, 16), (2,), (2,), (2,), (2, 7), (2, 16)]
    output = sam2jax.FrameOutput(*map(jnp.zeros, shapes))
    assert repr(output).startswith("FrameOutput(masks=float32[2, 16, 16], iou=float32[2], ")
    assert "explanation" not in repr(output)
    prompts = Prompts.make(points=[[(1, 2), (3, 4)], None])
    assert repr(prompts).startswith("Prompts(points=float32[2, 2, 2], labels=int32[2, 2], ")
    assert "choose=_choose" in repr(memory.samurai()) and "alpha=0.25" in repr(memory.samurai())


def test_what_has_no_numbers_shows_itself_too():
    """What is traced, only a shape, given away, or something else."""
    shown = []

    @jax.jit
    def see(state):
        shown.append(repr(state))
        return state.frame_index

    see(STATE)
    assert "frame_index=int32[]" in shown[0]
    assert "frame_index=int32[]" in repr(jax.eval_shape(lambda: STATE))
    given_away = STATE.replace(frame_index=jnp.int32(3))
    given_away.frame_index.delete()
    assert "frame_index=int32[]" in repr(given_away)
    assert repr(jax.tree.map(lambda _: None, STATE)).startswith("TrackState(")
    assert "bank=object" not in repr(jax.tree.map(np.shape, STATE))


def test_the_command_line_shows_the_log_and_the_library_prints_nothing(capsys):
    log = logging.getLogger("sam2jax.training.loop")
    log.info("step %d", 1)
    assert capsys.readouterr().out == ""
    others = logging.StreamHandler()  # of a library that shows all logs
    logging.getLogger().addHandler(others)
    with log_shown():
        log.info("step %d", 2)
    logging.getLogger().removeHandler(others)
    assert tuple(capsys.readouterr()) == ("step 2\n", "")
    assert not log.isEnabledFor(logging.INFO)
    for path in (ROOT / "sam2jax").rglob("*.py"):
        if "cli" not in path.parts:
            calls = [
                n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
            ]
            names = {ast.unparse(call) for call in calls}
            assert not names & {"print", "tqdm.write"}, path


def test_sessions_show_themselves():
    predictor = sam2jax.SAM2VideoPredictor(MODEL, random_params(MODEL.config, 0))
    state = predictor.init_state(np.zeros((3, 48, 80, 3), np.uint8))
    assert repr(state) == (
        "InferenceState(the array, 80x48, obj_ids=[], prompted frames=[], 0 frames tracked)"
    )
