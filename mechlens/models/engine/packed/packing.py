"""Many rows of tokens in one line, a token that rows share being there once: nothing is padded, nothing run twice.

Everything but attention treats tokens one by one, so the tokens of all rows pass the blocks as one row of a batch, and
attention alone sorts them: each row's queries, the keys of its whole path. Hugging Face calls it by the name of an
attention implementation; an architecture whose attention can't be named so is found out by `packs`.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mechlens.models.bridge import LanguageModel, device_of, n_layers
from mechlens.models.engine.caches import ReadOnlyCache, with_cache
from mechlens.models.engine.probes import spread_tokens
from mechlens.models.engine.shared_rows import fault, fault_of_trial
from mechlens.models.native import native

NAME = "mechlens_packed"
"""Of the attention implementation, while a packed pass runs; the number of the pass follows."""
_PASSES = itertools.count()
PIECE = 64
"""Tokens of a row that attention treats at once: a longer row is cut, so that short ones are not padded to it."""
SCORES_AT_ONCE = 1 << 20
"""Scores of a head that attention computes at a time, which bounds what it takes beside the tokens."""


class Part(NamedTuple):
    """Neighbouring pieces of rows that attention treats at once, padded to their longest."""

    begin: int
    end: int
    """The pieces."""
    own: int
    """Own tokens of one at most."""
    keys: int
    """Keys of one at most."""


@dataclass(frozen=True)
class Packing:
    """Rows of tokens in one line. Keys are counted from a start of `skip` tokens that is there already."""

    ids: Int[Tensor, " token"]
    positions: Int[Tensor, " token"]
    own: Int[Tensor, "piece own"]
    """The tokens of a piece of a row, one after the other; padded with its last."""
    keys: Int[Tensor, "piece key"]
    """The keys of a piece's path by position: below `skip` of the start, from there on of token `key - skip`."""
    parts: tuple[Part, ...]
    place: Int[Tensor, " token"]
    """Where every token stands among those of its part, flattened."""
    until: tuple[int, ...]
    """How many tokens there are up to each piece."""
    ends: tuple[int, ...]
    """How many tokens there are up to each row."""
    hidden: Bool[Tensor, "piece own key"] | None = None
    """Keys that a token of a piece doesn't see, where these aren't just those after it."""


def pack(rows: Sequence[tuple[Sequence[int], Sequence[int]]], skip: int) -> Packing:
    """Rows given as (keys of what stands before their own tokens, own token ids): at least one own token each."""
    ids: list[int] = []
    positions: list[int] = []
    own, keys, ends = [], [], []
    for before, tokens in rows:
        new = range(len(ids), len(ids) + len(tokens))
        ids += tokens
        positions += range(len(before), len(before) + len(tokens))
        path = np.concatenate([np.asarray(before, dtype=np.int64), np.arange(skip + new.start, skip + new.stop)])
        for at in range(0, len(new), PIECE):
            own.append(list(new[at : at + PIECE]))
            keys.append(path[: len(before) + at + PIECE])
        ends.append(len(ids))
    parts = _parts([(len(tokens), len(path)) for tokens, path in zip(own, keys, strict=True)])
    widest = max(map(len, own))
    places = [
        i * part.own + k
        for part in parts
        for i, piece in enumerate(own[part.begin : part.end])
        for k in range(len(piece))
    ]
    return Packing(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        own=torch.tensor([piece + piece[-1:] * (widest - len(piece)) for piece in own]),
        keys=_padded(keys),
        parts=tuple(parts),
        place=torch.tensor(places),
        until=tuple(piece[-1] + 1 for piece in own),
        ends=tuple(ends),
    )


def _parts(sizes: Sequence[tuple[int, int]]) -> list[Part]:
    """Pieces, of so many tokens and keys, in parts of about `SCORES_AT_ONCE`."""
    parts: list[Part] = []
    for i, (own, keys) in enumerate(sizes):
        last = parts[-1] if parts else Part(0, 0, 0, 0)
        wider = Part(last.begin, i + 1, max(last.own, own), max(last.keys, keys))
        # Of a few tokens the keys take memory too.
        if parts and (wider.end - wider.begin) * max(wider.own, 16) * wider.keys <= SCORES_AT_ONCE:
            parts[-1] = wider
        else:
            parts.append(Part(i, i + 1, own, keys))
    return parts


def _padded(rows: Sequence["np.ndarray[Any, np.dtype[np.int64]]"]) -> Int[Tensor, "row key"]:
    table = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, line in zip(rows, table, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(table)


def pack_prompts(prompts: Sequence[Sequence[int]], skip: int) -> tuple[Packing, list[list[int]]]:
    """Prompts that share their first `skip` tokens, and where in the line the rest of each prompt stands.

    What two prompts begin with alike is run once; that asks for one order only, the dictionary's.
    """
    rows: list[tuple[Sequence[int], Sequence[int]]] = []
    paths: list[list[int]] = [[] for _ in prompts]
    ids: Sequence[int] = ()
    path: list[int] = []
    keys = list(range(skip))
    count = 0
    for i in sorted(range(len(prompts)), key=lambda i: tuple(prompts[i])):
        shared = max(skip, alike(ids, prompts[i])) - skip
        ids, rest = prompts[i], prompts[i][skip + shared :]
        if rest:
            rows.append((keys[: skip + shared], rest))
        path = [*path[:shared], *range(count, count + len(rest))]
        keys = [*keys[: skip + shared], *range(skip + count, skip + count + len(rest))]
        count += len(rest)
        paths[i] = path
    return pack(rows, skip), paths


def plan_packed(prompts: Sequence[Sequence[int]], max_tokens: int, skip: int) -> list[list[int]]:
    """Numbers of the prompts pass by pass, neighbours in the dictionary's order; a pass runs about `max_tokens` tokens.

    Passes are of about the same size, and one prompt is one pass at least.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    alone = [len(prompts[i]) - skip for i in order]
    new = alone[:1] + [
        size - (alike(prompts[a], prompts[b]) - skip) for a, b, size in zip(order, order[1:], alone[1:], strict=False)
    ]
    most = sum(new) / -(-sum(new) // max_tokens)
    passes: list[list[int]] = []
    room = 0.0
    for i, size, whole in zip(order, new, alone, strict=True):
        if not passes or room < size:
            passes.append([])
            room = max(most, whole) - whole + size
        passes[-1].append(i)
        room -= size
    return passes


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class PackedAttention:
    """Attention among the tokens of a packing; a pass may begin with its first rows only and grow."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.calls = 0
        self._made: dict[Any, Tensor] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Float[Tensor, "1 head token d_head"],
        key: Float[Tensor, "1 kv_head key d_head"],
        value: Float[Tensor, "1 kv_head key d_value"],
        attention_mask: None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Float[Tensor, "1 token head d_value"], None]:
        """What Hugging Face asks of an attention function; ValueError for what isn't plain softmax attention."""
        extra = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
        if extra or attention_mask is not None:
            raise ValueError(f"packed attention knows no {extra or 'masks'}")
        self.calls += 1
        tokens, heads, groups = query.shape[2], query.shape[1], query.shape[1] // key.shape[1]
        pieces = self.packing.until.index(tokens) + 1
        tables = [self._on(query.device, name) for name in ("own", "keys", "place")]
        by_token, by_key, by_value = (x[0].transpose(0, 1) for x in (query, key, value))
        found = []
        for part in (part for part in self.packing.parts if part.begin < pieces):
            some, at = self._shown(part, pieces)
            own, keys, place = tables[0][some, : part.own], tables[1][some, : part.keys], tables[2][at]
            q = by_token[own]
            q = q.view(*q.shape[:2], key.shape[1], groups, -1).permute(0, 2, 1, 3, 4).flatten(2, 3)
            k, v = by_key[keys].transpose(1, 2), by_value[keys].transpose(1, 2)
            out = _attended(q, k, v, self._mask(part, groups, query)[: len(own)], scaling, softcap)
            out = out.reshape(*out.shape[:2], -1, groups, value.shape[-1]).permute(0, 2, 1, 3, 4)
            found.append(out.reshape(-1, heads, value.shape[-1])[place])
        return (found[0] if len(found) == 1 else torch.cat(found)).unsqueeze(0), None

    def _shown(self, part: Part, pieces: int) -> tuple[slice, slice]:
        """Those of the first so many pieces that are in a part, and their tokens."""
        until, end = self.packing.until, min(part.end, pieces)
        return slice(part.begin, end), slice(until[part.begin - 1] if part.begin else 0, until[end - 1])

    def _on(self, device: torch.device, name: str) -> Tensor:
        """A table of the packing on the device of a block, made once for all blocks there."""
        if (name, device) not in self._made:
            self._made[name, device] = getattr(self.packing, name).to(device)
        return self._made[name, device]

    def _mask(self, part: Part, groups: int, like: Tensor) -> Float[Tensor, "piece 1 query key"]:
        """Adds minus infinity to the keys after each query; the queries of a group of heads stand side by side.

        Kept for all blocks where there is one for all; of several each is as large as what attention takes beside it.
        """
        kept = ("mask", like.device, like.dtype, groups)
        if kept in self._made:
            return self._made[kept]
        some = slice(part.begin, part.end)
        if self.packing.hidden is None:
            own = self._on(like.device, "positions")[self._on(like.device, "own")[some, : part.own]].unsqueeze(-1)
            hidden = torch.arange(part.keys, device=like.device) > own
        else:
            hidden = self._on(like.device, "hidden")[some, : part.own, : part.keys]
        hidden = hidden.repeat_interleave(groups, dim=1)
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
        if len(self.packing.parts) == 1:
            self._made[kept] = mask.unsqueeze(1)
        return mask.unsqueeze(1)


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap) + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


@contextlib.contextmanager
def attending(
    hf_model: nn.Module, attention: Callable[..., Any], mask: Callable[..., Any] | None = None
) -> Iterator[None]:
    """The plain model with this attention in every block; it is given what `mask` makes, by default no mask."""
    config: Any = hf_model.config
    before = config._attn_implementation
    name = f"{NAME}_{next(_PASSES)}"  # the names are the process's, and another thread may run another model
    try:
        ALL_ATTENTION_FUNCTIONS.register(name, attention)
        if mask is not None:
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
        config._attn_implementation = name
        yield
    finally:
        config._attn_implementation = before
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)


def packed_pass(
    model: LanguageModel,
    hf_model: nn.Module,
    packing: Packing,
    cache: Any,
    attention: PackedAttention | None = None,
    **more: Any,
) -> Any:
    """One pass of the plain model over a packing, on the keys and values of its start."""
    device = device_of(model)
    attention = attention or PackedAttention(packing)
    tokens, positions = (x.unsqueeze(0).to(device) for x in (packing.ids, packing.positions))
    with attending(hf_model, attention):
        return hf_model(tokens, position_ids=positions, **with_cache(hf_model, cache), **more)


def packs(model: LanguageModel, longest: int) -> bool:
    """True where a packed pass gives what whole passes give, tried on a few tokens.

    Never where the longest row has more tokens than a sliding window or a chunk of attention, nor where queries are
    scaled by the place of a token in the pass (Llama 4), which no short trial shows.
    """
    use = "of packed rows"
    scaled = getattr(model.original_model.config.get_text_config(), "attn_temperature_tuning", False)
    return (
        not scaled
        and longest <= _window(model)
        and not fault(model, use, lambda: fault_of_trial(model, use, lambda: _packed_and_whole(model)))
    )


def _window(model: LanguageModel) -> int:
    """The fewest tokens that any block's attention looks back."""
    settings = vars(model.original_model.config.get_text_config())
    widths = ("window", "window_size", "chunk_size")
    found = [value for name, value in settings.items() if name.endswith(widths) and type(value) is int]
    return min((value for value in found if value > 0), default=1 << 40)


@torch.inference_mode()
def _packed_and_whole(model: LanguageModel) -> list[tuple[Tensor, Tensor]]:
    numbers = [[3, 4, 5, 6, 7, 2], [3, 4, 5, 9], [3, 4, 5, 9, 8], [3, 4, 1, 1, 1]]
    prompts = [spread_tokens(model.original_model, own) for own in numbers]
    packing, paths = pack_prompts(prompts, 2)
    with native(model) as hf_model:
        device = device_of(model)
        start = DynamicCache()
        hf_model(torch.tensor([prompts[0][:2]], device=device), **with_cache(hf_model, start))
        cache = ReadOnlyCache(start, 2)
        attention = PackedAttention(packing)
        found = packed_pass(model, hf_model, packing, cache, attention=attention).logits[0]
        if attention.calls != n_layers(model):
            raise ValueError(f"{attention.calls} of {n_layers(model)} blocks call a named attention")
        whole = [hf_model(torch.tensor([ids], device=device), use_cache=False).logits[0, 2:] for ids in prompts]
    return [(found[path], right) for path, right in zip(paths, whole, strict=True)]
