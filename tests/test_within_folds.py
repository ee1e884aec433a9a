"""AUROCs inside folds: what is compared, that nothing which differs between fits counts, and what intervals hold."""

import math
from collections.abc import Sequence

import pytest
import torch
from scipy.stats import norm

from mechlens.errors import UserError
from mechlens.methods.probing.beyond_words import read_vectors
from mechlens.methods.probing.within_folds import Folds, auroc_gain, folds_of, mean_auroc
from mechlens.methods.statistics.resample import Fold


def asked(n: int, *, paired: bool = False, seed: int = 0) -> Folds:
    """So many prompts a side, the sides in turn."""
    positive = torch.arange(2 * n) % 2 == 0
    return folds_of(positive, [str(i // 2 if paired else i) for i in range(2 * n)], seed)


def drawn(folds: Folds, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, len(folds.positive), generator=generator, dtype=torch.float64).round(decimals=1)


@pytest.mark.parametrize("paired", [False, True])
def test_it_is_the_share_of_pairs_that_one_fold_held_out(paired: bool) -> None:
    """Counted one by one; several rows of one repeat are read by its folds."""
    folds = asked(12, paired=paired)
    scores, won = drawn(folds, 12), []
    for row, own in enumerate(scores.tolist()):
        for fold in folds.parts[row % 6]:
            for i in fold.scored:
                for j in fold.scored:
                    if folds.positive[i] and not folds.positive[j] and folds.families[i] != folds.families[j]:
                        won.append((own[i] > own[j]) + 0.5 * (own[i] == own[j]))
    assert mean_auroc(scores, folds).value == pytest.approx(sum(won) / len(won), abs=1e-12)


def test_what_differs_between_fits_changes_nothing() -> None:
    folds = asked(20)
    scores = drawn(folds, 6)
    other = scores.clone()
    for repeat, parts in enumerate(folds.parts):
        for k, fold in enumerate(parts):
            other[repeat, list(fold.scored)] = other[repeat, list(fold.scored)] * (k + 1) - 7.0 * repeat * k
    assert mean_auroc(other, folds) == mean_auroc(scores, folds)
    gain = auroc_gain(other, scores, folds)
    assert gain.value == 0
    assert gain.low <= 0 <= gain.high


def test_neither_does_the_order_of_prompts() -> None:
    folds = asked(20, paired=True)
    ours, theirs = drawn(folds, 6), drawn(folds, 6, seed=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    place = order.argsort().tolist()

    def moved(rows: Sequence[int]) -> tuple[int, ...]:
        return tuple(place[i] for i in rows)

    parts = tuple(tuple(Fold(moved(fold.fitted), moved(fold.scored)) for fold in own) for own in folds.parts)
    again = Folds(folds.positive[order], tuple(folds.families[i] for i in order.tolist()), parts)
    for found, expected in (
        (mean_auroc(ours[:, order], again), mean_auroc(ours, folds)),
        (auroc_gain(ours[:, order], theirs[:, order], again), auroc_gain(ours, theirs, folds)),
    ):
        pair = ([one.value, one.low, one.high] for one in (found, expected))
        assert next(pair) == pytest.approx(next(pair), abs=1e-9)


def test_equal_scores_are_chance_and_few_prompts_have_no_interval() -> None:
    chance = mean_auroc(torch.zeros(6, 40), asked(20))
    assert chance.value == 0.5
    assert chance.interval == (0.5, 0.5)  # what never tells them apart has no width
    perfect = asked(20).positive.double().expand(6, -1)
    assert mean_auroc(perfect, asked(20)).value == 1.0
    assert 0 < mean_auroc(perfect, asked(20)).low < 1
    assert not mean_auroc(torch.zeros(6, 18), asked(9)).has_interval
    assert not mean_auroc(torch.zeros(6, 4), asked(2, paired=True)).measurable  # only twins are held out together
    assert mean_auroc(torch.zeros(6, 6), asked(3, paired=True)).value == 0.5
    assert not mean_auroc(torch.full((6, 40), torch.nan), asked(20)).measurable
    with pytest.raises(UserError, match="at least 2 families"):
        asked(1)


def test_a_token_that_tells_something_is_read_for_what_it_tells() -> None:
    """Two tokens of a true .80: pooled over folds they read .67 to .74 (`scripts/error_rates_direction.py --folds`)."""
    generator, found = torch.Generator().manual_seed(0), []
    for seed in range(20):
        folds = asked(20, seed=seed)
        marks = torch.rand(40, generator=generator) < torch.where(folds.positive, 0.8, 0.2)
        vectors = torch.stack([marks, ~marks], dim=1).float()[:, None]
        found.append(mean_auroc(read_vectors(vectors, folds), folds).value)
    assert sum(found) / len(found) == pytest.approx(0.8, abs=0.03)


def error_of_a_probe(seed: int) -> float:
    """From the mean, over the fits, of the AUROC of prompts that are none of these: known, as they are normal."""
    folds, truths = asked(20, seed=seed), []
    values = torch.randn(40, 200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[folds.positive, 0] += 3.0

    def read(fit: list[int], _: int) -> torch.Tensor:
        own = folds.positive[fit]
        line = values[fit][own].mean(dim=0) - values[fit][~own].mean(dim=0)
        truths.append(norm.cdf(float(3.0 * line[0] / line.norm()) / math.sqrt(2)))
        return values @ line

    return mean_auroc(folds.scored(read), folds).value - sum(truths) / len(truths)


def test_a_probe_of_many_dimensions_is_read_for_what_it_tells() -> None:
    assert sum(map(error_of_a_probe, range(30))) / 30 == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(("ours", "theirs", "together"), [(0.8, 0.8, 0.3), (0.9, 0.75, 0.3), (0.98, 0.98, 0.8)])
def test_the_interval_of_a_gain_covers_the_truth(ours: float, theirs: float, together: float) -> None:
    folds = asked(30, paired=True)
    generator = torch.Generator().manual_seed(0)
    covered = above = 0
    for _ in range(300):
        one, other = torch.randn(2, 60, generator=generator, dtype=torch.float64)
        other = together * one + math.sqrt(1 - together**2) * other
        scores = [z + math.sqrt(2) * norm.ppf(area) * folds.positive for z, area in ((one, ours), (other, theirs))]
        gain = auroc_gain(*(own.expand(6, -1) for own in scores), folds)
        covered += gain.low <= ours - theirs <= gain.high
        above += gain.low > ours - theirs
        assert gain.high > gain.low
    assert covered / 300 >= 0.93
    assert above / 300 <= 0.045
