"""`sam2jax track-all`: objects through many videos, on all devices, alone or as one of many."""

from __future__ import annotations

import contextlib
import enum
import os
import pathlib
from typing import Annotated

import typer
from tqdm import tqdm

from sam2jax.cli.prompts import BOX, POINT, read_prompts
from sam2jax.cli.session import (
    SOME_FAILED,
    Checkpoint,
    ComputeType,
    DType,
    ImageSize,
    Policy,
    Postprocessing,
    Quiet,
    errors_told,
    load_model,
    make_folder,
    read_policy,
)


class Masks(enum.StrEnum):
    json = "json"
    npz = "npz"
    png = "png"


def track_all(
    videos: Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="LIST|FOLDER", help="A file with a video on each line, or a folder of videos."
        ),
    ],
    checkpoint: Checkpoint,
    out: Annotated[
        pathlib.Path, typer.Option(metavar="DIR", help="Where each video's masks are written.")
    ],
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar=POINT, help="A click in all videos that have no prompts of their own."
        ),
    ] = None,
    box: Annotated[
        list[str] | None, typer.Option(metavar=BOX, help="A box in all of those.")
    ] = None,
    prompts: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE.json", help="Prompts for all of those.")
    ] = None,
    masks: Annotated[
        Masks,
        typer.Option(help="NAME.json (COCO run lengths), NAME.npz (arrays), or NAME/ (PNGs)."),
    ] = Masks.json,
    dtype: ComputeType = DType.float32,
    image_size: ImageSize = None,
    apply_postprocessing: Postprocessing = True,
    policy: Policy = "sam2",
    videos_per_device: Annotated[
        int, typer.Option(min=1, help="Videos that a device tracks at once.")
    ] = 1,
    process_id: Annotated[
        int | None,
        typer.Option(min=0, help="Which of several processes this is; by default the scheduler's."),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="How many share the list; likewise.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Track objects through many videos, from prompts in a list or beside each video.

    Several videos are tracked at once, split over all devices of this machine. Each one's masks
    appear in --out when they are whole, and videos that have them are passed over: a run that was
    stopped goes on where it was. Videos that fail are named at the end; the exit code is 1 then,
    and another run tries those again.

    Each of N processes does every N-th video of the list, and they need not know of each other.
    Slurm and TPU pods say which one it is; in a Kubernetes Job or JobSet give --num-processes, and
    anywhere else --process-id too.

    \b
    Examples:
      sam2jax track-all videos/ --checkpoint sam2.1_hiera_tiny.pt --out masks/
      sam2jax track-all videos.txt --checkpoint sam2.1_hiera_tiny.pt --out masks/ --point 210,350
      srun -n 8 sam2jax track-all videos.txt --checkpoint sam2.1_hiera_tiny.pt --out masks/

    \b
    A line of a list is a path, or JSON; paths are relative to the list. Prompts are those of
    sam2jax track, here or in a file; without any, VIDEO.json beside the video is read.
      clips/cups.mp4
      {"video": "clips/dog.mp4", "prompts": [{"object": 1, "points": [[210, 350]]}]}
      {"video": "frames/cat", "prompts": "cat_prompts.json", "name": "cat_1"}
    """
    with errors_told():
        from sam2jax.cli.plan import find_process, read_list, share

        index, count = find_process(os.environ, process_id, num_processes)
        tasks = read_list(videos)
        prompted = {t.prompts.parent for t in tasks if isinstance(t.prompts, pathlib.Path)}
        _refuse_folder_of_videos(out, videos, {t.video.parent for t in tasks} | prompted)
        rules = read_policy(policy)
        given = point or box or prompts
        common = read_prompts(point or (), box or (), (), prompts) if given else None
        make_folder(out)
        from sam2jax.cli.batch import result_path

        mine = share(tasks, index, count)
        todo = [task for task in mine if not result_path(out, task.name, masks.value).exists()]
        if count > 1 or len(todo) < len(mine):
            typer.echo(
                f"process {index} of {count}: {len(todo)} of its {len(mine)} videos are to be "
                f"done ({len(tasks)} in all); the others have results in {out}",
                err=True,
            )
        if not todo:
            return
        model, params = load_model(checkpoint, image_size, dtype, apply_postprocessing, memory=True)
        from sam2jax.cli.batch import Job
        from sam2jax.cli.batch import track_all as run

        job = Job(model, params, rules, out, masks.value, common, videos_per_device)
        with contextlib.closing(run(job, todo)) as outcomes:
            bar = tqdm(outcomes, total=len(todo), unit=" videos", disable=quiet)
            failed = [outcome for outcome in bar if outcome.problem is not None]
    for outcome in failed:
        typer.echo(f"error: {outcome.name}: {outcome.problem}", err=True)
    if failed:
        typer.echo(f"{len(failed)} of {len(todo)} videos failed; run again to try those.", err=True)
        raise typer.Exit(SOME_FAILED)


def _refuse_folder_of_videos(
    out: pathlib.Path, videos: pathlib.Path, folders: set[pathlib.Path]
) -> None:
    """A result beside a video would be taken for its prompts, or replace its frames; a folder
    beside videos would be taken for one of them."""
    if any(folder.resolve() == out.resolve() for folder in folders):
        raise ValueError(
            f"{out} holds videos or prompts of the list; choose another folder for --out."
        )
    if videos.is_dir() and out.resolve().is_relative_to(videos.resolve()):
        raise ValueError(f"{out} is inside of {videos}; choose another folder for --out.")
