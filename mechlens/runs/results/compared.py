"""Runs side by side: numbers with intervals, their differences from the first run's, and what the runs differ in."""

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from mechlens.errors import UserError, many
from mechlens.files import AnyPath
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.report.parts import in_words
from mechlens.runs.results.paired import paired_difference, rows_by_number
from mechlens.runs.results.result import RunResult, open_run_folder
from mechlens.runs.run import interval_of, metric_text, plain

if TYPE_CHECKING:
    import pandas

SEED = "seed"
DIFFERENCE = ("difference", "difference_low", "difference_high")
Z = 1.96
"""Standard errors that half a 95% interval is."""


@dataclass(frozen=True, repr=False)
class RunComparison:
    """Finished runs of one study, the first of which the others are compared with.

    >>> found = ml.compare_runs("runs/first", "runs/first")
    >>> bool(found.metrics["difference"].dropna().eq(0).all()), len(found.differs)
    (True, 0)
    """

    names: tuple[str, ...]
    """Short names of the runs, all different: as much of their folders' paths as tells them apart."""
    runs: tuple[RunResult, ...]

    @property
    def metrics(self) -> "pandas.DataFrame":
        """A row a number and run: name, words, run, value, low, high, n, difference, difference_low, difference_high,
        paired.

        Differences are from the first run, whose own is NaN. Paired ones are of the same prompts, pair by pair; the
        intervals of the others are made of the two numbers' own (Zou & Donner 2008) as if the runs were independent,
        and are wider than paired ones would be. NaN where one of the two has no interval.
        """
        import pandas as pd

        kept = [rows_by_number(run) for run in self.runs]
        rows = []
        for number in self._numbers:
            first = self.runs[0].record.metrics.get(number)
            for name, run, made in zip(self.names, self.runs, kept, strict=True):
                one = run.record.metrics.get(number)
                if one is not None:
                    low, high = interval_of(number, one)
                    told = {"value": one.value, "low": low, "high": high, "n": one.n}
                    own = name == self.names[0]
                    pairs = None if own else paired_difference(kept[0].get(number), made.get(number))
                    difference = _difference(number, None if own else first, one) if pairs is None else _columns(pairs)
                    rows.append({
                        "name": number, "words": self._words(number), "run": name, **told, **difference,
                        "paired": pairs is not None,
                    })  # fmt: skip
        columns = ["name", "words", "run", "value", "low", "high", "n", *DIFFERENCE, "paired"]
        return pd.DataFrame(rows, columns=columns)

    def in_words(self, row: Mapping[Hashable, Any]) -> tuple[str, str]:
        """A row of `metrics` as people read it: the number, and its difference from the first run's."""
        run = self.runs[self.names.index(row["run"])]
        own = metric_text(row["name"], run.record.metrics[row["name"]])
        gap = Estimate.of_beside(row, "difference", row["n"])
        sign = "+" if gap.value >= 0 else ""
        if math.isnan(gap.low):
            return own, "" if math.isnan(gap.value) else f"{sign}{gap.value:.2f}"
        return own, f"{sign}{gap.brief}{', paired' if row['paired'] else ''}"

    @property
    def differs(self) -> "pandas.DataFrame":
        """A row for each thing that isn't the same in all runs: of (configuration, input, package, machine, code),
        name, and a column a run; "" where a run has none."""
        import pandas as pd

        told = [_facts(run) for run in self.runs]
        rows = []
        for key in dict.fromkeys(key for facts in told for key in facts):
            values = [facts.get(key, "") for facts in told]
            if len(set(values)) > 1:
                rows.append({"of": key[0], "name": key[1], **dict(zip(self.names, values, strict=True))})
        return pd.DataFrame(rows, columns=["of", "name", *self.names])

    @property
    def seeds(self) -> "pandas.DataFrame":
        """A row for each number and group of runs that differ in their seed alone: runs, mean, the spread between seeds
        (standard deviation) and the standard error that one run's interval claims, on average.

        Where the spread is the larger, one run's interval leaves out what its seed decided. Empty without such runs.
        """
        import pandas as pd

        groups: dict[str, list[RunResult]] = {}
        for run in self.runs:
            groups.setdefault(_but_seed(run), []).append(run)
        rows = []
        for group in (group for group in groups.values() if len({run.record.seed for run in group}) > 1):
            label = self.names[self.runs.index(group[0])]
            for number in self._numbers:
                told = [run.record.metrics[number] for run in group if number in run.record.metrics]
                values = [one.value for one in told]
                if len(told) > 1 and all(map(math.isfinite, values)):
                    errors = [_error(number, one) for one in told]
                    rows.append({
                        "like": label, "name": number, "words": self._words(number), "runs": len(told),
                        "mean": fmean(values), "between_seeds": stdev(values), "one_run": fmean(errors),
                    })  # fmt: skip
        columns = ["like", "name", "words", "runs", "mean", "between_seeds", "one_run"]
        return pd.DataFrame(rows, columns=columns)

    @property
    def _numbers(self) -> list[str]:
        """Numbers that decide verdicts first, then the others, each once."""
        deciding = [name for run in self.runs for name in run.record.deciding]
        return list(dict.fromkeys([*deciding, *(name for run in self.runs for name in run.record.metrics)]))

    def _words(self, number: str) -> str:
        """The number in words; in each run's own where these differ, as a position in them does."""
        told: dict[str, list[str]] = {}
        for name, run in zip(self.names, self.runs, strict=True):
            if number in run.record.words:
                told.setdefault(run.record.words[number], []).append(name)
        if len(told) < 2:
            return next(iter(told), in_words(number))
        return "; ".join(f"{words} ({', '.join(names)})" for words, names in told.items())

    def __repr__(self) -> str:
        lines = [f"RunComparison of {len(self.runs)} runs: {self.runs[0].record.verb.replace('_', ' ')}"]
        lines += [f"  {name}: {run.sentence}" for name, run in zip(self.names, self.runs, strict=True)]
        differ = self.differs
        things = ", ".join(differ["name"][differ["of"] == "configuration"])
        return "\n".join([*lines, f"  they differ in {things or 'no option'}; .metrics, .differs and .seeds have more"])


def compare_runs(*folders: "AnyPath | RunResult") -> RunComparison:
    """Runs of one study side by side; UserError for one that isn't finished, or is of another study.

    >>> list(ml.compare_runs("runs/first", "runs/first").differs.columns)
    ['of', 'name', 'first', 'first (2)']
    """
    if len(folders) < 2:
        raise UserError(f"{many(len(folders), 'run')} can't be compared; give two or more run folders, one by one")
    runs = tuple(one if isinstance(one, RunResult) else open_run_folder(one) for one in folders)
    for run in runs:
        if run.status != "success":
            raise UserError(f"{run.folder} isn't finished; {run.state or 'make it first'}")
        if run.record.verb != runs[0].record.verb:
            raise UserError(
                f"{run.folder} is a run of {run.record.verb!r} and {runs[0].folder} one of {runs[0].record.verb!r}, "
                "which have no numbers in common; compare runs of one study"
            )
    return RunComparison(_names(runs), runs)


def _names(runs: Sequence[RunResult]) -> tuple[str, ...]:
    """The last parts of the folders' paths, as few as make them different; numbered where one folder comes twice."""
    parts = [run.folder.resolve().parts for run in runs]
    deepest = max(map(len, parts))
    for depth in range(1, deepest + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            break
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[i] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return tuple(names)


def _difference(number: str, first: Estimate | None, one: Estimate) -> dict[str, float]:
    """One number minus the first run's, with the interval by variance estimates recovery (MOVER)."""
    if first is None:
        return dict.fromkeys(DIFFERENCE, math.nan)
    gap = one.value - first.value
    (low, high), (first_low, first_high) = interval_of(number, one), interval_of(number, first)
    below = math.hypot(one.value - low, first_high - first.value)
    above = math.hypot(high - one.value, first.value - first_low)
    return dict(zip(DIFFERENCE, (gap, gap - below, gap + above), strict=True))


def _columns(pairs: Estimate) -> dict[str, float]:
    return dict(zip(DIFFERENCE, (pairs.value, pairs.low, pairs.high), strict=True))


def _error(number: str, one: Estimate) -> float:
    low, high = interval_of(number, one)
    return (high - low) / 2 / Z


def _facts(run: RunResult) -> dict[tuple[str, str], str]:
    """Everything that may explain a difference, by its kind and name, as text."""
    record = run.record
    facts = {("configuration", name): json.dumps(value) for name, value in record.resolved.items()}
    facts |= {("input", name): sha[:12] for name, sha in record.inputs.named.items()}
    if record.inputs.today:
        facts["input", "day that the template prints"] = record.inputs.today
    facts |= {("package", name): version for name, version in record.packages.items()}
    facts |= {("machine", "device"): str(record.device), ("machine", "dtype"): str(record.dtype)}
    if record.git is not None:
        facts["code", "commit"] = json.dumps(plain(record.git))
    return facts


def _but_seed(run: RunResult) -> str:
    """The configuration without its seed, as text: what runs of one group share."""
    return json.dumps({name: value for name, value in run.record.resolved.items() if name != SEED}, sort_keys=True)
