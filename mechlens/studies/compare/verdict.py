"""Where moving activations moves the behaviour, in one sentence: a rule on held-out recoveries.

How often it errs on grids with a planted truth (8 prompts, 12 layers, 10 tokens; 200 draws each by `words` in
tests/test_compare.py), where the noise of a place is 0.15 of the gap between A and B, and where it is 0.4:

| truth (share of the gap) | right | inconclusive | wrong | right | inconclusive | wrong |
|---|--:|--:|--:|--:|--:|--:|
| nothing anywhere: no one place | 100% | 0% | 0% | 55% | 44% | 1% |
| a fifth everywhere: no one place | 89% | 10% | 0.5% | 23% | 71% | 6% |
| only the last token, up to 1 | 100% | 0% | 0% | 64% | 35% | 1% |
| an earlier token too, 0.9 | 100% | 0% | 0% | 84% | 16% | 0% |
| an earlier token, but 0.35: only the last | 50% | 45% | 5% | 28% | 58% | 14% |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.patching.result import PatchResult
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import of_sample, sample_and_resamples
from mechlens.runs.headline import Headline
from mechlens.runs.shown_verdict import ShownVerdict
from mechlens.settings import RESAMPLES
from mechlens.studies.compare.config import FEWEST
from mechlens.studies.compare.study import MovedActivations

HALF, QUARTER = 0.5, 0.25
ALIKE, NOT_MEASURABLE, INCONCLUSIVE = "behave alike", "not measurable", "inconclusive"
EARLIER, LAST, NOWHERE = "one earlier token", "only the last token", "no one place"
TITLES = {
    "earlier": "recovery at one earlier token, beyond a random vector",
    "last": "recovery at the last token, beyond a random vector",
}

RULE = (
    "Recovery of B's refusal log-odds when one residual vector of B is put into A's run of the same prompt: 0 is A's "
    "own, 1 is B's (mean change over mean gap). What counts is how much more that recovers than a random vector as far "
    "from A's own at the same place; and each prompt's place (layer and token) is the best one of the other prompts, "
    "because the largest of a grid is flattered. A place carries the behaviour if this is at least "
    f"{HALF:g} and its interval lies above {QUARTER:g}, and doesn't if its interval lies below {HALF:g}.\n\n"
    f"- {EARLIER.capitalize()}: a place before the last token carries it.\n\n"
    f"- {LAST.capitalize()}: none before it does, and the last token does, where late layers hold whatever the model "
    "is "
    "about to say.\n\n"
    f"- {NOWHERE.capitalize()}: neither does.\n\n"
    f"- {INCONCLUSIVE.capitalize()}: everything else.\n\n"
    f"- {NOT_MEASURABLE.capitalize()}: fewer than {FEWEST} prompts that "
    "one checkpoint refuses and the other accepts have anything to recover."
)


@dataclass(frozen=True, repr=False)
class MovedVerdict(ShownVerdict):
    """The word, the sentence, and the numbers that decided, by the keys of `TITLES`."""

    headline: Headline
    sentence: str
    deciding: dict[str, Estimate]

    @property
    def word(self) -> str:
        """The verdict in a word or a few."""
        return self.headline.verdict


def moved_verdict(moved: MovedActivations, seed: int) -> MovedVerdict:
    """The verdict on what B's activations did in A's runs."""
    asked = f"the two behave differently on {moved.differing} of {moved.of} harmful test prompts"
    if moved.differing == 0:
        headline = Headline(ALIKE, asked, "", "there is nothing to explain")
        return MovedVerdict(headline, f"{_begun(ALIKE)}: {asked}, so there is nothing to explain.", {})
    sweep, control = moved.result, moved.control
    families = () if sweep is None else {sweep.families[i] for i in _usable(sweep)}
    if sweep is None or control is None or len(families) < FEWEST or len(sweep.positions) < 2:
        patched = (
            f"{asked}, {len(families)} of those patched have anything to recover, and it takes {FEWEST} (--patched); "
            "harmless ones aren't patched, so where it is those that are answered otherwise, give them as --harmful"
        )
        number, against = f"{len(families)} prompts have a difference to recover", f"where {FEWEST} are needed"
        headline = Headline(
            NOT_MEASURABLE, number, against, "more harmful prompts that one refuses and the other accepts would do"
        )
        return MovedVerdict(headline, f"{_begun(NOT_MEASURABLE)}: {patched}.", {})
    last = len(sweep.positions) - 1
    found = {
        "earlier": held_out(sweep, control, range(last), seed),
        "last": held_out(sweep, control, [last], seed),
    }
    word = _word(found["earlier"], found["last"])
    lead = {
        EARLIER: f"One earlier token carries what B does differently, first at {_where(sweep, range(last))}",
        LAST: f"Only the last token carries what B does differently, first at {_where(sweep, [last])}",
        NOWHERE: "No one place in A's run carries what B does differently",
        INCONCLUSIVE: f"Where A's run carries what B does differently is {INCONCLUSIVE}",
    }[word]
    numbers = f"recovery beyond a random vector {found['earlier']} before the last token, {found['last']} at it"
    return MovedVerdict(_headline(word, found), f"{lead}: {numbers}; {asked}.", found)


def _headline(word: str, found: Mapping[str, Estimate]) -> Headline:
    """The one sentence: the recovery that decided, beside the other."""
    earlier = f"a place before the last token recovers {found['earlier'].brief} of it beyond a random vector"
    settle = (
        "more harmful prompts that one refuses and the other accepts would settle it" if word == INCONCLUSIVE else ""
    )
    return Headline(word, earlier, f"where {HALF:g} is needed, and the last token {found['last'].brief}", settle)


def held_out(sweep: PatchResult, control: PatchResult, positions: Sequence[int], seed: int) -> Estimate:
    """Recovery beyond the control's, each family's at the place that is best for the other families."""
    rows = _usable(sweep)
    own, random = (_towards(sweep, one, rows, positions) for one in (sweep, control))
    families = [sweep.families[i] for i in rows]
    excess = torch.zeros(len(rows), dtype=torch.float64)
    for i, family in enumerate(families):
        best = int(own[[k for k, other in enumerate(families) if other != family]].sum(dim=0).argmax())
        excess[i] = own[i, best] - random[i, best]
    gap = (sweep.target - sweep.start)[rows].double().abs()
    weights = sample_and_resamples(families, RESAMPLES, seed)
    return of_sample((weights @ excess) / (weights @ gap), len(rows))


def _word(earlier: Estimate, last: Estimate) -> str:
    if _carries(earlier):
        return EARLIER
    if earlier.high < HALF:
        return LAST if _carries(last) else NOWHERE if last.high < HALF else INCONCLUSIVE
    return INCONCLUSIVE


def _carries(recovery: Estimate) -> bool:
    return recovery.value >= HALF and recovery.low > QUARTER


def _where(sweep: PatchResult, positions: Sequence[int]) -> str:
    """The first layer at which the best of these tokens recovers half, else its best layer; of all prompts."""
    rows = _usable(sweep)
    gap = (sweep.target - sweep.start)[rows].double().abs().sum()
    grid = (_towards(sweep, sweep, rows, positions).sum(dim=0) / gap).reshape(len(sweep.layers), -1)
    layer, token = divmod(int(grid.argmax()), grid.shape[1])
    half = (grid[:, token] >= HALF).nonzero().flatten().tolist()
    return f"layer {sweep.layers[half[0] if half else layer]}, {sweep.positions[positions[token]]}"


def _usable(sweep: PatchResult) -> list[int]:
    return [i for i, has in enumerate(sweep.has_gap.tolist()) if has]


def _towards(
    sweep: PatchResult, patched: PatchResult, rows: Sequence[int], positions: Sequence[int]
) -> Float[Tensor, "prompt place"]:
    """Change of the metric towards B's at every place, of each prompt."""
    sign = (sweep.target - sweep.start)[rows].double().sign()
    effect = patched.effect()[rows][:, :, list(positions)].double()
    return effect.flatten(1) * sign[:, None]


def _begun(word: str) -> str:
    return word[:1].upper() + word[1:]
