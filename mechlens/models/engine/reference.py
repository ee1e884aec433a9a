"""Greedy answers where packed batches don't fit: rows of one length, in the fastest way that loses nothing."""

import contextlib
import weakref
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from mechlens.models.bridge import LanguageModel, device_of, dtype_of, has_hooks, is_bridge, loaded, regime
from mechlens.models.engine.forward import Row
from mechlens.models.engine.generate import Decided, Pick, Rest, stop_tokens
from mechlens.models.engine.intervene.token_mask import TokenMask
from mechlens.models.engine.probes import decode_gap, loses, require_finite_logits, tolerance
from mechlens.models.native import native

PLAIN, NATIVE, UNCACHED = "plain", "native", "uncached"
"""Ways of decoding that fit more models than packed batches do; see `reference_engine`."""
_NATIVE_GAPS: "weakref.WeakKeyDictionary[nn.Module, float]" = weakref.WeakKeyDictionary()
MORE_THAN_ROUNDING = 4
"""Times the plain modules' own gap between cached and whole passes, which on the bridged ones tells of a loss."""


def reference_engine(model: LanguageModel) -> str:
    """How `reference_greedy` decodes: by the library's generation on the modules that hooks act on (PLAIN) where its
    cache loses nothing there, else on the plain modules (NATIVE), or without a cache (UNCACHED): always right."""
    if not is_bridge(model) or loaded(model).decode_gap <= tolerance(torch.float32):
        return PLAIN
    if model not in _NATIVE_GAPS:
        with native(model) as hf_model:
            _NATIVE_GAPS[model] = decode_gap(hf_model)
    bridged, plain = loaded(model).decode_gap, _NATIVE_GAPS[model]
    # What half precision rounds, it rounds in both; what TransformerLens' modules lose, the plain ones keep.
    if not loses(bridged, dtype_of(model)) and bridged <= MORE_THAN_ROUNDING * max(plain, tolerance(torch.float32)):
        return PLAIN
    if has_hooks(model) or regime(model) == "processed":
        return UNCACHED
    return UNCACHED if loses(plain, dtype_of(model)) else NATIVE


@torch.inference_mode()
def reference_greedy(
    model: LanguageModel, rows: list[Row], max_new_tokens: int, pick: Pick | None = None
) -> list[list[int]]:
    """The continuation of rows of one length, in the way that `reference_engine` names: greedy, or by `pick`."""
    engine = reference_engine(model)
    if engine == UNCACHED or (pick is not None and not is_bridge(model)):  # whose generation takes nobody's choice
        return recomputed_greedy(model, rows, max_new_tokens, None, None, pick)
    tokens = torch.tensor([row.ids for row in rows], device=device_of(model))
    stop = stop_tokens(model)
    if not is_bridge(model):
        out = model.generate(
            tokens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            prepend_bos=False,
        )
        require_finite_logits(whole_logits(model, out))
    else:
        with native(model) if engine == NATIVE else contextlib.nullcontext(model.original_model) as hf_model:
            out = _generated(hf_model, tokens, stop, max_new_tokens, pick)
    return [_until(row, stop) for row in out[:, tokens.shape[1] :].tolist()]


def _generated(hf_model: Any, tokens: Tensor, stop: set[int], max_new_tokens: int, pick: Pick | None) -> Tensor:
    """Prompt and answer by Hugging Face's own generation."""

    def finite(ids: Tensor, logits: Tensor) -> Tensor:
        require_finite_logits(logits, hf_model.dtype)  # generation has made them float32
        if pick is None:
            return logits
        token = pick(logits, range(len(logits)), ids.shape[1] - tokens.shape[1])
        return torch.full_like(logits, -torch.inf).scatter(1, token.unsqueeze(1), 0.0)

    own = hf_model.generation_config
    try:
        # A model's own settings may hold a repetition penalty, which greedy answers leave out.
        hf_model.generation_config = GenerationConfig(eos_token_id=sorted(stop) or None, pad_token_id=0)
        out: Tensor = hf_model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([finite]),
        )
    finally:
        hf_model.generation_config = own
    return out


@torch.inference_mode()
def recomputed_greedy(
    model: LanguageModel,
    rows: list[Row],
    max_new_tokens: int,
    token_mask: TokenMask | None,
    decided: Decided | None,
    pick: Pick | None = None,
) -> list[list[int]]:
    """The same for rows of one length by running everything again at each step, without keys and values.

    The library's own generation doesn't say which tokens it runs, and interventions have to know.
    """
    tokens = torch.tensor([row.ids for row in rows], device=device_of(model))
    rest = Rest(frozenset(stop_tokens(model)), max_new_tokens, token_mask, decided, pick)
    answers: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    for step in range(max_new_tokens):
        rest.advance(alive, [0] * len(alive), step)
        logits = whole_logits(model, tokens)
        token = (logits.argmax(dim=-1) if pick is None else pick(logits, alive, step)).to(tokens.device)
        going = rest.written(token.tolist(), alive, [True] * len(alive), answers)
        keep = [i for i, on in enumerate(going) if on]
        index = torch.tensor(keep, dtype=torch.long, device=tokens.device)
        alive, tokens = [alive[i] for i in keep], torch.cat([tokens, token.unsqueeze(1)], dim=1)[index]
        if not alive:
            break
    return answers


@torch.inference_mode()
def whole_logits(model: LanguageModel, tokens: Int[Tensor, "row seq"]) -> Float[Tensor, "row vocab"]:
    """Logits at the last token of rows of one length, by a plain forward pass through the model's hook points."""
    if is_bridge(model):
        logits: Tensor = model.original_model(tokens, use_cache=False).logits
    else:
        logits = model(tokens, prepend_bos=False)
    require_finite_logits(logits[:, -1])
    return logits[:, -1]


def _until(tokens: list[int], stop: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]
