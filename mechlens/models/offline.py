"""Weights that must not leave the machine: attacks, made to be measured and for nothing else."""

import contextlib
import socket
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from mechlens import hub
from mechlens.errors import UserError
from mechlens.files import disk_error
from mechlens.models.checkpoints.adapter_record import read_record

_SEALED: ContextVar[bool] = ContextVar("sealed", default=False)


@contextlib.contextmanager
def sealed() -> Iterator[None]:
    """Inside, connecting to another machine and starting an installer raise PermissionError.

    TransformerLens runs `pip install` for some multimodal models, and looks on the hub for what belongs to them.
    """
    from huggingface_hub import constants

    before, offline = _SEALED.set(True), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True  # else each look at the hub is tried five times, with waits between
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        _SEALED.reset(before)


def at_home(source: str) -> contextlib.AbstractContextManager[None]:
    """Keeps the network shut while a local folder is read; a hub id may be fetched, if the hub can be reached."""
    return sealed() if Path(source).is_dir() else hub.asked()


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if event not in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen") or not _SEALED.get():
        return
    if event == "subprocess.Popen":
        command = args[1] if isinstance(args[1], list | tuple) else str(args[1]).split()
        if "install" not in [str(word) for word in command]:
            return  # a compiler, say, for a kernel
    elif event == "socket.connect" and args[0].family not in (socket.AF_INET, socket.AF_INET6):
        return
    raise PermissionError(f"loading a model installs and fetches nothing ({event})")


sys.addaudithook(_refuse)  # for good: Python has no way to take one off


LOCAL_ONLY = "local_only"
"""Entry of an adapter's `mechlens.json`; true for a fine-tuning attack and whatever else takes a refusal away."""

NOTICE = """# Not for release

The adapters in this folder take a refusal away. They were made by `mechlens finetune` to measure what such an attack
changes inside a model. Don't merge, package, upload or share them; make them again where they are needed.
"""


KEPT_HERE = {"README.md": NOTICE, ".gitignore": "*\n"}
"""What an attack's folder holds beside the adapters, by name."""


def keep_here(folder: Path) -> None:
    """Puts a notice in the folder, and keeps git from ever adding what is in it; nobody else's file is replaced."""
    refuse_others_notice(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in KEPT_HERE.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk_error(error, folder) from error


def refuse_others_notice(folder: Path) -> None:
    """UserError where the folder has a README.md or .gitignore that `keep_here` didn't write."""
    for name, text in KEPT_HERE.items():
        path = folder / name
        # A notice that was cut off by a full disk is ours still.
        if path.is_symlink() or (path.exists() and not (path.is_file() and text.startswith(_start(path, text)))):
            raise UserError(f"{path} isn't of this run, and an attack puts its own there; give another folder")


def _start(path: Path, text: str) -> str:
    """The file as far as it may be the text; one character more where it is longer."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return file.read(len(text) + 1)
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); give another folder") from error


def is_local_only(adapter: Path) -> bool:
    """True if the adapter's record says that it must stay; False for an adapter without a record."""
    record = read_record(adapter)
    return record is not None and record.local_only


def refuse_release(adapter: Path, how: str) -> None:
    """UserError if the adapter must stay on this machine; `how` says in a few words what was tried."""
    if is_local_only(adapter):
        raise UserError(
            f"the adapter in {str(adapter)!r} takes a refusal away and must not be {how}; use the folder where "
            "`mechlens finetune` made it, or make it again"
        )
