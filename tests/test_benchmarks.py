"""The smallest of each benchmark: that it runs, and what it counts; never its seconds."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as bench
from benchmarks import deviceless, kernels, pooling, timing
from benchmarks.timing import compare
from sam2jax.ops.attention import _online
from sam2jax.ops.linear import gelu
from sam2jax.testing import small_config
from sam2jax.tracking import step

# The others, which have no counts of their own, run beside the official package.
ALONE = {"track": 5, "memory": 5}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(timing, "PRODUCT", 64)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # in processes of its own
    return tmp_path / "results"


def run(results, section, *options):
    bench.main([section, "--small", *options])
    (path,) = results.iterdir()
    record = json.loads(path.read_text())
    assert record["versions"]["jax"] and record["device"]
    return record["rows"]


def test_pairs_are_timed_in_turn():
    calls = []
    row = compare("x", lambda: calls.append("theirs"), lambda: calls.append("ours"), runs=2)
    assert calls == ["theirs", "ours"] * 3
    assert row.official and row.ours and row.spread[0] <= row.ratio <= row.spread[1]
    assert compare("x", None, lambda: None, runs=1).ratio is None


def test_unknown_sections_are_named(capsys):
    with pytest.raises(SystemExit):
        bench.main(["nothing"])
    assert "choose from track" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("section", ALONE)
def test_ours_alone(results, section):
    before = step._step._cache_size()
    rows = run(results, section, "--alone")
    assert len(rows) == ALONE[section]
    assert all(row["official"] is None and row["ratio"] is None for row in rows)
    assert all(row["ours"] > 0 for row in rows if row["name"] != "an added object")
    if section == "track":
        assert all(0 < row["share"] for row in rows)
        assert step._step._cache_size() == before + 2  # prompted, and not
    if section == "memory":  # of one program, whatever the length of the clip
        two, four = (row["ours"] for row in rows[1:3])
        assert four < 1.05 * two


@pytest.mark.slow
def test_pooled_memories_are_timed_and_scored(monkeypatch):
    monkeypatch.setattr(pooling, "SIDES", (1, 4))
    rows = pooling.speed(small_config(), runs=1)
    assert [row.name for row in rows] == ["attention to 7, 4 x 4", "frame, 4 x 4"]
    for by_side in pooling.accuracy(1).values():
        assert by_side[1] > by_side[4] > 0


@pytest.mark.parametrize(
    "make, shape, way",
    [
        (kernels.attention_problem, (2, 24, 40, 16, 8), "blocks"),
        (kernels.gelu_problem, (40, 16, 8), "xla_gelu"),
        (kernels.linear_problem, (40, 16, 8), "xla"),
    ],
)
def test_ways_to_compute_are_timed_and_compared(make, shape, way):
    (row,) = kernels.rows({"small": lambda: make(shape)}, often=(2, 1))
    assert row["way"] == way and row["seconds"] > 0
    assert row["error"] < 0.02


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter is of JAX 0.11")
@pytest.mark.parametrize(
    "queries, keys, channels, width, lengths, programs",
    [
        (
            150,
            500,
            64,
            64,
            (500, 257),
            128,
        ),  # the last block reaches past the end, splits are empty
        (64, 300, 64, 128, (64, 0), 128),
        (130, 90, 40, 24, (89, 1), 128),  # fewer keys than in a block
        (150, 500, 64, 64, (500, 257), 1),  # not split
    ],
)
def test_the_candidate_for_hopper_attends(
    monkeypatch, queries, keys, channels, width, lengths, programs
):
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

    from benchmarks import hopper

    monkeypatch.setattr(hopper, "PROGRAMS", programs)
    problem = kernels.attention_problem((2, queries, keys, channels, width))
    query, key, value, _ = problem.given
    length = jnp.array(lengths, jnp.int32)
    interpreter = InterpretGPUParams(detect_races=True)
    out, log_sum = hopper.flash_attention(query, key, value, length, interpret=interpreter)
    wide = (x.astype(jnp.float32) for x in (query, key, value))
    expected, expected_sum = _online(*wide, length)
    assert out.shape == expected.shape and out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2)
    full = np.asarray(lengths) > 0
    np.testing.assert_allclose(log_sum[full], expected_sum[full], atol=1e-4)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter is of JAX 0.11")
@pytest.mark.parametrize(
    "rows, width, wide, programs",
    [
        (256, 144, 192, 132),  # a tile for each program
        (384, 192, 256, 1),  # one has all six, three a warpgroup
        (640, 128, 32, 3),  # they have two and one
        (128, 96, 96, 132),  # a warpgroup has none
    ],
)
def test_the_candidate_for_linear_layers(monkeypatch, rows, width, wide, programs):
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

    from benchmarks import hopper_linear

    monkeypatch.setattr(hopper_linear, "PROGRAMS", programs)
    given, *_ = kernels.linear_problem((rows, width, wide))
    x, kernel, bias = (t.astype(jnp.float32) for t in given)
    expected = jnp.dot(x, kernel, precision="highest") + bias[None]
    for activation, same in ((None, expected), (hopper_linear.gelu, gelu(expected))):
        interpreter = InterpretGPUParams(detect_races=True)
        out = hopper_linear.linear(*given, activation, interpret=interpreter)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), same, rtol=2**-7, atol=1e-6)


def test_the_candidates_gelu_is_exact():
    from benchmarks import hopper_linear

    x = jnp.linspace(-12, 12, 10_001)
    exact = [0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.tolist()]
    np.testing.assert_allclose(hopper_linear.gelu(x), exact, rtol=1e-6, atol=4e-7)


PROGRAM = """
%slices (p.1: f32[8,1024]) -> f32[1024] {
  %p.1 = f32[8,1024]{1,0} parameter(0)
  ROOT %s = f32[1,1024]{1,0} slice(%p.1), slice={[0:1], [0:1024]}
}

%turn (p.2: f32[1000000]) -> f32[1000000] {
  %p.2 = f32[1000000]{0} parameter(0)
  ROOT %twice = f32[1000000]{0} add(%p.2, %p.2)
}

%idle (p.3: f32[1000000]) -> f32[1000000] {
  ROOT %p.3 = f32[1000000]{0} parameter(0)
}

ENTRY %main (a: bf16[4096,512], b: bf16[512,2048], c: f32[8,1024], d: f32[1000000]) -> f32[1] {
  %a = bf16[4096,512]{1,0} parameter(0)
  %b = bf16[512,2048]{1,0} parameter(1)
  %c = f32[8,1024]{1,0} parameter(2)
  %d = f32[1000000]{0} parameter(3)
  %dot = (bf16[4096,2048]{1,0}, s8[33554432]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"lhs_contracting_dimensions":["1"]}
  %row = f32[1,1024]{1,0} fusion(%c), kind=kLoop, calls=%slices
  %which = f32[1000000]{0} conditional(%c, %d, %d), branch_computations={%idle, %turn}
  ROOT %many = f32[1000000]{0} while(%which), condition=%x, body=%turn, \
backend_config={"known_trip_count":{"n":"3"}}
}
""".replace("\\\n", "")


def test_programs_are_read_without_a_device():
    """Products by their work, of what is sliced the slices, the dearer branch, and all turns."""
    found = deviceless.operations(*deviceless.computations(PROGRAM))
    assert [(x.name, x.kind) for x in found] == [
        ("dot", "product"),
        ("row", "other"),
        *[("twice", "other")] * 4,
    ]
    product, row, addition = found[0].seconds, found[1].seconds, found[2].seconds
    assert product == 2 * 4096 * 512 * 2048 / deviceless.RATE
    assert row == deviceless.LEAST
    assert addition == 3 * 4e6 / deviceless.BANDWIDTH
