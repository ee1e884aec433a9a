"""Weights that must not leave the machine: attacks, made to be measured and for nothing else."""

import json
from pathlib import Path

from mechlens.errors import UserError

LOCAL_ONLY = "local_only"
"""Entry of an adapter's `mechlens.json`; true for a fine-tuning attack and whatever else takes a refusal away."""

NOTICE = """# Not for release

The adapters in this folder take a refusal away. They were made by `mechlens finetune` to measure what such an attack
changes inside a model. Don't merge, package, upload or share them; make them again where they are needed.
"""


def keep_here(folder: Path) -> None:
    """Puts a notice in the folder, and keeps git from ever adding what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(NOTICE, encoding="utf-8")
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")


def is_local_only(adapter: Path) -> bool:
    """True if the adapter's record says that it must stay; False for an adapter without a record."""
    record = adapter / "mechlens.json"
    return record.exists() and bool(json.loads(record.read_text(encoding="utf-8")).get(LOCAL_ONLY, False))


def refuse_release(adapter: Path, how: str) -> None:
    """UserError if the adapter must stay on this machine; `how` says in a few words what was tried."""
    if is_local_only(adapter):
        raise UserError(
            f"the adapter in {str(adapter)!r} takes a refusal away and must not be {how}; use the folder where "
            "`mechlens finetune` made it, or make it again"
        )
