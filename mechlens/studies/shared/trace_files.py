"""Reasoning traces from a file: what was asked, thought and answered."""

from pathlib import Path

from mechlens.errors import UserError
from mechlens.files import user_path
from mechlens.methods.activations.trace_tokens import Trace
from mechlens.methods.behaviour.thought import CLOSE, OPEN
from mechlens.prompts.files.from_row import RowReader, require_column, text_of
from mechlens.prompts.files.rows import Record, columns_of, read_rows, row_ids

RESPONSES = ("response", "output", "completion")
"""Columns that hold a thought in its marks and the answer after it."""


def read_traces(path: str | Path, *, label_column: str | None = None) -> list[Trace]:
    """The traces of a file: a prompt, and the columns thinking and answer, or one (response) with a thought in marks.

    Prompts have the file's categories and, from `label_column`, labels; a column family keeps them together. UserError
    naming file and row for what is none.
    """
    file = user_path(path)
    rows = read_rows(file)
    columns = columns_of(rows)
    whole = next((name for name in RESPONSES if name in columns and "thinking" not in columns), None)
    for wanted in ("thinking", "answer") if whole is None else ():
        require_column(columns, wanted, file.name)
    reader = RowReader(file.name, columns, None, label_column, "family" if "family" in columns else None)
    ids = row_ids(rows, file.stem)
    return [Trace(reader(row, ids[row.number]), *_said(row, whole, f"{file.name} row {row.number}")) for row in rows]


def _said(row: Record, whole: str | None, where: str) -> tuple[str, str]:
    """The thought and the answer of a row, neither with a mark in it."""
    if whole is None:
        names = ("thinking", "answer")
        thinking, answer = (text_of(row.values.get(name), f"{where}, column {name!r},").strip() for name in names)
    else:
        thinking, closed, answer = text_of(row.values.get(whole), f"{where}, column {whole!r},").partition(CLOSE)
        thinking, answer = thinking.strip().removeprefix(OPEN).strip(), answer.strip()
        if not closed or not thinking or not answer:
            raise UserError(f"{where}, column {whole!r}, has no thought that ends in {CLOSE} with an answer after it")
    mark = next((mark for mark in (OPEN, CLOSE) for text in (thinking, answer) if mark in text), None)
    if mark is not None:
        needed = "the columns hold none" if whole is None else f"{OPEN} opens the text and {CLOSE} ends its one thought"
        raise UserError(f"{where} has {mark} where none belongs ({needed}); take it out, or leave the row out")
    return thinking, answer
