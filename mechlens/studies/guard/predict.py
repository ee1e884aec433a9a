"""`mechlens guard predict`: a stream of prompts in, a stream of verdicts out, in constant memory.

One line gives one record, whatever is in it: a bad one an error, and the rest goes on.
"""

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mechlens.checked_json import parse_json
from mechlens.errors import UserError, an, many, warn
from mechlens.files import require_regular, user_path
from mechlens.methods.guard.fitted import FittedGuard, GuardVerdict
from mechlens.models.bridge import LanguageModel, checkpoint_now, d_model
from mechlens.prompts.files.from_row import RowReader
from mechlens.prompts.files.rows import Record, columns_of, read_rows
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.artifacts import load as load_artifact
from mechlens.studies.guard.config import GuardPredict
from mechlens.studies.guard.fitting import LatentGuard, fits, guard_file
from mechlens.studies.registry import Screen
from mechlens.studies.shared.inputs import chosen_model

LONGEST_LINE = 1 << 20
"""Bytes of one line; what is longer is an error and is never held in memory."""
TABLES = (".csv", ".tsv", ".parquet")
MAX_SKIPPED = 1 << 10
"""Pieces of LONGEST_LINE that are read on to find such a line's end; a stream like /dev/zero has none."""


@runtime_checkable
class ByteLines(Protocol):
    """What is asked of a stream: its lines, in pieces of a given size where they are longer."""

    def readline(self, size: int = -1, /) -> bytes:
        """The next line, or at most `size` bytes of it; empty at the end."""
        ...


@dataclass(frozen=True)
class Line:
    """One line of the input: a prompt, or the sentence that says why it is none."""

    number: int
    """1-based."""
    prompt: Prompt | None
    error: str = ""
    id: Any = None
    """The record's own id, where it has one."""


def execute(config: GuardPredict, screen: Screen) -> None:
    """One JSON object a line, each as soon as it is there: a pipe's reader shouldn't wait for the next ones.

    UserError at the end where a line could not be judged: whoever reads the exit code alone is to know.
    """
    lines = errors = 0
    for record in predict(config):
        screen.show(record)
        lines, errors = lines + 1, errors + ("error" in record)
    if not lines:
        warn(f"{config.input} holds no prompt, so nothing was judged")
    if errors:
        raise UserError(f'{errors} of {many(lines, "line")} could not be judged; each says why under "error"')


def predict(config: GuardPredict) -> Iterator[dict[str, Any]]:
    """One record for each line that isn't blank, in order: line, harmful, score, probability, threshold (harmful is a
    score above it); or line, error."""
    guard = LatentGuard.of(load_artifact(guard_file(config.guard), FittedGuard))
    with _lines_of(config) as lines:
        model, template = chosen_model(config, fits(guard.fitted_, other_weights=config.other_weights))
        guard.fitted_.require(
            checkpoint_now(model), template.fingerprint, d_model(model), other_weights=config.other_weights
        )
        while chunk := list(islice(lines, config.batch)):
            threshold = guard.fitted_.calibration.threshold
            for record in _judged(guard, model, template, chunk, config.other_weights):
                yield record if "error" in record else record | {"threshold": threshold}


@contextmanager
def _lines_of(config: GuardPredict) -> Iterator[Iterator[Line]]:
    """The prompts of a stream as they come, or of a table, which is read whole; UserError for what can't be read."""
    ending = Path(config.input).suffix.lower()
    if config.format == "auto" and ending in TABLES:
        yield iter(_rows_of(user_path(config.input), config))
        return
    if config.column is not None and config.input != "-" and not _is_json("", config):
        raise UserError(
            f"--column was given, and {config.input} is read as a prompt a line; leave it out, or give --format jsonl"
        )
    with _opened(config.input) as stream:
        yield read_lines(stream, config)


def _rows_of(path: Path, config: GuardPredict) -> list[Line]:
    """The rows of a table by their numbers, a header not counted."""
    rows = read_rows(path)
    reader = RowReader(path.name, columns_of(rows), config.column, None, None)
    lines = []
    for row in rows:
        given = row.values.get("id")
        identity = given if isinstance(given, str | int) else None
        try:
            lines.append(Line(row.number, reader(row, str(row.number)), id=identity))
        except UserError as error:
            lines.append(Line(row.number, None, str(error), identity))
    return lines


def read_lines(stream: ByteLines, config: GuardPredict) -> Iterator[Line]:
    """The lines of a stream as prompts, one at a time."""
    number = 0
    while raw := stream.readline(LONGEST_LINE):
        number += 1
        if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
            if not _skipped_rest(stream):
                yield Line(number, None, f"the line has no end within {MAX_SKIPPED} MB, so no more is read; end it")
                return
            yield Line(number, None, f"the line is longer than {LONGEST_LINE} bytes; shorten it")
            continue
        if raw.strip():
            yield _line(number, raw, config)


def _skipped_rest(stream: ByteLines) -> bool:
    """Reads on to the end of an overlong line, in pieces; False where there is no end to be seen."""
    for _ in range(MAX_SKIPPED):
        piece = stream.readline(LONGEST_LINE)
        if not piece or piece.endswith(b"\n"):
            return True
    return False


def _line(number: int, raw: bytes, config: GuardPredict) -> Line:
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Line(number, None, f"byte {error.start + 1} is not UTF-8; save the text as UTF-8")
    if not _is_json(text, config):
        try:
            return Line(number, Prompt(str(number), text))
        except UserError as error:
            return Line(number, None, str(error))
    try:
        values = parse_json(text, Any, "the line", "give a JSON object on one line")
    except UserError as error:
        return Line(number, None, str(error).replace("is not JSON", "is not valid JSON", 1))
    if isinstance(values, str):
        values = {"text": values}
    if not isinstance(values, dict):
        return Line(number, None, f"holds {an(type(values).__name__)}; a record is an object with a prompt, or a text")
    identity = values.get("id")
    if not _can_be_written(identity):
        return Line(number, None, "the id can't be written as JSON; give a text or a finite number")
    try:
        row = Record(0, values)
        prompt = RowReader(f"line {number}", tuple(values), config.column, None, None)(row, str(number))
    except UserError as error:
        return Line(number, None, str(error), identity)
    return Line(number, prompt, id=identity)


def _can_be_written(value: Any) -> bool:
    """False for NaN and infinities, which JSON doesn't have, wherever they stand."""
    if isinstance(value, dict):
        return all(_can_be_written(inner) for inner in value.values())
    if isinstance(value, list):
        return all(_can_be_written(inner) for inner in value)
    return not isinstance(value, float) or math.isfinite(value)


def _is_json(text: str, config: GuardPredict) -> bool:
    if config.format != "auto":
        return config.format == "jsonl"
    if config.input == "-":
        return text.lstrip().startswith("{")
    return Path(config.input).suffix.lower() in (".jsonl", ".ndjson", ".json")


def _judged(
    guard: LatentGuard, model: LanguageModel, template: ChatTemplate, chunk: Sequence[Line], other_weights: bool
) -> list[dict[str, Any]]:
    prompts = [line.prompt for line in chunk if line.prompt is not None]
    verdicts = iter(_verdicts(guard, model, template, prompts, other_weights))
    records = []
    for line in chunk:
        record = {"line": line.number} | ({} if line.id is None else {"id": line.id})
        said = line.error if line.prompt is None else next(verdicts)
        records.append(record | ({"error": said} if isinstance(said, str) else _as_record(said)))
    return records


def _verdicts(
    guard: LatentGuard, model: LanguageModel, template: ChatTemplate, prompts: list[Prompt], other_weights: bool
) -> list[GuardVerdict | str]:
    """Verdicts, or for a prompt that can't be judged the reason; together, and apart only where that fails."""
    if not prompts:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about single prompts, which a stream has no place for
        try:
            return list(guard(model, prompts, template, other_weights=other_weights))
        except UserError as error:
            if len(prompts) == 1:
                return [str(error)]
        except Exception as error:  # a template or a model may fail on one prompt in any way; the others are answered
            if len(prompts) == 1:
                return [f"could not be judged ({type(error).__name__}: {str(error)[:200]})"]
    half = len(prompts) // 2
    parts = (prompts[:half], prompts[half:])
    return [said for part in parts for said in _verdicts(guard, model, template, part, other_weights)]


def _as_record(verdict: GuardVerdict) -> dict[str, Any]:
    return {"harmful": verdict.harmful, "score": verdict.score, "probability": verdict.probability}


@contextmanager
def _opened(name: str) -> Iterator[ByteLines]:
    if name == "-":
        if sys.stdin is None:
            raise UserError("standard input is closed; give a file with --input")
        yield sys.stdin.buffer
        return
    path = user_path(name)
    require_regular(path)  # a pipe is read by `-`
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); check that it exists and may be read") from error
    with stream:
        yield stream
