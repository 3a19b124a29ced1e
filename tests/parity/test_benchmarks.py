"""Benchmarks compare the answers before they believe a time."""

import numpy as np
import pytest

from benchmarks.checks import believe, believed
from benchmarks.timing import Row, with_share
from tests.test_benchmarks import results, run  # noqa: F401

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("section", ["track", "objects", "videos", "images", "training", "cold"])
def test_beside_the_official_package(results, section):  # noqa: F811
    rows = run(results, section)
    timed = [row for row in rows if row["name"] != "an added object"]
    assert all(row["official"] > 0 and row["ratio"] > 0 for row in timed)


def test_other_answers_are_not_believed():
    truth = np.random.default_rng(0).standard_normal((1, 4, 4)).astype(np.float32)
    believe("same", truth, truth)
    with pytest.raises(AssertionError, match="mask differs by"):
        believe("mask", truth + 0.1, truth)
    believe("rounded", truth + 0.01, truth + 0.01, truth)
    with pytest.raises(AssertionError, match="differs"):
        believe("coarse", truth + 0.1, truth + 0.01, truth)
    with pytest.raises(AssertionError, match="shapes"):
        believe("shape", truth[:, :2], truth)


def test_a_time_that_is_not_believed_stops_no_other():
    row = Row("frame", 2.0, 1.0, 2.0)
    assert believed(row, lambda: believe("same", np.ones(1), np.ones(1))) is row
    other = believed(row, lambda: believe("mask", np.ones(1), np.zeros(1)))
    other = with_share(other.per(4), 1e9, 1e9)
    assert other.ours is None and "not believed: mask differs by 1.00e+00" in str(other)
