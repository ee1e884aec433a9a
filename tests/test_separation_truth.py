"""The separation study on planted activations: the verdict is what was planted, and an empty quadrant is said."""

import math
from dataclasses import replace

import pytest
import torch
from planted import CHECKPOINT, TwoByTwo, planted_confounded, planted_two_by_two
from planted_worlds import analysed, world
from scipy.stats import norm
from sentence import require_short
from shown import require_shown
from tiny import tiny_tokenizer

from mechlens.methods.activations.activations import Activations
from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.behaviour.judges import RefusalTokens
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template
from mechlens.studies.separate import study as separation
from mechlens.studies.separate.analysis import analyse
from mechlens.studies.separate.config import SeparationPlan
from mechlens.studies.separate.geometry import measure_geometry
from mechlens.studies.separate.study import Separation, WithoutTemplate
from mechlens.studies.separate.verdict import (
    NO_SCALE,
    RULE,
    Verdict,
    _within_one_variable,
    on_a_scale,
    separation_verdict,
)
from mechlens.studies.shared.contrasts import Surface
from mechlens.studies.shared.quadrants import QUADRANTS, FirstTokenJudgement, JudgedAnswers
from mechlens.studies.shared.two_beliefs import measure_beliefs

PLAN = SeparationPlan(seed=0, max_new_tokens=1, resamples=200, permutations=20)
MATCHED = "do the thing"


def quadrants(*, n: int = 60, seed: int = 0, cosine: float = 0.0, strength: float = 4.0, d_model: int = 48) -> TwoByTwo:
    """Planted quadrants whose last words are drawn alike in all classes: level 0 at `inst` says nothing."""
    planted = planted_two_by_two(
        harm_separation=strength, refusal_separation=strength, n_per_cell=n, d_model=d_model, n_levels=3,
        cosine=cosine, seed=seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 77)
    words = torch.randn(5, d_model, generator=generator)
    values = planted.acts.values.clone()
    values[:, 0, 0] = words[torch.randint(5, (len(values),), generator=generator)]
    return replace(planted, acts=replace(planted.acts, values=values))


def study(acts: Activations, texts: tuple[str, ...] | None = None) -> Separation:
    """All that follows activations and verdicts; `acts` are labelled by quadrant ("unclear" where not judged)."""
    words = texts or tuple(f"{MATCHED} {i % 7}" for i in range(len(acts.ids)))
    prompts = [
        Prompt(own, text, label.rpartition("_")[2] or "harmful", family=family)
        for own, text, label, family in zip(acts.ids, words, acts.labels, acts.families, strict=True)
    ]
    verdicts = tuple(label.partition("_")[0] for label in acts.labels)
    prompts = [replace(p, label="harmless") if v == "unclear" else p for p, v in zip(prompts, verdicts, strict=True)]
    blank = Answers(acts.ids, ("",) * len(prompts), ((),) * len(prompts), 1, CHECKPOINT, acts.template, "plain")
    judged = JudgedAnswers(tuple(prompts), blank, {"planted": verdicts})
    lengths = torch.tensor([len(text.split()) for text in words])
    surface = Surface(tuple(words), torch.randn(len(prompts), 8, generator=torch.Generator().manual_seed(1)), lengths)
    paired = torch.ones(len(prompts), dtype=torch.bool)
    analysis = analyse(acts, judged.quadrants(), paired, [""] * len(prompts), surface, PLAN, fold_seeds=2, worlds=40)
    harm = analysis.harm.scores
    refused = torch.tensor([float(flag) for flag in judged.refused])
    tokens = RefusalTokens((1,), ("I",), "fallback", None)
    rate = {"full_template": mean_estimate(refused, acts.families, 0, 50)}
    return Separation(
        judged=judged,
        first_token=FirstTokenJudgement(tokens, refused, Estimate.missing(0)),
        analysis=analysis,
        within=separation._within(acts, analysis, [True] * len(prompts), surface, PLAN),
        geometry=measure_geometry(
            acts, judged.quadrants(), set(acts.ids), level=harm.level("inst") if harm else 1, seed=0
        ),
        beliefs=measure_beliefs(acts, judged.quadrants(), analysis.folds[0], 0, PLAN.resamples),
        without_template=WithoutTemplate(rate, Estimate.missing(0)),
        acts=acts,
        batch=tokenize(prompts[:1], chat_template(tiny_tokenizer())),
        plan=PLAN,
    )


def kept(acts: Activations, **limits: int) -> Activations:
    """At most so many prompts of the quadrants named."""
    seen = dict.fromkeys(QUADRANTS, 0)
    rows = []
    for i, label in enumerate(acts.labels):
        seen[label] += 1
        if seen[label] <= limits.get(label, len(acts.labels)):
            rows.append(i)
    return acts.select(rows)


@pytest.fixture(scope="module")
def two_axes() -> Separation:
    return study(quadrants().acts)


def test_two_planted_axes_are_two_variables(two_axes: Separation) -> None:
    verdict = separation_verdict(two_axes.metrics())
    assert verdict.word == "two variables"
    require_shown(two_axes, two_axes.batch)
    assert verdict.rule == RULE
    # Independent and well read: each gap is a whole distance of the poles.
    assert verdict.deciding["dissociation"].value == pytest.approx(4, abs=0.4)
    assert verdict.deciding["dissociation"].low > verdict.deciding["dissociation.one_variable_95"].value
    assert str(verdict.deciding["dissociation"]) in verdict.sentence
    assert "look both more harmful at the end of the instruction" in verdict.sentence


def test_within_class_areas_match_theory() -> None:
    # Four fifths of 100 prompts a quadrant fit, so a within-class contrast has 80 a side.
    result = study(quadrants(n=100, strength=2.0, seed=1).acts)
    cosine = 2 / math.sqrt(4 + 2 * 48 / 80)
    theory = float(norm.cdf(2 * cosine / math.sqrt(2)))
    places = {"harmful.accepted": "inst", "harmful.refused": "inst", "refused.harmful": "last"}
    found = [result.within[name].auroc(place) for name, place in places.items()]
    assert sum(estimate.value for estimate in found) / 3 == pytest.approx(theory, abs=0.05)
    assert sum(estimate.low <= theory <= estimate.high for estimate in found) >= 2
    assert all(estimate.n == 200 for estimate in found)  # every prompt of two quadrants, once
    # The direction of all prompts is fitted to twice as many.
    cosine = 2 / math.sqrt(4 + 2 * 48 / 160)
    whole = result.metrics()["harmful_auroc.inst.accepted"]
    assert whole.low <= float(norm.cdf(2 * cosine / math.sqrt(2))) <= whole.high


def test_each_factor_is_nowhere_but_at_its_own_position(two_axes: Separation) -> None:
    metrics = two_axes.metrics()
    for name in ("harmful_auroc.last", "refused_auroc.inst"):
        assert metrics[name].low < 0.5
        assert metrics[name].value == pytest.approx(0.5, abs=0.12)
    assert metrics["token_identity_auroc.inst"].value == pytest.approx(0.5, abs=0.1)
    assert metrics["token_identity_auroc.last"].value == 0.5


def test_all_four_quadrants_lie_where_theory_puts_them(two_axes: Separation) -> None:
    metrics = two_axes.metrics()
    for variant in ("", ".centered"):
        for quadrant in QUADRANTS:
            refused, harmful = quadrant.startswith("refused"), quadrant.endswith("_harmful")
            for belief, positive in (("belief_harm", harmful), ("belief_refusal", refused)):
                estimate = metrics[f"{belief}.{quadrant}{variant}"]
                assert (estimate.low > 0) if positive else (estimate.high < 0), (belief, quadrant, variant)
    # The factors were planted independently, so the beliefs don't go together.
    assert abs(metrics["belief_correlation.pearson"].value) < 0.35


@pytest.mark.parametrize("true_cosine", [0.0, 0.5, 1.0])
def test_cosines_and_main_effects_match_theory(true_cosine: float) -> None:
    planted = quadrants(cosine=true_cosine, seed=2)
    acts = planted.acts
    found = measure_geometry(acts, acts.labels, set(acts.ids), level=1, seed=0)
    assert found.balanced is not None
    for curve in (found.directions, found.balanced):
        for level in (1, 2):
            assert curve.corrected[level].low <= true_cosine <= curve.corrected[level].high
            assert curve.corrected[level].value == pytest.approx(true_cosine, abs=0.2)
    # Main effects have the planted length, the interaction that of noise: sqrt(d) / sqrt(4 * 60) * 2.
    noise = math.sqrt(48 * 4 / 240)
    frame = found.interaction[found.interaction["level"] == 1].set_index(["position", "effect"])["norm"]
    assert frame["inst", "harm"] == pytest.approx(math.hypot(4, noise), rel=0.1)
    assert frame["last", "refusal"] == pytest.approx(math.hypot(4, noise), rel=0.1)
    for cell in (("inst", "interaction"), ("inst", "refusal"), ("last", "interaction"), ("last", "harm")):
        assert frame[cell] == pytest.approx(noise, rel=0.4)


def test_along_one_axis_two_variables_stay_two() -> None:
    # A cosine says nothing about the number of variables: attention rotates an axis, and may rotate two onto one.
    for seed in range(2):
        verdict = separation_verdict(study(quadrants(cosine=1.0, seed=seed).acts).metrics())
        assert verdict.word == "two variables"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["one variable", "thresholds by topic"])
def test_one_variable_along_two_axes_is_never_two(kind: str, seed: int) -> None:
    analysis = analysed(world(kind, n=608, seed=seed))
    metrics = analysis.metrics()
    assert separation_verdict(metrics).word in ("one variable suffices", "inconclusive")
    assert metrics["dissociation"].value < 0.5
    # What the study called "separate" before: both are read inside the other's class, and the axes differ.
    assert metrics["harmful_auroc.inst.accepted"].low > 0.6
    assert metrics["refused_auroc.last.harmful"].low > 0.6


def test_thresholds_that_differ_between_topics_are_no_second_variable_of_their_own() -> None:
    metrics = analysed(world("thresholds by topic", n=608, seed=4)).metrics()
    assert metrics["dissociation.over_topics"].low > 0  # what they would look like
    assert metrics["dissociation"].low < 0 < metrics["dissociation"].high


@pytest.mark.parametrize("seed", range(2))
def test_two_correlated_variables_are_two(seed: int) -> None:
    metrics = analysed(world("two variables", n=608, correlation=0.5, seed=seed)).metrics()
    verdict = separation_verdict(metrics)
    assert verdict.word == "two variables"
    assert metrics["dissociation.harm_gap"].value > 0 > metrics["dissociation.refusal_gap"].value
    # Erasing the one leaves the other, as one variable would not.
    assert metrics["erase_refusal.inst.p"].value < 0.05


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["one variable, its decision at last", "one variable, saturating at last"])
def test_one_variable_read_otherwise_is_not_two(kind: str, seed: int) -> None:
    """Worlds that reach a D of 1 and more with one variable: what shows it is the signs of the gaps."""
    metrics = analysed(world(kind, n=608, seed=seed, signal=4.0)).metrics()
    assert separation_verdict(metrics).word != "two variables"
    assert metrics["dissociation.harm_gap"].value < 0
    assert metrics["dissociation.refusal_gap"].value < 0


@pytest.mark.parametrize("seed", range(2))
def test_what_the_words_make_of_the_dissociation_is_taken_out(seed: int) -> None:
    """As far as the baselines read the word; how often the rest is taken for a variable stands in the README."""
    word = analysed(world("one variable and a word", n=608, seed=seed)).metrics()
    assert word["dissociation.beyond_words"].value < 0.85 * word["dissociation"].value
    two = analysed(world("two variables", n=608, correlation=0.5, seed=seed)).metrics()
    assert two["dissociation.beyond_words"].value > 0.95 * two["dissociation"].value


def test_two_variables_in_swapped_places_are_not_one() -> None:
    metrics = analysed(world("two variables, swapped", n=608, correlation=0.5, seed=0)).metrics()
    assert metrics["dissociation"].high < -0.5
    assert separation_verdict(metrics).word == "inconclusive"


@pytest.mark.parametrize("seed", range(2))
def test_what_the_words_tell_is_explained_by_the_words(seed: int) -> None:
    metrics = analysed(world("words only", n=608, seed=seed)).metrics()
    assert metrics["dissociation"].low > 0  # two kinds of words make two variables
    assert metrics["harmful_auroc.inst"].low > 0.8
    assert separation_verdict(metrics).word == "explained by the words"


def test_a_model_that_refuses_everything_harmful_is_said_what_it_needs() -> None:
    for rate in (0.98, 1.0):
        planted = world("two variables", n=608, refusal_rate=rate, seed=1)
        metrics = analysed(planted).metrics()
        n = int(metrics["n.accepted_harmful"].value)
        verdict = separation_verdict(metrics)
        assert verdict.word == "not measurable"
        assert f"{n} of 192 harmful prompts are accepted" in verdict.sentence
        wanted = "of another kind are needed, such as looks-harmless" if n == 0 else "more of this kind would do"
        assert wanted in verdict.sentence
        assert metrics["harmful_auroc.inst"].low > 0.7  # what needs no such prompt is as good as ever


def test_units_and_rotations_of_the_residual_stream_change_nothing() -> None:
    planted = world("two variables", n=300, correlation=0.3, seed=2)
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    turned = (7 * planted.acts.values.double() @ turn).float()
    first, second = (
        analysed(replace(planted, acts=replace(planted.acts, values=values)), resamples=100).metrics()
        for values in (planted.acts.values, turned)
    )
    for name in ("dissociation", "dissociation.harm_gap", "harmful_auroc.inst", "refused_gain.harmful"):
        assert first[name].value == pytest.approx(second[name].value, abs=1e-3), name


def test_a_label_that_follows_the_punctuation_is_explained_by_the_surface() -> None:
    for seed in range(2):
        acts = planted_confounded(n_per_class=80, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        refused = torch.rand(160, generator=generator) < 0.5
        labels = tuple(
            ("refused_" if flag else "accepted_") + label for flag, label in zip(refused, acts.labels, strict=True)
        )
        texts = tuple(f"{MATCHED} {i // 2}" + ("?" if i % 2 == 0 else ".") for i in range(160))
        result = study(replace(acts, labels=labels), texts)
        metrics = result.metrics()
        verdict = separation_verdict(metrics)
        assert verdict.word == "explained by the words"
        # The within-class numbers alone look like harmfulness: this is what the baselines are for.
        assert metrics["harmful_auroc.inst.accepted"].low > 0.6
        assert metrics["token_identity_auroc.inst"].value == 1.0
        assert metrics["tfidf_auroc"].value == 1.0
        assert metrics["harmful_gain.accepted"].high <= 0.02


def shuffled(acts: Activations, seed: int) -> Activations:
    order = torch.randperm(len(acts.ids), generator=torch.Generator().manual_seed(seed)).tolist()
    return replace(acts, labels=tuple(acts.labels[i] for i in order))


def test_shuffled_labels_are_inconclusive() -> None:
    words = [separation_verdict(study(shuffled(quadrants(n=40, seed=s).acts, s)).metrics()).word for s in range(4)]
    assert "two variables" not in words
    assert "one variable suffices" not in words
    # Where nothing is read, the words can't be said to explain it, save that their chance AUROC comes out higher.
    assert words.count("inconclusive") >= 3


def numbers(metrics: dict[str, Estimate]) -> list[float]:
    return [x for estimate in metrics.values() for x in (estimate.value, estimate.low, estimate.high)]


@pytest.mark.parametrize("empty", QUADRANTS)
def test_an_empty_quadrant_is_said_and_the_rest_is_measured(empty: str, two_axes: Separation) -> None:
    result = study(kept(quadrants().acts, **{empty: 0}))
    metrics = result.metrics()
    assert metrics.keys() == two_axes.metrics().keys()
    assert not any(math.isinf(x) for x in numbers(metrics))
    assert metrics[f"n.{empty}"].value == 0
    assert not metrics["dissociation"].measurable
    assert not metrics["cos_harm_refusal.balanced"].measurable
    refused, harmful = empty.startswith("refused"), empty.endswith("_harmful")
    lacking = {
        f"harmful_auroc.inst.{'refused' if refused else 'accepted'}",
        f"refused_auroc.last.{'harmful' if harmful else 'harmless'}",
    }
    for name in lacking:
        assert not metrics[name].measurable
        assert metrics[name].n == 0
        assert str(metrics[name]) == "not measurable, n=0"
    others = {"harmful_auroc.inst", "refused_auroc.last", "cos_harm_refusal.measured"}
    assert all(metrics[name].measurable for name in others)
    assert separation_verdict(metrics).word == "not measurable"
    # Everything that a report shows can be made.
    for frame in (result.table(), result.chosen(), result.baselines(), result.geometry.table(), result.judged.counts()):
        assert not frame.empty
    assert not result.table().drop(columns=["contrast", "position"]).isin([math.inf, -math.inf]).any().any()


@pytest.mark.parametrize("refusals", [0, 1, 3, 6, 9])
def test_few_refusals_as_on_a_model_that_hardly_refuses(refusals: int) -> None:
    # SmolLM2 refuses 3% of harmful prompts and no harmless one.
    acts = kept(quadrants(n=100, seed=3).acts, refused_harmful=refusals, refused_harmless=0)
    result = study(acts)
    metrics = result.metrics()
    verdict = separation_verdict(metrics)
    assert verdict.word == "not measurable"
    assert metrics["n.refused_harmful"].value == refusals
    refused = result.contrasts["refused.harmful"]
    assert refused.question.counts() == {"refused_harmful": refusals, "accepted_harmful": 100}
    assert f"{refusals} of {100 + refusals} harmful prompts are refused" in verdict.sentence
    # What needs no refusal is as good as ever.
    assert metrics["harmful_auroc.inst"].low > 0.9
    assert metrics["harmful_auroc.inst.accepted"].low > 0.9
    assert not any(math.isinf(x) for x in numbers(metrics))
    assert result.beliefs.harm is None or refusals >= 6
    for name in ("belief_harm", "belief_refusal"):
        assert not metrics[f"{name}.refused_harmless"].measurable


@pytest.mark.parametrize("quadrant", QUADRANTS)
def test_a_tiny_quadrant_never_makes_a_claim(quadrant: str) -> None:
    for n in (1, 4, 9):
        acts = kept(quadrants(n=30, seed=n).acts, **{quadrant: n})
        metrics = study(acts).metrics()
        assert not any(math.isinf(x) for x in numbers(metrics))
        for name in ("harmful_auroc.inst.accepted", "refused_auroc.last.harmful"):
            assert metrics[name].measurable or metrics[name].n == n
        assert not metrics["cos_harm_refusal.balanced"].measurable
        assert metrics["cos_harm_refusal.balanced"].n == n


def test_prompts_that_no_judge_could_place_are_left_out() -> None:
    acts = quadrants(n=30).acts
    labels = tuple("unclear" if i % 10 == 0 else label for i, label in enumerate(acts.labels))
    result = study(replace(acts, labels=labels))
    metrics = result.metrics()
    assert sum(metrics[f"n.{name}"].value for name in QUADRANTS) == labels.count("accepted_harmful") + sum(
        labels.count(name) for name in QUADRANTS if name != "accepted_harmful"
    )
    assert result.contrasts["refused"].question.counts()["refused"] == sum(
        label.startswith("refused") for label in labels
    )
    assert separation_verdict(metrics).word == "two variables"


CLEAR = {
    "dissociation": Estimate(2.0, 1.5, 2.5, 80),
    "dissociation.one_variable_95": Estimate.exact(0.4, 600),
    "dissociation.harm_gap": Estimate(1.0, 0.7, 1.3, 80),
    "dissociation.refusal_gap": Estimate(-1.0, -1.3, -0.7, 80),
    "dissociation.beyond_words": Estimate(1.8, 1.3, 2.3, 80),
    "harmful_auroc.inst.accepted": Estimate(0.8, 0.7, 0.9, 80),
    "harmful_gain.accepted": Estimate(0.2, 0.1, 0.3, 80),
    "harmful_gain": Estimate(0.2, 0.1, 0.3, 300),
    "refused_auroc.last.harmful": Estimate(0.8, 0.7, 0.9, 80),
    "refused_gain.harmful": Estimate(0.2, 0.1, 0.3, 80),
    "harmful_auroc.inst": Estimate(0.9, 0.8, 0.95, 300),
    "refused_auroc.last": Estimate(0.9, 0.8, 0.95, 300),
    **{f"n.{name}": Estimate.exact(40, 160) for name in QUADRANTS},
}


def verdict_of(**changed: Estimate) -> Verdict:
    verdict = separation_verdict(CLEAR | changed)
    require_short(str(verdict.headline))
    return verdict


def test_no_number_is_read_off_a_scale_that_noise_sets() -> None:
    wild = Estimate(-5.5, -116.0, 81.0, 39)
    assert not on_a_scale(wild).measurable
    assert on_a_scale(CLEAR["dissociation"]) == CLEAR["dissociation"]
    said = verdict_of(dissociation=wild)
    assert said.word == "inconclusive"
    assert "116" not in str(said.headline)
    assert NO_SCALE in str(said.headline)


def test_the_rule_is_the_one_that_is_stated() -> None:
    gone = Estimate.missing(4)
    assert verdict_of().word == "two variables"
    small = Estimate(0.1, -0.2, 0.4, 80)
    assert verdict_of(dissociation=small).word == "one variable suffices"
    assert verdict_of(dissociation=Estimate(0.1, -0.3, 0.5, 80)).word == "inconclusive"  # below, not at, 0.5
    assert verdict_of(dissociation=Estimate(1.0, 0.0, 2.0, 80)).word == "inconclusive"  # above, not at, 0
    # Far below 0 is as far from one variable as far above.
    swapped = verdict_of(dissociation=Estimate(-3.0, -4.0, -2.0, 80))
    assert swapped.word == "inconclusive"
    assert "clearly below 0" in swapped.sentence
    assert verdict_of(dissociation=Estimate(-0.4, -0.9, 0.1, 80)).word == "one variable suffices"
    worded = verdict_of(**{"dissociation.beyond_words": Estimate(0.3, -0.1, 0.7, 80)})
    assert worded.word == "inconclusive"
    assert (
        "once the words are taken out of both readings it isn't clearly above 0: 0.30 [-0.10, 0.70]" in worded.sentence
    )
    # D may be above 0 and yet what one variable gives in such data.
    null = {"dissociation.one_variable_95": Estimate.exact(2.1, 600), "dissociation.p": Estimate.exact(0.07, 600)}
    verdict = verdict_of(**null)
    assert verdict.word == "inconclusive"
    # A spread of 2.1 / 1.64 must shrink until 2.48 of it are 2.0: (2.48 / 1.64 * 2.1 / 2.0)^2.
    assert "reaches it in 7% of worlds (95% of them stay below 2.10)" in verdict.sentence
    assert "about 2.5 times as many prompts would settle it" in verdict.sentence
    for name in ("harmful_auroc.inst.accepted", "refused_auroc.last.harmful"):
        verdict = verdict_of(**{name: Estimate(0.6, 0.5, 0.7, 80)})
        assert verdict.word == "inconclusive"
        assert "0.60 [0.50, 0.70]" in verdict.sentence
        assert "times as many prompts would settle it" in verdict.sentence
    for name in ("harmful_gain.accepted", "refused_gain.harmful"):
        assert verdict_of(**{name: Estimate(0.1, 0.0, 0.2, 80)}).word == "inconclusive"
    # The words come before everything else, also where D can't be measured.
    words = {"harmful_gain.accepted": Estimate(-0.1, -0.2, 0.02, 80)}
    assert verdict_of(**words).word == "explained by the words"
    assert verdict_of(**words, dissociation=small).word == "explained by the words"
    whole = {"harmful_gain.accepted": gone, "harmful_gain": Estimate(0.0, -0.01, 0.01, 300)}
    assert verdict_of(**whole, dissociation=gone).word == "explained by the words"
    # Where one can't be read at all, a small D says nothing.
    for name in ("harmful_auroc.inst", "refused_auroc.last"):
        verdict = verdict_of(**{name: Estimate(0.5, 0.4, 0.6, 300)}, dissociation=small)
        assert verdict.word == "inconclusive"
        assert "can't be told from chance" in verdict.sentence


@pytest.mark.parametrize(
    ("harm", "refusal", "said"),
    [
        (0.0, -1.5, "less refused at the last token (by -1.50 [-2.00, -1.00], n=80) but not clearly more harmful"),
        (1.5, 0.0, "more harmful at the end of the instruction (by 1.50 [1.00, 2.00], n=80) but not clearly less"),
        (
            0.2,
            -0.2,
            "look not clearly more harmful at the end of the instruction (by 0.20 [-0.30, 0.70], n=80) and not",
        ),
        (-1.5, -3.0, "less refused at the last token (by -3.00 [-3.50, -2.50], n=80) but not clearly more harmful"),
    ],
)
def test_both_gaps_must_have_their_sign(harm: float, refusal: float, said: str) -> None:
    gaps = {
        f"dissociation.{name}_gap": Estimate(value, value - 0.5, value + 0.5, 80)
        for name, value in (("harm", harm), ("refusal", refusal))
    }
    verdict = verdict_of(**gaps)
    assert verdict.word == "inconclusive"
    assert said in verdict.sentence
    assert ("about 13 times as many prompts" in verdict.sentence) == (harm == 0.2)  # (2.8 * 0.255 / 0.2)^2


def test_what_would_settle_it_is_said_in_numbers() -> None:
    # 80 of 400 accepted: 6 more for 10 of each needs five times as many prompts each.
    few = {"n.accepted_harmful": Estimate.exact(4, 600), "n.refused_harmful": Estimate.exact(196, 600)}
    verdict = verdict_of(dissociation=Estimate.missing(4), **few)
    assert verdict.word == "not measurable"
    assert "4 of 200 harmful prompts are accepted: about 300 more of this kind would do" in verdict.sentence.lower()
    # An interval of +-0.392 has a standard error of 0.2; 2.8 of it for a distance of 0.3 need (0.56 / 0.3)^2 as many.
    verdict = verdict_of(dissociation=Estimate(0.3, -0.092, 0.692, 80))
    assert verdict.word == "inconclusive"
    assert "about 100 more accepted harmful prompts (now 40)" in verdict.sentence
    # What nobody would collect is not asked for.
    verdict = verdict_of(dissociation=Estimate(0.25, -20.0, 20.5, 80))
    assert "would hardly help" in verdict.sentence


@pytest.mark.parametrize(
    ("empty", "kind"),
    [
        ("accepted_harmful", "looks-harmless, which are accepted"),
        ("refused_harmless", "looks-harmful, which are refused"),
        ("refused_harmful", "plainly harmful ones, which are refused"),
        ("accepted_harmless", "plainly harmless ones, which are accepted"),
    ],
)
def test_prompts_that_would_fill_an_empty_quadrant_are_of_the_kind_that_lands_there(empty: str, kind: str) -> None:
    verdict = verdict_of(dissociation=Estimate.missing(0), **{f"n.{empty}": Estimate.exact(0, 160)})
    assert f"of another kind are needed, such as {kind} more often" in verdict.sentence


def test_the_rule_names_every_verdict() -> None:
    words = ("two variables", "one variable suffices", "explained by the words", "inconclusive", "not measurable")
    assert all(f"- {word.capitalize()}:" in RULE for word in words)


def test_where_one_variable_reaches_more_than_two_could_no_number_of_times_is_named() -> None:
    """Few prompts: 7.8 to beat on a scale up to 4 was once about to be settled by 126.5 times as many."""
    told = ((7.8, "So few prompts can't decide"), (2.0, "about 9.1 times as many"), (3.0, "about 21 times as many"))
    for null, said in told:
        found = {
            "dissociation": Estimate(1.0, 0.4, 1.6, 40),
            "dissociation.p": Estimate(0.3, 0.2, 0.4, 40),
            "dissociation.one_variable_95": Estimate(null, null, null, 40),
        }  # fmt: skip
        headline, verdict = _within_one_variable(found)
        assert said in verdict
        assert said.casefold() in str(headline).casefold()
