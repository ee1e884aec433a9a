"""One contract for every way to find a direction, and what sets each apart."""

import math
from dataclasses import replace

import pytest
import torch
from planted import activations, planted_activations, unit
from torch import Tensor

from mechlens.choices import METHODS
from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import Direction, cosine, mean_difference, project
from mechlens.methods.directions.methods import DirectionMethod, lda, logistic, paired_component, shrunk_covariance
from mechlens.methods.probing.auroc import auroc

PLACE = (1, "inst")
EVERY = pytest.mark.parametrize("method", [METHODS[name] for name in METHODS.ours], ids=METHODS.ours)


def harm(method: DirectionMethod, acts: Activations, level: int = 1, position: str = "inst") -> Direction:
    return method(acts, "harmful", "harmless", level, position)


def with_values(acts: Activations, values: Tensor) -> Activations:
    return replace(acts, values=values)


def mean_projections(acts: Activations, direction: Direction) -> tuple[float, float]:
    """Mean length along the direction of the harmful and of the harmless prompts."""
    along = project(acts.at(*PLACE).double(), direction)
    inside = torch.tensor([label == "harmful" for label in acts.labels])
    return float(along[inside].mean()), float(along[~inside].mean())


def cosine_of_mean(separation: float, n: int, d_model: int) -> float:
    """methods.md 1.10. LDA's too: Ledoit and Wolf find isotropic noise isotropic."""
    return separation / math.sqrt(separation**2 + 2 * (d_model - 1) / n)


def cosine_of_component(separation: float, n: int, d_model: int) -> float:
    """Benaych-Georges & Nadakuditi 2012 for n differences of mean `separation` and noise variance 2 each way."""
    strength, shape = separation**2 / 2, d_model / n
    return math.sqrt((1 - shape / strength**2) / (1 + shape / strength))


def cosine_of_logistic(separation: float, n: int, d_model: int) -> float:
    """Efron 1975: LDA with an estimated covariance, at logistic regression's asymptotic relative efficiency."""
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    a0 = torch.exp(-(separation**2) / 8 - grid**2 / 2) / (
        math.sqrt(2 * math.pi) * (torch.exp(-separation * grid / 2) + torch.exp(separation * grid / 2)) / 2
    )
    efficiency = (1 + separation**2 / 4) * float(torch.trapezoid(a0, grid))
    tangent_squared = (d_model - 1) * 2 / n * (1 + separation**2 / 4) / separation**2 / efficiency
    return 1 / math.sqrt(1 + tangent_squared)


@pytest.mark.parametrize(
    ("name", "theory", "n", "d_model"),
    [
        ("mean-difference", cosine_of_mean, 128, 128),
        ("lda", cosine_of_mean, 128, 128),
        ("paired-component", cosine_of_component, 128, 128),
        ("logistic", cosine_of_logistic, 600, 64),
    ],
)
@pytest.mark.parametrize("separation", [2.0, 3.0])
def test_the_planted_direction_is_recovered_as_theory_allows(
    name: str, theory: object, n: int, d_model: int, separation: float
) -> None:
    planted = planted_activations(separation=separation, n_per_class=n, d_model=d_model, positions=("inst",), seed=n)
    found = [harm(METHODS[name], planted.acts, level) for level in planted.acts.levels]
    mean = sum(float(cosine(each.vector, planted.truth)) for each in found) / len(found)
    assert callable(theory)
    assert mean == pytest.approx(theory(separation, n, d_model), abs=0.02)


@EVERY
def test_nothing_is_found_where_nothing_was_planted(method: DirectionMethod) -> None:
    planted = planted_activations(separation=0.0, d_model=256)
    assert abs(float(cosine(harm(method, planted.acts).vector, planted.truth))) < 4 / math.sqrt(256)


@EVERY
def test_one_unit_is_the_distance_between_the_classes_along_it(method: DirectionMethod) -> None:
    acts = planted_activations(separation=2.0).acts
    direction = harm(method, acts)
    high, low = mean_projections(acts, direction)
    assert high > low
    assert high - low == pytest.approx(direction.norm, rel=1e-5)
    by_means = harm(mean_difference, acts)
    assert direction.norm <= by_means.norm * (1 + 1e-6)
    # The part of the mean difference along the line, as the module says.
    assert float(direction.unit @ by_means.vector) == pytest.approx(direction.norm, rel=1e-5)


@EVERY
def test_swapping_the_labels_negates(method: DirectionMethod) -> None:
    acts = planted_activations(separation=1.0).acts
    forward, back = harm(method, acts), method(acts, "harmless", "harmful", *PLACE)
    assert torch.allclose(back.vector, -forward.vector, atol=2e-4)
    assert back.contrast == ("harmless", "harmful")
    low, high = mean_projections(acts, back)
    assert high > low


@EVERY
def test_it_says_where_it_comes_from(method: DirectionMethod) -> None:
    acts = planted_activations(separation=1.0).acts
    direction = harm(method, acts)
    by_means = harm(mean_difference, acts)
    assert replace(direction, vector=by_means.vector, method=by_means.method) == by_means
    assert (direction.level, direction.position, direction.contrast) == (1, "inst", ("harmful", "harmless"))
    assert direction.vector.dtype == acts.values.dtype
    assert direction.train_ids == acts.ids


def test_every_method_has_a_name_of_its_own() -> None:
    acts = planted_activations(separation=1.0).acts
    assert len({harm(method, acts).method for method in map(METHODS.__getitem__, METHODS.ours)}) == 4


@EVERY
def test_equal_activations_give_equal_directions(method: DirectionMethod) -> None:
    acts = planted_activations(separation=1.0).acts
    before = acts.values.clone()
    assert torch.equal(harm(method, acts).vector, harm(method, acts).vector)
    assert torch.equal(acts.values, before)


@EVERY
def test_prompts_with_other_labels_change_nothing(method: DirectionMethod) -> None:
    acts = planted_activations(separation=1.0).acts
    n = len(acts.ids)
    more = replace(
        acts,
        values=torch.cat([acts.values, 100 * torch.randn(7, *acts.values.shape[1:])]),
        ids=(*acts.ids, *(f"other{i}" for i in range(7))),
        labels=(*acts.labels, *["angry"] * 7),
        families=(*acts.families, *acts.families[:7]),
    )
    mixed = more.select([*range(n, n + 7), *range(n)])  # in front, so that rows must be found by label
    assert torch.equal(harm(method, mixed).vector, harm(method, acts).vector)
    assert harm(method, mixed).train_ids == acts.ids


@EVERY
def test_missing_classes_and_places_are_named(method: DirectionMethod) -> None:
    acts = planted_activations(separation=1.0).acts
    for labels in (("angry", "harmless"), ("harmful", "angry")):
        with pytest.raises(UserError, match=r"no prompt is labelled 'angry'.*'harmful': 64"):
            method(acts, *labels, *PLACE)
    with pytest.raises(UserError, match="level 9 was not collected"):
        harm(method, acts, level=9)
    with pytest.raises(UserError, match="position 'post"):
        harm(method, acts, position="post[3]")


@EVERY
def test_a_place_where_nothing_differs_gives_zero(method: DirectionMethod) -> None:
    # A template token at level 0: one vector for all prompts.
    acts = planted_activations(separation=1.0).acts
    acts = with_values(acts, acts.values[:1].expand_as(acts.values).contiguous())
    assert harm(method, acts).norm == 0.0


@EVERY
def test_two_token_vectors_give_their_difference(method: DirectionMethod) -> None:
    # The other extreme: no spread within a class at all, as at level 0 of a confounded set.
    tokens = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    values = tokens.repeat(8, 1)[:, None, None]
    acts = activations(values, ("harmful", "harmless") * 8, tuple(f"f{i // 2}" for i in range(16)), positions=("inst",))
    found = harm(method, acts, level=0)
    assert bool(torch.isfinite(found.vector).all())
    assert float(found.vector @ (tokens[0] - tokens[1])) > 0
    if method is not logistic:  # whose line lies along the signs of the difference there
        assert torch.allclose(found.vector, tokens[0] - tokens[1], atol=1e-5)


@EVERY
def test_shift_scale_and_signed_permutation_carry_over(method: DirectionMethod) -> None:
    acts = planted_activations(separation=1.0).acts
    vector = harm(method, acts).vector
    d_model = len(vector)
    assert torch.allclose(harm(method, with_values(acts, acts.values + 5.0)).vector, vector, atol=1e-3)
    assert torch.allclose(harm(method, with_values(acts, 8 * acts.values)).vector, 8 * vector, atol=1e-3)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(d_model, generator=generator)
    signs = torch.randint(0, 2, (d_model,), generator=generator) * 2.0 - 1
    turned = harm(method, with_values(acts, acts.values[..., order] * signs)).vector
    assert torch.allclose(turned, vector[order] * signs, atol=1e-3)


def rotated(acts: Activations) -> tuple[Activations, Tensor]:
    """Activations turned at random, and the rotation."""
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    return with_values(acts, (acts.values.double() @ turn).float()), turn


@pytest.mark.parametrize("method", [mean_difference, lda, paired_component])
def test_rotation_carries_over(method: DirectionMethod) -> None:
    acts = planted_activations(separation=2.0).acts
    turned, turn = rotated(acts)
    expected = harm(method, acts).vector.double() @ turn
    assert torch.allclose(harm(method, turned).vector.double(), expected, atol=1e-4)


def test_logistic_does_not_turn_but_ignores_units() -> None:
    acts = planted_activations(separation=2.0).acts
    stretch = torch.linspace(0.1, 10, 64)
    narrow, wide = harm(logistic, acts), harm(logistic, with_values(acts, acts.values * stretch))
    # A probe's weight is divided where the data are multiplied: the same decision.
    assert float(cosine(wide.vector * stretch, narrow.vector)) > 0.9999
    uneven = with_values(acts, acts.values * stretch)
    turned, turn = rotated(uneven)
    expected = harm(logistic, uneven).vector.double() @ turn
    assert float(cosine(harm(logistic, turned).vector, expected)) < 0.99


@pytest.mark.parametrize("method", [lda, logistic, paired_component])
def test_values_that_are_not_finite_are_refused(method: DirectionMethod) -> None:
    acts = planted_activations(separation=1.0).acts
    values = acts.values.clone()
    values[3, 1, 0, 5] = math.nan
    with pytest.raises(UserError, match="not finite at level 1, position 'inst'"):
        harm(method, with_values(acts, values))
    with pytest.raises(UserError, match="both labels"):
        method(acts, "harmful", "harmful", *PLACE)


def anisotropic(n: int, seed: int) -> tuple[Activations, Tensor, Tensor]:
    """Noise of very unequal variance, classes apart along u; also u and Sigma^{-1} u, the best line."""
    generator = torch.Generator().manual_seed(5)
    d_model = 48
    turn = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator)).Q
    spread = torch.logspace(1, -0.5, d_model)  # standard deviations from 10 down to 0.3
    truth = unit(torch.randn(d_model, generator=generator))
    generator.manual_seed(seed)
    noise = torch.randn(2 * n, d_model, generator=generator) * spread @ turn.T
    sign = torch.tensor([1.0, -1.0]).repeat(n)
    values = (noise + sign[:, None] * truth)[:, None, None]
    families = tuple(f"f{i // 2}" for i in range(2 * n))
    acts = activations(values, ("harmful", "harmless") * n, families, positions=("inst",))
    return acts, truth, turn @ ((turn.T @ truth) / spread**2)


def test_lda_finds_the_best_line_in_anisotropic_noise() -> None:
    acts, truth, best = anisotropic(2000, seed=0)
    found, by_means = harm(lda, acts, level=0), harm(mean_difference, acts, level=0)
    assert float(cosine(truth, best)) < 0.6  # so that the two lines differ
    assert float(cosine(found.vector, best)) > 0.97
    assert float(cosine(by_means.vector, best)) < 0.6
    held_out = anisotropic(1000, seed=1)[0]
    inside = torch.tensor([label == "harmful" for label in held_out.labels])
    scores = torch.stack([project(held_out.at(0, "inst"), each) for each in (found, by_means)])
    by_lda, by_mean = auroc(scores, inside).tolist()
    bound = 0.5 * math.erfc(-math.sqrt(2 * float(truth @ best)) / math.sqrt(2))  # Phi(Mahalanobis / sqrt 2)
    assert by_lda > by_mean + 0.05
    assert by_lda == pytest.approx(bound, abs=0.02)


def test_the_mean_difference_leans_to_the_loudest_dimensions_and_lda_less() -> None:
    # With few prompts the error of the means lies where the noise is largest.
    acts, truth, best = anisotropic(16, seed=2)
    few_by_means, few_by_lda = harm(mean_difference, acts, level=0), harm(lda, acts, level=0)
    assert float(cosine(few_by_means.vector, truth)) < 0.6
    assert float(cosine(few_by_lda.vector, best)) > float(cosine(few_by_means.vector, best)) + 0.1


@pytest.mark.parametrize(("n", "d_model"), [(40, 12), (10, 60)])
def test_the_shrunk_covariance_is_the_matrix_it_stands_for(n: int, d_model: int) -> None:
    from sklearn.covariance import ledoit_wolf

    generator = torch.Generator().manual_seed(n)
    values = torch.randn(n, d_model, generator=generator, dtype=torch.float64) * torch.linspace(1, 5, d_model)
    values -= values.mean(dim=0)
    whole, share = ledoit_wolf(values.numpy(), assume_centered=True)
    assert 0 < share < 1
    vector = torch.randn(d_model, generator=generator, dtype=torch.float64)
    expected = torch.linalg.solve(torch.from_numpy(whole), vector)
    assert torch.allclose(shrunk_covariance(values).solve(vector), expected, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 20])
def test_separable_data_give_a_finite_logistic_direction(n: int) -> None:
    planted = planted_activations(separation=50.0, n_per_class=n, d_model=256, positions=("inst",))
    direction = harm(logistic, planted.acts)
    assert bool(torch.isfinite(direction.vector).all())
    assert 0 < direction.norm < 100
    if n == 20:
        assert float(cosine(direction.vector, planted.truth)) > 0.6
    dead = planted.acts.values.clone()
    dead[..., :10] = 3.0  # dimensions that never move
    assert harm(logistic, with_values(planted.acts, dead)).vector[:10].abs().max() == 0.0


def test_pairs_are_found_by_family() -> None:
    planted = planted_activations(separation=3.0)
    acts = planted.acts
    # What two prompts of a family share drowns the classes, and cancels within the family.
    shared = 30 * torch.randn(64, 64, generator=torch.Generator().manual_seed(3)).repeat_interleave(2, dim=0)
    drowned = with_values(acts, acts.values + shared[:, None, None])
    assert float(cosine(harm(paired_component, drowned).vector, harm(paired_component, acts).vector)) > 0.999
    order = torch.randperm(128, generator=torch.Generator().manual_seed(4))
    shuffled = harm(paired_component, drowned.select(order))
    assert torch.allclose(shuffled.vector, harm(paired_component, drowned).vector, atol=1e-4)
    mispaired = replace(drowned, families=(*drowned.families[1:], drowned.families[0]))
    assert abs(float(cosine(harm(paired_component, mispaired).vector, planted.truth))) < 0.5


def test_families_without_a_pair_have_no_difference() -> None:
    acts = planted_activations(separation=3.0).acts
    with pytest.raises(UserError, match="no family has prompts of both labels 'harmful' and 'harmless'"):
        harm(paired_component, replace(acts, families=acts.ids))
    halves = replace(acts, families=(*acts.families[:100], *acts.ids[100:]))
    line = harm(paired_component, acts.select(range(100))).unit
    assert abs(float(cosine(harm(paired_component, halves).vector, line))) == pytest.approx(1, abs=1e-5)
    # Several of one label in a family count as their mean.
    doubled = acts.select([i for i in range(128) for _ in range(2 if i % 2 else 1)])
    assert torch.allclose(harm(paired_component, doubled).unit, harm(paired_component, acts).unit, atol=1e-5)
