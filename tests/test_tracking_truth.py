"""Series with a planted drift: the verdict names each kind, and numbers are those that theory gives."""

import math
from dataclasses import replace

import pytest
import torch
from planted import activations
from scipy.stats import norm
from sentence import require_short
from shown import require_shown
from tiny import tiny_tokenizer
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.behaviour.chosen_judge import verdicts_by
from mechlens.methods.behaviour.judges import PHRASES
from mechlens.methods.geometry.edits import matrix_edit
from mechlens.methods.geometry.similarity.cka import unbiased_cka
from mechlens.methods.geometry.subspaces.angles import overlap
from mechlens.methods.probing.auroc import auroc
from mechlens.methods.probing.auroc_grid import contrast_part, is_positive, score_grid
from mechlens.methods.probing.readouts import balanced_accuracy, brier, fit_readouts
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.checkpoints.lora import LowRank
from mechlens.models.checkpoints.series import Member
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import chat_template
from mechlens.studies.track.config import TrackPlan
from mechlens.studies.track.measures.behaviour import behaviour_table, gaps
from mechlens.studies.track.measures.floor import Floor, random_grid
from mechlens.studies.track.measures.geometry import geometry_tables
from mechlens.studies.track.measures.home import HomeQuestion, network_floor, surface_floor
from mechlens.studies.track.measures.reference import reference_of
from mechlens.studies.track.measures.snapshot import Labels, Snapshot, from_piece, to_piece
from mechlens.studies.track.result import Questions, Tracking, analysed, home_questions
from mechlens.studies.track.tables import transfer_table
from mechlens.studies.track.verdict import CHANGES, GAINS, TITLES, TrackVerdict, headline_of, settled_by, track_verdict

D, N, A = 24, 120, 4.0
PLAN = TrackPlan(max_new_tokens=4, steered=4, resamples=200, permutations=20)
PROMPTS = tuple(
    Prompt(f"{label}{i}", f"number {i} the thing", label, family=f"f{i}")
    for label in ("harmful", "harmless")
    for i in range(N)
)
LABELS = tuple(prompt.label for prompt in PROMPTS)
SIGN = torch.tensor([1.0 if label == "harmful" else -1.0 for label in LABELS])
U, W = torch.linalg.qr(torch.randn(D, 2, generator=torch.Generator().manual_seed(5))).Q.T
NOISE = torch.randn(2 * N, 2, 2, D, generator=torch.Generator().manual_seed(6))


def values(*, angle: float = 0.0, a: float = A, shift: float = 0.0) -> Tensor:
    """Two levels; level 0 says nothing. The classes lie `a` apart along U turned by `angle`, shifted along U."""
    line = math.cos(angle) * U + math.sin(angle) * W
    found = NOISE.clone()
    found[:, 1] += (a / 2 * SIGN[:, None] * line + shift * U)[:, None]
    return found


def planted(values: Tensor) -> Activations:
    found = activations(values, LABELS, tuple(prompt.group for prompt in PROMPTS))
    return replace(found, ids=tuple(prompt.id for prompt in PROMPTS))


def snapshot(step: int, values: Tensor, refuses: set[str]) -> Snapshot:
    texts = tuple("I cannot" if label in refuses else "Sure" for label in LABELS)
    ids = tuple(prompt.id for prompt in PROMPTS)
    acts = planted(values)
    tokens = tuple((7,) if text == "I cannot" else (8,) for text in texts)
    answers = Answers(ids, texts, tokens, 4, acts.checkpoint, acts.template, "plain")
    member = Member(f"checkpoint-{step}", "planted", "base" if step == 0 else "adapter", step)
    verdicts = verdicts_by(PHRASES, PROMPTS, answers.texts)
    return Snapshot(member, acts, answers, verdicts, SIGN.double(), torch.ones(3, dtype=torch.float64), {})


def floor(asked: list[HomeQuestion], split: Split) -> Floor:
    """Words and a network that say nothing of the class."""
    generator = torch.Generator().manual_seed(7)
    embeddings = torch.randn(N, D, generator=generator).repeat(2, 1)
    network = planted(torch.randn(NOISE.shape, generator=generator))
    texts = [prompt.text for prompt in PROMPTS]
    scores = {
        one.concept.name: surface_floor(one, texts, embeddings, embeddings)
        | {"random_blocks": network_floor(one, network)}
        for one in asked
    }
    return Floor(scores, {one.concept.name: random_grid(one.concept, network, split) for one in asked})


def analysed_from(base: Snapshot, *later: Snapshot) -> Tracking:
    split = split_by_family(LABELS, base.acts.families, fractions=(0.5, 0.2, 0.3), seed=0)
    tokenizer = tiny_tokenizer()
    reference = reference_of(PROMPTS, base.acts, base.answers, split, PLAN, tokenizer)
    questions = Questions(tokenize(PROMPTS, chat_template(tokenizer)), split, ("a", "b", "c"))
    under = floor(home_questions(reference, questions, PLAN.seed), split)
    return analysed([base, *later], [], reference, questions, PLAN, under)


def tracked(*later: tuple[Tensor, set[str]]) -> Tracking:
    base = snapshot(0, values(), {"harmful"})
    return analysed_from(base, *(snapshot(k, *one) for k, one in enumerate(later, start=1)))


HARMFUL: set[str] = {"harmful"}
SERIES = {
    "kept": (values() + 0.05 * NOISE.roll(1, 0), HARMFUL),
    "read-out drift": (values(angle=1.4), HARMFUL),
    "representation weakened": (values(a=1.0), HARMFUL),
    "representation lost": (NOISE, HARMFUL),
    "threshold drift": (values(shift=5.0), HARMFUL),
    "behaviour decoupled": (values(), set[str]()),
}


@pytest.fixture(scope="module")
def drifted() -> Tracking:
    return tracked(*SERIES.values())


def test_every_planted_drift_is_named(drifted: Tracking) -> None:
    require_shown(drifted)
    words = [verdict.word for verdict in drifted.verdicts if verdict.concept == "harmful"]
    assert words == list(SERIES)


def test_refusing_everything_is_decoupled_too_and_drift_is_named_beside_it() -> None:
    found = tracked((values(shift=5.0), {"harmful", "harmless"}))
    verdict = next(v for v in found.verdicts if v.concept == "harmful")
    assert (verdict.word, verdict.also) == ("behaviour decoupled", "threshold drift")
    assert "with threshold drift" in verdict.sentence


def test_a_concept_that_the_base_does_not_hold_is_not_measurable() -> None:
    found = analysed_from(snapshot(0, NOISE, HARMFUL), snapshot(1, values(), HARMFUL))
    assert {verdict.word for verdict in found.verdicts} == {"not measurable"}


HELD, WIDE, FELL = (Estimate(*bounds, 50) for bounds in ((0.0, -0.05, 0.05), (-0.1, -0.4, 0.2), (-0.3, -0.4, -0.2)))
AHEAD, LEVEL = Estimate(0.2, 0.1, 0.3, 50), Estimate(0.0, -0.04, 0.04, 50)
READ = ("own_change", "frozen_change", "probe_change")
SOUND = (
    dict.fromkeys((*CHANGES, "gap", "gap_change"), HELD)
    | dict.fromkeys((*GAINS, "base_gain"), AHEAD)
    | {"base_auroc": Estimate(0.9, 0.8, 0.95, 50)}
)
"""Numbers of a concept that is kept."""


def verdict_on(**other: Estimate | dict[str, Estimate]) -> TrackVerdict:
    changed = {name: value for name, value in other.items() if isinstance(value, Estimate)}
    verdict = track_verdict("x", 1, SOUND | changed | other.get("more", {}))
    require_short(str(headline_of([verdict, verdict])))
    return verdict


def word(**other: Estimate | dict[str, Estimate]) -> str:
    return verdict_on(**other).word


def test_wide_intervals_are_inconclusive() -> None:
    assert word() == "kept"
    for name in ("readout_gap", "threshold_gap"):
        assert word(**{name: WIDE}) == "inconclusive"
        assert verdict_on(**{name: WIDE}).decided == name
    assert word(gap_change=Estimate.missing(0)) == "inconclusive"
    assert word(more=dict.fromkeys(READ, WIDE)) == "inconclusive"
    for name in READ:  # two that fell and one that can't say
        assert word(more=dict.fromkeys(READ, FELL) | {name: WIDE}) == "inconclusive"
    assert word(own_change=FELL, probe_change=FELL) == "kept"
    assert word(own_change=FELL, frozen_change=FELL) == "read-out drift"


@pytest.mark.parametrize("under", GAINS)
def test_kept_needs_the_lower_bound_above_every_floor(under: str) -> None:
    gain = GAINS[under]
    for others in ({}, {"gap_change": Estimate(-0.9, -1.0, -0.8, 50)}, {"readout_gap": FELL}, {"threshold_gap": FELL}):
        assert word(more=others) not in ("inconclusive", "not above the words")
        assert word(more=others | {under: LEVEL}) == "not above the words"
        assert word(more=others | {under: Estimate(0.04, -0.01, 0.09, 50)}) == "inconclusive"
        assert word(more=others | {under: Estimate.missing(50)}) == "inconclusive"
    found = verdict_on(**{under: LEVEL})
    assert found.decided == under
    assert f"Decided by: {gain}: 0.000 [-0.040, 0.040], n=50." in found.sentence
    # In the base it was more than the words, and what is read has certainly fallen since.
    assert word(**{under: LEVEL, "probe_change": Estimate(-0.08, -0.12, -0.04, 50)}) == "representation lost"
    lower = {under: LEVEL, "probe_change": Estimate(-0.08, -0.12, -0.04, 50), "base_gain": LEVEL}
    assert word(more=lower) == "not above the words"
    assert word(more=dict.fromkeys(READ, FELL)) == "representation weakened"
    assert word(more=dict.fromkeys(READ, FELL) | {under: LEVEL}) == "representation lost"
    # Half of the base's smallest gain, .2, is the limit; where that is open, so is the verdict.
    for high, said in ((0.09, "representation lost"), (0.11, "inconclusive")):
        assert word(more=dict.fromkeys(READ, FELL) | {under: Estimate(0.02, -0.05, high, 50)}) == said
    assert verdict_on(more=dict.fromkeys(READ, FELL) | {under: WIDE}).decided == under


def test_what_would_settle_an_open_number_is_a_power_calculation() -> None:
    """A gain of g with half-width h over n prompts: its lower bound is above 0 in 80% of samples of n (1.43 h/g)^2."""
    found = verdict_on(**{"gain.tfidf": Estimate(0.05, -0.03, 0.13, 100)})
    assert found.word == "inconclusive"
    assert "about 530 prompts instead of 100" in found.settle
    generator = torch.Generator().manual_seed(0)
    spread = 0.08 / 1.96 * (100 / 530) ** 0.5
    drawn = 0.05 + spread * torch.randn(4000, generator=generator)
    assert float((drawn > 1.96 * spread).double().mean()) == pytest.approx(0.8, abs=0.03)
    assert "at least 10 families" in verdict_on(base_auroc=Estimate(0.9, 0.0, 1.0, 12)).settle
    assert "words carry less" in settled_by(Estimate(0.001, -0.1, 0.1, 50), 0.0)
    assert verdict_on().settle == verdict_on(base_auroc=Estimate(0.5, 0.4, 0.58, 50)).settle == ""


def test_answers_that_the_judge_can_t_tell_are_left_out_of_the_rates(drifted: Tracking) -> None:
    base, later = drifted.snapshots[0], drifted.snapshots[-1]
    concept = drifted.reference.concepts[0]
    few = tuple("unfinished" if k % 10 == 0 else verdict for k, verdict in enumerate(later.verdicts))
    gap, change = gaps(replace(later, verdicts=few), base, concept, seed=0, resamples=50)
    assert (gap.value, change.value, change.n) == (0.0, -1.0, 2 * N - 24)
    many = tuple("unclear" if k % 3 else verdict for k, verdict in enumerate(later.verdicts))
    gap, change = gaps(replace(later, verdicts=many), base, concept, seed=0, resamples=50)
    assert not gap.measurable
    assert not change.measurable
    table = behaviour_table([base, replace(later, verdicts=many)], drifted.reference, seed=0, resamples=50)
    rows = table[table["step"] == later.step].set_index("number")
    assert math.isnan(rows.loc["refusal_rate.harmful"]["value"])
    assert rows.loc["unclear_rate.harmful"]["value"] == pytest.approx(2 / 3, abs=0.01)


def test_prompts_chosen_by_the_base_s_answers_can_only_fall_and_the_words_say_so(drifted: Tracking) -> None:
    """As many prompts of each kind are refused as before, others: no change of behaviour is a fall all the same."""
    base = drifted.snapshots[0]
    concept = next(one for one in drifted.reference.concepts if one.name == "refused")
    here = [i for i, label in enumerate(concept.labels) if label == "refused"]
    there = [i for i, label in enumerate(concept.labels) if label == "accepted"]
    other = list(base.verdicts)
    for i, k in zip(here[:4], there[:4], strict=True):
        other[i], other[k] = other[k], other[i]
    gap, change = gaps(replace(base, verdicts=tuple(other)), base, concept, seed=0, resamples=50)
    assert change.value == pytest.approx(-4 / len(here) - 4 / len(there))
    assert gap.value == pytest.approx(1 + change.value)
    verdict = next(one for one in drifted.verdicts if one.concept == "refused")
    assert "whose answers chose the prompts" in verdict.title("gap_change")
    harmful = next(one for one in drifted.verdicts if one.concept == "harmful")
    assert harmful.title("gap_change") == TITLES["gap_change"]


def test_a_mean_difference_that_new_variation_spoils_is_no_lost_representation() -> None:
    # The classes lie apart along U as before; along W all prompts now vary so much that their mean difference is noise.
    much = values() + 40 * torch.randn(2 * N, 1, 1, 1, generator=torch.Generator().manual_seed(9)) * W
    found = tracked((much, HARMFUL))
    verdict = next(v for v in found.verdicts if v.concept == "harmful")
    assert verdict.deciding["own_change"].high < -0.1
    assert verdict.deciding["probe_change"].low > -0.1
    assert verdict.word in {"kept", "read-out drift"}


def large(angle: float, a: float, seed: int) -> tuple[Activations, Split]:
    generator = torch.Generator().manual_seed(seed)
    n = 6000
    sign = torch.tensor([1.0, -1.0]).repeat(n // 2)
    line = torch.tensor([math.cos(angle), math.sin(angle)] + [0.0] * 6)
    drawn = torch.randn(n, 1, 1, 8, generator=generator) + (a / 2 * sign[:, None] * line)[:, None, None]
    acts = activations(drawn, ("up", "down") * (n // 2), positions=("inst",), levels=(1,))
    third = n // 3
    split = Split(
        tuple(range(third)), tuple(range(third, third + 400)), tuple(range(third + 400, n)), (0.4, 0.1, 0.5), 0
    )
    return acts, split


@pytest.mark.parametrize("angle", [0.0, 0.5, 1.0, 1.5])
def test_auroc_under_rotation_follows_the_closed_form(angle: float) -> None:
    """A[s,t] = Phi(a cos(theta) / (sqrt2 sigma)), and A[t,t] unchanged."""
    a = 1.5
    before, split = large(0.0, a, 1)
    after, _ = large(angle, a, 2)
    frozen = fit_readouts(before, ("up", "down"), split, "direction")
    test = contrast_part(after, split.test, ("up", "down"))
    area = float(auroc(score_grid(test, frozen.lines), is_positive(test, ("up", "down")))[0, 0])
    assert area == pytest.approx(float(norm.cdf(a * math.cos(angle) / math.sqrt(2))), abs=0.025)
    own = fit_readouts(after, ("up", "down"), split, "direction")
    refitted = float(auroc(score_grid(test, own.lines), is_positive(test, ("up", "down")))[0, 0])
    assert refitted == pytest.approx(float(norm.cdf(a / math.sqrt(2))), abs=0.025)


def test_threshold_and_calibration_follow_theory() -> None:
    """At the frozen threshold accuracy is Phi(a/2); moved by m it is half of Phi(a/2 + m) + Phi(a/2 - m)."""
    a, move = 2.0, 1.5
    acts, split = large(0.0, a, 3)
    frozen = fit_readouts(acts, ("up", "down"), split, "direction")
    for shift in (0.0, move):
        moved = replace(acts, values=acts.values + shift * torch.eye(8)[0])
        test = contrast_part(moved, split.test, ("up", "down"))
        positive = is_positive(test, ("up", "down"))
        scores, everyone = score_grid(test, frozen.lines), torch.ones(1, len(test.ids), dtype=torch.float64)
        found = float(balanced_accuracy(scores, frozen.thresholds, positive, everyone))
        theory = float(norm.cdf(a / 2 + shift) + norm.cdf(a / 2 - shift)) / 2
        assert found == pytest.approx(theory, abs=0.03)
        error = float(brier(frozen.probability(scores), positive, everyone))
        assert (error < 0.13) == (shift == 0.0)


def test_transfer_is_that_of_the_planted_lines(drifted: Tracking) -> None:
    concept = drifted.reference.concepts[0]
    angles = (0.0, 0.7, 1.4)
    acts = [planted(values(angle=angle)) for angle in angles]
    table = transfer_table([0, 1, 2], acts, concept, drifted.questions.split)
    grid = table[table["position"] == "inst"].pivot(index="fitted", columns="tested", values="auroc").to_numpy()
    rows = torch.tensor(drifted.questions.split.test)
    for i, fitted in enumerate(angles):
        for j, found in enumerate(acts):
            line = math.cos(fitted) * U + math.sin(fitted) * W
            exact = float(auroc(found.at(1, "inst")[rows] @ line, SIGN[rows] > 0))
            assert grid[i, j] == pytest.approx(exact, abs=0.12)  # the noise of a line fitted on 60 prompts a side
    assert grid[0, 2] < grid[0, 1] < grid[0, 0]


def test_corrected_cosine_is_that_of_the_planted_lines(drifted: Tracking) -> None:
    table = drifted.angles
    here = table[(table["concept"] == "harmful") & (table["position"] == "inst") & (table["level"] == 1)]
    turned = here[(here["step"] == 2) & (here["other"] == "reference")].iloc[0]
    # The same noise in both checkpoints inflates the measured cosine, and not the corrected one.
    assert turned["corrected"] == pytest.approx(math.cos(1.4), abs=0.1)
    assert turned["cosine"] > turned["corrected"]
    shrunk = here[(here["step"] == 3) & (here["other"] == "reference")].iloc[0]
    assert shrunk["norm_ratio"] == pytest.approx(0.25, abs=0.15)
    assert set(here["to"]) == {0, 1, 2, 3, 4, 5}


def test_random_directions_stand_beside_every_number(drifted: Tracking) -> None:
    table = drifted.readouts
    assert (table["random_maximum"] >= table["random_mean"]).all()
    assert (table["random_mean"] >= 0.5 - 1e-9).all()
    assert table["random_blocks"].between(0.2, 0.8).all()  # a network that knows nothing
    home = table[(table["step"] == 0) & (table["level"] == 1) & (table["concept"] == "harmful")]
    assert (home["frozen"] > table["random_maximum"].median()).all()


def test_a_snapshot_survives_its_piece(drifted: Tracking) -> None:
    one = replace(drifted.snapshots[1], steered={"none": torch.zeros(3)}, matrices=({"module": "m", "norm": 1.0},))
    batch = drifted.questions.batch
    acts = one.acts
    labels = Labels(replace(batch, template=acts.template), acts.levels, acts.positions, 4)
    again = from_piece(to_piece(one), one.member, labels, None)
    assert torch.equal(again.acts.values, acts.values)
    assert (again.answers.texts, again.answers.tokens) == (one.answers.texts, one.answers.tokens)
    assert (again.acts.ids, again.acts.families, again.acts.checkpoint) == (acts.ids, acts.families, acts.checkpoint)
    assert (again.matrices, again.steered.keys()) == (one.matrices, one.steered.keys())


def test_low_rank_changes_have_the_svd_of_their_product() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(30, 3, generator=generator), torch.randn(3, 20, generator=generator)
    change = LowRank(up, down, 0.5)
    found, full = matrix_edit(change), matrix_edit(change.product())
    truth = torch.linalg.svdvals(change.product().double())
    for one in (found, full):
        assert one.norm == pytest.approx(float(truth.square().sum().sqrt()), rel=1e-5)
        assert one.stable_rank == pytest.approx(float(truth.square().sum() / truth[0] ** 2), rel=1e-4)
        assert torch.allclose(one.values[:3], truth[:3], rtol=1e-4)
        assert one.participation == pytest.approx(float(truth.square().sum() ** 2 / truth.pow(4).sum()), rel=1e-4)
        assert float((one.outputs[:, 0] @ full.outputs[:, 0]).abs()) == pytest.approx(1.0, abs=1e-4)
    rank_one = matrix_edit(LowRank(U[:, None].float(), W[None].float(), 2.0))
    assert rank_one.stable_rank == pytest.approx(1.0)
    assert float((rank_one.inputs[:, 0] @ W.double()).abs()) == pytest.approx(1.0, abs=1e-5)


def test_geometry_of_planted_paths(drifted: Tracking) -> None:
    path = tracked(*((values(angle=0.3 * k), HARMFUL) for k in (1, 2)), (values(angle=0.3), HARMFUL))
    tables = geometry_tables(path)
    turn = tables["turning"]
    here = turn[(turn["concept"] == "harmful") & (turn["position"] == "inst")]["turn"].tolist()
    assert here[0] == pytest.approx(-math.cos(0.3), abs=0.05)  # on along the circle
    assert here[1] == pytest.approx(1.0, abs=0.05)  # and back on its own way
    cka = tables["cka"].set_index(["step", "level", "position"])["cka"]
    assert cka[(0, 1, "inst")] == pytest.approx(1.0)
    assert cka[(2, 1, "inst")] < 1.0
    basis = torch.linalg.qr(torch.randn(D, 4, dtype=torch.float64)).Q
    assert overlap(basis, basis) == pytest.approx(1.0)
    assert float(tables["subspaces"]["overlap"].max()) <= 1.0 + 1e-9


def test_unbiased_cka_of_unrelated_and_of_rotated_data() -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randn(2, 64, 256, generator=generator)
    turn = torch.linalg.qr(torch.randn(256, 256, generator=generator)).Q
    assert unbiased_cka(one, 3 * one @ turn + 1) == pytest.approx(1.0, abs=1e-4)
    assert abs(unbiased_cka(one, other)) < 0.1  # the biased estimate would be 0.8
    assert math.isnan(unbiased_cka(one, torch.ones(64, 3)))
    constant = torch.full((63, 3), 0.1)  # its mean is not 0.1 to the last digit
    assert math.isnan(unbiased_cka(one[:63], constant))
