"""Images in: single files, folders of frames, and masks."""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from sam2jax.io.files import PathLike, atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# What a file may be, whatever its name. Pillow knows others, some of which run programs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_DIM = 32  # a grey picture darker than this everywhere holds object numbers, not brightness


def list_frames(folder: PathLike) -> list[pathlib.Path]:
    """The frames of a video in a folder: its JPEG files, or where there are none its PNG files.

    As officially, PNG files beside JPEG files (masks, say) are no frames. Order and errors are
    those of `list_images`.
    """
    paths = _image_paths(folder)
    return _in_order(folder, [path for path in paths if path.suffix.lower() != ".png"] or paths)


def list_images(folder: PathLike) -> list[pathlib.Path]:
    """The JPEG and PNG files of a folder, in the order of their numbers.

    Names that are whole numbers are ordered by value, as the official loader does; others
    naturally ("shot2" before "shot10"). Hidden files are skipped.

    Raises:
        ValueError: there are none, or two files have the same name but for the suffix.
        OSError: the folder cannot be read.
    """
    return _in_order(folder, _image_paths(folder))


def list_masks(folder: PathLike) -> list[pathlib.Path]:
    """The PNG files of a folder, frames beside them or not; as `list_images`."""
    return _in_order(folder, [p for p in _image_paths(folder) if p.suffix.lower() == ".png"])


def _image_paths(folder: PathLike) -> list[pathlib.Path]:
    return [
        path
        for path in pathlib.Path(folder).iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]


def _in_order(folder: PathLike, paths: list[pathlib.Path]) -> list[pathlib.Path]:
    if not paths:
        raise ValueError(f"{folder} holds no frames; expected JPEG or PNG files, like 00000.jpg.")
    stems = [path.stem for path in paths]
    twice = [stem for stem, count in collections.Counter(stems).items() if count > 1]
    if twice:
        raise ValueError(f"{folder} holds more than one file for frame {min(twice)}; keep one.")
    numbered = all(stem.isdecimal() for stem in stems)
    return sorted(paths, key=lambda p: (int(p.stem),) if numbered else _natural(p.stem))


def _natural(name: str) -> tuple[Any, ...]:
    # Digits lie at the odd places of the split, so numbers are only compared with numbers.
    parts = re.split(r"(\d+)", name)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts))


def image_dimensions(path: PathLike) -> tuple[int, int]:
    """(height, width) of an image file, from its header."""
    from PIL import Image

    with _reading(path), Image.open(path, formats=_FORMATS) as image:
        return image.height, image.width


def open_image(path: PathLike) -> Image:
    """An image file as a decoded RGB picture.

    A camera's orientation tag is not applied, as in the official loader. Greys of 16 bits become
    8, which Pillow cuts off at 255.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, or a damaged one.
    """
    from PIL import Image

    with _reading(path), Image.open(path, formats=_FORMATS) as image:
        if image.mode in ("I", "I;16", "I;16B"):
            grey = np.clip(np.asarray(image) // 257, 0, 255).astype(np.uint8)
            return Image.fromarray(grey).convert("RGB")
        return image.convert("RGB")


def read_image(path: PathLike) -> np.ndarray:
    """An image file as uint8 RGB [H, W, 3]; raises as `open_image` does."""
    return np.asarray(open_image(path))


def write_image(path: PathLike, picture: np.ndarray) -> None:
    """Writes uint8 RGB [H, W, 3] as the suffix says, whole or not at all.

    Raises:
        ValueError: the suffix is not one of a picture.
        FileNotFoundError: the folder does not exist.
    """
    from PIL import Image

    check_picture_name(path)
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary)


def check_picture_name(path: PathLike) -> None:
    """Raises what `write_image` would, where it can be seen beforehand."""
    path = pathlib.Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(IMAGE_SUFFIXES)}.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} does not exist; create it first.")


def resize_image(image: Image, size: int) -> np.ndarray:
    """Resizes as the official folder loader does: Pillow's default (bicubic), on uint8.

    Returns:
        uint8 RGB [size, size, 3].
    """
    return np.asarray(image.resize((size, size)))


def read_mask(path: PathLike) -> np.ndarray:
    """A mask prompt from an image file: one object, bright (or any index above 0) on dark, or
    opaque on transparent.

    Returns:
        bool [H, W].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, is empty, or is an index picture of several objects.
    """
    from PIL import Image

    with _reading(path), Image.open(path, formats=_FORMATS) as image:
        as_stored = image.mode in ("P", "1")
        picture = image if as_stored else image.convert("L")
        if "A" in image.getbands() and np.asarray(image.getchannel("A")).min() < 255:
            picture = image.getchannel("A")  # cut out: what is transparent has any colour
        values = np.asarray(picture).astype(np.uint8)
        indexed = image.mode == "P" or values.max() < _DIM
    ids = np.unique(values[values > 0]).tolist()
    if indexed and len(ids) > 1:
        raise ValueError(
            f"{path} holds several objects ({', '.join(map(str, ids))}); "
            "give a picture of one object for each."
        )
    mask = values > (0 if indexed else values.max() / 2)
    if not mask.any():
        raise ValueError(f"{path} is an empty mask; expected bright pixels on the object.")
    return mask


def read_labels(path: PathLike) -> tuple[np.ndarray, bytes | None]:
    """A picture whose pixels are object numbers, 0 where there is none, and its colours.

    Returns:
        uint8 [H, W], and the palette (red, green, blue of each number in turn) if it has one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, or one in true colours.
    """
    from PIL import Image

    with _reading(path), Image.open(path, formats=_FORMATS) as image:
        mode, colors = image.mode, image.getpalette()
        labels = np.asarray(image)
    if mode not in ("P", "L", "1"):
        raise ValueError(
            f"{path} is a picture of mode {mode}; expected one whose pixels are object numbers "
            "(palette or 8-bit grey)."
        )
    return labels.astype(np.uint8), None if colors is None else bytes(colors)


@contextlib.contextmanager
def _reading(path: PathLike) -> Iterator[None]:
    """Turns whatever Pillow raises into one line that names the file."""
    from PIL import Image

    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        yield
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: permission denied.") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}.") from error
