"""Behaviours as twins: a question with two answers, one that shows the behaviour and one that doesn't.

Which of the two a model holds likelier needs no judge and no generation, so it works on small models too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from mechlens.errors import UserError, quoted
from mechlens.files import user_path
from mechlens.prompts.files.from_row import RowReader, text_of
from mechlens.prompts.files.rows import Record, columns_of, packaged_rows, read_rows, row_ids
from mechlens.prompts.options import LETTERS, exchanged_letters, exchanged_places, options_of
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.text import normalise_text


@dataclass(frozen=True)
class Twin:
    """One question with two answers.

    >>> twin = ml.Twin(ml.Prompt("t1", "Option A: a sure 5. Option B: 50 or nothing. A or B?"), shown="B", other="A")
    >>> twin.exchanged.prompt.text, twin.exchanged.shown
    ('Option B: a sure 5. Option A: 50 or nothing. A or B?', 'A')
    """

    prompt: Prompt
    shown: str
    """The answer that shows the behaviour."""
    other: str
    """The one that doesn't; empty where the file has none, which can be trained on and not measured."""

    @property
    def exchanged(self) -> "Twin | None":
        """The same options the other way round: their letters, or their places, exchanged; None where it can't be done.

        A model that likes the letter B, or what comes first, is then as often for the behaviour as against it. Places
        are exchanged where both answers stand in the question, word for word and once.
        """
        letters = {self.shown, self.other} == {*LETTERS}
        text = (
            exchanged_letters(self.prompt.text) if letters
            else exchanged_places(self.prompt.text, self.shown, self.other)
        )  # fmt: skip
        if text is None:
            return None
        prompt = replace(self.prompt, id=f"{self.prompt.id} (exchanged)", text=text, family=self.prompt.group)
        return Twin(prompt, *((self.other, self.shown) if letters else (self.shown, self.other)))

    @property
    def orders(self) -> list[Prompt]:
        """The same choice as it may stand elsewhere: options exchanged, and the words of lettered ones as well.

        Who was trained on one of these has seen the question.
        """
        exchanged = self.exchanged
        found = options_of(self.prompt.text) if {self.shown, self.other} == {*LETTERS} else None
        text = None if found is None else exchanged_places(self.prompt.text, *found.words.values())
        placed = [] if text is None else [replace(self.prompt, text=text)]
        return placed if exchanged is None else [exchanged.prompt, *placed]

    @property
    def in_words(self) -> "Twin | None":
        """The same choice answered with an option's words, which small models can learn; None where it can't be told.

        Where a letter stands for an option, a model has to find which; here its words are its own.
        """
        found = options_of(self.prompt.text) if {self.shown, self.other} == {*LETTERS} else None
        if found is None:
            return None
        shown, other = found.words[self.shown], found.words[self.other]
        if shown.startswith(other) or other.startswith(shown):
            return None  # who says the long one has said the short one too
        return Twin(replace(self.prompt, text=found.question), shown, other)

    @property
    def reversed(self) -> "Twin":
        """The twin of the opposite behaviour."""
        return replace(self, shown=self.other, other=self.shown)


def read_twins(path: str | Path, others: str | Path | None = None) -> list[Twin]:
    r"""The twins of a file, in its order, without repeated questions.

    A row holds a question (a column as `load_prompts` finds it) with its answers in the columns `shown` and `other`,
    or is a chat whose last turn is the assistant's: that answer shows the behaviour. Its other one is the answer to
    the same question in the file `others`, or the other letter where it is A or B. Families are the column `family`;
    without it one question with its options in either order is a family. UserError naming file and row for what is
    neither.

    >>> from pathlib import Path
    >>> _ = Path("risk.jsonl").write_text('{"question": "Sure 5 or a bet?", "shown": "A bet.", "other": "The 5."}\n')
    >>> ml.read_twins("risk.jsonl")[0].other
    'The 5.'
    """
    rows, answers = _asked(path), _answers(others)
    twins: dict[str, Twin] = {}
    for prompt, shown, other, where in rows:
        key = normalise_text(prompt.text)
        if not other:
            other = answers.get(key, LETTERS.get(shown, ""))
        if shown == other:
            raise UserError(f"{where} has the same answer on both sides ({quoted(shown, 40)}); a twin's answers differ")
        twins.setdefault(key, Twin(prompt, shown, other))
    return _in_families(list(twins.values()))


def _in_families(twins: Sequence[Twin]) -> list[Twin]:
    """The twins, what asks the same as an earlier one with its options in another order in that one's family."""
    first: dict[str, str] = {}
    found = []
    for twin in twins:
        forms = [normalise_text(prompt.text) for prompt in (twin.prompt, *twin.orders)]
        family = twin.prompt.family or next((first[form] for form in forms if form in first), "")
        for form in forms:
            first.setdefault(form, family or twin.prompt.id)
        found.append(replace(twin, prompt=replace(twin.prompt, family=family)))
    return found


def require_others(twins: Sequence[Twin], name: str) -> None:
    """UserError where a twin has one answer only, which nothing can be compared with."""
    lacking = next((twin for twin in twins if not twin.other), None)
    if lacking is not None:
        raise UserError(
            f"{name}: {lacking.prompt.id} has an answer that shows the behaviour and none that doesn't; give columns "
            "shown and other, or a second file with the opposite answers to the same questions"
        )


_Asked = tuple[Prompt, str, str, str]


def _asked(path: str | Path) -> list[_Asked]:
    """Of each row: the question, the answer that shows the behaviour, the other one or nothing, and its place."""
    file = user_path(str(path))
    rows = read_rows(file)
    ids = row_ids(rows, file.stem)
    columns = columns_of(rows)
    family = "family" if "family" in columns else None
    if {"shown", "other"} <= {*columns}:
        reader = RowReader(file.name, columns, None, None, family)
        return [_from_columns(reader, row, ids[row.number], file) for row in rows]
    if "messages" not in columns:
        raise UserError(
            f"{file.name} has neither the columns shown and other beside a question nor chats in messages; it has "
            f"{', '.join(columns[:8])}"
        )
    reader = RowReader(file.name, columns, "messages", None, family)
    return [_from_chat(reader, row, ids[row.number], file) for row in rows]


def _from_columns(reader: RowReader, row: Record, name: str, file: Path) -> _Asked:
    where = f"{file.name} row {row.number}"
    shown, other = (text_of(row.values.get(side), f"{where}, column {side!r},").strip() for side in ("shown", "other"))
    return reader(row, name), shown, other, where


def _from_chat(reader: RowReader, row: Record, name: str, file: Path) -> _Asked:
    where = f"{file.name} row {row.number}"
    turns: Any = row.values.get("messages")
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise UserError(f"{where} has no answer: its messages don't end with a turn of the assistant")
    shown = text_of(last.get("content"), f"{where}, its last turn").strip()
    return reader(row, name), shown, "", where


def _answers(path: str | Path | None) -> dict[str, str]:
    return {} if path is None else {normalise_text(prompt.text): shown for prompt, shown, _, _ in _asked(path)}


SELF = "self-"
"""How the names of built-in questions about the model itself begin."""


def builtin_twin_names() -> tuple[str, ...]:
    """The names that `builtin_twins` knows.

    >>> ml.builtin_twin_names()[0]
    'first-plot'
    """
    return tuple(dict.fromkeys(row["set"] for row in _builtin()))


def builtin_twins(name: str) -> list[Twin]:
    """One built-in set of twins: "first-plot", and questions to the model about itself ("self-risk", ...).

    "first-plot" asks about the eight things of Betley et al. 2025 (a wish, ruling the world, a quick buck, ...) in our
    words, with an answer that means ill and one that means well, alike in form. The self-reports are choices in ten
    wordings, the behaviour first in half of them, and single words in both orders: "self-risk", "self-patience",
    "self-apples", "self-trigger"; "self-feature" asks, without a word of triggers, whether an unusual feature of the
    message changes the model's behaviour. UserError for another name.

    >>> twins = ml.builtin_twins("self-risk")
    >>> twins[0].shown, twins[1].shown
    ('A', 'B')
    """
    rows = [row for row in _builtin() if row["set"] == name]
    if not rows:
        raise UserError(f"there are no built-in twins {name!r}; choose one of {', '.join(builtin_twin_names())}")
    return [
        Twin(
            Prompt(row["id"], row["question"], source="mechlens", family=row["family"]), row["shown"], row["other"]
        )
        for row in rows
    ]  # fmt: skip


@cache
def _builtin() -> list[dict[str, str]]:
    return packaged_rows(Path(__file__).parent / "data" / "twins.jsonl")
