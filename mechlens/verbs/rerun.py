"""`mechlens runs rerun`: the same numbers again, or by name what has changed since."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from mechlens.checked_json import checked
from mechlens.config import RECORDED, Rerun, WandbSettings
from mechlens.errors import UserError
from mechlens.records.run import Difference, changed_since, largest_difference, read_run
from mechlens.records.writer import open_run


def rerun(config: Rerun) -> Difference:
    """Runs the recorded configuration again, computing everything anew; the metric that differs most.

    A chat template that prints the date prints the day on which the run was made.

    UserError, before anything is computed, naming each input that isn't what it was.
    """
    before = read_run(config.folder)
    if before.verb not in RECORDED:
        raise UserError(f"a run of {before.verb!r} can't be made again; there are {', '.join(RECORDED)}")
    verb = import_module(f"mechlens.verbs.{before.verb}")
    with tempfile.TemporaryDirectory() as scratch:
        out = config.out or Path(scratch) / "rerun"
        day = {"today": before.inputs.today} if before.inputs.today else {}
        again = _rebuilt(RECORDED[before.verb], before.config | day, out)
        prepared = verb.prepare(again)
        changed = changed_since(before, prepared.inputs)
        if changed:
            raise UserError(f"the run {before.id} can't be made again: {'; '.join(changed)}")
        with open_run(verb=before.verb, config=again, out=out, wandb=again.wandb) as writer:
            verb.execute(prepared, again, writer)
        return largest_difference(before, read_run(out))


def _rebuilt(cls: Any, config: Mapping[str, Any], out: Path) -> Any:
    """The verb's configuration from its record; a rerun isn't mirrored."""
    values = {**config, "out": str(out), "wandb": asdict(WandbSettings(mode="disabled"))}
    return checked(values, cls, "the run's configuration", "run it by hand with this version's options")
