"""The losses of a training run, kept on disk as they come, so that a killed run's curve has no gap."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from mechlens.records.disk import disk_error

Numbers = dict[str, float]


class LossLog:
    """Takes the numbers of each step, hands them on, and first those of the steps before a kill."""

    def __init__(self, path: Path, hand_on: Callable[[int, Numbers], None]) -> None:
        self.path = path
        self.rows = _read(path)
        self._hand_on = hand_on
        self._behind = sorted(self.rows)

    def __call__(self, step: int, numbers: Numbers) -> None:
        """One step; a step that was logged before the kill and is done again counts once."""
        self._catch_up(step)
        self.rows[step] = numbers
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
        except OSError as error:
            raise disk_error(error, self.path) from error
        self._hand_on(step, numbers)

    def table(self) -> pd.DataFrame:
        """One row a step, in order; what was not yet handed on is now."""
        if self._behind:
            self._catch_up(self._behind[-1] + 1)
        return pd.DataFrame([{"step": step, **self.rows[step]} for step in sorted(self.rows)])

    def _catch_up(self, step: int) -> None:
        for earlier in self._behind:
            if earlier < step:
                self._hand_on(earlier, self.rows[earlier])
        self._behind = []


def _read(path: Path) -> dict[int, Numbers]:
    if not path.exists():
        return {}
    rows: dict[int, Numbers] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # the line that was being written when the run was killed
        rows[int(found.pop("step"))] = found
    return rows
