"""Subspaces: planted angles come back exactly, random ones as expected, k dimensions are read where k were put."""

import math

import pytest
import torch
from scipy.linalg import expm

from mechlens.errors import UserError
from mechlens.methods.geometry.subspaces.angles import principal_angles
from mechlens.methods.geometry.subspaces.by_rank import auroc_by_rank
from mechlens.methods.geometry.subspaces.grassmann import GrassmannClasses, fit_grassmann, geodesic

D = 20


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair_at(angles: list[float], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two subspaces with these angles, each by columns that are mixed anew."""
    axes, k = torch.linalg.qr(normal(D, D, seed=seed)).Q, len(angles)
    turn = torch.tensor(angles, dtype=torch.float64)
    first, across = axes[:, :k], axes[:, k : 2 * k]
    return first @ normal(k, k, seed=1), (first * turn.cos() + across * turn.sin()) @ normal(k, k, seed=2)


@pytest.mark.parametrize("angles", [[0.0, 0.3, 1.2], [1e-9, 1e-7, math.pi / 2 - 1e-8]])
def test_planted_angles_are_recovered_also_small_ones(angles: list[float]) -> None:
    found = principal_angles(*pair_at(angles))
    assert found.angles == pytest.approx(angles, rel=1e-5, abs=1e-13)
    assert found.overlap == pytest.approx(sum(math.cos(a) ** 2 for a in angles) / 3)
    assert found.chordal == pytest.approx(math.sqrt(sum(math.sin(a) ** 2 for a in angles)))


def test_random_subspaces_overlap_as_expected() -> None:
    drawn = [principal_angles(normal(D, 3, seed=k), normal(D, 5, seed=k + 100)) for k in range(200)]
    assert drawn[0].expected_overlap == 5 / D
    assert sum(one.overlap for one in drawn) / 200 == pytest.approx(5 / D, abs=0.02)
    assert math.sqrt(sum(one.chordal**2 for one in drawn) / 200) == pytest.approx(drawn[0].expected_chordal, rel=0.02)
    with pytest.raises(UserError, match="2 columns span 1 dimensions"):
        principal_angles(normal(D, 1).repeat(1, 2), normal(D, 2))
    with pytest.raises(UserError, match="20 and 19 dimensions"):
        principal_angles(normal(D, 1), normal(D - 1, 2))


# --- Grassmann class representation ----------------------------------------------------------------------------------


def test_a_geodesic_is_the_rotation_it_should_be() -> None:
    basis = torch.linalg.qr(normal(D, 3)).Q
    towards = normal(D, 3, seed=1)
    tangent = towards - basis @ (basis.T @ towards)
    generator = tangent @ basis.T - basis @ tangent.T  # skew: its exponential turns the subspace along the tangent
    turned = torch.from_numpy(expm(generator.numpy())) @ basis
    moved = geodesic(basis[None], towards[None])[0]
    assert torch.allclose(moved, turned, atol=1e-10)
    assert torch.allclose(moved.T @ moved, torch.eye(3).double(), atol=1e-12)


def classes_of(n: int = 60, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Two opposite classes and one that spreads over a plane, about a common mean."""
    shift = torch.tensor([4.0, -4.0, 0.0]).repeat_interleave(n)
    values = 0.5 * normal(3 * n, D, seed=seed) + 30
    values[:, 0] += shift
    values[2 * n :, 1:3] += 4 * normal(n, 2, seed=seed + 1)
    return values, ["up"] * n + ["down"] * n + ["plane"] * n


def cross_entropy(found: GrassmannClasses, values: torch.Tensor, labels: list[str]) -> float:
    of = torch.tensor([found.classes.index(label) for label in labels])
    return float(torch.nn.functional.cross_entropy(found.logits(values), of))


def test_subspaces_tell_opposite_classes_and_a_plane_apart_and_descent_helps() -> None:
    values, labels = classes_of()
    held_out, truth = classes_of(seed=7)
    found = fit_grassmann(values, labels, k=2)
    assert sum(a == b for a, b in zip(found.predict(held_out), truth, strict=True)) > 0.95 * len(truth)
    assert all(later <= earlier for earlier, later in zip(found.losses, found.losses[1:], strict=False))
    assert found.losses[-1] < 0.9 * found.losses[0]
    assert torch.allclose(found.bases.mT @ found.bases, torch.eye(2).double().expand(3, 2, 2), atol=1e-10)
    start = fit_grassmann(values, labels, k=2, steps=0)
    assert start.losses[0] == pytest.approx(cross_entropy(start, values, labels))
    assert principal_angles(start.bases[0], found.bases[0]).chordal > 0.01


def test_the_score_is_the_same_in_any_basis_and_unit() -> None:
    values, labels = classes_of(20)
    turn = torch.linalg.qr(normal(D, D, seed=3)).Q
    here, there = (fit_grassmann(one, labels, k=3) for one in (values, 9 * values @ turn + 1))
    assert torch.allclose(here.scores(values, "up"), there.scores(9 * values @ turn + 1, "up"), atol=1e-8)
    with pytest.raises(UserError, match="no class 'left'"):
        here.scores(values, "left")
    with pytest.raises(UserError, match="allow 1 to 20"):
        fit_grassmann(values, labels, k=21)


# --- one direction or a subspace -------------------------------------------------------------------------------------


def test_one_planted_direction_needs_one_dimension() -> None:
    values, positive = normal(80, D), torch.arange(80) % 2 == 0
    values[:, 4] += 2.5 * positive
    found = auroc_by_rank(values, positive, [str(i) for i in range(80)], ranks=(1, 4), random=5, seed=0)
    assert found.mean_difference.value > 0.9
    assert found.at(1).subspace.value == pytest.approx(found.mean_difference.value)
    assert not found.needs_more_than_one
    assert found.at(4).random_mean < 0.75
    assert found.logistic.value > 0.85
    assert found.at(1).grassmann.value > 0.85


def test_what_varies_within_both_classes_alike_takes_a_second_dimension_to_be_taken_off() -> None:
    # The difference lies along a + b, and b, which both classes have alike, drowns it unless it can be subtracted.
    values, positive = 0.3 * normal(160, D), torch.arange(160) % 2 == 0
    values[:, 1] += 6 * normal(160, seed=5)
    values[:, 0] += positive
    values[:, 1] += 1.0 * positive
    found = auroc_by_rank(values, positive, [str(i) for i in range(160)], ranks=(1, 2), random=3, seed=0)
    assert found.needs_more_than_one
    assert found.at(2).subspace.value > 0.9 > 0.8 > found.mean_difference.value
    with pytest.raises(UserError, match="ask for 1 to 20"):
        auroc_by_rank(values, positive, [str(i) for i in range(160)], ranks=(21,), random=3, seed=0)
    with pytest.raises(UserError, match="weren't read"):
        found.at(3)
