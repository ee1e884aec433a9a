"""What a concept's direction allows to be said: is it more than what the surface of the prompts tells?

The rule is tested on planted worlds: of 150 draws without a concept beyond the surface none was called more than it.
All error rates are in this folder's README.md.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from mechlens.methods.probing.ahead import SURFACE, TOKEN, Ahead
from mechlens.methods.probing.detect import Detection
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.steering.steering_test import SteeringTest
from mechlens.runs.headline import Headline
from mechlens.runs.shown_verdict import ShownVerdict

MARGIN = 0.05
"""A smaller gain of AUROC over the surface isn't worth a direction."""
APART = 0.1
"""A direction whose own AUROC is further from that of the folds isn't what the folds speak of."""
FEW_SHARE = 1.5
"""Prompts of a side for each family from which it's families that are asked for."""
STATED = ("system_prompt", "turns", "source")
"""Baselines that are no wording: where one ties too, the sentence says so, since it is mended at once."""
SPLIT_PAIRS = "that is no inverse signal: pairs of one topic were split, so keep them whole (paired=True)"
Outcome = Literal["more than the surface", "no more than the surface", "inconclusive", "not read"]


@dataclass(frozen=True, repr=False)
class DirectionVerdict(ShownVerdict):
    """The outcome, and the comparison that decided."""

    outcome: Outcome
    ahead: Ahead
    """At the best position, or at the strongest where none is best."""
    level: int
    """Chosen on validation prompts for the direction that is kept."""
    kept: Estimate | None = None
    """AUROC of the direction that is kept, on the test prompts of its one split."""
    families: int | None = None
    """Of the side that has fewer; None where each prompt is taken to be one."""

    @property
    def gain(self) -> Estimate:
        """AUROC of the direction minus that of the nearest baseline."""
        return self.ahead.gains[self.ahead.nearest]

    @property
    def deciding(self) -> dict[str, Estimate]:
        """Every number that the rule looks at, by its name in run.json."""
        numbers = {"auroc.out_of_fold": self.ahead.auroc, "effect_size": self.ahead.effect}
        for name, gain in self.ahead.gains.items():
            numbers |= {f"surface_auroc.{name}": self.ahead.surface[name], f"gain.{name}": gain}
        return numbers

    @property
    def ties(self) -> str:
        """The baselines that the direction is ahead of by less than `MARGIN`, in words with their AUROC."""
        near = [name for name in self.ahead.ties if self.ahead.gains[name].value < MARGIN]
        named = [f"{_named(name, self.ahead.position)} ({self.ahead.surface[name].brief})" for name in near]
        return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)

    @property
    def headline(self) -> Headline:
        """The verdict in one sentence, with the number that decided and what would settle it."""
        found = self._found
        name, nearest = _named(self.ahead.nearest, self.ahead.position), self.ahead.surface[self.ahead.nearest]
        if self.outcome == "not read":
            settle = SPLIT_PAIRS if self.ahead.auroc.high < 0.5 else ""
            return Headline(self.outcome, f"even {found}", "where chance reaches 0.50", settle)
        if self.outcome == "no more than the surface":
            if self.at_the_ceiling:
                return self._used_up
            beside = f", {self.ahead.surface[self._stated].brief} by {SURFACE[self._stated]}" if self._stated else ""
            return Headline(self.outcome, found, f"and {nearest.brief} by {name} alone{beside}")
        ahead = f"{self.gain.brief} ahead of the nearest baseline, {name} ({nearest.brief})"
        if self.outcome == "more than the surface":
            return Headline(self.outcome, f"{found},", ahead)
        return Headline(self.outcome, f"{found},", ahead, f"about {self._wanted} would settle it")

    @property
    def _found(self) -> str:
        """The AUROC out of fold; where the direction that is kept has another, as by a level of few validation
        prompts, both."""
        position, auroc = self.ahead.position, self.ahead.auroc
        if self.kept is None or not abs(self.kept.value - auroc.value) > APART:
            return f"at {position}, level {self.level} (in each fold its own), the AUROC is {auroc.brief} out of fold"
        kept = f"{self.kept.value:.2f} by the one kept, of level {self.level}"
        return f"at {position} the AUROC is {auroc.brief} out of fold ({kept})"

    @property
    def _stated(self) -> str:
        """The first of `STATED` that ties too and tells the sides apart; "" where there is none."""
        surface, ties = self.ahead.surface, self.ahead.ties
        beside = [name for name in STATED if name in ties and name != self.ahead.nearest and surface[name].low > 0.5]
        return beside[0] if beside else ""

    @property
    def at_the_ceiling(self) -> bool:
        """The nearest baseline leaves no room for `MARGIN`: such prompts can't show more, whatever is represented."""
        return self.ahead.surface[self.ahead.nearest].value > 1 - MARGIN

    @property
    def _used_up(self) -> Headline:
        """What such prompts allow to be said, without the level, which made no difference."""
        name, nearest = _named(self.ahead.nearest, self.ahead.position), self.ahead.surface[self.ahead.nearest]
        found = f"at {self.ahead.position} the AUROC is {self.ahead.auroc.brief}"
        tells = "tell" if name.partition(" (")[0].endswith("words") else "tells"
        already = f"but {name} alone already {tells} the sides apart ({nearest.brief}), so this set can't show more"
        also = f" and {SURFACE[self._stated]}" if self._stated else ""
        return Headline(self.outcome, f"{found},", already, f"sides alike in that{also} would settle it")

    @property
    def _wanted(self) -> str:
        """What more of would settle it: prompts, or, where several share a family, families, which alone count."""
        a_family = self.gain.n / 2 / (self.families or self.gain.n / 2)
        if a_family < FEW_SHARE:
            return f"{self.needed} prompts of a side"
        return f"{math.ceil(self.needed / a_family)} families a side (now {self.families})"

    @property
    def needed(self) -> int:
        """Prompts of a side that would show such a gain, or `MARGIN` if that is larger, about four times in five."""
        return math.ceil(self.gain.n / 2 * self.gain.times_to_show(MARGIN))


def steering_headline(steered: SteeringTest, read: DirectionVerdict) -> Headline:
    """What adding directions did, which was asked for, and beside it what reading them allows to be said."""
    also = f"as a read-out, at {read.ahead.position}, level {read.level}: {read.outcome}"
    if not steered.place or steered.random is None:
        return Headline("none steers", f"each of {len(steered.table)} directions tried breaks plain text", settle=also)
    word = "steers" if steered.direction is not None else "none steers"
    done = f"adding the direction of {steered.place} has an effect of {steered.effect.brief} nats"
    return Headline(word, done, f"where chance reaches {steered.random.bound:.2f}", also)


def direction_verdict(found: Detection, families: int | None = None) -> DirectionVerdict:
    """Not read: not above chance by the lower bound. More: ahead of every baseline, each by the lower bound of the
    paired gain. No more: the nearest baseline is as good, or ahead of by less than `MARGIN` by the upper bound.

    An effect size that isn't measurable on the test prompts is none out of fold either.
    """
    ahead = next((one for one in found.ahead if one.clear), found.ahead[0])
    kept = found.at(ahead.position)
    if not kept.effect.measurable:  # out of fold, few prompts' spread is mostly that of the folds' directions
        ahead = replace(ahead, effect=kept.effect)
    return DirectionVerdict(_outcome(ahead), ahead, kept.level, kept.auroc, families)


def _outcome(ahead: Ahead) -> Outcome:
    if not ahead.auroc.low > 0.5:
        return "not read"
    if ahead.clear:
        return "more than the surface"
    gain = ahead.gains[ahead.nearest]
    return "no more than the surface" if gain.value <= 0 or gain.high < MARGIN else "inconclusive"


def _named(baseline: str, position: str) -> str:
    return f"the token at {position}" if baseline == TOKEN else SURFACE[baseline]
