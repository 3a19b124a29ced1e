"""The command line: what is typed, what is written, and what is refused."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

import sam2jax
from sam2jax import convert
from sam2jax.cli import app, loop
from sam2jax.cli.prompts import check_against_video, read_prompts, to_prompts
from sam2jax.cli.session import cache_folder
from sam2jax.config import HieraConfig, MemoryAttentionConfig
from sam2jax.convert import layouts
from sam2jax.io.masks import mask_writer
from sam2jax.io.video import open_video
from sam2jax.loading import load
from sam2jax.memory import SAM2
from sam2jax.testing import draw, small_config
from tests.clips import number, write_clip, write_folder
from tests.conftest import ROOT
from tests.test_io import broken_videos

CONFIG = small_config(
    trunk=HieraConfig(
        embed_dim=16, stages=(1, 1, 1, 1), global_att_blocks=(2,), window_spec=(4, 4, 4, 4)
    ),
    memory_attention=MemoryAttentionConfig(num_layers=1, mlp_dim=32),
    image_size=64,
)


def write_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    shapes = layouts.expected_shapes(CONFIG, "official")
    state = {name: draw(name, shape, seed=6) for name, shape in shapes.items()}  # object present
    path = folder / "model.safetensors"
    convert.write(path, layouts.to_params(state, "official"), CONFIG)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def sam2jax_cli(tmp_path, monkeypatch):
    return commands_in_an_empty_folder(tmp_path, monkeypatch)


def commands_in_an_empty_folder(tmp_path, monkeypatch):
    """Runs a command there, without changing where this process keeps programs."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


def refused(result, *words: str) -> None:
    """A message of at most two lines, exit code 2, and nothing written."""
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ") and result.output.count("\n") <= 2
    for word in words:
        assert word in result.output
    assert os.listdir() == []


# What is typed -----------------------------------------------------------------------------------


def test_prompts_are_read():
    table = read_prompts(
        ["210,350", "1.5,-2,0@2:15", "5,6:15", "7,8@2:15"], ["1,2,3,4@3", "0,0,9,9"]
    )
    assert table.object_ids == [1, 2, 3] and sorted(table.frames) == [0, 15]
    first, later = table.frames[0], table.frames[15]
    assert (first[1].points, first[1].labels, first[1].box) == ([(210, 350)], [1], (0, 0, 9, 9))
    assert (later[2].points, later[2].labels) == ([(1.5, -2), (7, 8)], [0, 1])
    assert later[1].points == [(5, 6)] and first[3].box == (1, 2, 3, 4)


def test_paths_of_masks_may_hold_the_signs_of_prompts():
    (objects,) = read_prompts(masks=["C:\\a@b\\m:1.png@2"]).frames.values()
    assert objects[2].mask == pathlib.Path("C:\\a@b\\m:1.png")


def test_prompts_from_a_file(tmp_path):
    entries = [
        {"points": [[210, 350], [250, 220]], "labels": [1, 0]},
        {"object": 2, "frame": 5, "box": [1, 2, 3, 4], "points": [[2, 3]]},
        {"object": 3, "mask": "m.png"},
    ]
    (tmp_path / "p.json").write_text(json.dumps(entries))
    table = read_prompts(["9,9"], file=tmp_path / "p.json")
    assert table.frames[0][1].labels == [1, 1, 0]
    assert table.frames[5][2].box == (1, 2, 3, 4) and table.frames[5][2].points == [(2, 3)]
    assert table.frames[0][3].mask == tmp_path / "m.png"


@pytest.mark.parametrize(
    "given,words",
    [
        ({}, "no prompt.* --prompts"),
        ({"points": ["1"]}, "expected X,Y"),
        ({"points": ["1,2,3,4"]}, "expected X,Y"),
        ({"points": ["a,b"]}, "expected X,Y"),
        ({"points": ["1,2@cat"]}, "expected X,Y"),
        ({"points": ["nan,2"]}, "finite"),
        ({"points": ["1,inf"]}, "finite"),
        ({"points": ["1,2,4"]}, "label 4"),
        ({"points": ["1,2,0.5"]}, "label 0.5"),
        ({"points": ["1,2:-1"]}, "frame -1"),
        ({"points": ["1,2@0"]}, "object 0"),
        ({"points": ["1,2@256"]}, "object 256"),
        ({"boxes": ["1,2,3"]}, "expected X0,Y0"),
        ({"boxes": ["1,2,nan,4"]}, "finite"),
        ({"boxes": ["5,2,3,4"]}, "is empty"),
        ({"boxes": ["1,2,3,4", "1,2,3,5"]}, "two boxes on frame 0"),
        ({"masks": ["a.png", "b.png"]}, "two masks on frame 0"),
        ({"masks": ["a.png"], "points": ["1,2"]}, "a mask and points"),
        (
            {"masks": ["a.png@2:3"], "boxes": ["1,2,3,4@2:3"]},
            "a mask and points or a box on frame 3",
        ),
    ],
)
def test_bad_prompts_are_refused(given, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        read_prompts(**given)


@pytest.mark.parametrize(
    "content,words",
    [
        ("{", "not JSON"),
        ("{}", "expected a list"),
        ("[3]", "entry 0: expected an object"),
        ('[{"point": [1, 2]}]', "entry 0: expected an object"),
        ('[{"object": 1}]', "no prompt"),
        ('[{"points": [[1, 2, 3]]}]', "2 finite numbers"),
        ('[{"points": [1, 2]}]', "2 finite numbers"),
        ('[{"points": [[1, NaN]]}]', "2 finite numbers"),
        ('[{"points": [[1, 2]], "labels": [1, 0]}]', "2 labels"),
        ('[{"points": [[1, 2]], "labels": ["a"]}]', "label"),
        ('[{"points": [[1, 2]], "frame": "a"}]', "whole numbers"),
        ('[{"points": 3}]', "entry 0: points must be a list, got 3"),
        ('[{"points": [], "labels": null}]', "entry 0: labels must be a list, got None"),
        ('[{"box": [1, 2, 3]}]', "4 finite numbers"),
        ('[{"box": null}]', "4 finite numbers"),
        ('[{"mask": 3}]', "entry 0"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path, content, words):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_prompts(file=tmp_path / "p.json")


def test_prompts_past_the_end_are_refused():
    with pytest.raises(ValueError, match="frame 12.*12 frames"):
        check_against_video(read_prompts(["1,2:12"]), 12, "clip.mp4")


def test_prompts_for_the_tracker():
    mask = np.ones((48, 64), bool)
    table = read_prompts(["8,12@2", "10,20,0@2:3"], ["0,0,32,24:3"], ["m.png@5:3"])
    made = to_prompts(table, {(3, 5): mask}, (0.5, 0.25))
    assert sorted(made) == [0, 3]
    assert made[0].kind.tolist() == [0, 1, 0] and made[3].kind.tolist() == [1, 1, 1]
    assert made[0].points.shape == made[3].points.shape == (3, 2, 2)  # one width for all frames
    assert made[0].points[1, 0].tolist() == [4, 3]
    assert made[3].points[0].tolist() == [[0, 0], [16, 6]]
    assert made[3].labels[0].tolist() == [2, 3] and made[3].labels[1, 0] == 0
    assert made[0].has_mask is None and made[3].has_mask.tolist() == [False, False, True]


# The loop ----------------------------------------------------------------------------------------


@pytest.fixture
def fake_tracker(monkeypatch):
    """A tracker that answers with the brightness of its frame, and notes how it was called."""
    calls = []

    def init_state(model, num_objects, *, num_frames, max_cond_frames, frame_index, policy):
        calls.append(("init", num_objects, num_frames, max_cond_frames, frame_index))
        return frame_index

    def condition(model, params, state, frame, prompts, frame_index, *, reverse, policy):
        calls.append(("condition", number(np.asarray(frame)), frame_index, reverse))
        return state

    def step(model, params, state, frame, prompts, *, reverse, policy):
        calls.append(("step", number(np.asarray(frame)), state, prompts is not None))
        row = jnp.where(jnp.arange(16) <= state, 1.0, -1.0)
        masks = jnp.broadcast_to(row[None, :, None], (2, 16, 16))
        output = sam2jax.FrameOutput(masks, *[jnp.ones(2)] * 5)
        return state + (-1 if reverse else 1), output

    for function in (init_state, condition, step):
        monkeypatch.setattr(sam2jax, function.__name__, function)
    return calls


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
def test_results_come_in_order_of_time(tmp_path, fake_tracker, reverse, original):
    video = open_video(write_clip(tmp_path / "clip.mp4", height=16, width=16), 32)
    prompts = to_prompts(read_prompts(["1,2:3", "1,2@2:8"]), {}, (1, 1))
    shown = []
    job = loop.Job(None, None, video, prompts, SAM2, reverse)
    results = list(loop.run(job, original=original, bar=lambda it: shown.append(1) or it))
    assert [result.index for result in results] == list(range(12)) and shown == [1]
    tracked = range(9) if reverse else range(3, 12)
    assert job.indices == tracked
    for result in results:
        assert (result.masks is not None) == (result.index in tracked)
        assert (result.original is not None) == original
        if result.original is not None:
            assert number(result.original) == result.index
        if result.masks is not None:
            assert result.masks.dtype == np.bool_ and result.masks.shape == (2, 16, 16)
            assert result.masks[0, :, 0].sum() == result.index + 1
    with mask_writer(tmp_path / "clip_manual.json") as out:  # takes them in order of time only
        for result in results:
            if result.masks is not None:
                out.write(result.index, str(result.index), [1, 2], result.masks)
    first, other = (8, 3) if reverse else (3, 8)
    assert fake_tracker[:2] == [("init", 2, 12, 2, first), ("condition", other, other, reverse)]
    order = reversed(tracked) if reverse else tracked
    assert fake_tracker[2:] == [("step", i, i, i in (3, 8)) for i in order]


def all_results(video, prompts: list[str], reverse: bool) -> list[loop.Result]:
    given = to_prompts(read_prompts(prompts), {}, (1, 1))
    job = loop.Job(None, None, video, given, SAM2, reverse)
    return list(loop.run(job, original=False, bar=lambda frames: frames))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("prompts", [["1,2:13"], ["1,2:3", "1,2:13"]])
def test_a_prompt_behind_the_last_frame_is_told(tmp_path, fake_tracker, reverse, prompts):
    """Headers may promise more frames than there are."""
    video = open_video(write_clip(tmp_path / "clip.mp4", height=16, width=16), 32)
    video.num_frames = 15
    with pytest.raises(ValueError, match=r"a prompt on frame 13, but .*clip.mp4 ends before"):
        all_results(video, prompts, reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_frame_that_is_not_there_has_no_masks(fake_tracker, monkeypatch, reverse):
    video = open_video(np.zeros((6, 16, 16, 3), np.uint8))
    read = video._read
    monkeypatch.setattr(video, "_read", lambda index: read(index if index != 2 else 6))
    results = all_results(video, ["1,2:4", "1,2@2"], reverse)
    tracked = [0, 1, 3, 4] if reverse else [0, 1, 3, 4, 5]
    assert [result.index for result in results if result.masks is not None] == tracked


# End to end --------------------------------------------------------------------------------------


PROMPT = ("--point", "20,30:1", "--point", "40,20,0:1")


def test_track(tmp_path, sam2jax_cli, checkpoint):
    """The whole way, against `sam2jax.step` on the same frames."""
    frames = write_folder(tmp_path / "frames", [f"{i:05d}.png" for i in range(7)])
    result = sam2jax_cli(
        "track", frames, "--checkpoint", checkpoint, *PROMPT, "--out", "out.mp4", "--masks", "masks"
    )
    assert result.exit_code == 0, result.output
    assert "6/6" in result.output and "frames/s" in result.output
    assert sorted(os.listdir()) == ["masks", "out.mp4"]
    assert sorted(os.listdir("masks")) == [f"{i:05d}.png" for i in range(1, 7)]
    film = open_video("out.mp4")
    assert (len(film), film.height, film.width) == (7, 48, 64)

    model, params = load(checkpoint)
    prompts = sam2jax.Prompts.make(
        points=[[(20, 30 * 64 / 48), (40, 20 * 64 / 48)]], labels=[[1, 0]]
    )
    state = sam2jax.init_state(model, 1, num_frames=7, max_cond_frames=1, frame_index=1)
    for frame in open_video(frames, 64).frames(1):
        given = prompts if frame.index == 1 else None
        state, answer = sam2jax.step(model, params, state, jnp.asarray(frame.image), given)
        logits = np.asarray(sam2jax.resize_masks(answer.masks, (48, 64)))[0]
        assert (logits > 0).any() and (logits < 0).any()
        with Image.open(f"masks/{frame.index:05d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image) == 1, logits > 0)


@pytest.mark.slow
def test_track_with_another_policy(tmp_path, sam2jax_cli, checkpoint):
    frames = write_folder(tmp_path / "frames", [f"{i:05d}.png" for i in range(4)])
    given = ["track", frames, "--checkpoint", checkpoint, "--point", "20,30", "-q"]
    for policy in ("samurai:alpha=0.15,stable_frames=2", "sam2long:lineages=2"):
        result = sam2jax_cli(*given, "--masks", "masks.npz", "--policy", policy)
        assert result.exit_code == 0, result.output
        with np.load("masks.npz") as masks:
            assert len(masks.files) >= 4
        os.remove("masks.npz")
    for policy, message in (
        ("nothing", "there are sam2, sam3_score"),
        ("samurai:beta=1", "alpha"),
        ("samurai:alpha", "alpha"),
        ("samurai:alpha=x", "alpha"),
        ("sam2long:lineages=0", "lineages"),
    ):
        result = sam2jax_cli(*given, "--masks", "masks.npz", "--policy", policy)
        assert result.exit_code == 2 and message in result.output, result.output
        assert os.listdir() == []


def test_what_export_refuses(sam2jax_cli, checkpoint):
    for given, message in (
        (["--frame-size", "720"], "HEIGHTxWIDTH"),
        (["--frame-size", "0x10"], "at least 1"),
        (["--objects", "0"], "at least 1"),
        (["--platform", "metal"], "metal"),
    ):
        result = sam2jax_cli("export", checkpoint, "out", *given)
        assert result.exit_code == 2 and message in result.output
        assert os.listdir() == []


def test_failure_half_way_leaves_nothing_behind(tmp_path, sam2jax_cli, checkpoint):
    broken_videos(tmp_path)
    for masks in ("masks", "masks.json", "masks.npz"):
        outputs = ("--out", "out.mp4", "--masks", masks, "--quiet")
        result = sam2jax_cli(
            "track", tmp_path / "damaged.mp4", "--checkpoint", checkpoint, *PROMPT, *outputs
        )
        refused(result, "damaged at frame")


def test_track_refuses_bad_input(tmp_path, sam2jax_cli, checkpoint):
    clip = write_clip(tmp_path / "clip.mp4")
    point, out = ("--point", "9,9"), ("--out", "out.mp4")

    def track(video, *options, model=checkpoint):
        return sam2jax_cli("track", video, "--checkpoint", model, *options)

    refused(track(clip, *out), "no prompt")
    refused(track(clip, *point), "nothing to write")
    refused(track(clip, "--point", "9,9,7", *out), "label 7")
    refused(track(clip, "--point", "9,9:12", *out), "frame 12", "12 frames")
    refused(track(clip, "--point", "9,49", *out), "point 9,49 of object 1", "64x48 pixels")
    refused(track(clip, "--box", "70,9,90,20@2", *out), "box 70,9,90,20 of object 2")
    refused(track(clip, "--mask", "no.png", *out), "no file no.png")
    refused(track(clip, "--prompts", "no.json", *out), "no file no.json")
    refused(track(clip, *point, "--out", "out.gif"), "must end in .mp4")
    refused(track(clip, *point, "--out", "no/out.mp4"), "does not exist")
    refused(track(clip, *point, "--masks", "masks.zip"), "must end in .json")
    refused(track(clip, *point, *out, "--masks", "no/masks.json"), "does not exist")
    refused(track(clip, *point, "--out", clip), "is the input")
    (tmp_path / "prompts.json").write_text('[{"object": 1, "frame": 0, "points": [[9, 9]]}]')
    given = clip, "--prompts", tmp_path / "prompts.json"
    refused(track(*given, "--masks", tmp_path / "prompts.json"), "prompts.json is the input")
    for picture in ("no/explain.png", tmp_path):
        refused(track(clip, *point, *out, "--explain", picture), "--explain")
    refused(track(tmp_path / "no.mp4", *point, *out), "there is no video")
    for name, words in broken_videos(tmp_path).items():
        if name != "damaged.mp4":  # which shows later
            refused(track(tmp_path / name, *point, *out), name, words)
    (tmp_path / "empty").mkdir()
    refused(track(tmp_path / "empty", *point, *out), "holds no frames")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "small.png")
    refused(track(clip, "--mask", tmp_path / "small.png", *out), "8x8", "64x48")
    refused(track(tmp_path / "small.png", *point, *out), "is a picture; use sam2jax segment")
    # What concerns the model comes last.
    refused(track(clip, *point, *out, model="no.pt"), "no.pt")
    refused(track(clip, *point, *out, model=clip), "clip.mp4")
    refused(track(clip, *point, *out, "--image-size", 65), "multiple of 32")
    assert clip.exists()


def test_track_refuses_a_model_for_images_only(tmp_path, sam2jax_cli):
    config = dataclasses.replace(CONFIG, images_only=True)
    shapes = layouts.expected_shapes(config, "sam2jax")
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    convert.write(tmp_path / "images.safetensors", params, config)
    clip = write_clip(tmp_path / "clip.mp4")
    options = ("--point", "9,9", "--out", "out.mp4")
    result = sam2jax_cli("track", clip, "--checkpoint", tmp_path / "images.safetensors", *options)
    refused(result, "images only")


def test_mistyped_options_exit_with_2(sam2jax_cli):
    for arguments in (["track"], ["track", "a.mp4"], ["fly"], ["track", "a", "--dtype", "int8"]):
        assert sam2jax_cli(*arguments).exit_code == 2


def test_info(sam2jax_cli, checkpoint):
    result = sam2jax_cli("info", checkpoint)
    assert result.exit_code == 0
    model, params = load(checkpoint)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert "small_test" in result.output and f"{total:,}" in result.output
    assert "image size  64" in result.output and "memory_attention" in result.output
    listed = sam2jax_cli("info", checkpoint, "--shapes").output
    for path, leaf in jax.tree.leaves_with_path(params):
        name = "/".join(key.key for key in path)
        assert f"{name}  {list(leaf.shape)}" in listed
    refused(sam2jax_cli("info", "no.pt"), "no.pt")


def test_convert(sam2jax_cli, checkpoint):
    result = sam2jax_cli("convert", checkpoint, "model.pt", "--verify")
    assert result.exit_code == 0 and "read again: 0" in result.output
    assert sam2jax_cli("info", "model.pt").exit_code == 0
    os.remove("model.pt")
    refused(sam2jax_cli("convert", "no.pt", "model.pt"), "no.pt")


COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS if name != "bench")])
def test_help(sam2jax_cli, command):
    """With an example of the command that it is about."""
    result = sam2jax_cli(*command, "--help")
    assert result.exit_code == 0
    examples = result.output.partition("Example")[2]
    assert " ".join(["\n    sam2jax", *command]) in examples


def test_shells_complete_commands_and_options():
    def completed(line: str, shell: str = "bash") -> str:
        typed = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        result = CliRunner().invoke(
            app, [], prog_name="sam2jax", env={"_SAM2JAX_COMPLETE": f"complete_{shell}", **typed}
        )
        return result.output

    assert {"track", "track-all", "train"} <= set(completed("sam2jax tr").split())
    assert "--checkpoint" in completed("sam2jax track --ch").split()
    source = {"_SAM2JAX_COMPLETE": "source_zsh"}
    assert "compdef" in CliRunner().invoke(app, [], prog_name="sam2jax", env=source).output


def test_version(sam2jax_cli):
    assert sam2jax_cli("--version").output == f"sam2jax {sam2jax.__version__}\n"


def test_the_command_line_itself_starts_light():
    """Help needs nothing heavy; the package's own head is left out of what is looked at."""
    code = """
import sys, types
package = types.ModuleType("sam2jax")
package.__path__ = ["sam2jax"]
sys.modules["sam2jax"] = package
from sam2jax.cli import app
app(["track", "--help"], standalone_mode=False)
heavy = ("jax", "flax", "av", "PIL", "torch", "numpy")
print(*[name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--checkpoint" in done.stdout and done.stderr.split() == []


def test_module_runs_and_programs_are_kept(tmp_path):
    code = """
import sys, runpy, jax
from sam2jax.cli.session import keep_compiled_programs
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1)
sys.argv[1:] = ["--version"]
runpy.run_module("sam2jax", run_name="__main__")
"""
    environment = {**os.environ, "SAM2JAX_CACHE": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stdout == f"sam2jax {sam2jax.__version__}\n"
    assert any((tmp_path / "xla").iterdir())


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SAM2JAX_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("SAM2JAX_CACHE", "~/own")
    assert cache_folder() == pathlib.Path.home() / "own"
    monkeypatch.delenv("SAM2JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sam2jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == pathlib.Path.home() / ".cache" / "sam2jax"
