"""Uploading what was logged offline, and the lineage that W&B can't draw before."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mechlens.errors import UserError
from mechlens.runs.results.result import list_runs
from mechlens.runs.run import Run
from mechlens.runs.wandb.mirror import artefact_alias, artefact_name, stub_name


def offline_logs(root: Path) -> list[tuple[Run, Path]]:
    """W&B's logs in run folders below `root` that aren't uploaded yet, the oldest first; each with its run."""
    found = [(run, log) for folder, run in list_runs(root) for log in logs_in(folder)]
    return sorted(((run, log) for run, log in found if not is_synced(log)), key=lambda one: one[1].name)


def logs_in(folder: Path) -> list[Path]:
    """W&B's offline logs of one run, each a folder."""
    return sorted(log for log in folder.glob("wandb/offline-run-*") if log.is_dir())


def is_synced(log: Path) -> bool:
    """Whether `wandb sync` has marked it so."""
    return any(log.glob("*.wandb.synced"))


def upload(logs: Sequence[Path]) -> None:
    """`wandb sync` on them; UserError where it fails, which itself says why."""
    done = subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, logs)], check=False)
    if done.returncode:
        raise UserError(f"`wandb sync` failed with status {done.returncode}; what it said stands above")


def inputs_of(run: Run) -> dict[str, str]:
    """sha256 of all that went into a run, and into what it made, by name."""
    named = run.inputs.named
    for artefact in run.artefacts.values():
        named |= artefact.inputs
    return {name: sha for name, sha in named.items() if sha}


def public_api() -> Any:
    """W&B's API for what is uploaded; needs a login."""
    import wandb

    return wandb.Api()


def link_inputs(api: Any, run: Run) -> int:
    """Links an uploaded run to its inputs in W&B's lineage: to what made them, else to their stubs. How many it linked.

    `api` is a `wandb.Api`.
    """
    uploaded = api.run(f"{run.wandb_project}/{run.wandb_id}")
    linked = 0
    for name, sha in inputs_of(run).items():
        found = next(_found(api, run, name, sha), None)
        if found is not None:
            uploaded.use_artifact(found)
            linked += 1
    return linked


def _found(api: Any, run: Run, name: str, sha: str) -> Iterator[Any]:
    import wandb

    for candidate in (artefact_name(name), stub_name(name)):
        try:
            yield api.artifact(f"{run.wandb_project}/{candidate}:{artefact_alias(sha)}")
        except (wandb.errors.CommError, ValueError):
            continue
