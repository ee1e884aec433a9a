"""`mechlens checkpoints`: what a series consists of."""

from typing import Any

from mechlens.models.checkpoints.series import checkpoint_series
from mechlens.studies.checkpoints.config import Checkpoints


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
