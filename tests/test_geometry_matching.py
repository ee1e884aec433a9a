"""Matching and similarity: a permutation is recovered, a rotation is found in clusters only, chance is known."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from scipy.spatial import procrustes as scipy_procrustes
from sklearn.cross_decomposition import CCA
from sklearn.metrics import adjusted_rand_score

from mechlens.errors import UserError
from mechlens.methods.geometry.matching.clusters import unit_clusters
from mechlens.methods.geometry.matching.correlation import unit_correlations
from mechlens.methods.geometry.matching.one_to_one import match_units
from mechlens.methods.geometry.matching.sparse import sparse_prediction
from mechlens.methods.geometry.permuted import permutations
from mechlens.methods.geometry.similarity.cka import unbiased_cka
from mechlens.methods.geometry.similarity.neighbours import mutual_neighbours
from mechlens.methods.geometry.similarity.procrustes import procrustes
from mechlens.methods.geometry.similarity.pwcca import pwcca
from mechlens.methods.geometry.similarity.similarity import SIMILARITIES, similarity, without_massive

N, UNITS = 200, 24


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def names(n: int) -> list[str]:
    return [str(i) for i in range(n)]


# --- matching --------------------------------------------------------------------------------------------------------


def test_a_permutation_with_noise_is_recovered() -> None:
    values, order = normal(N, UNITS), torch.randperm(UNITS, generator=torch.Generator().manual_seed(1))
    other = (values * torch.linspace(0.5, 9, UNITS) - 3)[:, order] + 0.5 * normal(N, UNITS, seed=2)
    found = match_units(values, other, n=19, seed=0)
    assert torch.equal(order[found.partner], torch.arange(UNITS))
    assert torch.equal(found.partner, found.best)
    assert found.gap == pytest.approx(0)
    assert found.matched.value > 0.8 > 0.4 > found.matched.highest  # chance, for 24 units and 200 prompts
    assert found.matched.p == pytest.approx(1 / 20)
    assert match_units(values, values + 0.1 * other, n=0, seed=0).identity_rate == 1


def test_a_rotation_in_blocks_is_no_matching_but_is_clusters() -> None:
    values = normal(N, UNITS)
    mixing = torch.from_numpy(hadamard(4) / 2)  # every unit is half of each of the block's four
    turned = values @ torch.block_diag(*[mixing] * (UNITS // 4)) + 0.3 * normal(N, UNITS, seed=1)
    assert match_units(values, turned, n=0, seed=0).matched.value < 0.6
    groups = unit_clusters(values, turned, k=UNITS // 4)
    truth = [unit // 4 for unit in range(UNITS)]
    assert adjusted_rand_score(truth * 2, [*groups.first.tolist(), *groups.second.tolist()]) == 1
    assert groups.sizes == ((4, 4),) * (UNITS // 4)


def test_a_unit_that_two_units_share_has_a_gap() -> None:
    values = normal(N, 4)
    doubled = values[:, [0, 0, 1, 2]] + 0.3 * normal(N, 4, seed=1)
    found = match_units(doubled, values, n=0, seed=0)
    assert found.gap > 0.1
    assert found.best[:2].tolist() == [0, 0]
    assert (match_units(doubled, values[:, :2], n=0, seed=0).partner == -1).sum() == 2


def test_heads_are_matched_whatever_turn_their_space_has() -> None:
    heads = normal(60, 5, 3)
    order = [3, 0, 4, 2, 1]
    turned = torch.stack([heads[:, h] @ rotation(3, h) for h in order], dim=1)
    found = match_units(heads, turned, n=9, seed=0)
    assert [order[k] for k in found.partner.tolist()] == [0, 1, 2, 3, 4]
    assert found.matched.value == pytest.approx(1)
    assert abs(found.matched.mean) < 0.2


def test_a_dead_unit_is_like_no_other() -> None:
    values = normal(N, 3)
    values[:, 1] = 7.3
    assert unit_correlations(values, values).tolist()[1] == [0, 0, 0]
    assert unit_correlations(values.float() + 1e4, values.float() + 1e4)[0, 0] == pytest.approx(1)


def test_the_fewest_units_that_say_it_are_as_many_as_were_planted() -> None:
    values = normal(N, UNITS)
    asked = torch.stack([values[:, 3], values[:, :3].sum(dim=1), normal(N, seed=9)], dim=1)
    asked[:, :2] += 0.05 * normal(N, 2, seed=4)
    found = sparse_prediction(values, asked, names(N), seed=0)
    needed = found.needed(0.9).tolist()
    assert needed[:2] == [1, 3]
    assert float(found.r2[:2].amax(dim=1).min()) > 0.98
    assert float(found.r2[2].max()) < 0.1  # noise is predicted by nothing, with however many units
    assert float(found.nonzeros[2, -1]) > 10
    assert found.penalties[0] == 1  # the strongest penalty leaves no unit, or the one that it stops at
    assert bool((found.nonzeros[:, 0] <= 1).all())


# --- similarity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", SIMILARITIES)
def test_a_rotation_and_a_scale_change_nothing_and_chance_is_far_below(measure: str) -> None:
    values = normal(60, 100) @ torch.diag(torch.linspace(0.1, 3, 100).double())
    found = similarity(measure, values, 3 * values @ rotation(100, 1) + 2, n=19, seed=0)
    assert found.value == pytest.approx(1, abs=1e-6)
    assert found.p == pytest.approx(0.05)
    assert found.highest < 0.95
    unrelated = similarity(measure, values, normal(60, 100, seed=5), n=39, seed=0)
    assert unrelated.p > 0.05


def test_the_measures_are_those_of_other_libraries() -> None:
    values, other = normal(80, 6), normal(80, 6, seed=1)
    other[:, :3] += 2 * values[:, :3]
    assert procrustes(values, other) ** 2 == pytest.approx(1 - scipy_procrustes(values.numpy(), other.numpy())[2])
    one, two = CCA(6, scale=False, max_iter=5000, tol=1e-12).fit_transform(values.numpy(), other.numpy())
    correlations = [abs(float(np.corrcoef(one[:, k], two[:, k])[0, 1])) for k in range(6)]
    assert min(correlations) - 1e-6 < pwcca(values, other) < max(correlations)
    assert pwcca(values, values @ normal(6, 6, seed=3)) == pytest.approx(1)  # any invertible map


def test_unbiased_cka_has_no_bias_of_few_prompts() -> None:
    drawn = [unbiased_cka(normal(30, 200, seed=k), normal(30, 200, seed=k + 50)) for k in range(20)]
    assert abs(sum(drawn) / 20) < 0.03  # the usual one is about 0.87 here
    assert math.isnan(unbiased_cka(normal(30, 4), torch.ones(30, 4)))


def test_neighbours_by_chance_are_k_of_all() -> None:
    found = similarity("neighbours", normal(50, 8), normal(50, 8, seed=1), n=300, seed=0)
    assert found.mean == pytest.approx(10 / 49, abs=0.005)
    with pytest.raises(UserError, match="ask for 1 to 48"):
        mutual_neighbours(normal(50, 8), normal(50, 8), 49)


def test_a_massive_dimension_has_all_the_say_until_it_is_left_out() -> None:
    values, other = normal(60, 30), normal(60, 30, seed=1)
    shared = 200 * normal(60, seed=2)
    values[:, 7] += shared
    other[:, 7] += shared
    assert unbiased_cka(values, other) > 0.99
    assert abs(unbiased_cka(without_massive(values, values, other), without_massive(other, values, other))) < 0.1


# --- chance ----------------------------------------------------------------------------------------------------------


def test_families_exchange_places_as_wholes() -> None:
    families = ["a", "b", "a", "b", "c", "d", "d", "e"]
    orders = permutations(8, 200, 0, families)
    assert bool((orders.sort(dim=1).values == torch.arange(8)).all())
    for order in orders.tolist():
        assert {families[order[0]]} == {families[order[2]]}
        assert {order[4], order[7]} == {4, 7}
    assert len({tuple(order) for order in orders.tolist()}) > 50
    with pytest.raises(UserError, match="8 prompts and 2 families"):
        permutations(8, 3, 0, ["a", "b"])


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UserError, match="'neighbours'"):
        similarity("neighbors", normal(20, 3), normal(20, 3), n=1, seed=0)
    with pytest.raises(UserError, match="20 and 19 prompts"):
        similarity("cka", normal(20, 3), normal(19, 3), n=1, seed=0)
    with pytest.raises(UserError, match="5 prompts are too few"):
        match_units(normal(5, 3), normal(5, 3), n=1, seed=0)
    with pytest.raises(UserError, match="ask for 2 to 6"):
        unit_clusters(normal(20, 3), normal(20, 3), k=9)
    with pytest.raises(UserError, match="not finite"):
        similarity("cka", normal(20, 3) / 0, normal(20, 3), n=1, seed=0)
