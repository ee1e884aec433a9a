"""Greedy answers in batches: the shared start once, rows packed, finished rows leave."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from mechlens.models.bridge import LanguageModel, device_of, loaded, n_layers
from mechlens.models.engine.caches import roomy, with_cache
from mechlens.models.engine.forward import Row
from mechlens.models.engine.intervene import TokenMask
from mechlens.models.engine.packed.packing import pack_prompts, packed_pass, packs
from mechlens.models.engine.probes import not_finite, require_finite_logits
from mechlens.models.engine.shared_rows import SharedRows
from mechlens.models.native import native, native_blocks

Decided = Callable[[list[int]], bool]
"""Whether an answer so far is all that one wants to know; its row then leaves the batch."""
LEAVING = 8
"""Rows leave once they are one in so many: taking them out copies the keys and values of all others."""


@torch.inference_mode()
def greedy_batch(
    model: LanguageModel,
    rows: list[Row],
    max_new_tokens: int,
    prefix: DynamicCache | None,
    token_mask: TokenMask | None = None,
    decided: Decided | None = None,
    shared_rows: SharedRows | None = None,
) -> list[list[int]]:
    """The greedy continuation of every row, up to and without its end-of-sequence token.

    Rows may differ in length: the prompt is padded on the right, where causal attention can't see it, then
    each row's keys and values move to the right end, so that decoding continues without a gap.
    """
    device = device_of(model)
    skip = prefix.get_seq_length() if prefix is not None else 0
    stop = torch.tensor(sorted(stop_tokens(model)), dtype=torch.long, device=device)
    lengths = torch.tensor([len(row.ids) - skip for row in rows], device=device)
    with native(model) as hf_model:
        width = int(lengths.max())
        if token_mask is None and packs(model, skip + width):
            logits, cache = _packed_prompts(model, hf_model, rows, prefix, max_new_tokens)
        else:
            shared_rows = shared_rows or SharedRows.apart(len(rows), n_layers(model), device)
            logits, cache = _prompt_pass(model, hf_model, rows, prefix, token_mask, shared_rows)
            cache = _packed(cache, width - lengths, shared_rows, max_new_tokens)
        mask = torch.arange(skip + width, device=device) >= (width - lengths).unsqueeze(1)
        rest = Rest(stop, max_new_tokens, token_mask, decided)
        return _decode(hf_model, cache, _likeliest(logits).to(device), mask, skip + lengths, rest)


@torch.inference_mode()
def prompt_logits(
    model: LanguageModel,
    rows: list[Row],
    prefix: DynamicCache | None,
    token_mask: TokenMask | None = None,
    shared_rows: SharedRows | None = None,
) -> Float[Tensor, "row vocab"]:
    """Logits of every row's first answer token (float32, on the CPU)."""
    shared_rows = shared_rows or SharedRows.apart(len(rows), n_layers(model), device_of(model))
    with native(model) as hf_model:
        logits = _prompt_pass(model, hf_model, rows, prefix, token_mask, shared_rows)[0]
    require_finite_logits(logits)
    return logits.float().cpu()


@torch.inference_mode()
def start_cache(
    model: LanguageModel, ids: Sequence[int], token_mask: TokenMask, shared_rows: SharedRows
) -> DynamicCache:
    """Keys and values of a start that rows share but for what is done to it: a row for each kind of start."""
    cache = DynamicCache()
    tokens = torch.tensor([list(ids)] * len(shared_rows.entry), device=device_of(model))
    with native(model), shared_rows.running(native_blocks(model), token_mask, 0):
        # Without its head: nobody reads logits here.
        body = model.original_model.base_model
        body(tokens, **with_cache(body, cache))
    layers = [(layer, rows.to(layer.keys.device)) for layer, rows in zip(cache.layers, shared_rows.of_row, strict=True)]
    return DynamicCache([(layer.keys[rows], layer.values[rows]) for layer, rows in layers])


def _prompt_pass(
    model: LanguageModel,
    hf_model: torch.nn.Module,
    rows: list[Row],
    prefix: DynamicCache | None,
    token_mask: TokenMask | None,
    shared_rows: SharedRows,
) -> tuple[Float[Tensor, "row vocab"], DynamicCache]:
    """Logits at the end of every prompt, and the keys and values of each block's classes of rows."""
    skip = prefix.get_seq_length() if prefix is not None else 0
    cache = shared_rows.cache(prefix)
    run = [rows[i] for i in shared_rows.entry.tolist()]
    tokens = torch.zeros(len(run), max(len(row.ids) for row in run) - skip, dtype=torch.long)
    for i, row in enumerate(run):
        tokens[i, : len(row.ids) - skip] = torch.tensor(row.ids[skip:])
    ends = torch.tensor([len(row.ids) - skip - 1 for row in rows], device=device_of(model))
    with shared_rows.running(native_blocks(model), token_mask, skip):
        return _last_logits(hf_model, tokens.to(ends.device), cache, shared_rows.of_row[-1], ends), cache


def _packed_prompts(
    model: LanguageModel, hf_model: torch.nn.Module, rows: list[Row], prefix: DynamicCache | None, room: int
) -> tuple[Float[Tensor, "row vocab"], DynamicCache]:
    """Logits at the end of every prompt, and every row's keys and values by themselves, at the right end."""
    skip = prefix.get_seq_length() if prefix is not None else 0
    packing, paths = pack_prompts([row.ids for row in rows], skip)
    cache = DynamicCache([(layer.keys, layer.values) for layer in prefix.layers] if prefix is not None else None)
    ends = torch.tensor([path[-1] for path in paths])
    with _head_shown(hf_model, torch.zeros_like(ends), ends) as cut:
        logits = cut(packed_pass(model, hf_model, packing, cache).logits)
    width = max(map(len, paths))
    keys = torch.tensor([[0] * (width - len(path)) + [*range(skip), *(skip + k for k in path)] for path in paths])
    layers = []
    for layer in cache.layers:
        pair = [x[0][:, keys.to(x.device)].transpose(0, 1) for x in (layer.keys, layer.values)]
        layers.append((pair[0], pair[1]))
        layer.keys = layer.values = None  # the next layer's copy takes its place in memory
    return logits, roomy(layers, room)


@contextlib.contextmanager
def _head_shown(
    hf_model: Any, row: Int[Tensor, " row"], ends: Int[Tensor, " row"]
) -> Iterator[Callable[[Tensor], Float[Tensor, "row vocab"]]]:
    """The head is shown some tokens only; gives what takes their logits out of the output."""

    def shown(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        hidden = args[0]
        return (hidden[row.to(hidden.device), ends.to(hidden.device)].unsqueeze(1),)

    head = hf_model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(shown)
    try:
        yield lambda logits: logits[row.to(logits.device), ends.to(logits.device)] if head is None else logits[:, 0]
    finally:
        if handle is not None:
            handle.remove()


def _last_logits(
    hf_model: Any, tokens: Tensor, cache: DynamicCache, row: Int[Tensor, " row"], ends: Int[Tensor, " row"]
) -> Float[Tensor, "row vocab"]:
    """Logits of the first answer token of every row."""
    with _head_shown(hf_model, row, ends) as cut:
        return cut(hf_model(tokens, **with_cache(hf_model, cache)).logits)


def _packed(cache: DynamicCache, empty: Int[Tensor, " row"], shared_rows: SharedRows, room: int) -> DynamicCache:
    """Every row's keys and values by themselves, at the right end over its `empty` padding columns."""
    size = cache.layers[0].keys.shape[-2]
    column = (torch.arange(size, device=empty.device) - empty.unsqueeze(1)).remainder(size)
    moved = bool(empty.any())
    packed = []
    for layer, rows in zip(cache.layers, shared_rows.of_row, strict=True):
        pair = []
        for x in (layer.keys, layer.values):
            of_row = rows.to(x.device)
            if moved:
                heads = torch.arange(x.shape[1], device=x.device)
                x = x[of_row[:, None, None], heads[:, None], column.to(x.device)[:, None]]
            elif len(x) < len(of_row):
                x = x[of_row]
            pair.append(x)
        packed.append((pair[0], pair[1]))
        layer.keys = layer.values = None  # the next layer's copy takes its place in memory
    return roomy(packed, room)


@dataclass(frozen=True)
class Rest:
    """What stays the same from token to token."""

    stop: Int[Tensor, " stop"]
    max_new_tokens: int
    token_mask: TokenMask | None
    decided: Decided | None

    def advance(self, rows: Tensor, start: Tensor, generated: int) -> None:
        if self.token_mask is not None:
            self.token_mask.advance(rows, start, generated)

    def written(
        self, token: Int[Tensor, " row"], alive: Int[Tensor, " row"], going: list[bool], answers: list[list[int]]
    ) -> list[bool]:
        """Writes down the tokens of the rows that are going; True for those that go on."""
        on = list(going)
        stopped = torch.isin(token, self.stop).tolist()
        for i, (row, value) in enumerate(zip(alive.tolist(), token.tolist(), strict=True)):
            if going[i] and stopped[i]:
                on[i] = False
            elif going[i]:
                answers[row].append(value)
                on[i] = self.decided is None or not self.decided(answers[row])
        return on


def _decode(
    hf_model: torch.nn.Module,
    cache: DynamicCache,
    token: Int[Tensor, " row"],
    mask: Bool[Tensor, "row seq"],
    position: Int[Tensor, " row"],
    rest: Rest,
) -> list[list[int]]:
    """Token by token until every row has ended; rows that have leave the batch, a few at a time."""
    answers: list[list[int]] = [[] for _ in range(len(token))]
    alive = torch.arange(len(token), device=token.device)
    going = [True] * len(token)
    for step in range(1, rest.max_new_tokens + 1):
        going = rest.written(token, alive, going, answers)
        if not any(going) or step == rest.max_new_tokens:
            break
        if LEAVING * (len(going) - sum(going)) >= len(going):
            keep = torch.tensor(going, device=token.device).nonzero().squeeze(1)
            alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
            cache.batch_select_indices(keep)
            going = [True] * len(alive)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        # Without padding no mask is needed, and attention takes its fast path.
        where = {} if bool(mask.all()) else {"attention_mask": mask.long(), "position_ids": position.unsqueeze(1)}
        rest.advance(alive, position, step)
        logits = _step(hf_model, token, cache, where)
        token, position = _likeliest(logits).to(token.device), position + 1
    return answers


def _likeliest(logits: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
    """The likeliest token of every row; UserError where none is, as the logits aren't finite."""
    value, token = logits.max(dim=-1)
    if not bool(torch.isfinite(value).all()):
        raise not_finite(logits.dtype)
    return token


def _step(hf_model: torch.nn.Module, token: Tensor, cache: DynamicCache, where: dict[str, Tensor]) -> Tensor:
    try:
        out = hf_model(token.unsqueeze(1), **with_cache(hf_model, cache), **where)
    except TypeError:  # positions that the architecture derives from the mask itself (ALiBi)
        where.pop("position_ids", None)
        out = hf_model(token.unsqueeze(1), **with_cache(hf_model, cache), **where)
    logits: Tensor = out.logits[:, -1]
    return logits


def stop_tokens(model: LanguageModel) -> set[int]:
    """End-of-sequence ids of the tokenizer and of the model's own generation settings."""
    found: set[int] = set()
    tokenizer = loaded(model).tokenizer
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    settings = getattr(getattr(model, "original_model", None), "generation_config", None)
    eos = getattr(settings, "eos_token_id", None)
    if eos is not None:
        found.update([eos] if isinstance(eos, int) else eos)
    return found
