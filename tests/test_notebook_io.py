"""Pictures and clicks in notebooks."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sam2jax.io.notebook import Clicks, clicks, show

RED, BLUE = (np.full((30, 60, 3), c, np.uint8) for c in ((200, 0, 0), (0, 0, 200)))


def test_show_places_pictures_in_rows():
    pixels = show([RED, BLUE, BLUE], columns=2, width=40).pixels
    assert pixels.shape == (20 + 4 + 20, 40 + 4 + 40, 3)
    assert (pixels[5, 5] == RED[0, 0]).all() and (pixels[5, 60] == BLUE[0, 0]).all()
    assert (pixels[30, 60] == 255).all()  # the fourth place is free
    decoded = Image.open(io.BytesIO(show(RED, width=60)._repr_jpeg_()))
    np.testing.assert_allclose(np.asarray(decoded), RED, atol=8)


def test_show_refuses_other_things():
    with pytest.raises(ValueError, match="one size"):
        show([RED, RED[:10]])
    with pytest.raises(ValueError, match="one size"):
        show([])


def without_anywidget(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "anywidget" else find(name)
    )


def test_clicks_without_a_front_end(monkeypatch):
    without_anywidget(monkeypatch)
    given = clicks(RED, points=[(10, 20), (30, 5)], labels=[1, 0])
    assert isinstance(given, Clicks)
    assert given.points == [[10, 20], [30, 5]] and given.labels == [1, 0]
    assert clicks(RED, points=[(10, 20)]).labels == [1]
    drawn = np.asarray(Image.open(io.BytesIO(given._repr_jpeg_())))
    assert np.abs(drawn.astype(int) - RED).max() > 50


def test_clicks_are_refused_where_they_do_not_fit():
    with pytest.raises(ValueError, match="each of 1 points, got 2"):
        clicks(RED, points=[(1, 2)], labels=[1, 0])


def test_importing_needs_no_widget():
    code = "import sys, sam2jax.io.notebook; print({'anywidget', 'traitlets'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_the_widget_has_what_was_given_and_takes_clicks():
    pytest.importorskip("anywidget")
    widget = clicks(RED, points=[(10, 20)], object_id=2)
    assert widget.points == [[10.0, 20.0]] and widget.labels == [1]
    assert Image.open(io.BytesIO(widget.png)).size == (60, 30)
    data, _ = widget._repr_mimebundle_()
    assert data["image/jpeg"][:2] == b"\xff\xd8"
    # What the front end sends when someone clicks.
    widget.set_state({"points": [[10.0, 20.0], [3.0, 4.0]], "labels": [1, 0]})
    assert widget.points[1] == [3.0, 4.0] and widget.labels == [1, 0]


# A browser's parts that the widget uses: a canvas of half the picture's size, 10 and 20 pixels in.
_PAGE = """
const on = {}, state = { points: [], labels: [], png: new Uint8Array(), color: "red" };
const canvas = { style: {}, addEventListener: (name, call) => (on[name] = call),
  getBoundingClientRect: () => ({ left: 10, top: 20, width: 50, height: 40 }),
  getContext: () => new Proxy({}, { get: () => () => {}, set: () => true }) };
globalThis.document = { createElement: () => canvas };
globalThis.Image = class { set src(_) { this.width = 100; this.height = 80; this.onload(); } };
URL.createObjectURL = () => "blob:";
const model = { get: (key) => state[key], set: (key, value) => (state[key] = value),
  save_changes: () => console.log(JSON.stringify([state.points, state.labels])), on: () => {} };
const widget = await import("./widget.mjs");
widget.default.render({ model, el: { appendChild: () => {} } });
for (const [clientX, clientY, shiftKey] of [[35, 40, false], [15, 25, true], [35, 40, false]])
  on.click({ clientX, clientY, shiftKey });
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_clicks_in_the_page(tmp_path):
    """A click adds a point, one with shift a point of the background; on a point, it takes it."""
    pytest.importorskip("anywidget")
    from sam2jax.io.click_widget import _SCRIPT

    (tmp_path / "widget.mjs").write_text(_SCRIPT)
    (tmp_path / "page.mjs").write_text(_PAGE)
    done = subprocess.run(
        ["node", "page.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [[[50, 40]], [1]],
        [[[50, 40], [10, 10]], [1, 0]],
        [[[10, 10]], [0]],
    ]
