"""A picture that can be clicked, for notebooks with `anywidget`."""

from __future__ import annotations

import io
from typing import Any

import anywidget
import traitlets
from PIL import Image

from sam2jax.io.drawing import color
from sam2jax.io.notebook import Clicks

_SCRIPT = """
function render({ model, el }) {
  const canvas = document.createElement("canvas");
  canvas.style.maxWidth = "100%";
  canvas.style.cursor = "crosshair";
  el.appendChild(canvas);
  const picture = new Image();
  const radius = () => Math.max(5, canvas.width / 60);

  function draw() {
    const context = canvas.getContext("2d");
    context.drawImage(picture, 0, 0);
    const r = radius();
    context.lineWidth = r / 3;
    model.get("points").forEach(([x, y], i) => {
      context.beginPath();
      context.arc(x, y, r, 0, 2 * Math.PI);
      context.fillStyle = model.get("color");
      context.strokeStyle = "white";
      context.fill();
      context.stroke();
      context.beginPath();
      context.moveTo(x - r / 2, y);
      context.lineTo(x + r / 2, y);
      if (model.get("labels")[i] === 1) {
        context.moveTo(x, y - r / 2);
        context.lineTo(x, y + r / 2);
      }
      context.stroke();
    });
  }

  function click(event) {
    const box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) * canvas.width) / box.width;
    const y = ((event.clientY - box.top) * canvas.height) / box.height;
    let points = model.get("points");
    let labels = model.get("labels");
    const hit = points.findIndex(([u, v]) => Math.hypot(u - x, v - y) < radius());
    if (hit >= 0) {
      points = points.filter((_, i) => i !== hit);
      labels = labels.filter((_, i) => i !== hit);
    } else {
      points = [...points, [x, y]];
      labels = [...labels, event.shiftKey ? 0 : 1];
    }
    model.set("labels", labels);
    model.set("points", points);  // draws at once, with the labels
    model.save_changes();
  }

  picture.onload = () => {
    canvas.width = picture.width;
    canvas.height = picture.height;
    draw();
  };
  picture.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
  canvas.addEventListener("click", click);
  model.on("change:points", draw);
}
export default { render };
"""


class _ClickWidget(anywidget.AnyWidget):
    _esm = _SCRIPT
    png = traitlets.Bytes().tag(sync=True)
    color = traitlets.Unicode().tag(sync=True)
    points = traitlets.List().tag(sync=True)
    labels = traitlets.List().tag(sync=True)

    def __init__(self, given: Clicks) -> None:
        buffer = io.BytesIO()
        Image.fromarray(given.picture).save(buffer, format="PNG")
        red, green, blue = color(given.object_id)
        super().__init__(
            png=buffer.getvalue(),
            color=f"rgb({red}, {green}, {blue})",
            points=given.points,
            labels=given.labels,
        )
        self._given = given

    def __repr__(self) -> str:
        return f"Clicks(points={self.points}, labels={self.labels})"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """The widget, and beside it a picture for readers without a kernel."""
        bundle = super()._repr_mimebundle_(**options)
        if bundle is None:
            return None
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "image/jpeg": self._given._repr_jpeg_()}, metadata


def make_widget(given: Clicks) -> Any:
    """A widget with the `points` and `labels` of `given`, which clicks change."""
    return _ClickWidget(given)
