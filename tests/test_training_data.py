"""Training data: sources, sampling, configuration."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sam2jax.io.images import read_labels
from sam2jax.training.data.clip import pad_objects
from sam2jax.training.data.config import (
    DataConfig,
    FolderSource,
    ImagesSource,
    SAVSource,
    SceneConfig,
)
from sam2jax.training.data.folders import FolderReader
from sam2jax.training.data.images import ImagesReader
from sam2jax.training.data.runlengths import decode_masks
from sam2jax.training.data.sampling import sample_clip
from sam2jax.training.data.sav import SAVReader
from tests.clips import number, picture
from tests.datasets import (
    HEIGHT,
    WIDTH,
    folder_source,
    loader,
    procedural,
    rng,
    run_lengths,
    squares,
    write_images,
    write_palette_video,
    write_sav,
)

# Sources ------------------------------------------------------------------------------------------


def check_squares(clip, first, step, objects):
    """The clip shows `squares`, from frame `first` on, of some objects in some order."""
    for t, (frame, masks) in enumerate(zip(clip.frames, clip.masks, strict=True)):
        at = first + t * step
        assert number(np.asarray(frame)) == at
        expected = {squares(at)[i].tobytes() for i in objects}
        assert {mask.tobytes() for mask in masks} == expected


def first_number(clip):
    return number(np.asarray(clip.frames[0]))


def test_palette_folders(tmp_path):
    write_palette_video(tmp_path, "b")
    write_palette_video(tmp_path, "a")
    reader = FolderReader(folder_source(tmp_path))
    assert len(reader) == 2
    firsts = set()
    for seed in range(20):
        clip = reader.read(0, rng(seed), 4, 5)
        firsts.add(first_number(clip))
        check_squares(clip, first_number(clip), 1, (0, 1, 2) if first_number(clip) else (0, 1))
    assert firsts == {0, 1, 2}


def test_unannotated_frames_are_left_out(tmp_path):
    write_palette_video(tmp_path, "a", 9)
    for i in range(9):
        if i % 4:
            (tmp_path / "Annotations" / "a" / f"{i:05d}.png").unlink()
    clip = FolderReader(folder_source(tmp_path)).read(0, rng(), 3, 3)
    assert [number(np.asarray(frame)) for frame in clip.frames] == [0, 4, 8]
    with pytest.raises(ValueError, match="a has 3 annotated frames, and a clip of 4 needs 4"):
        FolderReader(folder_source(tmp_path)).read(0, rng(), 4, 3)


def test_a_folder_for_each_object(tmp_path):
    write_palette_video(tmp_path, "a")
    labels = [read_labels(tmp_path / "Annotations" / "a" / f"{i:05d}.png")[0] for i in range(6)]
    for i, value in enumerate((1, 2, 7)):
        folder = tmp_path / "apart" / "a" / f"{i:03d}"
        folder.mkdir(parents=True)
        for frame, label in enumerate(labels):
            if (label == value).any():
                Image.fromarray((label == value).astype(np.uint8) * 255).save(
                    folder / f"{frame:05d}.png"
                )
    source = FolderSource(str(tmp_path / "JPEGImages"), str(tmp_path / "apart"))
    for seed in range(4):
        clip = FolderReader(source).read(0, rng(seed), 5, 5)
        check_squares(clip, first_number(clip), 1, (0, 1, 2) if first_number(clip) else (0, 1))


def test_file_list(tmp_path):
    for name in "abc":
        write_palette_video(tmp_path, name, 2)
    (tmp_path / "list.txt").write_text("c\na.mp4\n\n")
    source = folder_source(tmp_path, file_list=str(tmp_path / "list.txt"))
    assert FolderReader(source)._names == ["a", "c"]


def test_file_list_with_folders(tmp_path):
    """As SA-V's training set comes."""
    for part in ("sav_000", "sav_001"):
        (tmp_path / part).mkdir()
        write_sav(tmp_path / part, "clip")
    (tmp_path / "list.txt").write_text("sav_001/clip.mp4\nsav_000/clip\n")
    source = SAVSource(str(tmp_path), str(tmp_path), file_list=str(tmp_path / "list.txt"))
    reader = SAVReader(source)
    assert len(reader) == 2
    assert all(len(reader.read(i, rng(), 2, 1).frames) == 2 for i in range(2))


def test_masks_beside_frames_are_no_frames(tmp_path):
    write_palette_video(tmp_path, "a", 3)
    frames, masks = tmp_path / "JPEGImages" / "a", tmp_path / "Annotations" / "a"
    for path in masks.iterdir():
        shutil.copy(path, frames / path.name)
    together = FolderSource(str(tmp_path / "JPEGImages"), str(tmp_path / "JPEGImages"))
    for source in (folder_source(tmp_path), together):
        clip = FolderReader(source).read(0, rng(), 3, 1)
        assert [number(np.asarray(frame)) for frame in clip.frames] == [0, 1, 2]


@pytest.mark.parametrize("film", [False, True])
def test_sav(tmp_path, film):
    write_sav(tmp_path, film=film)
    reader = SAVReader(SAVSource(str(tmp_path), str(tmp_path)))
    assert len(reader) == 1
    for seed in range(6):
        clip = reader.read(0, rng(seed), 4, 3)
        first = first_number(clip) // 4
        for t in range(4):
            assert number(np.asarray(clip.frames[t])) == 4 * (first + t)
            expected = squares(first + t)[: 3 if first else 2]
            assert {m.tobytes() for m in clip.masks[t]} == {m.tobytes() for m in expected}


def test_sav_leaves_out_frames_without_annotation(tmp_path):
    path = write_sav(tmp_path)
    contents = json.loads(path.read_text())
    contents["masklet"][1][0] = None
    contents["masklet"][3] = None
    path.write_text(json.dumps(contents))
    clip = SAVReader(SAVSource(str(tmp_path), str(tmp_path))).read(0, rng(), 4, 1)
    assert [number(np.asarray(frame)) for frame in clip.frames] == [0, 8, 16, 20]


def test_images_with_a_json_each(tmp_path):
    reader = ImagesReader(write_images(tmp_path, 3))
    clip = reader.read(1, rng(), 4, 2)
    assert len(reader) == 3 and clip.masks.shape == (4, 1, 16, 20)
    assert all(np.asarray(frame)[0, 0, 0] == 2 for frame in clip.frames)
    assert clip.masks.sum() == 4 * 5 * 7


def test_coco_instances(tmp_path):
    Image.fromarray(picture(3, HEIGHT, WIDTH)).save(tmp_path / "x.jpg")
    Image.fromarray(picture(4, HEIGHT, WIDTH)).save(tmp_path / "empty.jpg")
    masks = squares(2)
    uncompressed = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * 3, HEIGHT * (WIDTH - 3)]}
    found = [
        {"segmentation": run_lengths(masks[0]), "area": 100},
        {"segmentation": [[10, 20, 30, 20, 30, 40, 10, 40]], "area": 400},
        {"segmentation": uncompressed, "area": HEIGHT * 3},
        {"segmentation": run_lengths(masks[2]), "area": 100, "iscrowd": 1},
        {"segmentation": run_lengths(~masks[2]), "area": int((~masks[2]).sum())},
    ]
    contents = {
        "images": [{"id": 5, "file_name": "x.jpg"}, {"id": 6, "file_name": "empty.jpg"}],
        "annotations": [{**annotation, "image_id": 5} for annotation in found],
    }
    (tmp_path / "instances.json").write_text(json.dumps(contents))
    source = ImagesSource(str(tmp_path), str(tmp_path / "instances.json"), max_area=0.5)
    reader = ImagesReader(source)
    assert len(reader) == 1
    clip = reader.read(0, rng(), 1, 9)
    polygon, column = np.zeros((2, HEIGHT, WIDTH), bool)
    polygon[20:40, 10:30] = True
    column[:, :3] = True
    expected = {mask.tobytes() for mask in (masks[0], polygon, column)}
    assert {mask.tobytes() for mask in clip.masks[0]} == expected


def test_run_lengths_of_all_kinds_of_masks():
    draw = rng(3)
    for share in (0, 0.02, 0.5, 0.98, 1):
        mask = draw.random((37, 53)) < share
        np.testing.assert_array_equal(decode_masks([run_lengths(mask)], (37, 53), "x")[0], mask)


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [4, 4], "counts": ""},
        {"size": [4, 4], "counts": "0"},
        {"size": [4, 4], "counts": "`"},
        {"size": [4, 4], "counts": "zz"},
        {"size": [4, 4], "counts": 5},
        {"size": [4, 4], "counts": [3, -1, 14]},
        {"size": [4, 5], "counts": [20]},
        {"size": [4, 4]},
        [[1, 2, 3]],
        [],
        None,
    ],
)
def test_malformed_masks_are_refused(segmentation):
    with pytest.raises(ValueError, match="^x.json has a mask that cannot be read"):
        decode_masks([segmentation], (4, 4), "x.json")


# Sampling -----------------------------------------------------------------------------------------


class Squares:
    """An annotated video of `squares`, numbered pictures; objects 10, 11, 12."""

    name = "squares"

    def __init__(self, length, blank=()):
        self._length, self._blank = length, blank

    def __len__(self):
        return self._length

    def image(self, frame):
        return Image.fromarray(picture(frame, HEIGHT, WIDTH))

    def visible(self, frame):
        if frame in self._blank:
            return []
        return [10 + i for i, mask in enumerate(squares(frame)) if mask.any()]

    def masks(self, frame, objects):
        return squares(frame)[[i - 10 for i in objects]]


def test_frames_in_a_row_with_a_stride_and_backward():
    steps = set()
    for seed in range(30):
        clip = sample_clip(Squares(8), rng(seed), 3, 3, stride=2, reverse_time_prob=0.5)
        order = [number(np.asarray(frame)) for frame in clip.frames]
        steps.add(order[1] - order[0])
        assert order[2] - order[1] == order[1] - order[0]
        check_squares(clip, order[0], order[1] - order[0], (0, 1, 2) if order[0] else (0, 1))
    assert steps == {2, -2}


def test_at_most_so_many_objects_and_all_of_them_in_turn():
    seen = set()
    for seed in range(30):
        clip = sample_clip(Squares(1), rng(seed), 1, 1)
        assert clip.masks.shape == (1, 1, HEIGHT, WIDTH)
        seen.add(clip.masks.tobytes())
    assert seen == {squares(0)[[0]].tobytes(), squares(0)[[1]].tobytes()}


def test_clips_start_where_something_is_seen():
    video = Squares(6, blank=(0, 1, 2, 4))
    for seed in range(8):
        clip = sample_clip(video, rng(seed), 3, 3)
        assert number(np.asarray(clip.frames[0])) == 3
    with pytest.raises(ValueError, match="squares has no frame with an object"):
        sample_clip(Squares(4, blank=range(4)), rng(), 2, 2)


def test_objects_are_padded_or_left_out():
    frames, masks = np.zeros((2, 4, 4, 3), np.uint8), np.ones((2, 3, 4, 4), bool)
    wide = pad_objects(frames, masks, 5)
    assert wide.objects.tolist() == [True] * 3 + [False] * 2
    assert (
        wide.masks.shape == (2, 5, 4, 4)
        and wide.masks.sum((0, 2, 3)).tolist() == [32] * 3 + [0] * 2
    )
    assert pad_objects(frames, masks, 2).masks.shape == (2, 2, 4, 4)


# Configuration ------------------------------------------------------------------------------------


def test_configuration_from_plain_values():
    values = {
        "sources": [
            {"kind": "folder", "images": "i", "masks": "m", "multiplier": 2},
            {"kind": "sav", "images": "i", "masks": "m", "stride": 2},
            {"kind": "images", "images": "i", "masks": "m.json", "max_area": 1},
            {"kind": "procedural", "num_clips": 9, "scene": {"kinds": ["plain"], "max_area": 0.1}},
        ],
        "augment": {"degrees": 10},
        "max_damaged": 0,
    }
    config = DataConfig.from_dict(values)
    assert config.sources[0] == FolderSource("i", "m", multiplier=2)
    assert config.sources[3].scene == SceneConfig(kinds=("plain",), max_area=0.1)
    assert config.augment.degrees == 10.0 and config.max_damaged == 0
    assert hash(config) == hash(DataConfig.from_dict(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sauces": []}, "data has no key 'sauces'; it has sources"),
        ({"sources": []}, "sources is empty"),
        ({"sources": {"kind": "sav"}}, r"data.sources must be a list"),
        ({"sources": [{"images": "i"}]}, r"data.sources\[0\].kind must be one of folder, sav"),
        ({"sources": [{"kind": "folder", "images": "i"}]}, r"data.sources\[0\] needs 'masks'"),
        (
            {"sources": [{"kind": "folder", "images": "i", "masks": "m", "multiplyer": 2}]},
            r"data.sources\[0\] has no key 'multiplyer'",
        ),
        (
            {"sources": [{"kind": "folder", "images": 3, "masks": "m"}]},
            r"data.sources\[0\].images must be str, got 3",
        ),
        (
            {"sources": [{"kind": "procedural", "scene": {"num_objects": "3"}}]},
            r"data.sources\[0\].scene.num_objects must be int, got '3'",
        ),
        (
            {"sources": [{"kind": "procedural", "scene": {"kinds": ["odd"]}}]},
            "kinds must be some of plain, occluded, distractor",
        ),
        ({"sources": [{"kind": "procedural", "num_clips": True}]}, "num_clips must be int"),
        ({"sources": [{"kind": "procedural", "multiplier": 0}]}, "multiplier must be at least 1"),
        ({"sources": [{"kind": "procedural", "weight": 0}]}, "weight must be above 0"),
        (
            {"sources": [{"kind": "procedural", "weight": 1}, {"kind": "procedural"}]},
            "give every source a weight, or none",
        ),
        ({"augment": {"flip_prob": 2}}, "flip_prob must be a probability"),
        ({"augment": {"shear": -1.0}}, "shear must not be negative"),
        ({"augment": 5}, "data.augment must be a table"),
        ({"max_damaged": -1}, "max_damaged must be at least 0"),
    ],
)
def test_configuration_errors(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig.from_dict(values)


def test_missing_and_empty_folders(tmp_path):
    (tmp_path / "there").mkdir()
    there, gone = str(tmp_path / "there"), str(tmp_path / "gone")
    for source in (FolderSource(gone, there), FolderSource(there, gone), SAVSource(gone, there)):
        with pytest.raises(FileNotFoundError, match="there is no folder .*gone"):
            loader(source)
    with pytest.raises(FileNotFoundError, match="there is no file .*gone"):
        loader(ImagesSource(there, gone))
    for source in (FolderSource(there, there), SAVSource(there, there)):
        with pytest.raises(ValueError, match="there is empty"):
            loader(source)
    with pytest.raises(FileNotFoundError, match="there is no file_list"):
        loader(FolderSource(there, there, file_list=gone))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_epochs": 0}, "num_epochs must be at least 1"),
        ({"process_index": 1}, "process_index"),
        ({"batch_size": 4, "num_epochs": 1}, "do not fill a batch of 4"),
    ],
)
def test_loader_errors(options, message):
    with pytest.raises(ValueError, match=message):
        loader(procedural(3), **options)
