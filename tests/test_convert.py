"""The converter: tables there and back, every format, and nothing left half done."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from sam2jax import convert
from sam2jax.config import NANO, VARIANTS, SAM2Config
from sam2jax.convert import huggingface, huggingface_files, layouts, torch_file
from sam2jax.convert.__main__ import main
from sam2jax.convert.rules import OFFICIAL, Rule, move_axes, rename, shorten
from sam2jax.convert.verify import largest_difference
from sam2jax.testing import draw, small_config
from tests.conftest import PUBLISHED, ROOT

GOLDEN = json.loads((ROOT / "tests/goldens/checkpoint_keys.json").read_text())
# `transformers` fixes the memory's width.
SMALL = small_config(hidden_dim=64, mem_dim=64)


def official_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """What an official checkpoint holds. The golden file has what they share only once."""
    version, size = variant.split("_hiera_")
    parts = ("every", size, *(["sam2.1"] if version == "sam2.1" else []))
    return {key: tuple(shape) for part in parts for key, shape in GOLDEN[part].items()}


def hollow(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Arrays that have a shape and take no room."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


def shapes_of(tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {key: value.shape for key, value in tensors.items()}


def live(config: SAM2Config = SMALL) -> dict[str, np.ndarray]:
    """A whole official state dict with different numbers everywhere."""
    shapes = layouts.expected_shapes(config, "official")
    return {key: draw(key, shape) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return live()


@pytest.fixture
def source(tmp_path: pathlib.Path, state: dict[str, np.ndarray]) -> pathlib.Path:
    """A `.pt` file of a small model, in a folder of its own."""
    folder = tmp_path / "source"
    folder.mkdir()
    convert.write(folder / "small.pt", layouts.to_params(state, "official"), SMALL)
    return folder / "small.pt"


def test_a_checkpoint_is_not_written_over_itself(source):
    before = source.read_bytes()
    with pytest.raises(ValueError, match="is the source"):
        convert.convert(source, source)
    assert source.read_bytes() == before


def test_a_rounded_copy(state, source, tmp_path):
    """In half the bytes: each number is the nearest of bfloat16."""
    for name, to in (("half.safetensors", None), ("half.pt", None), ("half", "orbax")):
        summary = convert.convert(source, tmp_path / name, to, verify=True, dtype="bfloat16")
        again = convert.read(tmp_path / name)
        assert {value.dtype for value in again.tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
        worst = 0.0
        for key, value in layouts.from_params(again.params(), "official").items():
            rounded = state[key].astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(value, rounded, err_msg=key)
            worst = max(worst, float(np.abs(rounded - state[key]).max()))
        assert summary.largest_difference == pytest.approx(worst)
    sizes = [path.stat().st_size for path in (tmp_path / "half.safetensors", source)]
    assert sizes[0] < 0.6 * sizes[1]


def test_the_nano_model_is_known_by_its_names_and_shapes():
    for layout in ("official", "sam2jax", "huggingface"):
        tensors = hollow(layouts.expected_shapes(NANO, layout))
        assert layouts.identify(tensors, layout) == NANO


# Tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PUBLISHED)
def test_official_checkpoints_convert_there_and_back(variant: str):
    shapes = official_shapes(variant)
    tensors = hollow(shapes)
    assert layouts.layout_of(tensors, "it") == "official"
    assert layouts.identify(tensors, "official") == VARIANTS[variant]
    layouts.check(tensors, VARIANTS[variant], "official", "it")
    params = layouts.to_params(tensors, "official")
    layouts.check(params, VARIANTS[variant], "sam2jax", "it")
    assert shapes_of(layouts.from_params(params, "official")) == shapes

    theirs = layouts.from_params(params, "huggingface")
    # Four embeddings are one matrix there, and the frequencies are stored twice.
    assert len(theirs) == len(shapes) - 3 + 1
    assert layouts.layout_of(theirs, "it") == "huggingface"
    assert layouts.identify(theirs, "huggingface") == VARIANTS[variant]
    assert shapes_of(layouts.to_params(theirs, "huggingface")) == shapes_of(params)


def test_numbers_go_where_they_belong(state: dict[str, np.ndarray]):
    params = layouts.to_params(state, "official")
    linear = "sam_mask_decoder.transformer.layers.1.mlp.layers.0.weight"
    np.testing.assert_array_equal(
        params["sam_mask_decoder/transformer/layers_1/mlp/layers_0/kernel"], state[linear].T
    )
    conv = state["image_encoder.trunk.patch_embed.proj.weight"]  # [out, in, 7, 7]
    np.testing.assert_array_equal(
        params["image_encoder/trunk/patch_embed/proj/kernel"][2, 5, 1], conv[:, 1, 2, 5]
    )
    upscaling = state["sam_mask_decoder.output_upscaling.0.weight"]  # [in, out, 2, 2]
    np.testing.assert_array_equal(
        params["sam_mask_decoder/output_upscaling_0/kernel"][:, 1, 0], upscaling[:, :, 1, 0]
    )
    np.testing.assert_array_equal(
        params["image_encoder/neck/convs_0/kernel"],
        state["image_encoder.neck.convs.0.conv.weight"][:, :, 0, 0].T,
    )
    np.testing.assert_array_equal(params["no_obj_ptr"], state["no_obj_ptr"][0])


@pytest.mark.parametrize("layout", ["official", "huggingface"])
def test_round_trips_change_no_number(state: dict[str, np.ndarray], layout: layouts.Layout):
    params = layouts.to_params(state, "official")
    again = layouts.to_params(layouts.from_params(params, layout), layout)
    assert params.keys() == again.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)


def test_every_rule_is_used():
    keys = [key for variant in PUBLISHED for key in official_shapes(variant)]
    assert not [rule for rule in OFFICIAL if not any_renamed(keys, rule)]
    theirs = [
        key
        for variant in PUBLISHED
        for key in huggingface.from_official(hollow(official_shapes(variant)))
    ]
    assert not [rule for rule in huggingface.HUGGINGFACE if not any_renamed(theirs, rule)]


def any_renamed(keys: list[str], rule: Rule) -> bool:
    bare = Rule(rule.source, rule.target)
    value = np.zeros(())
    for key in keys:
        try:
            rename({key: value}, [bare])
        except ValueError:
            continue
        return True
    return False


def test_rename_refuses_what_is_not_one_to_one():
    value = np.zeros(2)
    with pytest.raises(ValueError, match="two rules claim 'a.1'"):
        rename({"a.1": value}, [Rule("a.#", "b_#"), Rule("a.1", "c")])
    with pytest.raises(ValueError, match="not the only key that becomes 'b'"):
        rename({"a.1": value, "a.2": value}, [Rule("a.1", "b"), Rule("a.2", "b")])
    with pytest.raises(ValueError, match="no rule for x, y"):
        rename({"x": value, "y": value}, [Rule("a", "b")])
    with pytest.raises(ValueError, match="'a' has shape \\[2\\], expected \\(out in\\)"):
        rename({"a": value}, [Rule("a", "b", "out in -> in out")])


def test_move_axes_drops_and_adds_axes_of_one():
    value = np.arange(6).reshape(2, 3, 1, 1)
    moved = move_axes(value, "out in 1 1 -> in out")
    np.testing.assert_array_equal(moved, value[:, :, 0, 0].T)
    np.testing.assert_array_equal(move_axes(moved, "in out -> out in 1 1"), value)
    with pytest.raises(ValueError, match="expected"):
        move_axes(np.zeros((2, 3, 3, 3)), "out in 1 1 -> in out")


def test_shorten_counts_the_rest():
    assert shorten(["a", "b"]) == "a, b"
    assert shorten("abcdef") == "a, b, c and 3 more"


# What is wrong is named --------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_are_listed():
    tensors = hollow(official_shapes("sam2.1_hiera_tiny"))
    del tensors["no_obj_ptr"]
    tensors["extra"] = np.zeros(1, np.float32)
    tensors["maskmem_tpos_enc"] = np.zeros((6, 1, 1, 64), np.float32)
    tensors["no_mem_embed"] = np.zeros((1, 1, 256), np.int64)
    config = layouts.identify(tensors, "official")
    with pytest.raises(ValueError) as caught:
        layouts.check(tensors, config, "official", "it.pt", "any official model")
    assert str(caught.value) == (
        "it.pt does not fit any official model. Of its 471 tensors: 1 missing (no_obj_ptr); "
        "1 unexpected (extra); 1 misshapen (maskmem_tpos_enc [6, 1, 1, 64] instead of "
        "[7, 1, 1, 64]); 1 not floating point (no_mem_embed of int64)."
    )


def test_other_models_are_told_apart():
    with pytest.raises(ValueError, match="resnet.pt is not a SAM 2 checkpoint: none of its 1 "):
        layouts.layout_of({"conv1.weight": np.zeros(1)}, "resnet.pt")
    with pytest.raises(ValueError, match="there are none"):
        layouts.layout_of({}, "empty.safetensors")


def test_official_checkpoint_without_memory_is_damaged():
    tensors = images_part(hollow(official_shapes("sam2_hiera_small")))
    config = layouts.identify(tensors, "official")
    with pytest.raises(
        ValueError, match=r"sam2_hiera_small. .*: 157 missing \(mask_downsample.bias"
    ):
        layouts.check(tensors, config, "official", "it.pt")


def test_huggingface_frequencies_may_be_stored_once_but_not_differ(state: dict[str, np.ndarray]):
    whole = huggingface.from_official(state)
    for name in (huggingface._FREQUENCIES, huggingface._FREQUENCIES_AGAIN):
        partial = {key: value for key, value in whole.items() if key != name}
        again = huggingface.to_official(huggingface.complete(partial))
        assert shapes_of(again).items() == shapes_of(state).items()
    whole[huggingface._FREQUENCIES_AGAIN] = whole[huggingface._FREQUENCIES] + 1
    with pytest.raises(ValueError, match="should be equal, and differ"):
        huggingface.to_official(whole)


# What wraps a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod.", "net.sam2."])
@pytest.mark.parametrize("layout", ["official", "huggingface"])
def test_a_prefix_of_every_name_is_taken_off(prefix: str, layout: layouts.Layout):
    tensors = hollow(layouts.expected_shapes(SMALL, layout))
    bare = layouts.unwrap({prefix + key: value for key, value in tensors.items()}, "it")
    assert list(bare) == list(tensors)
    assert all(bare[key] is value for key, value in tensors.items())
    assert layouts.unwrap(tensors, "it") is tensors


def test_what_stands_beside_a_wrapped_model_is_named():
    tensors = hollow(layouts.expected_shapes(SMALL, "official"))
    model = {f"model.{key}": value for key, value in tensors.items()}
    value = np.zeros(1, np.float32)
    with pytest.raises(ValueError) as caught:
        layouts.unwrap({**model, "loss.weight": value, "ema_decay": value}, "it.pt")
    assert str(caught.value) == (
        "it.pt holds a model whose names begin with 'model.', and other tensors (loss.weight, "
        "ema_decay); save the model's alone."
    )
    averaged = {f"ema.{key}": value for key, value in tensors.items()}
    with pytest.raises(ValueError, match="it.pt holds 2 models, named 'ema.', 'model.'; save"):
        layouts.unwrap({**model, **averaged}, "it.pt")
    # Under the same prefix, or beside names that have none, they are tensors too many, as ever.
    for beside in (
        layouts.unwrap({**model, "model.loss.weight": value}, "it.pt"),
        layouts.unwrap({**tensors, "loss.weight": value}, "it.pt"),
        layouts.unwrap({**tensors, "ema.image_encoder.trunk.pos_embed": value}, "it.pt"),
    ):
        with pytest.raises(ValueError, match=r"1 unexpected \((loss.weight|ema.image_enc.*)\)"):
            layouts.check(beside, SMALL, "official", "it.pt")


# Converting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "to", "form"),
    [
        ("a.pt", None, "official"),
        ("a.safetensors", None, "safetensors"),
        ("a", None, "orbax"),
        ("a", "huggingface", "huggingface"),
    ],
)
def test_convert_to_every_format_and_verify(
    tmp_path: pathlib.Path, source: pathlib.Path, name: str, to: str | None, form: str
):
    summary = convert.convert(source, tmp_path / name, to, verify=True)
    assert summary.largest_difference == 0
    assert (summary.variant, summary.source_format) == ("small_test", "official")
    assert summary.dest_format == form
    again = convert.read(tmp_path / name)
    assert again.config == SMALL  # also of a size that is nobody's: it travels with the weights
    back = tmp_path / "back.pt"
    if (tmp_path / name).is_file():  # for whom files are that are made here
        assert (tmp_path / name).stat().st_mode == source.stat().st_mode
    assert convert.convert(tmp_path / name, back, verify=True).largest_difference == 0
    first, last = (torch_file.load_torch(path)["model"] for path in (source, back))
    assert first.keys() == last.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(value, last[key], err_msg=key)


def test_verify_notices_a_changed_number(
    tmp_path: pathlib.Path, source: pathlib.Path, state: dict[str, np.ndarray]
):
    changed = {**state, "no_obj_ptr": state["no_obj_ptr"] + np.float32(0.25)}
    other = tmp_path / "other.safetensors"
    convert.write(other, layouts.to_params(changed, "official"), SMALL)
    difference = largest_difference(convert.read(source), other)
    assert difference == pytest.approx(0.25, rel=1e-4)


def images_part(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    images = ("image_encoder", "sam_prompt_encoder", "sam_mask_decoder", "no_mem_embed")
    return {name: value for name, value in params.items() if re.split("[./]", name)[0] in images}


def test_images_only_checkpoint_keeps_what_it_has(
    tmp_path: pathlib.Path, state: dict[str, np.ndarray]
):
    config = dataclasses.replace(SMALL, images_only=True)
    params = images_part(layouts.to_params(state, "official"))
    convert.write(tmp_path / "hf", params, config, "huggingface")
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "sam2"
    for name in ("a.safetensors", "orbax"):
        summary = convert.convert(tmp_path / "hf", tmp_path / name, verify=True)
        assert summary.images_only and summary.largest_difference == 0
        assert "for images only" in str(summary)
    with pytest.raises(ValueError, match="these are for images only"):
        convert.convert(tmp_path / "hf", tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()


def test_a_folder_for_transformers_has_every_file(tmp_path: pathlib.Path, source: pathlib.Path):
    convert.convert(source, tmp_path / "hf", "huggingface")
    files = huggingface_files.files(SMALL)
    written = {path.name for path in (tmp_path / "hf").iterdir()}
    assert written == {*files, "model.safetensors"}
    for name, values in files.items():
        assert json.loads((tmp_path / "hf" / name).read_text()) == values


def test_images_only_variant_is_named_so():
    theirs = huggingface.from_official(hollow(official_shapes("sam2.1_hiera_tiny")))
    images = {
        key: value
        for key, value in theirs.items()
        if key.split(".")[0] in ("vision_encoder", "prompt_encoder", "mask_decoder")
        or key in ("no_memory_embedding", "shared_image_embedding.positional_embedding")
    }
    assert (len(theirs), len(images)) == (469, 309)
    config = layouts.identify(images, "huggingface")
    assert config.name == "sam2_hiera_tiny_images"
    layouts.check(images, config, "huggingface", "it")


def test_what_transformers_fixes_is_refused(tmp_path: pathlib.Path):
    config = small_config()
    params = layouts.to_params(live(config), "official")
    with pytest.raises(ValueError, match="transformers fixes mem_dim at 64, and this model has 16"):
        convert.write(tmp_path / "hf", params, config, "huggingface")
    assert not list(tmp_path.iterdir())


def test_destination_decides_the_format():
    assert convert.format_for("a/b.pth") == convert.format_for("A.PT") == "official"
    assert convert.format_for("sam2.1_hiera_tiny") == "orbax"
    for name in ("a.bin", "a.ckpt"):
        with pytest.raises(ValueError, match=f"{name}: expected .pt, .pth, .safetensors, or the"):
            convert.format_for(name)
    assert convert.format_for("a.bin", "official") == "official"
    with pytest.raises(ValueError, match="would hold the format official, and .safetensors is"):
        convert.format_for("a.safetensors", "official")
    with pytest.raises(ValueError, match="unknown format 'onnx'; choose from orbax, safetensors"):
        convert.format_for("a", "onnx")
    with pytest.raises(ValueError, match="a.safetensors names a file, and the format huggingface"):
        convert.format_for("a.safetensors", "huggingface")


@pytest.mark.parametrize(
    ("name", "to", "where"),
    [
        ("a.pt", None, "sam2jax.convert.torch_file._add"),
        ("a.safetensors", None, "safetensors.numpy.save_file"),
        ("a", None, "sam2jax.io.checkpoints.unflatten_dict"),
        ("a", "huggingface", "sam2jax.convert.huggingface_files.config_json"),
        ("a", "huggingface", "sam2jax.convert.huggingface_files._processors"),
    ],
)
def test_nothing_is_left_half_done(
    tmp_path: pathlib.Path,
    source: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    to: str | None,
    where: str,
):
    begun = []

    def interrupt(*_, **__):
        begun.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(source, tmp_path / name, to)
    assert name not in begun
    assert list(tmp_path.iterdir()) == [source.parent]


def test_existing_files_survive_a_failure_and_folders_are_never_replaced(
    tmp_path: pathlib.Path, source: pathlib.Path
):
    (tmp_path / "a.pt").write_text("mine")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(ValueError, match="broken.pt is truncated"):
        convert.convert(broken, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_text() == "mine"
    with pytest.raises(ValueError, match="exists already; remove it or choose another folder"):
        convert.convert(source, source.parent)
    with pytest.raises(ValueError, match="is a folder; give the name of a file"):
        convert.convert(source, source.parent, "safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; create it first"):
        convert.convert(source, tmp_path / "nowhere/a.pt")


# Command line ------------------------------------------------------------------------------------


def test_main_prints_what_was_done(
    tmp_path: pathlib.Path,
    source: pathlib.Path,
    state: dict[str, np.ndarray],
    capsys: pytest.CaptureFixture[str],
):
    assert main([str(source), str(tmp_path / "a.safetensors"), "--verify"]) == 0
    parameters = sum(value.size for value in state.values())
    assert capsys.readouterr().out.splitlines() == [
        f"small_test: {len(state)} tensors, {parameters:,} parameters",
        "official -> safetensors",
        "largest difference when read again: 0",
    ]


def test_main_says_what_is_wrong_and_exits_with_2(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(tmp_path / "no.pt"), str(tmp_path / "a.pt")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: there is no file or folder '{tmp_path / 'no.pt'}'; 'facebook/")


@pytest.mark.parametrize("module", ["convert", "sam2jax.convert"])
def test_runs_as_a_module(tmp_path: pathlib.Path, source: pathlib.Path, module: str):
    command = [sys.executable, "-m", module, str(source), str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "official -> safetensors" in done.stdout
