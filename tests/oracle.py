"""The oracle: the official PyTorch package, on the CPU, with the same numbers and the same weights.

Builds official models of any size from our configuration, fills them with live weights, feeds
them frames and prompts, and hands back NumPy. Four things the official package lacks on a CPU are
added on import: the operators that torchvision wants, `decord`, a connected-components routine,
and a cast without which float32 stops on a frame that has no pointers. A fifth it lacks anywhere:
the method that `clear_non_cond_mem_around_input` calls.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import pathlib
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import scipy.ndimage
import torch

from sam2jax.config import NO_POSTPROCESSING, SAM2Config
from sam2jax.testing import draw


def _define_torchvision_operators() -> torch.library.Library:
    """torchvision beside a torch of another build names operators that it then does not have."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    found = importlib.util.find_spec("torchvision")
    for path in pathlib.Path(found.origin).parent.glob("_C*.so"):
        with contextlib.suppress(OSError):
            torch.ops.load_library(path)
    if not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", _nms, "CPU")
    return library


def _nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Rows that are left, best first; of equal scores the first is the better."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order, kept = torch.argsort(scores, descending=True, stable=True), []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        corner = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        sides = (corner - torch.maximum(boxes[best, :2], boxes[order, :2])).clamp(min=0)
        shared = sides[:, 0] * sides[:, 1]
        order = order[~(shared / (area[best] + area[order] - shared) > threshold)]
    return torch.tensor(kept, dtype=torch.int64)


class VideoReader:
    """decord's reader, as far as the official code uses it: FFmpeg's bilinear scaler, then RGB."""

    def __init__(self, path: str, width: int = -1, height: int = -1) -> None:
        self._path, self._size = path, (width, height)

    def __iter__(self) -> Iterator[torch.Tensor]:
        with av.open(self._path) as container:
            stream = container.streams.video[0]
            graph = av.filter.Graph()
            nodes = [graph.add_buffer(template=stream, time_base=stream.time_base)]
            if self._size[0] > 0:
                nodes.append(graph.add("scale", "{}:{}:flags=bilinear".format(*self._size)))
            nodes += [graph.add("format", "rgb24"), graph.add("buffersink")]
            graph.link_nodes(*nodes).configure()
            for frame in container.decode(stream):
                graph.push(frame)
                yield torch.from_numpy(graph.pull().to_ndarray())

    def next(self) -> torch.Tensor:
        return next(iter(self))


def _fake_decord() -> types.ModuleType:
    module = types.ModuleType("decord")
    module.VideoReader = VideoReader  # type: ignore[attr-defined]
    module.bridge = types.SimpleNamespace(set_bridge=lambda name: None)  # type: ignore[attr-defined]
    return module


_LIBRARY = _define_torchvision_operators()
sys.modules.setdefault("decord", _fake_decord())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sam2.sam2_video_predictor as official_video
    import sam2.utils.misc
    import torchvision.ops.boxes
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
    from sam2.build_sam import build_sam2_video_predictor
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.mask_decoder import MaskDecoder
    from sam2.modeling.sam.prompt_encoder import PromptEncoder
    from sam2.modeling.sam.transformer import RoPEAttention, TwoWayTransformer
    from sam2.sam2_image_predictor import SAM2ImagePredictor
    from sam2.sam2_video_predictor import SAM2VideoPredictor

torchvision.ops.boxes._assert_has_ops = lambda: None  # `_nms` is there
official_video.tqdm = functools.partial(official_video.tqdm, disable=True)
sam2.utils.misc.tqdm = functools.partial(sam2.utils.misc.tqdm, disable=True)


def connected_components(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and areas of 8-connected components, as the CUDA extension returns: [N, 1, H, W]."""
    labels, areas = np.zeros(masks.shape, np.int32), np.zeros(masks.shape, np.int32)
    for index, mask in enumerate(masks.numpy()):
        labels[index, 0], count = scipy.ndimage.label(mask[0], np.ones((3, 3)))
        sizes = np.bincount(labels[index, 0].ravel(), minlength=count + 1)
        areas[index, 0] = np.where(mask[0], sizes[labels[index, 0]], 0)
    return torch.from_numpy(labels), torch.from_numpy(areas)


sam2.utils.misc.get_connected_components = connected_components


def _forget_around(
    self: SAM2VideoPredictor, inference_state: dict[str, Any], frame_idx: int, obj_idx: int
) -> None:
    """What `_clear_non_cond_mem_around_input` documents, for the one object that was prompted."""
    reach = self.memory_temporal_stride_for_eval * self.num_maskmem
    tracked = inference_state["output_dict_per_obj"][obj_idx]["non_cond_frame_outputs"]
    for near in range(frame_idx - reach, frame_idx + reach + 1):
        tracked.pop(near, None)


SAM2VideoPredictor._clear_obj_non_cond_mem_around_input = _forget_around


def _cast_memory(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Stored memory is bfloat16; beside pointers the official concatenation makes it float32."""
    return args, {**kwargs, "memory": kwargs["memory"].float()}


# Building -----------------------------------------------------------------------------------


def build(config: SAM2Config, seed: int = 0, **options: Any) -> SAM2VideoPredictor:
    """The official video predictor with our configuration's numbers and live weights.

    `options` are those of the official predictor (`non_overlap_masks` and so on).
    """
    return prepare(construct(config, **options), seed)


def construct(config: SAM2Config, **options: Any) -> SAM2VideoPredictor:
    with torch.random.fork_rng():
        model = SAM2VideoPredictor(
            image_encoder=image_encoder(config),
            memory_attention=memory_attention(config),
            memory_encoder=memory_encoder(config),
            **{**model_options(config), **options},
        )
        replace_sam_heads(model, config)
    return model


def construct_official(config: SAM2Config, apply_postprocessing: bool) -> SAM2VideoPredictor:
    """The same through the package's own builder and YAML files: named variants only."""
    version, size = config.name.split("_hiera_")
    letter = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}[size]
    with torch.random.fork_rng():
        return build_sam2_video_predictor(
            f"configs/{version}/{version}_hiera_{letter}.yaml",
            device="cpu",
            hydra_overrides_extra=[f"++model.image_size={config.image_size}"],
            apply_postprocessing=apply_postprocessing,
        )


def prepare(model: SAM2VideoPredictor, seed: int) -> SAM2VideoPredictor:
    """Fills a model with live weights and readies it for inference on the CPU."""
    drawn = {
        name: torch.from_numpy(draw(name, tuple(tensor.shape), seed))
        for name, tensor in model.state_dict().items()
    }
    return filled(model, drawn)


def filled(model: SAM2VideoPredictor, state: dict[str, torch.Tensor]) -> SAM2VideoPredictor:
    """Fills a model with a whole state dict and readies it for inference on the CPU."""
    model.load_state_dict(state)
    model.memory_attention.register_forward_pre_hook(_cast_memory, with_kwargs=True)
    return model.eval().requires_grad_(False)


def image_encoder(config: SAM2Config) -> ImageEncoder:
    trunk = config.trunk
    return ImageEncoder(
        trunk=Hiera(
            embed_dim=trunk.embed_dim,
            num_heads=trunk.num_heads,
            stages=trunk.stages,
            global_att_blocks=trunk.global_att_blocks,
            window_spec=trunk.window_spec,
            window_pos_embed_bkg_spatial_size=trunk.window_pos_embed_bkg_spatial_size,
        ),
        neck=FpnNeck(
            position_encoding=PositionEmbeddingSine(config.hidden_dim),
            d_model=config.hidden_dim,
            backbone_channel_list=list(trunk.channel_list[::-1]),
            fpn_top_down_levels=[2, 3],
            fpn_interp_model="nearest",
        ),
        scalp=1,
    )


def memory_attention(config: SAM2Config) -> MemoryAttention:
    sizes = config.memory_attention

    def attention(**options: Any) -> RoPEAttention:
        return RoPEAttention(
            rope_theta=sizes.rope_theta,
            feat_sizes=(config.feature_size, config.feature_size),
            embedding_dim=config.hidden_dim,
            num_heads=sizes.num_heads,
            downsample_rate=1,
            dropout=0.1,
            **options,
        )

    layer = MemoryAttentionLayer(
        activation="relu",
        d_model=config.hidden_dim,
        dim_feedforward=sizes.mlp_dim,
        dropout=0.1,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=attention(),
        cross_attention=attention(rope_k_repeat=True, kv_in_dim=config.mem_dim),
    )
    return MemoryAttention(
        d_model=config.hidden_dim, pos_enc_at_input=True, layer=layer, num_layers=sizes.num_layers
    )


def memory_encoder(config: SAM2Config) -> MemoryEncoder:
    width = config.hidden_dim
    return MemoryEncoder(
        out_dim=config.mem_dim,
        in_dim=width,
        mask_downsampler=MaskDownSampler(embed_dim=width, kernel_size=3, stride=2, padding=1),
        fuser=Fuser(CXBlock(width), num_layers=config.num_fuser_layers),
        position_encoding=PositionEmbeddingSine(config.mem_dim),
    )


def model_options(config: SAM2Config) -> dict[str, Any]:
    """Arguments of SAM2Base and SAM2VideoPredictor, as the official YAML files set them."""
    newer = config.add_tpos_enc_to_obj_ptrs
    return {
        "image_size": config.image_size,
        "num_maskmem": config.num_maskmem,
        "max_obj_ptrs_in_encoder": config.max_obj_ptrs_in_encoder,
        "no_obj_embed_spatial": config.no_obj_embed_spatial,
        "add_tpos_enc_to_obj_ptrs": newer,
        "proj_tpos_enc_in_obj_ptrs": newer,
        "use_signed_tpos_enc_to_obj_ptrs": newer,
        "max_cond_frames_in_attn": config.max_cond_frames_in_attn,
        "memory_temporal_stride_for_eval": config.memory_temporal_stride_for_eval,
        "multimask_min_pt_num": config.multimask_min_pt_num,
        "multimask_max_pt_num": config.multimask_max_pt_num,
        "sigmoid_scale_for_mem_enc": 20.0,
        "sigmoid_bias_for_mem_enc": -10.0,
        **{name: getattr(config, name) for name in NO_POSTPROCESSING if "dynamic" not in name},
        **dict.fromkeys(
            (
                "use_mask_input_as_output_without_sam",
                "directly_add_no_mem_embed",
                "use_high_res_features_in_sam",
                "multimask_output_in_sam",
                "multimask_output_for_tracking",
                "use_multimask_token_for_obj_ptr",
                "iou_prediction_use_sigmoid",
                "use_obj_ptrs_in_encoder",
                "only_obj_ptrs_in_the_past_for_eval",
                "pred_obj_scores",
                "pred_obj_scores_mlp",
                "fixed_no_obj_ptr",
                "use_mlp_for_obj_ptr_proj",
            ),
            True,
        ),
    }


def replace_sam_heads(model: SAM2VideoPredictor, config: SAM2Config) -> None:
    """SAM2Base fixes the sizes of its heads in code; ours come from the configuration."""
    sizes, width = config.mask_decoder, config.hidden_dim
    model.sam_prompt_encoder = PromptEncoder(
        embed_dim=width,
        image_embedding_size=(config.feature_size, config.feature_size),
        input_image_size=(config.image_size, config.image_size),
        mask_in_chans=config.mask_in_chans,
    )
    model.sam_mask_decoder = MaskDecoder(
        num_multimask_outputs=sizes.num_multimask_outputs,
        transformer=TwoWayTransformer(
            depth=sizes.num_layers,
            embedding_dim=width,
            mlp_dim=sizes.mlp_dim,
            num_heads=sizes.num_heads,
            attention_downsample_rate=sizes.attention_downsample_rate,
        ),
        transformer_dim=width,
        iou_head_depth=sizes.iou_head_depth,
        iou_head_hidden_dim=sizes.iou_head_hidden_dim,
        use_high_res_features=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        use_multimask_token_for_obj_ptr=True,
        dynamic_multimask_via_stability=config.dynamic_multimask_via_stability,
        dynamic_multimask_stability_delta=config.dynamic_multimask_stability_delta,
        dynamic_multimask_stability_thresh=config.dynamic_multimask_stability_thresh,
    )


# Running ------------------------------------------------------------------------------------


def autocast() -> contextlib.AbstractContextManager:
    """What the official examples run under, on the CPU."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def to_torch(images: np.ndarray) -> torch.Tensor:
    """[..., H, W, C] -> [..., C, H, W]"""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(images), -1, -3)))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """[..., C, H, W] -> [..., H, W, C], float32"""
    return np.moveaxis(tensor.detach().float().numpy(), -3, -1)


def image_predictor(
    model: SAM2VideoPredictor, picture: np.ndarray | None = None, **options: float
) -> SAM2ImagePredictor:
    """The official image predictor on a uint8 RGB picture [H, W, 3], at the model's own size."""
    with _quiet():
        predictor = _at_own_size(SAM2ImagePredictor(model, **options))
    if picture is not None:
        predictor.set_image(picture)
    return predictor


def mask_generator(model: SAM2VideoPredictor, **options: Any) -> SAM2AutomaticMaskGenerator:
    with _quiet():
        generator = SAM2AutomaticMaskGenerator(model, **options)
    _at_own_size(generator.predictor)
    return generator


def _at_own_size(predictor: SAM2ImagePredictor) -> SAM2ImagePredictor:
    """There, the sizes of the feature maps are written down for 1024 px."""
    size = predictor.model.image_size
    predictor._bb_feat_sizes = [(size // stride,) * 2 for stride in (4, 8, 16)]
    return predictor


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its transforms are TorchScript
        yield


def init_state(
    model: SAM2VideoPredictor, frames: np.ndarray, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """An inference state on frames that are already preprocessed: [T, S, S, 3] float32.

    `size` is the (height, width) that prompts and answers refer to; by default the frames' own.
    """
    images = to_torch(frames)
    height, width = size or images.shape[-2:]
    original = official_video.load_video_frames
    official_video.load_video_frames = lambda **_: (images, height, width)
    try:
        return model.init_state("frames")
    finally:
        official_video.load_video_frames = original


def prompt(model: SAM2VideoPredictor, state: dict[str, Any], **given: Any) -> np.ndarray:
    """Adds clicks, a box or a mask; returns the answer at video size: [N, H, W]."""
    call = model.add_new_mask if "mask" in given else model.add_new_points_or_box
    return call(state, **{"frame_idx": 0, "obj_id": 1, **given})[2][:, 0].float().numpy()


def propagate(
    model: SAM2VideoPredictor, state: dict[str, Any], **options: Any
) -> dict[int, np.ndarray]:
    """Tracks; returns {frame: [N, H, W] logits at video size}, in the order of tracking."""
    answers = model.propagate_in_video(state, **options)
    return {index: masks[:, 0].float().numpy() for index, _, masks in answers}


def outputs(state: dict[str, Any], frame: int, obj: int = 0) -> dict[str, np.ndarray]:
    """What the tracker holds for one object on one frame: masks, pointer, score, memory."""
    held = state["output_dict_per_obj"][obj]
    found = held["cond_frame_outputs"].get(frame) or held["non_cond_frame_outputs"][frame]
    return {
        "masks": found["pred_masks"][0, 0].float().numpy(),  # [S/4, S/4]
        "pointer": found["obj_ptr"][0].float().numpy(),  # [C]
        "object_score": found["object_score_logits"][0, 0].float().numpy(),  # []
        "memory": to_numpy(found["maskmem_features"][0]),  # [H, W, D]
    }
