"""The tokenizer and chat template that were saved with a checkpoint: what it was trained to read.

One rule for a checkpoint alone and for a series: its own template counts. A series is read under one template, so
its checkpoints must agree on it.
"""

import copy
from pathlib import Path
from typing import Any

from mechlens.errors import UserError
from mechlens.models.formats import CHECKPOINT


def tokenizer_folder(checkpoint: Path) -> Path | None:
    """The folder with a checkpoint's own tokenizer: its own, or the Trainer's around it; None where there is none."""
    around = [checkpoint.parent] if CHECKPOINT.fullmatch(checkpoint.parent.name) else []
    return next((folder for folder in (checkpoint, *around) if (folder / "tokenizer_config.json").is_file()), None)


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
