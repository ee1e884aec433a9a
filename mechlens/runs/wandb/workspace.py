"""A view of a W&B project that shows runs of mechlens as their reports do: extra [workspaces]."""

from collections.abc import Sequence
from typing import Any

from mechlens.errors import UserError
from mechlens.runs.run import Run
from mechlens.runs.wandb.mirror import BY_STEP, MAIN, N_MAIN

MOST_NUMBERS, MOST_TABLES = 8, 6
"""Of each study; W&B loads every panel."""


def workspace_of(runs: Sequence[Run], entity: str, project: str, name: str) -> Any:
    """A `wandb_workspaces` workspace, not yet saved: a section a study, and the sentence beside each run's name."""
    ws, panels = _library()
    verbs = list(dict.fromkeys(run.verb for run in runs))
    sections = [_section(ws, panels, verb, [run for run in runs if run.verb == verb]) for verb in verbs]
    shown = ["summary:sentence", "summary:status", "config:model.value"]
    settings = ws.RunsetSettings(pinned_columns=["run:displayName", *shown])
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, runset_settings=settings)


def _section(ws: Any, panels: Any, verb: str, runs: Sequence[Run]) -> Any:
    figures = dict.fromkeys(f"{MAIN}/{name}" for run in runs for name in list(run.figures)[:N_MAIN])
    numbers = dict.fromkeys(name for run in runs for name in run.deciding)
    tables = dict.fromkeys(name for run in runs for name in run.tables)
    sliding = [f"{BY_STEP}/{name}" for name in tables] if verb in OVER_STEPS else []
    shown = [
        *(panels.MediaBrowser(title=key.partition("/")[2], media_keys=[key], num_columns=1) for key in figures),
        *(panels.BarPlot(title=name, metrics=[panels.SummaryMetric(name)]) for name in list(numbers)[:MOST_NUMBERS]),
        *(panels.WeavePanelSummaryTable(table_name=f"tables/{name}") for name in list(tables)[:MOST_TABLES]),
        *(panels.MediaBrowser(title=key, media_keys=[key], mode="gallery", gallery_axis="step") for key in sliding),
    ]
    return ws.Section(name=verb.replace("_", " "), panels=shown, is_open=True)


OVER_STEPS = ("track", "compare")
"""Studies whose tables go over checkpoints."""


def _library() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError(
            "saving a workspace needs wandb-workspaces; install it with the extra: "
            "pip install 'mechlens-toolkit[workspaces]'"
        ) from error
    return ws, panels
