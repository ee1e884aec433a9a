"""What a selection found, in words, by a fixed rule."""

import math
from dataclasses import dataclass
from typing import Literal

from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.candidates import KEPT
from mechlens.runs.headline import Headline
from mechlens.runs.shown_verdict import ShownVerdict
from mechlens.settings import FRACTIONS
from mechlens.studies.select.study import Selection


@dataclass(frozen=True, repr=False)
class SelectionVerdict(ShownVerdict):
    """The word, a sentence with the numbers, the numbers that decide, and the rule.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> plan = ml.SelectionPlan(resamples=50, random_directions=2, max_new_tokens=4)
    >>> found = ml.select_direction(model, harmful, harmless, plan)
    >>> ml.selection_verdict(found).sentence != ""
    True
    """

    headline: Headline
    """Of "controls refusal", "controls refusal in part", "no better than chance", "inconclusive", "none selected"; the
    first two may end in ", with side effects".
    """
    sentence: str
    deciding: dict[str, Estimate]
    rule: str

    @property
    def word(self) -> str:
        """The verdict in a word or a few."""
        return self.headline.verdict


RULE = (
    "Decided on test prompts, by two claims:\n\n"
    "- The direction bypasses refusal where taking it out lowers the mean refusal score of "
    "harmful prompts (upper bound of the shift below 0), and lowers it further than does whichever does most of the "
    "random directions of the same length and the best of as many random candidates (upper bound of the paired "
    "difference below 0).\n\n"
    "- It induces refusal where adding it raises the score of harmless prompts in the same way "
    "(lower bounds above 0).\n\n"
    "A claim fails where the whole interval of one of its two numbers lies on the other side.\n\n"
    "- Controls refusal: both hold. In part: one does.\n\n"
    "- No better than chance: both fail.\n\n"
    "- Inconclusive: neither holds, and intervals leave one open.\n\n"
    "- With side effects: taking the direction out changes harmless test prompts by more than the filter allows (lower "
    "bound of the KL above the limit)."
)
TOO_MANY = 20
"""More prompts than so many times those at hand settle nothing that anybody would collect."""


def selection_verdict(result: Selection) -> SelectionVerdict:
    """The verdict of a selection; with no candidate let through it names the filters with their counts.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> plan = ml.SelectionPlan(resamples=50, random_directions=2, max_new_tokens=4)
    >>> found = ml.select_direction(model, harmful, harmless, plan)
    >>> ml.selection_verdict(found).sentence != ""
    True
    """
    counts = result.found.filtered.counts()
    if result.test is None:
        dropped = ", ".join(f"{n} by {name}" for name, n in counts.items() if n and name != KEPT)
        headline = Headline("none selected", f"of {sum(counts.values())} candidates all were dropped", f"({dropped})")
        sentence = f"None of {sum(counts.values())} candidates was let through: dropped {dropped}."
        return SelectionVerdict(headline, sentence, {}, RULE)
    metrics = result.test.metrics()
    outcomes = {name: _outcome(metrics, name, sign) for name, sign in SHIFTS.items()}
    side_effects = metrics[KL].low > result.plan.highest_kl
    word = _word(list(outcomes.values()))
    word += ", with side effects" if side_effects and word.startswith("controls") else ""
    chosen = result.test.chosen
    silent = [f"{metrics[name].brief} with it {how}" for name, how in SILENT.items() if metrics[name].value > 0]
    said = {
        name: {"met": does, "failed": f"doesn't {verb}", "open": f"isn't shown to {verb}"}[outcomes[name]]
        for name, does, verb in (("bypass_shift", "bypasses", "bypass"), ("induce_shift", "induces", "induce"))
    }
    settle, settles = _settles(metrics, [name for name, outcome in outcomes.items() if outcome == "open"])
    return SelectionVerdict(
        Headline(word, *_deciding(metrics, outcomes, result.plan.highest_kl), settle),
        f"The direction at {chosen.position}, level {chosen.level} ({counts[KEPT]} of {sum(counts.values())} "
        f"candidates passed the filters), {said['bypass_shift']} refusal and {said['induce_shift']} it, on "
        f"{metrics['refusal_score.harmful'].n} harmful and {metrics['refusal_score.harmless'].n} harmless test "
        f"prompts. {_acted(metrics)} {_side_effect(result, metrics[KL])}"
        + (f" Empty answers, which are no refusals: {', '.join(silent)}." if silent else "")
        + settles,
        {name: metrics[name] for name in DECIDING},
        RULE,
    )


Outcome = Literal["met", "failed", "open"]
SHIFTS = {"bypass_shift": -1.0, "induce_shift": 1.0}
"""What is claimed, and the side of 0 that the claim is on."""


def _outcome(metrics: dict[str, Estimate], name: str, sign: float) -> Outcome:
    """Whether the score is moved, and further than by chance."""
    both = (metrics[name], metrics[f"{name}.beyond_chance"])
    least = [one.low if sign > 0 else -one.high for one in both]
    most = [one.high if sign > 0 else -one.low for one in both]
    return "met" if min(least) > 0 else "failed" if min(most) <= 0 else "open"


def _word(outcomes: list[Outcome]) -> str:
    if "met" in outcomes:
        return "controls refusal" if outcomes == ["met", "met"] else "controls refusal in part"
    return "inconclusive" if "open" in outcomes else "no better than chance"


def _acted(metrics: dict[str, Estimate]) -> str:
    """What taking the direction out and adding it does on test prompts."""
    m = {name: estimate.brief for name, estimate in metrics.items()}
    return (
        f"Taken out, harmful prompts go from a refusal score of {m['refusal_score.harmful']} to "
        f"{m['refusal_score.harmful.ablated']}, a difference of {m['bypass_shift.beyond_chance']} from the best "
        f"of random (below 0: refuses less), and {m['refusal_rate.harmful.ablated']} of them are refused instead of "
        f"{m['refusal_rate.harmful']}. Added, harmless ones go from {m['refusal_score.harmless']} to "
        f"{m['refusal_score.harmless.added']}, a difference of {m['induce_shift.beyond_chance']} from the best "
        f"of random (above 0: refuses more), and {m['refusal_rate.harmless.added']} of them are refused instead of "
        f"{m['refusal_rate.harmless']}."
    )


def _side_effect(result: Selection, kl: Estimate) -> str:
    """What taking the direction out does to harmless test prompts, beside what the filter saw and allows."""
    limit, chosen = result.plan.highest_kl, result.found.filtered.chosen
    assert chosen is not None
    seen, n = float(result.found.means[chosen, 2]), result.found.scores.kl.shape[1]
    if kl.low > limit:
        means = "so taking it out changes harmless answers by more than the filter allows"
    else:
        means = "within the limit" if kl.high <= limit else "so whether it keeps to the limit is open"
    return (
        f"Side effect of taking it out, KL of harmless test prompts: {kl.brief} nats where the limit is {limit:g}, "
        f"{means} (the filter saw {seen:.3f}, on {n} validation prompts with a refusal score below 0; on test every "
        "prompt counts)."
    )


ACTED = {
    "bypass_shift": "taken out, it moves the refusal score of harmful prompts by",
    "induce_shift": "added, it moves the refusal score of harmless prompts by",
}


def _deciding(metrics: dict[str, Estimate], outcomes: dict[str, Outcome], highest_kl: float) -> tuple[str, str]:
    """The shift that is least shown, and how far it is from what chance does; and a side effect above the limit."""
    name = min(outcomes, key=lambda name: ("failed", "open", "met").index(outcomes[name]))
    beyond = metrics[f"{name}.beyond_chance"]
    kl = metrics[KL]
    # Where something is open the sentence has no room for it: what would settle that comes next.
    above = kl.low > highest_kl and "open" not in outcomes.values()
    beside = f", KL of harmless ones {kl.brief} (limit {highest_kl:g})" if above else ""
    return f"{ACTED[name]} {metrics[name].brief}", f"({beyond.brief} from the best of random){beside}"


def _settles(metrics: dict[str, Estimate], still_open: list[str]) -> tuple[str, str]:
    """How many more prompts would close what is open, if its values stay what they are: in brief, and in full."""
    shares = [
        metrics[f"{name}{end}"].prompts_beyond(0.0) / metrics[name].n
        for name in still_open
        for end in ("", ".beyond_chance")
        if metrics[f"{name}{end}"].low <= 0 <= metrics[f"{name}{end}"].high
    ]
    if not shares:
        return "", ""
    n = metrics[still_open[0]].n
    if not max(shares) < TOO_MANY:
        said = "ore prompts would hardly settle what isn't shown: it lies at what chance does"
        return f"m{said}", f" M{said}."
    needed = math.ceil(max(shares) * n)
    return f"about {needed - n} more test prompts of each class would settle it", (
        f" What would settle what isn't shown, if it stays what it is: about {needed - n} more test prompts of each "
        f"class (--n {math.ceil(needed / FRACTIONS[2])} in all)."
    )


SILENT = {"empty_rate.harmful.ablated": "taken out", "empty_rate.harmless.added": "added"}
KL = "kl.harmless.ablated"
"""The side effect: how far taking the direction out moves harmless prompts."""
DECIDING = (
    "bypass_shift",
    "bypass_shift.beyond_chance",
    "induce_shift",
    "induce_shift.beyond_chance",
    KL,
    "refusal_score.harmful.ablated",
    "refusal_score.harmful.ablated.random_min",
    "refusal_score.harmful.ablated.random_best",
    "refusal_score.harmless.added",
    "refusal_score.harmless.added.random_max",
    "refusal_score.harmless.added.random_best",
)
