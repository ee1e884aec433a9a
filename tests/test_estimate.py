"""A number never travels without its interval."""

import math

from mechlens.methods.statistics.estimate import Estimate


def test_prints_value_interval_and_count() -> None:
    assert str(Estimate(0.931, 0.884, 0.967, 96)) == "0.93 [0.88, 0.97], n=96"
    assert str(Estimate(-0.0004, -0.3, 0.3, 96)) == "0.00 [-0.30, 0.30], n=96"


def test_missing_says_so_with_its_count() -> None:
    missing = Estimate.missing(3)
    assert not missing.measurable
    assert math.isnan(missing.value)
    assert math.isnan(missing.low)
    assert math.isnan(missing.high)
    assert str(missing) == "not measurable, n=3"
    assert (missing.of("nats"), Estimate(2.3, 1.9, 2.7, 14).of("nats")) == (
        str(missing),
        "2.30 nats [1.90, 2.70], n=14",
    )
    assert Estimate(0.5, 0.4, 0.6, 10).measurable
