"""Intervals over runs and questions hold the truth; change points are found where they were planted."""

import math

import pytest
import torch

from mechlens.errors import UserError
from mechlens.methods.statistics.change_point import change_point
from mechlens.methods.statistics.crossed import crossed_difference, crossed_mean


def drawn(runs: int, questions: int, seed: int, *, of_run: float, of_question: float, noise: float) -> torch.Tensor:
    """True mean 0, with chance from runs, questions and both."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return of_run * normal(runs, 1) + of_question * normal(1, questions) + noise * normal(runs, questions)


@pytest.mark.parametrize(("of_run", "of_question"), [(0.5, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("runs", [3, 5])
def test_intervals_hold_the_truth(runs: int, of_run: float, of_question: float) -> None:
    """Not less often than they say; more often where both chances are small, since what both share counts twice."""
    held = 0
    for seed in range(400):
        values = drawn(runs, 40, seed, of_run=of_run, of_question=of_question, noise=0.5)
        found = crossed_mean(values, [f"f{i}" for i in range(40)])
        held += found.low <= 0 <= found.high
    assert held / 400 >= 0.93


def test_a_difference_is_paired_by_question_and_knows_families() -> None:
    values = drawn(3, 30, 0, of_run=0.05, of_question=3.0, noise=0.2)
    families = [f"f{i // 3}" for i in range(30)]
    others = drawn(3, 30, 1, of_run=0.05, of_question=0.0, noise=0.2) + values.mean(0)
    apart = crossed_difference(values + 1, others, families)
    assert apart.low < 1 < apart.high
    assert apart.high - apart.low < 0.8  # the questions' own chance, 3.0, is gone
    assert crossed_mean(values, families).high - crossed_mean(values, families).low > 2
    same = crossed_difference(values, values, families)
    assert same.value == 0
    alone = crossed_mean(values[:1], families)
    twins = crossed_mean(values[:1].repeat_interleave(2, dim=1), [name for name in families for _ in range(2)])
    assert (twins.low, twins.high) == pytest.approx((alone.low, alone.high))  # repeats within families add nothing
    assert not crossed_mean(values, ["one"] * 30).measurable


@pytest.mark.parametrize("cut", [3, 6, 9])
def test_a_planted_jump_is_found_where_it_is(cut: int) -> None:
    steps = [2**k for k in range(12)]
    noise = torch.randn(12, generator=torch.Generator().manual_seed(cut), dtype=torch.float64) * 0.1
    values = [float(noise[i]) + 2.0 * (i >= cut) for i in range(12)]
    found = change_point(steps, values)
    assert (found.after, found.before) == (steps[cut - 1], steps[cut])
    assert found.jump == pytest.approx(2.0, abs=0.2)
    assert found.p < 0.02
    assert found.said
    climb = change_point(steps, [0.2 * i + float(noise[i]) for i in range(12)])
    assert climb.p < 0.02 < climb.p_climb  # a steady climb is no jump, though no constant either


def test_without_a_jump_p_is_even() -> None:
    low = 0
    for seed in range(200):
        values = torch.randn(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        low += change_point(list(range(10)), values.tolist(), permutations=99).p <= 0.1
    assert 0.04 < low / 200 < 0.17


def test_few_points_have_no_p_and_odd_ones_are_refused() -> None:
    assert math.isnan(change_point([0, 1, 2], [0.0, 0.0, 1.0]).p)
    assert change_point(list(range(8)), [1.0] * 8).p == 1
    with pytest.raises(UserError, match="at least three"):
        change_point([0, 1], [0.0, 1.0])
    with pytest.raises(UserError, match="all finite"):
        change_point([0, 1, 2], [0.0, math.nan, 1.0])
