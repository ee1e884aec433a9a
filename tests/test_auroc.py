"""Area under the ROC curve: equal to scikit-learn, honest about ties, chance and empty classes."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

from mechlens.methods.probing.auroc import (
    auroc,
    auroc_bounds,
    auroc_estimate,
    snap,
    tpr_at_fpr,
    tpr_at_fpr_estimate,
    weighted_auroc,
)
from mechlens.methods.statistics.resample import one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def _draw(n: int, seed: int, separation: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    positive = torch.tensor([True, False]).repeat(n)
    return torch.randn(2 * n, generator=generator) + separation * positive, positive


def test_equals_scikit_learn_with_ties_and_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (3, 2, 60), generator=generator).float()  # many ties
    positive = torch.rand(60, generator=generator) < 0.4
    weights = torch.randint(0, 4, (5, 60), generator=generator).double()
    plain, resampled = auroc(scores, positive), auroc(scores, positive, weights)
    assert plain.shape == (3, 2)
    assert resampled.shape == (3, 2, 5)
    for cell in np.ndindex(3, 2):
        assert float(plain[cell]) == pytest.approx(roc_auc_score(positive, scores[cell]), abs=1e-12)
        for r in range(5):
            oracle = roc_auc_score(positive, scores[cell], sample_weight=weights[r])
            assert float(resampled[cell][r]) == pytest.approx(oracle, abs=1e-12)


def test_rows_may_have_their_own_scores_members_and_weights() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    positive = torch.rand(4, 30, generator=generator) < 0.5
    weights = torch.rand(4, 30, generator=generator, dtype=torch.float64)
    areas = weighted_auroc(scores, weights * positive, weights * ~positive)
    for row in range(4):
        oracle = roc_auc_score(positive[row], scores[row], sample_weight=weights[row])
        assert float(areas[row]) == pytest.approx(oracle, abs=1e-12)


def test_laws_of_the_area() -> None:
    scores, positive = _draw(50, seed=2)
    area = float(auroc(scores, positive))
    assert float(auroc(-scores, positive)) == pytest.approx(1 - area)
    assert float(auroc(scores, ~positive)) == pytest.approx(1 - area)
    assert float(auroc(scores.exp(), positive)) == pytest.approx(area)  # only the order counts
    assert float(auroc(torch.zeros(100), positive)) == 0.5
    assert float(auroc(positive.float(), positive)) == 1.0


def test_a_score_that_is_the_same_for_all_is_at_chance_for_certain() -> None:
    positive, families = torch.arange(40) >= 20, [str(i) for i in range(40)]
    constant = auroc_estimate(torch.ones(40), positive, families)
    assert (constant.value, constant.low, constant.high) == (0.5, 0.5, 0.5)
    tied = torch.ones(40)
    tied[[0, 20]] = 2.0  # at 0.5 too, and by chance
    measured = auroc_estimate(tied, positive, families)
    assert measured.value == 0.5
    assert measured.low < 0.5 < measured.high


def test_empty_classes_and_broken_scores_are_missing_not_a_crash() -> None:
    scores, positive = _draw(5, seed=0)
    everyone = torch.ones(10, dtype=torch.bool)
    assert math.isnan(float(auroc(scores, everyone)))
    assert math.isnan(float(auroc(scores, ~everyone)))
    assert math.isnan(float(tpr_at_fpr(scores, everyone, 0.1)))
    broken = torch.cat([scores[:9], torch.tensor([math.nan])])
    assert math.isnan(float(auroc(broken, positive)))
    for estimate in (
        auroc_estimate(scores, everyone, tuple("abcdefghij")),
        auroc_estimate(torch.empty(0), torch.empty(0, dtype=torch.bool), ()),
        tpr_at_fpr_estimate(scores, everyone, tuple("abcdefghij"), 0.1, seed=0),
    ):
        assert not estimate.measurable
    lost = torch.tensor([[1.0, 0.0] * 5, [1.0] * 10])  # the first resample drew no negative
    assert torch.isnan(auroc(scores, positive, lost)).tolist() == [True, False]


@pytest.mark.parametrize(("area", "n"), [(0.5, 10), (0.6, 10), (0.9, 12), (0.97, 15), (0.76, 60)])
def test_interval_covers_the_truth_in_about_95_percent_of_draws(area: float, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    positive = torch.arange(2 * n) < n
    families = tuple(map(str, range(2 * n)))
    scores = torch.randn(1000, 2 * n, generator=generator) + math.sqrt(2) * norm.ppf(area) * positive
    bounds = auroc_bounds(scores, positive, families)
    assert 0.94 <= float(((bounds.low <= area) & (area <= bounds.high)).double().mean()) <= 0.99
    assert float((bounds.low > area).double().mean()) <= 0.035


def test_no_interval_is_without_width_and_few_families_have_none() -> None:
    positive = torch.arange(24) < 12
    families = tuple(map(str, range(24)))
    perfect = auroc_estimate(positive.double(), positive, families)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert 0.7 < perfect.low < 0.9
    few = auroc_estimate(positive.double(), positive, tuple(str(i // 2) for i in range(24)))  # six families a class
    assert (few.low, few.value, few.high) == (0.0, 1.0, 1.0)
    scores, flags = _draw(9, seed=0)
    assert (auroc_estimate(scores, flags, tuple(map(str, range(18)))).low) == 0.0


def test_interval_counts_families_not_prompts() -> None:
    scores, positive = _draw(40, seed=3)
    families = tuple(map(str, range(80)))
    once = auroc_estimate(scores, positive, families)
    thrice = auroc_estimate(scores.repeat(3), positive.repeat(3), families * 3)
    assert thrice.value == pytest.approx(once.value)
    # But for the finite-sample factors of 80 and 240 prompts.
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high), abs=0.005)


def test_a_paired_design_narrows_the_interval() -> None:
    # What a pair shares (topic) cancels in the area, and families let the interval know it: with scores that differ
    # inside every pair by the same step and a huge shared part, sides that stood apart would be noisier.
    generator = torch.Generator().manual_seed(4)
    topic = 3 * torch.randn(60, generator=generator)
    scores = torch.stack([topic + 0.5, topic], dim=1).flatten()
    positive = torch.tensor([True, False]).repeat(60)
    paired = auroc_estimate(scores, positive, tuple(str(i // 2) for i in range(120)))
    apart = auroc_estimate(scores, positive, tuple(map(str, range(120))))
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)


def test_tpr_at_fpr_is_read_off_the_roc_curve() -> None:
    for seed in range(5):
        scores, positive = _draw(50, seed)
        scores = (scores * 3).round()  # ties are flagged together
        fpr, tpr, _ = roc_curve(positive, scores, drop_intermediate=False)
        for limit in (0.0, 0.05, 0.2, 1.0):
            assert float(tpr_at_fpr(scores, positive, limit)) == pytest.approx(tpr[fpr <= limit].max())
    weights = torch.ones(3, 100, dtype=torch.float64)
    assert torch.allclose(tpr_at_fpr(scores, positive, 0.1, weights), tpr_at_fpr(scores, positive, 0.1))
    estimate = tpr_at_fpr_estimate(scores, positive, tuple(map(str, range(100))), 0.1, seed=0)
    assert estimate.low <= estimate.value <= estimate.high


def test_snapping_restores_ties_and_leaves_real_differences() -> None:
    scores = torch.tensor([1.0, 1.0 + 1e-14, 2.0], dtype=torch.float64)
    snapped = snap(scores, 1e-10)
    assert snapped[0] == snapped[1]
    assert snapped[1] != snapped[2]
    assert torch.equal(snap(scores, 0.0), scores)
