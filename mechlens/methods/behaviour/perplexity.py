"""How surprising a model finds the user's words: the perplexity baseline (Alon & Kamfonas 2023 for suffix attacks)."""

import hashlib
import json
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mechlens.methods.activations.collect import refuse_too_long
from mechlens.methods.activations.reading import FORMAT
from mechlens.methods.cache import Cache
from mechlens.methods.progress import phase, progress_bar
from mechlens.models.bridge import LanguageModel, checkpoint_now, dtype_of, has_hooks, loaded, n_layers, unembed
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.prompts.batch import TokenBatch

CHUNK = 64
"""Tokens whose logits are held at once: a large vocabulary times a long prompt doesn't fit into memory."""
PIECE = 32
"""Prompts that a cache keeps together."""


@phase("perplexity")
def instruction_surprise(
    model: LanguageModel, batch: TokenBatch, cache: Cache | None = None
) -> Float64[Tensor, " prompt"]:
    """Mean of -log P(token | all before it) over each instruction's tokens, in nats: the log of its perplexity.

    The template's tokens before the words are context and don't count; where nothing comes before them, the first
    word has no probability and is left out (a prompt of that one token has surprise 0).
    """
    refuse_too_long(model, batch)
    keep = None if cache is None or has_hooks(model) else cache
    checkpoint = checkpoint_now(model)
    made_by = [FORMAT, "surprise", *checkpoint.identity, str(dtype_of(model))]
    rows = [_words(batch, i) for i in range(len(batch.prompts))]
    found = []
    bar = progress_bar(total=len(rows), title="perplexity", unit="prompt")
    for low in range(0, len(rows), PIECE):
        chunk = rows[low : low + PIECE]
        key = hashlib.sha256(json.dumps([*made_by, chunk]).encode()).hexdigest()
        piece = keep.get(key) if keep is not None else None
        if piece is None:
            piece = {"surprise": torch.stack([_surprise(model, *row) for row in chunk])}
            if keep is not None:
                keep.put(key, piece)
        found.append(piece["surprise"])
        bar.update(len(chunk))
    bar.close()
    return torch.cat(found)


def _words(batch: TokenBatch, i: int) -> tuple[list[int], int]:
    """Token ids of a prompt up to its last word, and where the words begin that can have a probability."""
    start, end = (batch.instruction[i] - batch.offset(i)).tolist()
    return batch.row(i)[: end + 1], max(start, 1)


def _surprise(model: LanguageModel, ids: list[int], start: int) -> Float64[Tensor, ""]:
    """Mean surprise of the tokens from `start` on."""
    if start >= len(ids):
        return torch.zeros((), dtype=torch.float64)
    row = Row(tuple(ids), tuple(range(start - 1, len(ids) - 1)))
    level = n_layers(model)
    if forward.fits_fast_path(model):
        residual = forward.fast_batch(model, [row], [level], None)[0, 0]
    else:
        residual = forward.reference_batch(model, [row], [level])[0, 0]
    own = torch.tensor(ids[start:])
    chunks = zip(torch.split(residual, CHUNK), torch.split(own, CHUNK), strict=True)
    told = [unembed(model, part).double().log_softmax(dim=-1).gather(1, after[:, None]) for part, after in chunks]
    return -torch.cat(told).mean()


def text_loss(model: LanguageModel, texts: Sequence[str]) -> Float[Tensor, " text"]:
    """Mean of -log P(token | all before it) over each text's tokens but the first (nats, float64)."""
    tokenizer, level = loaded(model).tokenizer, n_layers(model)
    losses = []
    for text in texts:
        ids = list(tokenizer(text)["input_ids"])
        row = Row(tuple(ids), tuple(range(len(ids) - 1)))
        run = forward.fast_batch if forward.fits_fast_path(model) else None
        residual = run(model, [row], [level], None) if run else forward.reference_batch(model, [row], [level])
        told = unembed(model, residual[0, 0]).double().log_softmax(dim=-1)
        losses.append(-told.gather(1, torch.tensor(ids[1:])[:, None]).mean())
    return torch.stack(losses)
