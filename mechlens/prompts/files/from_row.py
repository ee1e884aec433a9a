"""One row of data read as a prompt, or the sentence that says what is wrong with it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mechlens.errors import UserError, an, quoted
from mechlens.files import is_whole
from mechlens.prompts.files.parquet import Unreadable
from mechlens.prompts.files.rows import Record
from mechlens.prompts.prompt import Prompt, UnfitPrompt
from mechlens.registry import nearest

PROMPT_COLUMNS = ("instruction", "prompt", "question", "goal", "text", "bad_q", "messages")
"""Column names taken for the prompt, best first; capitals do not matter."""


@dataclass(frozen=True)
class RowReader:
    """Which columns of one source hold what; calling it with a row gives the Prompt."""

    name: str
    """The source, as error sentences call it."""
    columns: tuple[str, ...]
    """Every column of the source."""
    column: str | None
    """Where the prompt stands; None finds it among PROMPT_COLUMNS."""
    label_column: str | None
    family_column: str | None

    def __post_init__(self) -> None:
        for wanted in (self.column, self.label_column, self.family_column):
            if wanted is not None:
                require_column(self.columns, wanted, self.name)
        self.text_column()

    def __call__(self, row: Record, name: str) -> Prompt:
        """The row as a Prompt with the id `name`; UserError names source, row and column."""
        column = self.text_column()
        value, where = row.values.get(column), f"{self._at(row)}, column {column!r},"
        if isinstance(value, list) and value:
            system, history, text = last_asked(value, where)
        else:
            system, history, text = None, (), text_of(value, where)
        try:
            return Prompt(
                id=name,
                text=text + self._input(row, column),
                label="" if self.label_column is None else self._word(row, self.label_column),
                category=self._category(row),
                source=self.name,
                system=self._system(row) if system is None else system,
                history=history,
                family="" if self.family_column is None else self._word(row, self.family_column),
            )
        except UnfitPrompt as error:
            raise UserError(f"{self._at(row)}: {error}") from error

    def _at(self, row: Record) -> str:
        """Where the row stands, as error sentences call it; a source of one row has it by its own name."""
        return f"{self.name} row {row.number}" if row.number else self.name

    def text_column(self) -> str:
        """The column that holds the prompt; UserError lists the columns where none has a usual name."""
        if self.column is not None:
            return self.column
        for usual in PROMPT_COLUMNS:
            for column in self.columns:
                if column.lower() == usual:
                    return column
        raise UserError(
            f"{self.name} has none of the usual prompt columns ({', '.join(PROMPT_COLUMNS)}), "
            f"only {_listed(self.columns)}; name one with --column (column= in Python and in a list of sources), or "
            "rename it"
        )

    def _input(self, row: Record, column: str) -> str:
        # Alpaca puts what the instruction is about ("Summarise this text") into a column of its own.
        if self.column is not None or column != "instruction":
            return ""
        extra = row.values.get("input")
        return f"\n{extra}" if isinstance(extra, str) and extra.strip() else ""

    def _system(self, row: Record) -> str | None:
        """The column of system prompts, where there is one and this row has something in it."""
        value = row.values.get("system")
        if not isinstance(value, Unreadable) and not as_word(value).strip():
            return None
        return text_of(value, f"{self._at(row)}, column 'system',")

    def _category(self, row: Record) -> str:
        for column in self.columns:
            if column.lower() == "category":
                value = row.values.get(column)
                return "; ".join(map(as_word, value)) if isinstance(value, list) else as_word(value)
        return ""

    def _word(self, row: Record, column: str) -> str:
        value = row.values.get(column)
        word = as_word(value)
        if isinstance(value, (str, int, float)) and word.strip():
            return word
        where = f"{self._at(row)}, column {column!r},"
        what = f"holds {an(type(value).__name__)}" if word.strip() else "has no value"
        if isinstance(value, Unreadable):
            what = f"can't be read ({value.reason})"
        raise UserError(f"{where} {what}; it needs a word or a number")


def text_of(value: object, where: str) -> str:
    """The value as a prompt's text; UserError, beginning with `where`, for anything that isn't one."""
    if value is None or _is_nan(value):
        raise UserError(f"{where} has no value; fill it in, or leave the row out")
    if isinstance(value, Unreadable):
        raise UserError(f"{where} can't be read ({value.reason}); repair it, or leave the row out")
    if not isinstance(value, str):
        raise UserError(f"{where} holds {an(type(value).__name__)} ({quoted(value, 40)}); a prompt must be text")
    if not value.strip():
        raise UserError(f"{where} is empty; fill it in, or leave the row out")
    # A lone surrogate comes from a broken \\u escape; no tokenizer can encode it.
    if not is_whole(value):
        raise UserError(f"{where} holds half a character (an unpaired surrogate); repair the text")
    return value


def last_asked(turns: Sequence[Any], where: str) -> tuple[str | None, tuple[tuple[str, str], ...], str]:
    """Of chat turns the system prompt, the turns before the user's last, and its words; what answers it is left out.

    UserError, beginning with `where`, for what are no chat turns.
    """
    read = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise UserError(
                f"{where} holds a list of other things than chat turns; each turn needs a role and a content"
            )
        read.append((turn["role"], text_of(turn.get("content"), where)))
    users = [place for place, (role, _) in enumerate(read) if role == "user"]
    if not users:
        raise UserError(f"{where} has no turn of the user")
    earlier = tuple(read[: users[-1]])
    has_system = bool(earlier) and earlier[0][0] == "system"
    return earlier[0][1] if has_system else None, earlier[has_system:], read[users[-1]][1]


def _is_nan(value: object) -> bool:
    """What pandas has in empty cells."""
    return type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value))


def as_word(value: object) -> str:
    """A cell's value as people write it: nothing for a missing one, which pandas makes NaN, and 1 for 1.0.

    pandas also turns whole numbers into floats where one of them is missing.
    """
    if value is None or isinstance(value, Unreadable) or _is_nan(value):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)


def require_column(columns: Sequence[str], wanted: str, name: str) -> None:
    """Nothing, or a UserError with the nearest of the columns there are."""
    if wanted not in columns:
        near = nearest(wanted, columns)
        raise UserError(f"{name} has no column {wanted!r}; {f'{near} ' if near else ''}it has {_listed(columns)}")


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(f"{quoted(column)}" for column in columns[:12])
    more = len(columns) - 12
    return f"{shown} and {more} more" if more > 0 else shown or "no columns"
