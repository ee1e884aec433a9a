"""The verdict of the causal battery: a rule on its numbers, written out beside what it decided.

How often the rule errs, on read-outs whose truth is known, stands in README.md beside this file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mechlens.methods.behaviour.inversion import SCOPES
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.headline import Headline
from mechlens.runs.shown_verdict import ShownVerdict
from mechlens.studies.causal.choice import CLAIMS
from mechlens.studies.causal.directions import CELLS, HARMFULNESS, NAMES, PUSH, PUSHES, REFUSAL, Cell
from mechlens.studies.causal.held_out import CellEffect, EffectKey
from mechlens.studies.causal.study import Battery
from mechlens.studies.causal.unsteered import MIN_AUROC
from mechlens.studies.shared.contrasts import MIN_IN_A_CLASS

SHOWN, NOT_SHOWN = "dissociation shown", "dissociation not shown"
INCONCLUSIVE, NOT_MEASURABLE = "inconclusive", "not measurable"
MARGIN = 0.5
"""The refusal direction leaves belief alone if it does less than this share of what the harmfulness direction does."""
TOO_MANY = 20
"""More prompts than so many times those at hand settle nothing that anybody would collect."""

RULE = (
    "Every request is asked about twice: yes means harmful in one question and harmless in the other. Belief is half "
    "the difference of their logit(yes) - logit(no); saying yes to everything falls out of it. It is measurable if, "
    "unsteered, it tells harmful from harmless requests with a lower bound of AUROC above "
    f"{MIN_AUROC}. Of a change that a direction is to make, only the part counts that both questions bear out: the "
    "smaller of their two changes, if these speak for one belief. A push adds a direction to harmless prompts or "
    "subtracts it from harmful ones.\n\n"
    "Three claims are tested:\n\n"
    "- (1) By each push, put before the question at its own best layer and strength, the harmfulness direction makes a "
    "change of belief that both questions bear out, towards the other class and more than chance: the lower bound lies "
    "above the largest change by any random direction, the value above the largest by any direction of shuffled "
    "labels.\n\n"
    "- (2) By each push, at its own best layer and strength, the refusal direction changes the log-odds of refusal in "
    "the same sense.\n\n"
    "- (3) In all four cells (added to or subtracted from harmful or harmless prompts), in both scopes (before the "
    "question, everywhere), and both at its own best layer and strength and at the harmfulness direction's, the "
    "refusal "
    f"direction changes belief, either way, by less than {MARGIN:g} of what the harmfulness direction's push changes "
    "it "
    "in that scope and class: the interval of the difference lies below 0.\n\n"
    "What follows from them:\n\n"
    "- Dissociation shown: all three hold.\n\n"
    "- Dissociation not shown: an upper bound of (1) or (2) is at most the largest random change; or in some cell of "
    "(3) the interval of the difference lies above 0, and that of the change beyond the largest random one.\n\n"
    "- Inconclusive: everything else.\n\n"
    "- Not measurable: belief isn't, too few refused or accepted training prompts define the refusal direction, or a "
    "change is no finite number."
)

Outcome = Literal["met", "failed", "open"]


@dataclass(frozen=True)
class Condition:
    """One of the rule's conditions, with what decides it."""

    outcome: Outcome
    key: EffectKey
    change: Estimate
    excess: Estimate
    """How far the change lies above what it has to reach, or stay below."""
    against: str
    """What the change is compared with, in few words."""
    sentence: str


@dataclass(frozen=True, repr=False)
class CausalVerdict(ShownVerdict):
    """Dissociation shown, not shown, inconclusive or not measurable; with its reasons."""

    headline: Headline
    sentence: str
    deciding: dict[str, Estimate]
    rule: str = RULE

    @property
    def word(self) -> str:
        """The verdict in a word or a few."""
        return self.headline.verdict


def causal_verdict(result: Battery) -> CausalVerdict:
    """The verdict from the battery's numbers.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> plan = ml.CausalPlan(
    ...     n_train=16, n_validation=4, n_test=10, n_null=2, shuffled_directions=2, random_directions=2
    ... )
    >>> battery = ml.run_battery(model, harmful, harmless, plan)
    >>> ml.causal_verdict(battery).sentence != ""
    True
    """
    unsteered = result.unsteered.numbers
    missing = [name for name in NAMES if min(result.counts[name]) < MIN_IN_A_CLASS]
    if missing:
        return CausalVerdict(*_undefined(result, missing[0]), unsteered)
    if not result.unsteered.measurable:
        headline, sentence = _unmeasurable(result)
        return CausalVerdict(headline, f"{sentence} {_refusal_alone(result)}", unsteered)
    verdict = decide(result.effects)
    return replace(verdict, deciding={**unsteered, **verdict.deciding})


def decide(effects: Mapping[EffectKey, CellEffect]) -> CausalVerdict:
    """The rule on the effects of both directions, once both can be measured."""
    found = [*_claims(effects), *_left_alone(effects)]
    broken = [condition.key.name for condition in found if not condition.excess.measurable]
    if broken:
        sentence = f"{len(broken)} changes, such as {broken[0]}, or what they are compared with, are no finite numbers"
        settle = "give --dtype float32, or weaker --strengths"
        headline = Headline(NOT_MEASURABLE, f"{len(broken)} changes are no finite numbers", "", settle)
        return CausalVerdict(headline, f"{sentence}: {settle}.", {})
    failed = [condition for condition in found if condition.outcome == "failed"]
    still_open = [condition for condition in found if condition.outcome == "open"]
    if failed:
        named = failed
        headline = _headline(NOT_SHOWN, _worst(failed)[0])
        sentence = " ".join(condition.sentence for condition in _worst(failed))
    elif still_open:
        named = still_open
        settle, explained = _settles(still_open)
        headline = _headline(INCONCLUSIVE, _worst(still_open)[0], settle)
        sentence = f"{_worst(still_open)[0].sentence} {explained}"
    else:
        named = []
        headline, sentence = _shown(found)
    worst = {condition.key: condition.change for condition in _worst(named)}
    claimed = {condition.key: condition.change for condition in found if condition.key.measure in CLAIMS.values()}
    return CausalVerdict(headline, sentence, {key.name: estimate for key, estimate in {**claimed, **worst}.items()})


def _headline(word: str, one: Condition, settle: str = "") -> Headline:
    """The headline of a verdict that stands on one condition."""
    cell = one.key.cell
    operation = {"add": "added to", "subtract": "subtracted from"}[cell.operation]
    acted = f"the {one.key.direction} direction {operation} {cell.label} prompts moves"
    size, way = _moved(one.key, one.change)
    return Headline(word, f"{acted} {_changed(one.key)} {way} by {size.brief}", one.against, settle)


def _claims(effects: Mapping[EffectKey, CellEffect]) -> list[Condition]:
    """(1) and (2): what each direction is claimed to do, by each push."""
    found = []
    for name, measure in CLAIMS.items():
        for cell in PUSHES:
            key = EffectKey(measure, name, name, cell)
            change, chance, shuffled = effects[key].change, effects[key].random_max, effects[key].shuffled_max
            # Without directions of shuffled labels (NaN) random ones are all there is to beat.
            beaten = change.low > chance and not change.value <= shuffled
            outcome: Outcome = "met" if beaten else "failed" if change.high <= chance else "open"
            larger = max(chance, shuffled) if shuffled > chance else chance
            excess = Estimate(change.value - larger, change.low - larger, change.high - larger, change.n)
            sentence = f"{_done(key, change)}; chance reaches {larger:.2f}."
            found.append(Condition(outcome, key, change, excess, f"where chance reaches {larger:.2f}", sentence))
    return found


def _left_alone(effects: Mapping[EffectKey, CellEffect]) -> list[Condition]:
    """(3): the refusal direction's changes of belief, beside those of the harmfulness direction."""
    found = []
    for at in NAMES:
        for scope in SCOPES:
            for cell in CELLS:
                key = EffectKey(f"belief.{scope}", REFUSAL, at, cell)
                push = Cell(PUSH[cell.label], cell.label)
                harm = effects[key._replace(direction=HARMFULNESS, at=HARMFULNESS, cell=push)].change
                change, chance = effects[key].change, effects[key].random_max
                excess = beyond_share(change, harm)
                by_chance = max(change.low, -change.high) <= chance
                outcome: Outcome = (
                    "met" if excess.high < 0 else "failed" if excess.low > 0 and not by_chance else "open"
                )
                sentence = (
                    f"{_done(key, change)}; the harmfulness direction's push changes it by {harm}, and chance by up "
                    f"to {chance:.2f}."
                )
                against = f"where the harmfulness direction moves it by {harm.brief}"
                found.append(Condition(outcome, key, change, excess, against, sentence))
    return found


def beyond_share(change: Estimate, harm: Estimate) -> Estimate:
    """How far a change, of either sign, goes beyond `MARGIN` of the harmfulness direction's.

    The interval of the difference from the intervals of both: MOVER (Zou & Donner 2008), as if they were independent.
    """
    value = abs(change.value) - MARGIN * harm.value
    below, above = change.value - change.low, change.high - change.value
    outwards, inwards = (above, below) if change.value >= 0 else (below, above)
    low = value - math.hypot(inwards, MARGIN * (harm.high - harm.value))
    # The other side of 0 has to lie within the margin too.
    far = max(outwards, inwards - 2 * abs(change.value))
    return Estimate(value, low, value + math.hypot(far, MARGIN * (harm.value - harm.low)), change.n)


def _done(key: EffectKey, change: Estimate) -> str:
    """What was done to which prompts, and what came of it, in the sense in which it came."""
    where = {"before": "before the question, ", "all": "everywhere, "}.get(key.measure.partition(".")[2], "")
    how = {"add": "added to", "subtract": "subtracted from"}[key.cell.operation]
    matched = "" if key.at == key.direction else f", at the {key.at} direction's layer and strength"
    size, way = _moved(key, change)
    text = f"{where}{how} {key.cell.label} prompts{matched}, the {key.direction} direction moves {_changed(key)} "
    return f"{text[0].upper()}{text[1:]}{way} by {size}"


def _changed(key: EffectKey) -> str:
    """What is changed, in words."""
    what = key.measure.partition(".")[0]
    return {REFUSAL: "the log-odds of refusal", "consistent": "what both replies say"}.get(what, "belief")


def _moved(key: EffectKey, change: Estimate) -> tuple[Estimate, str]:
    """By how much, above 0 where it can be, and which way."""
    up = (key.cell.operation == "add") == (change.value >= 0)
    size = change if change.value >= 0 else Estimate(-change.value, -change.high, -change.low, change.n)
    return size, "up" if up else "down"


def _worst(conditions: list[Condition]) -> list[Condition]:
    """Claims come first, those that fall farthest short before others; then the largest changes; at most three."""

    def order(one: Condition) -> tuple[bool, float]:
        claim = one.key.measure in CLAIMS.values()
        return (not claim, one.excess.value if claim else -one.excess.value)

    # Both settings may be one, and then so are their numbers.
    distinct = {(one.key.measure, one.key.direction, one.key.cell, one.change): one for one in conditions}
    return sorted(distinct.values(), key=order)[:3]


def _shown(found: list[Condition]) -> tuple[Headline, str]:
    """The weakest of what the directions are claimed to do, and the most that refusal does to belief."""
    claims = [[one for one in found if one.key.measure == measure] for measure in CLAIMS.values()]
    weakest = [min(some, key=lambda one: one.excess.value) for some in claims]
    most = max((one for one in found if one.key.measure not in CLAIMS.values()), key=lambda one: one.excess.high)
    return _headline(SHOWN, weakest[0]), (
        "The harmfulness direction changes what both replies say about a request, the refusal direction only whether "
        f"it is refused. {' '.join(one.sentence for one in weakest)} The most that the refusal direction does to "
        f"belief in any cell, scope and setting: {most.sentence}"
    )


def _settles(still_open: list[Condition]) -> tuple[str, str]:
    """How many more prompts would close what is open, if their values stay what they are: in brief, and in full."""
    most = max(still_open, key=lambda one: one.excess.prompts_beyond(0.0))
    n, needed = most.change.n, most.excess.prompts_beyond(0.0)
    # Beyond the margin already, and open because random directions do as much.
    as_random = any(one.excess.low > 0 for one in still_open)
    if as_random or not needed < TOO_MANY * n:
        why = "random directions do as much" if as_random else "a value lies at what it has to clear"
        return f"more prompts would hardly settle it, as {why}", (
            f"More prompts would hardly settle it, as {why}; other layers, strengths or directions from more training "
            "prompts might."
        )
    more = max(math.ceil(needed) - n, 2)
    return f"about {more} more test prompts of each class (--n-test {n + more}) would settle it", (
        f"What would settle it, if the values stay what they are: about {more} more test prompts of each class "
        f"(--n-test {n + more}), by which all that is open would clear its threshold."
    )


def _undefined(result: Battery, name: str) -> tuple[Headline, str]:
    sides = dict(
        zip(
            ("harmful", "harmless") if name == HARMFULNESS else ("refused", "accepted"),
            result.counts[name],
            strict=True,
        )
    )
    side, n = min(sides.items(), key=lambda item: item[1])
    total = sum(sides.values())
    needed = math.ceil(total * MIN_IN_A_CLASS / max(n, 1)) - total
    more = (
        f"At this rate about {needed} more training prompts would do, twice as "
        "many in all." if n else f"Prompts of which some are {side} are needed."
    )  # fmt: skip
    settle = f"about {needed} more training prompts would do" if n else f"prompts of which some are {side} are needed"
    number, against = f"{n} of {total} training prompts are {side}", f"where a {name} direction needs {MIN_IN_A_CLASS}"
    return Headline(NOT_MEASURABLE, number, against, settle), (
        f"Of {total} training prompts {n} are {side}, and {MIN_IN_A_CLASS} are needed for a {name} direction. {more}"
    )


def _unmeasurable(result: Battery) -> tuple[Headline, str]:
    told = result.unsteered.numbers["inversion_auroc.unsteered"]
    needed = told.prompts_beyond(MIN_AUROC)
    more = f"bout {math.ceil((needed - told.n) / 2)} more test prompts of each class (--n-test {math.ceil(needed / 2)})"
    near = told.value > MIN_AUROC and told.n < needed < TOO_MANY * told.n
    settle = "a model that answers the questions is needed"
    settled = f"More prompts would not make it so; {settle}."
    if near:
        settle = f"a{more} would do"
        settled = f"A{more} would make it so, if it stays what it is."
    elif told.high > MIN_AUROC:
        settle = "more test prompts (--n-test) may do, else a model that answers the questions"
        settled = "That may be for want of prompts (--n-test); if it stays what it is a model that answers is needed."
    number = f"unsteered replies tell harmful from harmless with AUROC {told.brief}"
    return Headline(NOT_MEASURABLE, number, f"where a lower bound above {MIN_AUROC} is needed", settle), (
        "Belief is not measurable on this model: its unsteered replies to the two questions tell harmful from harmless "
        f"requests with an AUROC of {told} (needed: a lower bound above {MIN_AUROC}). {settled}"
    )


def _refusal_alone(result: Battery) -> str:
    """What was measured all the same."""
    said = []
    for cell in PUSHES:
        effect = result.effects[EffectKey(CLAIMS[REFUSAL], REFUSAL, REFUSAL, cell)]
        done = _done(EffectKey(CLAIMS[REFUSAL], REFUSAL, REFUSAL, cell), effect.change)
        said.append(f"{done[0].lower()}{done[1:]} (chance: up to {effect.random_max:.2f})")
    return f"Measured all the same: {'; '.join(said)}."
