"""`sam2jax track`: objects through a video."""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from sam2jax.cli.prompts import (
    BOX,
    MASK,
    POINT,
    PromptTable,
    check_against_video,
    check_inside,
    read_masks,
    read_prompts,
    to_prompts,
)
from sam2jax.cli.session import (
    Checkpoint,
    ComputeType,
    DType,
    ImageSize,
    Policy,
    Postprocessing,
    Quiet,
    errors_told,
    load_model,
    read_policy,
    refuse_overwriting,
)

if TYPE_CHECKING:
    from sam2jax.cli.loop import Job, Result
    from sam2jax.io.stream import Stream
    from sam2jax.io.video import Video

# As tqdm's own, but slow runs show frames per second too, not seconds per frame.
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
_ENDLESS_BAR = "{n_fmt} frames [{elapsed}, {rate_noinv_fmt}]"


def track(
    video: Annotated[
        str,
        typer.Argument(
            metavar="VIDEO",
            help="A video file, a folder of JPEG or PNG frames, or a live stream: a URL, a camera "
            "(/dev/video0) or - for stdin.",
        ),
    ],
    checkpoint: Checkpoint,
    point: Annotated[
        list[str] | None,
        typer.Option(metavar=POINT, help="A click, in pixels of the video. Label 0: not this."),
    ] = None,
    box: Annotated[
        list[str] | None, typer.Option(metavar=BOX, help="A box around an object.")
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(metavar=MASK, help="A picture of an object, bright on dark."),
    ] = None,
    prompts: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE.json", help="A list of prompts, see above.")
    ] = None,
    out: Annotated[
        pathlib.Path | None, typer.Option(metavar="OUT.mp4", help="The video with masks drawn in.")
    ] = None,
    masks: Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="DIR|FILE.json|FILE.npz",
            help="The masks: palette PNGs, COCO run lengths (SA-V's: _manual.json) or arrays.",
        ),
    ] = None,
    dtype: ComputeType = DType.float32,
    image_size: ImageSize = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="From the last prompted frame back to frame 0.")
    ] = False,
    apply_postprocessing: Postprocessing = True,
    policy: Policy = "sam2",
    explain: Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="OUT.png", help="A picture of what was attended to: memories by frames, maps."
        ),
    ] = None,
    raw: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT[@FPS]", help="Frames on stdin are bare bytes, 8-bit RGB."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Track objects through a video from clicks, boxes or masks.

    Prompts can be given any number of times, for any object and frame; object 1, frame 0 and
    label 1 (on the object) where not said. Tracking starts at the first prompted frame. Prompts
    on later frames are taken into account from the start.

    On a live stream nothing lies ahead: prompts count from their frame on. The files are finished
    when the stream ends or Ctrl-C ends it.

    \b
    Examples:
      sam2jax track clip.mp4 --checkpoint sam2.1_hiera_tiny.pt --point 210,350 --out out.mp4
      sam2jax track clip.mp4 --checkpoint sam2.1_hiera_tiny.pt --masks masks/ \\
        --point 210,350 --point 250,220,0 --box 320,90,500,400@2 --point 400,150@2:60
      sam2jax track rtsp://camera/live --checkpoint sam2.1_hiera_tiny.pt --point 210,350 \\
        --out out.mkv
      ffmpeg -i clip.mp4 -f rawvideo -pix_fmt rgb24 - | sam2jax track - --raw 640x480@30 \\
        --checkpoint sam2.1_hiera_tiny.pt --point 210,350 --masks masks.json

    \b
    A file of prompts; paths of masks are relative to it:
      [{"object": 1, "frame": 0, "points": [[210, 350], [250, 220]], "labels": [1, 0]},
       {"object": 2, "frame": 0, "box": [320, 90, 500, 400]},
       {"object": 3, "frame": 60, "mask": "mask.png"}]
    """
    with errors_told(), contextlib.ExitStack() as stack:
        from sam2jax.io.video import Video

        table = read_prompts(point or (), box or (), mask or (), prompts)
        chosen = read_policy(policy)
        clip = _open(stack, video, table, raw, reverse)
        if explain is not None and not isinstance(clip, Video):
            raise ValueError("--explain draws a whole video, and a live stream has no end.")
        check_inside(table, clip.height, clip.width, str(video))
        mask_prompts = read_masks(table, clip.height, clip.width)
        sinks = _open_sinks(stack, clip, table, out, masks)
        read = [
            pathlib.Path(video),
            prompts,
            *(p.mask for f in table.frames.values() for p in f.values()),
        ]
        refuse_overwriting(read, {"--out": out, "--masks": masks, "--explain": explain})
        model, params = load_model(checkpoint, image_size, dtype, apply_postprocessing, memory=True)

        from sam2jax.cli.explain import Explainer
        from sam2jax.cli.loop import Job

        size = clip.size = model.config.image_size
        scale = (size / clip.width, size / clip.height)
        given = to_prompts(table, mask_prompts, scale)
        job = Job(model, params, clip, given, chosen, reverse)
        explainer = None
        if explain is not None:
            explainer = Explainer(explain, table.object_ids, job.indices)
            job = job._replace(watch=explainer.watch)
        for result in _run(job, out is not None, quiet):
            for sink in sinks:
                sink(result)
        if explainer is not None and isinstance(clip, Video):
            explainer.write(clip)
    if not quiet:
        for path in filter(None, (out, masks, explain)):
            typer.echo(str(path))


def _run(job: Job, original: bool, quiet: bool) -> Iterator[Result]:
    """Results in order of time, with a bar that shows how far they have come."""
    from sam2jax.cli.loop import run, run_stream
    from sam2jax.io.video import Video

    clip = job.video
    if isinstance(clip, Video):
        bar = functools.partial(_bar, total=len(job.indices), bar_format=_BAR, quiet=quiet)
        yield from run(job, original=original, bar=bar)
        return
    bar = functools.partial(_bar, bar_format=_ENDLESS_BAR, quiet=quiet)
    yield from run_stream(job, original=original, bar=bar)
    if clip.lost is not None:
        typer.echo(f"warning: {clip.lost}", err=True)
    missed = [str(frame) for frame in sorted(job.prompts) if frame >= clip.num_taken]
    if missed:
        typer.echo(
            f"warning: there is a prompt on frame {', '.join(missed)}, but the stream ended after "
            f"{clip.num_taken} frames.",
            err=True,
        )


def _bar(frames: Iterable[Any], *, quiet: bool, **options: Any) -> Iterator[Any]:
    """Counts from the first frame on: programs are compiled before it."""
    frames = iter(frames)
    if not quiet:
        typer.echo("starting; what is new for this size is compiled first", err=True)
    first = list(itertools.islice(frames, 1))
    yield from tqdm(itertools.chain(first, frames), unit=" frames", disable=quiet, **options)


def _open(
    stack: contextlib.ExitStack, address: str, table: PromptTable, raw: str | None, reverse: bool
) -> Video | Stream:
    from sam2jax.io.images import IMAGE_SUFFIXES
    from sam2jax.io.stream import RawFormat, is_stream, open_stream
    from sam2jax.io.video import open_video

    if not is_stream(address) and raw is None:
        if pathlib.Path(address).suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(f"{address} is a picture; use sam2jax segment.")
        video = stack.enter_context(open_video(address))
        check_against_video(table, len(video), video.name)
        return video
    if reverse:
        raise ValueError(f"--reverse needs an end to start from, and {address} is a live stream.")
    stream = open_stream(address, raw=None if raw is None else RawFormat.parse(raw))
    stack.enter_context(stream)
    stack.enter_context(_ended_by_interrupt(stream))
    return stream


@contextlib.contextmanager
def _ended_by_interrupt(stream: Stream) -> Iterator[None]:
    """Makes the first Ctrl-C, or a service manager's request to end, or a lost terminal, end the
    stream, so that files are finished; a second breaks off."""

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(*_: object) -> None:
        restore()
        stream.stop()

    ways = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in ways}
    try:
        yield
    finally:
        restore()


def _open_sinks(
    stack: contextlib.ExitStack,
    video: Video | Stream,
    table: PromptTable,
    out: pathlib.Path | None,
    masks: pathlib.Path | None,
) -> list[Callable[[Result], None]]:
    """What to do with each result. The files appear when the stack is left without an error."""
    from sam2jax.io.drawing import Marks, overlay
    from sam2jax.io.masks import mask_writer
    from sam2jax.io.writer import VideoWriter

    ids = table.object_ids
    sinks: list[Callable[[Result], None]] = []
    if out is not None:
        film = stack.enter_context(VideoWriter(out, video.fps, video.height, video.width))

        def draw(result: Result) -> None:
            assert result.original is not None
            if result.masks is None:
                film.write(result.original)
                return
            prompted = table.frames.get(result.index, {})
            marks = [Marks(i, p.points, p.labels, p.box) for i, p in prompted.items()]
            film.write(overlay(result.original, result.masks, ids, marks))

        sinks.append(draw)
    if masks is not None:
        writer = stack.enter_context(mask_writer(masks))

        def write(result: Result) -> None:
            if result.masks is not None:
                writer.write(result.index, video.frame_name(result.index), ids, result.masks)

        sinks.append(write)
    if not sinks:
        raise ValueError("there is nothing to write: say where with --out or --masks.")
    return sinks
