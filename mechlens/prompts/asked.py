"""Prompts as people write them: a text or many, chat messages, a column of a table; each becomes a `Prompt`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mechlens.errors import UserError, kind_of, many, quoted, warn
from mechlens.prompts.files.from_row import PROMPT_COLUMNS, RowReader, last_asked, text_of
from mechlens.prompts.files.rows import FILE_ENDINGS, Record
from mechlens.prompts.prompt import Prompt, PromptPair, UnfitPrompt

Message = Mapping[str, Any]
"""A chat turn with its role and content, as transformers and datasets have them."""
Prompts = str | Prompt | Iterable[str | Prompt | Message | Iterable[Message]]
"""Whatever prompts can be written as: one text or many, chat messages (a list of them is one prompt: the last turn of
the user is asked, with those before it as history), and columns of pandas, polars, numpy and datasets."""
Pairs = Iterable[PromptPair | Sequence[str | Prompt]]
"""Pairs of prompts, or of texts: clean, corrupt."""


def as_prompts(given: object, *, name: str = "prompt", label: str | Iterable[str] | None = None) -> list[Prompt]:
    """The prompts that are meant, in order; texts and messages are called NAME-0000, NAME-0001, ...

    Equal ones among these are one family, which no split separates. `label` is the class of all of them, or of each,
    such as another column. UserError, naming the row, for what is no text: a number, a missing value, nothing.

    >>> [prompt.id for prompt in ml.as_prompts(["Hello", "How are you?"], label="polite")]
    ['prompt-0000', 'prompt-0001']
    """
    rows = _rows(given, name)
    prompts = [
        row if isinstance(row, Prompt) else _made(row, f"{name}-{i:04d}", f"row {i} of the {name}s")
        for i, row in enumerate(rows)
    ]
    first: dict[object, str] = {}
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        family = first.setdefault((prompt.text, prompt.system, prompt.history), prompt.group)
        if not isinstance(row, Prompt) and family != prompt.id:
            prompts[i] = replace(prompt, family=family)
    if label is None:
        return prompts
    labels = [label] * len(prompts) if isinstance(label, str) else [str(one) for one in label]
    if len(labels) != len(prompts):
        raise UserError(
            f"{many(len(labels), 'label')} came for {many(len(prompts), name)}; give one for each, or one for all"
        )
    return [replace(prompt, label=one) for prompt, one in zip(prompts, labels, strict=True)]


def as_pairs(given: Iterable[object]) -> list[PromptPair]:
    """The pairs that are meant; two texts become pair-0000.clean and pair-0000.corrupt. UserError for what is none.

    >>> (pair,) = ml.as_pairs([("Kill a process.", "Stop a process.")])
    >>> pair.clean.text, pair.corrupt.text
    ('Kill a process.', 'Stop a process.')
    """
    found = []
    for i, pair in enumerate(given):
        if isinstance(pair, PromptPair):
            found.append(pair)
            continue
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise UserError(f"pair {i} is {quoted(pair, 80)}; give two prompts, the clean and the corrupt one")
        sides = [
            replace(_made(side, f"pair-{i:04d}.{name}", f"pair {i}, {name},"), family=f"pair-{i:04d}")
            if not isinstance(side, Prompt)
            else side
            for side, name in zip(pair, ("clean", "corrupt"), strict=True)
        ]
        found.append(PromptPair(*sides))
    return found


def _rows(given: object, name: str) -> list[object]:
    """One item for each prompt: a text and a conversation by themselves are one prompt."""
    if isinstance(given, str | Prompt):
        if isinstance(given, str) and given.endswith(FILE_ENDINGS) and len(given.split()) == 1:
            warn(f"{given!r} is taken as a prompt; those in a file are ml.load_prompts({given!r})")
        return [given]
    columns = getattr(given, "column_names", getattr(given, "columns", None))
    if columns is not None:
        named = [str(column) for column in columns]
        raise UserError(
            f"a whole table was given as {name}s, with the columns {', '.join(named[:8]) or 'none'}; give one of them, "
            f"such as table[{named[0] if named else 'text'!r}]"
        )
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise UserError(
            f"{kind_of(given)} was given as {name}s; give a text, a list of texts, of chat messages or of "
            "ml.Prompt, or a column of a table"
        )
    values = next((getattr(given, how)() for how in ("tolist", "to_list") if hasattr(given, how)), given)
    rows = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    return [rows] if rows and all(isinstance(row, Mapping) and "role" in row for row in rows) else rows


def _made(row: object, name: str, where: str) -> Prompt:
    try:
        if isinstance(row, Iterable) and not isinstance(row, str | bytes | Mapping):
            system, history, text = last_asked(list(row), where)
            return Prompt(name, text, system=system, history=history)
        if isinstance(row, Mapping):
            return _of_columns(row, name, where)
        return Prompt(name, text_of(row, where))
    except UnfitPrompt as error:
        raise UserError(str(error)) from error


def _of_columns(row: Mapping[Any, Any], name: str, where: str) -> Prompt:
    """A row of a table, whose text stands under one of the usual names, as in files."""
    columns = tuple(str(column) for column in row)
    if not {column.lower() for column in columns} & set(PROMPT_COLUMNS):
        shown = ", ".join(columns[:8]) or "none"
        raise UserError(
            f"{where} has the columns {shown}; a prompt's text stands in one of {', '.join(PROMPT_COLUMNS)}"
        )
    made = RowReader(where, columns, None, None, None)(Record(0, dict(zip(columns, row.values(), strict=True))), name)
    return replace(made, source="")
