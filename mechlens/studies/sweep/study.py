"""`mechlens sweep`: the jobs of a plan, done by an engine until nothing is left, and what became of them."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechlens.errors import UserError, many
from mechlens.methods.progress import progress_bar, spoken
from mechlens.runs.lock import FolderLock
from mechlens.runs.remote.mirror import mirrored
from mechlens.runs.remote.store import address, is_remote, local_path, require_here
from mechlens.runs.results.compared import RunComparison, compare_runs
from mechlens.studies.registry import Screen
from mechlens.studies.sweep.config import Sweep
from mechlens.studies.sweep.engines.engine import Engine, Resources, engine_called
from mechlens.studies.sweep.folders import State, folder_of, forget_failure, helpers_of, state_of, write_jobs
from mechlens.studies.sweep.plan import Job, jobs_of, read_plan

TRIES = 3
"""How often a job is started whose process was lost; one that fails with a sentence is started once."""
ENDED = ("done", "failed")
"""States of jobs that are started no more."""
LOGS = "logs"
COMPARED = "compared"
"""Folder of the page and the tables that set the finished jobs side by side."""


def sweep(config: Sweep, screen: Screen) -> None:
    """Does what is left of a plan and shows what became of every job; UserError at the end where one failed."""
    out = local_path(config.out)
    plan = read_plan(config.plan)
    if config.engine == "slurm":
        require_here(out, "a sweep by Slurm")
    if plan.shards > 1:
        require_here(out, "a sweep whose jobs are done by several processes each")
    jobs = jobs_of(plan, out, str(config.plan))
    if config.dry_run:
        states = [state_of(job) for job in jobs]
        screen.show(table_of(states))
        screen.show(left_to_do(states, config.workers))
        return
    resources = Resources(config.workers, plan.gpus, _logs(out, screen), config.slurm, config.ray)
    engine = engine_called(config.engine, resources)
    write_jobs(jobs)
    with _held(out):
        for job in jobs:
            forget_failure(folder_of(job))
        work(jobs, engine, resources, plan.shards)
    states = [state_of(job) for job in jobs]
    screen.show(table_of(states))
    screen.show(summary(states))
    done = [folder_of(state.job) for state in states if state.status == "done"]
    if len(done) > 1:
        compared = compare_runs(*done)
        if spread := spread_of(compared):
            screen.show(spread)
        screen.show(f"compared: {_written(compared, out / COMPARED)}")
    if open_ := [state for state in states if state.status != "done"]:
        raise UserError(
            f"{many(len(open_), 'job')} of {len(states)} did not succeed; mend what their sentences say and give the "
            "command again: finished jobs are not done again"
        )


def _logs(out: Path, screen: Screen) -> Path:
    """Where workers on this machine write; files that grow are nothing for an object store."""
    if not is_remote(out):
        return out / LOGS
    made = Path(tempfile.mkdtemp(prefix="mechlens-logs-"))
    screen.show(f"logs: {made}")
    return made


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Nobody else sweeps into the folder; on a store each job's own lock must do."""
    if is_remote(out):
        yield
        return
    lock = FolderLock(out)
    try:
        yield
    finally:
        lock.release()


def _written(compared: RunComparison, folder: Path) -> str:
    """Where the page and the tables are."""
    from mechlens.runs.results.compared_page import write_comparison  # which imports torch

    if not is_remote(folder):
        return str(write_comparison(compared, folder).resolve())
    with mirrored(folder) as here:
        page = write_comparison(compared, here)
    return f"{address(folder)}/{page.name}"


def work(jobs: Sequence[Job], engine: Engine, resources: Resources, shards: int = 1) -> None:
    """Has the engine do what isn't finished; jobs whose process was lost are given to it again."""
    left = {folder_of(job): job for job in jobs if state_of(job).status not in ENDED}
    bar = progress_bar(total=len(jobs), done=len(jobs) - len(left), title="sweep", unit="job")

    def look(folders: Sequence[Path]) -> None:
        for folder in [one for one in folders if one in left and state_of(left[one]).status in ENDED]:
            del left[folder]
            bar.update()

    try:
        for _ in range(TRIES):
            if free := [job for job in left.values() if state_of(job).status != "running"]:
                engine(groups_of(free, resources.workers, shards), resources, look)
    finally:
        bar.close()


def groups_of(jobs: Sequence[Job], workers: int, shards: int = 1) -> list[list[Path]]:
    """Jobs that load the same model together, in as many parts as keep all workers busy; with shards, each by itself.

    A job's helpers come right after it, so that they are at work at the same time.
    """
    if shards > 1:
        return [[one] for job in jobs for one in (folder_of(job), *helpers_of(folder_of(job), shards))]
    alike: dict[Any, list[Path]] = {}
    for job in jobs:
        alike.setdefault(job.loads, []).append(folder_of(job))
    parts = max(1, -(-workers // len(alike)))
    return [part for folders in alike.values() for part in _cut(folders, parts)]


def _cut(folders: list[Path], parts: int) -> list[list[Path]]:
    size = -(-len(folders) // parts)
    return [folders[i : i + size] for i in range(0, len(folders), size)]


def table_of(states: Sequence[State]) -> Any:
    """A row a job: its name, how far it is, and what it found or what is the matter."""
    from rich.table import Table

    table = Table("job", "status", "found")
    for state in states:
        table.add_row(state.job.name, state.status, state.said)
    return table


def spread_of(compared: RunComparison) -> Any:
    """What the seed decides of the numbers that decide, a row a number and group of jobs; None without other seeds."""
    from rich.table import Table

    deciding = {number for run in compared.runs for number in run.record.deciding}
    seeds = compared.seeds[compared.seeds["name"].isin(deciding)]
    if seeds.empty:
        return None
    table = Table("number", "jobs like", "seeds", "mean", "between seeds", "one run claims")
    for row in seeds.to_dict("records"):
        numbers = (f"{row[name]:.3f}" for name in ("mean", "between_seeds", "one_run"))
        table.add_row(str(row["words"]), str(row["like"]), str(row["runs"]), *numbers)
    return table


def summary(states: Sequence[State]) -> str:
    """How many jobs are how far."""
    counts = Counter(state.status for state in states)
    return f"{many(len(states), 'job')}: " + ", ".join(f"{count} {status}" for status, count in counts.items())


def left_to_do(states: Sequence[State], workers: int) -> str:
    """How many jobs are left and how long they may take, by those that are done."""
    done = [state.seconds for state in states if state.status == "done"]
    left = len(states) - len(done)
    if not left:
        return f"{summary(states)}; nothing is left to do"
    if not done:
        return f"{summary(states)}; how long they take is known once one is done"
    seconds = sum(done) / len(done) * left / workers
    return f"{summary(states)}; about {spoken(seconds)} with {many(workers, 'worker')}, by those that are done"
