"""The losses of a training run, kept on disk as they come, so that a killed run's curve has no gap."""

import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from mechlens.checked_json import parse_sealed, sealed
from mechlens.errors import UserError
from mechlens.files import disk_error

Numbers = dict[str, float]
REMEDY = "put back what stood there, or start over in another folder"


class LossLog:
    """Takes the numbers of each step, hands them on, and first those of the steps before a kill."""

    def __init__(self, path: Path, hand_on: Callable[[int, Numbers], None]) -> None:
        self.path = path
        self.rows, self._torn = _read(path)
        self._hand_on = hand_on
        self._behind = sorted(self.rows)

    def __call__(self, step: int, numbers: Numbers) -> None:
        """One step; a step that was logged before the kill and is done again counts once."""
        self._catch_up(step)
        self.rows[step] = numbers
        line = json.dumps(sealed({"step": step, **numbers})) + "\n"
        try:
            if self._torn:
                os.truncate(self.path, self._torn[0])
                self._torn = ()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise disk_error(error, self.path) from error
        self._hand_on(step, numbers)

    def table(self, steps: int = 0) -> pd.DataFrame:
        """One row a step, in order; what was not yet handed on is now.

        A warning says which of `steps` steps has none.
        """
        if self._behind:
            self._catch_up(self._behind[-1] + 1)
        if missing := sorted(set(range(1, max((steps, *self.rows)) + 1)) - self.rows.keys()):
            warnings.warn(
                f"{self.path} lacks {len(missing)} steps, the first of them {missing[0]}, so the curve of losses has a "
                "gap; start over in another folder for a whole one",
                stacklevel=2,
            )
        return pd.DataFrame([{"step": step, **self.rows[step]} for step in sorted(self.rows)])

    def _catch_up(self, step: int) -> None:
        for earlier in self._behind:
            if earlier < step:
                self._hand_on(earlier, self.rows[earlier])
        self._behind = []


def _read(path: Path) -> tuple[dict[int, Numbers], tuple[int, ...]]:
    """The numbers by step, and where a last line begins that a kill cut off; UserError for damage anywhere else."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); check its permissions") from error
    rows: dict[int, Numbers] = {}
    whole, newline, rest = content.rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if newline else (), start=1):
        found: Numbers = parse_sealed(line, Numbers, f"{path} line {number}", REMEDY, sealed_from=1)
        step = found.pop("step", math.nan)
        if not step.is_integer():
            raise UserError(f"{path} line {number} has no step; {REMEDY}")
        rows[int(step)] = found
    return rows, (len(whole) + len(newline),) if rest else ()
