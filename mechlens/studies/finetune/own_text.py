"""Plain text that a model writes by itself, where a fine-tuned model should say what its base says."""

import hashlib
import json
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from mechlens.errors import UserError
from mechlens.methods.cache import Cache

BATCH = 64
SEPARATOR = "<|endoftext|>"


def own_text(
    hf_model: Any, tokenizer: Any, *, n: int, n_tokens: int, seed: int, fingerprint: str, cache: Cache | None = None
) -> Int[Tensor, "stretch token"]:
    """Token ids of `n` stretches of `n_tokens` tokens, sampled at temperature 1 from nothing but a start token.

    Drawing from the model itself needs no corpus and no corpus's licence, and its own distribution is just what a
    divergence from it is to be measured on. `fingerprint` is the model's, under which `cache` keeps them.
    """
    start = _start(tokenizer)
    record = [1, "own text", fingerprint, n, n_tokens, seed, start, str(hf_model.dtype), hf_model.device.type]
    key = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    kept = cache.get(key) if cache is not None else None
    if kept is not None:
        return kept["ids"]
    found = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for done in tqdm(range(0, n, BATCH), desc="writing plain text", unit="batch", delay=2, leave=False):
            found.append(_stretches(hf_model, start, min(BATCH, n - done), n_tokens))
    ids = torch.cat(found).cpu()
    if cache is not None:
        cache.put(key, {"ids": ids})
    return ids


def _start(tokenizer: Any) -> int:
    """What stood between documents in pretraining; chat tuning may have made its start token begin a turn instead."""
    vocabulary = tokenizer.get_vocab()
    for token in (SEPARATOR, tokenizer.bos_token, tokenizer.eos_token):
        if token in vocabulary:
            return int(vocabulary[token])
    raise UserError("the tokenizer has neither a start nor an end token, so no text can begin; set plain to 0")


def _stretches(hf_model: Any, start: int, n: int, n_tokens: int) -> Tensor:
    ids = torch.full((n, 1), start, device=hf_model.device)
    written: Tensor = hf_model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=n_tokens, min_new_tokens=n_tokens, pad_token_id=start,
    )  # fmt: skip
    return written[:, 1:]
