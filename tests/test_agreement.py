"""Cohen's kappa between two judges."""

import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from mechlens.methods.behaviour.chosen_judge import agreement, kappas

FAMILIES = tuple(map(str, range(60)))


def _verdicts(seed: int, agree: float) -> tuple[list[str], list[str]]:
    generator = torch.Generator().manual_seed(seed)
    first = ["refused" if x < 0.4 else "accepted" for x in torch.rand(60, generator=generator).tolist()]
    flip = {"refused": "accepted", "accepted": "refused"}
    keep = torch.rand(60, generator=generator) < agree
    return first, [v if k else flip[v] for v, k in zip(first, keep.tolist(), strict=True)]


def test_equals_scikit_learn_and_counts_every_pair() -> None:
    first, second = _verdicts(0, agree=0.8)
    found = agreement(first, second, FAMILIES, seed=0, resamples=200)
    assert found.kappa.value == pytest.approx(cohen_kappa_score(first, second))
    assert found.kappa.low < found.kappa.value < found.kappa.high
    assert int(found.counts.to_numpy().sum()) == 60
    assert found.counts.loc["refused", "accepted"] == sum(
        (a, b) == ("refused", "accepted") for a, b in zip(first, second, strict=True)
    )
    table = torch.tensor(found.counts.to_numpy().tolist()).double()[None]
    assert float(kappas(table)) == pytest.approx(found.kappa.value)


def test_independent_judges_have_kappa_zero_and_equal_ones_one() -> None:
    first, _ = _verdicts(1, agree=1.0)
    unrelated, _ = _verdicts(2, agree=1.0)
    alike = agreement(first, first, FAMILIES, seed=0, resamples=50).kappa
    assert (alike.value, alike.high) == (1.0, 1.0)
    assert 0.5 < alike.low < 0.95  # as a share of 60 of 60 has: [0.94, 1], beyond chance
    fewer = agreement(first[:12], first[:12], FAMILIES[:12], seed=0, resamples=50).kappa
    assert fewer.low < alike.low
    once_apart = ["accepted" if first[0] == "refused" else "refused", *first[1:]]
    assert agreement(first, once_apart, FAMILIES, seed=0, resamples=50).kappa.low < alike.value
    by_chance = agreement(first, unrelated, FAMILIES, seed=0, resamples=200).kappa
    assert by_chance.low < 0.0 < by_chance.high


def test_one_verdict_only_has_no_kappa() -> None:
    same = ["accepted"] * 60
    assert not agreement(same, same, FAMILIES, seed=0).kappa.measurable
    assert not agreement([], [], (), seed=0).kappa.measurable


def test_a_third_verdict_and_the_seed() -> None:
    first, second = _verdicts(3, agree=0.7)
    second[:5] = ["unclear"] * 5
    found = agreement(first, second, FAMILIES, seed=0, resamples=100)
    assert found.kappa.value == pytest.approx(cohen_kappa_score(first, second))
    assert found.counts.shape == (3, 3)
    assert found.kappa == agreement(first, second, FAMILIES, seed=0, resamples=100).kappa
    assert found.kappa != agreement(first, second, FAMILIES, seed=1, resamples=100).kappa
