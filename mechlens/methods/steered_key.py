"""By what a finished batch under interventions is found again: everything that its values depend on."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mechlens.methods.collect import FORMAT
from mechlens.models.bridge import LanguageModel, device_of, dtype_of
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.forward import Row
from mechlens.models.intervene import Along, Change


class Fingerprints:
    """sha256 of tensors, each worked out once however many rows it acts in."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, str]] = {}

    def of(self, tensor: Tensor) -> str:
        """Of the values and their shape; the tensor is kept, so that no other can take its place in memory."""
        if id(tensor) not in self._known:
            plain = tensor.detach().cpu().contiguous()
            digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
            self._known[id(tensor)] = (tensor, digest.hexdigest())
        return self._known[id(tensor)][1]


def piece_key(
    model: LanguageModel,
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    changes: Sequence[Sequence[Change]],
    work: Sequence[object],
    prints: Fingerprints,
) -> str:
    """Fingerprint of a batch: weights, type, what is made of it, every token id and everything done to it."""
    record = [
        FORMAT, "steered", *checkpoint.identity, str(dtype_of(model)), device_of(model).type,
        list(work), [row.ids for row in rows], [[_done(change, prints) for change in row] for row in changes],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _done(change: Change, prints: Fingerprints) -> list[Any]:
    what = change.what
    if isinstance(what, Along):
        how: list[Any] = ["along", prints.of(what.unit), what.amount, what.erases]
    else:
        how = ["put", prints.of(what.values)]
    return [*how, change.sites, change.layers, change.tokens, change.generation, change.answer_tokens]
