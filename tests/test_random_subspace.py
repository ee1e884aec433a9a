"""Tasks learned in random subspaces: a task of k constraints takes k dimensions, whatever the projection."""

import pytest
import torch

from mechlens.errors import UserError
from mechlens.methods.geometry.dimension.random_subspace import (
    PROJECTIONS,
    fastfood_projection,
    hadamard,
    task_dimension,
    train_in_subspace,
)

N, K = 48, 6


def constraints(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(N, K, generator=draw, dtype=torch.float64)).Q.T
    return rows, torch.randn(K, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_task_of_k_constraints_is_learned_from_k_dimensions_on(projection: str) -> None:
    rows, wanted = constraints()

    def loss(theta: torch.Tensor) -> torch.Tensor:
        return (rows @ theta - wanted).square().mean()

    left = {
        d: train_in_subspace(loss, torch.zeros(N), d=d, seed=1, projection=projection, steps=200).loss
        for d in (K - 1, K, N)
    }
    assert left[K - 1] > 1e-3
    assert left[K] < 1e-8
    assert left[N] < 1e-8
    reached = task_dimension(lambda d: 1.0 - (left[d] > 1e-6), tuple(left), full=1.0)
    assert reached == K


def test_a_hadamard_transform_twice_is_a_scale() -> None:
    values = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(hadamard(hadamard(values)), 16 * values)
    assert torch.allclose(hadamard(torch.eye(8, dtype=torch.float64)[0]), torch.ones(8, dtype=torch.float64))


def test_columns_of_fastfood_have_length_one_where_nothing_is_cut_off() -> None:
    project = fastfood_projection(64, 5, seed=3)
    columns = torch.stack([project(own) for own in torch.eye(5, dtype=torch.float64)])
    assert torch.allclose(columns.norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_what_can_not_be_is_said() -> None:
    with pytest.raises(UserError, match="9 dimensions of 4 parameters"):
        train_in_subspace(lambda one: one.sum(), torch.zeros(4), d=9, seed=0)
    with pytest.raises(UserError, match="sparse"):
        train_in_subspace(lambda one: one.sum(), torch.zeros(4), d=2, seed=0, projection="sparse")
    assert task_dimension(lambda d: 0.0, (1, 2), full=1.0) is None


def test_a_layer_that_must_stay_is_left_by_its_own_scale() -> None:
    draw = torch.Generator().manual_seed(0)
    wanted = torch.randn(K, 20, generator=draw, dtype=torch.float64)

    def loss(one: torch.Tensor) -> torch.Tensor:
        return (wanted @ one[:20] - 1).square().sum() + one[20:].square().sum()

    start = torch.zeros(40)
    plain, scaled = (
        train_in_subspace(loss, start, d=K + 2, seed=1, steps=400, blocks=blocks) for blocks in ((), (20, 20))
    )
    assert plain.loss > 1e-2
    assert scaled.loss < 1e-6
    assert float(scaled.parameters[20:].norm()) < 1e-3 * float(scaled.parameters[:20].norm())
    for blocks, d in (((20, 19), 8), ((40, 0), 8), ((20, 20), 2)):
        with pytest.raises(UserError, match="blocks"):
            train_in_subspace(loss, start, d=d, seed=1, blocks=blocks)
