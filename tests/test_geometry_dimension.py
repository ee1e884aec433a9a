"""Dimension: of planted manifolds, curved ones too, and of checkpoints that moved in as many directions as planned."""

import math

import pytest
import torch

from mechlens.errors import UserError
from mechlens.methods.geometry.dimension.effective_rank import effective_rank, participation_ratio
from mechlens.methods.geometry.dimension.intrinsic import intrinsic_dimension


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_a_flat_manifold_in_many_dimensions_has_its_own(d: int) -> None:
    found = [intrinsic_dimension(normal(400, d, seed=k) @ normal(d, 50, seed=k + 9) + 100) for k in range(4)]
    assert sum(one.two_nn for one in found) / 4 == pytest.approx(d, rel=0.12)
    assert sum(one.likelihood for one in found) / 4 == pytest.approx(d, rel=0.12)
    assert all(one.participation <= d + 1e-9 for one in found)


def test_a_curve_has_one_dimension_to_neighbours_and_two_to_variances() -> None:
    angles = torch.rand(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 * math.pi
    circle = torch.cat([angles.cos(), angles.sin()], dim=1) @ normal(2, 30)[:, :30]
    found = intrinsic_dimension(circle)
    assert found.two_nn == pytest.approx(1, abs=0.15)
    assert found.likelihood == pytest.approx(1, abs=0.1)
    assert found.participation > 1.3


def test_neither_scale_nor_turn_nor_repeated_prompts_change_it() -> None:
    values = normal(100, 3) @ torch.linalg.qr(normal(10, 10)).Q[:3]
    turn = torch.linalg.qr(normal(10, 10, seed=4)).Q
    here, there = intrinsic_dimension(values), intrinsic_dimension(1e-3 * torch.cat([values, values[:7]]) @ turn + 2)
    assert (here.two_nn, here.likelihood) == pytest.approx((there.two_nn, there.likelihood), rel=1e-6)
    assert (here.n, there.neighbours) == (100, 20)
    with pytest.raises(UserError, match="1 prompts with vectors that differ"):
        intrinsic_dimension(torch.ones(50, 3))


def test_the_participation_ratio_counts_equal_variances() -> None:
    assert participation_ratio(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)


@pytest.mark.parametrize("rank", [1, 3])
def test_checkpoints_moved_in_as_many_directions_as_planned(rank: int) -> None:
    axes = torch.linalg.qr(normal(60, rank)).Q.T.reshape(rank, 6, 10)
    start = 50 * normal(6, 10, seed=3)
    series = [start, *(start + 2 * sign * axis for axis in axes for sign in (1, -1))]
    found = effective_rank(series)
    assert (found.participation, found.entropy, found.stable) == pytest.approx((rank, rank, rank))
    assert found.needed == rank
    flat = [one.flatten() - start.flatten() for one in series[1:]]
    assert found.stable == pytest.approx(float((s := torch.linalg.svdvals(torch.stack(flat)).square()).sum() / s[0]))


def test_what_did_not_move_has_no_rank() -> None:
    with pytest.raises(UserError, match="nothing moved"):
        effective_rank([torch.ones(3), torch.ones(3)])
    with pytest.raises(UserError, match="two or more of one parameter"):
        effective_rank([torch.ones(3), torch.ones(4)])
