"""The rows of a data file as they stand in it, each with its number; what a prompt is, `load` decides."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechlens.errors import UserError, an
from mechlens.files import LARGEST_FILE, read_whole, user_path
from mechlens.prompts.files.parquet import parquet_rows


@dataclass(frozen=True)
class Record:
    """One record of a data file."""

    number: int
    """1-based: the line in .txt and JSON Lines, the record elsewhere (a CSV's header is not counted). 0 where there is
    one row only."""
    values: dict[str, Any]


def read_rows(path: Path) -> list[Record]:
    """The rows of a JSON, JSON Lines, CSV, TSV, parquet or plain-text file; never an empty list.

    The ending picks the reader; .json may hold a list of objects or strings, JSON Lines, or CatQA's nested
    {category: {subcategory: [question]}}. Raises UserError naming the file and, where there is one, the row.
    """
    path = user_path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give one data file inside it")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} has an unknown ending; give {', '.join(_READERS)}")
    content = read_whole(path)
    rows = reader(path, content) if content.strip() else []
    if not rows:
        raise UserError(f"{path} is empty; it needs at least one prompt")
    return rows


def columns_of(rows: Sequence[Record]) -> tuple[str, ...]:
    """Every column that a row has, in order of first sight."""
    return tuple(dict.fromkeys(key for row in rows for key in row.values))


# The one thing that JSON may hold and Python won't read.
_TOO_LONG = "a whole number of thousands of digits; shorten it, or write it as text"


def packaged_rows(path: Path) -> list[dict[str, Any]]:
    """What the rows of a file of ours hold."""
    return [row.values for row in read_rows(path)]


def row_ids(rows: Sequence[Record], stem: str) -> dict[int, str]:
    """A stable id for every row number, the same whatever is filtered or sampled afterwards."""
    given = [row.values.get("id") for row in rows]
    usable = all(isinstance(value, (str, int)) and str(value).strip() for value in given)
    if usable and len({str(value) for value in given}) == len(rows):
        return {row.number: str(value) for row, value in zip(rows, given, strict=True)}
    return {row.number: f"{stem}-{row.number:04d}" for row in rows}


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line} is not UTF-8 (byte 0x{content[error.start]:02x}); save the file as UTF-8"
        ) from error


def _lines(text: str) -> list[tuple[int, str]]:
    # Not splitlines(): it also splits at U+2028 and U+0085, which are legal inside a prompt.
    numbered = enumerate((line.removesuffix("\r") for line in text.split("\n")), start=1)
    return [(number, line) for number, line in numbered if line.strip()]


def _plain_text(path: Path, content: bytes) -> list[Record]:
    return [Record(number, {"text": line}) for number, line in _lines(_decoded(path, content))]


def _json(path: Path, content: bytes) -> list[Record]:
    text = _decoded(path, content)
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply; give a list of objects or strings") from error
    except json.JSONDecodeError as error:
        if _looks_like_lines(text):
            return _json_lines(path, content)
        raise UserError(
            f"{path} line {error.lineno} is not valid JSON ({error.msg}); correct it, "
            "or give JSON Lines with one object a line"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} holds {_TOO_LONG}") from error
    if isinstance(document, list):
        return [_row(path, number, value) for number, value in enumerate(document, start=1)]
    if isinstance(document, dict):
        return _from_object(path, document)
    raise UserError(f"{path} holds a single {type(document).__name__}; give a list of objects or strings")


def _looks_like_lines(text: str) -> bool:
    lines = _lines(text)
    if len(lines) < 2:
        return False
    try:
        return isinstance(json.loads(lines[0][1]), (dict, str))
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path, content: bytes) -> list[Record]:
    rows = []
    for number, line in _lines(_decoded(path, content)):
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            at = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
            reason = getattr(error, "msg", "nested too deeply").removesuffix(" at") + at
            raise UserError(f"{path} row {number} is not valid JSON ({reason}); correct that line") from error
        except ValueError as error:
            raise UserError(f"{path} row {number} holds {_TOO_LONG}") from error
        rows.append(_row(path, number, value))
    return rows


def _row(path: Path, number: int, value: Any) -> Record:
    if isinstance(value, str):
        return Record(number, {"text": value})
    if isinstance(value, dict):
        return Record(number, value)
    found = type(value).__name__
    raise UserError(f"{path} row {number} is {an(found)}; every row must be an object or a string")


def _from_object(path: Path, document: dict[str, Any]) -> list[Record]:
    if document and all(isinstance(value, dict) for value in document.values()):
        return _nested(path, document)
    columns = [name for name, value in document.items() if isinstance(value, list) and name != "messages"]
    if columns:
        raise UserError(
            f"{path} holds one object with a list under {columns[0]!r}; "
            "give a list of objects or strings, or {category: {subcategory: [question]}}"
        )
    return [Record(1, document)]


def _nested(path: Path, document: dict[str, dict[str, Any]]) -> list[Record]:
    rows: list[Record] = []
    for category, subcategories in document.items():
        for subcategory, questions in subcategories.items():
            if not isinstance(questions, list):
                raise UserError(
                    f"{path} has {an(type(questions).__name__)} under {category!r} / {subcategory!r}; "
                    "it needs a list of questions there"
                )
            for question in questions:
                values = {"category": category, "subcategory": subcategory, "question": question}
                rows.append(Record(len(rows) + 1, values))
    return rows


def _csv(path: Path, content: bytes) -> list[Record]:
    header = _decoded(path, content).lstrip().partition("\n")[0]
    # Excel writes ; where a comma is the decimal sign.
    return _delimited(path, content, next((d for d in ";\t" if d in header and "," not in header), ","))


def _tsv(path: Path, content: bytes) -> list[Record]:
    return _delimited(path, content, "\t")


def _delimited(path: Path, content: bytes, delimiter: str) -> list[Record]:
    reader = csv.reader(io.StringIO(_decoded(path, content), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    rows: list[Record] = []
    number = 0
    usual = csv.field_size_limit(LARGEST_FILE)  # how long a text may be, `Prompt` says
    try:
        for cells in reader:
            if not header:
                header = [cell.strip() for cell in cells]
                _check_header(path, header)
                continue
            number += 1
            if not cells:  # a blank line
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path} row {number} has {len(cells)} cells where the header has {len(header)}; "
                    "put quotes round text that holds a comma, a quote or a line break"
                )
            rows.append(Record(number, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path} row {number + 1} is not valid CSV ({error}); check its quotes") from error
    finally:
        csv.field_size_limit(usual)
    return rows


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(f"{path} has the column {twice[0]!r} twice; column names must differ")


def _parquet(path: Path, content: bytes) -> list[Record]:
    return [Record(number, values) for number, values in enumerate(parquet_rows(path, content), start=1)]


_READERS: dict[str, Callable[[Path, bytes], list[Record]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _plain_text,
}

FILE_ENDINGS = tuple(_READERS)
"""Endings of the files that `read_rows` can read."""


def has_columns(source: str) -> bool:
    """False for a plain text file, which has a prompt a line and nothing to choose a column from."""
    return Path(source).suffix.lower() != ".txt"
