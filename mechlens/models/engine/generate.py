"""Greedy answers in batches: the shared start once, rows packed, finished rows leave."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from mechlens.models.bridge import LanguageModel, device_of, loaded, n_layers
from mechlens.models.engine.caches import roomy, with_cache
from mechlens.models.engine.forward import Reader, Row, Stop, right_padded
from mechlens.models.engine.intervene.token_mask import TokenMask
from mechlens.models.engine.packed.packing import pack_prompts, packed_pass, packs
from mechlens.models.engine.probes import finite_on_cpu, not_finite
from mechlens.models.engine.shared_rows import SharedRows
from mechlens.models.native import native, native_blocks

Decided = Callable[[list[int]], bool]
"""Whether an answer so far is all that one wants to know; its row then leaves the batch."""
Pick = Callable[[Float[Tensor, "row vocab"], Sequence[int], int], Int[Tensor, " row"]]
"""Which token comes next, of finite logits: those of rows of the batch, by number, at a place in their answers."""
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
    pick: Pick | None = None,
) -> list[list[int]]:
    """The continuation of every row, up to and without its end-of-sequence token: greedy, or as `pick` chooses.

    Rows may differ in length: the prompt is padded on the right, where causal attention can't see it, then
    each row's keys and values move to the right end, so that decoding continues without a gap.
    """
    device = device_of(model)
    skip = prefix.get_seq_length() if prefix is not None else 0
    lengths = [len(row.ids) - skip for row in rows]
    with native(model) as hf_model:
        width = max(lengths)
        empty = [width - length for length in lengths]
        if token_mask is None and packs(model, skip + width):
            logits, cache = _packed_prompts(model, hf_model, rows, prefix, max_new_tokens)
        else:
            shared_rows = shared_rows or SharedRows.apart(len(rows), n_layers(model))
            logits, cache = _prompt_pass(model, hf_model, rows, prefix, token_mask, shared_rows)
            cache = _packed(cache, empty, shared_rows, max_new_tokens)
        rest = Rest(frozenset(stop_tokens(model)), max_new_tokens, token_mask, decided, pick)
        return _decode(hf_model, cache, logits, device, _Running.begun(empty, skip, width), rest)


@torch.inference_mode()
def prompt_logits(
    model: LanguageModel,
    rows: list[Row],
    prefix: DynamicCache | None,
    token_mask: TokenMask | None = None,
    shared_rows: SharedRows | None = None,
) -> Float[Tensor, "row vocab"]:
    """Logits of every row's first answer token (float32, on the CPU)."""
    shared_rows = shared_rows or SharedRows.apart(len(rows), n_layers(model))
    with native(model) as hf_model:
        return finite_on_cpu(_prompt_pass(model, hf_model, rows, prefix, token_mask, shared_rows)[0])


@torch.inference_mode()
def steered_residuals(
    model: LanguageModel,
    rows: list[Row],
    read: Int[Tensor, "row read"],
    prefix: DynamicCache | None,
    token_mask: TokenMask,
    shared_rows: SharedRows,
) -> Float[Tensor, "row read d_model"]:
    """The last level's residuals at places of every row, none of which the shared start holds."""
    skip = prefix.get_seq_length() if prefix is not None else 0
    cache, last = shared_rows.cache(prefix), n_layers(model)
    reader = Reader([last], last, read[shared_rows.first[-1]] - skip, stops=True)
    tokens = right_padded([rows[i] for i in shared_rows.entry.tolist()], skip).to(device_of(model))
    with native(model):
        blocks, body = native_blocks(model), model.original_model.base_model
        # The reader comes after the changes of the last block; no head is run.
        running, reading = shared_rows.running(blocks, token_mask, skip), reader.attached(blocks)
        with running, reading, contextlib.suppress(Stop):
            body(tokens, **with_cache(body, cache))
    return reader.stacked()[shared_rows.of_row[-1], 0]  # rows that are alike to the end were one


@torch.inference_mode()
def start_cache(
    model: LanguageModel,
    ids: Sequence[Sequence[int]],
    prefix: DynamicCache | None,
    token_mask: TokenMask,
    shared_rows: SharedRows,
) -> DynamicCache:
    """Keys and values of starts of one length that rows share, a row for each, on those of what `prefix` holds."""
    skip = prefix.get_seq_length() if prefix is not None else 0
    cache = shared_rows.cache(prefix)
    tokens = torch.tensor([ids[i][skip:] for i in shared_rows.entry.tolist()], device=device_of(model))
    with native(model), shared_rows.running(native_blocks(model), token_mask, skip):
        # Without its head: nobody reads logits here.
        body = model.original_model.base_model
        body(tokens, **with_cache(body, cache))
    layers = zip(cache.layers, shared_rows.of_row, strict=True)
    placed = [(layer, shared_rows.on(layer.keys.device, rows)) for layer, rows in layers]
    return DynamicCache([(layer.keys[rows], layer.values[rows]) for layer, rows in placed])


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
    tokens = right_padded(run, skip)
    ends = torch.tensor([len(row.ids) - skip - 1 for row in rows], device=device_of(model))
    with shared_rows.running(native_blocks(model), token_mask, skip):
        row = shared_rows.on(ends.device, shared_rows.of_row[-1])
        return _last_logits(hf_model, tokens.to(ends.device), cache, row, ends), cache


def _packed_prompts(
    model: LanguageModel, hf_model: torch.nn.Module, rows: list[Row], prefix: DynamicCache | None, room: int
) -> tuple[Float[Tensor, "row vocab"], DynamicCache]:
    """Logits at the end of every prompt, and every row's keys and values by themselves, at the right end."""
    skip = prefix.get_seq_length() if prefix is not None else 0
    packing, paths = pack_prompts([row.ids for row in rows], skip)
    cache = DynamicCache([(layer.keys, layer.values) for layer in prefix.layers] if prefix is not None else None)
    ends = torch.tensor([path[-1] for path in paths])
    with head_shown(hf_model, torch.zeros_like(ends), ends) as cut:
        logits = cut(packed_pass(model, hf_model, packing, cache).logits)
    width = max(map(len, paths))
    keys = torch.tensor([[0] * (width - len(path)) + [*range(skip), *(skip + k for k in path)] for path in paths])
    there = {device: keys.to(device) for device in {layer.keys.device for layer in cache.layers}}
    layers = []
    for layer in cache.layers:
        pair = [x[0][:, there[x.device]].transpose(0, 1) for x in (layer.keys, layer.values)]
        layers.append((pair[0], pair[1]))
        layer.keys = layer.values = None  # the next layer's copy takes its place in memory
    return logits, roomy(layers, room)


@contextlib.contextmanager
def head_shown(
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
    with head_shown(hf_model, row, ends) as cut:
        return cut(hf_model(tokens, **with_cache(hf_model, cache)).logits)


def _packed(cache: DynamicCache, empty: Sequence[int], shared_rows: SharedRows, room: int) -> DynamicCache:
    """Every row's keys and values by themselves, at the right end over its `empty` padding columns."""
    size = cache.layers[0].keys.shape[-2]
    columns: dict[torch.device, Tensor] = {}
    packed = []
    for layer, rows in zip(cache.layers, shared_rows.of_row, strict=True):
        pair = []
        for x in (layer.keys, layer.values):
            of_row = shared_rows.on(x.device, rows)
            if any(empty):
                if x.device not in columns:
                    away = torch.tensor(empty, device=x.device).unsqueeze(1)
                    columns[x.device] = (torch.arange(size, device=x.device) - away).remainder(size)
                heads = torch.arange(x.shape[1], device=x.device)
                x = x[of_row[:, None, None], heads[:, None], columns[x.device][:, None]]
            elif len(x) < len(of_row):
                x = x[of_row]
            pair.append(x)
        packed.append((pair[0], pair[1]))
        layer.keys = layer.values = None  # the next layer's copy takes its place in memory
    return roomy(packed, room)


@dataclass(frozen=True)
class Rest:
    """What stays the same from token to token."""

    stop: frozenset[int]
    max_new_tokens: int
    token_mask: TokenMask | None
    decided: Decided | None
    pick: Pick | None

    def advance(self, rows: Sequence[int], starts: Sequence[int], generated: int) -> None:
        if self.token_mask is not None:
            self.token_mask.advance(torch.tensor(rows), torch.tensor(starts), generated)

    def written(
        self, tokens: Sequence[int], alive: Sequence[int], going: list[bool], answers: list[list[int]]
    ) -> list[bool]:
        """Writes down the tokens of the rows that are going; True for those that go on."""
        on = list(going)
        for i, (row, token) in enumerate(zip(alive, tokens, strict=True)):
            if going[i] and token in self.stop:
                on[i] = False
            elif going[i]:
                answers[row].append(token)
                on[i] = self.decided is None or not self.decided(answers[row])
        return on


@dataclass(frozen=True)
class _Running:
    """The rows that are decoded still, in numbers on the CPU: nothing has to be asked of a GPU to know them."""

    rows: list[int]
    empty: list[int]
    """Padding columns before each row's first token."""
    position: list[int]
    """Of each row's newest token."""
    width: int
    """Columns of keys and values, with that of the newest token."""

    @classmethod
    def begun(cls, empty: Sequence[int], skip: int, width: int) -> "_Running":
        position = [skip + width - own for own in empty]
        return cls(list(range(len(empty))), list(empty), position, skip + width + 1)

    def only(self, keep: Sequence[int]) -> "_Running":
        rows, empty, position = ([own[i] for i in keep] for own in (self.rows, self.empty, self.position))
        return _Running(rows, empty, position, self.width)

    def next(self) -> "_Running":
        return _Running(self.rows, self.empty, [at + 1 for at in self.position], self.width + 1)


def _decode(
    hf_model: torch.nn.Module,
    cache: DynamicCache,
    logits: Float[Tensor, "row vocab"],
    device: torch.device,
    running: _Running,
    rest: Rest,
) -> list[list[int]]:
    """Token by token until every row has ended; rows that have leave the batch, a few at a time."""
    answers: list[list[int]] = [[] for _ in running.rows]
    going = [True] * len(answers)
    padding: _Padding | None = None
    for step in range(1, rest.max_new_tokens + 1):
        token, tokens = _next(logits, running.rows, step - 1, rest.pick)
        token = token.to(device)
        going = rest.written(tokens, running.rows, going, answers)
        if not any(going) or step == rest.max_new_tokens:
            break
        if LEAVING * (len(going) - sum(going)) >= len(going):
            keep = [i for i, on in enumerate(going) if on]
            index = torch.tensor(keep, device=device)
            running, token, padding = running.only(keep), token[index], None
            cache.batch_select_indices(index)
            going = [True] * len(keep)
        # Without padding no mask is needed, and attention takes its fast path.
        if any(running.empty):
            padding = _Padding.of(running, device) if padding is None else padding.next()
        rest.advance(running.rows, running.position, step)
        logits = _step(hf_model, token, cache, {} if padding is None else padding.arguments)
        running = running.next()
    return answers


class _Padding(NamedTuple):
    """What a step of padded rows is told, on the device of the token ids."""

    mask: Int[Tensor, "row seq"]
    position: Int[Tensor, "row 1"]

    @classmethod
    def of(cls, running: _Running, device: torch.device) -> "_Padding":
        empty, position = torch.tensor([running.empty, running.position], device=device).unsqueeze(-1)
        return cls((torch.arange(running.width, device=device) >= empty).long(), position)

    def next(self) -> "_Padding":
        return _Padding(torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1), self.position + 1)

    @property
    def arguments(self) -> dict[str, Tensor]:
        return {"attention_mask": self.mask, "position_ids": self.position}


def _next(
    logits: Float[Tensor, "row vocab"], rows: Sequence[int], place: int, pick: Pick | None
) -> tuple[Int[Tensor, " row"], list[int]]:
    likeliest = _likeliest(logits)  # which refuses logits that aren't finite
    if pick is None:
        return likeliest
    token = pick(logits, rows, place)
    return token, token.tolist()


def _likeliest(logits: Float[Tensor, "row vocab"]) -> tuple[Int[Tensor, " row"], list[int]]:
    """The likeliest token of every row, there and in numbers; UserError where none is, as the logits aren't finite.

    The numbers are all that a GPU is waited for, once a token.
    """
    value, token = logits.max(dim=-1)
    found = torch.where(torch.isfinite(value), token, -1).tolist()
    if -1 in found:
        raise not_finite(logits.dtype)
    return token, found


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
