"""Pure functions against plain definitions of what they compute."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.special

from sam2jax.ops import attention as attention_ops
from sam2jax.ops import flash
from sam2jax.ops.attention import attention
from sam2jax.ops.conv import conv, depthwise_conv, upsample_conv
from sam2jax.ops.flash import flash_attention
from sam2jax.ops.linear import ROWS, gelu, linear, rounded_einsum
from sam2jax.ops.masks import fill_holes, fill_regions, non_overlapping, stability_score
from sam2jax.ops.resize import preprocess_image, resize_bilinear, resize_masks
from sam2jax.ops.rope import project_and_rotate, rope_table, rotate, split_pairs
from sam2jax.ops.windows import window_partition, window_unpartition


def normal(seed: int, *shape: int) -> jnp.ndarray:
    return jax.random.normal(jax.random.key(seed), shape)


def plain_attention(query, key, value, lengths):
    scores = np.einsum("btd,bkd->btk", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(np.arange(key.shape[1]) < np.asarray(lengths)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("btk,bke->bte", weights / weights.sum(-1, keepdims=True), value)


@pytest.fixture(params=["cpu", "default"])
def lowered_for(monkeypatch, request):
    """What is lowered for a CPU, and what for everything else."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *given, **ways: ways[request.param](*given)
    )


# 37 keys in blocks of 16 leave an overlap; lengths end inside, at and before the last block.
@pytest.mark.parametrize("lengths", [(37, 37), (37, 5), (32, 33), (1, 16)])
def test_blockwise_attention_equals_plain_attention_and_its_gradient(monkeypatch, lengths):
    query, key, value = normal(0, 2, 9, 8), normal(1, 2, 37, 8), normal(2, 2, 37, 5)
    length = jnp.asarray(lengths, jnp.int32)

    def loss(query, key, value):
        out = attention(query, key, value, length=length)
        return jnp.sum(jnp.sin(out)), out

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, out), small = grad(query, key, value)
    monkeypatch.setattr(attention_ops, "BLOCKWISE_FROM", 0)
    monkeypatch.setattr(attention_ops, "BLOCK", 16)  # of the gradient
    monkeypatch.setattr(attention_ops, "CPU_BLOCK", 16)
    (_, blockwise), large = grad(query, key, value)
    elsewhere, _ = attention_ops._online(query * 8**-0.5, key, value, length, block=16)
    np.testing.assert_allclose(elsewhere, out, atol=2e-6)
    np.testing.assert_allclose(out, plain_attention(query, key, value, lengths), atol=2e-6)
    np.testing.assert_allclose(blockwise, out, atol=2e-6)
    for one, other in zip(small, large, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


def test_blockwise_attention_without_keys_is_zero(monkeypatch):
    monkeypatch.setattr(attention_ops, "BLOCKWISE_FROM", 0)
    out = attention(
        normal(0, 1, 4, 8), normal(1, 1, 6, 8), normal(2, 1, 6, 8), length=jnp.zeros(1, jnp.int32)
    )
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("lengths, programs", [((300, 37), 128), ((128, 0), 128), ((300, 0), 4)])
def test_the_kernel_for_gpus_equals_blocks_of_keys(monkeypatch, lengths, programs):
    """Sizes that fill no block, and keys in several parts or, of four programs, in one."""
    monkeypatch.setattr(flash, "PROGRAMS", programs)
    shapes = (2, 140, 24), (2, 300, 24), (2, 300, 5)
    given = [normal(i, *shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes)]
    length = jnp.asarray(lengths, jnp.int32)
    out, log_sum = flash_attention(*given, length, interpret=True)
    expected, expected_sum = attention_ops._online(*given, length)
    assert out.shape == (2, 140, 5) and out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=2e-2
    )
    full = np.asarray(lengths) > 0
    np.testing.assert_allclose(log_sum[full], expected_sum[full], atol=1e-2)
    program = jax.jit(attention_ops._blockwise, static_argnums=4).trace(*given, length, True)
    assert "custom_call" not in program.lower(lowering_platforms=("tpu",)).as_text()
    if jax.__version_info__ < (0, 11):  # later ones lower it where there is a GPU
        assert "triton" in program.lower(lowering_platforms=("cuda",)).as_text()


# Tokens and channels that are no powers of two, several heads, more than one block of queries,
# queries that were pooled, windows that reach beyond the map, and whole maps.
@pytest.mark.parametrize(
    "side, window, pool, heads, channels",
    [
        (8, 4, 1, 2, 24),
        (8, 4, 2, 2, 16),
        (10, 7, 1, 3, 16),
        (16, 14, 1, 1, 72),
        (16, 14, 2, 2, 24),
        (16, 16, 1, 1, 112),
        (46, 0, 1, 1, 16),
    ],
)
def test_attention_to_each_other_is_that_of_heads(side, window, pool, heads, channels):
    width = heads * channels
    given = [normal(0, 2, side, side, 3 * width), normal(1, 3 * width), None]
    if pool > 1:
        given[2] = normal(2, 2, side // pool, side // pool, width)
    given[::2] = [x if x is None else x.astype(jnp.bfloat16) for x in given[::2]]

    def attend(qkv, outside, query):
        return attention_ops.self_attention(qkv, outside, heads, window=window, query=query)

    def plainly(qkv, outside, query):
        """Window by window and head by head."""
        size = window or side
        beyond = ((0, 0), (0, -side % size), (0, -side % size), (0, 0))
        asking = qkv[..., :width] if query is None else query
        asking = np.pad(asking, ((0, 0), *[(0, (-side % size) // pool)] * 2, (0, 0)))
        held = np.pad(qkv - outside, beyond) + outside
        out = np.zeros_like(asking)
        for y, x, h in itertools.product(*[range(0, side, size)] * 2, range(heads)):
            rows, columns = (slice(n // pool, (n + size) // pool) for n in (y, x))
            own = np.s_[:, rows, columns, h * channels : (h + 1) * channels]
            tokens = held[:, y : y + size, x : x + size].reshape(2, size**2, 3, heads, channels)
            key, value = tokens[:, :, 1, h], tokens[:, :, 2, h]
            found = plain_attention(asking[own].reshape(2, -1, channels), key, value, [size**2] * 2)
            out[own] = found.reshape(out[own].shape)
        return out[:, : side // pool, : side // pool]

    exact = jax.tree.map(lambda x: x.astype(jnp.float32), given)
    expected = plainly(*(x if x is None else np.asarray(x) for x in exact))
    np.testing.assert_allclose(attend(*exact), expected, atol=1e-5)
    in_one = flash.self_attention(*given, num_heads=heads, window=window, interpret=True)
    for found in (in_one, attend(*given)):
        assert found.shape == expected.shape and found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype("float32"), expected, atol=2e-2, rtol=1e-2)

    def total(given):
        return jnp.sum(jnp.sin(attend(*given).astype(jnp.float32)))

    for found, expected in zip(
        *map(jax.tree.leaves, map(jax.grad(total), (given, exact))), strict=True
    ):
        bound = 0.05 * np.abs(expected).max()
        np.testing.assert_allclose(found.astype("float32"), expected, atol=bound)


@pytest.mark.parametrize("room", [0, 128])
def test_projected_and_rotated_in_one_is_that_in_two(monkeypatch, room):
    """Several maps in a row, several blocks of a map, of channels and of room."""
    table = rope_table(16, 64, 10000.0)
    given = normal(0, 2, 512, 128), normal(1, 128, 64) / 8, normal(2, 64)
    narrow = given[0].astype(jnp.bfloat16), given[1].astype(jnp.bfloat16), given[2]
    in_one = functools.partial(flash.project_and_rotate, interpret=True)
    monkeypatch.setattr(flash, "project_and_rotate", in_one)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *x, default, cuda=None, **_: (cuda or default)(*x)
    )

    def run(dtype, *given):
        return project_and_rotate(*given, table, jnp.dtype(dtype), scale=0.5, room=room)

    maps = (given[0] @ given[1] + given[2].reshape(1, 1, -1)).reshape(2, 2, 256, 64)
    expected = 0.5 * rotate(maps, table).reshape(2, 512, 64)
    for found, atol in ((run("float32", *given), 2e-5), (run("bfloat16", *narrow), 0.1)):
        assert found.shape == (2, 512 + room, 64)
        np.testing.assert_allclose(found[:, :512].astype("float32"), expected, atol=atol)
        np.testing.assert_array_equal(found[:, 512:].astype("float32"), 0)

    def total(dtype, *given):
        return jnp.sum(jnp.sin(run(dtype, *given).astype(jnp.float32)))

    gradients = [
        jax.grad(total, (1, 2, 3))(*x) for x in (("bfloat16", *narrow), ("float32", *given))
    ]
    for found, exact in zip(*gradients, strict=True):
        bound = 0.05 * np.abs(exact).max()
        np.testing.assert_allclose(found.astype("float32"), exact, atol=bound)


@pytest.mark.parametrize(
    "width, features, positions, room, fits",
    [
        (64, 256, 4096, 64, True),
        (192, 32, 64, 0, True),
        (96, 64, 64, 0, False),
        (64, 96, 64, 0, False),
        (64, 16, 64, 0, False),
        (64, 64, 36, 0, False),
        (64, 64, 64, 32, False),
    ],
)
def test_which_sizes_are_rotated_in_one(width, features, positions, room, fits):
    assert flash.can_rotate(jnp.zeros((width, features)), positions, room) is fits


def test_a_jax_without_the_kernels_language_takes_blocks(monkeypatch):
    assert attention_ops.kernels_of_gpus().flash_attention is flash_attention
    monkeypatch.setitem(sys.modules, "sam2jax.ops.flash", None)
    assert attention_ops.kernels_of_gpus() is None
    given = [normal(i, 2, 140, 24).astype(jnp.bfloat16) for i in range(3)]
    out = attention_ops._blockwise(*given, jnp.full(2, 140, jnp.int32), True)
    expected, _ = attention_ops._row_by_row(*given, jnp.full(2, 140, jnp.int32))
    np.testing.assert_array_equal(out, expected)


def test_a_mask_of_keys_drops_them():
    query, key, value = normal(0, 1, 4, 8), normal(1, 1, 6, 8), normal(2, 1, 6, 8)
    mask = jnp.array([[True, False, True, True, False, True]])
    kept = attention(query, key[:, mask[0]], value[:, mask[0]])
    np.testing.assert_allclose(attention(query, key, value, mask=mask), kept, atol=1e-6)


def test_rotation_equals_complex_multiplication_of_interleaved_pairs():
    x = np.asarray(normal(0, 9, 8))
    cos, sin = rope_table(3, 8, 10000.0)
    pairs = x.reshape(9, 4, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cos + 1j * sin)
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(9, 8)
    got = rotate(split_pairs(jnp.asarray(x), 1), (cos, sin))
    np.testing.assert_allclose(got, split_pairs(jnp.asarray(expected), 1), atol=1e-6)


@pytest.mark.parametrize(
    "height, width, window", [(8, 8, (4, 4)), (7, 10, (4, 3)), (3, 3, (14, 14))]
)
def test_windows_come_back_together(height, width, window):
    x = normal(0, 2, height, width, 6)
    windows = window_partition(x, window, 2)
    assert windows.shape[1:] == (window[0] * window[1], 3)
    np.testing.assert_array_equal(window_unpartition(windows, window, 2, height, width), x)


def test_windows_hold_neighbouring_pixels_of_one_head():
    first = jnp.arange(16.0).reshape(1, 4, 4, 1)
    x = jnp.concatenate([first, -first], axis=-1)
    windows = window_partition(x, (2, 2), 2)[..., 0]
    assert windows[2:4].tolist() == [[2.0, 3.0, 6.0, 7.0], [-2.0, -3.0, -6.0, -7.0]]
    filled = window_partition(x, (3, 3), 2, jnp.array([-1.0, -2.0]))[..., 0]
    for head, kept, beyond in ((2, 1.0, -1.0), (3, -1.0, -2.0)):
        expected = [[kept * row, beyond, beyond] for row in (3.0, 7.0, 11.0)]
        assert filled[head].tolist() == sum(expected, [])


def test_depthwise_convolution_equals_the_grouped_one():
    x, kernel, bias = normal(0, 1, 9, 11, 6), normal(1, 7, 7, 6), normal(2, 6)
    expected = jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    got = depthwise_conv(x, kernel, bias, jnp.float32)
    np.testing.assert_allclose(got, expected + bias.reshape(1, 1, 1, -1), atol=2e-5)


@pytest.mark.parametrize(
    "size, stride, padding, height",
    [(3, 2, 1, 8), (3, 2, 1, 7), (7, 4, 3, 16), (4, 4, 0, 8), (4, 4, 0, 9)],
)
@pytest.mark.parametrize(
    "dtype, rounded, atol",
    [(jnp.float32, True, 1e-5), (jnp.bfloat16, True, 0.03), (jnp.bfloat16, False, 0.03)],
)
def test_a_convolution_has_the_gradient_of_its_definition(
    lowered_for, size, stride, padding, height, dtype, rounded, atol
):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, height, height, 3))
    kernel = jax.random.normal(keys[1], (size, size, 3, 5)) / size
    bias = jax.random.normal(keys[2], (5,)).astype(jnp.bfloat16).astype(jnp.float32)

    def ours(x, kernel, bias):
        y = conv(x, kernel, bias, stride=stride, padding=padding, dtype=dtype, rounded=rounded)
        assert y.dtype == (dtype if rounded else jnp.float32)
        return y.astype(jnp.float32)

    def defined(x, kernel, bias):
        sides = (padding, padding)
        padded = jnp.pad(x, ((0, 0), sides, sides, (0, 0)))
        reach = height + 2 * padding - size + 1
        y = bias.reshape(1, 1, 1, 5)
        for i in range(size):
            for j in range(size):
                seen = padded[:, i : i + reach : stride, j : j + reach : stride]
                y = y + jnp.einsum("bhwi,io->bhwo", seen, kernel[i, j], precision="highest")
        return y

    def answers(way):
        gradient = jax.grad(lambda *given: jnp.sum(jnp.sin(way(*given))), (0, 1, 2))
        return way(x, kernel, bias), *gradient(x, kernel, bias)

    for one, other in zip(answers(ours), answers(defined), strict=True):
        np.testing.assert_allclose(one, other, atol=atol * float(jnp.max(jnp.abs(other))))


def test_what_is_rounded_on_accelerators_equals_what_is_on_cpus(lowered_for):
    x, kernel, bias = normal(0, 6, 8), normal(1, 8, 5), normal(2, 5)
    exact, half = linear(x, kernel, bias, jnp.float32), jnp.bfloat16
    np.testing.assert_allclose(linear(x, kernel, bias, half).astype("float32"), exact, atol=0.05)
    expected = np.einsum("ti,io->ot", x, kernel)
    found = rounded_einsum("ti,io->ot", x.astype(half), kernel.astype(half))
    assert found.dtype == half
    np.testing.assert_allclose(found.astype("float32"), expected, atol=0.05)
    field, weights = normal(3, 1, 9, 11, 6), normal(4, 7, 7, 6)
    grouped = jax.lax.conv_general_dilated(
        field,
        weights[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    depthwise = depthwise_conv(field, weights, jnp.zeros(6), jnp.float32)
    np.testing.assert_allclose(depthwise, grouped, atol=2e-5)


@pytest.mark.parametrize(
    "dtype, atol, of_slope", [(jnp.float32, 1e-6, 4e-6), (jnp.bfloat16, 0.016, 0.004)]
)
def test_gelu_and_its_slope(lowered_for, dtype, atol, of_slope):
    x = jnp.linspace(-6, 6, 101).astype(dtype)
    wide = np.asarray(x, np.float64)
    share = (1 + scipy.special.erf(wide / np.sqrt(2))) / 2
    np.testing.assert_allclose(gelu(x).astype("float32"), wide * share, atol=atol)
    slope = share + wide * np.exp(-(wide**2) / 2) / np.sqrt(2 * np.pi)
    found = jax.grad(lambda x: jnp.sum(gelu(x).astype(jnp.float32)))(x)
    np.testing.assert_allclose(found.astype("float32"), slope, atol=of_slope)
    tangent = jax.jvp(gelu, (x,), (jnp.ones_like(x),))[1]
    np.testing.assert_allclose(tangent.astype("float32"), slope, atol=of_slope)


def test_a_rounded_einsum_has_its_gradient(lowered_for):
    one, other = (normal(i, 4, 6).astype(jnp.bfloat16) for i in (0, 1))

    def total(way, dtype):
        given = one.astype(dtype), other.astype(dtype)
        return jax.grad(lambda *p: jnp.sum(jnp.sin(way("ti,tj->ij", *p).astype("float32"))))(*given)

    expected = total(jnp.einsum, jnp.float32)
    found = total(rounded_einsum, jnp.bfloat16)
    np.testing.assert_allclose(found.astype("float32"), expected, atol=0.1)


@pytest.mark.parametrize("rounded", [True, False])
def test_gradients_are_of_the_parameters_dtype(rounded):
    half = jnp.dtype(jnp.bfloat16)
    given = [normal(i, *shape).astype(half) for i, shape in enumerate([(1, 8, 8, 3), (6,)])]
    kernels = normal(2, 3, 3, 3, 6).astype(half), normal(3, 3, 6).astype(half)

    def total(x, bias, window, matrix):
        one = conv(x, window, bias, stride=1, padding=1, dtype=half, rounded=rounded)
        other = linear(x, matrix, bias, half, rounded=rounded)
        return jnp.sum((one + other).astype(jnp.float32))

    gradients = jax.grad(total, (0, 1, 2, 3))(*given, *kernels)
    assert [g.dtype for g in gradients] == [half] * 4


@pytest.mark.parametrize("shape", [(3, 5), (2 * ROWS, 8), (3, 4, ROWS // 2, 8), (2 * ROWS + 1, 8)])
@pytest.mark.parametrize("rounded", [True, False])
def test_a_product_in_bfloat16_has_the_gradient_of_one_in_float32(shape, rounded):
    x, kernel = normal(0, *shape), normal(1, shape[-1], 6) / shape[-1]
    weights = normal(2, *shape[:-1], 6)  # of which each has a gradient of its own
    x, kernel, weights = (t.astype(jnp.bfloat16).astype(jnp.float32) for t in (x, kernel, weights))

    def total(x, kernel, dtype):
        y = linear(x, kernel, None, dtype, rounded=rounded).astype(jnp.float32)
        return jnp.sum(y * weights)

    expected = jax.grad(total, (0, 1))(x, kernel, jnp.float32)
    found = jax.grad(total, (0, 1))(x, kernel, jnp.bfloat16)
    assert found[1].dtype == jnp.float32  # sums are not rounded
    np.testing.assert_allclose(found[0], expected[0], atol=0.01 * np.abs(expected[0]).max())
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5 * np.abs(expected[1]).max())


def test_upsampling_convolution_puts_each_pixel_in_its_own_patch():
    x, kernel, bias = normal(0, 1, 3, 2, 4), normal(1, 4, 2, 2, 5), normal(2, 5)
    got = upsample_conv(x, kernel, bias, jnp.float32)
    expected = np.einsum("bhwi,ipqo->bhpwqo", x, kernel).reshape(1, 6, 4, 5) + np.asarray(bias)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def regions(area_limit: int, mask: np.ndarray) -> np.ndarray:
    """Components of at most that area, by SciPy."""
    labels, _ = scipy.ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(labels.reshape(-1))
    return mask & (areas[labels] <= area_limit)


@pytest.mark.parametrize("area", [1, 8, 40])
def test_small_holes_are_filled_and_no_others(area):
    density = np.array([0.05, 0.3, 0.35, 0.42, 0.6, 1.0]).reshape(-1, 1, 1)
    holes = np.random.default_rng(area).random((6, 40, 48)) < density
    logits = np.where(holes, -1.0, 2.0).astype(np.float32)
    filled = np.asarray(fill_holes(jnp.asarray(logits), area))
    for got, given in zip(filled, logits, strict=True):
        holes = regions(area, given <= 0)
        np.testing.assert_array_equal(got, np.where(holes, np.float32(0.1), given))


@pytest.mark.parametrize("area", [8, 200])
def test_small_regions_of_images_are_those_of_scipy(area):
    """By flooding and by labelling."""
    given = (np.random.default_rng(area).random((3, 40, 48)) < 0.45) * 3 - np.float32(1)
    got = fill_regions(jnp.asarray(given), area, area, 0.5)
    for mask, found in zip(given, got, strict=True):
        expected = np.where(regions(area, mask <= 0.5), np.float32(10.5), mask)
        expected = np.where(regions(area, mask > 0.5), np.float32(-9.5), expected)
        np.testing.assert_array_equal(found, expected)


def test_a_snake_longer_than_the_area_is_no_hole():
    mask = np.ones((12, 12), np.float32)
    mask[1, 1:11] = mask[1:11, 10] = mask[10, 1:11] = -1  # 28 pixels in a thin line
    for area, is_hole in ((27, False), (28, True)):
        assert bool((fill_holes(mask[None], area) > 0).all()) == is_hole


def test_stability_of_an_empty_mask_is_one():
    masks = jnp.stack([jnp.full((4, 4), -5.0), jnp.zeros((4, 4)), jnp.full((4, 4), 5.0)])
    assert stability_score(masks, 0.05).tolist() == [1.0, 0.0, 1.0]


def test_pixels_go_to_the_highest_object():
    masks = jnp.array([[[3.0, -20.0, 1.0]], [[2.0, -30.0, 4.0]]])
    assert non_overlapping(masks).tolist() == [[[3.0, -20.0, -10.0]], [[-10.0, -30.0, 4.0]]]


def test_bilinear_resizing_keeps_straight_lines_and_does_not_antialias_unless_asked():
    ramp = jnp.broadcast_to(jnp.arange(8.0)[None, None, :, None], (1, 8, 8, 1))
    up = resize_bilinear(ramp, 16, 16)[0, 0, :, 0]
    np.testing.assert_allclose(up[1:-1], np.arange(16)[1:-1] / 2 - 0.25, atol=1e-6)
    dots = jnp.zeros((1, 8, 8, 1)).at[:, ::4, ::4].set(1.0)
    assert float(resize_bilinear(dots, 2, 2).max()) == 0.0  # falls between the samples
    assert float(resize_bilinear(dots, 2, 2, antialias=True).min()) > 0.0


def test_masks_of_many_frames_are_resized_alike():
    masks = normal(0, 3, 2, 8, 8)
    together = resize_masks(masks, (5, 12))
    assert together.shape == (3, 2, 5, 12)
    np.testing.assert_allclose(together[1], resize_masks(masks[1], (5, 12)), atol=1e-6)


def test_preprocessed_frames_pass_through():
    frame = normal(0, 1, 16, 16, 3)
    np.testing.assert_array_equal(preprocess_image(frame, 16), frame)
    grey = preprocess_image(jnp.full((1, 5, 9, 3), 127, jnp.uint8), 16)
    assert grey.shape == (1, 16, 16, 3)
    np.testing.assert_allclose(
        grey[0, 0, 0], (127 / 255 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225], 1e-5
    )
