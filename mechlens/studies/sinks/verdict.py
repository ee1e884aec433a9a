"""Whether heads sleep on one kind of text and work on another, in a word and a sentence.

Error rates on planted worlds are in this folder's README.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.sinks.contrast import DomainContrast
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import of_sample, sample_and_resamples
from mechlens.runs.headline import Headline

FEWEST = 10
"""Texts of a kind below which an interval is too narrow."""
MARGIN = 0.1
"""Of all attention: a smaller difference between two kinds is none worth the name."""
LEVEL = 0.05
NOTICED = 0.05
"""Nats a token: a gap that may be larger isn't none, whatever random heads do in losses as noisy."""
SWITCH, IDLE, ALIKE = "heads switch by kind of text", "attention differs, the loss doesn't", "sinks alike on all kinds"
NONE, INCONCLUSIVE, NOT_MEASURABLE = "no sinks", "inconclusive", "not measurable"
RULE = (
    "A sink is a token to which a fifth of all heads send more than 0.3 of the attention of those that see it. A head "
    "differs where its mean attention to the sinks differs between two kinds of text; it is dormant on the one with "
    "more. The p of a head says how often, with the kinds dealt out anew, any head differs as clearly. The worth of a "
    "head is how much the loss rises with it off; its gap is that on the kind where it is active minus that where it "
    "is dormant.\n\n"
    f"- {NONE.capitalize()}: fewer than half of the texts have one.\n\n"
    f"- {ALIKE.capitalize()}: no head differs by {MARGIN}.\n\n"
    f"- {SWITCH.capitalize()}: the head that differs most has a p of {LEVEL} or less, and the mean gap of the heads "
    "that differ most is above the largest of random heads by its lower bound.\n\n"
    f"- {IDLE.capitalize()}: the p is as small, and the mean gap is no larger than the largest of random heads, nor "
    f"than {NOTICED} nats, by its upper bound.\n\n"
    f"- {INCONCLUSIVE.capitalize()}: everything else.\n\n"
    f"- {NOT_MEASURABLE.capitalize()}: a kind has fewer than {FEWEST} texts."
)


@dataclass(frozen=True)
class SinkVerdict:
    """The word, and the numbers that it stands on."""

    word: str
    with_sinks: Estimate
    """Share of texts that have one."""
    difference: Estimate
    """In sink mass, of the head that differs most, between two kinds of text."""
    p: float
    """Of that head."""
    gap: Estimate
    """Mean gap of the heads that differ most (nats a token)."""
    random: float
    """The largest gap of a random head, by size; NaN where every head of the model was chosen."""
    between: tuple[str, str]
    """The kinds on which the head that differs most is dormant and active."""

    @property
    def headline(self) -> Headline:
        """The verdict in one sentence, with the number that decided."""
        if self.word == NOT_MEASURABLE:
            return Headline(self.word, "too few texts of a kind", settle=f"at least {FEWEST} of each are needed")
        if self.word == NONE:
            return Headline(self.word, f"{self.with_sinks.brief} of texts have a token that many heads attend to")
        most, least = self.between
        number = f"the head that differs most attends to sinks {self.difference.brief} more on {most} than on {least}"
        if self.word == ALIKE:
            return Headline(self.word, number)
        cost = f"{self.gap.brief} nats more where they are active"
        beside = "no other head to draw" if math.isnan(self.random) else f"random ones: up to {self.random:.3f}"
        against = f"(p {self.p:.3g}); off, such heads cost {cost} ({beside})"
        return Headline(self.word, number, against, self._settle if self.word == INCONCLUSIVE else "")

    @property
    def _settle(self) -> str:
        if math.isnan(self.random):
            return "fewer heads (--heads) would leave others to hold them against"
        return "more texts would settle it"


def sinks_verdict(
    sure: Sequence[bool],
    mass: Float[Tensor, "text layer head"],
    contrast: DomainContrast,
    heads: Sequence[tuple[int, int]],
    off: Float[Tensor, "chosen text"],
    n_chosen: int,
    kinds: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> SinkVerdict:
    """The verdict; the first `n_chosen` of the heads are those that differ most, the others random ones."""
    ids = [str(i) for i in range(len(kinds))]
    draws = sample_and_resamples(ids, resamples, seed, list(kinds))
    first = heads[0]
    dormant, active = (contrast.domains[int(own[first])] for own in (contrast.dormant, contrast.active))
    most = _gaps(mass[:, first[0], first[1]][None], [(dormant, active)], kinds, draws)[0]
    pairs = [tuple(contrast.domains[int(own[head])] for own in (contrast.active, contrast.dormant)) for head in heads]
    gaps = _gaps(off, pairs, kinds, draws)
    gap = of_sample(gaps[:n_chosen].mean(dim=0), len(kinds))
    chance = float(gaps[n_chosen:, 0].abs().max()) if len(gaps) > n_chosen else math.nan
    difference, p = of_sample(most, len(kinds)), float(contrast.p[first])
    share = Estimate.exact(sum(sure) / len(sure), len(sure))
    word = NOT_MEASURABLE
    if min(list(kinds).count(one) for one in contrast.domains) >= FEWEST:
        word = _word(share, float(contrast.difference[first]), p, gap, chance)
    return SinkVerdict(word, share, difference, p, gap, chance, (dormant, active))


def _gaps(
    values: Float[Tensor, "head text"],
    pairs: Sequence[tuple[str, ...]],
    kinds: Sequence[str],
    draws: Float[Tensor, "draw text"],
) -> Float[Tensor, "head draw"]:
    """Of each head, the mean of its first kind minus that of its second, in the sample and its resamples."""
    found = []
    for own, (one, other) in zip(values.double(), pairs, strict=True):
        means = []
        for kind in (one, other):
            weights = draws * torch.tensor([name == kind for name in kinds])
            means.append(weights @ own / weights.sum(dim=1))
        found.append(means[0] - means[1])
    return torch.stack(found)


def _word(share: Estimate, difference: float, p: float, gap: Estimate, chance: float) -> str:
    if share.value < 0.5:
        return NONE
    if difference < MARGIN:
        return ALIKE
    if p > LEVEL or math.isnan(chance):
        return INCONCLUSIVE
    if gap.low > chance:
        return SWITCH
    return IDLE if gap.high <= min(chance, NOTICED) else INCONCLUSIVE
