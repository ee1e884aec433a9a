"""Mean-difference directions recover what was planted, as far as theory says, and no further."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from planted import activations, planted_activations, planted_two_by_two, relabelled, unit

from mechlens.errors import UserError
from mechlens.methods.directions.direction import (
    Direction,
    cosine,
    direction_cosine,
    direction_grid,
    mean_difference,
    mean_differences,
    project,
    random_like,
    require_is_direction,
    require_real,
)
from mechlens.methods.directions.nulls import corrected_cosine, split_half
from mechlens.methods.probing.auroc_grid import held_out_auroc
from mechlens.methods.probing.beliefs import beliefs, centroids
from mechlens.methods.steering.interventions import residual_norms


@pytest.mark.parametrize(("n", "expected"), [(16, 0.33), (64, 0.58), (256, 0.82)])
def test_planted_direction_is_recovered_as_theory_predicts(n: int, expected: float) -> None:
    # Levels are independent draws of the noise: their mean removes the chance of one draw.
    planted = planted_activations(separation=2.0, n_per_class=n, d_model=256, n_levels=6, positions=("inst",), seed=n)
    vectors = mean_differences(planted.acts, "harmful", "harmless")[:, 0]
    theory = 2 / math.sqrt(2**2 + 2 * 256 / n)
    assert theory == pytest.approx(expected, abs=0.005)
    assert float(cosine(vectors, planted.truth.expand_as(vectors)).mean()) == pytest.approx(theory, abs=0.03)


def test_nothing_is_found_where_nothing_was_planted() -> None:
    planted = planted_activations(separation=0.0, d_model=256, n_levels=6, positions=("inst",))
    vectors = mean_differences(planted.acts, "harmful", "harmless")[:, 0]
    assert float(cosine(vectors, planted.truth.expand_as(vectors)).abs().max()) < 4 / math.sqrt(256)


def test_two_by_two_holds_each_factor_at_its_place() -> None:
    planted = planted_two_by_two(harm_separation=4.0, refusal_separation=4.0, n_per_cell=64)
    harm = relabelled(planted.acts, tuple("yes" if flag else "no" for flag in planted.harmful))
    refusal = relabelled(planted.acts, tuple("yes" if flag else "no" for flag in planted.refused))
    theory = 4 / math.sqrt(16 + 2 * 64 / 128)
    assert cosine(mean_difference(harm, "yes", "no", 2, "inst").vector, planted.harm) > theory - 0.03
    assert cosine(mean_difference(refusal, "yes", "no", 2, "last").vector, planted.refusal) > theory - 0.03
    # Each factor is absent where the other lives, and the constant token at level 0 gives exactly nothing.
    assert abs(cosine(mean_difference(harm, "yes", "no", 2, "last").vector, planted.refusal)) < 0.4
    assert mean_difference(refusal, "yes", "no", 0, "last").norm == 0.0


def test_swapping_the_labels_negates_and_scaling_scales() -> None:
    acts = planted_activations(separation=1.0).acts
    forward = mean_differences(acts, "harmful", "harmless")
    assert torch.equal(mean_differences(acts, "harmless", "harmful"), -forward)
    assert torch.equal(mean_differences(replace(acts, values=4 * acts.values), "harmful", "harmless"), 4 * forward)
    shifted = replace(acts, values=acts.values + 5.0)
    assert torch.allclose(mean_differences(shifted, "harmful", "harmless"), forward, atol=1e-5)


def test_sums_run_in_float64() -> None:
    # A shared dimension of 1e6 must not swamp a difference of 0.125 in the others.
    values = torch.full((2000, 1, 1, 2), 1e6)
    values[::2, 0, 0, 1] += 0.125
    vectors = mean_differences(
        activations(values, ("harmful", "harmless") * 1000, positions=("inst",)), "harmful", "harmless"
    )
    assert vectors[0, 0].tolist() == [0.0, 0.125]


def test_other_labels_are_left_out_and_missing_ones_named() -> None:
    planted = planted_two_by_two(harm_separation=2.0, refusal_separation=2.0, n_per_cell=8)
    kept = [i for i, label in enumerate(planted.acts.labels) if label.endswith("harmful")]
    alone = mean_differences(planted.acts.select(kept), "refused_harmful", "accepted_harmful")
    assert torch.equal(mean_differences(planted.acts, "refused_harmful", "accepted_harmful"), alone)
    with pytest.raises(UserError, match=r"no prompt is labelled 'angry'.*'refused_harmful': 8"):
        mean_differences(planted.acts, "angry", "refused_harmful")


def test_grid_and_single_direction_agree_and_carry_their_origin() -> None:
    acts = planted_activations(separation=1.0).acts
    grid, single = direction_grid(acts, "harmful", "harmless"), mean_difference(acts, "harmful", "harmless", 1, "last")
    cell = grid.at(1, "last")
    assert torch.equal(cell.vector, single.vector)
    assert replace(cell, vector=single.vector) == single
    assert (single.level, single.position, single.contrast) == (1, "last", ("harmful", "harmless"))
    assert single.checkpoint == acts.checkpoint
    assert single.train_ids == acts.ids
    for place in ((9, "last"), (1, "nowhere")):
        with pytest.raises(UserError, match="there is no direction"):
            grid.at(*place)


def test_projection_is_a_length_along_the_unit_vector() -> None:
    acts = planted_activations(separation=1.0).acts
    direction = mean_difference(acts, "harmful", "harmless", 1, "inst")
    assert float(project(direction.vector, direction)) == pytest.approx(direction.norm, rel=1e-5)
    assert float(direction.unit.norm()) == pytest.approx(1.0, rel=1e-5)
    longer = replace(direction, vector=10 * direction.vector)
    values = acts.at(1, "inst")
    assert torch.allclose(project(values, longer), project(values, direction), atol=1e-5)
    zero = replace(direction, vector=torch.zeros_like(direction.vector))
    assert torch.equal(project(values, zero), torch.zeros(len(values)))


def test_random_directions_keep_the_norm_and_nothing_else() -> None:
    direction = mean_difference(planted_activations(separation=1.0, d_model=256).acts, "harmful", "harmless", 1, "inst")
    draws = random_like(direction, 200, seed=0)
    assert all(draw.norm == pytest.approx(direction.norm, rel=1e-5) for draw in draws)
    cosines = torch.tensor([direction_cosine(draw, direction) for draw in draws])
    assert float(cosines.std()) == pytest.approx(1 / math.sqrt(256), rel=0.15)
    assert {draw.method for draw in draws} == {"random"}
    assert torch.equal(random_like(direction, 3, seed=0)[2].vector, draws[2].vector)
    assert not torch.equal(random_like(direction, 1, seed=1)[0].vector, draws[0].vector)


def test_cosine_refuses_to_mix_spaces() -> None:
    direction = mean_difference(planted_activations(separation=1.0).acts, "harmful", "harmless", 1, "inst")
    assert direction_cosine(direction, direction) == pytest.approx(1.0)
    processed = replace(direction, checkpoint=replace(direction.checkpoint, regime="processed"))
    with pytest.raises(UserError, match="weight regime"):
        direction_cosine(direction, processed)
    with pytest.raises(UserError, match="size"):
        direction_cosine(direction, replace(direction, vector=torch.ones(3)))
    assert math.isnan(float(cosine(torch.zeros(4), torch.ones(4))))


@pytest.mark.parametrize(("separation", "n"), [(2.0, 64), (4.0, 64), (2.0, 256)])
def test_split_half_reliability_matches_theory(separation: float, n: int) -> None:
    planted = planted_activations(
        separation=separation, n_per_class=n, d_model=128, n_levels=6, positions=("inst",), seed=1
    )
    measured = split_half(planted.acts, "harmful", "harmless", n_splits=10, seed=0)
    assert float(measured.mean()) == pytest.approx(separation**2 / (separation**2 + 2 * 128 / n), abs=0.05)


def test_reliability_of_noise_is_near_zero_and_of_constants_missing() -> None:
    planted = planted_activations(separation=0.0, d_model=128, n_levels=6, positions=("inst",))
    assert float(split_half(planted.acts, "harmful", "harmless", n_splits=10, seed=0).mean()) < 0.1
    two = planted_two_by_two(harm_separation=1.0, refusal_separation=1.0)
    constant = split_half(two.acts, "refused_harmful", "accepted_harmful", n_splits=5, seed=0)
    assert math.isnan(float(constant[0, 1]))
    assert bool(torch.isfinite(constant[1:]).all())


@pytest.mark.parametrize("true_cosine", [0.0, 0.6, 1.0])
def test_corrected_cosine_recovers_the_planted_one(true_cosine: float) -> None:
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(128, 2, generator=generator)).Q
    first = basis[:, 0]
    second = unit(true_cosine * first + math.sqrt(1 - true_cosine**2) * basis[:, 1])
    sides = [
        planted_activations(
            separation=2.0, n_per_class=64, d_model=128, n_levels=40, positions=("inst",), truth=truth, seed=seed
        ).acts
        for truth, seed in ((first, 10), (second, 11))  # disjoint prompts
    ]
    vectors = [mean_differences(acts, "harmful", "harmless") for acts in sides]
    reliability = [split_half(acts, "harmful", "harmless", n_splits=10, seed=0) for acts in sides]
    raw = cosine(*vectors)
    corrected = corrected_cosine(raw, *reliability)
    assert float(corrected.mean()) == pytest.approx(true_cosine, abs=0.06)
    if true_cosine == 1.0:  # what the correction is for: two estimates of the same direction look different
        assert float(raw.mean()) < 0.75
    for noise in (0.0, 1e-4, 0.09):  # not a cosine of 10
        assert math.isnan(float(corrected_cosine(torch.tensor(0.1), torch.tensor(noise), torch.tensor(0.9))))


@pytest.mark.parametrize(
    ("vector", "said"),
    [
        (torch.ones(4, dtype=torch.bool), "of type bool at the place; give real ones"),
        (torch.ones(4, dtype=torch.complex64), "of type complex64 at the place; give real ones"),
        (torch.ones(4, dtype=torch.long), "of type int64 at the place; give real ones"),
        (torch.tensor([1.0, math.nan]), "not finite at .*, so it points nowhere"),
        (torch.tensor([1.0, -math.inf]), "not finite at .*, so it points nowhere"),
    ],
)
def test_what_is_no_real_vector_is_no_direction(vector: torch.Tensor, said: str) -> None:
    with pytest.raises(UserError, match=said):
        require_real(vector, "the place")
    if vector.is_floating_point():  # types are checked at run time in the tests, before anything else
        one = planted_activations(separation=2.0, n_per_class=8, d_model=4).acts
        made = mean_difference(one, "harmful", "harmless", 0, one.positions[0])
        with pytest.raises(UserError, match=said):
            replace(made, vector=vector)


def test_positions_have_the_same_names_everywhere() -> None:
    """`last`, `post[-1]` and `post[-k]` of what was collected as post[0] to post[2]."""
    values = torch.randn(8, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    names = ("inst", "post[0]", "post[1]", "post[2]")
    acts = replace(activations(values, ("a", "b") * 4, positions=names), last="post[2]")
    grid, norms = direction_grid(acts, "a", "b"), residual_norms(acts)
    aurocs = held_out_auroc(replace(grid, train_ids=()), acts, ("a", "b"))
    for other, own in (("last", "post[2]"), ("post[-1]", "post[2]"), ("post[-3]", "post[0]"), ("inst", "inst")):
        assert torch.equal(acts.at(1, other), acts.at(1, own))
        assert grid.at(1, other).position == own
        assert mean_difference(acts, "a", "b", 1, other).position == own
        assert norms.at(1, other) == norms.at(1, own) != norms.at(1, "all")
        assert aurocs.at(1, other) == aurocs.at(1, own)
        reference = centroids(acts, "a", "b", other)
        assert reference.position == own
        by_name = [
            beliefs(acts, replace(reference, position=name), centered=False, skip_embedding=False)
            for name in (other, own)
        ]
        assert torch.equal(*by_name)
    for wrong in ("post[-4]", "post[3]", "nowhere"):
        for ask in (lambda name: acts.at(1, name), lambda name: centroids(acts, "a", "b", name)):
            with pytest.raises(UserError, match="was not collected"):
                ask(wrong)


def test_a_run_in_the_place_of_a_direction_is_told_where_its_directions_are(tmp_path: Path) -> None:
    class Run:
        directions: ClassVar[dict[str, Direction]] = {}

    for given, sentence in (
        (str(tmp_path), rf"give one of those that it holds: ml.open\('{re.escape(str(tmp_path))}'\).directions"),
        (str(tmp_path / "it.safetensors"), r"give what it holds: direction = ml.open\("),
        (Run(), "give one of its .directions, by name"),
    ):
        with pytest.raises(UserError, match=sentence):
            require_is_direction(given)
