"""`sam2jax eval`: benchmarks of semi-supervised video object segmentation."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from sam2jax.cli.session import (
    SOME_FAILED,
    ComputeType,
    DType,
    ImageSize,
    OptionalCheckpoint,
    Policy,
    Quiet,
    errors_told,
    load_model,
    read_policy,
)

if TYPE_CHECKING:
    from sam2jax.evaluation.scoring import Results
    from sam2jax.evaluation.vos import VOSOptions
    from sam2jax.predictors.video import SAM2VideoPredictor


def evaluate(
    videos: Annotated[
        pathlib.Path | None,
        typer.Argument(metavar="VIDEOS", help="The folder that holds VIDEO/FRAME.jpg."),
    ] = None,
    masks: Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="DIR",
            help="The masks to start from: VIDEO/FRAME.png, or VIDEO/OBJECT/FRAME.png as in SA-V.",
        ),
    ] = None,
    checkpoint: OptionalCheckpoint = None,
    out: Annotated[
        pathlib.Path | None, typer.Option(metavar="DIR", help="The masks that are found.")
    ] = None,
    video_list: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FILE.txt", help="Names of videos, a line each; by default all."),
    ] = None,
    per_object_png: Annotated[
        bool | None,
        typer.Option(
            "--per-object-png/--palette-png",
            help="A folder of PNGs for each object, and these may overlap, or one PNG for all; by "
            "default as the given masks are.",
        ),
    ] = None,
    objects_appear_later: Annotated[
        bool,
        typer.Option(
            "--objects-appear-later",
            help="Start each object at its first mask (LVOS, YouTube-VOS), not all at frame 0.",
        ),
    ] = False,
    use_all_masks: Annotated[
        bool, typer.Option("--use-all-masks", help="Start from all masks, not the first ones.")
    ] = False,
    score_threshold: Annotated[
        float, typer.Option(help="Logit above which a pixel is on the object.")
    ] = 0.0,
    apply_postprocessing: Annotated[
        bool,
        typer.Option(
            "--apply-postprocessing/--no-postprocessing",
            help="Whether to fill holes and pick stable masks; benchmarks are run without.",
        ),
    ] = False,
    policy: Policy = "sam2",
    image_size: ImageSize = None,
    dtype: ComputeType = DType.float32,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Of N processes, be number I, from 0 on.")
    ] = "0/1",
    score: Annotated[
        bool, typer.Option("--score", help="Score the masks in --out, after tracking if asked to.")
    ] = False,
    truth: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="DIR", help="The true masks; by default those of --masks."),
    ] = None,
    keep_first_and_last: Annotated[
        bool, typer.Option("--keep-first-and-last", help="Score a video's end frames too.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict/--no-strict", help="Whether all videos must be there.")
    ] = True,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that score; by default one per core.")
    ] = None,
    as_json: Annotated[
        pathlib.Path | None, typer.Option("--json", metavar="FILE", help="The scores in full.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Track the objects of a benchmark's videos from their first masks, and score the masks.

    The layouts are those of DAVIS, MOSE, LVOS, YouTube-VOS and SA-V; masks are written as their
    servers expect them. A video's folder appears in --out when it is whole, and videos that have
    one are passed over: a run that was stopped goes on where it was. Videos that fail are named
    and passed over; the exit code is 1 then.

    --score prints J&F, J and F (in percent, first and last frames left out) and writes those of
    every video and object to results.csv in --out.

    \b
    Examples:
      sam2jax eval DAVIS/JPEGImages/480p --masks DAVIS/Annotations/480p \\
        --video-list DAVIS/ImageSets/2017/val.txt --checkpoint sam2.1_hiera_tiny.pt \\
        --out davis --score
      sam2jax eval sav_val/JPEGImages_24fps --masks sav_val/Annotations_6fps \\
        --video-list sav_val/sav_val.txt --checkpoint sam2.1_hiera_tiny.pt --out sav --shard 0/4
      sam2jax eval --score --truth sav_val/Annotations_6fps --out sav
    """
    with errors_told():
        part, parts = _parse_shard(shard)
        scoring = {
            "--truth": truth is not None,
            "--keep-first-and-last": keep_first_and_last,
            "--no-strict": not strict,
            "--workers": workers is not None,
            "--json": as_json is not None,
        }
        unused = [option for option, given in scoring.items() if given]
        if unused and not score:
            raise ValueError(f"{', '.join(unused)} is for scoring; give --score too.")
        if as_json is not None and not as_json.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder for --json {as_json}; create it first.")
        if videos is None and not score:
            raise ValueError("there is nothing to do: give VIDEOS, --score or both.")
        if out is None:
            raise ValueError("say where the masks are to be, or are, with --out.")
        held = (("videos", videos), ("given masks", masks), ("given masks", truth))
        for what, folder in held:
            if folder is not None and folder.resolve() == out.resolve():
                raise ValueError(f"{out} holds the {what}; choose another folder for --out.")
        truth = truth or masks
        if score and truth is None:
            raise ValueError("say where the true masks are, with --truth.")
        if score and parts > 1:
            raise ValueError("a shard is not the whole set; score when all of them are done.")
        names = _list(videos, video_list)
        failed = False
        if score and truth is not None and per_object_png is not None:
            _check_layout(truth, names or [], per_object_png)
        if videos is not None:
            if masks is None or checkpoint is None:
                raise ValueError("tracking needs --masks and --checkpoint.")
            rules = read_policy(policy)
            from sam2jax.evaluation.vos import VOSOptions
            from sam2jax.predictors.video import SAM2VideoPredictor

            assert names is not None
            failed = _track(
                (videos, masks, out),
                names[part::parts],
                lambda: SAM2VideoPredictor(
                    *load_model(checkpoint, image_size, dtype, apply_postprocessing, memory=True),
                    policy=rules,
                ),
                VOSOptions(objects_appear_later, use_all_masks, per_object_png, score_threshold),
                quiet,
            )
            if failed and strict:  # what there is can be scored otherwise
                raise typer.Exit(SOME_FAILED)
        if score and truth is not None:
            from sam2jax.evaluation.scoring import score_folders

            results = score_folders(
                truth,
                out,
                names,
                keep_first_and_last=keep_first_and_last,
                strict=strict,
                workers=workers or os.cpu_count() or 1,
                progress=not quiet,
            )
            _report(results, out / "results.csv", as_json)
        if failed:
            raise typer.Exit(SOME_FAILED)


def _parse_shard(text: str) -> tuple[int, int]:
    """`1/4` -> (1, 4)"""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shard is {text}; expected I/N with I from 0 to N-1, such as 0/4.")
    return int(match[1]), int(match[2])


def _list(videos: pathlib.Path | None, video_list: pathlib.Path | None) -> list[str] | None:
    """Names of the videos that are meant; None: those that there are masks of."""
    from sam2jax.evaluation.layouts import list_videos, read_video_list

    if video_list is not None:
        return read_video_list(video_list)
    return None if videos is None else list_videos(videos)


def _check_layout(truth: pathlib.Path, names: list[str], per_object: bool) -> None:
    """Masks are scored in the layout of the true ones."""
    from sam2jax.evaluation.layouts import open_masks

    first = next((truth / name for name in names if (truth / name).is_dir()), None)
    if first is not None and open_masks(first).per_object != per_object:
        option = "--per-object-png" if per_object else "--palette-png"
        raise ValueError(
            f"{option} writes another layout than that of {first}, which it could not be scored "
            "against; leave it or --score out."
        )


def _track(
    folders: tuple[pathlib.Path, pathlib.Path, pathlib.Path],
    names: list[str],
    load: Callable[[], SAM2VideoPredictor],
    options: VOSOptions,
    quiet: bool,
) -> bool:
    """Writes the masks of the videos that have none yet; whether some failed."""
    from sam2jax.evaluation.vos import segment_videos, unfinished

    todo = unfinished(folders[-1], names)
    if len(todo) < len(names):
        typer.echo(
            f"{len(names) - len(todo)} of {len(names)} videos have masks in {folders[-1]}, and are "
            "passed over.",
            err=True,
        )
    if not todo:
        return False
    failed = 0
    for outcome in segment_videos(load(), *folders, todo, options, progress=not quiet):
        if outcome.problem is not None:
            failed += 1
            typer.echo(f"error: {outcome.video}: {outcome.problem}", err=True)
    if failed:
        typer.echo(f"{failed} of {len(todo)} videos failed; run again to try those only.", err=True)
    return failed > 0


def _report(results: Results, table: pathlib.Path, as_json: pathlib.Path | None) -> None:
    from sam2jax.io.files import atomic_path

    results.write_csv(table)
    if as_json is not None:
        with atomic_path(as_json) as temporary:
            temporary.write_text(json.dumps(results.to_dict(), indent=1) + "\n")
    objects = sum(map(len, results.objects.values()))
    jf, j, f = results.overall.jf, results.overall.j, results.overall.f
    typer.echo(
        f"J&F {jf:.1f}  J {j:.1f}  F {f:.1f}  ({objects} objects, {len(results.objects)} videos)"
    )
