"""Every box of the model against the official one, on live weights."""

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from sam2jax.convert.layouts import from_params
from sam2jax.nn.sam2 import SAM2, init_params
from sam2jax.testing import small_config
from sam2jax.types import MemoryRead
from tests.oracle import construct_official, to_numpy, to_torch
from tests.parity.pairs import FEATURES, LOGITS, Pair, assert_close, at, pair

pytestmark = pytest.mark.parity

CONFIGS = {
    "small": small_config(),
    "tiny": at("sam2.1_hiera_tiny", 256),
    "tiny-2.0": at("sam2_hiera_tiny", 256),
}
ENCODERS = {
    **CONFIGS,
    "small-odd-size": small_config(image_size=96),
    "tiny-odd-size": at("sam2.1_hiera_tiny", 160),
    "hiera-small": at("sam2.1_hiera_small", 256),
    "base_plus": at("sam2.1_hiera_base_plus", 256),
    "large": at("sam2.1_hiera_large", 256),
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(params=CONFIGS, scope="module")
def both(request: pytest.FixtureRequest) -> Pair:
    return pair(CONFIGS[request.param])


@pytest.mark.optimised
@pytest.mark.parametrize("name", ENCODERS)
def test_image_encoder(name: str):
    both = pair(ENCODERS[name])
    size = both.config.image_size
    images = normal(2, size, size, 3)
    ours = both.apply("encode_image", images)
    theirs = both.official.forward_image(to_torch(images))["backbone_fpn"]
    for ours_level, theirs_level, level in zip(
        (ours.high_res_s0, ours.high_res_s1, ours.features), theirs, ("s0", "s1", "s2"), strict=True
    ):
        assert_close(ours_level, to_numpy(theirs_level), FEATURES, level)


def test_random_starts_are_of_the_official_size():
    """All but biases, which start at zero here."""
    config = at("sam2.1_hiera_tiny", 256)
    flat = flatten_dict(init_params(config, jax.random.key(0)), sep="/")
    ours = from_params({path: np.asarray(value) for path, value in flat.items()}, "official")
    official = construct_official(config, True).state_dict()
    assert set(ours) == set(official)
    for name, value in official.items():
        theirs = value.detach().numpy()
        if theirs.size >= 50 and not name.endswith("bias"):
            sizes = [np.sqrt(np.mean(np.square(x))) for x in (ours[name], theirs)]
            np.testing.assert_allclose(*sizes, rtol=0.3, atol=0.02, err_msg=name)


def encode_prompts(model: SAM2, *args):
    return model.sam_prompt_encoder(*args)


def dense_position(model: SAM2):
    return model.sam_prompt_encoder.dense_position()


def test_prompt_encoder(both: Pair):
    size, rng = both.config.image_size, np.random.default_rng(0)
    points = rng.uniform(-5, size + 5, (3, 5, 2)).astype(np.float32)
    labels = np.tile(np.array([-1, 0, 1, 2, 3], np.int32), (3, 1))
    masks = 5 * normal(3, size // 4, size // 4)
    encoder = both.official.sam_prompt_encoder
    # `boxes` absent makes the official encoder append the token that we append further up.
    tokens, dense = encoder((torch.tensor(points), torch.tensor(labels)), None, None)
    _, dense_mask = encoder(None, None, torch.tensor(masks)[:, None])
    has_mask = np.array([True, False, True])
    ours_tokens, ours_dense = both.apply(encode_prompts, points, labels, masks, has_mask)
    assert_close(ours_tokens, tokens[:, :-1], FEATURES, "tokens")
    expected = np.where(has_mask[:, None, None, None], to_numpy(dense_mask), to_numpy(dense))
    assert_close(ours_dense, expected, FEATURES, "dense")
    assert_close(
        both.apply(dense_position), to_numpy(encoder.get_dense_pe())[0], FEATURES, "position"
    )


PROMPTS = {  # labels of the points; whether a mask prompt is fed in
    "none": ([], False),
    "click": ([1], False),
    "negative click": ([0], False),
    "box": ([2, 3], False),
    "box and clicks": ([2, 3, 0, 1], False),
    "three clicks": ([1, 0, 1], False),
    "not a point": ([1, -1], False),
    "click and mask": ([1], True),
    "mask": ([], True),
}


def official_decode(both: Pair, features, high_res, points, labels, mask):
    """All that the official decoder computes, before it chooses among masks."""
    model = both.official
    if not len(labels):
        points, labels = np.zeros((1, 2), np.float32), np.full(1, -1, np.int32)
    tokens, dense = model.sam_prompt_encoder(
        (torch.tensor(points)[None], torch.tensor(labels)[None]),
        None,
        None if mask is None else torch.tensor(mask)[None, None],
    )
    return [
        x[0].float().numpy()
        for x in model.sam_mask_decoder.predict_masks(
            to_torch(features),
            model.sam_prompt_encoder.get_dense_pe(),
            tokens,
            dense,
            repeat_image=False,
            high_res_features=[to_torch(x) for x in high_res],
        )
    ]


def decode(model: SAM2, *args):
    return model.decode_masks(*args)


@pytest.mark.parametrize("width", [4, 8])
def test_mask_decoder(both: Pair, width: int):
    """All prompts at once, one object each, padded: as if each had come alone."""
    config, count = both.config, len(PROMPTS)
    size, channels = config.image_size, config.hidden_dim
    grid, quarter = config.feature_size, size // 4
    # Louder noise makes the decoder chaotic: official float32 is then 3e-3 from its own float64.
    features = 0.1 * normal(count, grid, grid, channels, seed=1)
    high_res = (
        normal(1, 4 * grid, 4 * grid, channels // 8, seed=2),
        normal(1, 2 * grid, 2 * grid, channels // 4, seed=3),
    )
    points = np.random.default_rng(4).uniform(0, size, (count, width, 2)).astype(np.float32)
    masks = 5 * normal(count, quarter, quarter, seed=5)
    # Whatever stands in the padding must not matter.
    labels = np.random.default_rng(6).integers(0, 4, (count, width)).astype(np.int32)
    for row, (kinds, _) in enumerate(PROMPTS.values()):
        labels[row, : len(kinds)] = kinds
    num_points = np.array([len(kinds) for kinds, _ in PROMPTS.values()], np.int32)
    has_mask = np.array([fed for _, fed in PROMPTS.values()])
    ours = both.apply(decode, features, high_res, points, labels, num_points, masks, has_mask)
    for row, name in enumerate(PROMPTS):
        real = num_points[row]
        theirs = official_decode(
            both,
            features[row : row + 1],
            high_res,
            points[row, :real],
            labels[row, :real],
            masks[row] if has_mask[row] else None,
        )
        assert_close(ours.masks[row], theirs[0], LOGITS, f"{name}: masks")
        assert_close(ours.ious[row], theirs[1], FEATURES, f"{name}: ious")
        assert_close(ours.tokens[row], theirs[2], LOGITS, f"{name}: tokens")
        assert_close(ours.object_score[row], theirs[3][0], LOGITS, f"{name}: object score")


def test_memory_encoder(both: Pair):
    """One object in the frame, one absent; stored in bfloat16, as the official tracker does."""
    config = both.config
    size, grid = config.image_size, config.feature_size
    features = normal(1, grid, grid, config.hidden_dim)
    weights = np.clip(10 * normal(2, size, size, seed=1), -10, 10)
    score = np.array([0.5, -0.5], np.float32)
    ours = both.apply("encode_memory", features, weights, score)
    for row in range(2):
        theirs, _ = both.official._encode_new_memory(
            current_vision_feats=[to_torch(features).flatten(2).permute(2, 0, 1)],
            feat_sizes=[(grid, grid)],
            pred_masks_high_res=to_logits(weights[row])[None, None],
            object_score_logits=torch.tensor(score[row]).reshape(1, 1),
            is_mask_from_pts=False,
        )
        theirs = to_numpy(theirs)[0].reshape(grid * grid, -1)
        # One rounding to bfloat16 apart: features of a few units have steps of 1/64.
        rounding = np.abs(theirs) * 2**-8 + FEATURES
        assert (np.abs(np.asarray(ours[row], np.float32) - theirs) <= rounding).all()


def to_logits(weights: np.ndarray) -> torch.Tensor:
    """The logits for which the official code arrives at `weights` (between -10 and 10)."""
    share = torch.tensor(weights, dtype=torch.float64) / 20 + 0.5
    return torch.logit(share, eps=1e-9).float()


def test_mask_downsampling_and_pointer(both: Pair):
    config = both.config
    size, width = config.image_size, config.hidden_dim
    mask = (normal(2, size, size) > 0).astype(np.float32)
    theirs = both.official.mask_downsample(torch.tensor(mask)[:, None])[:, 0]
    assert_close(both.apply("downsample_mask", mask), theirs, FEATURES, "mask_downsample")

    token, present = normal(2, width), np.array([True, False])
    projected = both.official.obj_ptr_proj(torch.tensor(token))
    expected = np.stack([projected[0].numpy(), both.official.no_obj_ptr[0].numpy()])
    assert_close(both.apply("object_pointer", token, present), expected, FEATURES, "pointer")


@pytest.mark.parametrize("slots", [(1, 0), (1, 1), (3, 5), (7, 16)])
def test_memory_attention(both: Pair, slots: tuple[int, int]):
    """Two objects, with room for 8 memories and 18 pointers: one has `slots`, the other (2, 1)."""
    config = both.config
    grid, width, dim = config.feature_size, config.hidden_dim, config.mem_dim
    features = normal(1, grid, grid, width)
    spatial = torch.tensor(normal(2, 8, grid * grid, dim, seed=1)).bfloat16().float().numpy()
    pointers = normal(2, 18, width, seed=2)
    places = np.random.default_rng(3).permuted(np.tile(np.arange(8) % 7, (2, 1)), axis=1)
    positions = np.random.default_rng(4).uniform(-1, 1, (2, 18)).astype(np.float32)
    counts = np.array([slots, (2, 1)], np.int32)
    read = MemoryRead(
        spatial=spatial,
        spatial_tpos=places.astype(np.int32),
        spatial_frame=np.zeros((2, 8), np.int32),
        num_spatial=counts[:, 0],
        pointers=pointers,
        pointer_position=positions,
        pointer_frame=np.zeros((2, 18), np.int32),
        num_pointers=counts[:, 1],
    )
    ours = both.apply("condition_on_memory", features, read)
    for row, (num_spatial, num_pointers) in enumerate(counts):
        theirs = official_condition(
            both,
            features,
            spatial[row, :num_spatial],
            places[row, :num_spatial],
            pointers[row, :num_pointers],
            positions[row, :num_pointers],
        )
        assert_close(ours[row], theirs, FEATURES, f"object {row}")


def official_condition(both: Pair, features, spatial, places, pointers, positions) -> np.ndarray:
    """Official memory attention on given memories (`_prepare_memory_conditioned_features`)."""
    from sam2.modeling.sam2_utils import get_1d_sine_pe

    model, config = both.official, both.config
    image, dim, width = to_torch(features), config.mem_dim, config.hidden_dim
    position = model.memory_encoder.position_encoding(torch.zeros(1, dim, *image.shape[-2:]))
    position = position.flatten(2).permute(2, 0, 1)
    memory = [torch.tensor(x)[:, None] for x in spatial]
    memory_position = [position + model.maskmem_tpos_enc[place] for place in places]
    tokens = torch.tensor(pointers).reshape(-1, 1, dim)
    encoded = torch.zeros(len(tokens), 1, dim)
    if config.add_tpos_enc_to_obj_ptrs:
        encoded = model.obj_ptr_tpos_proj(get_1d_sine_pe(torch.tensor(positions), width))
        encoded = encoded.repeat_interleave(width // dim, 0)[:, None]
    neck = model.image_encoder.neck.position_encoding
    out = model.memory_attention(
        curr=[image.flatten(2).permute(2, 0, 1)],
        curr_pos=[neck(image).flatten(2).permute(2, 0, 1)],
        memory=torch.cat([*memory, tokens]),
        memory_pos=torch.cat([*memory_position, encoded]),
        num_obj_ptr_tokens=len(tokens),
    )
    return out.reshape(*image.shape[-2:], width).numpy()
