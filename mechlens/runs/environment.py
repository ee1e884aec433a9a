"""What a run ran on: mechlens' own commit and the versions of the libraries that decide numbers."""

import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "mechlens-toolkit",
    "torch",
    "transformers",
    "transformer-lens",
    "numpy",
    "wandb",
    "peft",
    "datasets",
    "bitsandbytes",
    "torchao",
)


@dataclass(frozen=True)
class GitState:
    """The commit of mechlens' own checkout."""

    commit: str
    dirty: bool
    """True if the package's files differ from the commit."""


def git_state() -> GitState | None:
    """The checkout that mechlens runs from, or None where it was installed without one."""
    package = Path(__file__).resolve().parent.parent
    # Without this test an installed mechlens would report the commit of whatever repository its
    # environment happens to lie in.
    if not (package.parent / ".git").exists():
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ".")
    return None if commit is None or changes is None else GitState(commit=commit, dirty=bool(changes))


def package_versions() -> dict[str, str]:
    """Installed versions by distribution name; a package that is not installed is left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        # No git, or not a repository we may read: the record then says so by None.
        return None
    return done.stdout.strip()
