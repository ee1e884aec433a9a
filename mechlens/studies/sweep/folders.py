"""A sweep on disk: in each job's folder its configuration, written before anything runs, and how far the job is.

The run folder is the whole state: whoever works on a job, and however often, a finished one is never done again.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mechlens.checked_json import checked, parse_sealed, sealed
from mechlens.errors import UserError
from mechlens.runs.remote.store import exists, put_text, read_text, remove
from mechlens.runs.results.result import RunResult
from mechlens.runs.run import JOB_FILE, RUN_FILE, read_run
from mechlens.studies.registry import studies
from mechlens.studies.sweep.plan import Job

FORMAT = 1
FAILED = "failures"
"""Folder of the sweep that holds the sentence of each job that couldn't even begin."""
SHARDS = "shards"
"""Folder in a helper's name; there is no such folder."""
REMEDY = "give the sweep's command again, which writes it anew where the folder is empty"


@dataclass(frozen=True)
class _Record:
    format: int
    study: str
    config: dict[str, Any]


@dataclass(frozen=True)
class State:
    """How far a job is."""

    job: Job
    status: Literal["done", "failed", "running", "half done", "left"]
    said: str = ""
    """What a finished job found, or why it failed; one sentence."""
    seconds: float = 0.0
    """What a finished job took."""


def folder_of(job: Job) -> Path:
    """The job's run folder."""
    return Path(job.config.out)


def write_jobs(jobs: list[Job]) -> None:
    """Every job's configuration into its folder; UserError, before any is written, for one that holds another."""
    for job in jobs:
        path = folder_of(job) / JOB_FILE
        ours = job.plain
        if exists(path) and (known := _read(path).config) != ours:
            differ = sorted(name for name in ours if known.get(name) != ours[name])
            raise UserError(
                f"{path.parent} holds a job with another {', '.join(differ) or 'configuration'}; give another --out, "
                "or put the plan back as it was (new values in its lists are welcome)"
            )
    for job in jobs:
        path = folder_of(job) / JOB_FILE
        if not exists(path):
            record = sealed({"format": FORMAT, "study": job.study, "config": job.plain})
            put_text(path, json.dumps(record, indent=1) + "\n")


def read_job(folder: Path) -> Job:
    """The job whose configuration stands in a folder; UserError where there is none or it is damaged."""
    path = folder / JOB_FILE
    try:
        record = _read(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; {REMEDY}") from error
    known = studies()
    if record.study not in known:
        raise UserError(f"{path} is of the study {record.study!r}, which isn't installed; install its package")
    config = checked({**record.config, "out": str(folder)}, known[record.study].config, str(path), REMEDY)
    return Job(folder.name, record.study, config)


def _read(path: Path) -> _Record:
    found: _Record = parse_sealed(read_text(path), _Record, str(path), REMEDY, sealed_from=FORMAT)
    return found


def state_of(job: Job) -> State:
    """How far a job is, by its folder alone."""
    folder = folder_of(job)
    file = failure_file(folder)
    failed = read_text(file).strip() if exists(file) else ""
    if not exists(folder / RUN_FILE):
        return State(job, "failed" if failed else "left", failed)
    run = RunResult(folder, read_run(folder))
    if run.status == "success":
        return State(job, "done", run.sentence, sum(run.record.seconds.values()))
    if run.status == "running":
        return State(job, "running")
    return State(job, "failed" if failed else "half done", failed)


def failure_file(folder: Path) -> Path:
    """Where a job's failure is written: beside the run folders, since a folder without a run must stay empty."""
    return folder.parent / FAILED / f"{folder.name}.txt"


def note_failure(folder: Path, sentence: str) -> None:
    """Says why a job failed; an earlier failure's sentence goes."""
    put_text(failure_file(folder), sentence + "\n")


def forget_failure(folder: Path) -> None:
    """Of a job that is tried again."""
    remove(failure_file(folder))


def helpers_of(folder: Path, shards: int) -> list[Path]:
    """What the helpers of a job are called for a worker."""
    return [folder.parent / SHARDS / folder.name / f"{number}-of-{shards}" for number in range(1, shards)]


def is_helper(folder: Path) -> bool:
    """Whether a worker is given a helper's name, not a job's folder."""
    return folder.parent.parent.name == SHARDS
