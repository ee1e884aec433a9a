"""A run being recorded: its folder is true at every moment, and W&B follows it."""

import json
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import pandas as pd

from mechlens.errors import UserError
from mechlens.files import (
    disk_error,
    is_partial,
    plain_name,
    remove_partials,
    require_writable,
    user_path,
    whole_file,
    write_text,
)
from mechlens.methods.cache import Cache
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.precision import Parity
from mechlens.prompts.prompt import Prompt
from mechlens.runs.artifacts import save, sha256
from mechlens.runs.environment import git_state, package_versions
from mechlens.runs.folder import CACHE, PROMPTS, FolderCache, finished_run, prompt_table, run_to_go_on_with
from mechlens.runs.lock import LOCK_FILE, FolderLock
from mechlens.runs.privacy import text_columns
from mechlens.runs.report.report import FigureEntry, Report, render
from mechlens.runs.run import (
    JOB_FILE,
    RUN_FILE,
    Artefact,
    Inputs,
    Run,
    changed_since,
    defaults,
    plain,
    read_run,
    write_run,
)
from mechlens.runs.wandb.mirror import WandbMirror
from mechlens.settings import WandbSettings

# Where a run is put and shown does not change its numbers.
NOT_SCIENCE = ("out", "wandb", "keep_cache")
STEPS_FILE = "steps.jsonl"
SHARED: ContextVar[Cache | None] = ContextVar("SHARED", default=None)
"""The cache of another run that this one works for."""


@runtime_checkable
class Result(Protocol):
    """What a study found, as `RunWriter.result` records it."""

    def metrics(self) -> Mapping[str, Estimate]:
        """Every headline number by its name in run.json."""

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Every table by its name in `tables/`."""

    def artifacts(self) -> Mapping[str, object]:
        """What later work can load, by name."""


def open_run(
    *,
    verb: str,
    config: Any,
    out: Path,
    wandb: WandbSettings,
    resolved: Mapping[str, object] | None = None,
    argv: Sequence[str] | None = None,
    keep_cache: bool = False,
) -> "RunWriter":
    """A run recorded in the folder `out`, to be used in a `with` block.

    `config` is the study's frozen dataclass; `resolved` overrides what it left open (a device "auto"). A
    folder with a run of the same study and resolved config is gone on with, another one is refused, and so is one that
    holds anything else than a run: nothing in it could be told from the run's own.
    """
    given = _science(config)
    full = {**given, **plain(resolved or {})}
    out = user_path(out)
    lock = FolderLock(out)
    try:
        before = run_to_go_on_with(out, verb, full, plain(defaults(config)))
        if before is None:
            _make_free(out)
        # Nobody else writes here, so what lies half-written is a dead process's.
        remove_partials(out, *(out / inside for inside in ("tables", "figures", CACHE)))
        if before is not None:
            (out / STEPS_FILE).unlink(missing_ok=True)
        run = Run(
            id=before.id if before else f"{verb}-{uuid.uuid4().hex[:8]}",
            verb=verb,
            config=given,
            resolved={**full, **before.resolved} if before else full,
            status="started",
            started=before.started if before else _now(),
            seed=full.get("seed"),
            git=git_state(),
            packages=package_versions(),
            inputs=Inputs(today=before.inputs.today if before else None),
            wandb_id=before.wandb_id if before else None,
            argv=tuple(sys.argv if argv is None else argv),
        )
        write_run(run, out)
    except BaseException:
        lock.withdraw()
        raise
    return RunWriter(run, out, lock, WandbMirror(wandb, out, run), before, keep_cache=keep_cache)


def require_folder(verb: str, config: Any, out: Path) -> None:
    """UserError, before anything is loaded, for a folder that can't be written or that this run can't go on in.

    What the study has still to fill in of its configuration is left to `open_run`.
    """
    out = user_path(out)
    require_writable(out)
    if not out.is_dir():
        return
    if not (out / RUN_FILE).exists():
        _require_empty(out)
        return
    FolderLock(out).release()  # whoever writes there may be about to change what stands there
    before = read_run(out)
    settled = {
        name: own for name, own in _science(config).items() if before.config.get(name) == before.resolved.get(name)
    }
    run_to_go_on_with(out, verb, {**before.resolved, **settled}, plain(defaults(config)))


def finished(verb: str, config: Any, out: Path, resolved: Mapping[str, object], inputs: Inputs) -> bool:
    """Whether the folder holds this very run, done and whole, so that nothing is left to do."""
    full = {**_science(config), **plain(resolved)}
    return finished_run(user_path(out), verb, full, plain(defaults(config)), inputs) is not None


def _science(config: Any) -> dict[str, Any]:
    """The configuration, without what doesn't change numbers."""
    return {name: value for name, value in plain(config).items() if name not in NOT_SCIENCE}


def _make_free(out: Path) -> None:
    """Takes away what a run left that ended without results; UserError where the folder holds anything but a run."""
    if not (out / RUN_FILE).exists():
        _require_empty(out)
        return
    failed = read_run(out)
    for file in (*(f"tables/{name}.parquet" for name in failed.tables), STEPS_FILE, "report.html"):
        (out / file).unlink(missing_ok=True)


def _require_empty(out: Path) -> None:
    """UserError where a folder without a run holds anything but what a process left that died while making one."""
    others = sorted(
        path.name for path in out.iterdir() if path.name not in (LOCK_FILE, JOB_FILE) and not is_partial(path)
    )
    if others:
        raise UserError(
            f"{out} holds {others[0]!a} and no run of mechlens; give an empty folder as --out, or one that isn't there "
            "yet"
        )


class RunWriter:
    """Writes what it is given to the run folder at once, whole, and mirrors it in W&B."""

    def __init__(
        self,
        run: Run,
        out: Path,
        lock: FolderLock,
        mirror: WandbMirror,
        before: Run | None = None,
        *,
        keep_cache: bool = False,
    ) -> None:
        self.run = run
        self._keep_cache = keep_cache
        self._before = before
        self.out = out
        self._lock = lock
        self._mirror = mirror
        self._figures: dict[str, FigureEntry] = {}
        self._tables: dict[str, pd.DataFrame] = {}
        self._report: Report | None = None
        self._refused = False
        if mirror.id:
            self._update(wandb_id=mirror.id, wandb_project=mirror.project)

    @property
    def cache(self) -> Cache:
        """Finished pieces of work, which outlive a killed run."""
        return SHARED.get() or FolderCache(self.out / CACHE)

    def inputs(
        self, inputs: Inputs, *, device: str | None = None, dtype: str | None = None, parity: Parity | None = None
    ) -> None:
        """What goes in, by fingerprint.

        UserError where the folder holds a finished run of other inputs, whose figures and artefacts would stay beside
        ours, or an unfinished one whose template printed another day. The record there stays as it was.
        """
        if self._before is not None:
            self._require_same(self._before, inputs)
        self._update(inputs=inputs, device=device, dtype=dtype, parity=parity)
        self._mirror.inputs(inputs, device, dtype, parity)

    def _require_same(self, before: Run, inputs: Inputs) -> None:
        changed, begun = changed_since(before, inputs), before.inputs.today
        if before.status == "success" and changed:
            said = f"a run of other inputs ({'; '.join(changed)}); choose another --out"
        elif before.status != "success" and begun and inputs.today and begun != inputs.today:
            said = (
                f"an unfinished run whose chat template prints {begun}, and now it would print {inputs.today}; give "
                f"--today {begun} to go on, or choose another --out"
            )
        else:
            return
        self._refused = True
        write_run(before, self.out)
        raise UserError(f"{self.out} holds {said}")

    def seconds(self, by_phase: Mapping[str, float]) -> None:
        """Where the time went."""
        self._update(seconds={name: round(value, 2) for name, value in by_phase.items()})

    def prompts(self, prompts: Sequence[Prompt]) -> None:
        """Keeps the prompts as `tables/prompts.parquet`; their texts are never mirrored unasked."""
        self._mirror.withhold([text for prompt in prompts for text in (prompt.text, prompt.system or "")])
        self.table(PROMPTS, prompt_table(prompts))

    def metric(self, name: str, estimate: Estimate) -> None:
        """One number with its interval."""
        self.metrics({name: estimate})

    def metrics(self, metrics: Mapping[str, Estimate]) -> None:
        """Several numbers with their intervals."""
        self._update(metrics={**self.run.metrics, **metrics})
        self._mirror.metrics(metrics)

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each named series, such as a loss; a line of `steps.jsonl`."""
        path = self.out / STEPS_FILE
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **plain(values)}) + "\n")
        except OSError as error:
            raise disk_error(error, path) from error
        self._mirror.step(step, values)

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """A table as `tables/NAME.parquet`."""
        path = self.out / "tables" / f"{plain_name(name)}.parquet"
        with whole_file(path) as partial:
            frame.to_parquet(partial, index=False)
        self._update(tables={**self.run.tables, name: sha256(path)})
        self._tables[name] = frame
        for column in text_columns(frame):
            self._mirror.withhold([str(value) for value in frame[column].dropna()])
        self._mirror.table(name, frame)

    def result(self, result: Result) -> None:
        """Everything that a study found, apart from figures and words."""
        self.metrics(result.metrics())
        for name, table in result.tables().items():
            self.table(name, table)
        for name, artefact in result.artifacts().items():
            self.artifact(name, artefact)

    def figure(self, name: str, figure: Any, *, caption: str = "", table: str | None = None) -> str:
        """A plotly figure for the report, whose name is returned; `table` names the table that it was drawn from."""
        if table is not None and table not in self._tables:
            raise ValueError(
                f"figure {name!r} names the table {table!r}; write it first, there is {list(self._tables)}"
            )
        path = self.out / "figures" / f"{plain_name(name)}.json"
        write_text(path, str(figure.to_json()))
        self._update(figures={**self.run.figures, name: sha256(path)})
        self._figures[name] = FigureEntry(figure, caption, table)
        self._mirror.figure(name, figure)
        return name

    def artifact(self, name: str, result: object, *, inputs: Mapping[str, str] | None = None) -> Artefact:
        """A result as `NAME.safetensors`.

        `inputs` holds the sha256 of what it was made from, by name; None is all that went into the run.
        """
        if inputs is None:
            inputs = {**self.run.inputs.data, "model": self.run.inputs.model or ""}
        path = self.out / f"{plain_name(name)}.safetensors"
        save(result, path)
        artefact = Artefact(file=path.name, sha256=sha256(path), inputs=dict(inputs))
        self._update(artefacts={**self.run.artefacts, name: artefact})
        self._mirror.artefact(name, type(result).__name__.lower(), artefact)
        return artefact

    def report(self, report: Report) -> Path:
        """The report as `report.html`, written now and again with the final status."""
        self._report = report
        headline = str(report.headline) if report.headline else None
        words = {name: report.words.get(name, name) for name in report.numbers}
        shown = (*report.main, *(name for section in report.sections for name in section.figures))
        known = self.run.figures
        figures = {name: known[name] for name in (*shown, *known) if name in known}
        self._update(verdict=report.verdict, headline=headline, words=words, figures=figures)
        path = self.out / "report.html"
        write_text(path, render(report, self.run, self._figures, self._tables))
        self._mirror.begins_with(self.run.sentence, list(figures))
        return path

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._end("success", None)
            else:
                self._end("error", f"{type(error).__name__}: {error}".removesuffix(": "))
        except Exception:
            # The first error is the one to see: a disk that fills up ends here a second time.
            if error is None:
                raise
        finally:
            self._mirror.finish(self.run.status, self.run.error)
            if self.run.status == "success" and not self._keep_cache:
                # Only a run that isn't finished goes on from it; what can't be removed does no harm.
                shutil.rmtree(self.out / CACHE, ignore_errors=True)
            self._lock.release()

    def _end(self, status: str, error: str | None) -> None:
        self._update(status=status, error=error, finished=_now())
        if self._report is not None:
            self.report(self._report)

    def _update(self, **changes: Any) -> None:
        self.run = replace(self.run, **changes)
        if not self._refused:
            write_run(self.run, self.out)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
