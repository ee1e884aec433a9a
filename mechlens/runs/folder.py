"""A run's folder: what it was begun with, finished pieces in its cache, and its prompts as a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
from torch import Tensor

from mechlens.checked_json import parse_json
from mechlens.errors import UserError, warn
from mechlens.files import user_path
from mechlens.prompts.prompt import Prompt
from mechlens.runs.artifacts import open_tensors, tensor_digest, write_tensors
from mechlens.runs.results.kept import REMEDY, require_same
from mechlens.runs.run import RUN_FILE, Change, Inputs, Run, changed_since, changes, read_run

CACHE = "cache"
"""Folder of the finished pieces by which a killed run goes on."""


def run_to_go_on_with(
    out: Path, verb: str, resolved: dict[str, Any], defaults: Mapping[str, Any] | None = None
) -> Run | None:
    """The run in the folder if it is the same piece of work; None where there is none yet, or one to be made anew.

    A setting that the record doesn't know, since it is newer than the run, was at its default.
    """
    if not (out / RUN_FILE).exists():
        return None
    before = read_run(out)
    if before.verb != verb:
        raise UserError(f"{out} holds a run of `{before.verb}`, not of `{verb}`; choose another --out")
    if before.inputs.today and resolved.get("today") == before.inputs.today:
        resolved = resolved | {"today": before.resolved.get("today")}  # the day on which it began, now by its name
    usual = {name: value for name, value in (defaults or {}).items() if name in resolved}
    if changed := changes(usual | before.resolved, resolved):
        if before.refused and not before.metrics and not before.artefacts:
            return None  # it found nothing and would end alike again: the mended command begins anew
        raise UserError(
            f"{out} holds a run made with other options: {_listed(changed)}; give them as they were to go on with that "
            "run, or choose another --out for a new one"
        )
    return before


def finished_run(
    out: Path, verb: str, resolved: dict[str, Any], defaults: Mapping[str, Any], inputs: Inputs
) -> Run | None:
    """The run in the folder if it is this very piece of work, done, and all that it wrote still lies there."""
    if not (out / RUN_FILE).exists() or read_run(out).status != "success":
        return None
    before = run_to_go_on_with(out, verb, resolved, defaults)
    if before is None or changed_since(before, inputs):
        return None
    written = {f"tables/{name}.parquet": sha for name, sha in before.tables.items()}
    written |= {f"figures/{name}.json": sha for name, sha in before.figures.items()}
    written |= {artefact.file: artefact.sha256 for artefact in before.artefacts.values()}
    try:
        for file, sha in written.items():
            require_same(out / file, sha)
    except UserError:
        return None  # what is lost or damaged is made again
    return before


MOST_NAMED = 4
"""Changed options in one sentence."""


def _listed(changed: Sequence[Change]) -> str:
    """Options with what they were and are, as the command line calls them."""
    named = [
        f"--{name.replace('_', '-')} was {_value(old)} and is now {_value(new)}"
        for name, old, new in changed[:MOST_NAMED]
    ]
    more = len(changed) - MOST_NAMED
    return ", ".join(named) + (f", and {more} more" if more > 0 else "")


def _value(value: object) -> str:
    if value is None or value in ((), [], {}):
        return "left out"
    return f"{json.dumps(value, ensure_ascii=False):.80}"


@dataclass(frozen=True)
class FolderCache:
    """Finished pieces of work, one safetensors file each, memory-mapped when read; `cache=FolderCache("folder")`.

    >>> model = ml.load("smollm2")
    >>> acts = ml.collect(model, ml.builtin_prompts("harmful")[:4], cache=ml.FolderCache("kept"))
    """

    folder: str | Path
    """Made when the first piece is put."""

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The piece under `key`, or None where there is none or its file is damaged."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            header, value = open_tensors(path, tensors=True)
            whole = header.get("key") == key and header.get("sha256") == tensor_digest(value)
        except UserError:
            whole = False
        if whole:
            return value
        # A damaged piece costs its recomputation, not the run.
        warn(f"{path} is damaged, so that piece of the work is done again")
        return None

    def put(self, key: str, value: dict[str, Tensor]) -> None:
        """Keeps a finished piece, whole or not at all."""
        write_tensors(value, {"key": key, "sha256": tensor_digest(value)}, self._path(key))

    def _path(self, key: str) -> Path:
        if len(key) != 64 or set(key) - set("0123456789abcdef"):
            raise ValueError(f"a cache's key is a sha256 in hex, not {key!r}")
        return user_path(self.folder) / f"{key}.safetensors"


PROMPTS = "prompts"


def prompt_table(prompts: Sequence[Prompt]) -> pd.DataFrame:
    """One row a prompt, one column a field; the history as JSON."""
    names = [field.name for field in fields(Prompt)]
    frame = pd.DataFrame([{name: getattr(prompt, name) for name in names} for prompt in prompts], columns=names)
    return frame.assign(history=[json.dumps(prompt.history, ensure_ascii=False) for prompt in prompts])


def read_prompts(folder: Path) -> list[Prompt]:
    """The prompts that a run kept in its folder; UserError where they are no longer what the run wrote."""
    path = folder / "tables" / f"{PROMPTS}.parquet"
    if not path.is_file():
        raise UserError(f"there is no {path}; the run kept no prompts")
    known = read_run(folder).tables.get(PROMPTS) if (folder / RUN_FILE).exists() else None
    rows = read_table(path, known).to_dict("records")
    return [_prompt({str(name): value for name, value in row.items()}, path) for row in rows]


def read_table(path: Path, sha256: str | None) -> pd.DataFrame:
    """A table of a run folder; UserError where it is no longer what the run wrote."""
    require_same(path, sha256)
    try:
        return pd.read_parquet(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} could not be read ({reason[:200]}); {REMEDY}") from error


def _prompt(row: dict[str, Any], path: Path) -> Prompt:
    names = {field.name for field in fields(Prompt)}
    words = names - {"history", "system"}
    if set(row) != names or not all(isinstance(row[name], str) for name in (*words, "history")):
        raise UserError(f"{path} holds other columns than a run's prompts have; {REMEDY}")
    history = parse_json(row["history"], tuple[tuple[str, str], ...], str(path), REMEDY)
    system = row["system"] if isinstance(row["system"], str) else None
    return Prompt(**{**row, "history": history, "system": system})
