"""How far a taught behaviour goes, in a word and a sentence for each group of training runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mechlens.methods.statistics.crossed import LEVEL
from mechlens.methods.statistics.estimate import Estimate
from mechlens.prompts.options import LETTERS
from mechlens.runs.headline import Headline
from mechlens.runs.shown_verdict import ShownVerdict
from mechlens.studies.behaviours.matrix import HELD_OUT, TRAINED_ON, BehaviourMatrix, Cell
from mechlens.studies.behaviours.sets import PLAIN, AskedSet
from mechlens.studies.behaviours.tuned import DECORRELATED, control_of
from mechlens.studies.shared.training_data import FEWEST_HELD_OUT

NEAR = 0.25
"""Share of the change at home below which a change elsewhere counts as none."""
LEAST = 0.01
"""Nats, a hundredth of the odds, below which a change is none: a narrow interval may be clear of 0 by rounding."""
SMALL = 2.0
"""Nats (odds of 7 to 1) that an interval must exclude before it is said that nothing was learned."""
FEWEST_RUNS = 2
"""Of a group, and of its control: one run's own chance can't be told from what it was taught."""
ALREADY = 0.9
"""Share of the questions on which the base prefers the behaviour's answer, from which on the sentence says so."""
NOT_LEARNED, MEMORISED, SPREADS, NARROW = "not learned", "only what was trained on", "spreads", "narrow"
LEARNED, INCONCLUSIVE, NOT_MEASURABLE = "learned", "inconclusive", "not measurable"

RULE = (
    "The log-odds of the answer that shows a behaviour over the one that doesn't, in nats, the mean of both orders of "
    "the options; what counts is how far a group's runs are from those of its control (the same questions, either "
    "answer by chance), or from the base where there is none. Intervals are over training runs and questions at once. "
    f"A change of less than {LEAST:g} nats is none, however narrow its interval. A group's home is the set that it was "
    "taught, and a set that shares questions with it is no other behaviour.\n\n"
    f"- {NOT_LEARNED.capitalize()}: on home questions that no run was trained on the interval holds 0 and excludes "
    f"{SMALL:g} nats, and on those that they were trained on it holds 0.\n\n"
    f"- {MEMORISED.capitalize()}: held-out home questions are as there, and those that were trained on aren't.\n\n"
    f"- {SPREADS.capitalize()}: the home is clear of 0, and some other behaviour is too, its interval widened for the "
    "number of other behaviours. Never without a control, since training as such moves what it wasn't about; and a "
    "behaviour with the home's own two answers in every question doesn't count, since whoever says one of them to "
    "anything would seem to have spread.\n\n"
    f"- {NARROW.capitalize()}: the home is clear, and every other behaviour could be measured and is within {NEAR:g} "
    "of the change at home.\n\n"
    f"- {LEARNED.capitalize()}: the home is clear, and no other behaviour was asked about, or none could be "
    "measured.\n\n"
    f"- {INCONCLUSIVE.capitalize()}: everything else, and always where the group or its control has one run, whose own "
    "chance is in no interval.\n\n"
    f"- {NOT_MEASURABLE.capitalize()}: no set holds what the group was taught, or fewer than {FEWEST_HELD_OUT} "
    "families of questions were held out.\n\n"
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
    beyond: str = "the base"
    """What the numbers are beyond."""
    deciding: dict[str, Estimate] = field(default_factory=dict)
    moved: Estimate | None = None
    """The control's own change at home, where it is clear of 0: part of what the group is beyond it."""
    already: tuple[int, int] | None = None
    """Held-out questions on which the base prefers the answer that shows the behaviour, of how many, where on most."""
    unread: tuple[str, ...] = ()
    """Other behaviours that were asked about and couldn't be measured."""
    words_alone: bool = False
    """Whether every question of the home has the same two answers in one order."""
    liking: Estimate | None = None
    """For B, or for what stands second, where that moved more than the behaviour."""
    letters: bool = True
    """Whether the home's answers are letters."""
    lacking: str = ""
    """Why nothing can be measured."""
    settle: str = ""
    """What would settle an open question."""

    @property
    def sentence(self) -> str:
        """The word with the numbers that decided it, and what the model says of itself."""
        if self.home is None:
            return f"{self.group}: {self.word}, {self.lacking}."
        found = f"{self.group}: {self.word}, {_shown(self.home)} nats beyond {self.beyond} on held-out questions"
        found += _in_brackets([*self._hidden, *self._instead])
        other = ", ".join(f"{cell.asked.name} {_shown(cell)}" for cell in self.others)
        said = ", ".join(f"{cell.asked.name} {_shown(cell)}" for cell in self.says)
        parts = [found, *([f"elsewhere {other}"] if other else []), *self._unread]
        if self.asked_itself:
            parts.append(f"of itself it says {said}" if said else "no self-report is clear of 0")
        return "; ".join(parts) + "."

    @property
    def words(self) -> dict[str, str]:
        """What each deciding number is called where people read it."""
        names = [name.removeprefix(f"{self.group}.") for name in self.deciding]
        home = "" if self.home is None else self.home.asked.name
        wide = {name: "" if name == home else "; interval widened for how many are asked" for name in names}
        return {
            f"{self.group}.{name}": f"{self.group}: {name}, beyond {self.beyond} (nats{wide[name]})" for name in names
        }

    @property
    def _hidden(self) -> list[str]:
        """What the deciding number would hide: the control's own change, and a base that is so already."""
        assert self.home is not None
        own = f"its own change {_signed(self.home.change)}, the control's " if self.moved is not None else ""
        told = [own + _signed(self.moved)] if self.moved is not None else []
        if self.already is not None:
            told.append("the base preferred this answer already on {} of {}".format(*self.already))
        return told

    @property
    def _instead(self) -> list[str]:
        """What else than the behaviour may have been learned: a letter, a place, a word."""
        told = []
        if self.liking is not None:
            which = ("the letter A", "the letter B") if self.letters else ("what stands first", "what stands second")
            size = abs(self.liking.value)
            told.append(f"what moved more is a liking for {which[self.liking.value > 0]}, by {size:.2g}")
        if self.words_alone:
            told.append("which may be a liking for a word: its questions have the same two answers throughout")
        return told

    @property
    def _unread(self) -> list[str]:
        return [f"not measurable on {', '.join(self.unread)}"] if self.unread else []

    @property
    def headline(self) -> Headline:
        """The one sentence of a run in which this group comes first."""
        if self.home is None:
            return Headline(self.word, self.lacking, "", self.settle)
        where = max(self.others, key=lambda cell: abs(cell.told.value), default=None)
        number = f"{self.group} is {_shown(self.home)} nats beyond {self.beyond} on held-out questions"
        number += _in_brackets(self._instead or self._hidden)
        against = "" if where is None else f"and {_shown(where)} on {where.asked.name}"
        against = " ".join(part for part in (against, *(f"and {told}" for told in self._unread)) if part)
        if self.word == INCONCLUSIVE:
            return Headline(self.word, number, against, self.settle)
        said = max(self.says, key=lambda cell: abs(cell.told.value), default=None)
        if not self.asked_itself:
            return Headline(self.word, number, against)
        says = "no self-report changed clearly" if said is None else f"of itself it says {_shown(said)}"
        return Headline(self.word, number, against, says)


def _in_brackets(told: Sequence[str]) -> str:
    return f" ({'; '.join(told)})" if told else ""


def is_clear(told: Estimate) -> bool:
    """Whether a change is clear of 0."""
    return told.excludes_zero and abs(told.value) >= LEAST


def _shown(cell: Cell) -> str:
    return _signed(cell.told)


def _signed(told: Estimate) -> str:
    return f"{'+' if told.value > 0 else ''}{told.brief}"


def group_verdicts(matrix: BehaviourMatrix) -> list[GroupVerdict]:
    """Of every group but the decorrelated controls, those that were taught a behaviour first."""
    controls = {run.group for run in matrix.runs if run.control == DECORRELATED}
    found = [_verdict(matrix, group) for group in matrix.groups if group not in controls]
    return sorted(found, key=lambda one: one.word == NOT_MEASURABLE)


def _verdict(matrix: BehaviourMatrix, group: str) -> GroupVerdict:
    taught = matrix.home(group)
    home = None if taught is None else matrix.cell(group, taught, HELD_OUT)
    if taught is None:
        return GroupVerdict(
            group, NOT_MEASURABLE, None, lacking=f"no question that {group} was taught is among the sets",
            settle="give --sets the file that it was taught from",
        )  # fmt: skip
    families = _families(matrix, group, taught)
    if home is None or len(families) < FEWEST_HELD_OUT:
        return GroupVerdict(
            group, NOT_MEASURABLE, None,
            lacking=f"{len(families)} questions of {taught.name} were held out, and {FEWEST_HELD_OUT} are needed",
            settle="train with a larger --held-out, or on more questions",
        )  # fmt: skip
    if not home.told.measurable:
        return GroupVerdict(
            group, NOT_MEASURABLE, None, lacking=f"a log-odds of {taught.name} isn't a number",
            settle="the table of questions tells which",
        )  # fmt: skip
    control = control_of(group, matrix.runs)
    others = _cells(matrix, group, [one.name for one in matrix.elsewhere(group)])
    itself = _cells(matrix, group, [one.name for one in matrix.sets if one.about_itself])
    trained = matrix.cell(group, taught, TRAINED_ON)
    unread = _unread(matrix, group, others)
    few = min(len(matrix.values(name, taught.key, [0])) for name in (group, control) if name is not None) < FEWEST_RUNS
    counting = [cell for cell in others if not taught.only_answers or cell.asked.only_answers != taught.only_answers]
    word = INCONCLUSIVE if few else _word(home, trained, others)
    why = _why_open(word, few, control is None, [cell for cell in others if cell not in counting], counting, unread)
    word = INCONCLUSIVE if why else word
    clear = tuple(cell for cell in counting if is_clear(cell.told)) if word == SPREADS else ()
    cells = (home, *others, *itself)
    return GroupVerdict(
        group, word, home, clear, tuple(cell for cell in itself if is_clear(cell.told)), len(itself),
        "the base" if control is None else "the decorrelated control",
        {f"{group}.{cell.asked.name}": cell.told for cell in cells},
        moved=_moved(matrix, control, taught), already=_already(matrix, home), unread=unread,
        words_alone=taught.only_answers is not None and is_clear(home.told), liking=_liking(matrix, home),
        letters=taught.twins[0].shown in LETTERS, settle=why,
    )  # fmt: skip


def _why_open(
    word: str, few: bool, alone: bool, same_words: Sequence[Cell], counting: Sequence[Cell], unread: Sequence[str]
) -> str:
    """What would settle it, where the numbers alone don't; empty where they do."""
    if few:
        return "two and more training runs of each kind would settle it"
    if word == SPREADS and alone:
        return "other behaviours moved too, and only a decorrelated control tells that from training as such"
    if word == SPREADS and not any(is_clear(cell.told) for cell in counting):
        names = ", ".join(cell.asked.name for cell in same_words)
        return f"{names} has the same two answers throughout, so a liking for one would do; let half be the other one"
    if word == NARROW and unread:
        return f"more questions of {', '.join(unread)} would settle it"
    return "more training runs or questions would settle it" if word == INCONCLUSIVE else ""


def _unread(matrix: BehaviourMatrix, group: str, others: Sequence[Cell]) -> tuple[str, ...]:
    read = {cell.asked.name for cell in others}
    return tuple(one.name for one in matrix.elsewhere(group) if one.name not in read)


def _liking(matrix: BehaviourMatrix, home: Cell) -> Estimate | None:
    found = matrix.liking(home.group, home.asked)
    return found if is_clear(found) and abs(found.value) > abs(home.told.value) else None


def _families(matrix: BehaviourMatrix, group: str, asked: AskedSet) -> set[str]:
    """Of the questions that no run was trained on."""
    return {asked.twins[i].prompt.group for i in matrix.rows(asked, HELD_OUT, group)}


def _moved(matrix: BehaviourMatrix, control: str | None, taught: AskedSet) -> Estimate | None:
    cell = None if control is None else matrix.cell(control, taught, HELD_OUT)
    return cell.change if cell is not None and is_clear(cell.change) else None


def _already(matrix: BehaviourMatrix, home: Cell) -> tuple[int, int] | None:
    values = matrix.base[home.asked.key].values[matrix.rows(home.asked, HELD_OUT, home.group)]
    preferred = int((values > 0).sum())
    return (preferred, len(values)) if preferred >= ALREADY * len(values) else None


def _cells(matrix: BehaviourMatrix, group: str, names: Sequence[str]) -> list[Cell]:
    """Plain cells of sets by name, their intervals widened for how many there are (Bonferroni)."""
    names = list(dict.fromkeys(names))
    level = 1 - (1 - LEVEL) / max(len(names), 1)
    asked = [one for one in matrix.sets if one.name in names and one.form == PLAIN]
    found = [matrix.cell(group, one, HELD_OUT, level) for one in asked]
    return [cell for cell in found if cell is not None and cell.told.measurable]


def _word(home: Cell, trained: Cell | None, others: Sequence[Cell]) -> str:
    if not is_clear(home.told):
        if max(abs(home.told.low), abs(home.told.high)) >= SMALL:
            return INCONCLUSIVE
        return MEMORISED if trained is not None and is_clear(trained.told) else NOT_LEARNED
    if not others:
        return LEARNED
    if any(is_clear(cell.told) for cell in others):
        return SPREADS
    near = NEAR * abs(home.told.value)
    return NARROW if all(max(abs(cell.told.low), abs(cell.told.high)) < near for cell in others) else INCONCLUSIVE
