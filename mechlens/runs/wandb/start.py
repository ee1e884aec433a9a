"""A quiet W&B run whose files lie in the run folder, or None where W&B is off or fails."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mechlens.errors import warn
from mechlens.runs.privacy import config_without_text
from mechlens.runs.run import Run, plain
from mechlens.settings import WandbSettings

Mode = Literal["online", "offline", "disabled"]

# What WANDB_MODE may say, older words included.
SPOKEN: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


def choose_mode(settings: WandbSettings, environ: Mapping[str, str]) -> Mode:
    """The settings' mode, else WANDB_MODE's, else online with a login and offline without one."""
    if settings.mode is not None:
        return settings.mode
    if environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return "disabled"
    spoken = environ.get("WANDB_MODE", "").lower()
    if spoken:
        # A word that W&B does not know is no reason to upload.
        return SPOKEN.get(spoken, "offline")
    return "online" if has_login(environ) else "offline"


def has_login(environ: Mapping[str, str]) -> bool:
    """True if W&B would find a key for its server: in the environment, netrc or its settings files.

    Where it would not, `wandb.init` asks for one at a terminal, so this comes before going online.
    """
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    # Its own look-up, since which server a netrc entry may stand for changes from version to version.
    with contextlib.redirect_stderr(io.StringIO()):
        if hasattr(wandb, "api"):
            return bool(wandb.api.api_key)
        # What newer versions have instead.
        return bool(wandb.login(prompt=False, verify=False))


@dataclass(frozen=True)
class WandbRun:
    """A started W&B run."""

    run: Any
    online: bool


def start_wandb(settings: WandbSettings, folder: Path, run: Run) -> WandbRun | None:
    """W&B's run for `run`; a failure is a warning, and going online falls back to the offline log."""
    try:
        mode = choose_mode(settings, os.environ)
        if mode == "disabled":
            return None
        if mode == "online" and not has_login(os.environ):
            warn_wandb(LookupError("no login, see `wandb login`"), "logging offline instead")
        elif mode == "online":
            try:
                return WandbRun(_init(settings, folder, run, "online"), online=True)
            except Exception as error:
                warn_wandb(error, "logging offline instead; `mechlens wandb sync` uploads it later")
        return WandbRun(_init(settings, folder, run, "offline"), online=False)
    except Exception as error:
        # W&B raises anything, from TypeError to its own; none of it may end a run.
        warn_wandb(error, "the run goes on, recorded on disk only")
        return None


def warn_wandb(error: Exception, outcome: str) -> None:
    """One warning about W&B: what failed and what happens now."""
    said = " ".join(str(error).split())[:300]
    warn(f"W&B failed ({type(error).__name__}: {said}); {outcome}", RuntimeWarning)


@contextlib.contextmanager
def wandb_files_in(folder: Path) -> Iterator[None]:
    """While it lasts, W&B stages files in the run folder and not in the home folder, where they stay."""
    before = os.environ.get("WANDB_DATA_DIR")
    if before is not None:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder / "wandb" / "data")
    try:
        yield
    finally:
        os.environ.pop("WANDB_DATA_DIR", None)


def remove_staged(folder: Path) -> None:
    """Takes away what W&B staged in the run folder, once it is uploaded; until then an offline log points there."""
    shutil.rmtree(folder / "wandb" / "data", ignore_errors=True)


def _init(settings: WandbSettings, folder: Path, run: Run, mode: Mode) -> Any:
    import wandb

    # W&B falls back to a temporary folder where this one is missing.
    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    config = run.resolved if settings.upload_text else config_without_text(run.resolved)
    record = {"id": run.id, "seed": run.seed, "git": plain(run.git), "packages": run.packages}
    # "Loaded credentials" is printed whatever the settings say.
    with wandb_files_in(folder), contextlib.redirect_stderr(io.StringIO()):
        return wandb.init(
            project=_project(settings),
            entity=settings.entity,
            group=_group(settings, folder),
            tags=list(settings.tags),
            name=settings.name or f"{run.verb} {folder.resolve().name}",
            job_type=run.verb,
            id=run.wandb_id,
            # Offline there is nothing to resume from; the log keeps the id.
            resume="allow" if run.wandb_id and mode == "online" else None,
            mode=mode,
            dir=str(folder),
            config={**config, "mechlens": record},
            # A notebook's own W&B run stays as it is.
            reinit="create_new",
            settings=_quiet(wandb, settings.upload_text),
        )


def _project(settings: WandbSettings) -> str:
    untouched = settings.project == WandbSettings().project
    return os.environ.get("WANDB_PROJECT", settings.project) if untouched else settings.project


def _group(settings: WandbSettings, folder: Path) -> str | None:
    """Runs whose folders lie in one folder belong together: the commands of a study, the points of a sweep."""
    return settings.group or os.environ.get("WANDB_RUN_GROUP") or folder.resolve().parent.name or None


def _quiet(wandb: Any, upload_text: bool) -> Any:
    return wandb.Settings(
        silent=True,
        console="off",
        # The user's code, notebook and uncommitted changes are not ours to upload.
        disable_code=True,
        save_code=False,
        disable_git=True,
        # W&B's metadata holds the command line, and `--text "..."` is a prompt.
        x_disable_meta=not upload_text,
        init_timeout=30,
        # A network that dies at the end must not hold the run for ever.
        finish_timeout=600,
    )
