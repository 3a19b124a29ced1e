"""`sam2jax demo`: objects through a synthetic clip, with the weights that ship."""

from __future__ import annotations

import pathlib
import time
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from sam2jax.cli.session import DType, errors_told, load_model, make_folder

if TYPE_CHECKING:
    import numpy as np

    from sam2jax.training.data.clip import Clip
    from sam2jax.types import FrameOutput, Prompts

SEED = 4  # below those that the model was trained on
NUM_FRAMES, SIZE, NUM_OBJECTS = 32, 256, 3
_FPS = 8
_DRAWN = 2  # pixels of the drawn video per pixel of the clip
_COLOR = 0.15  # share of the clip's colours that is left
_COLUMNS, _ROWS = 4, 3  # of the sheet


class _Tracked(NamedTuple):
    """What came of it."""

    masks: np.ndarray  # [T, N, 2S, 2S] bool, for drawing
    score: float  # J&F
    hidden: np.ndarray  # [T, N] bool, what the object scores say
    compiled: float  # seconds until there was a program
    rate: float  # frames per second


def demo(
    out: Annotated[pathlib.Path, typer.Option(metavar="DIR", help="Where to write.")] = (
        pathlib.Path()
    ),
    seed: Annotated[int, typer.Option(min=0, help="Which clip to draw.")] = SEED,
    checkpoint: Annotated[
        str, typer.Option(help="Another model: a .pt, safetensors, or a hub id.")
    ] = "sam2.1_hiera_nano",
) -> None:
    """Track three objects through a synthetic clip, with the small model that ships.

    One object goes out of sight and comes back, while something that looks like it passes by; each
    is clicked once. Writes sam2jax_demo.mp4 and a contact sheet, sam2jax_demo.png. Needs neither
    a checkpoint nor the internet.

    \b
    Example:
      sam2jax demo
    """
    with errors_told():
        make_folder(out)
        import numpy as np

        from sam2jax.training.data.clip import middle
        from sam2jax.training.data.config import HARD, SceneConfig
        from sam2jax.training.data.procedural import procedural_clip
        from sam2jax.types import Prompts

        model, params = load_model(checkpoint, None, DType.float32)
        scene = SceneConfig(num_objects=NUM_OBJECTS, kinds=(HARD,))
        clip = procedural_clip(scene, seed, image_size=SIZE, num_frames=NUM_FRAMES)
        clicks = [middle(mask) for mask in clip.masks[0]]
        tracked = _track(model, params, clip, Prompts.make(points=[[click] for click in clicks]))
        pictures = _draw(clip, tracked.masks, clicks)
        film, sheet = out / "sam2jax_demo.mp4", out / "sam2jax_demo.png"
        _write_film(film, pictures)
        _write_sheet(sheet, pictures, tracked.hidden)

        absent = ~clip.masks.any((2, 3))
        found = np.count_nonzero(absent & tracked.hidden)
        typer.echo(
            f"J&F {tracked.score:.3f} over {NUM_OBJECTS} objects, one click each; "
            f"{found} of {np.count_nonzero(absent)} hidden frames detected"
        )
        typer.echo(f"{tracked.rate:.1f} frames/s after {tracked.compiled:.0f} s of compiling")
        typer.echo(f"{film}\n{sheet}")


def _track(model: Any, params: Any, clip: Clip, prompts: Prompts) -> _Tracked:
    import jax
    import numpy as np

    from sam2jax.evaluation.metrics import score_clip
    from sam2jax.ops.resize import resize_masks
    from sam2jax.tracking.scan import track

    @jax.jit
    def run(params: Any, frames: Any) -> tuple[FrameOutput, Any, Any]:
        _, answer = track(model, params, frames, prompts)
        size = frames.shape[1]
        drawn = resize_masks(answer.masks, (_DRAWN * size, _DRAWN * size)) > 0
        return answer, resize_masks(answer.masks, (size, size)) > 0, drawn

    start = time.perf_counter()
    program = run.lower(params, clip.frames).compile()
    compiled = time.perf_counter()
    answer, masks, drawn = jax.block_until_ready(program(params, clip.frames))
    end = time.perf_counter()
    return _Tracked(
        masks=np.asarray(drawn),
        score=float(np.mean(score_clip(clip.masks, np.asarray(masks)))),
        hidden=np.asarray(answer.object_score) <= 0,
        compiled=compiled - start,
        rate=len(clip.frames) / (end - compiled),
    )


def _draw(clip: Clip, masks: np.ndarray, clicks: list[tuple[float, float]]) -> list[np.ndarray]:
    """Each frame, paled, with the masks as fills, the truth as a white line, and the clicks."""
    import numpy as np
    from PIL import Image, ImageEnhance

    from sam2jax.io.drawing import Marks, contour, overlay

    size, ids = _DRAWN * SIZE, range(1, NUM_OBJECTS + 1)
    marks = [
        Marks(i, [(_DRAWN * (x + 0.5), _DRAWN * (y + 0.5))], [1])
        for i, (x, y) in zip(ids, clicks, strict=True)
    ]
    pictures = []
    for index, frame in enumerate(clip.frames):
        large = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)
        pale = np.asarray(ImageEnhance.Color(large).enhance(_COLOR))  # so that the fills show
        picture = overlay(pale, masks[index], ids, marks if index == 0 else (), opacity=0.6)
        for truth in clip.masks[index].repeat(_DRAWN, axis=1).repeat(_DRAWN, axis=2):
            picture[contour(truth, 1)] = 255
        pictures.append(picture)
    return pictures


def _write_film(path: pathlib.Path, pictures: list[np.ndarray]) -> None:
    from sam2jax.io.writer import VideoWriter

    with VideoWriter(path, _FPS, *pictures[0].shape[:2]) as film:
        for picture in pictures:
            film.write(picture)


def _write_sheet(path: pathlib.Path, pictures: list[np.ndarray], hidden: np.ndarray) -> None:
    import numpy as np
    from PIL import Image

    from sam2jax.io.images import write_image
    from sam2jax.io.sheet import Cell, contact_sheet

    def small(picture: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.LANCZOS))

    shown = np.linspace(0, len(pictures) - 1, _COLUMNS * _ROWS).round().astype(int).tolist()
    cells = [Cell(small(pictures[i]), f"frame {i}", hidden[i].tolist()) for i in shown]
    title = "fill: tracked from one click each (+)    white line: ground truth    ring: hidden"
    write_image(path, contact_sheet(title, cells, range(1, NUM_OBJECTS + 1), _COLUMNS))
