"""Benchmarks compare the answers before they believe a time."""

import numpy as np
import pytest

from benchmarks.checks import believe
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
