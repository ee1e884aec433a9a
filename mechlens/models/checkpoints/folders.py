"""What a checkpoint's folder holds: in what form, whether it is whole (by headers alone), adapters, a tokenizer."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mechlens.checked_json import read_json
from mechlens.errors import UserError, quoted
from mechlens.files import plain_name, read_whole, require_regular

CONFIG = "adapter_config.json"
"""What makes a folder an adapter of peft's."""
TEMPLATE = "chat_template.jinja"

CHECKPOINT = re.compile(r"checkpoint-\d+")
"""How the Trainer calls a step's folder."""


def other_format(folder: Path) -> str | None:
    """Says in what form a folder without safetensors has its weights, and what to do; None where there are none."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if re.match(r"pytorch_model_fsdp", name):
            return (
                f"its weights are FSDP's ({name}), which mechlens doesn't read; join them with "
                "`accelerate merge-weights`, or train with SHARDED_STATE_DICT off"
            )
    for name in names:
        if re.fullmatch(r"global_step\d+|zero_to_fp32\.py|\w*_?zero_pp_rank_.*", name):
            return (
                f"its weights are DeepSpeed's ({name}), which mechlens doesn't read; make safetensors of them with the "
                "folder's own `zero_to_fp32.py --safe_serialization`"
            )
    for name in names:
        if re.fullmatch(r"(pytorch_model|adapter_model)[\w.-]*\.(bin|bin\.index\.json|pt|pth)", name):
            return (
                f"its weights are pickled ({name}), which mechlens doesn't open; load them with transformers or peft "
                "and save_pretrained them as safetensors"
            )
    return None


def adapters_inside(folder: Path) -> Iterator[Path]:
    """Adapters in a folder's own folders: peft puts each into one that bears its name, unless it is "default"."""
    if folder.is_dir():
        yield from sorted(child for child in folder.iterdir() if (child / CONFIG).is_file())


def own_tokenizer(checkpoint: Path, base: Any, load: Callable[[str], Any]) -> Any:
    """A checkpoint's own tokenizer, from its folder or the Trainer's around it; None where nothing of it is there.

    A folder may hold the chat template alone: it is put on the tokenizer around it, else on the base's.
    """
    around = [checkpoint.parent] if CHECKPOINT.fullmatch(checkpoint.parent.name) else []
    found = template = None
    for folder in (checkpoint, *around):
        if (folder / "tokenizer_config.json").is_file():
            found = load(str(folder))
            break
        if template is None and (folder / TEMPLATE).is_file():
            template = _read(folder / TEMPLATE)
    if template is not None:
        found = copy.deepcopy(found or base)
        found.chat_template = template
    return found


def _read(path: Path) -> str:
    try:
        return read_whole(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the chat template {path} is no UTF-8 text; save the tokenizer again") from error


def read_as_trained(base: Any, own: Any, adapter: str) -> Any:
    """The base's tokenizer with the adapter's own chat template; the adapter's tokenizer where it has more tokens.

    UserError where a token of the base has another id in the adapter's.
    """
    before, after = base.get_vocab(), own.get_vocab()
    moved = next((token for token, number in before.items() if after.get(token) != number), None)
    if moved is not None:
        raise UserError(
            f"the adapter {adapter!r} was saved with a tokenizer in which {moved!r} has another number than in the "
            "base's, so it belongs to another base; give that one"
        )
    found = copy.deepcopy(base if len(before) == len(after) else own)
    found.chat_template = own.chat_template or base.chat_template
    return found


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
                f"{index} names the file {quoted(name, 80)}, which is not in its folder; put all weights in the folder "
                "and name them as they are called there"
            )
