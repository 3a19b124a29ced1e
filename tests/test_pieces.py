"""What a CPU does a piece at a time is what is done at once elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jax.nn.hiera import MultiScaleAttention
from sam2jax.ops import memory, pieces
from sam2jax.ops.linear import gelu, mlp
from sam2jax.ops.memory import attend_to_maps
from sam2jax.ops.rope import rope_table


def normal(seed: int, *shape: int) -> jnp.ndarray:
    return jax.random.normal(jax.random.key(seed), shape)


def gradients(function, *given):
    loss = lambda *given: jnp.sum(jnp.sin(function(*given).astype(jnp.float32)))  # noqa: E731
    return jax.grad(loss, argnums=tuple(range(len(given))))(*given)


def set_anew(monkeypatch, module, name, value):
    monkeypatch.setattr(module, name, value)
    jax.clear_caches()


def assert_close(given, expected, atol):
    for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), atol=atol
        )


TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_keys_made_on_the_way_equal_keys_made_first(monkeypatch, dtype):
    """No map, some and all of them, with pointers behind; an empty map may hold anything."""
    side, width, features, slots, pointers = 16, 8, 32, 3, 5
    cells, scale = side**2, features**-0.5
    given = [
        normal(0, 4, 7, features) * scale,
        normal(1, 4, slots * cells, width).at[1, cells:].set(1e4),
        normal(2, 4, pointers, width).at[2, 3:].set(1e4),
        normal(3, 4, slots * cells + pointers, 6),
        normal(4, width, features) * width**-0.5,
        normal(5, features),
    ]
    given = [x.astype(dtype) for x in given]
    of_maps = jnp.array([0, cells, 3 * cells, 2 * cells])
    lengths = of_maps, of_maps + jnp.array([5, 0, 3, 1])
    table = rope_table(side, features, 10000.0)

    def attend(*given):
        return attend_to_maps(*given, table, *lengths, in_one=False)

    first, by_first = jax.jit(attend)(*given), gradients(attend, *given)
    set_anew(monkeypatch, memory, "BLOCKWISE_FROM", 0)
    on_the_way = jax.jit(attend)(*given)
    assert not np.array_equal(first, on_the_way)
    assert_close(on_the_way, first, TOLERANCE[dtype])
    assert_close(gradients(attend, *given), by_first, 0)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rows_by_pieces_equal_all_rows(monkeypatch, dtype):
    x = normal(0, 2, 8, 16, 12)
    layers = [(normal(i, *s) / 4, normal(i + 2, s[1])) for i, s in enumerate(((12, 24), (24, 9)))]

    def apply(x, layers):
        return mlp(x, layers, gelu, jnp.dtype(dtype), rounded=False)

    def loops():
        return jax.jit(apply).lower(x, layers).as_text().count("stablehlo.while")

    whole, by_whole = apply(x, layers), gradients(apply, x, layers)
    assert loops() == 0
    set_anew(monkeypatch, pieces, "PIECE", 24 * 32)
    assert loops() == 1
    assert_close(apply(x, layers), whole, TOLERANCE[dtype])
    assert_close(gradients(apply, x, layers), by_whole, 0)


def test_layers_by_pieces_need_room_for_one(monkeypatch):
    """What all layers' results begin as is not made before the first one runs."""
    x, layer = (
        normal(0, 4096, 8),
        [(normal(1, 8, 64), normal(2, 64)), (normal(3, 64, 8), normal(4, 8))],
    )

    def room(layers):
        def apply(x):
            for _ in range(layers):
                x = x + mlp(x, layer, gelu, jnp.dtype("float32"))
            return x

        return jax.jit(apply).lower(x).compile().memory_analysis().temp_size_in_bytes

    whole = room(12)
    set_anew(monkeypatch, pieces, "PIECE", 64 * 256)
    assert room(12) < 0.6 * whole
    assert room(12) < room(2) + x.nbytes


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("width, features", [(32, 24), (28, 12)])
def test_rows_of_windows_equal_the_whole_map(monkeypatch, width, features, pool):
    """Windows fill the width, and reach beyond it."""
    module = MultiScaleAttention(12, features, 3, 8, pool, jnp.dtype("float32"), True)
    x = normal(0, 2, 32, width, 12)
    params = module.init(jax.random.key(1), x)
    params = jax.tree.map(lambda p: normal(2, *p.shape) / 4, params)
    whole, by_whole = module.apply(params, x), gradients(module.apply, params, x)
    set_anew(monkeypatch, pieces, "PIECE", 3 * features * 8 * width * 2)
    assert jax.jit(module.apply).lower(params, x).as_text().count("stablehlo.while") == 1
    by_rows = module.apply(params, x)
    assert by_rows.shape == whole.shape
    assert_close(by_rows, whole, 1e-5)
    assert_close(gradients(module.apply, params, x), by_whole, 0)
