"""A number never travels without its interval."""

import math
from pathlib import Path

import pandas as pd

from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.report.cells import cells
from mechlens.runs.report.parts import estimate_text
from mechlens.runs.run import Run, plain, read_run, write_run


def test_prints_value_interval_and_count() -> None:
    assert str(Estimate(0.931, 0.884, 0.967, 96)) == "0.93 [0.88, 0.97], n=96"
    assert str(Estimate(-0.0004, -0.3, 0.3, 96)) == "0.00 [-0.30, 0.30], n=96"


def test_an_auroc_of_too_few_prompts_has_no_interval_and_a_share_may_have_a_wide_one() -> None:
    auroc = Estimate(1.0, 0.0, 1.0, 14, is_auroc=True)
    assert str(auroc) == "1.00, too few prompts for an interval, n=14"
    assert estimate_text(auroc).detail == "too few prompts for an interval, n = 14"
    assert plain(auroc) == {"value": 1.0, "low": 0.0, "high": 1.0, "n": 14, "is_auroc": True}
    assert all(map(math.isnan, auroc.interval))
    assert Estimate(1.0, 0.0, 1.0, 14).interval == (0.0, 1.0)
    assert plain(Estimate(1.0, 0.0, 1.0, 14)) == {"value": 1.0, "low": 0.0, "high": 1.0, "n": 14}
    assert str(Estimate(0.5, 0.0, 1.0, 4)) == "0.50 [0.00, 1.00], n=4"
    assert cells(pd.DataFrame([auroc.row("auroc")]))[0][1:3] == ["too few prompts"] * 2
    long = pd.DataFrame([{"measure": name, **auroc.row()} for name in ("auroc", "tpr", "auroc.frozen")])
    assert [row[2] == "too few prompts" for row in cells(long)] == [True, False, True]
    assert not Estimate.of_row(long.loc[0], called="auroc").has_interval
    assert Estimate.of_row(long.loc[1], called="tpr").has_interval


def test_records_keep_what_is_an_auroc_whatever_it_is_called(tmp_path: Path) -> None:
    """As `harm.floor.tfidf` of `track`, whose name doesn't tell."""
    auroc = Estimate(1.0, 0.0, 1.0, 14, is_auroc=True)
    run = Run("x-1", "x", {}, {}, "success", "now", metrics={"floor": auroc, "rate": Estimate(1.0, 0.0, 1.0, 14)})
    write_run(run, tmp_path)
    assert [(name, one.has_interval) for name, one in read_run(tmp_path).metrics.items()] == [
        ("floor", False), ("rate", True),
    ]  # fmt: skip
    assert cells(pd.DataFrame([auroc.row("rate")]))[0][1:3] == ["0", "1"]


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
