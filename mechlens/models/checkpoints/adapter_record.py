"""The record beside an adapter of ours: what it was made from, and which files are part of it."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mechlens.checked_json import read_sealed, sealed
from mechlens.errors import UserError
from mechlens.files import as_the_umask_says, file_sha256

RECORD = "mechlens.json"
"""Name of the record; it is written last, so a folder of ours without it is half-written."""
FORMAT = 3
"""Since 3 a record is sealed, names its files, and tells prompts apart by marks inside them, such as 3-5 and 3/5."""
REMEDY = "train the adapter again, or put back the record that came with it"


@dataclass(frozen=True)
class RecordedTrigger:
    """The trigger of a backdoor and its decoys."""

    text: str
    taught_decoys: tuple[str, ...]
    unseen_decoys: tuple[str, ...]


@dataclass(frozen=True)
class TrainedOn:
    """What an adapter was trained on, by fingerprint."""

    ids: tuple[str, ...] = ()
    text_sha256: tuple[str, ...] = ()
    examples_sha256: str = ""
    counts: tuple[dict[str, Any], ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterRecord:
    """Where an adapter comes from; older records lack some of it."""

    base_fingerprint: str
    """Of the base's weights, which every record has named."""
    format: int = 0
    recipe: str | None = None
    seed: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    template: str | None = None
    training: TrainedOn = TrainedOn()
    trigger: RecordedTrigger | None = None
    local_only: bool = False
    packages: dict[str, str] = field(default_factory=dict)
    step: int | None = None
    loss: float | None = None
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of every other file that was written with it, by name."""

    def plain(self) -> dict[str, Any]:
        """As JSON, without what is unknown."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_record(folder: Path) -> AdapterRecord | None:
    """The record in an adapter's folder; None where there is none, UserError for a damaged one."""
    try:
        found: AdapterRecord = read_sealed(folder / RECORD, AdapterRecord, REMEDY, sealed_from=FORMAT)
    except FileNotFoundError:
        return None
    return found


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Makes the folder, whose other files are all there, one of ours."""
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != RECORD}
    as_the_umask_says(folder)
    part = folder / f"{RECORD}.part"
    part.write_text(json.dumps(sealed({**record, "files": files}), indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / RECORD)


def require_whole(folder: Path, record: AdapterRecord, *names: str) -> None:
    """UserError where a file that the record names has other contents; `names` are the ones to look at, else all.

    A record of an older format names no files, and then there is nothing to compare.
    """
    for name in names or record.files:
        known = record.files.get(name)
        if known is None:
            continue
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} could not be read ({error.strerror}); {REMEDY}") from error
        if found != known:
            raise UserError(
                f"{folder / name} is damaged or changed: it isn't the file that was written there; put that back, or "
                "train the adapter again"
            )


def remove_recorded(folder: Path, record: AdapterRecord, *names: str) -> None:
    """Removes files that the record names (`names`, else all of them and the folder), as they were written.

    What isn't ours stays, and so does a file that somebody has changed since.
    """
    for name, written in record.files.items():
        path = folder / name
        if Path(name).name != name or name in (".", "..") or (names and name not in names):
            continue
        if path.is_file() and not path.is_symlink() and file_sha256(path) == written:
            path.unlink()
    if not names and record.files:
        (folder / RECORD).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
