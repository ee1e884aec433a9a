"""A run as an object, the same whether it was just made or is opened from its folder; nothing is read unasked."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from mechlens.errors import UserError, warn
from mechlens.files import plain_name, short_name
from mechlens.runs.lock import is_held
from mechlens.runs.remote.copies import copy_of
from mechlens.runs.remote.store import local_path
from mechlens.runs.report.parts import in_words
from mechlens.runs.results.kept import Kept, names_in, read_figure, require_same
from mechlens.runs.run import RUN_FILE, Run, found_runs, interval_of, metric_text, read_run

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from mechlens.methods.directions.direction import Direction, DirectionGrid

DIRECTIONS = ("Direction", "DirectionGrid")
STATES = {
    "running": "running",
    "interrupted": "interrupted: the same {how} goes on",
    "error": "failed ({error}): the same {how} goes on",
    "success": "",
}


@dataclass(frozen=True)
class RunResult:
    """A recorded run, from `ml.run(config)` or `ml.open(folder)`; any function that takes a path takes it as one.

    >>> run = ml.open("runs/first")
    >>> list(run.metrics.columns[:3]), "auroc_by_level" in run.tables
    (['name', 'words', 'value'], True)
    """

    folder: Path
    record: Run
    """All of `run.json`: configuration, inputs, status, numbers as `Estimate`s."""

    def __fspath__(self) -> str:
        return str(self.folder)

    def __iter__(self) -> Iterator[Any]:
        """`folder, record = run`."""
        return iter((self.folder, self.record))

    @property
    def sentence(self) -> str:
        """What was found, in one sentence; "" where nothing was yet."""
        return self.record.sentence

    @property
    def verdict(self) -> str:
        """The whole verdict as the report has it; "" where there is none yet."""
        return self.record.verdict or ""

    @property
    def status(self) -> Literal["running", "interrupted", "success", "error"]:
        """As of now: a run that began and didn't end is running while a process holds its folder."""
        if self.record.status == "error" and (self.record.error or "").startswith("KeyboardInterrupt"):
            return "interrupted"
        if self.record.status != "started":
            return self.record.status
        return "running" if is_held(self.folder) else "interrupted"

    @property
    def state(self) -> str:
        """What is the matter with a run that didn't end well, and the command by which it goes on; "" if it did."""
        command = self.record.command
        how, refused = "command" if command else "call", self.record.refused
        said = STATES[self.status].format(error=self.record.error or "killed", how=how)
        if refused:
            said = f"failed: {refused.removesuffix('.')}; mend it and give the {how} again"
        return f"{said}: {command}" if command and self.status in ("interrupted", "error") else said

    @property
    def model(self) -> str:
        """The model's short name, without its folder or its owner on the hub; "" for a study without one."""
        return short_name(self.record.model_name)

    @property
    def metrics(self) -> "pandas.DataFrame":
        """A row a number: name, words, value, low, high, n; those that decide the verdict first.

        Low and high are NaN for what has no interval: a count, an AUROC of too few prompts.
        """
        import pandas as pd

        words = self.record.words
        rows = [
            {"name": name, "words": words.get(name) or in_words(name), **one.row()}
            | dict(zip(("low", "high"), interval_of(name, one), strict=True))
            for name, one in (self.record.deciding | self.record.metrics).items()
        ]
        return pd.DataFrame(rows, columns=["name", "words", "value", "low", "high", "n"])

    @property
    def tables(self) -> "Kept[pandas.DataFrame]":
        """Every table of the run by name, read when it is asked for."""
        names = names_in(self.folder / "tables", self.record.tables, ".parquet")
        return Kept("table", names, self._table)

    @property
    def figures(self) -> "Kept[plotly.graph_objects.Figure]":
        """Every figure of the report by name, the main one first; each shows itself in a notebook."""
        names = names_in(self.folder / "figures", self.record.figures, ".json")
        return Kept("figure", names, self._figure)

    @property
    def artifacts(self) -> Kept[Any]:
        """Everything else that the run saved, by name: directions, centroids, guards, patching sweeps."""
        return Kept("artifact", tuple(self.record.artefacts), self._artifact)

    @property
    def directions(self) -> "Kept[Direction | DirectionGrid]":
        """The directions among them."""
        names = tuple(name for name in self.record.artefacts if self._kind(name) in DIRECTIONS)
        return Kept("direction", names, self._artifact)

    @property
    def report(self) -> Path:
        """The report, one page that any browser opens; UserError where there is none yet."""
        page = self.folder / "report.html"
        if not page.is_file():
            raise UserError(f"there is no {page}; {self.state or 'make the run again'}")
        return page

    def _table(self, name: str) -> "pandas.DataFrame":
        from mechlens.runs.folder import read_table

        return read_table(self.folder / "tables" / plain_name(f"{name}.parquet"), self.record.tables.get(name))

    def _figure(self, name: str) -> "plotly.graph_objects.Figure":
        return read_figure(self.folder / "figures" / plain_name(f"{name}.json"), self.record.figures.get(name))

    def _artifact(self, name: str) -> Any:
        from mechlens.runs.results.saved import open_file

        artefact = self.record.artefacts[name]
        file = self.folder / plain_name(artefact.file)
        require_same(file, artefact.sha256)
        return open_file(file)

    def _kind(self, name: str) -> str:
        """The class that an artefact's file names; "" where it can't be read, which taking it will say."""
        from mechlens.runs.artifacts import read_header

        try:
            return str(read_header(self.folder / plain_name(self.record.artefacts[name].file))["class"])
        except UserError:
            return ""

    def __repr__(self) -> str:
        record = self.record
        of = f" of {self.model}" if self.model else ""
        lines = [f"RunResult({str(self.folder)!r}): {record.verb.replace('_', ' ')}{of}, {self.status}"]
        lines += [line for line in (self.sentence, self.state) if line]
        for name, one in list(record.deciding.items())[:5]:
            lines.append(f"  {record.words.get(name, name)}: {metric_text(name, one)}")
        kept = {"tables": self.tables, "figures": self.figures, "directions": self.directions}
        counts = ", ".join(f"{len(mapping)} in .{name}" for name, mapping in kept.items() if mapping)
        return "\n".join(line for line in (*lines, counts) if line)

    def _repr_html_(self) -> str:
        from mechlens.runs.results.notebook import run_html

        return run_html(self)


@dataclass(frozen=True)
class RunList(Sequence[RunResult]):
    """Runs, oldest first, which a notebook shows as a table with what each found.

    >>> runs = ml.list_runs("runs/first")
    >>> len(runs), runs[0].record.verb
    (1, 'direction')
    """

    runs: tuple[RunResult, ...]

    @overload
    def __getitem__(self, place: int) -> RunResult: ...
    @overload
    def __getitem__(self, place: slice) -> "RunList": ...
    def __getitem__(self, place: int | slice) -> "RunResult | RunList":
        return RunList(self.runs[place]) if isinstance(place, slice) else self.runs[place]

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        lines = [f"{run.folder}  {run.record.verb}, {run.status}  {run.sentence}".rstrip() for run in self]
        return "\n".join(lines) or "no runs"

    def _repr_html_(self) -> str:
        from mechlens.runs.results.notebook import list_html

        return list_html(self)


def open_run_folder(folder: str | os.PathLike[str]) -> RunResult:
    """The run that was recorded in a folder; UserError where there is none or its record is damaged."""
    path = copy_of(local_path(folder))
    return RunResult(path, read_run(path))


def list_runs(
    root: str | os.PathLike[str] = "runs",
    *,
    study: str | None = None,
    model: str | None = None,
    status: str | None = None,
    since: str | None = None,
    until: str | None = None,
) -> RunList:
    """Every run at or below `root`, oldest first; damaged ones become warnings.

    Where it is said, only those of a study, of a model (its short name, or as it was given), of a status, and begun on
    or after one day and on or before another ("2026-11-27", UTC). A run unpacks into its folder and its record: `for
    folder, record in list_runs("runs")`.

    >>> [run.record.status for run in ml.list_runs("runs/first")]
    ['success']
    """
    from mechlens.runs.results.wanted import Wanted, day

    runs = []
    for folder, found in found_runs(copy_of(local_path(root), RUN_FILE)):
        if isinstance(found, Run):
            runs.append(RunResult(folder, found))
        else:
            # One damaged folder must not hide the others.
            warn(f"left out of the list: {found}")
    wanted = Wanted(study, model, status, day("since", since), day("until", until))
    return RunList(tuple(sorted(wanted.of(runs), key=lambda run: run.record.started)))
