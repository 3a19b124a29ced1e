"""`sam2jax auto`: everything in an image, or in a folder of them."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from sam2jax.cli.session import (
    SOME_FAILED,
    Checkpoint,
    ComputeType,
    DType,
    ImageSize,
    Quiet,
    errors_told,
    load_model,
    make_folder,
)

if TYPE_CHECKING:
    import numpy as np


def auto(
    images: Annotated[
        pathlib.Path,
        typer.Argument(metavar="IMAGE|FOLDER", help="A JPEG or PNG file, or a folder of such."),
    ],
    checkpoint: Checkpoint,
    out: Annotated[
        pathlib.Path, typer.Option(metavar="DIR", help="NAME.png and NAME.json for each image.")
    ],
    points_per_side: Annotated[int, typer.Option(min=1, help="Of the grid of points.")] = 32,
    points_per_batch: Annotated[
        int, typer.Option(min=1, help="Points that are answered at once.")
    ] = 64,
    pred_iou_thresh: Annotated[
        float, typer.Option(help="Masks that the model rates no higher are dropped.")
    ] = 0.8,
    stability_score_thresh: Annotated[
        float, typer.Option(help="Masks that are less stable are dropped.")
    ] = 0.95,
    box_nms_thresh: Annotated[
        float, typer.Option(help="Overlap above which the lower rated mask is dropped.")
    ] = 0.7,
    crop_n_layers: Annotated[
        int, typer.Option(min=0, help="Layers of crops (4, 16, ...) to look at closely.")
    ] = 0,
    min_mask_region_area: Annotated[
        int, typer.Option(min=0, help="Smaller regions and holes are removed.")
    ] = 0,
    dtype: ComputeType = DType.float32,
    image_size: ImageSize = None,
    quiet: Quiet = False,
) -> None:
    """Find masks of everything in images.

    Each image gets a picture with its masks in distinct colours and a JSON file with an entry
    for each mask (COCO run lengths, box, scores). Images that have their JSON file already are
    passed over, so a run that was stopped goes on where it was. Images that cannot be read are
    named and passed over; the exit code is 1 then.

    \b
    Example:
      sam2jax auto photos/ --checkpoint sam2.1_hiera_tiny.pt --out masks/
    """
    with errors_told():
        paths = _list(images)
        if any(path.parent.resolve() == out.resolve() for path in paths):
            raise ValueError(f"{out} holds the pictures; choose another folder for --out.")
        todo = [path for path in paths if not _is_done(out, path)]
        make_folder(out)
        if len(todo) < len(paths):
            typer.echo(
                f"{len(paths) - len(todo)} of {len(paths)} images have results in {out}, and are "
                "passed over.",
                err=True,
            )
        if not todo:
            return
        from sam2jax.predictors.automatic import SAM2AutomaticMaskGenerator

        generator = SAM2AutomaticMaskGenerator(
            load_model(checkpoint, image_size, dtype),
            points_per_side=points_per_side,
            points_per_batch=points_per_batch,
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            box_nms_thresh=box_nms_thresh,
            crop_n_layers=crop_n_layers,
            min_mask_region_area=min_mask_region_area,
            progress=len(todo) == 1 and not quiet,
        )
        bar = tqdm(todo, unit=" images", disable=quiet or len(todo) == 1)
        found = [count for path in bar if (count := _process(generator, path, out)) is not None]
    if found and not quiet:
        typer.echo(f"{sum(found)} masks in {len(found)} images: {out}")
    if found and not sum(found):
        typer.echo(
            f"No mask passed --pred-iou-thresh {pred_iou_thresh} and --stability-score-thresh "
            f"{stability_score_thresh}; lower ones let more through.",
            err=True,
        )
    if len(found) < len(todo):
        broken = len(todo) - len(found)
        typer.echo(f"{broken} of {len(todo)} images could not be read.", err=True)
        raise typer.Exit(SOME_FAILED)


def _list(images: pathlib.Path) -> list[pathlib.Path]:
    from sam2jax.io.images import list_images

    if not images.exists():
        raise FileNotFoundError(f"there is no image or folder {images}.")
    return list_images(images) if images.is_dir() else [images]


def _is_done(out: pathlib.Path, path: pathlib.Path) -> bool:
    """Whether a picture has its result; ValueError if another one of its name does."""
    result = _result(out, path)
    if not result.exists():
        return False
    with result.open(encoding="utf-8") as file:
        if json.dumps(path.name) not in file.read(4096):  # it begins with the picture's name
            raise ValueError(f"{result} is not of {path.name}; choose another folder for --out.")
    return True


def _result(out: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    return out / f"{path.stem}.json"


def _process(generator: Any, path: pathlib.Path, out: pathlib.Path) -> int | None:
    """Writes one image's results, the JSON file last, and counts its masks; None where the image
    cannot be read."""
    from sam2jax.io.files import atomic_path
    from sam2jax.io.images import read_image, write_image

    try:
        picture = read_image(path)
    except (ValueError, OSError) as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        return None
    records = generator.generate(picture)
    write_image(out / f"{path.stem}.png", _draw(picture, [r["segmentation"] for r in records]))
    with atomic_path(_result(out, path)) as temporary:
        temporary.write_text(json.dumps(_annotations(path.name, picture, records)))
    return len(records)


def _draw(picture: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """Large masks first, so that small ones lie on top."""
    import numpy as np

    from sam2jax.io.drawing import overlay

    ordered = sorted(masks, key=np.sum, reverse=True)
    stacked = np.stack(ordered) if ordered else np.zeros((0, *picture.shape[:2]), bool)
    return overlay(picture, stacked, range(1, len(ordered) + 1))


def _annotations(name: str, picture: np.ndarray, records: list[dict[str, Any]]) -> dict[str, Any]:
    """As COCO has it, with the fields of the official records."""
    from sam2jax.io.runs import encode_coco

    height, width = picture.shape[:2]
    return {
        "image": {"file_name": name, "height": height, "width": width},
        "annotations": [
            {"id": number, **record, "segmentation": encode_coco(record["segmentation"])}
            for number, record in enumerate(records, start=1)
        ],
    }
