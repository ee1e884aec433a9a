"""Detection finds what was planted, where it was planted, and nothing where nothing was."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from planted import planted_activations, planted_confounded, planted_two_by_two, relabelled
from scipy.stats import kstest, norm

from mechlens.choices import METHODS
from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations, one_cell
from mechlens.methods.directions.direction import direction_grid
from mechlens.methods.directions.nulls import LabelledVectors, permutation_null, random_null, split_half
from mechlens.methods.probing.auroc_grid import held_out_auroc, refitted_auroc
from mechlens.methods.probing.detect import Detection, detect
from mechlens.methods.statistics.resample import one_thread
from mechlens.prompts.split import Split, split_by_family
from mechlens.registry import Choice
from mechlens.settings import DetectionPlan

PLAN = DetectionPlan(seed=0, resamples=300)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def _split(acts: Activations, seed: int = 0) -> Split:
    return split_by_family(acts.labels, acts.families, fractions=(0.5, 0.2, 0.3), seed=seed)


def _detect(acts: Activations, plan: DetectionPlan = PLAN, *, refit: bool = False) -> Detection:
    return detect(acts, "harmful", "harmless", _split(acts), plan, refit=refit)


def test_validation_chooses_the_planted_level_and_test_confirms_it() -> None:
    acts = planted_activations(separation=3.0, n_per_class=100, n_levels=6, at=(4, "inst"), seed=1).acts
    found = _detect(acts)
    assert (found.strongest.level, found.strongest.position) == (4, "inst")
    assert found.strongest.auroc.low > 0.85
    assert found.strongest.auroc.n == 60
    assert found.strongest.permutation.p == pytest.approx(1 / 201)
    assert found.strongest.auroc.value > found.strongest.random.maximum
    # And nowhere else: at the other position even the best validation level is chance on test.
    elsewhere = found.at("last")
    assert elsewhere.auroc.low < 0.5 < elsewhere.auroc.high
    assert elsewhere.permutation.p > 0.05


def test_other_methods_go_the_plain_road_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    acts = planted_activations(separation=2.0, n_per_class=40, n_levels=2, positions=("inst",), seed=2).acts
    plan = replace(PLAN, permutations=20, random_directions=5)
    fast = _detect(acts, plan).strongest
    monkeypatch.setitem(METHODS.ours, "plain", Choice("mechlens.methods.directions.direction:mean_difference", ""))
    plain = _detect(acts, replace(plan, method="plain")).strongest
    assert torch.equal(plain.direction.vector, fast.direction.vector)
    assert (plain.auroc, plain.random) == (fast.auroc, fast.random)
    assert vars(plain.permutation) == pytest.approx(vars(fast.permutation))
    cell = one_cell(acts, 1, "inst")
    halves = [split_half(cell, "harmful", "harmless", 5, 0, method) for method in ("mean-difference", "plain")]
    assert torch.allclose(halves[0].double(), halves[1].double())


@pytest.mark.parametrize("method", ["lda", "logistic"])
def test_a_detection_by_another_method_is_that_methods(method: str) -> None:
    acts = planted_activations(separation=3.0, n_per_class=60, n_levels=2, at=(1, "inst"), seed=3).acts
    found = _detect(acts, replace(PLAN, method=method))
    train = acts.select(_split(acts).train)
    own = METHODS[method](train, "harmful", "harmless", found.strongest.level, found.strongest.position)
    assert torch.allclose(found.strongest.direction.vector, own.vector)
    assert found.strongest.direction.method == found.directions.method == own.method
    assert (found.strongest.position, found.strongest.permutation.n) == ("inst", 50)
    assert found.strongest.permutation.p < 0.05 < found.at("last").permutation.p
    assert found.strongest.permutation.mean == pytest.approx(0.5, abs=0.06)


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    acts = planted_activations(separation=1.0, n_per_class=20).acts
    with pytest.raises(UserError, match=r"no direction method 'logistics' \(did you mean 'logistic'\?\)"):
        _detect(acts, replace(PLAN, method="logistics"))
    with pytest.raises(UserError, match="`permutations` must be at least 1, and is -3"):
        _detect(acts, replace(PLAN, permutations=-3))
    with pytest.raises(UserError, match="refit"):
        _detect(acts, replace(PLAN, method="lda"), refit=True)


def test_of_levels_that_tie_on_validation_the_one_farther_apart_is_chosen() -> None:
    # Sixteen prompts are told apart perfectly at three levels, at level 3 by the widest gap.
    acts = planted_activations(separation=0.0, n_per_class=40, n_levels=5, positions=("inst",), seed=4).acts
    sign = torch.tensor([1.0, -1.0]).repeat(40)
    values = acts.values.clone()
    values[:, 0] = 0.0  # one token for all prompts: nothing to tell apart, and no division by zero
    for level, strength in ((1, 6.0), (3, 12.0), (4, 7.0)):
        values[:, level, 0, 0] += strength * sign
    split = _split(acts)
    found = detect(replace(acts, values=values), "harmful", "harmless", split, PLAN)
    assert found.validation_auroc[[1, 3, 4], 0].tolist() == [1.0, 1.0, 1.0]
    assert found.strongest.level == 3
    assert found.strongest.validation_separation > 10
    # Equal in both, the lowest: the same vectors at two levels.
    twice = values.clone()
    twice[:, 4] = twice[:, 3]
    assert detect(replace(acts, values=twice), "harmful", "harmless", split, PLAN).strongest.level == 3
    # Nothing anywhere: the lowest level above the tokens, no NaN.
    nothing = detect(replace(acts, values=torch.zeros_like(values)), "harmful", "harmless", split, PLAN)
    assert (nothing.strongest.level, nothing.strongest.validation_separation) == (1, 0.0)
    assert nothing.best is None


def test_area_matches_theory() -> None:
    # A direction with cosine c to the truth gives Phi(a c / sqrt 2).
    acts = planted_activations(separation=2.0, n_per_class=400, d_model=64, n_levels=4, seed=2).acts
    cosine = 2 / math.sqrt(4 + 2 * 64 / 200)
    assert float(_detect(acts).test.value.mean()) == pytest.approx(norm.cdf(2 * cosine / math.sqrt(2)), abs=0.02)


def test_shuffled_labels_leave_chance() -> None:
    acts = planted_activations(separation=3.0, n_per_class=100, n_levels=4, paired=False, seed=3).acts
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    found = _detect(relabelled(acts, tuple(acts.labels[i] for i in order)))
    for choice in found.chosen:
        assert choice.auroc.low < 0.5 < choice.auroc.high
        assert choice.permutation.p > 0.05


@pytest.mark.parametrize("paired", [True, False])
def test_permutation_p_is_uniform_when_labels_mean_nothing(paired: bool) -> None:
    found = []
    for seed in range(150):
        acts = planted_activations(
            separation=0.0, n_per_class=30, d_model=8, n_levels=1, positions=("inst",), paired=paired, seed=seed
        ).acts
        positive = torch.tensor([label == "harmful" for label in acts.labels])
        train, test = (
            LabelledVectors(acts.values[rows, 0, 0], positive[rows], acts.families[rows])
            for rows in (slice(0, 30), slice(30, 60))
        )
        grid = direction_grid(acts.select(list(range(30))), "harmful", "harmless")
        observed = held_out_auroc(grid, acts.select(list(range(30, 60))), ("harmful", "harmless")).value[0, 0]
        found.append(permutation_null(train, test, float(observed), 99, seed=seed).p)
    assert kstest(found, "uniform").pvalue > 0.01


def test_permutation_null_stays_narrow_beside_a_strong_effect() -> None:
    found = _detect(planted_activations(separation=4.0, n_per_class=100, n_levels=2, seed=4).acts).strongest
    assert found.auroc.value > 0.95
    assert found.permutation.mean == pytest.approx(0.5, abs=0.03)
    assert found.permutation.quantile_95 < 0.75


def test_random_directions_keep_the_norm_and_are_folded_upwards() -> None:
    acts = planted_activations(separation=2.0, d_model=128, seed=5).acts
    direction = direction_grid(acts, "harmful", "harmless").at(1, "inst")
    cell = LabelledVectors(
        acts.at(1, "inst"), torch.tensor([label == "harmful" for label in acts.labels]), acts.families
    )
    null = random_null(direction, cell, 50, seed=0)
    assert 0.5 < null.mean < 0.65
    assert null.mean < null.maximum < 0.8
    assert null.n == 50


def test_refitting_adds_the_chance_of_training_and_says_so() -> None:
    acts = planted_activations(separation=1.0, n_per_class=40, d_model=128, n_levels=3, seed=6).acts
    frozen, refitted = _detect(acts), _detect(acts, refit=True)
    assert (frozen.test.refit, refitted.test.refit) == (False, True)
    assert torch.equal(frozen.test.value, refitted.test.value)
    width = (frozen.test.high - frozen.test.low).mean(), (refitted.test.high - refitted.test.low).mean()
    assert width[1] > width[0]


def test_within_class_numbers_separate_the_two_factors() -> None:
    planted = planted_two_by_two(harm_separation=3.0, refusal_separation=3.0, n_per_cell=60, seed=7)
    train = planted.acts.select(list(range(120)))
    diagonal = direction_grid(train, "refused_harmful", "accepted_harmless")
    held_out = planted.acts.select(list(range(120, 240)))
    harm_in_accepted = held_out_auroc(diagonal, held_out, ("accepted_harmful", "accepted_harmless"))
    refusal_in_harmful = held_out_auroc(diagonal, held_out, ("refused_harmful", "accepted_harmful"))
    assert harm_in_accepted.at(2, "inst").low > 0.85
    assert refusal_in_harmful.at(2, "last").low > 0.85
    for estimate in (harm_in_accepted.at(2, "last"), refusal_in_harmful.at(2, "inst")):
        assert estimate.low < 0.5 < estimate.high
    # An empty quadrant is missing, never a crash; and the constant token at level 0 says exactly nothing.
    empty = held_out_auroc(diagonal, held_out, ("unheard", "accepted_harmless"))
    assert not empty.at(2, "inst").measurable
    assert empty.at(2, "inst").n == 30
    nobody = held_out_auroc(diagonal, held_out, ("unheard", "of"))
    assert not nobody.at(2, "inst").measurable
    assert nobody.n == 0
    constant = harm_in_accepted.at(0, "last")
    assert constant.low == constant.value == constant.high == 0.5


def test_intervals_count_families_not_prompts() -> None:
    train = planted_activations(separation=1.5, n_levels=2, seed=10)
    grid = direction_grid(train.acts, "harmful", "harmless")
    once = planted_activations(separation=1.5, n_levels=2, paired=False, truth=train.truth, seed=11).acts
    four = once.select(list(range(len(once.ids))) * 4)
    alone = replace(four, families=tuple(map(str, range(len(four.ids)))))
    widths = []
    for acts in (once, four, alone):
        found = held_out_auroc(grid, acts, ("harmful", "harmless"))
        widths.append(float((found.high - found.low).mean()))
    assert widths[1] == pytest.approx(widths[0], rel=0.01)  # saying it four times adds nothing ...
    assert widths[2] == pytest.approx(widths[0] / 2, rel=0.2)  # ... though it would seem to


def test_a_confounded_set_separates_before_any_block_has_run() -> None:
    found = _detect(planted_confounded())
    assert found.test.at(0, "inst").value == 1.0
    assert found.test.at(0, "last").value == 0.5


def test_scale_shift_and_swapped_labels_change_nothing() -> None:
    acts = planted_activations(separation=1.0, n_per_class=40, seed=8).acts
    found = _detect(acts)
    for changed in (
        _detect(replace(acts, values=64 * acts.values)),
        detect(acts, "harmless", "harmful", _split(acts), PLAN),
    ):
        assert torch.allclose(changed.test.value, found.test.value)
    shifted = _detect(replace(acts, values=acts.values + 10.0))
    assert torch.allclose(shifted.test.value, found.test.value, atol=0.01)


def test_the_process_gets_its_threads_back() -> None:
    torch.set_num_threads(2)
    acts = planted_activations(separation=1.0).acts
    _detect(acts)
    assert torch.get_num_threads() == 2
    with pytest.raises(UserError):
        _detect(relabelled(acts, ("harmful",) * len(acts.labels)))
    assert torch.get_num_threads() == 2


def test_refitting_draws_the_training_families_too() -> None:
    # A huge test set leaves only the chance of training: the frozen interval hardly sees it.
    train = planted_activations(separation=1.0, n_per_class=20, d_model=128, n_levels=2, seed=12)
    test = planted_activations(separation=1.0, n_per_class=1000, d_model=128, n_levels=2, truth=train.truth, seed=13)
    grid = direction_grid(train.acts, "harmful", "harmless")
    frozen = held_out_auroc(grid, test.acts, ("harmful", "harmless"))
    refitted = refitted_auroc(grid, train.acts, test.acts, seed=0, resamples=100)
    assert float((refitted.high - refitted.low).mean()) > 1.4 * float((frozen.high - frozen.low).mean())


def test_table_is_tidy_and_agrees_with_the_estimates() -> None:
    found = _detect(planted_activations(separation=1.0, seed=9).acts)
    table = found.table()
    assert list(table.columns) == ["level", "position", "auroc", "low", "high", "n", "effect_size", "validation_auroc"]
    assert len(table) == 6
    row = table[(table.level == 2) & (table.position == "last")].iloc[0]
    estimate = found.test.at(2, "last")
    assert (row.auroc, row.low, row.high, row.n) == (estimate.value, estimate.low, estimate.high, estimate.n)
    assert row.validation_auroc == float(found.validation_auroc[2, 1])
    assert found.sizes["train"] == {"harmful": 32, "harmless": 32}


def test_nothing_from_training_is_scored() -> None:
    acts = planted_activations(separation=1.0).acts
    found = _detect(acts)
    scored = {acts.ids[i] for i in (*found.split.validation, *found.split.test)}
    assert not scored & set(found.directions.train_ids)
    with pytest.raises(UserError, match="were used to fit the direction"):
        held_out_auroc(found.directions, acts, ("harmful", "harmless"))


def test_the_seed_decides() -> None:
    acts = planted_activations(separation=1.0, n_per_class=40).acts
    first, again, other = (_detect(acts, replace(PLAN, seed=seed)) for seed in (1, 1, 2))
    assert first.table().equals(again.table())
    assert first.strongest.permutation != other.strongest.permutation  # the table has no chance of its own
    assert first.strongest.permutation == again.strongest.permutation
    assert first.strongest.random == again.strongest.random


def test_what_cannot_be_measured_is_said() -> None:
    acts = planted_activations(separation=1.0).acts
    split = _split(acts)
    harmless_only = tuple(i for i in split.test if acts.labels[i] == "harmless")
    found = detect(acts, "harmful", "harmless", replace(split, test=harmless_only), PLAN)
    assert not found.strongest.auroc.measurable
    assert found.strongest.auroc.n == len(harmless_only)
    assert math.isnan(found.strongest.permutation.p)
    with pytest.raises(UserError, match=r"validation part has \{'harmful': 0"):
        detect(acts, "harmful", "harmless", replace(split, validation=harmless_only), PLAN)
    broken = acts.values.clone()
    broken[3, 2, 0, 5] = math.inf
    with pytest.raises(UserError, match=r"not finite at levels \[2\]"):
        _detect(replace(acts, values=broken))
    with pytest.raises(UserError, match="position 'middle'"):
        found.at("middle")
