"""Runs side by side: differences with intervals that cover, what runs differ in, and what a seed decides."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mechlens as ml
from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.results.compared import _difference
from mechlens.runs.results.compared_page import write_comparison
from mechlens.runs.run import Inputs
from mechlens.runs.writer import open_run
from mechlens.settings import WandbSettings


@dataclass(frozen=True)
class Config:
    model: str
    seed: int
    out: Path


def made(
    folder: Path, seed: int, gap: Estimate, model: str = "one", verb: str = "separate", data: str = "a" * 64
) -> Path:
    """A finished run with two numbers."""
    config = Config(model, seed, folder)
    with open_run(verb=verb, config=config, out=folder, wandb=WandbSettings(mode="disabled"), argv=[]) as writer:
        writer.inputs(Inputs(model="m" * 64, data={"harmful": data}))
        writer.metrics({"gap": gap, "refused.n": Estimate.exact(7, 40)})
    return folder


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    gaps = [Estimate(0.5, 0.4, 0.6, 40), Estimate(0.9, 0.8, 1.0, 40), Estimate(0.7, 0.6, 0.8, 40)]
    return [made(tmp_path / f"seed-{i}" / "run", i, gap) for i, gap in enumerate(gaps)]


def test_numbers_stand_beside_each_other_with_their_difference_from_the_first(three: list[Path]) -> None:
    found = ml.compare_runs(*three)
    assert found.names == ("seed-0/run", "seed-1/run", "seed-2/run")
    gaps = found.metrics[found.metrics["name"] == "gap"].set_index("run")
    assert gaps["difference"].round(9).tolist() == [0.0, 0.4, 0.2]
    assert gaps["difference_low"].round(9).tolist() == pytest.approx([d - math.hypot(0.1, 0.1) for d in (0, 0.4, 0.2)])
    counts = found.metrics[found.metrics["name"] == "refused.n"]
    assert counts["difference"].tolist() == [0, 0, 0]
    assert counts[["low", "difference_low", "difference_high"]].isna().all().all()


def test_an_interval_of_a_difference_covers_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        means = [draw.normal(mean, 1, size=50) for mean in (0.2, 0.9)]
        first, second = (
            Estimate(one.mean(), one.mean() - 1.96 * one.std(ddof=1) / 50**0.5,
                     one.mean() + 1.96 * one.std(ddof=1) / 50**0.5, 50) for one in means
        )  # fmt: skip
        told = _difference("gap", first, second)
        inside += told["difference_low"] <= 0.7 <= told["difference_high"]
    assert 0.93 < inside / 2000 < 0.965


def test_what_runs_differ_in_is_told_and_nothing_else(tmp_path: Path, three: list[Path]) -> None:
    other = made(tmp_path / "other", 0, Estimate(0.5, 0.4, 0.6, 40), model="two", data="b" * 64)
    found = ml.compare_runs(three[0], other)
    rows = list(found.differs.itertuples(index=False, name=None))
    assert [row[:2] for row in rows] == [("configuration", "model"), ("input", "harmful")]
    assert rows[0][2:] == ('"one"', '"two"')
    assert ml.compare_runs(three[0], three[0]).differs.empty
    assert ml.compare_runs(three[0], three[0]).names == ("run", "run (2)")


def test_the_spread_between_seeds_stands_beside_what_one_run_claims(tmp_path: Path, three: list[Path]) -> None:
    seeds = ml.compare_runs(*three).seeds.set_index("name")
    assert seeds.loc["gap", "mean"] == pytest.approx(0.7)
    assert seeds.loc["gap", "between_seeds"] == pytest.approx(0.2)
    assert seeds.loc["gap", "one_run"] == pytest.approx(0.1 / 1.96)
    assert seeds.loc["gap", "runs"] == 3
    # A run of another model is in no group, and alone it makes none.
    other = made(tmp_path / "other", 3, Estimate(9.0, 8.0, 10.0, 40), model="two")
    assert ml.compare_runs(*three, other).seeds.set_index("name").loc["gap", "runs"] == 3
    assert ml.compare_runs(three[0], other).seeds.empty


def test_what_cannot_be_compared_is_refused(tmp_path: Path, three: list[Path]) -> None:
    with pytest.raises(UserError, match="1 run can't be compared"):
        ml.compare_runs(three[0])
    patch = made(tmp_path / "patch", 0, Estimate(0.5, 0.4, 0.6, 40), verb="patch")
    with pytest.raises(UserError, match="no numbers in common"):
        ml.compare_runs(three[0], patch)
    open_run(verb="separate", config=Config("one", 9, tmp_path / "half"), out=tmp_path / "half",
             wandb=WandbSettings(mode="disabled"), argv=[])  # fmt: skip
    with pytest.raises(UserError, match="isn't finished"):
        ml.compare_runs(three[0], tmp_path / "half")


def test_the_page_and_the_command_say_the_same(
    tmp_path: Path, three: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compared"
    main(["runs", "compare", *map(str, three), "--out", str(out)])
    said = capsys.readouterr().out
    assert "+0.40 [0.26, 0.54]" in said
    assert "configuration seed: 0, 1, 2" in said
    page = (out / "compared.html").read_text()
    assert "What the seed decides" in page
    assert "<script" not in page
    pd.testing.assert_frame_equal(pd.read_parquet(out / "metrics.parquet"), ml.compare_runs(*three).metrics)
    hostile = made(tmp_path / "<script>x", 0, Estimate(0.5, 0.4, 0.6, 40))
    found = write_comparison(ml.compare_runs(three[0], hostile), tmp_path / "page")
    assert "<script" not in found.read_text()
