"""The record of one run, and what can be asked of records afterwards."""

import dataclasses
import json
import math
import numbers
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator

from mechlens.checked_json import parse_sealed, read_sealed, sealed
from mechlens.errors import UserError
from mechlens.files import AnyPath, write_text
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.checkpoint import is_sampled
from mechlens.models.precision import Parity
from mechlens.runs.environment import GitState
from mechlens.runs.headline import first_sentence
from mechlens.runs.remote.store import address, is_remote, local_path, read_text


def plain(value: object) -> Any:
    """JSON for whatever a config or a record can hold; a number that is not finite is null."""
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    # NumPy's numbers come out as Python's.
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Estimate):
        return plain(value.row() | ({"is_auroc": True} if value.is_auroc else {}))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [plain(item) for item in items]
    raise TypeError(f"a {type(value).__name__} has no place in a record: {value!r}")


def defaults(config: object) -> dict[str, Any]:
    """The fields of a configuration that may be left alone, each with what it is then."""
    known = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    return {setting.name: setting.default for setting in known if setting.default is not dataclasses.MISSING}


class Change(NamedTuple):
    """A field, by its dotted name, that two plain values disagree about."""

    name: str
    old: object
    new: object


def changes(old: object, new: object, name: str = "") -> list[Change]:
    """Every field in which two plain values differ, in the order of the new one."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [Change(name, old, new)]
    keys = [*new, *(key for key in old if key not in new)]
    inner = [changes(old.get(key), new.get(key), f"{name}.{key}" if name else str(key)) for key in keys]
    return [change for found in inner for change in found]


FORMAT = 2
"""Since 2 a record is sealed, and knows its tables."""
REMEDY = "it was changed by hand or damaged: run again into another folder"
RUN_FILE = "run.json"
JOB_FILE = "job.json"
"""What a sweep writes into a run folder beforehand: the configuration that belongs there."""
REFUSALS = ("UserError", "UnfitPrompt")
"""Errors that the same command would end in again."""


@dataclass(frozen=True)
class Inputs:
    """What went in, by fingerprint."""

    model: str | None = None
    """Fingerprint of the weights."""
    template: str | None = None
    """Fingerprint of the chat template."""
    data: dict[str, str] = field(default_factory=dict)
    """sha256 of every data file or prompt set, by name."""
    today: str | None = None
    """The day that the chat template printed, where it prints one."""
    sampled: str | None = None
    """The weights' older fingerprint, by which runs of earlier versions know them."""

    @property
    def named(self) -> dict[str, str]:
        """Fingerprint of the model, of the template and of every data file, by name; of those that there are."""
        found = {"model": self.model, "template": self.template, **self.data}
        return {name: sha for name, sha in found.items() if sha}


@dataclass(frozen=True)
class Artefact:
    """A result file of the run, and what it was made from."""

    file: str
    """Path within the run folder."""
    sha256: str
    inputs: dict[str, str]
    """sha256 of what it was made from, by name."""


@dataclass(frozen=True)
class Run:
    """Everything needed to trust a run's numbers, and to get them again.

    >>> run = ml.read_run("runs/first")
    >>> run.verb, run.config["model"]
    ('direction', 'smollm2')
    """

    id: str
    verb: str
    config: dict[str, Any]
    """As it was given."""
    resolved: dict[str, Any]
    """With what was left open filled in; decides whether a run folder can be gone on with."""
    status: Literal["started", "success", "error"]
    started: str
    """ISO 8601, UTC."""
    seed: int | None = None
    git: GitState | None = None
    packages: dict[str, str] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=Inputs)
    device: str | None = None
    dtype: str | None = None
    """Type of the weights; of quantised ones how, and the type that they are computed with."""
    parity: Parity | None = None
    """How far the model was from plain Hugging Face in the same type."""
    finished: str | None = None
    error: str | None = None
    headline: str | None = None
    """The one sentence that says what was found; None in records of earlier versions."""
    verdict: str | None = None
    """The report's verdict, in words."""
    metrics: dict[str, Estimate] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    """What the metrics that decide the verdict are called in the report, in its order."""
    artefacts: dict[str, Artefact] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    """sha256 of every table's file, by name."""
    figures: dict[str, str] = field(default_factory=dict)
    """sha256 of every figure's file, by name; the report's main one first, then in its order."""
    wandb_id: str | None = None
    wandb_project: str | None = None
    """In which the W&B run is, as ENTITY/PROJECT where the entity is known."""
    argv: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by phase, of the process that finished the run: loading, answering, collecting, ..., other."""

    @property
    def sentence(self) -> str:
        """The run in one sentence: its headline, else the first of its verdict; "" where it found nothing yet."""
        return self.headline or first_sentence(self.verdict or "")

    @property
    def deciding(self) -> dict[str, Estimate]:
        """The numbers that decide the verdict, in the report's order; all of them where the record names none."""
        return {name: self.metrics[name] for name in self.words or self.metrics if name in self.metrics}

    @property
    def model_name(self) -> str:
        """The model, or the base of the checkpoints, as it was asked for; "" where the study has none."""
        return str(self.resolved.get("model") or self.resolved.get("base") or "")

    @property
    def refused(self) -> str:
        """The sentence by which a run ended that the user has something to mend for; "" where there is nothing."""
        kind, _, sentence = (self.error or "").partition(": ")
        return sentence if self.status == "error" and kind in REFUSALS else ""

    @property
    def command(self) -> str:
        """The command line to copy into a shell; "" where there was none, as in a notebook or a script."""
        words = "_".join(self.argv[1:3])
        ours = words == "runs_rerun" or f"{words}_".startswith(f"{self.verb}_")
        return shlex.join(["mechlens", *self.argv[1:]]) if ours else ""


class Difference(NamedTuple):
    """The metric in which two runs differ most."""

    name: str
    difference: float
    """Largest absolute difference of value, low or high; infinite where only one run has a number."""


# JSON has no NaN; null stands for a number that could not be measured.
_Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclass(frozen=True)
class _Measured:
    value: _Number
    low: _Number
    high: _Number
    n: int
    is_auroc: bool = False


@dataclass(frozen=True, kw_only=True)
class _OnDisk(Run):
    """A run as `run.json` holds it."""

    format: int
    metrics: dict[str, _Measured] = field(default_factory=dict)  # type: ignore[assignment]


def write_run(run: Run, folder: Path) -> None:
    """Puts `run.json` in the run's folder, whole or not at all."""
    record = {"format": FORMAT, **plain(run)}
    write_text(folder / RUN_FILE, json.dumps(sealed(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_run(folder: AnyPath) -> Run:
    """The record in a run's folder.

    >>> ml.read_run("runs/first").status
    'success'
    """
    place = local_path(folder)
    if place.is_file():
        if place.name != RUN_FILE:
            raise UserError(f"{place} is a file; give the folder of a run, which its --out named")
        place = place.parent
    path = place / RUN_FILE
    try:
        found = _on_disk(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no {RUN_FILE} in {path.parent}; give the --out folder of a run") from error
    if found.format not in (1, FORMAT):
        raise UserError(f"{path} has format {found.format}, this mechlens reads format {FORMAT}; update mechlens")
    values = {name: value for name, value in vars(found).items() if name != "format"}
    metrics = {
        name: Estimate(one.value, one.low, one.high, one.n, one.is_auroc or "auroc" in name)
        for name, one in found.metrics.items()
    }
    return Run(**{**values, "metrics": metrics})


def _on_disk(path: Path) -> _OnDisk:
    if is_remote(path):
        found: _OnDisk = parse_sealed(read_text(path), _OnDisk, address(path), REMEDY, sealed_from=2, extra="forbid")
    else:
        found = read_sealed(path, _OnDisk, REMEDY, sealed_from=2, extra="forbid")
    return found


def found_runs(root: Path) -> list[tuple[Path, Run | UserError]]:
    """Every run folder at or below `root`, by name, with its record or with what is wrong with that."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give the folder that holds your runs")
    # Caches and W&B's own files lie inside run folders, never run folders inside them.
    folders = (path.parent for path in root.rglob(RUN_FILE) if not {"cache", "wandb"} & set(path.parts[-2:-1]))
    found: list[tuple[Path, Run | UserError]] = []
    for folder in sorted(folders):
        try:
            found.append((folder, read_run(folder)))
        except UserError as error:
            found.append((folder, error))
    return found


def changed_since(run: Run, now_inputs: Inputs) -> list[str]:
    """What differs from the run's inputs, one phrase each; empty if a rerun would see the same."""
    before = run.inputs
    if before.model and is_sampled(before.model) and before.model == now_inputs.sampled:
        now_inputs = replace(now_inputs, model=before.model)
    changed = []
    if before.model != now_inputs.model:
        changed.append(_change("model", before.model, now_inputs.model))
    if before.today != now_inputs.today:
        # Another day is another template, too; that much follows.
        day = f"; give --today {before.today}" if before.today else ""
        changed.append(_change("the day that the chat template prints", before.today, now_inputs.today) + day)
    elif before.template != now_inputs.template:
        changed.append(_change("template", before.template, now_inputs.template))
    for name in sorted(before.data.keys() | now_inputs.data.keys()):
        old, new = before.data.get(name), now_inputs.data.get(name)
        if old != new:
            changed.append(_change(f"data {name}", old, new))
    return changed


COUNTS = ("n.", "candidates.")
"""How the names of metrics begin that are numbers of prompts or checkpoints."""


def metric_text(name: str, value: object) -> str:
    """A metric in words: a count is a number of prompts or checkpoints out of all, and has no interval."""
    if isinstance(value, Estimate) and name.startswith(COUNTS):
        return f"{value.value:.0f} of {value.n}"
    # As in a report: an AUROC or a rate of exactly 1 or 0 has an interval, if without width.
    if isinstance(value, Estimate) and value.low == value.value == value.high and value.value not in (0, 1):
        return f"{value.value:.{0 if float(value.value).is_integer() else 3}f}, n={value.n}"
    return str(value)


def interval_of(name: str, value: Estimate) -> tuple[float, float]:
    """Low and high, for frames; NaN for a count, and for any other number that has no interval."""
    exact = value.low == value.value == value.high and value.value not in (0, 1)
    return (math.nan, math.nan) if exact or name.startswith(COUNTS) else value.interval


RENAMED = {"auroc.best": "auroc.strongest"}
"""Metrics that later versions call otherwise, or give only where they are what they were called."""


def largest_difference(a: Run, b: Run) -> Difference:
    """The metric in which a run differs most from `a`; 0.0 if they agree, NaN standing equal to NaN.

    Metrics that `a` lacks don't count: a newer mechlens may report more.
    """
    worst = Difference(name="", difference=0.0)
    for name in sorted(a.metrics):
        difference = _distance(a.metrics.get(name), b.metrics.get(name) or b.metrics.get(RENAMED.get(name, name)))
        if difference > worst.difference or not worst.name:
            worst = Difference(name, difference)
    return worst


def _distance(a: Estimate | None, b: Estimate | None) -> float:
    if a is None or b is None or a.n != b.n:
        return math.inf
    return max(_gap(old, new) for old, new in ((a.value, b.value), (a.low, b.low), (a.high, b.high)))


def _gap(old: float, new: float) -> float:
    if old == new or (math.isnan(old) and math.isnan(new)):
        return 0.0
    gap = abs(old - new)
    return math.inf if math.isnan(gap) else gap


def _change(what: str, old: str | None, new: str | None) -> str:
    return f"{what} (was {(old or 'absent')[:12]}, is {(new or 'absent')[:12]})"
