"""The numerical edge of training: thresholds exact by type, gradients that vanish there, and those that don't."""

import math
from dataclasses import replace

import pytest
import torch

from mechlens.errors import UserError
from mechlens.methods.numerics.edge import collapse_gap, numerical_edge
from mechlens.methods.numerics.modular import ModularTraining, train_modular
from mechlens.methods.numerics.scaling import gradient_alignment, without_scaling
from mechlens.methods.numerics.stablemax import stablemax_loss

BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


def pair(gap: float) -> torch.Tensor:
    return torch.tensor([[gap, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_with_one_rival_the_threshold_is_half_a_unit_in_the_last_place(dtype: torch.dtype) -> None:
    gap = collapse_gap(dtype)
    # The gap itself is rounded to the type, and so is its exponential.
    assert gap == pytest.approx((BITS[dtype] + 1) * math.log(2), rel=max(2.0 ** -BITS[dtype], 1e-9))
    target = torch.tensor([0])
    assert numerical_edge(pair(gap * 1.02), target, dtype).collapsed == 1
    assert numerical_edge(pair(gap * 0.98), target, dtype).collapsed == 0


def test_more_rivals_put_it_off() -> None:
    one, many = collapse_gap(torch.float32), collapse_gap(torch.float32, 49_151)
    assert one < many <= one + math.log(49_151) + 1e-6


def test_collapse_is_where_loss_and_gradient_are_exactly_zero() -> None:
    target = torch.tensor([0])
    for gap, gone in ((17.0, True), (16.0, False)):
        logits = pair(gap).float().requires_grad_()
        torch.nn.functional.cross_entropy(logits, target).backward()
        found = numerical_edge(logits, target)
        assert (found.zero_loss == 1) == gone
        assert (float(logits.grad[0, 0]) == 0) == gone  # type: ignore[index]


def test_a_collapsed_wrong_answer_still_has_a_loss() -> None:
    found = numerical_edge(pair(20.0).float(), torch.tensor([1]))
    assert (found.collapsed, found.zero_loss, found.gap) == (1, 0, -20)


def test_stablemax_has_a_gradient_where_softmax_has_none() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    stablemax_loss(logits, torch.tensor([0])).backward()
    assert float(logits.grad[0, 0]) < 0  # type: ignore[index]
    assert bool(torch.isfinite(logits.grad).all())  # type: ignore[arg-type]
    even = stablemax_loss(torch.zeros(1, 5), torch.tensor([2]))
    assert float(even) == pytest.approx(math.log(5))


def test_a_gradient_without_scaling_is_across_the_weights_and_as_long() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 4, 3, generator=draw, dtype=torch.float64)
    found = without_scaling(weight, gradient)
    assert float((found * weight).sum()) == pytest.approx(0, abs=1e-12)
    assert float(found.norm()) == pytest.approx(float(gradient.norm()))
    assert gradient_alignment([weight], [found]) == pytest.approx(0, abs=1e-12)
    assert gradient_alignment([weight], [2 * weight]) == pytest.approx(-1)
    assert torch.equal(without_scaling(torch.zeros_like(gradient[0]), gradient[0]), gradient[0])


def test_what_can_not_be_is_said() -> None:
    with pytest.raises(UserError, match="isn't computed in int8"):
        collapse_gap(torch.int8)
    with pytest.raises(UserError, match="1 rows of logits and 2 targets"):
        numerical_edge(pair(1.0), torch.tensor([0, 0]))


# Addition modulo a prime


SMALL = ModularTraining(modulus=11, width=32, train_share=0.8, steps=1000, every=100)


def test_training_reaches_the_edge_in_float32_and_neither_in_float64_nor_with_stablemax() -> None:
    single, double, stable = (
        train_modular(replace(SMALL, **options)).curve.set_index("step")
        for options in ({}, {"precision": "float64"}, {"loss": "stablemax", "steps": 500})
    )
    assert {curve["train"].iloc[-1] for curve in (single, double, stable)} == {1.0}
    assert single["zero_loss"].max() > 0.05
    assert single.loc[:500, "zero_loss"].max() == 0  # not before it is learnt
    assert double["zero_loss"].max() == stable["zero_loss"].max() == 0
    # Until then the type makes no difference; beyond, one gradient has lost what it had left to say.
    assert single.loc[600, "loss"] == pytest.approx(double.loc[600, "loss"], rel=1e-2)
    assert single.loc[1000, "alignment"] < double.loc[1000, "alignment"] - 0.05


def test_without_the_part_that_scales_what_is_learnt_by_heart_is_understood() -> None:
    plain = ModularTraining(modulus=23, width=64, train_share=0.7, steps=200, every=100)
    accuracies = {
        perpendicular: train_modular(replace(plain, perpendicular=perpendicular)).curve["test"].iloc[-1]
        for perpendicular in (False, True)
    }
    assert accuracies[True] > 0.9
    assert accuracies[False] < 0.2


def test_pairs_are_trained_on_or_tested_and_the_seed_is_the_run() -> None:
    short = replace(SMALL, steps=3, every=1)
    first, again, other = (train_modular(replace(short, seed=seed)).curve for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first.equals(other)
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match="train_share"):
            train_modular(replace(short, train_share=share))
