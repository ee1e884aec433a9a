"""What became of a concept at a checkpoint, in words: a rule on paired differences, written out beside its numbers.

A[s, t] is the AUROC of the readout fitted at s on the prompts of t; 0 is the base.
"""

from dataclasses import dataclass

from mechlens.methods.statistics.estimate import Estimate

READABLE = 0.6
FELL = 0.1
HELD = 0.2
MOVED = 0.3

CHANGES = {
    "own_change": "direction fitted here, change from the base",
    "frozen_change": "base's direction, change from the base",
    "probe_change": "probe fitted here, change from the base",
    "readout_gap": "base's direction behind the one fitted here",
    "threshold_gap": "frozen threshold behind a new one",
}
"""What is compared, in words: changes of AUROC, then two gaps at the checkpoint (AUROC, balanced accuracy)."""
TITLES = {
    "base_auroc": "AUROC in the base",
    **CHANGES,
    "gap": "refusal gap",
    "gap_change": "refusal gap, change from the base",
}
"""Every deciding number in words."""

RULE = (
    f"A number fell if it is at least {FELL} lower and its interval lies below 0, and held if it did not fall and its "
    f"interval lies above -{HELD}; otherwise it is open. All differences are paired, over the same test prompts, at "
    "the level chosen on the base's validation prompts.\n\n"
    f"Not measurable: the direction's AUROC in the base is not readable (lower bound at most {READABLE}).\n\n"
    "The representation is kept if any of three read-outs held, each against itself in the base: the base's frozen "
    "direction (`frozen_change`), a direction fitted on the checkpoint (`own_change`), a logistic probe fitted there "
    "(`probe_change`). Representation lost: all three fell. A mean difference alone can't show a loss, since it is "
    "also worse where the prompts only began to vary more along it.\n\n"
    "Where the representation is kept: read-out drift means that the base's frozen direction fell behind the one "
    "fitted anew (`readout_gap`), or, where that one did not hold, that it fell itself. Threshold drift: the frozen "
    "direction held, and accuracy at its frozen threshold fell behind the accuracy at a threshold chosen anew on the "
    f"checkpoint's validation prompts (`threshold_gap`). Behaviour decoupled: the behaviour `gap` (refusal rate of "
    f"the concept's positive prompts minus that of its negative ones) changed by at least {MOVED}, with an interval "
    "that leaves 0 out; this word comes first, and any drift is named after it. Kept: none of these. Inconclusive: a "
    "number that would decide is open."
)

SENTENCES = {
    "kept": "The base's own direction still reads the concept, at the same threshold.",
    "read-out drift": "The concept is still there and the base's frozen direction no longer reads it as well.",
    "threshold drift": "The base's direction still orders the prompts and its threshold is in the wrong place.",
    "representation lost": "Neither the base's direction nor anything fitted on this checkpoint reads the concept as "
    "well as in the base.",
    "behaviour decoupled": "The concept is still represented and the model no longer acts on it as the base does.",
    "inconclusive": "The intervals are too wide to say.",
    "not measurable": "The base itself doesn't represent the concept readably, or has too few prompts for it.",
}


@dataclass(frozen=True)
class TrackVerdict:
    """What became of one concept at one checkpoint."""

    concept: str
    step: int
    word: str
    also: str
    """A drift beside decoupled behaviour; empty where there is none."""
    deciding: dict[str, Estimate]

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        more = f" (with {self.also})" if self.also else ""
        return f"{self.concept.capitalize()} at step {self.step}: {self.word}{more}. {SENTENCES[self.word]}"


def track_verdict(concept: str, step: int, deciding: dict[str, Estimate]) -> TrackVerdict:
    """The verdict from `base_auroc`, `gap_change` and all of `CHANGES`."""
    word, also = _word(deciding)
    return TrackVerdict(concept, step, word, also, deciding)


def _word(deciding: dict[str, Estimate]) -> tuple[str, str]:
    # What isn't measurable is NaN, and no comparison with NaN holds.
    if not deciding["base_auroc"].low > READABLE:
        return "not measurable", ""
    refitted, frozen, probe = (deciding[name] for name in ("own_change", "frozen_change", "probe_change"))
    if not any(_held(change) for change in (refitted, frozen, probe)):
        return (
            "representation lost" if all(_fell(change) for change in (refitted, frozen, probe)) else "inconclusive"
        ), ""
    readout, threshold, moved = (
        deciding["readout_gap"] if _held(refitted) else frozen, deciding["threshold_gap"], deciding["gap_change"],
    )  # fmt: skip
    drift = "read-out drift" if _fell(readout) else "threshold drift" if _held(readout) and _fell(threshold) else ""
    if abs(moved.value) >= MOVED and (moved.low > 0 or moved.high < 0):
        return "behaviour decoupled", drift
    if drift:
        return drift, ""
    certain = _held(readout) and _held(threshold) and moved.measurable
    return ("kept" if certain else "inconclusive"), ""


def _fell(change: Estimate) -> bool:
    return change.value <= -FELL and change.high < 0


def _held(change: Estimate) -> bool:
    return not _fell(change) and change.low > -HELD
