"""Metrics against their closed forms, and the statistics of PatchResult against simulations with a known truth."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.patching.metrics import (
    KLDivergence,
    LogitDifference,
    LogProbability,
    Metric,
    OwnMetric,
    RefusalLogOdds,
    require_tokens,
)
from mechlens.methods.patching.result import MIN_GAP, PatchResult
from mechlens.methods.statistics.resample import family_weights


def logits(*probabilities: tuple[float, ...], shift: float = 3.0) -> Tensor:
    """Logits with these probabilities; a constant added to a row changes no probability."""
    return torch.tensor(probabilities).log() + shift


HALF = logits((0.5, 0.25, 0.25), (0.2, 0.2, 0.6))


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_logit_difference() -> None:
    got = LogitDifference(0, 2)(HALF, HALF[0])
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([math.log(2), math.log(1 / 3)], abs=1e-6)
    assert LogitDifference(2, 0)(HALF, HALF[0]).tolist() == (-got).tolist()


def test_log_probability() -> None:
    assert LogProbability(2)(HALF, HALF[0]).tolist() == pytest.approx([math.log(0.25), math.log(0.6)], abs=1e-6)


def test_kl_is_zero_for_equal_logits_and_never_negative() -> None:
    assert KLDivergence()(HALF, HALF[0] - 100.0)[0] == pytest.approx(0.0, abs=1e-6)
    expected = 0.5 * math.log(0.5 / 0.2) + 0.25 * math.log(0.25 / 0.2) + 0.25 * math.log(0.25 / 0.6)
    assert float(KLDivergence()(HALF, HALF[0])[1]) == pytest.approx(expected, abs=1e-6)
    rows = 5 * torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    divergence = KLDivergence()(rows, rows[0])
    assert float(divergence.min()) > -1e-12
    assert float(divergence[0]) == 0.0
    assert float(divergence[1:].min()) > 0.1
    far = torch.tensor([[0.0, -1e4], [-1e4, 0.0]])  # a probability of zero
    assert KLDivergence()(far, far[0]).tolist() == pytest.approx([0.0, 1e4])


def test_refusal_log_odds() -> None:
    assert RefusalLogOdds((0, 1))(HALF, HALF[0]).tolist() == pytest.approx([math.log(3), math.log(2 / 3)], abs=1e-5)
    with pytest.raises(UserError, match="token id 3"):
        RefusalLogOdds((3,))(HALF, HALF[0])


@pytest.mark.parametrize("metric", [LogitDifference(0, 3), LogitDifference(-1, 0), LogProbability(3)])
def test_tokens_beyond_the_vocabulary(metric: Metric) -> None:
    for ask in (lambda: metric(HALF, HALF[0]), lambda: require_tokens(metric, 3)):
        with pytest.raises(UserError, match=r"^token id (3|-1) can't be scored; give ids from 0 to 2"):
            ask()


def test_a_function_of_ones_own() -> None:
    metric = OwnMetric(lambda rows: rows[:, 0] ** 2, "square")
    assert metric.name == "square"
    assert torch.allclose(metric(HALF, HALF[0]), HALF[:, 0].double() ** 2)
    assert OwnMetric(lambda rows: rows.argmax(-1, keepdim=True))(HALF, HALF[0]).tolist() == [0.0, 2.0]
    assert OwnMetric(lambda rows: 7.0)(HALF[:1], HALF[0]).tolist() == [7.0]
    for wrong in (lambda rows: rows.mean(), lambda rows: rows):
        with pytest.raises(UserError, match="one number for each row"):
            OwnMetric(wrong)(HALF, HALF[0])


def test_names_tell_metrics_apart() -> None:
    metrics = [LogitDifference(1, 2), LogitDifference(2, 1), LogProbability(1), KLDivergence(), RefusalLogOdds((1,))]
    assert len({repr(metric) for metric in metrics}) == 5
    assert [metric.name for metric in metrics[1:]] == ["logit_difference", "log_probability", "kl", "refusal_logodds"]


# --- PatchResult -----------------------------------------------------------------------------------------------------


def result(values: Tensor, clean: Tensor, corrupt: Tensor, **changed: object) -> PatchResult:
    """Wraps values [pair layer position head]."""
    n, layers, positions, heads = values.shape
    names = tuple(f"pair{i}" for i in range(n))
    made = PatchResult(
        values=values, clean=clean, corrupt=corrupt, pairs=names, families=names, layers=tuple(range(layers)),
        positions=("inst", "post[0]", "last", "token[0]")[:positions],
        heads=tuple(range(heads)) if heads > 1 else (), tokens=("!", "<", ">", "?")[:positions], site="resid_pre",
        metric="logit_difference", mode="denoising", engine="plain",
    )  # fmt: skip
    return replace(made, **changed)


def test_recovery_and_effect() -> None:
    values = torch.tensor([[[[1.0]], [[3.0]], [[5.0]]]]).double()
    denoising = result(values, torch.tensor([5.0]).double(), torch.tensor([1.0]).double())
    assert denoising.recovery().flatten().tolist() == [0.0, 0.5, 1.0]
    assert denoising.effect().flatten().tolist() == [0.0, 2.0, 4.0]
    noising = replace(denoising, mode="noising")
    assert noising.recovery().flatten().tolist() == [1.0, 0.5, 0.0]
    assert noising.effect().flatten().tolist() == [-4.0, -2.0, 0.0]
    assert (float(denoising.target), float(noising.target)) == (5.0, 1.0)


def test_without_a_gap_there_is_nothing_to_recover() -> None:
    values = torch.tensor([1.0, 1.0, 2.0]).double().reshape(3, 1, 1, 1)
    clean = torch.tensor([0.0, MIN_GAP / 2, 4.0]).double()
    got = result(values, clean, torch.zeros(3).double())
    recovery = got.recovery().flatten()
    assert recovery[:2].isnan().all()
    assert float(recovery[2]) == 0.5
    table = got.table(seed=0, resamples=50, n_flips=50)
    assert (table["n"].item(), table["recovery"].item()) == (1, 0.5)
    none = replace(got, clean=torch.zeros(3).double()).table(seed=0, resamples=50, n_flips=50)
    assert none["n"].item() == 0
    assert none[["recovery", "low", "high"]].isna().all(axis=None)
    assert none["effect"].item() == pytest.approx(4 / 3)


def test_a_pair_of_nan_takes_nothing_from_the_others() -> None:
    """As if it weren't there: the least gap is a share of the other pairs' median, and only its own recovery is NaN."""
    values = torch.tensor([2.0, 5.0, 0.01, math.nan]).double().reshape(4, 1, 1, 1)
    clean = torch.tensor([4.0, 10.0, 0.02, math.nan]).double()
    got = result(values, clean, torch.zeros(4).double())
    assert got.has_gap.tolist() == [True, True, False, False]
    assert got.recovery().flatten().isnan().tolist() == [False, False, True, True]
    table = got.table(seed=0, resamples=50, n_flips=50)
    alone = result(values[:3], clean[:3], torch.zeros(3).double()).table(seed=0, resamples=50, n_flips=50)
    assert (table["n"].item(), table["recovery"].item()) == (alone["n"].item(), alone["recovery"].item()) == (2, 0.5)
    assert table[["effect", "p_corrected"]].isna().all(axis=None)  # these are of every pair
    nothing = replace(got, clean=torch.full((4,), math.nan).double())
    assert not nothing.has_gap.any()


def test_recovery_is_a_ratio_of_means() -> None:
    gap = torch.ones(20).double()
    gap[7] = 0.003
    noise = 0.52 + torch.zeros(1).double()
    effect = torch.where(gap == 1, 0.05, noise)
    got = result(effect.reshape(-1, 1, 1, 1), gap, torch.zeros(20).double())
    assert float((effect / gap).mean()) > 8.7  # the mean of ratios, which one pair decides
    assert got.has_gap.tolist() == [one == 1 for one in gap.tolist()]
    row = got.table(seed=0, resamples=200, n_flips=20).iloc[0]
    assert row[["recovery", "low", "high"]].tolist() == pytest.approx([0.05] * 3)
    assert row["n"] == 19


def test_the_interval_of_recovery_is_that_of_resampled_ratios() -> None:
    generator = torch.Generator().manual_seed(0)
    gap, effect = (torch.rand(12, generator=generator).double() + 0.5 for _ in range(2))
    families = tuple(f"f{i // 2}" for i in range(12))
    got = result(effect.reshape(-1, 1, 1, 1), gap, torch.zeros(12).double(), families=families)
    row = got.table(seed=3, resamples=400, n_flips=20).iloc[0]
    assert row["recovery"] == pytest.approx(float(effect.sum() / gap.sum()))
    weights = family_weights(families, 400, 3)
    ratios = [float((w * effect).sum() / (w * gap).sum()) for w in weights]
    assert [row["low"], row["high"]] == pytest.approx(np.quantile(ratios, [0.025, 0.975]).tolist())


def test_pairs_of_opposite_gaps_do_not_cancel() -> None:
    """Between checkpoints some prompts are refused by one only, others by the other only."""
    gap = torch.tensor([2.0, -2.0, 1.0, -1.0]).double()
    got = result((0.5 * gap).reshape(-1, 1, 1, 1), gap, torch.zeros(4).double())
    row = got.table(seed=0, resamples=50, n_flips=20).iloc[0]
    assert row[["recovery", "low", "high"]].tolist() == pytest.approx([0.5] * 3)


def test_rows_are_labelled_in_the_grids_order() -> None:
    values = torch.arange(2 * 2 * 3 * 2).reshape(2, 2, 3, 2).double()
    got = result(values, torch.tensor([1.0, 1.0]).double(), torch.zeros(2).double(), layers=(4, 1), heads=(0, 3))
    table = got.table(seed=0, resamples=20, n_flips=20)
    assert list(table) == [
        "layer",
        "position",
        "head",
        "token",
        "recovery",
        "low",
        "high",
        "effect",
        "p_corrected",
        "n",
    ]
    row = table[(table["layer"] == 1) & (table["position"] == "last") & (table["head"] == 3)]
    assert row["effect"].item() == values[:, 1, 2, 1].mean().item()
    assert row["token"].item() == ">"
    assert len(table) == 12
    without = result(values[..., :1], got.clean, got.corrupt).table(seed=0, resamples=20, n_flips=20)
    assert "head" not in without
    assert without["effect"].tolist() == values[..., 0].mean(0).flatten().tolist()
    assert table.equals(got.table(seed=0, resamples=20, n_flips=20))


def simulated(n: int, cells: int, generator: torch.Generator, mean: float = 0.0, families: int = 0) -> PatchResult:
    """Effects in correlated noise over a grid; cells differ in scale. With families, members are alike."""
    groups = families or n
    noise = torch.randn(groups, cells, generator=generator) + torch.randn(groups, 1, generator=generator)
    noise = noise[torch.arange(n) % groups] * torch.linspace(0.1, 3, cells) + mean
    values = noise.double().reshape(n, cells, 1, 1)
    names = tuple(f"f{i % groups}" for i in range(n))
    return result(values, torch.ones(n).double(), torch.zeros(n).double(), families=names)


@pytest.mark.parametrize(("n", "families"), [(8, 0), (24, 0), (20, 10)])
def test_by_chance_one_grid_in_twenty_has_a_significant_site(n: int, families: int) -> None:
    """Family-wise error over a grid of 40 sites without any effect; and one site's p is uniform."""
    generator = torch.Generator().manual_seed(n)
    smallest, alone = [], []
    for seed in range(400):
        got = simulated(n, 40, generator, families=families)
        smallest.append(float(_p_values(got, seed).min()))
        alone.append(float(_p_values(replace(got, values=got.values[:, :1], layers=(0,)), seed)))
    assert 0.02 < sum(p <= 0.05 for p in smallest) / 400 < 0.085
    for level in (0.1, 0.3, 0.5, 0.8):
        assert abs(sum(p <= level for p in alone) / 400 - level) < 0.08


def _p_values(got: PatchResult, seed: int) -> Tensor:
    """The column p_corrected, without the bootstrap's time."""
    return got._sign_flips(got.effect().flatten(1).T, seed, 199)


def test_p_finds_a_planted_effect_and_cannot_be_smaller_than_the_pairs_allow() -> None:
    generator = torch.Generator().manual_seed(0)
    got = simulated(24, 10, generator)
    values = got.values.clone()
    values[:, 3] += 3.0
    table = replace(got, values=values).table(seed=0, resamples=50, n_flips=999)
    assert table["p_corrected"][3] == pytest.approx(0.001)
    assert table["p_corrected"].drop(3).min() > 0.05
    few = simulated(3, 1, generator, mean=50.0).table(seed=0, resamples=50, n_flips=2000)
    assert few["p_corrected"].item() == pytest.approx(2 ** (1 - 3), abs=0.03)
    one = simulated(1, 4, generator, mean=50.0).table(seed=0, resamples=50, n_flips=50)
    assert (one["p_corrected"] == 1.0).all()


def test_rounding_is_no_effect_however_regular_it_is() -> None:
    values = torch.full((20, 3, 1, 1), 1e-6).double()
    values[:, 2] = 0.5 + 0.1 * torch.randn(20, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    table = result(values, torch.ones(20).double(), torch.zeros(20).double()).table(seed=0, resamples=9, n_flips=999)
    assert table["p_corrected"].tolist() == [1.0, 1.0, pytest.approx(0.001)]


def test_the_interval_covers_the_planted_mean() -> None:
    generator = torch.Generator().manual_seed(5)
    covered, cells = 0, 0
    for seed in range(60):
        table = simulated(60, 5, generator, mean=0.4).table(seed=seed, resamples=300, n_flips=10)
        covered += int(((table["low"] <= 0.4) & (table["high"] >= 0.4)).sum())
        cells += 5
        assert ((table["low"] <= table["recovery"]) & (table["recovery"] <= table["high"])).all()
    assert 0.88 < covered / cells < 0.99


def test_families_widen_the_interval() -> None:
    """Five families of twelve equal pairs know no more than five pairs."""
    got = simulated(60, 1, torch.Generator().manual_seed(0), families=5)
    wide = got.table(seed=0, resamples=400, n_flips=10)
    narrow = replace(got, families=got.pairs).table(seed=0, resamples=400, n_flips=10)
    width = [float((table["high"] - table["low"]).item()) for table in (wide, narrow)]
    assert width[0] > 2 * width[1]
