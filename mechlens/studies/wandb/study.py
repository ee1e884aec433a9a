"""`mechlens wandb`: what was logged offline goes to W&B, and a view of its project."""

import os
import shlex
from pathlib import Path

from mechlens.errors import UserError, warn
from mechlens.runs.results.result import list_runs
from mechlens.runs.wandb.start import has_login, remove_staged
from mechlens.runs.wandb.sync import is_synced, link_inputs, offline_logs, public_api, upload
from mechlens.runs.wandb.workspace import workspace_of
from mechlens.studies.registry import Screen
from mechlens.studies.wandb.config import SaveWorkspace, SyncRuns


def sync_runs(config: SyncRuns, screen: Screen) -> None:
    """Uploads, then links; a link that can't be made is a warning, since the numbers are there."""
    logs = offline_logs(config.folder)
    if not logs:
        screen.show(f"nothing below {config.folder} was logged offline and waits to be uploaded")
        return
    _require_login()
    upload([log for _, log in logs])
    done = [run for run, log in logs if is_synced(log)]
    for folder in {log.parents[1] for _, log in logs}:
        if all(is_synced(log) for log in folder.glob("wandb/offline-run-*")):
            remove_staged(folder)
    if not done:
        raise UserError("`wandb sync` uploaded nothing; what it said stands above")
    try:
        api = public_api()
        linked = sum(link_inputs(api, run) for run in done if run.wandb_project)
        screen.show(f"{len(done)} of {len(logs)} uploaded, with {linked} links to their inputs")
    except Exception as error:  # W&B raises anything
        warn(f"uploaded, but W&B's lineage could not be drawn ({error})")
    if len(done) < len(logs):
        raise UserError(
            f"{len(logs) - len(done)} of {len(logs)} were not uploaded; what `wandb sync` said stands above"
        )


def save_workspace(config: SaveWorkspace, screen: Screen) -> None:
    """Saves the view and says where it is."""
    runs = [run for _, run in list_runs(config.folder) if run.wandb_project]
    project = _one_project(config.folder, sorted({str(run.wandb_project) for run in runs}))
    entity, _, name = project.rpartition("/")
    synced = f", and upload the runs first: `mechlens wandb sync {shlex.quote(str(config.folder))}`"
    if not entity:
        _require_login(synced)
        entity = str(public_api().default_entity)
    view = workspace_of(runs, entity, name, config.name)
    _require_login(synced)
    view.save()
    screen.show(f"workspace: {view.url}")


def _one_project(folder: Path, projects: list[str]) -> str:
    if not projects:
        raise UserError(f"no run below {folder} is in W&B; make one without --wandb.mode disabled")
    if len(projects) > 1:
        raise UserError(f"the runs below {folder} are of the W&B projects {', '.join(projects)}; give a folder of one")
    return projects[0]


def _require_login(then: str = "") -> None:
    if not has_login(os.environ):
        raise UserError(f"there is no login to W&B; log in with `wandb login`, or set WANDB_API_KEY{then}")
