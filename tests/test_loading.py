"""From any source to a model and its parameters; what cannot be loaded is said in a line or two."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict

import sam2jax
from sam2jax import convert
from sam2jax.convert import huggingface, huggingface_files, layouts, torch_file
from sam2jax.io import checkpoints
from sam2jax.loading import OPTIONS, load, save
from sam2jax.nn.sam2 import SAM2, init_params, param_shapes
from sam2jax.testing import draw, small_config

SMALL = small_config(hidden_dim=64, mem_dim=64)


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    shapes = layouts.expected_shapes(SMALL, "official")
    return {key: draw(key, shape) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, state: dict[str, np.ndarray]) -> pathlib.Path:
    """A folder with the same small model in every format."""
    folder = tmp_path_factory.mktemp("saved")
    params = layouts.to_params(state, "official")
    convert.write(folder / "model.pt", params, SMALL)
    convert.write(folder / "model.safetensors", params, SMALL)
    convert.write(folder / "orbax", params, SMALL)
    convert.write(folder / "hf", params, SMALL, "huggingface")
    return folder


# What is loaded ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "orbax", "hf", "."])
def test_every_source_gives_the_same_model(
    saved: pathlib.Path, state: dict[str, np.ndarray], name: str
):
    model, params = load(saved / name)
    assert model == SAM2(SMALL)
    expected = param_shapes(SMALL)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert isinstance(leaf, jax.Array)
        assert (leaf.shape, leaf.dtype) == (wanted.shape, np.float32)
    np.testing.assert_array_equal(
        params["memory_attention"]["layers_1"]["linear2"]["kernel"],
        state["memory_attention.layers.1.linear2.weight"].T,
    )


def test_saved_again_it_is_the_same(saved: pathlib.Path, tmp_path: pathlib.Path):
    model, params = load(saved / "model.pt")
    for name, given, to in (
        ("a.safetensors", model, None),
        ("a.pt", model.config, None),
        ("a", model, None),
        ("hf", model, "huggingface"),
    ):
        save(tmp_path / name, given, params, to=to)
        again, loaded = load(tmp_path / name)
        assert again == model
        jax.tree.map(np.testing.assert_array_equal, params, loaded)


def test_parameters_do_not_depend_on_the_file_afterwards(
    saved: pathlib.Path, tmp_path: pathlib.Path, state: dict[str, np.ndarray]
):
    path = tmp_path / "model.pt"
    shutil.copy(saved / "model.pt", path)
    _, params = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    bias = params["image_encoder"]["neck"]["convs_0"]["bias"]
    np.testing.assert_array_equal(bias, state["image_encoder.neck.convs.0.conv.bias"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(
    tmp_path: pathlib.Path, state: dict[str, np.ndarray], dtype: Any
):
    theirs = {k: v.astype(dtype) for k, v in huggingface.from_official(state).items()}
    checkpoints.save_safetensors(tmp_path / "a.safetensors", theirs, SMALL)
    _, params = load(tmp_path / "a.safetensors")
    assert params["no_obj_ptr"].dtype == np.float32
    np.testing.assert_array_equal(
        params["no_obj_ptr"], state["no_obj_ptr"][0].astype(dtype).astype(np.float32)
    )


def test_fine_tuned_files_and_bare_state_dicts_load(
    tmp_path: pathlib.Path, state: dict[str, np.ndarray]
):
    header = checkpoints.header(SMALL)
    moments = {"state": {"0": {"exp_avg": np.ones((2, 2), np.float32)}}}
    contents = {"model": state, "optimizer": moments, "epoch": 3, "sam2jax": header}
    torch_file.save_torch(tmp_path / "tuned.pt", contents)
    assert load(tmp_path / "tuned.pt")[0] == SAM2(SMALL)
    # A file without our header, of a size that is nobody's, cannot say how many heads it has.
    torch_file.save_torch(tmp_path / "bare.pt", state)
    with pytest.raises(ValueError, match="bare.pt does not fit any official model; the nearest is"):
        load(tmp_path / "bare.pt")


def test_wrapped_and_lightning_checkpoints_load(
    tmp_path: pathlib.Path, state: dict[str, np.ndarray]
):
    header = checkpoints.header(SMALL)
    lightning = {f"model._orig_mod.{key}": value for key, value in state.items()}
    contents = {"epoch": 3, "state_dict": lightning, "sam2jax": header, "model": "small"}
    torch_file.save_torch(tmp_path / "lightning.pt", contents)
    parallel = {f"module.{key}": value for key, value in state.items()}
    torch_file.save_torch(tmp_path / "ddp.pt", {"model": parallel, "sam2jax": header})
    checkpoints.save_safetensors(tmp_path / "ddp.safetensors", parallel, SMALL)
    for name in ("lightning.pt", "ddp.pt", "ddp.safetensors"):
        model, params = load(tmp_path / name)
        assert model == SAM2(SMALL)
        np.testing.assert_array_equal(params["no_obj_ptr"], state["no_obj_ptr"][0])
    extra = {**lightning, "loss.weight": np.zeros(3, np.float32)}
    torch_file.save_torch(tmp_path / "more.pt", {"state_dict": extra})
    with pytest.raises(ValueError, match=r"begin with 'model._orig_mod.', and other .*\(loss.we"):
        load(tmp_path / "more.pt")


# Saved by transformers: no header of ours, and a config.json -------------------------------------


@pytest.fixture
def theirs(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder as `save_pretrained` leaves it, of a model that is nobody's."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    tensors = safetensors.numpy.load_file(saved / "hf/model.safetensors")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = huggingface_files.config_json(
        dataclasses.replace(SMALL, image_size=192, multimask_max_pt_num=3)
    )
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def test_what_transformers_saved_is_known_by_its_config_json(theirs: pathlib.Path):
    expected = dataclasses.replace(SMALL, name="custom", image_size=192, multimask_max_pt_num=3)
    assert load(theirs)[0].config == load(theirs / "model.safetensors")[0].config == expected
    assert load(theirs, image_size=256)[0].config.image_size == 256
    # Ours, where it is there, says more.
    tensors = safetensors.numpy.load_file(theirs / "model.safetensors")
    checkpoints.save_safetensors(theirs / "model.safetensors", tensors, SMALL)
    assert load(theirs)[0].config == SMALL


def test_other_files_are_not_judged_by_a_config_json(theirs: pathlib.Path):
    (theirs / "model.safetensors").rename(theirs / "other.safetensors")
    with pytest.raises(ValueError, match="does not fit any official model"):
        load(theirs / "other.safetensors")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "config.json does not describe a SAM 2 model: Expecting value"),
        (b"[" * 50_000, "does not describe a SAM 2 model"),
        (b"\xff\xfe{", "does not describe a SAM 2 model"),
        (b" " * 2**21, "it has more than 1,048,576 bytes. Correct it, or"),
        (b'{"model_type": "bert"}', "expected model_type 'sam2' or 'sam2_video', got 'bert'"),
        (b'{"image_size": ' + b"9" * 5000 + b"}", "does not describe a SAM 2 model"),
        (b"{}", r"does not fit the config.json beside it. Of its \d+ tensors: \d+ missing"),
        (b'{"model_type": "sam2"}', "does not fit the config.json beside it. .* unexpected"),
    ],
)
def test_config_json_that_does_not_fit(theirs: pathlib.Path, text: bytes, words: str):
    (theirs / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=words) as caught:
        load(theirs)
    assert "\n" not in str(caught.value)


def test_images_only_checkpoint_segments_and_does_not_track(
    tmp_path: pathlib.Path, state: dict[str, np.ndarray]
):
    parts = ("image_encoder", "sam_prompt_encoder", "sam_mask_decoder", "no_mem_embed")
    params = {
        name: value
        for name, value in layouts.to_params(state, "official").items()
        if name.split("/")[0] in parts
    }
    config = dataclasses.replace(SMALL, images_only=True)
    convert.write(tmp_path / "hf", params, config, "huggingface")
    model, loaded = load(tmp_path / "hf")
    assert set(loaded) == set(parts)
    image = jnp.zeros((1, config.image_size, config.image_size, 3))
    features = model.apply({"params": loaded}, image, method="encode_image").features
    whole = unflatten_dict(layouts.to_params(state, "official"), sep="/")
    expected = SAM2(SMALL).apply({"params": whole}, image, method="encode_image").features
    np.testing.assert_array_equal(features, expected)
    with pytest.raises(ValueError, match="images only"):
        sam2jax.init_state(model, 1)
    with pytest.raises(ValueError, match="images only"):
        sam2jax.SAM2VideoPredictor(model, loaded).init_state(np.zeros((2, 8, 8, 3), np.uint8))
    save(tmp_path / "again", model, loaded)
    assert load(tmp_path / "again")[0].config.images_only


# Options -----------------------------------------------------------------------------------------


def test_options_change_the_configuration_and_nothing_else(saved: pathlib.Path):
    path = saved / "model.safetensors"
    model, _ = load(path, image_size=256, dtype="bfloat16", max_cond_frames_in_attn=4)
    assert model.config == dataclasses.replace(
        SMALL, image_size=256, dtype="bfloat16", max_cond_frames_in_attn=4
    )


def test_explicit_options_win_over_apply_postprocessing(saved: pathlib.Path):
    path = saved / "model.safetensors"
    plain = load(path, apply_postprocessing=False)[0].config
    assert plain == dataclasses.replace(
        SMALL,
        dynamic_multimask_via_stability=False,
        binarize_mask_from_pts_for_mem_enc=False,
        fill_hole_area=0,
    )
    mixed = load(path, apply_postprocessing=False, fill_hole_area=5)[0].config
    assert mixed == dataclasses.replace(plain, fill_hole_area=5)


def test_parameters_do_not_depend_on_the_image():
    config = dataclasses.replace(SMALL, image_size=160, memory_pooling=2, dtype="bfloat16")
    whole = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert param_shapes(config) == whole == param_shapes(SMALL)


def test_unknown_options_are_named(saved: pathlib.Path):
    with pytest.raises(
        TypeError, match="There is no option 'num_maskmem', 'size' of a model; there are image"
    ):
        load(saved / "model.safetensors", size=3, num_maskmem=3)
    assert set(OPTIONS) <= {field.name for field in dataclasses.fields(SMALL)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 1000}, "multiple of 32"),
        ({"dtype": "float16"}, "dtype must be"),
        ({"fill_hole_area": -1}, "must not be negative"),
        ({"memory_pooling": 5}, "must divide the .* cells of a memory's side, got 5"),
        ({"memory_pooling": 0}, "must divide"),
        ({"fill_hole_area": 8.5}, "fill_hole_area must be int, got '8.5'"),
        ({"dynamic_multimask_via_stability": "false"}, "must be bool, got 'false'"),
        ({"dynamic_multimask_stability_thresh": np.zeros(2)}, "must be float"),
    ],
)
def test_impossible_values_are_refused(saved: pathlib.Path, options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        load(saved / "model.safetensors", **options)


def test_numbers_of_other_kinds_are_taken(saved: pathlib.Path):
    options = {
        "fill_hole_area": 8.0,
        "multimask_max_pt_num": np.int64(2),
        "dynamic_multimask_stability_thresh": 1,
        "dynamic_multimask_via_stability": np.False_,
    }
    config = load(saved / "model.safetensors", **options)[0].config
    assert {name: getattr(config, name) for name in options} == options
    kinds = [type(getattr(config, name)) for name in options]
    assert kinds == [int, int, float, bool]


# Sources that are none ---------------------------------------------------------------------------


def test_nothing_of_that_name(tmp_path: pathlib.Path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder '.*none.pt'"):
        load(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="'facebook/sam2.1-hiera-tiny' to download it"):
        load("sam2.1_hiera_tiny")
    with pytest.raises(FileNotFoundError, match="'checkpoints/none.pt'"):
        load("checkpoints/none.pt")


def test_files_that_are_no_checkpoints(tmp_path: pathlib.Path):
    path = tmp_path / "a.safetensors"
    for contents, words in (
        (b"", "a.safetensors is empty"),
        (b"\x89PNG and so on", "neither a .pt file nor a safetensors file"),
        (b"\x40\0\0\0\0\0\0\0{not json", "damaged or unsupported safetensors file"),
    ):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=words):
            load(path)
    safetensors.numpy.save_file({"conv1.weight": np.zeros((4, 4), np.float32)}, path)
    with pytest.raises(ValueError, match="a.safetensors is not a SAM 2 checkpoint"):
        load(path)
    torch_file.save_torch(tmp_path / "a.pt", {"model": 3})
    with pytest.raises(ValueError, match="a.pt holds no weights .* and it has model"):
        load(tmp_path / "a.pt")


def test_truncated_files(saved: pathlib.Path, tmp_path: pathlib.Path):
    for name in ("model.pt", "model.safetensors"):
        data = (saved / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match="download or copy\\s+it again"):
            load(tmp_path / name)


def test_folders_without_a_checkpoint(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match="holds no checkpoint: neither sam2jax.json"):
        load(tmp_path)


@pytest.mark.parametrize("lost", ["params/state", "params/state/d", "params/state/_METADATA"])
def test_damaged_orbax_folder(saved: pathlib.Path, tmp_path: pathlib.Path, lost: str):
    shutil.copytree(saved / "orbax", tmp_path / "a")
    target = tmp_path / "a" / lost
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(ValueError, match="a is a damaged Orbax checkpoint") as caught:
        load(tmp_path / "a")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("not json", "a.safetensors is damaged: its configuration cannot be read"),
        ("[]", "its configuration cannot be read"),
        ({"version": 99, "config": {}}, "is of format 99, and this sam2jax reads 1"),
        ({"version": 1, "config": {"depth": 3}}, "no field 'depth'"),
        ({"version": 1, "config": {"image_size": 100}}, "multiple of 32"),
        ({"version": 1, "config": {**SMALL.to_dict(), "hidden_dim": "wide"}}, "makes no model"),
        ({"version": 1, "config": {**SMALL.to_dict(), "mem_dim": 32}}, "does not fit small_test"),
    ],
)
def test_header_that_does_not_fit(
    saved: pathlib.Path, tmp_path: pathlib.Path, header: Any, words: str
):
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    text = header if isinstance(header, str) else json.dumps(header)
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(tensors, path, {"sam2jax": text})
    with pytest.raises(ValueError, match=words):
        load(path)


# Saving ------------------------------------------------------------------------------------------


def test_parameters_of_another_model_are_not_saved(saved: pathlib.Path, tmp_path: pathlib.Path):
    model, params = load(saved / "model.safetensors")
    other = SAM2(dataclasses.replace(SMALL, num_maskmem=5))
    with pytest.raises(ValueError, match=r"maskmem_tpos_enc \[7, 64\] instead of \[5, 64\]"):
        save(tmp_path / "a.pt", other, params)
    del params["no_obj_ptr"]
    with pytest.raises(ValueError, match=r"does not fit small_test. .*: 1 missing \(no_obj_ptr\)"):
        save(tmp_path / "a", model, params)
    with pytest.raises(TypeError, match="save takes a path, a model and .*, got SAM2, dict, str"):
        save(model, params, "a")
    assert not list(tmp_path.iterdir())


def test_pooled_memories_are_saved_with_the_model(saved: pathlib.Path, tmp_path: pathlib.Path):
    save(tmp_path / "a.pt", *load(saved / "model.safetensors", memory_pooling=2))
    assert load(tmp_path / "a.pt")[0].config.memory_pooling == 2


def test_loading_imports_neither_torch_nor_transformers(saved: pathlib.Path):
    code = (
        "import sys, sam2jax.loading as l; l.load(sys.argv[1])\n"
        "print([n for n in ('torch', 'transformers', 'av', 'orbax') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved / "model.pt")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "[]", done.stderr
