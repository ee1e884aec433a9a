"""Whether a folder that already holds a run can be gone on with."""

from pathlib import Path
from typing import Any

from mechlens.errors import UserError
from mechlens.records.plain import first_difference
from mechlens.records.run import RUN_FILE, Run, read_run


def run_to_go_on_with(out: Path, verb: str, resolved: dict[str, Any]) -> Run | None:
    """The run in the folder if it is the same piece of work; None where there is none yet."""
    if not (out / RUN_FILE).exists():
        return None
    before = read_run(out)
    if before.verb != verb:
        raise UserError(f"{out} holds a run of `{before.verb}`, not of `{verb}`; choose another --out")
    if before.inputs.today and resolved.get("today") == before.inputs.today:
        resolved = resolved | {"today": before.resolved.get("today")}  # the day on which it began, now by its name
    if difference := first_difference(before.resolved, resolved):
        name, old, new = difference
        raise UserError(f"{out} holds a run with {name} = {old!r}, not {new!r}; choose another --out")
    return before
