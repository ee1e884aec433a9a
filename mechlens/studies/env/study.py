"""`mechlens env`: what a bug report needs. It reads no network, and names no folder of the user's."""

import os
import platform
from typing import Any

import torch

from mechlens.choices import ALL
from mechlens.errors import EXTRAS, has_extra
from mechlens.models.packaged import ADAPTERS, PACKAGED, cache_dir
from mechlens.runs.environment import PACKAGES, git_state, package_versions
from mechlens.runs.wandb.start import has_login
from mechlens.studies.env.config import Env
from mechlens.studies.registry import COMMANDS, Screen


def environment() -> dict[str, Any]:
    """Versions, devices, cached models, extras, and other packages' additions."""
    state = git_state()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict.fromkeys(PACKAGES) | package_versions(),
        "commit": None if state is None else state.commit + (" (changed)" if state.dirty else ""),
        "cores": os.cpu_count(),
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]
        + (["mps"] if torch.backends.mps.is_available() else []),
        "threads": torch.get_num_threads(),
        "models in the cache": sorted(name for name in PACKAGED if (cache_dir() / "models" / name).is_dir()),
        "packaged adapters": sorted(ADAPTERS),
        "extras": {name: has_extra(name) for name in EXTRAS},
        "W&B login": has_login(os.environ),
        "from other packages": [
            f"{registry.kind} {name} ({module})"
            for registry in (COMMANDS, *ALL)
            for name, module in registry.added().items()
        ],
    }


def execute(config: Env, screen: Screen) -> None:
    """One line each, or one JSON object."""
    found = environment()
    if config.json:
        screen.show(found)
        return
    lines = []
    for name, value in found.items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {_word(inner)}" for key, inner in value.items())
        elif isinstance(value, list):
            shown = ", ".join(value) or "none"
        lines.append(f"{name:28s} {_word(shown)}")
    screen.show("\n".join(lines))


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
