"""Answers in the forms of other libraries; those that are not installed have a stand-in."""

import importlib.util
import sys
import types

import numpy as np
import pytest

from sam2jax.io.drawing import color
from sam2jax.io.interop import to_fiftyone, to_napari, to_supervision


@pytest.fixture
def logits():
    """Objects 3, 1 and 7 on a frame of 20 x 30: overlapping, and the last one out of sight."""
    logits = np.full((3, 1, 20, 30), -1024.0, np.float32)
    logits[0, 0, 2:10, 3:20] = 5.0
    logits[1, 0, 5:15, 10:25] = 2.0
    return logits


def stand_in(monkeypatch, name: str, *classes: str):
    """A module whose classes hold what they are given, unless the real one is installed."""
    if importlib.util.find_spec(name):
        return
    made = {
        c: type(c, (types.SimpleNamespace,), {"empty": classmethod(lambda k: k())}) for c in classes
    }
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**made))


def test_supervision(monkeypatch, logits):
    stand_in(monkeypatch, "supervision", "Detections")
    found = to_supervision(logits, [3, 1, 7], [0.9, 0.8, 0.0])
    assert found.tracker_id.tolist() == found.class_id.tolist() == [3, 1]
    assert found.xyxy.tolist() == [[3, 2, 20, 10], [10, 5, 25, 15]]
    np.testing.assert_array_equal(found.mask, logits[:2, 0] > 0)
    np.testing.assert_allclose(found.confidence, [0.9, 0.8])
    assert to_supervision(logits[:, 0] > 0, [3, 1, 7]).confidence is None
    assert type(to_supervision(logits[2:], [7])) is type(found)


def test_fiftyone(monkeypatch, logits):
    stand_in(monkeypatch, "fiftyone", "Detection", "Detections")
    first, second = to_fiftyone(logits, ["cup", "dog", "cat"], [0.9, 0.8, 0.0]).detections
    assert (first.label, first.index, second.label, second.index) == ("cup", 1, "dog", 2)
    np.testing.assert_allclose(second.bounding_box, [10 / 30, 5 / 20, 15 / 30, 10 / 20])
    assert second.mask.shape == (10, 15) and second.mask.all()
    assert second.confidence == pytest.approx(0.8)


def test_napari(logits):
    labels, arguments, kind = to_napari(np.stack([logits, logits[:, :, ::-1]]), [3, 1, 7])
    assert kind == "labels" and labels.shape == (2, 20, 30) and labels.dtype == np.int32
    expected = np.where(logits[0, 0] > 0, 3, np.where(logits[1, 0] > 0, 1, 0))
    np.testing.assert_array_equal(labels, [expected, expected[::-1]])
    np.testing.assert_allclose(arguments["colormap"][3][:3], np.array(color(3)) / 255)
    if importlib.util.find_spec("napari"):
        from napari.layers import Layer

        assert Layer.create(labels, arguments, kind).data.shape == labels.shape


def test_what_does_not_fit_is_refused(monkeypatch, logits):
    stand_in(monkeypatch, "supervision", "Detections")
    with pytest.raises(ValueError, match=r"\[2, H, W\] for 2 object ids, got \[3, 20, 30\]"):
        to_supervision(logits, [3, 1])
    with pytest.raises(ValueError, match=r"Scores must be \[3\]"):
        to_supervision(logits, [3, 1, 7], [0.5])
    with pytest.raises(ValueError, match=r"whole numbers, got the ids \[1, 'cup', 2\]"):
        to_supervision(logits, [1, "cup", 2])
    for ids in ([0, 1, 2], [1, "cup", 2]):
        with pytest.raises(ValueError, match="from 1 on"):
            to_napari(logits[None], ids)
    with pytest.raises(ValueError, match="at least one frame"):
        to_napari(logits[None][:0], [3, 1, 7])
