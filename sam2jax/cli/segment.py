"""`sam2jax segment`: objects in an image."""

from __future__ import annotations

import contextlib
import pathlib
from typing import TYPE_CHECKING, Annotated

import typer

from sam2jax.cli.prompts import ObjectPrompt, PromptTable, check_inside, read_prompts
from sam2jax.cli.session import (
    Checkpoint,
    ComputeType,
    DType,
    ImageSize,
    errors_told,
    load_model,
    refuse_overwriting,
)

if TYPE_CHECKING:
    import numpy as np

    from sam2jax.predictors.image import SAM2ImagePredictor


def segment(
    image: Annotated[pathlib.Path, typer.Argument(metavar="IMAGE", help="A JPEG or PNG file.")],
    checkpoint: Checkpoint,
    point: Annotated[
        list[str] | None,
        typer.Option(metavar="X,Y[,LABEL][@OBJECT]", help="A click, in pixels. Label 0: not this."),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="X0,Y0,X1,Y1[@OBJECT]", help="A box around an object."),
    ] = None,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="OUT.png", help="The picture with masks drawn in."),
    ] = None,
    masks: Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="DIR|FILE.json|FILE.npz",
            help="The masks: a palette PNG, COCO run lengths or an array.",
        ),
    ] = None,
    dtype: ComputeType = DType.float32,
    image_size: ImageSize = None,
) -> None:
    """Segment objects in an image from clicks or boxes.

    Prompts can be given any number of times, for any object; object 1 and label 1 (on the
    object) where not said. From a single click the best of three masks is taken.

    \b
    Example:
      sam2jax segment cups.jpg --checkpoint sam2.1_hiera_tiny.pt --point 210,350 \\
        --point 250,220,0 --box 320,90,500,400@2 --out cups_masks.png
    """
    with errors_told(), contextlib.ExitStack() as stack:
        table = read_prompts(point or (), box or (), options="--point or --box")
        if set(table.frames) != {0}:
            raise ValueError(f"an image has no frame {max(table.frames)}; leave the frame out.")
        if out is None and masks is None:
            raise ValueError("there is nothing to write: say where with --out or --masks.")
        from sam2jax.io.images import check_picture_name, read_image
        from sam2jax.io.masks import mask_writer
        from sam2jax.predictors.image import SAM2ImagePredictor

        picture = read_image(image)
        check_inside(table, picture.shape[0], picture.shape[1], str(image))
        refuse_overwriting([image], {"--out": out, "--masks": masks})
        if out is not None:
            check_picture_name(out)
        writer = None if masks is None else stack.enter_context(mask_writer(masks))
        predictor = SAM2ImagePredictor(load_model(checkpoint, image_size, dtype))
        predictor.set_image(picture)
        found = _segment(predictor, table)
        if writer is not None:
            writer.write(0, image.stem, table.object_ids, found)
        if out is not None:
            _draw(out, picture, table, found)
        stack.close()  # the masks appear
        for path in filter(None, (out, masks)):
            typer.echo(str(path))


def _segment(predictor: SAM2ImagePredictor, table: PromptTable) -> np.ndarray:
    """Masks of all objects: [N, H, W] bool."""
    import numpy as np

    def best(prompt: ObjectPrompt) -> np.ndarray:
        masks, ious, _ = predictor.predict(
            point_coords=prompt.points or None,
            point_labels=prompt.labels or None,
            box=prompt.box,
            multimask_output=prompt.num_points == 1,
        )
        return masks[np.argmax(ious)] > 0

    return np.stack([best(table.frames[0][object_id]) for object_id in table.object_ids])


def _draw(out: pathlib.Path, picture: np.ndarray, table: PromptTable, found: np.ndarray) -> None:
    from sam2jax.io.drawing import Marks, overlay
    from sam2jax.io.images import write_image

    marks = [Marks(i, p.points, p.labels, p.box) for i, p in table.frames[0].items()]
    write_image(out, overlay(picture, found, table.object_ids, marks))
