"""`mechlens checkpoints`: what a series consists of."""

from typing import Any

from rich.table import Table
from rich.text import Text

from mechlens.models.checkpoints.series import checkpoint_series
from mechlens.studies.checkpoints.config import Checkpoints
from mechlens.studies.registry import Screen


def series_rows(config: Checkpoints) -> dict[str, Any]:
    """Base, kind, where the steps come from, members by step, and what can't be used with the reasons.

    UserError where nothing of it can be used.
    """
    series = checkpoint_series(config.base, config.paths, revision=config.revision, skip_broken=True)
    return {
        "base": config.base,
        "kind": series.kind,
        "steps_from": series.steps_from,
        "members": [
            {"step": member.step, "name": member.name, "kind": member.kind, "path": member.path,
             "revision": member.revision}
            for member in series.members
        ],
        "left_out": [{"name": one.name, "reason": one.reason} for one in series.left_out],
    }  # fmt: skip


def execute(config: Checkpoints, screen: Screen) -> None:
    """The series as a table, or as one JSON object."""
    found = series_rows(config)
    if config.json:
        screen.show(found)
        return
    table = Table("step", "name", "kind", "where", title=f"steps from {found['steps_from']}")
    for member in found["members"]:
        revision = f"@{member['revision']}" if member["revision"] else ""
        cells = (member["name"], member["kind"], f"{member['path']}{revision}")
        table.add_row(str(member["step"]), *(Text(cell) for cell in cells))  # a name may look like rich's markup
    screen.show(table)
    for left in found["left_out"]:
        screen.show(Text(f"left out: {left['name']}: {left['reason']}"))
