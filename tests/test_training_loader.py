"""The loader shuffles, shards and resumes, and puts up with some damage."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from PIL import Image

from sam2jax.training.data.config import ImagesSource, SAVSource, SceneConfig
from sam2jax.training.data.procedural import procedural_clip
from tests.datasets import (
    HEIGHT,
    WIDTH,
    folder_source,
    loader,
    numbers,
    procedural,
    write_images,
    write_palette_video,
    write_sav,
)


def test_an_epoch_has_every_example_once_in_random_order(tmp_path):
    source = write_images(tmp_path, 10)
    one = numbers(loader(source, num_epochs=1))
    assert sorted(one) == list(range(10)) and one != list(range(10))
    two = numbers(loader(source, num_epochs=2))
    assert two[:10] == one and sorted(two[10:]) == list(range(10)) and two[10:] != one
    assert numbers(loader(source, num_epochs=1, seed=1)) != one
    batch = next(loader(source))
    assert batch.frames.shape == (2, 1, 16, 16, 3) and batch.masks.shape == (2, 1, 2, 16, 16)
    assert batch.objects.tolist() == [[True, False]] * 2


@pytest.mark.parametrize("workers", [0, 3])
def test_processes_share_the_examples_out(tmp_path, workers):
    source = write_images(tmp_path, 14)
    options = {"num_epochs": 1, "process_count": 2, "workers": workers}
    parts = [numbers(loader(source, process_index=i, **options)) for i in range(2)]
    assert len(parts[0]) == len(parts[1]) == 6
    assert len(set(parts[0]) | set(parts[1])) == 12
    whole = [numbers(loader(source, process_index=i, **options, batch_size=7)) for i in range(2)]
    assert sorted(whole[0] + whole[1]) == list(range(14))


@pytest.mark.parametrize(
    "workers, processes", [(0, 0), (3, 0), pytest.param(1, 2, marks=pytest.mark.slow)]
)
def test_a_resumed_run_sees_what_it_would_have_seen(tmp_path, workers, processes):
    write_palette_video(tmp_path, "a", 8)
    write_palette_video(tmp_path, "b", 8)
    sources = [folder_source(tmp_path, multiplier=3, reverse_time_prob=0.5), procedural(5)]
    options = {"num_frames": 3, "max_objects": 3, "image_size": 32, "workers": workers}
    straight, plain = (loader(*sources, **options, processes=n) for n in (processes, 0))
    for _ in range(6):
        np.testing.assert_array_equal(next(straight).frames, next(plain).frames)
    state = json.loads(json.dumps(straight.get_state()))
    expected = [next(straight) for _ in range(5)]
    straight.close()
    for count in (0, 2):
        given = options | {"workers": workers or count, "processes": processes}
        resumed = loader(*sources, **given)
        for _ in range(count):
            next(resumed)
        resumed.set_state(state)
        for batch in expected:
            for one, other in zip(batch, next(resumed), strict=True):
                np.testing.assert_array_equal(one, other)
        resumed.close()
    assert len({batch.frames.tobytes() for batch in expected}) == 5


def test_a_state_of_another_order_is_refused(tmp_path):
    source = write_images(tmp_path, 6)
    state = loader(source, seed=1).get_state()
    with pytest.raises(ValueError, match="resume with the same seed"):
        loader(source, seed=2).set_state(state)


def test_multiplier_and_weights(tmp_path):
    few, many = write_images(tmp_path / "few", 2), write_images(tmp_path / "many", 40)
    for i in range(2):
        Image.new("RGB", (20, 16), (200 + 2 * i,) * 3).save(tmp_path / "few" / f"sa_{i}.png")

    def of_few(*sources, **options):
        return [n >= 100 for n in numbers(loader(*sources, batch_size=1, **options))]

    def again(source, **options):
        return ImagesSource(source.images, source.masks, augment=False, **options)

    shown = of_few(again(few, multiplier=5), again(many), num_epochs=1)
    assert len(shown) == 50 and sum(shown) == 10
    shown = of_few(again(few, weight=3.0), again(many, weight=1.0), num_epochs=2)
    assert len(shown) == 84 and sum(shown) == 63


def test_procedural_clips_of_seeds(tmp_path):
    batch = next(loader(procedural(1, first_seed=7), image_size=64, num_frames=4, batch_size=1))

    expected = procedural_clip(SceneConfig(num_objects=2), 7, image_size=64, num_frames=4)
    for one, other in zip(batch, expected, strict=True):
        np.testing.assert_array_equal(one[0], other)


# Damage -------------------------------------------------------------------------------------------


def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "absent":
        path.unlink()
    else:
        path.write_bytes(b"nonsense")


@pytest.mark.parametrize("how", ["truncated", "absent", "nonsense"])
@pytest.mark.parametrize("suffix", ["png", "json"])
def test_a_damaged_file_is_named_and_replaced(tmp_path, caplog, how, suffix):
    source = write_images(tmp_path, 8)
    batches = loader(source)
    good = [numbers([next(batches)]) for _ in range(4)]
    damage(tmp_path / f"sa_{good[1][0]}.{suffix}", how)
    batches = loader(source, workers=2)
    if (suffix, how) == ("png", "absent"):  # what is not listed is not missed
        assert len(numbers(loader(source, batch_size=1, num_epochs=1))) == 7
        return
    with caplog.at_level(logging.WARNING):
        found = [numbers([next(batches)]) for _ in range(8)]
    assert found[0] == good[0] and found[1][1] == good[1][1] and found[2:4] == good[2:]
    assert found[1][0] != good[1][0]
    (message,) = batches.damaged
    assert f"sa_{good[1][0]}.{suffix}" in message
    assert [message in record.getMessage() for record in caplog.records] == [True]
    again = loader(source)
    assert [numbers([next(again)]) for _ in range(8)] == found


def test_a_damaged_frame_or_palette(tmp_path):
    for name in "abc":
        write_palette_video(tmp_path, name, 3)
    damage(tmp_path / "JPEGImages" / "a" / "00001.jpg", "truncated")
    damage(tmp_path / "Annotations" / "b" / "00002.png", "truncated")
    batches = loader(folder_source(tmp_path), num_frames=3, image_size=32)
    for _ in range(6):
        assert next(batches).masks[:, 0].any((1, 2, 3)).all()
    assert sorted(message.split(" is ")[0][-11:] for message in batches.damaged) == [
        "a/00001.jpg",
        "b/00002.png",
    ]


def test_masks_that_are_not_indices_or_of_another_size(tmp_path):
    for name in "abc":
        write_palette_video(tmp_path, name, 1)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "Annotations" / "a" / "00000.png")
    Image.new("L", (9, 9), 1).save(tmp_path / "Annotations" / "b" / "00000.png")
    batches = loader(folder_source(tmp_path), image_size=32)
    for _ in range(3):
        next(batches)
    assert len(batches.damaged) == 2
    for part in (
        "00000.png is a picture of mode RGB; expected one whose pixels are object numbers",
        "b has frames",
    ):
        assert any(part in message for message in batches.damaged)


def test_damaged_sav(tmp_path):
    for i in range(3):
        write_sav(tmp_path, f"sav_{i}", 9)
    damage(tmp_path / "sav_0_manual.json", "truncated")
    damage(tmp_path / "sav_1" / "00004.jpg", "truncated")
    batches = loader(SAVSource(str(tmp_path), str(tmp_path)), num_frames=3, image_size=32)
    for _ in range(4):
        next(batches)
    assert len(batches.damaged) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_too_much_damage_stops_the_run(tmp_path, workers):
    source = write_images(tmp_path, 12)
    for i in range(4):
        damage(tmp_path / f"sa_{3 * i}.json", "nonsense")
    batches = loader(source, max_damaged=3, workers=workers)
    with pytest.raises(ValueError, match=r"4 damaged examples, .* is 3;.*sa_\d+.json"):
        for _ in range(6):
            next(batches)
    tolerant = loader(source, max_damaged=4, workers=workers)
    for _ in range(6):
        next(tolerant)
    assert len(tolerant.damaged) == 4


def test_nothing_but_damage_stops_the_run(tmp_path):
    source = write_images(tmp_path, 2)
    for i in range(2):
        damage(tmp_path / f"sa_{i}.json", "truncated")
    with pytest.raises(ValueError, match="100 examples in a row cannot be used; the last: .*sa_"):
        next(loader(source))


@pytest.mark.parametrize("workers", [0, 2])
def test_videos_that_no_clip_can_be_drawn_from_are_no_damage(tmp_path, caplog, workers):
    """However many: they are too short, or show nothing."""
    for i in range(9):
        write_palette_video(tmp_path, f"v{i}", 1 if i < 6 else 4)
    for path in (tmp_path / "Annotations" / "v8").iterdir():
        Image.new("L", (WIDTH, HEIGHT)).save(path)
    batches = loader(
        folder_source(tmp_path), max_damaged=0, num_frames=4, image_size=32, workers=workers
    )
    with caplog.at_level(logging.INFO):
        for _ in range(6):
            assert next(batches).masks[:, 0].any((1, 2, 3)).all()
    assert not batches.damaged
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "v0 has 1 annotated frames, and a clip of 4 needs 4" in said
    assert "v8 has no frame with an object" in said


def test_images_of_one_file_are_told_apart(tmp_path):
    """COCO's annotations of all images are in one."""
    source = write_images(tmp_path, 6)
    images = [{"id": i, "file_name": f"sa_{i}.png"} for i in range(6)]
    annotations = [{"image_id": i, "segmentation": 3, "area": 9} for i in range(6)]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    batches = loader(dataclasses.replace(source, masks=str(path)), max_damaged=3)
    with pytest.raises(ValueError, match=r"4 damaged .*instances.json \(sa_\d.png\)"):
        next(batches)
