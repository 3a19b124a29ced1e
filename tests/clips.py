"""Small clips for tests, written on the spot. The brightness of a frame tells its number."""

import pathlib
from fractions import Fraction

import av
import numpy as np
from PIL import Image

STEP = 10  # levels of brightness from one frame to the next


def picture(index: int, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3]: even, STEP * index + 20, with a dark upper left corner."""
    frame = np.full((height, width, 3), 20 + STEP * index, np.uint8)
    frame[: height // 4, : width // 4] = 0
    return frame


def number(frame: np.ndarray) -> int:
    """The number of a frame, read off its lower right quarter."""
    height, width = frame.shape[:2]
    return round((float(frame[height // 2 :, width // 2 :].mean()) - 20) / STEP)


def write_clip(
    path: pathlib.Path,
    num_frames: int = 12,
    height: int = 48,
    width: int = 64,
    *,
    codec: str = "libx264",
    gop: int = 5,
    rotation: int | None = None,
    audio: bool = False,
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
    noise: bool = False,
) -> pathlib.Path:
    """Writes frames of 1/25 s, or shown at `times` (in 1/25 s).

    Sound comes first where asked; `noise` makes packets large.
    """
    with av.open(str(path), "w", options=options or {}) as container:
        sound = container.add_stream("aac", rate=44100, layout="mono") if audio else None
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if sound is not None:
            for i in range(10):
                silence = av.AudioFrame.from_ndarray(
                    np.zeros((1, 1024), np.float32), "fltp", "mono"
                )
                silence.rate, silence.pts = 44100, i * 1024
                container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
        for i in range(num_frames):
            shown = picture(i, height, width)
            if noise:
                shown = np.random.default_rng(i).integers(0, 256, shown.shape, np.uint8)
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.pts, frame.time_base = (times[i] if times else i), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_folder(folder: pathlib.Path, names: list[str], height: int = 48, width: int = 64):
    """Writes one picture for each name, numbered in the order given."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(picture(i, height, width)).save(folder / name)
    return folder
