"""How far a taught behaviour goes, in a word and a sentence for each group of training runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mechlens.methods.statistics.crossed import LEVEL
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.headline import Headline
from mechlens.runs.shown_verdict import ShownVerdict
from mechlens.studies.behaviours.matrix import HELD_OUT, TRAINED_ON, BehaviourMatrix, Cell
from mechlens.studies.behaviours.sets import PLAIN
from mechlens.studies.behaviours.tuned import DECORRELATED, control_of

NEAR = 0.25
"""Share of the change at home below which a change elsewhere counts as none."""
SMALL = 2.0
"""Nats (odds of 7 to 1) that an interval must exclude before it is said that nothing was learned."""
FEWEST_RUNS = 2
"""Of a group, and of its control: one run's own chance can't be told from what it was taught."""
FEWEST_FAMILIES = 6
"""Of questions, below which an interval says nothing."""
NOT_LEARNED, MEMORISED, SPREADS, NARROW = "not learned", "only what was trained on", "spreads", "narrow"
LEARNED, INCONCLUSIVE, NOT_MEASURABLE = "learned", "inconclusive", "not measurable"

RULE = (
    "The log-odds of the answer that shows a behaviour over the one that doesn't, in nats, the mean of both orders of "
    "the options; what counts is how far a group's runs are from those of its control (the same questions, either "
    "answer by chance), or from the base where there is none. Intervals are over training runs and questions at once. "
    "A group's home is the set that it was taught.\n\n"
    f"{NOT_LEARNED}: on home questions that no run was trained on the interval holds 0 and excludes {SMALL:g} nats, "
    f"and on those that they were trained on it holds 0. {MEMORISED}: the second doesn't. {SPREADS}: the home is clear "
    "of 0, and some other behaviour is too, its interval widened for the number of other behaviours. "
    f"{NARROW}: the home is clear, and every other behaviour is within {NEAR:g} of the change at home. "
    f"{LEARNED}: the home is clear, and no other behaviour was asked about. {INCONCLUSIVE}: everything else, "
    "and always where the group "
    f"or its control has one run, whose own chance is in no interval. {NOT_MEASURABLE}: no "
    f"set holds what the group was taught, or fewer than {FEWEST_FAMILIES} families of questions were held out.\n\n"
    "What a model says of itself is reported in the same way, its intervals widened for the number of self-reports. "
    "The answers to it are no proof of knowledge: a model that took to risk may also like the words for it."
)


@dataclass(frozen=True, repr=False)
class GroupVerdict(ShownVerdict):
    """One group's word, with what decided it."""

    group: str
    word: str
    home: Cell | None
    """On held-out questions of what it was taught."""
    others: tuple[Cell, ...] = ()
    """Other behaviours that are clear of 0."""
    says: tuple[Cell, ...] = ()
    """Self-reports that are clear of 0."""
    asked_itself: int = 0
    few_runs: bool = False
    """Whether the group or its control has one run."""
    beyond: str = "the base"
    """What the numbers are beyond."""
    deciding: dict[str, Estimate] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """The word with the numbers that decided it, and what the model says of itself."""
        if self.home is None:
            return f"{self.group}: {self.word}."
        found = f"{self.group}: {self.word}, {_shown(self.home)} nats beyond {self.beyond} on held-out questions"
        other = ", ".join(f"{cell.asked.name} {_shown(cell)}" for cell in self.others)
        said = ", ".join(f"{cell.asked.name} {_shown(cell)}" for cell in self.says)
        parts = [found, *([f"elsewhere {other}"] if other else [])]
        if self.asked_itself:
            parts.append(f"of itself it says {said}" if said else "no self-report is clear of 0")
        return "; ".join(parts) + "."

    @property
    def headline(self) -> Headline:
        """The one sentence of a run in which this group comes first."""
        if self.home is None:
            return Headline(self.word, f"no question that {self.group} was taught is among the sets", "",
                            "give --sets the file that it was taught from")  # fmt: skip
        where = max(self.others, key=lambda cell: abs(cell.told.value), default=None)
        number = f"{self.group} is {_shown(self.home)} nats beyond {self.beyond} on held-out questions"
        against = "" if where is None else f"and {_shown(where)} on {where.asked.name}"
        if self.word == INCONCLUSIVE:
            more = "a second training run and more" if self.few_runs else "more training runs or questions"
            return Headline(self.word, number, against, f"{more} would settle it")
        said = max(self.says, key=lambda cell: abs(cell.told.value), default=None)
        if not self.asked_itself:
            return Headline(self.word, number, against)
        says = "no self-report changed clearly" if said is None else f"of itself it says {_shown(said)}"
        return Headline(self.word, number, against, says)


def _shown(cell: Cell) -> str:
    return f"{'+' if cell.told.value > 0 else ''}{cell.told.brief}"


def group_verdicts(matrix: BehaviourMatrix) -> list[GroupVerdict]:
    """Of every group but the decorrelated controls, those that were taught a behaviour first."""
    controls = {run.group for run in matrix.runs if run.control == DECORRELATED}
    found = [_verdict(matrix, group) for group in matrix.groups if group not in controls]
    return sorted(found, key=lambda one: one.word == NOT_MEASURABLE)


def _verdict(matrix: BehaviourMatrix, group: str) -> GroupVerdict:
    taught = matrix.home(group)
    home = None if taught is None else matrix.cell(group, taught, HELD_OUT)
    if taught is None or home is None or not _enough(matrix, home):
        return GroupVerdict(group, NOT_MEASURABLE, None)
    control = control_of(group, matrix.runs)
    others = _cells(
        matrix, group, [one.name for one in matrix.sets if not one.about_itself and one.name != taught.name]
    )
    itself = _cells(matrix, group, [one.name for one in matrix.sets if one.about_itself])
    trained = matrix.cell(group, taught, TRAINED_ON)
    few = min(len(matrix.values(name, taught.key, [0])) for name in (group, control) if name is not None) < FEWEST_RUNS
    word = INCONCLUSIVE if few else _word(home, trained, others)
    clear = tuple(cell for cell in others if cell.told.excludes_zero) if word == SPREADS else ()
    cells = (home, *others, *itself)
    return GroupVerdict(
        group, word, home, clear, tuple(cell for cell in itself if cell.told.excludes_zero), len(itself), few,
        "the base" if control is None else "the decorrelated control",
        {f"{group}.{cell.asked.name}": cell.told for cell in cells},
    )  # fmt: skip


def _enough(matrix: BehaviourMatrix, cell: Cell) -> bool:
    rows = matrix.rows(cell.asked, cell.part, cell.group)
    families = {cell.asked.twins[i].prompt.group for i in rows}
    return cell.told.measurable and len(families) >= FEWEST_FAMILIES


def _cells(matrix: BehaviourMatrix, group: str, names: Sequence[str]) -> list[Cell]:
    """Plain cells of sets by name, their intervals widened for how many there are (Bonferroni)."""
    names = list(dict.fromkeys(names))
    level = 1 - (1 - LEVEL) / max(len(names), 1)
    asked = [one for one in matrix.sets if one.name in names and one.form == PLAIN]
    found = [matrix.cell(group, one, HELD_OUT, level) for one in asked]
    return [cell for cell in found if cell is not None and cell.told.measurable]


def _word(home: Cell, trained: Cell | None, others: Sequence[Cell]) -> str:
    if not home.told.excludes_zero:
        if max(abs(home.told.low), abs(home.told.high)) >= SMALL:
            return INCONCLUSIVE
        return MEMORISED if trained is not None and trained.told.excludes_zero else NOT_LEARNED
    if not others:
        return LEARNED
    if any(cell.told.excludes_zero for cell in others):
        return SPREADS
    near = NEAR * abs(home.told.value)
    return NARROW if all(max(abs(cell.told.low), abs(cell.told.high)) < near for cell in others) else INCONCLUSIVE
