"""Runs side by side: differences with intervals that cover, what runs differ in, and what a seed decides."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import mechlens as ml
from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.probing.auroc import auroc_difference, auroc_estimate
from mechlens.methods.statistics.by_prompt import ByPrompt, by_prompt_table, mean_difference
from mechlens.methods.statistics.estimate import Estimate
from mechlens.prompts.prompt import Prompt
from mechlens.runs.results.compared import _difference
from mechlens.runs.results.compared_page import write_comparison
from mechlens.runs.results.paired import BY_PROMPT
from mechlens.runs.run import Inputs
from mechlens.runs.writer import open_run
from mechlens.settings import WandbSettings


@dataclass(frozen=True)
class Config:
    model: str
    seed: int
    out: Path


def made(
    folder: Path, seed: int, gap: Estimate, model: str = "one", verb: str = "separate", data: str = "a" * 64,
    made_of: ByPrompt | None = None, words: str = "words",
) -> Path:  # fmt: skip
    """A finished run with two numbers."""
    config = Config(model, seed, folder)
    with open_run(verb=verb, config=config, out=folder, wandb=WandbSettings(mode="disabled"), argv=[]) as writer:
        writer.inputs(Inputs(model="m" * 64, data={"harmful": data}))
        writer.metrics({"gap": gap, "refused.n": Estimate.exact(7, 40)})
        if made_of is not None:
            writer.prompts([Prompt(one, f"{words} {one}") for one in made_of.ids])
            writer.table(BY_PROMPT, by_prompt_table({"gap": made_of}))
    return folder


IDS = [str(i) for i in range(40)]


def of(values: torch.Tensor, positive: torch.Tensor | None = None) -> ByPrompt:
    return ByPrompt(IDS, IDS, values, positive)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    gaps = [Estimate(0.5, 0.4, 0.6, 40), Estimate(0.9, 0.8, 1.0, 40), Estimate(0.7, 0.6, 0.8, 40)]
    return [made(tmp_path / f"seed-{i}" / "run", i, gap) for i, gap in enumerate(gaps)]


def test_numbers_stand_beside_each_other_with_their_difference_from_the_first(three: list[Path]) -> None:
    found = ml.compare_runs(*three)
    assert found.names == ("seed-0/run", "seed-1/run", "seed-2/run")
    gaps = found.metrics[found.metrics["name"] == "gap"].set_index("run")
    assert gaps["difference"].isna().tolist() == [True, False, False]  # a run isn't compared with itself
    assert gaps["difference"][1:].round(9).tolist() == [0.4, 0.2]
    assert gaps["difference_low"][1:].round(9).tolist() == pytest.approx([d - math.hypot(0.1, 0.1) for d in (0.4, 0.2)])
    counts = found.metrics[found.metrics["name"] == "refused.n"]
    assert counts["difference"][1:].tolist() == [0, 0]
    assert counts[["low", "difference_low", "difference_high"]].isna().all().all()


def test_a_number_that_runs_call_differently_has_every_runs_words(three: list[Path]) -> None:
    found = ml.compare_runs(*three)
    words = ("AUROC at post[4]", "AUROC at post[2]", "AUROC at post[4]")
    runs = [
        replace(run, record=replace(run.record, words={"gap": one})) for run, one in zip(found.runs, words, strict=True)
    ]
    told = "AUROC at post[4] (seed-0/run, seed-2/run); AUROC at post[2] (seed-1/run)"
    assert replace(found, runs=tuple(runs)).metrics.query("name == 'gap'")["words"].unique().tolist() == [told]


def test_runs_on_the_same_prompts_are_compared_pair_by_pair(tmp_path: Path) -> None:
    """Whatever both share goes out; and where a pair can't be trusted the runs are taken for independent."""
    shared, own = torch.randn(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = of(5 * shared), of(5 * shared + 1 + own / 10)
    wide = [Estimate(float(one.values.mean()), float(one.values.mean()) - 2, float(one.values.mean()) + 2, 40)
            for one in (first, second)]  # fmt: skip
    one = made(tmp_path / "one", 0, wide[0], made_of=first)
    two = made(tmp_path / "two", 0, wide[1], model="two", made_of=second)
    row = ml.compare_runs(one, two).metrics.query("name == 'gap' and run == 'two'").iloc[0]
    gaps = second.values - first.values
    reach = stats.t.ppf(0.975, 39) * float(gaps.std()) / 40**0.5
    assert row["paired"]
    assert row["difference"] == pytest.approx(float(gaps.mean()))
    assert row["difference_high"] - row["difference"] == pytest.approx(reach)
    shuffled = ByPrompt(IDS[::-1], IDS[::-1], second.values.flip(0))  # the order of the rows is nothing
    same = made(tmp_path / "same", 0, wide[1], made_of=shuffled)
    again = ml.compare_runs(one, same).metrics.query("name == 'gap' and run == 'same'").iloc[0]
    assert again["difference_high"] == pytest.approx(row["difference_high"])
    others = {
        "words": made(tmp_path / "words", 0, wide[1], made_of=second, words="other"),
        "fewer": made(tmp_path / "fewer", 0, wide[1], made_of=second.only(torch.arange(40) < 39)),
        "wrong": made(tmp_path / "wrong", 0, Estimate(9.0, 7.0, 11.0, 40), made_of=second),
        "old": made(tmp_path / "old", 0, wide[1]),
    }
    for name, other in others.items():
        row = ml.compare_runs(one, other).metrics.query(f"name == 'gap' and run == '{name}'").iloc[0]
        assert not row["paired"], name
        assert row["difference_high"] - row["difference"] == pytest.approx(8**0.5), name


def test_aurocs_of_the_same_prompts_are_paired_too(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    positive = torch.arange(40) < 20
    scores = torch.randn(40, generator=draw, dtype=torch.float64) + positive
    made_of = [of(scores, positive), of(scores + torch.randn(40, generator=draw) / 10, positive)]
    areas = [auroc_estimate(one.values, positive, IDS) for one in made_of]
    runs = [made(tmp_path / f"{i}", i, area, made_of=one)
            for i, (area, one) in enumerate(zip(areas, made_of, strict=True))]  # fmt: skip
    row = ml.compare_runs(*runs).metrics.query("name == 'gap' and run == '1'").iloc[0]
    assert row["paired"]
    expected = auroc_difference(made_of[1].values, made_of[0].values, positive, IDS)
    assert (row["difference"], row["difference_low"]) == pytest.approx((expected.value, expected.low))
    assert row["difference_high"] - row["difference_low"] < (areas[0].high - areas[0].low) / 2


@pytest.mark.parametrize(("kind", "n"), [("scores", 12), ("families", 40), ("flags", 20)])
def test_a_paired_interval_covers_as_often_as_it_says(kind: str, n: int) -> None:
    draw = torch.Generator().manual_seed(n)
    inside, trials = 0, 300
    families = [str(i // 2) for i in range(n)] if kind == "families" else [str(i) for i in range(n)]
    for _ in range(trials):
        shared = torch.randn(n, generator=draw)
        if kind == "families":
            shared = shared[torch.arange(n) // 2]
        own = torch.randn(2, n, generator=draw) + (torch.randn(n // 2, generator=draw).repeat_interleave(2)
                                                   if kind == "families" else 0)  # fmt: skip
        first, second = 2 * shared + own[0] + 0.3, 2 * shared + 0.3 * own[1]
        truth = 0.3
        if kind == "flags":  # the threshold that .3 in sd's of sqrt(4 + 1) and sqrt(4 + .09) is on the other side of
            first, second = (first > 0).float(), (second > 0).float()
            truth = float(stats.norm.cdf(0.3 / 5**0.5) - 0.5)
        found = mean_difference(first, second, families)
        inside += found.low <= truth <= found.high
    assert 0.92 < inside / trials < 0.99


def test_paired_shares_that_all_agree_have_a_width() -> None:
    flags = torch.ones(20)
    found = mean_difference(flags, flags, IDS[:20])
    assert found.value == 0
    assert -0.15 < found.low < -0.05
    assert not mean_difference(flags, flags, ["one"] * 20).measurable


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
    assert "0.90 [0.80, 1.00]" in said
    assert "+0.40 [0.26, 0.54]" in said
    assert "configuration seed: 0, 1, 2" in said
    assert "nan" not in said
    page = (out / "compared.html").read_text()
    assert "What the seed decides" in page
    assert "<script" not in page
    pd.testing.assert_frame_equal(pd.read_parquet(out / "metrics.parquet"), ml.compare_runs(*three).metrics)
    hostile = made(tmp_path / "<script>x", 0, Estimate(0.5, 0.4, 0.6, 40))
    found = write_comparison(ml.compare_runs(three[0], hostile), tmp_path / "page")
    assert "<script" not in found.read_text()


def test_runs_are_listed_by_what_they_are(
    tmp_path: Path, three: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    patch = made(tmp_path / "patch", 0, Estimate(0.5, 0.4, 0.6, 40), model="owner/two", verb="guard_fit")
    half = open_run(verb="separate", config=Config("one", 9, tmp_path / "half"), out=tmp_path / "half",
                    wandb=WandbSettings(mode="disabled"), argv=[])  # fmt: skip
    today = half.run.started[:10]

    def folders(**asked: str) -> set[Path]:
        return {run.folder for run in ml.list_runs(tmp_path, **asked)}

    assert folders() == {*three, patch, half.out}
    assert folders(study="guard fit") == folders(study="guard_fit") == folders(model="two") == {patch}
    assert folders(model="owner/two") == {patch}
    assert folders(study="separate", status="success") == set(three)
    assert folders(status="running") == {half.out}
    assert folders(since=today) == folders(until=today) == folders()
    assert folders(until="2020-01-01") == folders(since="2999-01-01") == set()
    for asked, said in (
        ({"study": "seperate"}, "did you mean 'separate'"), ({"model": "tow"}, "did you mean 'two'"),
        ({"status": "done"}, "no status 'done'"), ({"since": "yesterday"}, "since is 'yesterday'; give a day"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            folders(**asked)
    main(["runs", "list", str(tmp_path), "--study", "guard fit"])
    said = capsys.readouterr().out
    assert str(patch) in said
    assert str(three[0]) not in said
    main(["runs", "list", str(tmp_path), "--until", "2020-01-01"])
    assert "no such runs" in capsys.readouterr().out
