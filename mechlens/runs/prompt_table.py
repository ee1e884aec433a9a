"""Prompts as a table and back, every field kept, so that a run can be done again."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow

from mechlens.checked_json import parse_json
from mechlens.errors import UserError
from mechlens.files import file_sha256
from mechlens.prompts.prompt import Prompt
from mechlens.runs.run import RUN_FILE, read_run

NAME = "prompts"
REMEDY = "make the run again"


def prompt_table(prompts: Sequence[Prompt]) -> pd.DataFrame:
    """One row a prompt, one column a field; the history as JSON."""
    names = [field.name for field in fields(Prompt)]
    frame = pd.DataFrame([{name: getattr(prompt, name) for name in names} for prompt in prompts], columns=names)
    return frame.assign(history=[json.dumps(prompt.history, ensure_ascii=False) for prompt in prompts])


def read_prompts(folder: Path) -> list[Prompt]:
    """The prompts that a run kept in its folder; UserError where they are no longer what the run wrote."""
    path = folder / "tables" / f"{NAME}.parquet"
    if not path.is_file():
        raise UserError(f"there is no {path}; the run kept no prompts")
    known = read_run(folder).tables.get(NAME) if (folder / RUN_FILE).exists() else None
    try:
        if known is not None and file_sha256(path) != known:
            raise UserError(f"{path} is not the table that the run wrote; {REMEDY}")
        rows = pd.read_parquet(path).to_dict("records")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} could not be read ({reason[:200]}); {REMEDY}") from error
    return [_prompt({str(name): value for name, value in row.items()}, path) for row in rows]


def _prompt(row: dict[str, Any], path: Path) -> Prompt:
    names = {field.name for field in fields(Prompt)}
    words = names - {"history", "system"}
    if set(row) != names or not all(isinstance(row[name], str) for name in (*words, "history")):
        raise UserError(f"{path} holds other columns than a run's prompts have; {REMEDY}")
    history = parse_json(row["history"], tuple[tuple[str, str], ...], str(path), REMEDY)
    system = row["system"] if isinstance(row["system"], str) else None
    return Prompt(**{**row, "history": history, "system": system})
