"""What a source of checkpoints points at, and at which step each of them was saved."""

import re
from dataclasses import dataclass
from pathlib import Path

from mechlens import hub
from mechlens.choices import MODELS
from mechlens.errors import UserError
from mechlens.files import nearest_folder, short_name, user_path
from mechlens.models.checkpoints.adapter_record import read_record
from mechlens.models.checkpoints.folders import CHECKPOINT, CONFIG, adapters_inside, optional_json, other_format


@dataclass(frozen=True)
class Found:
    """One checkpoint that was pointed at, not yet looked into."""

    name: str
    path: str
    revision: str | None = None
    home: Path | None = None
    """The Trainer's folder around an adapter with a name of its own; step and tokenizer may lie there."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where its files may be: its own folder, then the one around it."""
        return tuple(folder for folder in (self.folder, self.home) if folder is not None)

    @property
    def folder(self) -> Path | None:
        path = user_path(self.path)
        return path if path.is_dir() else None


def sources(source: str) -> list[Found]:
    """The checkpoints that a source holds; UserError where it holds none."""
    path = user_path(source)
    if not path.exists():
        name, at, revision = source.rpartition("@")
        if at:
            return [Found(f"{short_name(name)}@{revision}", name, revision)]
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise UserError(f"there is no folder {source!r}{_perhaps(source)}; check the path")
        if source not in MODELS.names() and hub.has_no_owner(source):
            raise UserError(f"there is no folder {source!r} here (in {Path.cwd()}){_perhaps(source)}; check the path")
        return [Found(short_name(source), source)]
    if not path.is_dir():
        raise UserError(f"{source!r} is a file; give a checkpoint's folder")
    if CHECKPOINT.fullmatch(path.name) and not _holds_model(path):
        return [_checkpoint(path)]
    inside = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    trained = [child for child in inside if CHECKPOINT.fullmatch(child.name)]
    if not trained and not _holds_model(path):
        if found := other_format(path):
            raise UserError(f"{source!r} can't be used: {found}")
        trained = [child for child in inside if _holds_model(child) or re.search(r"\d$", child.name)]
    if not trained and not _holds_model(path):
        raise UserError(f"{source!r} holds neither checkpoints nor adapters nor a model; check the path")
    return [_checkpoint(child) for child in trained or [path]]


def _perhaps(source: str) -> str:
    near = nearest_folder(source)
    return f" ({near})" if near else ""


def passed_over(source: str) -> list[Path]:
    """Folders beside a Trainer's checkpoints whose names say that they are more of them, but not of which step."""
    path = user_path(source)
    inside = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    if not any(CHECKPOINT.fullmatch(child.name) for child in inside):
        return []
    return [child for child in inside if "checkpoint" in child.name and not CHECKPOINT.fullmatch(child.name)]


def _checkpoint(folder: Path) -> Found:
    """One checkpoint's folder, or the one adapter with a name of its own in it."""
    if (folder / CONFIG).exists() and CHECKPOINT.fullmatch(folder.parent.name):
        return Found(f"{folder.parent.name}/{folder.name}", str(folder), home=folder.parent)
    named = list(adapters_inside(folder))
    if _holds_model(folder) or len(named) != 1:
        return Found(folder.name, str(folder))
    return Found(folder.name, str(named[0]), home=folder)


def _holds_model(folder: Path) -> bool:
    return (folder / CONFIG).exists() or (folder / "config.json").exists()


@dataclass(frozen=True)
class _TrainerState:
    """What is read of `trainer_state.json`."""

    global_step: int | None = None


def told_step(one: Found) -> tuple[int | None, str]:
    """The step, and why it can't be told where a record is damaged."""
    try:
        return _step(one), ""
    except UserError as error:
        return None, str(error)


def _step(one: Found) -> int | None:
    """From mechlens' or the Trainer's record, else the number that ends the name or revision."""
    records = [record.step for folder in one.folders if (record := read_record(folder)) is not None]
    states: list[_TrainerState | None] = [
        optional_json(folder / "trainer_state.json", _TrainerState) for folder in one.folders
    ]
    for step in (*records, *(state.global_step for state in states if state is not None)):
        if step is not None:
            return step
    number = re.search(r"(\d{1,18})$", one.revision or (one.home.name if one.home else one.name))
    return int(number[1]) if number else None
