"""What became of a concept at a checkpoint, in words: a rule on paired differences, written out beside its numbers.

After methods.md 9.5: A[s, t] is the AUROC of the readout fitted at s on the prompts of t; 0 is the base.
"""

from dataclasses import dataclass

from mechlens.methods.estimate import Estimate

READABLE = 0.6
FELL = 0.1
HELD = 0.2
MOVED = 0.3

RULE = (
    f"A number *fell* if it is at least {FELL} lower and its interval lies below 0, and *held* if it did not fall and "
    f"its interval lies above -{HELD}; otherwise it is open. All differences are paired, over the same test prompts, "
    "at the level chosen on the base's validation prompts. "
    f"Before anything, the refitted AUROC in the base must be readable (lower bound above {READABLE}); else *not "
    "measurable*. *Representation lost*: the refitted AUROC A[t,t] fell from A[0,0]. Otherwise, if it held, the "
    "representation is kept, and: *read-out drift*: the base's frozen direction fell behind the refitted one, A[0,t] "
    "from A[t,t]; *threshold drift*: the frozen direction held, and accuracy at its frozen threshold fell behind the "
    "accuracy at a threshold chosen anew on the checkpoint's validation prompts. "
    f"*Behaviour decoupled*: the representation is kept, and the behaviour gap (refusal rate of the concept's positive "
    f"prompts minus that of its negative ones) changed by at least {MOVED} with an interval that leaves 0 out; this "
    "word comes first, and any drift beside it is named after it. *Kept*: all three held and the gap did not change. "
    "*Inconclusive*: a number that would decide is open."
)

SENTENCES = {
    "kept": "The base's own direction still reads the concept, at the same threshold.",
    "read-out drift": "The concept is still there and the base's frozen direction no longer reads it as well.",
    "threshold drift": "The base's direction still orders the prompts and its threshold is in the wrong place.",
    "representation lost": "A direction fitted on this checkpoint itself reads the concept worse than in the base.",
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
        return f"{self.concept} at step {self.step}: {self.word}{more}. {SENTENCES[self.word]}"


def track_verdict(concept: str, step: int, deciding: dict[str, Estimate]) -> TrackVerdict:
    """The verdict from `base_auroc`, `own_change`, `readout_gap`, `threshold_gap` and `gap_change`."""
    base, lost, readout, threshold, moved = (
        deciding[name] for name in ("base_auroc", "own_change", "readout_gap", "threshold_gap", "gap_change")
    )
    word, also = _word(base, lost, readout, threshold, moved)
    return TrackVerdict(concept, step, word, also, deciding)


def _word(base: Estimate, lost: Estimate, readout: Estimate, threshold: Estimate, moved: Estimate) -> tuple[str, str]:
    # What isn't measurable is NaN, and no comparison with NaN holds.
    if not base.low > READABLE:
        return "not measurable", ""
    if _fell(lost):
        return "representation lost", ""
    if not _held(lost):
        return "inconclusive", ""
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
