"""Prompts from wherever they are: a built-in set, a file, or a data set on the hub."""

import difflib
import os
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mechlens import hub
from mechlens.errors import UserError, many, quoted, warn
from mechlens.files import user_path
from mechlens.prompts.builtin import builtin_names, builtin_pairs, builtin_prompts
from mechlens.prompts.files.from_row import RowReader, as_word, require_column
from mechlens.prompts.files.rows import FILE_ENDINGS, Record, columns_of, read_rows, row_ids
from mechlens.prompts.prompt import Prompt, PromptPair, UnfitPrompt
from mechlens.prompts.text import normalise_text

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def load_prompts(
    source: str | Path,
    *,
    column: str | None = None,
    label: str | None = None,
    label_column: str | None = None,
    where: Mapping[str, object] | None = None,
    sample: int | None = None,
    seed: int = 0,
    split: str | None = None,
    system: str | None = None,
    family_column: str | None = None,
) -> list[Prompt]:
    r"""The prompts of a source in its order, without duplicates, each with an id that stays the same.

    `source`: a built-in set (`builtin_names`), a .json, .jsonl, .csv, .tsv, .parquet or .txt file, or a hub
    data set ("owner/name" or "owner/name:config", of which `split` is read). The prompt stands in `column`,
    or in the first of `PROMPT_COLUMNS` there is; of chat messages the last user turn is asked, with the
    turns before it as history; a filled Alpaca `input` follows its `instruction` on a new line.
    `where` keeps the rows whose columns hold the values given, compared as text. `sample` draws that many
    with `seed`; a smaller sample is part of a larger one. Ids are the `id` column where it is unique,
    otherwise the source's name and the row. Prompts alike in normal form (`normalise_text`) after the first
    are dropped with a warning. Raises UserError naming source, row and column.

    >>> from pathlib import Path
    >>> _ = Path("asked.csv").write_text("text,tone\nWould you kindly reply?,formal\nyo reply,casual\n")
    >>> [(prompt.text, prompt.label) for prompt in ml.load_prompts("asked.csv", label_column="tone")]
    [('Would you kindly reply?', 'formal'), ('yo reply', 'casual')]
    """
    if label is not None and label_column is not None:
        raise UserError("both label= and label_column= were given; give one of them")
    if isinstance(source, str) and source in builtin_names():
        _refuse_columns(source, column, label_column, family_column, split)
        prompts = _builtin(source, where or {})
    else:
        prompts = _from_data(source, column, label_column, family_column, where or {}, split)
    if label is not None:
        prompts = [replace(prompt, label=label) for prompt in prompts]
    if system is not None:
        prompts = [replace(prompt, system=system) for prompt in prompts]
    return prompts if sample is None else sampled(prompts, sample, seed, str(source))


def require_columns(source: str, column: str | None, *others: str | None) -> None:
    """UserError where a file that is here has no such columns, or none of the usual ones where `column` is None."""
    path = user_path(source)
    if path.is_file():
        rows = read_rows(path)
        columns = columns_of(rows)
        for other in filter(None, others):
            require_column(columns, other, path.name)
        RowReader(path.name, columns, column, None, None)


def joined_sources(given: str) -> list[str]:
    """The sources that a plus joins: "harmful+looks-harmless" is two; a file with a plus in its name stays one.

    UserError for a part that is no source.
    """
    if "+" not in given:
        return [given]
    parts = given.split("+")
    found: list[str] = []
    while parts:
        size = next((size for size in range(len(parts), 0, -1) if _is_source("+".join(parts[:size]))), 0)
        if not size:
            raise UserError(
                f"there is no file {quoted(given, 80)}, nor does it join sources: {quoted(parts[0])} is no file, no "
                f"hub data set (owner/name) and none of {', '.join(builtin_names())}"
            )
        found.append("+".join(parts[:size]))
        parts = parts[size:]
    return list(dict.fromkeys(found))


def _is_source(given: str) -> bool:
    if given in builtin_names() or (given and os.path.exists(user_path(given))):
        return True
    return "/" in given and _HUB_ID.fullmatch(given) is not None


def _from_data(
    source: str | Path,
    column: str | None,
    label_column: str | None,
    family_column: str | None,
    where: Mapping[str, object],
    split: str | None,
) -> list[Prompt]:
    rows, name, stem = _rows(source, split)
    columns = columns_of(rows)
    reader = RowReader(name, columns, column, label_column, family_column)
    ids = row_ids(rows, stem)
    kept = [rows[place] for place in _matching([row.values for row in rows], where, name)]
    return _without_duplicates([reader(row, ids[row.number]) for row in kept], kept, name)


def _rows(source: str | Path, split: str | None) -> tuple[list[Record], str, str]:
    """The rows, the name that errors call the source by, and the stem of its ids."""
    given = str(source)
    bare = Path(given)
    # os.path.exists says no where Path.exists raises (a name too long, a folder that may not be entered).
    local = isinstance(source, Path) or given.startswith(("/", ".", "~")) or bare.suffix.lower() in FILE_ENDINGS
    if local or os.path.exists(bare):
        path = user_path(given)
        if split is not None:
            raise UserError(f"split={split!r} was given for the file {given}; only hub data sets have splits")
        return read_rows(path), path.name, path.stem
    close = difflib.get_close_matches(given, builtin_names(), n=1, cutoff=0.7)
    if close or not _HUB_ID.fullmatch(given):
        raise UserError(
            f"there is no file or built-in set {quoted(given)}; give a file, a hub data set, "
            + (f"or {close[0]!r} if you meant that" if close else f"or one of {', '.join(builtin_names())}")
        )
    return _hub_rows(given, split), given, given.partition(":")[0].rpartition("/")[2]


def _hub_rows(source: str, split: str | None) -> list[Record]:
    import datasets

    name, _, config = source.partition(":")
    try:
        with hub.asked():
            data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types, all for one reason
        reason = hub.why_not() or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source} is no file here and could not be loaded from the hub ({reason}); "
            f"check its name, its split and the network, or give a file or one of {', '.join(builtin_names())}"
        ) from error
    if isinstance(data, Mapping):
        if len(data) != 1:
            raise UserError(
                f"{source} has the splits {', '.join(data)}; choose one with split= in Python or in a list of sources"
            )
        (data,) = data.values()
    try:
        rows = [Record(number, dict(values)) for number, values in enumerate(data, start=1)]
    except Exception as error:  # whatever a converter raises: times in unknown zones, text that isn't UTF-8, media
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source} has a row that can't be read ({reason:.200}); give it as a file") from error
    if not rows:
        raise UserError(f"{source} is empty; it needs at least one prompt")
    return rows


def _refuse_columns(source: str, *choices: str | None) -> None:
    if any(choice is not None for choice in choices):
        raise UserError(f"the built-in set {source!r} has no columns or splits to choose; leave them out")


def _builtin(source: str, where: Mapping[str, object]) -> list[Prompt]:
    prompts = builtin_prompts(source)
    return [prompts[place] for place in _matching([asdict(prompt) for prompt in prompts], where, source)]


def _matching(rows: list[dict[str, Any]], where: Mapping[str, object], name: str) -> list[int]:
    """Places of the rows that `where` keeps; UserError for an unknown column and where none is left."""
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    for column in where:
        require_column(columns, column, name)
    places = [
        place
        for place, row in enumerate(rows)
        if all(_as_text(row.get(column)) == _as_text(wanted) for column, wanted in where.items())
    ]
    if not places:
        asked = " and ".join(f"{column}={value!r}" for column, value in where.items())
        column = next(iter(where))
        found = list(dict.fromkeys(_as_text(row.get(column)) for row in rows))
        shown = ", ".join(f"{quoted(value, 40)}" for value in found[:8]) + (", ..." if len(found) > 8 else "")
        raise UserError(f"{name} has no row with {asked}; column {column!r} holds {shown}")
    return places


def _as_text(value: object) -> str:
    # The command line can only say "true" and "", never True and None.
    return str(value).lower() if isinstance(value, bool) else as_word(value)


def _without_duplicates(prompts: list[Prompt], rows: list[Record], name: str) -> list[Prompt]:
    first: dict[object, Prompt] = {}
    dropped: list[int] = []
    relabelled = 0
    for prompt, row in zip(prompts, rows, strict=True):
        key = (normalise_text(prompt.text), prompt.system, prompt.history)
        if key in first:
            dropped.append(row.number)
            relabelled += first[key].label != prompt.label
        else:
            first[key] = prompt
    if dropped:
        shown = ", ".join(map(str, dropped[:5])) + (", ..." if len(dropped) > 5 else "")
        labels = f", {relabelled} of them under another label" if relabelled else ""
        many = f"{len(dropped)} prompt{'s' if len(dropped) > 1 else ''}"
        rows_of = "rows" if len(dropped) > 1 else "row"
        warn(f"{name}: dropped {many} equal to an earlier one ({rows_of} {shown}){labels}")
    return list(first.values())


def sampled(prompts: list[Prompt], sample: int, seed: int, source: str) -> list[Prompt]:
    """So many of the prompts in their order, drawn by seed; UserError where there are fewer."""
    if not 1 <= sample <= len(prompts):
        raise UserError(f"a sample of {sample} was asked for, but {source} has {many(len(prompts), 'prompt')}")
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)
    return [prompts[place] for place in sorted(order[:sample])]


BUILTIN = "builtin"


def load_pairs(source: str, *, sample: int | None, seed: int) -> list[PromptPair]:
    """Pairs from "builtin" (harmful is clean) or from a file with columns `clean` and `corrupt`.

    `sample` draws that many by seed. UserError naming file, row and column for a row without both texts.
    """
    pairs = builtin_pairs() if source == BUILTIN else _from_file(user_path(source))
    if sample is None or sample >= len(pairs):
        return pairs
    drawn = sorted(random.Random(seed).sample(range(len(pairs)), sample))
    return [pairs[i] for i in drawn]


def _from_file(path: Path) -> list[PromptPair]:
    pairs, rows = [], read_rows(path)
    columns = columns_of(rows)
    for column in ("clean", "corrupt"):
        require_column(columns, column, path.name)
    for row in rows:
        for column in ("clean", "corrupt"):
            text = row.values.get(column)
            if not isinstance(text, str) or not text.strip():
                raise UserError(
                    f"{path}, row {row.number}, column {column!r}: found {quoted(text)}; a pair needs a text in both "
                    "columns clean and corrupt"
                )
        name = f"{path.stem}-{row.number:04d}"
        try:
            sides = [
                Prompt(f"{name}.{side}", row.values[side], source=path.stem, family=name)
                for side in ("clean", "corrupt")
            ]
        except UnfitPrompt as error:
            raise UserError(f"{path}, row {row.number}: {error}") from error
        pairs.append(PromptPair(*sides))
    if not pairs:
        raise UserError(f"{path} holds no pairs; give rows with columns clean and corrupt")
    return pairs
