"""Valid cases for every reader, made on the spot with the project's own writers."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pathlib
import pickle
import re
import struct
import tempfile
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sam2jax.config import SAM2Config

MASK_SIZE = (6, 8)
CHECKPOINT_BYTES = 2**20  # a few more than `small_model` takes


@functools.cache
def small_model() -> SAM2Config:
    """The smallest model with every part."""
    from sam2jax.config import HieraConfig, MaskDecoderConfig, MemoryAttentionConfig, SAM2Config

    return SAM2Config(
        name="fuzz",
        trunk=HieraConfig(
            embed_dim=8,
            stages=(1, 1, 1, 1),
            global_att_blocks=(2,),
            window_spec=(2, 2, 2, 2),
            window_pos_embed_bkg_spatial_size=(2, 2),
        ),
        hidden_dim=16,
        mem_dim=8,
        memory_attention=MemoryAttentionConfig(num_layers=1, mlp_dim=8),
        mask_decoder=MaskDecoderConfig(num_layers=1, num_heads=2, mlp_dim=8, iou_head_hidden_dim=8),
        mask_in_chans=4,
        num_fuser_layers=1,
        num_maskmem=2,
        max_obj_ptrs_in_encoder=2,
        image_size=32,
    )


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def _written(folder: pathlib.Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()]


# Checkpoints -------------------------------------------------------------------------------------


def _values() -> list[dict[str, Any]]:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    return [
        {"model": {"a.weight": array, "b": array[:, :0], "c": array.T, "d": np.float32(1)[None]}},
        {"model": {"w": array}, "sam2jax": json.dumps({"version": 1, "config": {}})},
        {"step": 3, "sizes": (1, -1, 2**40), "done": True},
    ]


def torch_archive(program: bytes) -> bytes:
    """A file as torch.save writes it, with two storages of 24 bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/byteorder", b"little")
        for key in ("0", "1"):
            archive.writestr(f"a/data/{key}", np.arange(6, dtype=np.float32).tobytes())
    return file.getvalue()


def pickles(folder: pathlib.Path) -> list[bytes]:
    plain = {"a": [1, -1, 2.5, 2**70], "b": (None, True, "x"), "c": {"d": ()}}
    programs = [pickle.dumps(plain, protocol) for protocol in (2, 3, 4, 5)]
    for whole in torch_files(folder)[:3]:
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            programs.append(archive.read("archive/data.pkl"))
    return programs


def torch_files(folder: pathlib.Path) -> list[bytes]:
    from sam2jax.convert.torch_file import save_torch

    for place, values in enumerate(_values()):
        save_torch(folder / f"{place}.pt", values)
    return [*_written(folder), torch_archive(pickle.dumps({"a": 1}, 2))]


def safetensors_files(folder: pathlib.Path) -> list[bytes]:
    import ml_dtypes
    import safetensors.numpy as st

    from sam2jax.io.checkpoints import HEADER, header

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    kinds = (np.float32, np.float16, np.int64, np.bool_, ml_dtypes.bfloat16)
    tensors = {np.dtype(kind).name: array.astype(kind) for kind in kinds}
    st.save_file(tensors, folder / "kinds.safetensors")
    st.save_file({"a": array, "b": array[:0]}, folder / "pair.safetensors", {"format": "pt"})
    st.save_file({"a": array}, folder / "ours.safetensors", {HEADER: header(small_model())})
    return _written(folder)


@functools.cache
def parameters() -> dict[str, np.ndarray]:
    from sam2jax.convert.layouts import expected_shapes

    shapes = expected_shapes(small_model(), "sam2jax")
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def checkpoint_headers(folder: pathlib.Path) -> list[bytes]:
    """Headers of whole checkpoints. No other configuration is traced, which takes seconds."""
    import sam2jax.convert.layouts as layouts
    from sam2jax.io.checkpoints import save_safetensors

    for layout in ("sam2jax", "official", "huggingface"):
        tensors = layouts.from_params(parameters(), layout)
        save_safetensors(folder / f"{layout}.safetensors", tensors, small_model())
    known = layouts._param_shapes(small_model())
    layouts._param_shapes = lambda config: known
    return [data[8 : 8 + int.from_bytes(data[:8], "little")] for data in _written(folder)]


def configs(folder: pathlib.Path) -> list[bytes]:
    from sam2jax.config import VARIANTS
    from sam2jax.io.checkpoints import header

    return [header(config).encode() for config in (small_model(), *VARIANTS.values())]


def huggingface_configs(folder: pathlib.Path) -> list[bytes]:
    """`transformers` leaves out what is its own default, and may leave out all."""
    from sam2jax.config import VARIANTS
    from sam2jax.convert.huggingface_files import config_json

    described = [config_json(VARIANTS[f"{name}_hiera_tiny"]) for name in ("sam2", "sam2.1")]
    short = {key: described[0][key] for key in ("image_size", "mask_decoder_config")}
    return [json.dumps(given).encode() for given in (*described, short, {})]


def orbax_folders(folder: pathlib.Path) -> list[bytes]:
    """One folder, with few parameters: they are compared with the model's later."""
    from sam2jax.io.checkpoints import save_orbax

    names = sorted(parameters(), key=lambda name: parameters()[name].size)[:3]
    save_orbax(folder / "orbax", {name: parameters()[name] for name in names}, small_model())
    return [pack(folder / "orbax")]


def pack(folder: pathlib.Path) -> bytes:
    """A folder's files as one string."""
    parts = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = path.relative_to(folder).as_posix().encode(), path.read_bytes()
        parts.append(struct.pack("<HI", len(name), len(data)) + name + data)
    return b"".join(parts)


def unpack(packed: bytes, folder: pathlib.Path) -> pathlib.Path:
    """The opposite of `pack`, of whatever there is; no file is outside of the folder."""
    folder.mkdir()
    (folder / "sam2jax.json").write_text("{}")
    while len(packed) >= 6:
        name_length, length = struct.unpack("<HI", packed[:6])
        name, data = packed[6 : 6 + name_length], packed[6 + name_length :][:length]
        packed = packed[6 + name_length + length :]
        path = folder / re.sub(r"[^\w./-]|\.\.", "_", name.decode("latin-1")).strip("/")[:200]
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


# Pictures and films ------------------------------------------------------------------------------


def image_files(folder: pathlib.Path) -> list[bytes]:
    from PIL import Image

    rng = generator()
    colours = Image.fromarray(rng.integers(0, 256, (*MASK_SIZE, 3), np.uint8))
    labels = Image.fromarray((rng.integers(0, 3, MASK_SIZE) > 1).astype(np.uint8))
    palette = labels.copy()
    palette.putpalette(bytes(range(256)) * 3)
    for suffix in ("png", "jpg", "bmp", "gif", "webp", "ppm", "tiff"):
        colours.save(folder / f"colours.{suffix}")
    colours.save(folder / "progressive.jpg", progressive=True)
    colours.convert("CMYK").save(folder / "cmyk.jpg")
    for name, picture in (("labels", labels), ("palette", palette), ("bits", labels.convert("1"))):
        picture.save(folder / f"{name}.png")
    colours.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(rng.integers(0, 2**16, MASK_SIZE, np.uint16)).save(folder / "deep.png")
    return _written(folder)


def video_files(folder: pathlib.Path) -> list[bytes]:
    import av

    kinds = (
        *(("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx"), ("avi", "mjpeg")),
        *(("ts", "mpeg2video"), ("gif", "gif"), ("mov", "mpeg4")),
    )
    for suffix, codec in kinds:
        with av.open(str(folder / f"clip.{suffix}"), "w") as container:
            stream: Any = container.add_stream(codec, rate=25)
            stream.width, stream.height = 32, 32
            stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
            for i in range(4):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * i, np.uint8), "rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    playlists = [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '/etc/hostname'\nfile 'input.mp4'\n",
    ]
    return [*_written(folder), *playlists]


# Masks in JSON, prompts, configurations ----------------------------------------------------------


def _mask() -> np.ndarray:
    mask = np.zeros(MASK_SIZE, bool)
    mask[1:4, 2:6] = True
    return mask


def _segmentations() -> list[Any]:
    from sam2jax.io.runs import encode_coco, encode_runs

    return [encode_coco(_mask()), encode_runs(_mask()), [[1, 1, 5, 1, 5, 4]], [[0, 0, 8, 0, 8, 6]]]


def run_lengths(folder: pathlib.Path) -> list[bytes]:
    given = _segmentations()
    return [json.dumps(value).encode() for value in (given[0], given[1], given[2:], given)]


@functools.cache
def pictures() -> pathlib.Path:
    """A folder with the frames that annotations are of."""
    from PIL import Image

    folder = pathlib.Path(tempfile.mkdtemp(prefix="sam2jax-fuzz-"))
    for i in range(3):
        Image.fromarray(np.full((*MASK_SIZE, 3), 50 * i, np.uint8)).save(folder / f"{i:05d}.png")
    return folder


def annotation_files(folder: pathlib.Path) -> list[bytes]:
    runs, polygon = _segmentations()[0], _segmentations()[2]
    found = {"image_id": 1, "segmentation": runs, "area": 12, "iscrowd": 0}
    coco = {
        "images": [{"id": 1, "file_name": "00000.png"}],
        "annotations": [found, {**found, "segmentation": polygon}],
    }
    sav = {"video_id": "a", "masklet": [[runs, runs], [runs, None], None, [polygon]]}
    return [json.dumps(value).encode() for value in (coco, sav)]


def prompt_texts(folder: pathlib.Path) -> list[bytes]:
    entries = [
        {"object": 1, "frame": 0, "points": [[2, 3], [4.5, 1]], "labels": [1, 0]},
        {"object": 2, "frame": 3, "box": [0, 0, 5, 5]},
        {"object": 3, "mask": "mask.png"},
    ]
    lines = "point 2,3\npoint 4,5,0@2:3\nbox 1,1,4,4@3\nmask mask.png@4:1"
    return [lines.encode(), b"\n\n" + json.dumps(entries[:2]).encode(), b"point 1,1@9:2\n\n[]"]


def prompt_arguments(folder: pathlib.Path) -> list[bytes]:
    values = [
        {"points": [[[1, 2], [3, 4]], None], "labels": [[1, 0], None]},
        {"boxes": [[0, 0, 4, 4]], "points": [[[1, 1]]], "width": 4},
        {"masks": [[[0, 1], [1, 1]], None]},
        {"points": [[[1, 2]]], "logits": [[[0.5]]], "refine": True},
    ]
    return [json.dumps(value).encode() for value in values]


def video_lists(folder: pathlib.Path) -> list[bytes]:
    """What `track-all` and `eval` are told to do."""
    points = {"object": 1, "points": [[2, 3]]}
    lines = [
        {"video": "clip.mp4", "prompts": [points], "name": "cup"},
        {"video": "frames/b", "prompts": "b.json"},
    ]
    return [
        "\n".join(json.dumps(line) for line in lines).encode(),
        b"clip.mp4\n\nother.mov\n",
        b"bear\nbike-packing\n",
    ]


def training_configs(folder: pathlib.Path) -> list[bytes]:
    from sam2jax.training.config import SHIPPED

    own = """output = "runs"
steps = 10
freeze = ["image_encoder.*"]
[model]
architecture = {image_size = 64, trunk = {stages = [1, 1, 1, 1]}}
[data]
sources = [{kind = "procedural", num_clips = 5}, {kind = "images", images = "a", masks = "b"}]
"""
    return [own.encode(), *(path.read_bytes() for path in sorted(SHIPPED.glob("*.toml")))]


# Sessions ----------------------------------------------------------------------------------------


def session_video() -> np.ndarray:
    return np.zeros((4, 16, 16, 3), np.uint8)


@functools.cache
def session_predictor() -> Any:
    from sam2jax.nn.sam2 import SAM2
    from sam2jax.predictors.video import SAM2VideoPredictor
    from sam2jax.testing import random_params

    return SAM2VideoPredictor(SAM2(small_model()), random_params(small_model(), 0))


def session_files(folder: pathlib.Path) -> list[bytes]:
    """Sessions with answers of zeros: what they are worth is of no account to the reader."""
    import ml_dtypes

    from sam2jax.predictors.programs import Record
    from sam2jax.predictors.session import ObjectHistory
    from sam2jax.types import FrameMemory

    def record(frame: int) -> Any:
        memory: Any = FrameMemory(
            frame=np.int32(frame),  # type: ignore[arg-type]
            spatial=np.zeros(
                (small_model().feature_size ** 2, small_model().mem_dim), ml_dtypes.bfloat16
            ),  # type: ignore[arg-type]
            pointer=np.zeros(small_model().hidden_dim, np.float32),  # type: ignore[arg-type]
            iou=np.float32(0.5),  # type: ignore[arg-type]
            object_score=np.float32(1),  # type: ignore[arg-type]
        )
        masks: Any = np.zeros((small_model().mask_size,) * 2, np.float32)
        return Record(masks=masks, memory=memory)

    predictor = session_predictor()
    state = predictor.init_state(session_video())
    predictor.save_state(state, folder / "empty.npz")
    clicks = (np.ones((2, 2), np.float32), np.ones(2, np.int32))
    state.objects[1] = ObjectHistory(
        points={0: clicks}, cond={0: record(0)}, recent={1: record(1)}, tracked={1: False}
    )
    state.objects["cup"] = ObjectHistory(
        masks={2: np.ones((small_model().image_size,) * 2, bool)}, pending_cond={2: record(2)}
    )
    predictor.save_state(state, folder / "whole.npz")
    return _written(folder)
