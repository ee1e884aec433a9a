"""The verdict of the separation study: one variable or two, and what would settle it.

How often it errs on worlds whose number of variables is known stands in this folder's README.
"""

import math
from dataclasses import dataclass

from mechlens.methods.probing.auroc import MIN_FAMILIES
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.headline import Headline
from mechlens.runs.shown_verdict import ShownVerdict
from mechlens.studies.shared.quadrants import QUADRANTS

MIN_EFFECT, MOST = 0.5, 4
"""The smallest D that counts as two variables, and what two independent ones give up to."""
MAX_GAIN = 0.02
"""An AUROC that can't be more than this above the best surface baseline is explained by it."""
CHANCE = 0.5
NO_SCALE = (
    "refused harmful and accepted harmless prompts, which set its scale, are not told apart clearly enough for a number"
)
APART = "harm and refusal come apart by"
"""D in words, followed by its value."""
Z_ONE_SIDED, Z_80 = 1.64, 0.84
Z_POWER = 1.96 + Z_80
"""An effect this many standard errors from a bound clears it in 80% of draws."""
TOO_MANY = 50
"""More prompts than so many times those at hand settle nothing that anybody would collect."""

RULE = (
    "D is how far harm and refusal come apart: [harm(accepted harmful) - harm(refused harmless)] - [refusal(accepted "
    "harmful) - refusal(refused harmless)]. Harm is read at inst and refusal at the last token, out of fold, the "
    "well-behaved quadrants at +1 and -1, topics taken out.\n\n"
    f"- Not measurable: a quadrant has fewer than {MIN_FAMILIES} prompt families.\n\n"
    "- Explained by the words: harmfulness at inst (among accepted prompts where they are enough, else over all) is "
    "read above chance over all prompts, and no better than by the best of words, mean embedding, length and the token "
    f"at the position (upper bound of the paired gain in AUROC at most {MAX_GAIN}).\n\n"
    "- Two variables: D is clearly above 0, also once the words are taken out of both readings, and above what 95% of "
    "one-variable worlds fitted to the data give. Both its gaps have the sign that two variables give: accepted "
    "harmful prompts look clearly more harmful and clearly less refused than refused harmless ones (a decision made "
    "from one variable moves both one way). And harmfulness among accepted prompts and refusal among harmful ones are "
    "both read above chance and beyond the surface (lower bounds).\n\n"
    f"- One variable suffices: the upper bound of D is below {MIN_EFFECT} and not below -{MIN_EFFECT}, and over all "
    "prompts both can be read above chance.\n\n"
    "- Inconclusive: everything else."
)


@dataclass(frozen=True, repr=False)
class Verdict(ShownVerdict):
    """One of two variables, one variable suffices, explained by the words, inconclusive, not measurable.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> plan = ml.SeparationPlan(resamples=50, permutations=10, random_directions=2, max_new_tokens=4)
    >>> study = ml.separate(model, harmful, harmless, [], plan)
    >>> ml.separation_verdict(study.metrics()).sentence != ""
    True
    """

    headline: Headline
    sentence: str
    """Names the number that decided; where nothing is decided, what would settle it."""
    deciding: dict[str, Estimate]
    rule: str = RULE

    @property
    def word(self) -> str:
        """The verdict in a word or a few."""
        return self.headline.verdict


def on_a_scale(contrast: Estimate) -> Estimate:
    """D or one of its gaps; missing where its interval is wider than all that two variables could give either way,
    since then the two quadrants at +1 and -1 are hardly apart and the number is a division by noise."""
    too_wide = contrast.high - contrast.low > 2 * MOST
    return Estimate.missing(contrast.n) if too_wide else contrast


DECIDING = (
    "dissociation",
    "dissociation.one_variable_95",
    "dissociation.harm_gap",
    "dissociation.refusal_gap",
    "dissociation.beyond_words",
    "harmful_auroc.inst.accepted",
    "harmful_gain.accepted",
    "refused_auroc.last.harmful",
    "refused_gain.harmful",
)


def separation_verdict(metrics: dict[str, Estimate]) -> Verdict:
    """The verdict from the study's metrics.

    >>> model = ml.load("smollm2")
    >>> harmful, harmless = ml.builtin_prompts("harmful")[:40], ml.builtin_prompts("harmless")[:40]
    >>> plan = ml.SeparationPlan(resamples=50, permutations=10, random_directions=2, max_new_tokens=4)
    >>> study = ml.separate(model, harmful, harmless, [], plan)
    >>> ml.separation_verdict(study.metrics()).sentence != ""
    True
    """
    deciding = {name: metrics[name] for name in DECIDING}
    gain = metrics["harmful_gain.accepted"]
    if not gain.measurable:
        gain = metrics["harmful_gain"]
    if gain.high <= MAX_GAIN and metrics["harmful_auroc.inst"].low > CHANCE:
        return Verdict(*_explained(gain), deciding)
    contrast = metrics["dissociation"]
    if not contrast.measurable:
        return Verdict(*_not_measurable(metrics), deciding)
    failed = _failed(metrics)
    if not failed:
        return Verdict(*_two(metrics), deciding)
    readable = all(metrics[name].low > CHANCE for name in ("harmful_auroc.inst", "refused_auroc.last"))
    if -MIN_EFFECT <= contrast.high < MIN_EFFECT and readable:
        return Verdict(*_one(contrast), deciding)
    return Verdict(*_inconclusive(metrics, failed, readable=readable), deciding)


def _failed(metrics: dict[str, Estimate]) -> list[str]:
    """Which conditions of two variables don't hold, the deciding one first."""
    contrast, null = metrics["dissociation"], metrics["dissociation.one_variable_95"]
    conditions = {
        "dissociation": contrast.low > 0,
        "dissociation.one_variable_95": contrast.value > null.value,
        "dissociation.harm_gap": metrics["dissociation.harm_gap"].low > 0,
        "dissociation.refusal_gap": metrics["dissociation.refusal_gap"].high < 0,
        "dissociation.beyond_words": metrics["dissociation.beyond_words"].low > 0,
        "harmful_auroc.inst.accepted": metrics["harmful_auroc.inst.accepted"].low > CHANCE,
        "refused_auroc.last.harmful": metrics["refused_auroc.last.harmful"].low > CHANCE,
        "harmful_gain.accepted": metrics["harmful_gain.accepted"].low > 0,
        "refused_gain.harmful": metrics["refused_gain.harmful"].low > 0,
    }
    return [name for name, holds in conditions.items() if not holds]


_Said = tuple[Headline, str]
"""One sentence, and the explanation that follows it."""


def _two(metrics: dict[str, Estimate]) -> _Said:
    contrast, null = metrics["dissociation"], metrics["dissociation.one_variable_95"]
    against = f"where one variable stays below {null.value:.2f} in 95% of fitted worlds"
    return Headline("two variables", f"{APART} {contrast.brief}", against), (
        "Harmfulness and refusal are two variables in this model on these prompts: beside harmless prompts that it "
        "refuses, harmful ones that it accepts look both more harmful at the end of the instruction (by "
        f"{metrics['dissociation.harm_gap']}) and less refused at the last token (by "
        f"{metrics['dissociation.refusal_gap']}). They come apart by the difference, {contrast}, where one variable "
        f"gives 0 and stays below {null.value:.2f} in 95% of worlds fitted to the data. Both are read beyond what the "
        "words tell."
    )


def _one(contrast: Estimate) -> _Said:
    against = f"where two would give at least {MIN_EFFECT}"
    return Headline("one variable suffices", f"{APART} {contrast.brief}", against), (
        f"One variable suffices for harmfulness and refusal on these prompts: {APART} {contrast}, and the upper bound "
        f"is below {MIN_EFFECT}, the smallest that would count as two."
    )


def _explained(gain: Estimate) -> _Said:
    number, settle = f"harmfulness gains {gain.brief} of AUROC", "prompts matched in form would say more"
    return Headline("explained by the words", number, "over the surface of the prompts", settle), (
        "What looks like harmfulness is explained by the words: the residual stream at the end of the instruction "
        f"tells the classes apart no better than the surface of the prompts does (AUROC gained: {gain}). Prompts "
        "matched in form would settle whether the model knows more."
    )


def _not_measurable(metrics: dict[str, Estimate]) -> _Said:
    word, needs = "not measurable", []
    for name in QUADRANTS:
        n = int(metrics[f"n.{name}"].value)
        if n < MIN_FAMILIES:
            verdict, _, side = name.partition("_")
            total = sum(int(metrics[f"n.{own}_{side}"].value) for own in ("refused", "accepted"))
            needs.append((n, f"{n} of {total} {side} prompts are {verdict}", _more(n, total, side, verdict)))
    if not needs:
        number, settle = f"a quadrant has fewer than {MIN_FAMILIES} prompt families", "add unrelated prompts"
        sentence = (
            f"A quadrant has fewer than {MIN_FAMILIES} prompt families, and a smaller one gives no interval; {settle}."
        )
        return Headline(word, number, "", settle), sentence
    _, fewest, settle = min(needs)
    said = "; ".join(f"{counted}: {more}" for _, counted, more in needs).capitalize()
    sentence = f"There must be {MIN_FAMILIES} prompt families in each quadrant. {said}."
    return Headline(word, fewest, f"where {MIN_FAMILIES} are needed", settle), sentence


def _more(n: int, total: int, side: str, verdict: str) -> str:
    if n == 0:
        misbehaving = (verdict == "accepted") == (side == "harmful")
        kind = f"looks-{'harmless' if side == 'harmful' else 'harmful'}" if misbehaving else f"plainly {side} ones"
        return f"prompts of another kind are needed, such as {kind}, which are {verdict} more often"
    return f"about {math.ceil((MIN_FAMILIES - n) * total / n)} more of this kind would do"


def _inconclusive(metrics: dict[str, Estimate], failed: list[str], *, readable: bool) -> _Said:
    contrast = metrics["dissociation"]
    if not readable:
        return _unread(metrics)
    name = failed[0]
    if name == "dissociation.one_variable_95":
        return _within_one_variable(metrics)
    if name in ("dissociation.harm_gap", "dissociation.refusal_gap"):
        return _one_sided(metrics)
    if name == "dissociation" and contrast.high < 0:
        return _open(contrast, "clearly below 0, where one variable gives 0 and two give more"), (
            f"{_APART} {contrast}, clearly below 0: harm is read at the end of the instruction as one would expect of "
            "refusal, and refusal at the last token as of harm. One variable would give 0, two in their places more."
        )
    if name == "dissociation":
        settled, against = _settled_d(metrics), f"neither clearly above 0 nor below {MIN_EFFECT}"
        return _open(contrast, against, settled), f"{_APART} {contrast}: {against}. {settled}"
    bound = CHANCE if "auroc" in name else 0.0
    settled = _settled(metrics[name], metrics[name].value - bound)
    return _open(contrast, f"but {_WANTING[name]} {metrics[name].brief}", settled), (
        f"{_APART} {contrast}, but {_WANTING[name]} {metrics[name]}. {settled}"
    )


def _open(contrast: Estimate, against: str, settled: str = "") -> Headline:
    """The headline of an open verdict; what would settle it is a sentence in the explanation."""
    settle = settled.removesuffix(".").removeprefix("If it stays there, ")
    joint = "" if against.startswith("where") else ","
    number = f"{APART} {contrast.brief}{joint}"
    if not on_a_scale(contrast).measurable:
        number, against = NO_SCALE, ""
    return Headline("inconclusive", number, against, settle[:1].lower() + settle[1:])


def _unread(metrics: dict[str, Estimate]) -> _Said:
    unread = {words: metrics[name] for name, words in _READ.items() if metrics[name].low <= CHANCE}
    number = " and ".join(f"{words} has AUROC {auroc.brief}" for words, auroc in unread.items())
    shown = " and ".join(f"{words} ({auroc})" for words, auroc in unread.items())
    return Headline("inconclusive", number, f"where chance has {CHANCE}"), (
        f"Over all prompts {shown} can't be told from chance, so there is nothing to be one or two."
    )


MORE_HARMFUL, LESS_REFUSED = "more harmful at the end of the instruction", "less refused at the last token"


def _one_sided(metrics: dict[str, Estimate]) -> _Said:
    """D is above 0, and its gaps haven't both their sign, as where a decision is made from one variable."""
    harm, refusal = metrics["dissociation.harm_gap"], metrics["dissociation.refusal_gap"]
    held: list[tuple[Estimate, float, str]] = []
    open_: list[tuple[Estimate, float, str]] = []
    for gap, sign, words in ((harm, 1, MORE_HARMFUL), (refusal, -1, LESS_REFUSED)):
        clear = min(sign * gap.low, sign * gap.high) > 0
        (held if clear else open_).append((gap, sign * gap.value, words))
    shown = " and ".join(f"{words} (by {gap})" for gap, _, words in held) + " but " if held else ""
    wanting = " and ".join(f"not clearly {words} (by {gap})" for gap, _, words in open_)
    gap, distance, words = min(open_, key=lambda one: one[1])
    settled = _settled(gap, distance)
    looks = words.partition(" at ")[0]
    against = f"but accepted harmful prompts look not clearly {looks} than refused harmless ones ({gap.brief})"
    return _open(metrics["dissociation"], against, settled), (
        f"{_APART} {metrics['dissociation']}, but a decision made from one variable would do that too: beside refused "
        f"harmless prompts, accepted harmful ones look {shown}{wanting}. {settled}"
    )


HARDLY = "More prompts of this kind would hardly help; others, matched in form, might."
_APART = APART.capitalize()
_READ = {"harmful_auroc.inst": "harmfulness at inst", "refused_auroc.last": "refusal at the last token"}
_WANTING = {
    "dissociation.beyond_words": "once the words are taken out of both readings it isn't clearly above 0:",
    "harmful_auroc.inst.accepted": "harmfulness isn't read above chance among accepted prompts: AUROC",
    "refused_auroc.last.harmful": "refusal isn't read above chance among harmful prompts: AUROC",
    "harmful_gain.accepted": "among accepted prompts harmfulness isn't read beyond the words: AUROC gained",
    "refused_gain.harmful": "among harmful prompts refusal isn't read beyond the words: AUROC gained",
}


def _times(estimate: Estimate, distance: float) -> float:
    """How many times as many prompts would clear a bound at this distance in 80% of draws."""
    error = (estimate.high - estimate.low) / 3.92
    return (Z_POWER * error / distance) ** 2 if distance > 0 else math.inf


def _within_one_variable(metrics: dict[str, Estimate]) -> _Said:
    """D is above 0, and one variable in such data reaches it too; its spread shrinks as prompts grow in number."""
    contrast, null = metrics["dissociation"], metrics["dissociation.one_variable_95"].value
    times = ((Z_ONE_SIDED + Z_80) / Z_ONE_SIDED * null / contrast.value) ** 2
    settled = _as_many(times)
    if null > MOST:
        settled = (
            "So few prompts can't decide: with them one variable reaches more than two independent ones could "
            f"({MOST}). Many more of each kind are needed."
        )
    return _open(contrast, f"where one variable reaches {null:.2f} (95% of fitted worlds)", settled), (
        f"{_APART} {contrast}, above 0, but one variable fitted to these data reaches it in "
        f"{metrics['dissociation.p'].value:.0%} of worlds (95% of them stay below {null:.2f}). {settled}"
    )


def _settled_d(metrics: dict[str, Estimate]) -> str:
    """How many more misbehaving prompts would decide, if D stayed as it is."""
    contrast = metrics["dissociation"]
    name = min(("accepted_harmful", "refused_harmless"), key=lambda own: metrics[f"n.{own}"].value)
    n = metrics[f"n.{name}"].value
    distances = [contrast.value, MIN_EFFECT - contrast.value]
    times = max(min(_times(contrast, distance) for distance in distances), 1.2)
    if times > TOO_MANY:
        return HARDLY
    more = f"{math.ceil((times - 1) * n)} more {name.replace('_', ' ')} prompts"
    return f"If it stays there, about {more} (now {n:.0f}) would settle it."


def _settled(estimate: Estimate, distance: float) -> str:
    times = _times(estimate, distance)
    return HARDLY if times > TOO_MANY else _as_many(times)


def _as_many(times: float) -> str:
    """What would settle it, to two digits: it is a guess."""
    shown = f"{max(times, 1.2):.1f}" if times < 10 else f"{float(f'{times:.2g}'):.0f}"
    return f"If it stays there, about {shown} times as many prompts would settle it."
