"""Residual-stream vectors by exact partial forward passes: compute only what is read.

The start that all prompts share (a chat template's system block) is run once and its keys and values are
expanded over the batch; prompts are sorted by length, so little is padded; the pass stops at the last level
that is read, before the final norm and the unembedding. Padding is on the right, where causal attention can't
see it, so no mask is needed and sliding windows stay exact. Where a model doesn't fit, `reference_batch` runs
the blocks as TransformerLens does, one length at a time.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from mechlens.errors import UserError, warn
from mechlens.models.bridge import (
    LanguageModel,
    device_of,
    dtype_of,
    has_hooks,
    is_bridge,
    loaded,
    n_layers,
    regime,
    whole,
)
from mechlens.models.engine.caches import ReadOnlyCache, with_cache
from mechlens.models.engine.packed.packing import alike, pack_prompts, packed_pass, packs, plan_packed
from mechlens.models.engine.probes import UNTRIED, apart, is_misfit, loses, probe_tokens
from mechlens.models.engine.shared_rows import SharedRows
from mechlens.models.native import native, native_blocks
from mechlens.models.sites import level_hook

MIN_PREFIX = 4
"""A shared start shorter than this isn't worth a pass of its own."""
BATCH_COST = 30
"""What one more batch costs, in tokens: small products run slower than large ones (measured on a CPU)."""
GPU_BATCH_COST = 500
"""The same on a GPU, where a pass of few tokens takes as long as its launches."""
_NO_TOKEN_CACHE: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()
"""Why a model doesn't cache keys and values token by token, empty where it does; asking costs a forward pass."""
_WARNED: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Row:
    """One prompt: its token ids without padding, and the indices that are read."""

    ids: tuple[int, ...]
    read: tuple[int, ...]


class Stop(Exception):
    """Raised inside the model to leave it once everything has been read."""


def shared_prefix(rows: Sequence[Row]) -> int:
    """Length of the start that all prompts share, short of the first token that any of them reads."""
    if len(rows) < 2:
        return 0
    limit = min(min(row.read) for row in rows)
    low, high = min(row.ids for row in rows), max(row.ids for row in rows)
    prefix = min(alike(low, high), limit)
    return prefix if prefix >= MIN_PREFIX else 0


def own_start(model: LanguageModel, rows: Sequence[Row]) -> int:
    """Length of the shared start that is run once by itself, before all batches.

    None on a GPU where rows are packed: a pass costs more there than the few tokens, which packing runs once a batch.
    """
    if device_of(model).type != "cpu" and _are_packed(model, rows):
        return 0
    return shared_prefix(rows)


def plan(
    rows: Sequence[Row],
    max_tokens: int,
    *,
    shared: int = 0,
    batch_cost: int = BATCH_COST,
    equal_lengths: bool = False,
) -> list[list[int]]:
    """Row numbers batch by batch, sorted by length and cut where padding and the number of batches cost least.

    A padded batch holds at most `max_tokens` tokens; the first `shared` of every row are not run again.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), i))
    lengths = [len(rows[i].ids) for i in order]

    def costs(end: int) -> Iterator[float]:
        longest = lengths[end - 1]
        for start in range(end - 1, -1, -1):
            size = end - start
            if size > 1 and (size * longest > max_tokens or (equal_lengths and lengths[start] != longest)):
                return
            yield batch_cost + size * (longest - shared)

    return in_turn([order[piece] for piece in cheapest_pieces(len(order), costs)])


LARGE = 600_000_000
"""Parameters beyond which a batch on a CPU holds fewer tokens, so that one is done within half a minute or so."""


def batch_tokens(model: LanguageModel, most: int) -> int:
    """How many tokens a batch holds at most: fewer of a large model on a CPU.

    By size alone: a batch that depended on the clock would give other roundings each time, and find nothing in a cache.
    """
    weights = list((model.original_model if is_bridge(model) else model).parameters())
    if device_of(model).type != "cpu" or any(weight.is_meta for weight in weights):
        return most  # what lies on a disk is read anew for every batch
    size: int = sum(weight.numel() for weight in weights)
    return max(1, min(most, most * LARGE // max(size, 1)))


def plan_reading(
    model: LanguageModel, rows: Sequence[Row], max_tokens: int, *, shared: int, fast: bool
) -> list[list[int]]:
    """Row numbers batch by batch, for `fast_batch` or `reference_batch`."""
    if fast and _are_packed(model, rows):
        return in_turn(plan_packed([row.ids for row in rows], max_tokens, shared))
    return plan(rows, max_tokens, shared=shared, equal_lengths=not fast)


def _are_packed(model: LanguageModel, rows: Sequence[Row]) -> bool:
    """Whether rows are run in one line; a row alone gains nothing by it."""
    return len(rows) > 1 and packs(model, max(len(row.ids) for row in rows))


FIRST: ContextVar[float] = ContextVar("FIRST", default=0.0)
"""How far along its batches this process begins, as a share of them: others of the same work begin elsewhere."""


def in_turn(batches: list[list[int]]) -> list[list[int]]:
    """The same batches, from the one on with which this process begins."""
    first = int(FIRST.get() * len(batches))
    return batches[first:] + batches[:first]


def cheapest_pieces(n: int, costs: Callable[[int], Iterator[float]]) -> list[slice]:
    """0 to n in pieces that cost least in all; `costs(end)` are those of a piece from end - 1, end - 2, ... to end."""
    best = [(0.0, 0)]  # up to each end: least cost, and where the last piece starts
    for end in range(1, n + 1):
        starts = zip(range(end - 1, -1, -1), costs(end), strict=False)
        best.append(min((best[start][0] + cost, start) for start, cost in starts))
    pieces = []
    while n:
        pieces.append(slice(best[n][1], n))
        n = best[n][1]
    return pieces[::-1]


def fits_fast_path(model: LanguageModel) -> bool:
    """True where keys and values can be cached per token; where they can't, one warning says why."""
    reason = why_plain(model)
    warn_plain(model, reason)
    return not reason


def why_plain(model: LanguageModel) -> str:
    """Why this model takes the plain path; empty for a bridge on raw weights without the user's hooks that fits."""
    if not is_bridge(model):
        return "it has no Hugging Face model underneath"
    if has_hooks(model):
        return "hooks are attached to it, which only whole passes fire"
    if regime(model) == "processed":
        return "its weights are folded or centred"
    if _rotates_by_length(model):
        return "its rotary frequencies depend on the longest prompt of a batch"
    if model not in _NO_TOKEN_CACHE:
        _NO_TOKEN_CACHE[model] = _no_token_cache(model)
    return _NO_TOKEN_CACHE[model]


def _rotates_by_length(model: LanguageModel) -> bool:
    """Whether rotary tables change with the number of tokens (LongRoPE, dynamic NTK), which no short trial shows."""
    # Not by getattr, which TransformerLens' components answer slowly.
    found = (vars(module).get("rope_type") for module in model.original_model.modules())
    kinds = [kind for kinds in found for kind in (kinds.values() if isinstance(kinds, dict) else (kinds,))]
    return any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds)


def warn_plain(model: LanguageModel, reason: str) -> None:
    """Says once for a model and a reason that it is slower than it could be; nothing without a reason."""
    said = _WARNED.setdefault(model, set())
    if reason and reason not in said:
        said.add(reason)
        name = loaded(model).checkpoint.name
        warn(f"{name} takes the plain path, which is exact and slower: {reason}")


@torch.inference_mode()
def _no_token_cache(model: LanguageModel) -> str:
    """Why tokens that continue a cache of ours haven't the logits that they have in a whole pass; empty if they do."""
    cache = DynamicCache()
    with native(model) as hf_model:
        tokens = probe_tokens(hf_model, 8)
        try:
            hf_model(tokens[:, :5], **with_cache(hf_model, cache))
            if not _is_plain_cache(cache, n_layers(model), 5):
                return "it doesn't cache keys and values of every token"
            rest = hf_model(tokens[:, 5:], **with_cache(hf_model, cache)).logits
        except UNTRIED as error:
            if not is_misfit(error):
                raise
            return f"a pass with cached keys and values fails in it ({type(error).__name__})"
        right = hf_model(tokens, use_cache=False).logits[:, 5:]
    if loses(apart(rest, right), dtype_of(model)):
        return "tokens that continue cached keys and values get other logits in it than in a whole pass"
    return ""


def _is_plain_cache(cache: DynamicCache, layers: int, length: int) -> bool:
    """Keys and values of every token in every layer: not a recurrent state, not a cropped window."""
    kept = [getattr(layer, "keys", None) for layer in cache.layers]
    return len(kept) == layers and all(isinstance(keys, Tensor) and keys.shape[-2] == length for keys in kept)


@torch.inference_mode()
def prefix_cache(model: LanguageModel, ids: Sequence[int]) -> DynamicCache | None:
    """Keys and values of a shared start, computed once; None for an empty start."""
    if not ids:
        return None
    tokens = torch.tensor([list(ids)], device=device_of(model))
    cache = DynamicCache()
    with native(model), contextlib.suppress(Stop), _leaving(native_blocks(model)[-1]):
        model.original_model(tokens, **with_cache(model.original_model, cache))
    return cache


@torch.inference_mode()
def fast_batch(
    model: LanguageModel, rows: Sequence[Row], levels: Sequence[int], prefix: DynamicCache | None
) -> Float[Tensor, "row level read d_model"]:
    """Residuals of one batch at the read positions, on top of the shared start's keys and values."""
    skip = prefix.get_seq_length() if prefix is not None else 0
    if _are_packed(model, rows):
        return _packed_batch(model, rows, levels, prefix)
    device = device_of(model)
    reader = Reader(levels, n_layers(model), read_places(rows) - skip, stops=True)
    with native(model) as hf_model, reader.attached(native_blocks(model)), contextlib.suppress(Stop):
        cache = SharedRows.apart(len(rows), n_layers(model)).cache(prefix)
        hf_model(right_padded(rows, skip).to(device), **with_cache(hf_model, cache))
    return reader.stacked()


def _packed_batch(
    model: LanguageModel, rows: Sequence[Row], levels: Sequence[int], prefix: DynamicCache | None
) -> Float[Tensor, "row level read d_model"]:
    skip = prefix.get_seq_length() if prefix is not None else 0
    packing, paths = pack_prompts([row.ids for row in rows], skip)
    read = read_places(rows)
    places = [path[at - skip] for path, own in zip(paths, read.tolist(), strict=True) for at in own]
    reader = Reader(levels, n_layers(model), torch.tensor([places]), stops=True)
    with native(model) as hf_model, reader.attached(native_blocks(model)), contextlib.suppress(Stop):
        packed_pass(model, hf_model, packing, ReadOnlyCache(prefix, skip))
    found = reader.stacked()[0]
    return found.view(len(levels), *read.shape, -1).transpose(0, 1)


def right_padded(rows: Sequence[Row], skip: int) -> Int[Tensor, "row seq"]:
    """Token ids after the first `skip` of every row, in one block."""
    tokens = torch.zeros(len(rows), max(len(row.ids) for row in rows) - skip, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row.ids) - skip] = torch.tensor(row.ids[skip:])
    return tokens


def read_places(rows: Sequence[Row]) -> Int[Tensor, "row read"]:
    """What every row reads; a row that reads less than another repeats its last place."""
    most = max(len(row.read) for row in rows)
    return torch.tensor([row.read + row.read[-1:] * (most - len(row.read)) for row in rows])


@torch.inference_mode()
def reference_batch(
    model: LanguageModel, rows: Sequence[Row], levels: Sequence[int]
) -> Float[Tensor, "row level read d_model"]:
    """Residuals of rows of one length through TransformerLens' own cache: the path that fits every model."""
    tokens = torch.tensor([row.ids for row in rows], device=device_of(model))
    names = [level_hook(model, level) for level in levels]
    top = max(levels)
    how = whole(model) | ({"stop_at_layer": top + 1} if top < n_layers(model) else {})
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names, prepend_bos=False, **how)
    kept = Kept(read_places(rows))
    for level, name in zip(levels, names, strict=True):
        if name not in cache:
            raise UserError(
                f"TransformerLens shows no single residual stream of {type(model.original_model).__name__} at level "
                f"{level}; read other levels, or choose another model"
            )
        kept.put(level, cache[name])
    return kept.stacked(levels)


HELD = 1 << 28
"""Bytes of read values that may wait on the devices."""


class Kept:
    """The read positions of each level's residual. They stay where they were computed until all are there, since
    every move from a GPU waits for all that it still has to do.
    """

    def __init__(self, read: Int[Tensor, "row read"]) -> None:
        self.found: dict[int, Tensor] = {}
        self._index = {torch.device("cpu"): (torch.arange(len(read)).unsqueeze(1), read)}
        self._held = 0

    def put(self, level: int, residual: Tensor) -> None:
        """Keeps what is read of (row, token, ...)."""
        device = residual.device
        if device not in self._index:
            rows, read = self._index[torch.device("cpu")]
            self._index[device] = rows.to(device), read.to(device)
        self.found[level] = residual[self._index[device]]
        self._held += self.found[level].nbytes
        if self._held > HELD:
            self.found = {level: values.cpu() for level, values in self.found.items()}
            self._held = 0

    def stacked(self, levels: Sequence[int]) -> Float[Tensor, "row level read *axes"]:
        """What was read, level by level, as float32 on the CPU."""
        values = [self.found[level] for level in levels]
        devices = {one.device for one in values}
        for device in devices if len(devices) > 1 else ():
            there = [i for i, one in enumerate(values) if one.device == device]
            moved = _on_cpu(torch.stack([values[i] for i in there]))
            for i, value in zip(there, moved, strict=True):
                values[i] = value
        return _on_cpu(torch.stack(values, dim=1)).float()


def _on_cpu(x: Tensor) -> Tensor:
    """The values, from a CUDA device by way of memory that it can write to itself: ten times as fast."""
    if not x.is_cuda:
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


class Reader:
    """Hooks that keep a few positions of each level and, if wanted, stop the pass after the last one."""

    def __init__(self, levels: Sequence[int], last: int, read: Tensor, *, stops: bool) -> None:
        self.levels, self.last, self.stops = tuple(levels), last, stops
        self.kept = Kept(read)

    @contextlib.contextmanager
    def attached(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """The hooks on a model's blocks, for one pass."""
        top = max(self.levels)
        handles = [
            blocks[level].register_forward_pre_hook(self._entering(level, level == top), with_kwargs=True)
            for level in self.levels
            if level < self.last
        ]
        if top == self.last:
            handles.append(blocks[-1].register_forward_hook(self._left))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, level: int, top: bool) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.kept.put(level, args[0] if args else kwargs["hidden_states"])
            if top and self.stops:
                raise Stop

        return hook

    def _left(self, module: nn.Module, args: object, output: Any) -> None:
        self.kept.put(self.last, output if isinstance(output, Tensor) else output[0])
        if self.stops:
            raise Stop

    def stacked(self) -> Float[Tensor, "row level read d_model"]:
        """What was read, level by level."""
        return self.kept.stacked(self.levels)


def gather(residual: Tensor, read: Tensor) -> Tensor:
    """The read positions of every row, as float32 on the CPU."""
    kept = Kept(read)
    kept.put(0, residual)
    return kept.stacked([0])[:, 0]


@contextlib.contextmanager
def _leaving(block: nn.Module) -> Iterator[None]:
    """Stop the pass when `block` has run: neither final norm nor logits are needed."""

    def hook(module: nn.Module, args: object, output: object) -> None:
        raise Stop

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
