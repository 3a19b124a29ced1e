"""Videos, masks and overlays out: whole, or not at all."""

import json
import os
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from sam2jax.io import drawing, writer
from sam2jax.io.files import atomic_path
from sam2jax.io.masks import davis_palette, mask_writer
from sam2jax.io.video import open_video
from sam2jax.io.writer import VideoWriter
from sam2jax.training.data.sav import SAVVideo
from tests.clips import number, picture


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv", "out.mov"])
@pytest.mark.parametrize("height,width", [(48, 64), (47, 63)])
def test_video_writer(tmp_path, name, height, width):
    frames = [picture(i, height, width) for i in range(5)]
    with VideoWriter(tmp_path / name, Fraction(30000, 1001), height, width) as film:
        for frame in frames:
            film.write(frame)
        assert not (tmp_path / name).exists()
    video = open_video(tmp_path / name)
    even = (height + height % 2, width + width % 2)
    assert (len(video), video.height, video.width) == (5, *even)
    assert video.fps == Fraction(30000, 1001) or name.endswith("mkv")
    for got, frame in zip(video, frames, strict=True):
        assert np.abs(got[:height, :width].astype(int) - frame).mean() < 3
    assert os.listdir(tmp_path) == [name]


def test_files_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.txt", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file), path.exists())))
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
    ((status, was_there),) = synced
    assert os.path.samestat(status, path.stat()) and status.st_size == 5 and not was_there


def test_video_writer_without_x264(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_ENCODERS", {"none": {}, "mpeg4": writer._ENCODERS["mpeg4"]})
    with VideoWriter(tmp_path / "out.mp4", 25, 48, 64) as film:
        film.write(picture(3, 48, 64))
    assert number(open_video(tmp_path / "out.mp4")[0]) == 3
    monkeypatch.setattr(writer, "_ENCODERS", {"none": {}})
    with pytest.raises(ValueError, match="no video encoder"):
        VideoWriter(tmp_path / "other.mp4", 25, 48, 64).__enter__()
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_video_writer_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "out.mp4", 25, 48, 64) as film:
        film.write(picture(0, 48, 64))
        raise RuntimeError
    with pytest.raises(ValueError, match="no frame"), VideoWriter(tmp_path / "a.mp4", 25, 48, 64):
        pass
    with pytest.raises(ValueError, match="uint8"), VideoWriter(tmp_path / "a.mp4", 25, 48, 64) as f:
        f.write(picture(0, 48, 60))
    with pytest.raises(ValueError, match="must end in .mp4"):
        VideoWriter(tmp_path / "out.gif", 25, 48, 64)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        VideoWriter(tmp_path / "no" / "out.mp4", 25, 48, 64).__enter__()
    assert os.listdir(tmp_path) == []


def test_overlay():
    frame = np.full((60, 80, 3), 100, np.uint8)
    masks = np.zeros((2, 60, 80), bool)
    masks[0, 10:40, 10:40] = True
    before = frame.copy()
    drawn = drawing.overlay(frame, masks, [1, 2], opacity=0.5)
    np.testing.assert_array_equal(frame, before)
    color = np.array(drawing.color(1))
    np.testing.assert_array_equal(drawn[10, 10:40], np.tile(color, (30, 1)))  # the contour
    assert np.abs(drawn[25, 25] - (100 + color) / 2).max() <= 1
    changed = (drawn != frame).any(-1)
    np.testing.assert_array_equal(changed, masks[0])


def test_contour_stops_at_the_border_of_the_picture():
    mask = np.zeros((20, 20), bool)
    mask[:10] = True
    expected = np.zeros_like(mask)
    expected[8:10] = True
    np.testing.assert_array_equal(drawing.contour(mask, 2), expected)


def test_prompts_are_drawn():
    frame = np.zeros((270, 270, 3), np.uint8)
    none = np.zeros((1, 270, 270), bool)
    marks = [drawing.Marks(1, [(50.0, 60.0), (150.0, 60.0)], [1, 0], (200, 200, 240, 250))]
    drawn = drawing.overlay(frame, none, [1], marks)
    white = (drawn == 255).all(-1)
    assert white[60, 50] and white[58, 50] and white[60, 150] and not white[58, 150]
    assert white[200, 220] and tuple(drawn[201, 220]) == drawing.color(1)
    assert not drawn[100:190].any()


def test_colors_are_distinct():
    colors = np.array([drawing.color(i) for i in range(1, 31)], int)
    distance = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(30, dtype=int)
    assert distance.min() > 15


def test_overlay_refuses_masks_of_another_size():
    with pytest.raises(ValueError, match=r"masks must be \[1, 8, 8\]"):
        drawing.overlay(np.zeros((8, 8, 3), np.uint8), np.zeros((1, 4, 4), bool), [1])


@pytest.fixture
def masks():
    """Two frames of objects 3, 1 and 7: overlapping, and the last one absent."""
    masks = np.zeros((2, 3, 20, 30), bool)
    masks[:, 0, 2:10, 3:20] = True
    masks[:, 1, 5:15, 10:25] = True
    masks[1] = np.roll(masks[1], 1, -1)
    return masks


def write_masks(path, masks):
    with mask_writer(path) as out:
        for i, frame in enumerate(masks):
            out.write(i + 4, f"{i + 4:05d}", [3, 1, 7], frame)
        assert not path.exists()


def test_palette_masks(tmp_path, masks):
    write_masks(tmp_path / "masks", masks)
    assert sorted(os.listdir(tmp_path / "masks")) == ["00004.png", "00005.png"]
    with Image.open(tmp_path / "masks" / "00005.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(image.getpalette(), list(davis_palette()))
        expected = np.where(masks[1, 1], 1, np.where(masks[1, 0], 3, 0))  # the lowest id wins
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_davis_palette():
    colors = np.frombuffer(davis_palette(), np.uint8).reshape(256, 3)
    assert colors[[0, 1, 2, 5, 8, 22, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 0, 128],
        [64, 0, 0],
        [0, 192, 128],
        [224, 224, 192],
    ]


def test_run_length_masks(tmp_path, masks):
    write_masks(tmp_path / "masks.json", masks)
    records = json.loads((tmp_path / "masks.json").read_text())
    assert [(r["image_id"], r["file_name"], r["category_id"]) for r in records] == [
        (i, f"{i:05d}", object_id) for i in (4, 5) for object_id in (3, 1, 7)
    ]
    for record, mask in zip(records, masks.reshape(-1, 20, 30), strict=True):
        np.testing.assert_array_equal(coco.decode(record["segmentation"]), mask)
        assert record["area"] == mask.sum()
    assert records[1]["bbox"] == [10, 5, 15, 10]


def test_masklets_are_what_training_reads(tmp_path, masks):
    write_masks(tmp_path / "clip_manual.json", masks)
    contents = json.loads((tmp_path / "clip_manual.json").read_text())
    assert contents["masklet"][:4] == [None] * 4 and contents["masklet_id"] == [3, 1, 7]
    assert contents["video_id"] == "clip" and contents["video_frame_count"] == 6
    assert (contents["video_height"], contents["video_width"]) == (20, 30)
    assert contents["masklet_first_appeared_frame"] == [4, 4, None]
    assert contents["masklet_frame_count"] == [2, 2, 0]
    (tmp_path / "clip").mkdir()
    for i in range(6):
        Image.new("RGB", (30, 20)).save(tmp_path / "clip" / f"{i:05d}.jpg")
    with SAVVideo(tmp_path / "clip", tmp_path / "clip_manual.json", 1) as video:
        found = np.stack([video.masks(i, [0, 1, 2]) for i in range(len(video))])
    np.testing.assert_array_equal(found, masks)
    with pytest.raises(ValueError, match="each of its 6 frames.* frames_per_annotation = 1"):
        SAVVideo(tmp_path / "clip", tmp_path / "clip_manual.json", 4)
    with mask_writer(tmp_path / "one_manual.json") as out:  # is no less for every fourth frame
        out.write(0, "00000", [3, 1, 7], masks[0])
    assert len(SAVVideo(tmp_path / "clip", tmp_path / "one_manual.json", 4)) == 1


def test_array_masks(tmp_path, masks):
    write_masks(tmp_path / "masks.npz", masks)
    with np.load(tmp_path / "masks.npz") as saved:
        assert saved["object_ids"].tolist() == [3, 1, 7]
        assert saved["frames"].tolist() == [4, 5]
        for i, frame in enumerate(masks):
            assert saved[f"{i + 4:05d}"].dtype == np.bool_
            np.testing.assert_array_equal(saved[f"{i + 4:05d}"], frame)


@pytest.mark.parametrize("name", ["masks", "masks.json", "masks_auto.json", "masks.npz"])
def test_mask_writers_leave_nothing_behind(tmp_path, masks, name):
    with pytest.raises(RuntimeError), mask_writer(tmp_path / name) as out:
        out.write(0, "00000", [3, 1, 7], masks[0])
        raise RuntimeError
    with pytest.raises(ValueError, match="bool"), mask_writer(tmp_path / name) as out:
        out.write(0, "00000", [1, 2], masks[0])
    with pytest.raises(FileNotFoundError):
        mask_writer(tmp_path / "no" / name).__enter__()
    assert os.listdir(tmp_path) == []


def test_mask_writers_refuse_what_they_cannot_hold(tmp_path, masks):
    with pytest.raises(ValueError, match=r"must end in \.json"):
        mask_writer(tmp_path / "masks.zip")
    with pytest.raises(ValueError, match="1 to 255"), mask_writer(tmp_path / "masks") as out:
        out.write(0, "00000", [0, 1, 2], masks[0])
    with pytest.raises(ValueError, match="named"), mask_writer(tmp_path / "masks.npz") as out:
        out.write(0, "frames", [1, 2, 3], masks[0])
    for name in ("masks.npz", "masks_auto.json"):
        with pytest.raises(ValueError, match="changed"), mask_writer(tmp_path / name) as out:
            out.write(0, "00000", [1, 2, 3], masks[0])
            out.write(1, "00001", [1, 2, 4], masks[0])
    with pytest.raises(ValueError, match="order"), mask_writer(tmp_path / "x_auto.json") as out:
        out.write(1, "00001", [1, 2, 3], masks[0])
        out.write(0, "00000", [1, 2, 3], masks[0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists already"):
        mask_writer(tmp_path / "full").__enter__()
