"""Whether a checkpoint's files are whole, by their headers alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mechlens.checked_json import read_json
from mechlens.errors import UserError
from mechlens.files import plain_name, require_regular
from mechlens.models.checkpoints.folders import other_format


@dataclass(frozen=True)
class Index:
    """What is read of `model.safetensors.index.json`."""

    weight_map: dict[str, str]


def optional_json(path: Path, shape: Any) -> Any:
    """A file of the Trainer's or the model's as what is read of it; None where there is none."""
    try:
        return read_json(path, shape, "save the checkpoint again")
    except FileNotFoundError:
        return None


def weights_problem(path: Path) -> str | None:
    """What is wrong with a weight file: its header is read, and its length must be what that says."""
    try:
        require_regular(path)
        with path.open("rb"), safe_open(path, framework="numpy") as file:
            return None if len(list(file.keys())) else f"{path.name} is empty"
    except FileNotFoundError:
        return other_format(path.parent) or f"it has no {path.name}, so it is half-written"
    except (OSError, SafetensorError):
        return f"its {path.name} is truncated or damaged"


def json_problem(path: Path) -> str | None:
    """What is wrong with a JSON file."""
    try:
        return None if optional_json(path, dict[str, Any]) is not None else f"its {path.name} can't be read"
    except UserError as error:
        return f"its {path.name} can't be read: {error}"


def model_problem(folder: Path) -> str | None:
    """What is wrong with a model's weights, in one file or several."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return weights_problem(folder / "model.safetensors")
    shards: Index = optional_json(index, Index)
    names = sorted(set(shards.weight_map.values()))
    if not names:
        return f"its {index.name} names no weights"
    require_inside(folder)
    problems = [weights_problem(folder / plain_name(name)) for name in names]
    return next((problem for problem in problems if problem), None)


def require_inside(folder: Path) -> None:
    """UserError where the index of weights in several files names one that isn't in the folder itself."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    parts = read_json(index, dict[str, Any], "take it from where it came from").get("weight_map")
    for name in parts.values() if isinstance(parts, dict) else ():
        if not isinstance(name, str) or set(name) & set("/\\"):
            raise UserError(
                f"{index} names the file {name!r:.80}, which is not in its folder; put all weights in the folder and "
                "name them as they are called there"
            )
