"""The verdict of the causal battery: a rule on its numbers, written out beside what it decided."""

from dataclasses import dataclass

from mechlens.methods.statistics.estimate import Estimate
from mechlens.studies.causal.study import MIN_AUROC, MIN_PARSED, Battery

SHOWN, NOT_SHOWN, INCONCLUSIVE = "dissociation shown", "dissociation not shown", "inconclusive"

RULE = (
    "A push adds a direction to harmless prompts and subtracts it from harmful ones; its effect is the mean change "
    "towards the other class. The reply inversion is measurable if at least "
    f"{MIN_PARSED:.0%} of the unsteered replies say one of the two words, and the unsteered difference of the words "
    f"tells harmful from harmless with a lower bound of AUROC above {MIN_AUROC}; where it isn't, or where too few "
    "refusals define the refusal direction, the verdict is inconclusive. dissociation shown: (1) the harmfulness "
    "direction before the question shifts the reply by more than chance, that is, its lower bound is above the largest "
    "random direction and its value above the largest direction of shuffled labels; (2) the refusal direction raises "
    "refusal by more than chance in the same sense; (3) in both scopes (before the question, and everywhere) the "
    "refusal direction's upper bound is below the harmfulness direction's lower bound, and its value is not above the "
    "largest random direction. dissociation not shown: an upper bound of (1) or (2) is at most the largest random "
    "direction; or in some scope the refusal direction shifts the reply as the harmfulness direction should: its lower "
    "bound is above the largest random direction, or not below the harmfulness direction's upper bound. inconclusive: "
    "everything else."
)


@dataclass(frozen=True)
class CausalVerdict:
    """Dissociation shown, not shown or inconclusive; with its reasons."""

    word: str
    sentence: str
    deciding: dict[str, Estimate]
    rule: str = RULE


def causal_verdict(result: Battery) -> CausalVerdict:
    """The verdict from the battery's metrics."""
    metrics = result.metrics()
    shifts = [f"inversion_shift.{name}.{scope}" for name in ("harmfulness", "refusal") for scope in ("before", "all")]
    named = [*shifts, "steer_refusal.refusal"]
    names = [*result.unsteered, *(part for name in named for part in (name, f"{name}.random_max"))]
    names += ["inversion_shift.harmfulness.before.shuffled_max", "steer_refusal.refusal.shuffled_max"]
    deciding = {name: metrics[name] for name in names}
    reasons = _against(metrics)
    if not result.measurable:
        word, sentence = INCONCLUSIVE, _unmeasurable(result)
    elif not all(metrics[name].measurable for name in named):
        missing = ", ".join(f"{n} of {name}" for name, n in _smallest(result).items())
        word, sentence = INCONCLUSIVE, f"Too few training prompts define a direction: {missing}."
    elif reasons:
        word, sentence = NOT_SHOWN, " ".join(reasons)
    elif _shown(metrics):
        word, sentence = SHOWN, _SHOWN_SENTENCE
    else:
        word, sentence = INCONCLUSIVE, "No condition is contradicted, but the intervals are too wide to meet them all."
    return CausalVerdict(word, sentence, deciding)


_SHOWN_SENTENCE = (
    "The harmfulness direction changes what the model says it believes about a request, by more than null "
    "directions do; the refusal direction changes whether it refuses, and doesn't change the belief in that way in "
    "either scope."
)


def _above_chance(metrics: dict[str, Estimate], name: str) -> bool:
    effect = metrics[name]
    # What isn't measurable is NaN, and no comparison with NaN holds.
    return effect.low > metrics[f"{name}.random_max"].value and effect.value > metrics[f"{name}.shuffled_max"].value


def _shown(metrics: dict[str, Estimate]) -> bool:
    apart = all(
        metrics[f"inversion_shift.refusal.{scope}"].high < metrics[f"inversion_shift.harmfulness.{scope}"].low
        and metrics[f"inversion_shift.refusal.{scope}"].value
        <= metrics[f"inversion_shift.refusal.{scope}.random_max"].value
        for scope in ("before", "all")
    )
    claims = ("inversion_shift.harmfulness.before", "steer_refusal.refusal")
    return apart and all(_above_chance(metrics, name) for name in claims)


def _against(metrics: dict[str, Estimate]) -> list[str]:
    """What contradicts the dissociation, in sentences."""
    reasons = []
    for name, words in (
        ("inversion_shift.harmfulness.before", "The harmfulness direction shifts the reply no more than chance does."),
        ("steer_refusal.refusal", "The refusal direction raises refusal no more than chance does."),
    ):
        if metrics[name].high <= metrics[f"{name}.random_max"].value:
            reasons.append(words)
    for scope, where in (("before", "before the question"), ("all", "everywhere")):
        refusal, harm = (metrics[f"inversion_shift.{name}.{scope}"] for name in ("refusal", "harmfulness"))
        chance = metrics[f"inversion_shift.refusal.{scope}.random_max"]
        if refusal.low > chance.value:
            reasons.append(f"Applied {where}, the refusal direction too shifts the reply towards harmful.")
        elif refusal.low >= harm.high:
            reasons.append(
                f"Applied {where}, the harmfulness direction shifts the reply no more than the refusal one does."
            )
    return reasons


def _unmeasurable(result: Battery) -> str:
    parsed, told = result.unsteered["inversion_parsed"], result.unsteered["inversion_auroc.unsteered"]
    return (
        f"Reply inversion is not measurable on this model: {parsed.value:.0%} of {parsed.n} unsteered replies say one "
        f"of the two words (needed: {MIN_PARSED:.0%}), and the AUROC of the unsteered difference is {told} (needed: "
        f"a lower bound above {MIN_AUROC})."
    )


def _smallest(result: Battery) -> dict[str, int]:
    return {name: min(result.counts[name]) for name in result.counts if name not in result.tested}
