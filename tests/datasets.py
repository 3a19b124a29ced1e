"""Small data sets for tests, written on the spot, and loaders of them."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from sam2jax.io.masks import PaletteWriter
from sam2jax.training.data.config import (
    DataConfig,
    FolderSource,
    ImagesSource,
    ProceduralSource,
    SceneConfig,
)
from sam2jax.training.data.pipeline import make_loader
from tests.clips import write_clip, write_folder

HEIGHT, WIDTH = 48, 64


def squares(frame, count=3):
    """Masks [N, H, W] of squares that move to the right; the last is absent from frame 0."""
    masks = np.zeros((count, HEIGHT, WIDTH), bool)
    for i in range(count):
        if i < count - 1 or frame:
            masks[i, 14 * i + 2 : 14 * i + 12, 2 * frame + 4 : 2 * frame + 14] = True
    return masks


def run_lengths(mask):
    runs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": runs["size"], "counts": runs["counts"].decode("ascii")}


def write_palette_video(root, name, num_frames=6):
    (root / "JPEGImages").mkdir(exist_ok=True)
    (root / "Annotations").mkdir(exist_ok=True)
    names = [f"{i:05d}.jpg" for i in range(num_frames)]
    write_folder(root / "JPEGImages" / name, names, HEIGHT, WIDTH)
    with PaletteWriter(root / "Annotations" / name) as writer:
        for i in range(num_frames):
            writer.write(i, f"{i:05d}", [1, 2, 7], squares(i))


def folder_source(root, **options):
    return FolderSource(str(root / "JPEGImages"), str(root / "Annotations"), **options)


def write_sav(root, name="sav_1", num_frames=21, film=False):
    if film:
        write_clip(root / f"{name}.mp4", num_frames, HEIGHT, WIDTH)
    else:
        names = [f"{i:05d}.jpg" for i in range(num_frames)]
        write_folder(root / name, names, HEIGHT, WIDTH)
    masklet = [[run_lengths(mask) for mask in squares(i)] for i in range((num_frames + 3) // 4)]
    path = root / f"{name}_manual.json"
    path.write_text(json.dumps({"video_id": name, "masklet": masklet}))
    return path


def write_images(root, count, size=(16, 20)):
    """Pictures whose grey level is 2 * their number, each with one object."""
    root.mkdir(exist_ok=True)
    mask = np.zeros(size, bool)
    mask[4:9, 5:12] = True
    for i in range(count):
        Image.fromarray(np.full((*size, 3), 2 * i, np.uint8)).save(root / f"sa_{i}.png")
        found = {"segmentation": run_lengths(mask), "area": int(mask.sum())}
        (root / f"sa_{i}.json").write_text(json.dumps({"annotations": [found]}))
    return ImagesSource(str(root), str(root), augment=False)


def procedural(num_clips, **options):
    return ProceduralSource(num_clips=num_clips, scene=SceneConfig(num_objects=2), **options)


def loader(*sources, max_damaged=10, **options):
    sizes = {"image_size": 16, "num_frames": 1, "max_objects": 2, "batch_size": 2, "seed": 0}
    return make_loader(DataConfig(sources, max_damaged=max_damaged), **sizes | options)


def numbers(batches):
    """Which of `write_images`' pictures are in some batches."""
    return [int(level) // 2 for batch in batches for level in batch.frames[:, 0, 0, 0, 0]]


def rng(seed=0):
    return np.random.default_rng(seed)
