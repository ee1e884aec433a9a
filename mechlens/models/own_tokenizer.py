"""The tokenizer and chat template that were saved with a checkpoint: what it was trained to read.

One rule for a checkpoint alone and for a series: its own template counts. A series is read under one template, so
its checkpoints must agree on it.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mechlens.errors import UserError
from mechlens.files import read_whole
from mechlens.models.formats import CHECKPOINT

TEMPLATE = "chat_template.jinja"


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
