"""Greedy answers in batches: the shared start once, rows packed, finished rows leave."""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from mechlens.models.bridge import LanguageModel, device_of, dtype_of, has_hooks, is_bridge, loaded, n_layers, regime
from mechlens.models.engine.forward import Row
from mechlens.models.engine.probes import decode_gap, loses, tolerance
from mechlens.models.engine.shared_rows import SharedRows
from mechlens.models.engine.token_mask import TokenMask
from mechlens.models.native import native, native_blocks
from mechlens.models.soundness import not_finite, require_finite_logits
from mechlens.models.transformers_versions import with_cache


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values as the first columns of tensors that are as long as they will ever be."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.length = keys.shape[-2]
        self.whole_keys, self.whole_values = _with_room(keys, room), _with_room(values, room)
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (x[:, :, : self.length] for x in (self.whole_keys, self.whole_values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new tokens behind the others; gives all of them."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.whole_keys[:, :, start : self.length] = key_states
        self.whole_values[:, :, start : self.length] = value_states
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some of the rows."""
        indices = indices.to(self.whole_keys.device)  # blocks may lie on several devices
        self.whole_keys, self.whole_values = self.whole_keys[indices], self.whole_values[indices]
        self._show()


def _with_room(x: Tensor, room: int) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:2], room, x.shape[3])], dim=2)


def roomy(layers: list[tuple[Tensor, Tensor]], room: int) -> DynamicCache:
    """A cache of these keys and values, layer by layer, with room for so many more tokens."""
    cache = DynamicCache()
    cache.layers = [RoomyLayer(keys, values, room) for keys, values in layers]
    return cache


Decided = Callable[[list[int]], bool]
"""Whether an answer so far is all that one wants to know; its row then leaves the batch."""
PLAIN, NATIVE, UNCACHED = "plain", "native", "uncached"
"""Ways of decoding that fit more models than packed batches do; see `plain_engine`."""
_NATIVE_GAPS: "weakref.WeakKeyDictionary[nn.Module, float]" = weakref.WeakKeyDictionary()
MORE_THAN_ROUNDING = 4
"""Times the plain modules' own gap between cached and whole passes, which on the bridged ones tells of a loss."""
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
    shared_rows = shared_rows or SharedRows.apart(len(rows), n_layers(model), device)
    skip = prefix.get_seq_length() if prefix is not None else 0
    stop = torch.tensor(sorted(stop_tokens(model)), dtype=torch.long, device=device)
    lengths = torch.tensor([len(row.ids) - skip for row in rows], device=device)
    with native(model) as hf_model:
        logits, cache = _prompt_pass(model, hf_model, rows, prefix, token_mask, shared_rows)
        width = int(lengths.max())
        cache = _packed(cache, width - lengths, shared_rows, max_new_tokens)
        mask = torch.arange(skip + width, device=device) >= (width - lengths).unsqueeze(1)
        rest = _Rest(stop, max_new_tokens, token_mask, decided)
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


def _last_logits(
    hf_model: Any, tokens: Tensor, cache: DynamicCache, row: Int[Tensor, " row"], ends: Int[Tensor, " row"]
) -> Float[Tensor, "row vocab"]:
    """Logits of the first answer token of every row: the head is shown each row's last token only."""

    def last_tokens(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        hidden = args[0]
        return (hidden[row.to(hidden.device), ends.to(hidden.device)].unsqueeze(1),)

    head = hf_model.get_output_embeddings()
    with contextlib.ExitStack() as stack:
        if head is not None:
            stack.callback(head.register_forward_pre_hook(last_tokens).remove)
        logits: Tensor = hf_model(tokens, **with_cache(hf_model, cache)).logits
    return logits[row.to(logits.device), ends.to(logits.device)] if head is None else logits[:, 0]


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
class _Rest:
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
    rest: _Rest,
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


def plain_engine(model: LanguageModel) -> str:
    """How `plain_greedy` decodes: by the library's generation on the modules that hooks act on (PLAIN) where its cache
    loses nothing there, else on the plain modules (NATIVE), or without a cache (UNCACHED), which is always right."""
    if not is_bridge(model) or loaded(model).decode_gap <= tolerance(torch.float32):
        return PLAIN
    if model not in _NATIVE_GAPS:
        with native(model) as hf_model:
            _NATIVE_GAPS[model] = decode_gap(hf_model)
    bridged, plain = loaded(model).decode_gap, _NATIVE_GAPS[model]
    # What half precision rounds, it rounds in both; what TransformerLens' modules lose, the plain ones keep.
    if not loses(bridged, dtype_of(model)) and bridged <= MORE_THAN_ROUNDING * max(plain, tolerance(torch.float32)):
        return PLAIN
    if has_hooks(model) or regime(model) != "raw":
        return UNCACHED
    return UNCACHED if loses(plain, dtype_of(model)) else NATIVE


@torch.inference_mode()
def plain_greedy(model: LanguageModel, rows: list[Row], max_new_tokens: int) -> list[list[int]]:
    """The same for rows of one length, in the way that `plain_engine` names: one of them fits every model."""
    engine = plain_engine(model)
    if engine == UNCACHED:
        return recomputed_greedy(model, rows, max_new_tokens, None, None)
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
            out = _generated(hf_model, tokens, stop, max_new_tokens)
    return [_until(row, stop) for row in out[:, tokens.shape[1] :].tolist()]


def _generated(hf_model: Any, tokens: Tensor, stop: set[int], max_new_tokens: int) -> Tensor:
    """Prompt and answer by Hugging Face's own generation."""

    def finite(ids: Tensor, logits: Tensor) -> Tensor:
        require_finite_logits(logits, hf_model.dtype)  # generation has made them float32
        return logits

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
    model: LanguageModel, rows: list[Row], max_new_tokens: int, token_mask: TokenMask | None, decided: Decided | None
) -> list[list[int]]:
    """The same for rows of one length by running everything again at each step, without keys and values.

    The library's own generation doesn't say which tokens it runs, and interventions have to know.
    """
    tokens = torch.tensor([row.ids for row in rows], device=device_of(model))
    stop = torch.tensor(sorted(stop_tokens(model)), dtype=torch.long, device=tokens.device)
    rest = _Rest(stop, max_new_tokens, token_mask, decided)
    answers: list[list[int]] = [[] for _ in rows]
    alive = torch.arange(len(rows), device=tokens.device)
    for step in range(max_new_tokens):
        rest.advance(alive, torch.zeros_like(alive), step)
        token = whole_logits(model, tokens).argmax(dim=-1).to(tokens.device)
        going = torch.tensor(rest.written(token, alive, [True] * len(alive), answers), device=tokens.device)
        alive, tokens = alive[going], torch.cat([tokens, token.unsqueeze(1)], dim=1)[going]
        if not len(alive):
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
