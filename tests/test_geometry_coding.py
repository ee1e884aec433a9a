"""Coding rate: orthogonal subspaces take the most, equal moments nothing; clusters are found where means are one."""

import math

import pytest
import torch

from mechlens.errors import UserError
from mechlens.methods.geometry.coding.clusters import doubly_stochastic, parts_rate, rate_clusters
from mechlens.methods.geometry.coding.rate import coding_rate, rate_reduction, unit_rows

D, EPS = 12, 0.01


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subspaces(n: int = 40, r: int = 3, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Three orthogonal subspaces of r dimensions, turned; every class has the mean 0."""
    turn = torch.linalg.qr(normal(D, D, seed=99)).Q
    parts = [torch.nn.functional.pad(normal(n, r, seed=seed + k), (k * r, D - (k + 1) * r)) for k in range(3)]
    return torch.cat(parts) @ turn, [f"class {k}" for k in range(3) for _ in range(n)]


def test_the_rate_is_that_of_both_gram_matrices_and_known_for_even_axes() -> None:
    units = unit_rows(normal(7, D))
    direct = torch.logdet(torch.eye(D).double() + D / (7 * EPS) * units.T @ units) / 2
    assert float(coding_rate(units, EPS)) == pytest.approx(float(direct))
    assert float(coding_rate(torch.eye(D).double(), EPS)) == pytest.approx(D * math.log(1 + 1 / EPS) / 2)


def test_orthogonal_subspaces_have_the_largest_reduction_and_equal_moments_none() -> None:
    values, labels = subspaces()
    apart = rate_reduction(values, labels, n=19, seed=0)
    assert apart.reduction.p == pytest.approx(0.05)
    assert apart.reduction.value > 3 * apart.reduction.highest
    for seed in range(5):  # planes in general position, and not at right angles, have less
        slanted = torch.cat([normal(40, 3, seed=k) @ normal(3, D, seed=50 + 7 * seed + k) for k in range(3)])
        assert rate_reduction(slanted, labels, n=0, seed=0).reduction.value < apart.reduction.value
    opposite = torch.cat([values, -values])
    same = rate_reduction(opposite, ["here"] * len(values) + ["there"] * len(values), n=0, seed=0)
    assert same.reduction.value == pytest.approx(0, abs=1e-12)


def test_a_membership_of_classes_gives_the_rate_of_the_parts() -> None:
    values, labels = subspaces(10)
    codes = unit_rows(values)
    same = torch.tensor([[a == b for b in labels] for a in labels]).double() / 10
    found = rate_reduction(values, labels, n=0, seed=0)
    assert float(parts_rate(codes, same)) == pytest.approx(found.parts)
    sums = doubly_stochastic(codes)
    assert torch.allclose(sums.sum(dim=0), torch.ones(30).double())
    assert torch.allclose(sums.sum(dim=1), torch.ones(30).double(), atol=0.01)


def test_subspaces_with_one_mean_are_clusters_by_rate_and_none_by_means() -> None:
    half, names = subspaces(n=13, r=2)
    values, labels = torch.cat([half, -half]), names * 2
    found = rate_clusters(values + 0.02 * normal(*values.shape, seed=5), k=3)
    assert found.agreement(labels) > 0.95
    assert found.means_agreement(labels) < 0.5
    assert found.losses[-1] < found.losses[0]
    assert abs(rate_clusters(normal(60, D), k=2, steps=2).agreement(["a", "b"] * 30)) < 0.15
    with pytest.raises(UserError, match="78 prompts and 1 labels"):
        found.agreement(["a"])


def test_what_has_no_rate_is_refused() -> None:
    with pytest.raises(UserError, match="vector 1 is all zero"):
        rate_reduction(torch.tensor([[1.0, 0], [0, 0]]), ["a", "b"], n=0, seed=0)
    with pytest.raises(UserError, match="above 0"):
        rate_reduction(torch.eye(2), ["a", "b"], n=0, seed=0, distortion=0.0)
    with pytest.raises(UserError, match="ask for 2 to 5"):
        rate_clusters(normal(6, 3), k=6)
