"""Bootstrap and permutations by prompt family."""

import math

import pytest
import torch

from mechlens.methods.statistics.resample import family_halves, family_weights, interval, mean_estimate, permuted_labels

PAIRED = tuple(f"f{i // 2}" for i in range(40))
PAIRED_LABELS = ("harmful", "harmless") * 20
ALTERNATING = torch.tensor([True, False] * 20)


def test_families_are_drawn_whole_and_their_number_is_kept() -> None:
    weights = family_weights(PAIRED, 200, seed=0)
    assert torch.equal(weights[:, 0::2], weights[:, 1::2])
    assert torch.equal(weights.sum(dim=1), torch.full((200,), 40.0, dtype=torch.float64))
    # Bootstrap counts are near Poisson(1): variance (F-1)/F.
    assert float(weights.var()) == pytest.approx(19 / 20, abs=0.05)


def test_no_resample_loses_a_class_when_labels_are_given() -> None:
    labels = ("harmful",) * 2 + ("harmless",) * 38
    families = tuple(f"own{i}" for i in range(40))
    stratified = family_weights(families, 300, seed=0, labels=labels)
    assert bool((stratified[:, :2].sum(dim=1) == 2).all())
    plain = family_weights(families, 300, seed=0)
    assert bool((plain[:, :2].sum(dim=1) == 0).any())  # without labels it does happen


def test_halves_are_disjoint_even_and_whole_families() -> None:
    first = family_halves(PAIRED, 50, seed=1, labels=PAIRED_LABELS)
    assert torch.equal(first[:, 0::2], first[:, 1::2])
    assert bool((first.sum(dim=1) == 20).all())


def test_an_odd_family_falls_on_both_sides() -> None:
    sizes = family_halves(tuple("abc"), 100, seed=0).sum(dim=1)
    assert set(sizes.tolist()) == {1, 2}


def test_pairs_swap_inside_the_pair() -> None:
    permuted = permuted_labels(ALTERNATING, PAIRED, 400, seed=0)
    assert bool((permuted[:, 0::2] != permuted[:, 1::2]).all())
    assert float(permuted[:, 0].float().mean()) == pytest.approx(0.5, abs=0.1)


def test_families_of_both_classes_keep_their_own_counts() -> None:
    positive = torch.tensor([True, False, False, True, True, False])  # 1 of 3, then 2 of 3
    permuted = permuted_labels(positive, ("a",) * 3 + ("b",) * 3, 100, seed=0)
    assert bool((permuted[:, :3].sum(dim=1) == 1).all())
    assert bool((permuted[:, 3:].sum(dim=1) == 2).all())
    assert len({tuple(row) for row in permuted.tolist()}) == 9


def test_lone_prompts_exchange_labels_and_class_counts_stay() -> None:
    positive = torch.tensor([True] * 5 + [False] * 15)
    permuted = permuted_labels(positive, tuple(map(str, range(20))), 400, seed=0)
    assert bool((permuted.sum(dim=1) == 5).all())
    assert torch.allclose(permuted.float().mean(dim=0), torch.full((20,), 0.25), atol=0.1)


def test_families_of_one_label_exchange_only_with_families_of_their_size() -> None:
    families = ("a", "a", "b", "b", "c", "d")
    positive = torch.tensor([True, True, False, False, True, False])
    permuted = permuted_labels(positive, families, 200, seed=0)
    assert torch.equal(permuted[:, 0], permuted[:, 1])
    assert torch.equal(permuted[:, 2], permuted[:, 3])
    assert bool((permuted[:, 0] != permuted[:, 2]).all())
    assert bool((permuted[:, 4] != permuted[:, 5]).all())
    assert len({tuple(row) for row in permuted.tolist()}) == 4


def test_interval_is_the_middle_95_percent_and_skips_missing_resamples() -> None:
    samples = torch.arange(1001, dtype=torch.float64)
    low, high = interval(samples)
    assert (float(low), float(high)) == pytest.approx((25.0, 975.0))
    with_gaps = torch.cat([samples, torch.full((50,), math.nan, dtype=torch.float64)])
    assert interval(with_gaps) == (low, high)
    assert math.isnan(float(interval(torch.full((5,), math.nan)).low))


def test_interval_of_a_mean_is_as_wide_as_theory_says_and_counts_families() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    own = tuple(map(str, range(200)))
    single = mean_estimate(values, own, seed=0)
    assert single.high - single.low == pytest.approx(2 * 1.96 * float(values.std()) / 200**0.5, rel=0.1)
    # Saying everything four times adds nothing: the interval stays.
    repeated = mean_estimate(values.repeat(4), own * 4, seed=0)
    assert repeated.high - repeated.low == pytest.approx(single.high - single.low, rel=1e-6)
    assert repeated.n == 800
    naive = mean_estimate(values.repeat(4), tuple(map(str, range(800))), seed=0)
    assert naive.high - naive.low == pytest.approx((single.high - single.low) / 2, rel=0.1)


def test_a_mean_of_nothing_is_missing() -> None:
    assert not mean_estimate(torch.empty(0), (), seed=0).measurable


def test_the_seed_decides() -> None:
    for draw in (
        lambda seed: family_weights(PAIRED, 20, seed, PAIRED_LABELS),
        lambda seed: family_halves(PAIRED, 20, seed, PAIRED_LABELS),
        lambda seed: permuted_labels(ALTERNATING, PAIRED, 20, seed),
    ):
        assert torch.equal(draw(3), draw(3))
        assert not torch.equal(draw(3), draw(4))
