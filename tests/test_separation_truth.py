"""The separation study on planted activations: the verdict is what was planted, and an empty quadrant is said."""

import math
from dataclasses import replace

import pytest
import torch
from planted import CHECKPOINT, TwoByTwo, planted_confounded, planted_two_by_two
from scipy.stats import norm
from tiny import tiny_tokenizer

from mechlens.methods.activations.activations import Activations
from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.behaviour.judges import RefusalTokens
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import split_by_family
from mechlens.prompts.templates.template import chat_template
from mechlens.settings import DetectionPlan
from mechlens.studies.separate import study as separation
from mechlens.studies.separate.config import SeparationPlan
from mechlens.studies.separate.geometry import measure_geometry
from mechlens.studies.separate.study import Separation
from mechlens.studies.separate.verdict import RULE, Verdict, separation_verdict
from mechlens.studies.shared.contrasts import Surface, measure
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
    split, note = separation._split(judged, PLAN)
    lengths = torch.tensor([len(text.split()) for text in words])
    surface = Surface(tuple(words), torch.randn(len(prompts), 8, generator=torch.Generator().manual_seed(1)), lengths)
    paired = set(acts.ids)
    contrasts = separation._contrasts(acts, judged, split, surface, paired, PLAN)
    harm = contrasts["harmful"].detection
    level = harm.at("inst").level if harm else 1
    refused = torch.tensor([float(flag) for flag in judged.refused])
    tokens = RefusalTokens((1,), ("I",), "fallback", None)
    return Separation(
        judged=judged,
        first_token=FirstTokenJudgement(tokens, refused, Estimate.missing(0)),
        split=split,
        split_note=note,
        contrasts=contrasts,
        geometry=measure_geometry(acts, judged.quadrants(), paired, level=level, seed=0),
        beliefs=measure_beliefs(acts, judged.quadrants(), split, 0, PLAN.resamples),
        refusal_rates={"full_template": mean_estimate(refused, acts.families, 0, 50)},
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


def test_two_planted_axes_are_separate(two_axes: Separation) -> None:
    verdict = separation_verdict(two_axes.metrics())
    assert verdict.word == "separate"
    assert verdict.rule == RULE
    assert verdict.deciding["harmful_auroc.inst.accepted"].low > 0.6
    assert verdict.deciding["cos_harm_refusal"].high < 0.7


def test_within_class_areas_match_theory() -> None:
    # Half of 100 prompts a quadrant train, so a within-class contrast has 50 a side.
    metrics = study(quadrants(n=100, strength=2.0, seed=1).acts).metrics()
    cosine = 2 / math.sqrt(4 + 2 * 48 / 50)
    theory = float(norm.cdf(2 * cosine / math.sqrt(2)))
    names = ("harmful_auroc.inst.accepted", "harmful_auroc.inst.refused")
    found = [metrics[name] for name in (*names, "refused_auroc.last.harmful", "refused_auroc.last.harmless")]
    assert sum(estimate.value for estimate in found) / 4 == pytest.approx(theory, abs=0.05)
    assert sum(estimate.low <= theory <= estimate.high for estimate in found) >= 3
    assert all(estimate.n == 60 for estimate in found)  # 30 test prompts in each of two quadrants


def test_each_factor_is_nowhere_but_at_its_own_position(two_axes: Separation) -> None:
    metrics = two_axes.metrics()
    for name in ("harmful_auroc.last", "refused_auroc.inst"):
        assert metrics[name].low < 0.6
        assert metrics[name].value == pytest.approx(0.5, abs=0.2)
    assert metrics["token_identity_auroc.inst"].low < 0.5 < metrics["token_identity_auroc.inst"].high
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


def test_one_shared_axis_is_not_separate() -> None:
    for seed in range(3):
        verdict = separation_verdict(study(quadrants(cosine=1.0, seed=seed).acts).metrics())
        assert verdict.word == "not separate"
        assert verdict.deciding["cos_harm_refusal"].low >= 0.7
        # It's the angle that says so: both can be read.
        assert verdict.deciding["harmful_auroc.inst.accepted"].low > 0.6


def test_a_label_that_follows_the_punctuation_is_explained_by_the_surface() -> None:
    for seed in range(3):
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
        assert verdict.word == "explained by the surface"
        # The within-class numbers alone look like harmfulness: this is what the baselines are for.
        assert metrics["harmful_auroc.inst.accepted"].low > 0.6
        assert metrics["token_identity_auroc.inst"].value == 1.0
        assert metrics["tfidf_auroc"].value == 1.0


def shuffled(acts: Activations, seed: int) -> Activations:
    order = torch.randperm(len(acts.ids), generator=torch.Generator().manual_seed(seed)).tolist()
    return replace(acts, labels=tuple(acts.labels[i] for i in order))


def test_shuffled_labels_are_inconclusive() -> None:
    words = [separation_verdict(study(shuffled(quadrants(n=40, seed=s).acts, s)).metrics()).word for s in range(8)]
    assert "separate" not in words
    assert "explained by the surface" not in words
    # An upper bound of chance is often below 0.6; that is no finding where nothing can be read.
    assert words.count("inconclusive") >= 7


def numbers(metrics: dict[str, Estimate]) -> list[float]:
    return [x for estimate in metrics.values() for x in (estimate.value, estimate.low, estimate.high)]


@pytest.mark.parametrize("empty", QUADRANTS)
def test_an_empty_quadrant_is_said_and_the_rest_is_measured(empty: str, two_axes: Separation) -> None:
    result = study(kept(quadrants().acts, **{empty: 0}))
    metrics = result.metrics()
    assert metrics.keys() == two_axes.metrics().keys()
    assert not any(math.isinf(x) for x in numbers(metrics))
    assert metrics[f"n.{empty}"].value == 0
    refused, harmful = empty.startswith("refused"), empty.endswith("_harmful")
    lacking = {
        f"harmful_auroc.inst.{'refused' if refused else 'accepted'}",
        f"refused_auroc.last.{'harmful' if harmful else 'harmless'}",
        "cos_harm_refusal.balanced",
    }
    for name in lacking:
        assert not metrics[name].measurable
        assert metrics[name].n == 0
        assert str(metrics[name]) == "not measurable, n=0"
    others = {"harmful_auroc.inst", "refused_auroc.last", "cos_harm_refusal.measured"}
    assert all(metrics[name].measurable for name in others)
    decides = {"harmful_auroc.inst.accepted", "refused_auroc.last.harmful"} & lacking
    word = separation_verdict(metrics).word
    # With one quadrant gone, refusal and harm go together: the plain cosine then holds part of both.
    assert (word == "not measurable") if decides else (word in ("separate", "inconclusive"))
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
    assert refused.counts == {"refused_harmful": refusals, "accepted_harmful": 100}
    assert verdict.deciding["refused_auroc.last.harmful"].n == refusals
    # What needs no refusal is as good as ever.
    assert metrics["harmful_auroc.inst"].low > 0.9
    assert metrics["harmful_auroc.inst.accepted"].low > 0.9
    assert not any(math.isinf(x) for x in numbers(metrics))
    assert result.beliefs.harm is None or refusals >= 9
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
    assert result.contrasts["refused"].counts["refused"] == sum(label.startswith("refused") for label in labels)
    assert separation_verdict(metrics).word in ("separate", "inconclusive")


def test_a_contrast_needs_prompts_in_every_part() -> None:
    acts = quadrants(n=20).acts
    sides = tuple(label.rpartition("_")[2] for label in acts.labels)
    split = split_by_family(sides, acts.families, fractions=(0.5, 0.2, 0.3), seed=0)
    surface = Surface(tuple("x" for _ in sides), torch.zeros(len(sides), 4), torch.ones(len(sides), dtype=torch.long))
    contrast, plan = ("harmful", "harmless"), DetectionPlan(resamples=20, permutations=5, random_directions=5)
    whole = measure("harmful", acts, sides, contrast, split, surface, plan)
    assert whole.detection is not None
    for part in ("train", "validation", "test"):
        few = [i for i in split.part(part) if sides[i] == "harmful"][2:]
        dropped = replace(split, **{part: tuple(i for i in split.part(part) if i not in few)})
        missing = measure("harmful", acts, sides, contrast, dropped, surface, plan)
        assert missing.detection is None
        assert (missing.auroc("inst").measurable, missing.auroc("inst").n) == (False, 40)
        assert missing.chosen().empty
        assert missing.table().empty


def test_the_sentence_says_what_is_contradicted_or_unread() -> None:
    chance = Estimate(0.5, 0.4, 0.6, 40)
    said = sentence_of(**{"refused_auroc.last.harmful": chance})
    assert "Refusal can't be read among harmful prompts." in said
    assert "harmfulness can't be read" not in said.lower()
    assert "The two directions are nearly one." in sentence_of(cos_harm_refusal=Estimate(0.9, 0.7, 1.1, 40))
    unread = sentence_of(**{"refused_auroc.last": chance, "refused_auroc.last.harmful": chance})
    assert "Over all prompts refusal at the last token can't be told from chance" in unread


def verdict_of(**changed: Estimate) -> str:
    return _verdict(changed).word


def sentence_of(**changed: Estimate) -> str:
    return _verdict(changed).sentence


def _verdict(changed: dict[str, Estimate]) -> Verdict:
    clear = Estimate(0.9, 0.8, 0.95, 40)
    metrics = {
        "harmful_auroc.inst.accepted": clear,
        "refused_auroc.last.harmful": clear,
        "cos_harm_refusal": Estimate(0.2, 0.0, 0.4, 40),
        "token_identity_auroc.inst": Estimate(0.5, 0.4, 0.6, 40),
        "harmful_auroc.inst": clear,
        "refused_auroc.last": clear,
    }
    return separation_verdict(metrics | changed)


def test_the_rule_is_the_one_that_is_stated() -> None:
    chance, vague, gone = Estimate(0.5, 0.4, 0.6, 40), Estimate(0.7, 0.55, 0.85, 40), Estimate.missing(4)
    assert verdict_of() == "separate"
    for name in ("harmful_auroc.inst.accepted", "refused_auroc.last.harmful"):
        assert verdict_of(**{name: vague}) == "inconclusive"
        assert verdict_of(**{name: chance}) == "not separate"
        assert verdict_of(**{name: gone}) == "not measurable"
        assert verdict_of(**{name: Estimate(0.7, 0.6, 0.8, 40)}) == "inconclusive"  # above, not at, 0.6
    assert verdict_of(cos_harm_refusal=Estimate(0.6, 0.5, 0.7, 40)) == "inconclusive"  # below, not at, 0.7
    assert verdict_of(cos_harm_refusal=Estimate(0.9, 0.7, 1.1, 40)) == "not separate"
    assert verdict_of(cos_harm_refusal=gone) == "inconclusive"  # a direction is noise
    # What is contradicted stays so, whatever else can't be measured.
    both = {"harmful_auroc.inst.accepted": chance, "refused_auroc.last.harmful": gone}
    assert verdict_of(**both) == "not separate"
    # Where nothing can be read, nothing can be one or two things.
    nothing = {"harmful_auroc.inst": chance, "refused_auroc.last": chance}
    assert verdict_of(**nothing, **{"harmful_auroc.inst.accepted": chance}) == "inconclusive"
    assert verdict_of(**nothing, **both) == "not measurable"
    # Nor where only one of them can: a refusal that can't be read isn't the same thing as harmfulness.
    unread = {"refused_auroc.last": chance, "refused_auroc.last.harmful": chance}
    assert verdict_of(**unread) == "inconclusive"
    assert verdict_of(**unread, cos_harm_refusal=Estimate(0.9, 0.7, 1.1, 40)) == "inconclusive"
    assert verdict_of(**{**nothing, "refused_auroc.last": vague}, **both) == "not measurable"
    surface = {"token_identity_auroc.inst": Estimate(0.85, 0.75, 0.92, 40)}
    assert verdict_of(**surface) == "explained by the surface"
    assert verdict_of(**surface, **both) == "explained by the surface"
    assert verdict_of(**{"token_identity_auroc.inst": Estimate(0.7, 0.65, 0.8, 40)}) == "separate"
    assert verdict_of(**{"token_identity_auroc.inst": gone}) == "separate"


def test_every_verdict_has_its_sentence_and_the_rule_names_it() -> None:
    for word in ("separate", "not separate", "explained by the surface", "inconclusive", "not measurable"):
        assert f"{word}:" in RULE
