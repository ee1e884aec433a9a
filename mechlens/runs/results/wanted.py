"""Which of many runs are asked for: by study, model, status and date."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from mechlens.errors import UserError
from mechlens.files import short_name
from mechlens.registry import unknown_name
from mechlens.runs.results.result import STATES, RunResult


@dataclass(frozen=True)
class Wanted:
    """What runs must be; None asks for nothing."""

    study: str | None
    model: str | None
    status: str | None
    since: str | None
    until: str | None

    def of(self, runs: Sequence[RunResult]) -> list[RunResult]:
        """Those that are; UserError for a study, model or status that none of them has."""
        self._require_known(runs)
        return [run for run in runs if self._is(run)]

    def _is(self, run: RunResult) -> bool:
        begun = run.record.started[:10]
        return (
            (self.study is None or _study(run.record.verb) == _study(self.study))
            and (self.model is None or self.model in (run.model, run.record.model_name))
            and (self.status is None or run.status == self.status)
            and (self.since is None or begun >= self.since)
            and (self.until is None or begun <= self.until)
        )

    def _require_known(self, runs: Sequence[RunResult]) -> None:
        if self.status is not None and self.status not in STATES:
            raise unknown_name("status", self.status, list(STATES))
        studies = {_study(run.record.verb) for run in runs}
        if self.study is not None and runs and _study(self.study) not in studies:
            raise unknown_name("run here of the study", self.study, sorted(studies))
        models = {name for run in runs for name in (run.model, run.record.model_name) if name}
        if self.model is not None and runs and self.model not in models:
            raise unknown_name("run here of the model", self.model, sorted({short_name(name) for name in models}))


def _study(name: str) -> str:
    """As commands write it: guard fit."""
    return name.replace("_", " ").strip()


def day(name: str, given: str | None) -> str | None:
    """A day as records begin with it; UserError for what is none."""
    if given is None:
        return None
    try:
        return date.fromisoformat(given).isoformat()
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is {given!r}; give a day, such as 2026-11-27") from error
