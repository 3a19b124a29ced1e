"""`sam2jax segment` and `sam2jax auto`: what is written, and what is refused."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

import sam2jax
from tests.test_cli import commands_in_an_empty_folder, write_checkpoint

PEAKS = ["--points-per-side", "3", "--points-per-batch", "9", "-q"]
PEAKS += ["--pred-iou-thresh", "0.1", "--stability-score-thresh", "0"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(tmp_path, monkeypatch):
    return commands_in_an_empty_folder(tmp_path, monkeypatch)


def picture(seed: int = 0) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 90, (60, 90, 3), np.uint8)
    image[10:30, 20:45] += 150
    return image


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "cups.png"
    Image.fromarray(picture()).save(path)
    return path


def test_segment(command, checkpoint, photo):
    result = command(
        *["segment", photo, "--checkpoint", checkpoint, "--point", "30,18"],
        *["--box", "20,10,45,30@2", "--point", "5,5,0@2", "--out", "out.png"],
        *["--masks", "masks.npz"],
    )
    assert result.exit_code == 0, result.output
    predictor = sam2jax.SAM2ImagePredictor.from_pretrained(checkpoint)
    predictor.set_image(picture())
    several, ious, _ = predictor.predict([[30, 18]], [1])
    boxed, _, _ = predictor.predict([[5, 5]], [0], box=[20, 10, 45, 30], multimask_output=False)
    with np.load("masks.npz") as written:
        np.testing.assert_array_equal(written["cups"][0], several[np.argmax(ious)] > 0)
        np.testing.assert_array_equal(written["cups"][1], boxed[0] > 0)
    drawn = np.asarray(Image.open("out.png"))
    assert drawn.shape == (60, 90, 3) and not np.array_equal(drawn, picture())


def test_what_segment_refuses(command, checkpoint, photo):
    for given, message in (
        (["--point", "1,2"], "nothing to write"),
        (["--out", "out.png"], "with --point or --box."),
        (["--point", "1,2:3", "--out", "out.png"], "no frame 3"),
        (["--point", "200,2", "--out", "out.png"], "outside of"),
        (["--point", "1,2", "--out", photo], "is the input"),
        (["--point", "1,2", "--masks", photo], "is the input"),
        (["--point", "1,2", "--out", "out.mp4"], ".png"),
        (["--point", "1,2", "--out", "no/folder.png"], "does not exist"),
    ):
        result = command("segment", photo, "--checkpoint", checkpoint, *given)
        assert result.exit_code == 2 and message in result.output, result.output
    result = command(
        "segment", checkpoint, "--checkpoint", checkpoint, "--point", "1,2", "--out", "o.png"
    )
    assert result.exit_code == 2 and "not an image" in result.output
    assert os.listdir() == []
    os.makedirs("held/masks")
    given = ("--checkpoint", checkpoint, "--point", "1,2", "--out", "a.png", "--masks", "held")
    result = command("segment", photo, *given)
    assert result.exit_code == 2 and "held exists already" in result.output
    assert os.listdir() == ["held"]  # nor the picture
    given = ("--checkpoint", checkpoint, "--point", "1,2", "--out", photo)
    result = command("segment", "missing.png", *given)
    assert result.exit_code == 2 and "there is no file missing.png" in result.output


def test_auto(command, checkpoint, tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for index in range(2):
        Image.fromarray(picture(index)).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    call = ["auto", folder, "--checkpoint", checkpoint, "--out", out, *PEAKS]
    result = command(*call)
    assert result.exit_code == 1 and "broken.jpg" in result.output, result.output
    assert "1 of 3" in result.output
    names = {path.name for path in out.iterdir()}
    assert names == {"0.png", "0.json", "1.png", "1.json"}
    written = json.loads((out / "1.json").read_text())
    assert written["image"] == {"file_name": "1.png", "height": 60, "width": 90}
    assert written["annotations"]
    for number, entry in enumerate(written["annotations"], start=1):
        mask = np.array(coco.decode(entry["segmentation"]))
        assert entry["id"] == number and mask.shape == (60, 90) and mask.sum() == entry["area"]
    assert np.asarray(Image.open(out / "1.png")).shape == (60, 90, 3)

    (out / "0.json").unlink()  # as if it had been stopped there
    before = (out / "1.json").stat().st_mtime_ns
    (folder / "broken.jpg").unlink()
    call.remove("-q")
    result = command(*call)
    assert result.exit_code == 0, result.output
    assert f"1 of 2 images have results in {out}" in result.output
    assert "masks in 1 images" in result.output
    nothing = command(*call, "--out", tmp_path / "none", "--pred-iou-thresh", 5)
    assert "0 masks in 2 images" in nothing.output and "thresh 5.0" in nothing.output
    assert (out / "0.json").exists() and (out / "1.json").stat().st_mtime_ns == before


def test_what_auto_refuses(command, checkpoint, tmp_path):
    photos, nothing, out = (tmp_path / name for name in ("photos", "nothing", "out"))
    for folder in (photos, nothing):
        folder.mkdir()
    Image.fromarray(picture()).save(photos / "cups.png")
    for images, where, message in (
        (tmp_path / "none", out, "no image or folder"),
        (nothing, out, "no frames"),
        (photos, photos, "holds the pictures"),
        (photos, photos / "cups.png", "is a file; give --out a folder"),
        (photos / "cups.png", nothing / ".." / "photos", "holds the pictures"),
    ):
        result = command("auto", images, "--checkpoint", checkpoint, "--out", where)
        assert result.exit_code == 2 and message in result.output, result.output
    assert os.listdir(photos) == ["cups.png"] and not out.exists()
    out.mkdir()
    (out / "cups.json").write_text('{"image": {"file_name": "cups.jpg", "height": 1, "width": 1}}')
    result = command("auto", photos, "--checkpoint", checkpoint, "--out", out)
    assert result.exit_code == 2 and "is not of cups.png" in result.output, result.output
    np.testing.assert_array_equal(np.asarray(Image.open(photos / "cups.png")), picture())
