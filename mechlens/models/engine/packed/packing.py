"""Many rows of tokens in one line, a token that rows share being there once: nothing is padded, nothing run twice.

Everything but attention treats tokens one by one, so the tokens of all rows pass the blocks as one row of a batch, and
attention alone sorts them: each row's queries, the keys of its whole path. Hugging Face calls it by the name of an
attention implementation; an architecture whose attention can't be named so is found out by `packs`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mechlens.models.bridge import LanguageModel, device_of, n_layers
from mechlens.models.engine.caches import ReadOnlyCache, with_cache
from mechlens.models.engine.shared_rows import fault, fault_of_trial
from mechlens.models.native import native

NAME = "mechlens_packed"
"""Of the attention implementation, while a packed pass runs."""
KEYS_AT_ONCE = 1 << 16
"""Keys that attention gathers at a time, which bounds what it takes beside the tokens."""


@dataclass(frozen=True)
class Packing:
    """Rows of tokens in one line. Keys are counted from a start of `skip` tokens that is there already."""

    ids: Int[Tensor, " token"]
    positions: Int[Tensor, " token"]
    own: Int[Tensor, "row own"]
    """The tokens that a row runs itself, one after the other; padded with its last."""
    keys: Int[Tensor, "row key"]
    """The keys of a row's path by position: below `skip` of the start, from there on of token `key - skip`."""
    place: Int[Tensor, " token"]
    """Where in `own`, flattened, every token stands."""
    ends: tuple[int, ...]
    """How many tokens there are up to each row."""

    def rows_of(self, tokens: int) -> int:
        """How many rows the first so many tokens make."""
        return self.ends.index(tokens) + 1


def pack(rows: Sequence[tuple[Sequence[int], Sequence[int]]], skip: int) -> Packing:
    """Rows given as (keys of what stands before their own tokens, own token ids): at least one own token each."""
    ids: list[int] = []
    positions: list[int] = []
    own, keys, ends = [], [], []
    for before, tokens in rows:
        new = range(len(ids), len(ids) + len(tokens))
        ids += tokens
        positions += range(len(before), len(before) + len(tokens))
        own.append(list(new))
        keys.append([*before, *(skip + i for i in new)])
        ends.append(len(ids))
    width = max(map(len, own))
    return Packing(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        own=torch.tensor([row + row[-1:] * (width - len(row)) for row in own]),
        keys=_padded(keys),
        place=torch.tensor([i * width + k for i, row in enumerate(own) for k in range(len(row))]),
        ends=tuple(ends),
    )


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def pack_prompts(prompts: Sequence[Sequence[int]], skip: int) -> tuple[Packing, list[list[int]]]:
    """Prompts that share their first `skip` tokens, and where in the line the rest of each prompt stands.

    What two prompts begin with alike is run once; that asks for one order only, the dictionary's.
    """
    rows: list[tuple[list[int], Sequence[int]]] = []
    paths: list[list[int]] = [[] for _ in prompts]
    ids: Sequence[int] = ()
    path: list[int] = []
    count = 0
    for i in sorted(range(len(prompts)), key=lambda i: tuple(prompts[i])):
        shared = max(skip, _alike(ids, prompts[i])) - skip
        ids, rest = prompts[i], prompts[i][skip + shared :]
        path = [*path[:shared], *range(count, count + len(rest))]
        count += len(rest)
        if rest:
            rows.append(([*range(skip), *(skip + k for k in path[:shared])], rest))
        paths[i] = path
    return pack(rows, skip), paths


def plan_packed(prompts: Sequence[Sequence[int]], max_tokens: int, skip: int) -> list[list[int]]:
    """Numbers of the prompts pass by pass, neighbours in the dictionary's order; a pass runs about `max_tokens` tokens.

    Passes are of about the same size, and one prompt is one pass at least.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    alone = [len(prompts[i]) - skip for i in order]
    new = alone[:1] + [
        size - (_alike(prompts[a], prompts[b]) - skip) for a, b, size in zip(order, order[1:], alone[1:], strict=False)
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


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
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
        rows = self.packing.rows_of(tokens)
        own, keys, mask = (self._on(query, name, groups) for name in ("own", "keys", "mask"))
        by_token, by_key, by_value = (x[0].transpose(0, 1) for x in (query, key, value))
        step = max(1, KEYS_AT_ONCE // keys.shape[1])
        parts = []
        for some in (slice(at, min(at + step, rows)) for at in range(0, rows, step)):
            q = by_token[own[some]]
            q = q.view(*q.shape[:2], key.shape[1], groups, -1).permute(0, 2, 1, 3, 4).flatten(2, 3)
            k, v = by_key[keys[some]].transpose(1, 2), by_value[keys[some]].transpose(1, 2)
            out = _attended(q, k, v, mask[some], scaling, softcap)
            out = out.reshape(*out.shape[:2], -1, groups, value.shape[-1]).permute(0, 2, 1, 3, 4)
            parts.append(out.reshape(-1, heads, value.shape[-1]))
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found[self._on(query, "place", groups)[:tokens]].unsqueeze(0), None

    def _on(self, like: Tensor, name: str, groups: int) -> Tensor:
        """A table of the packing on the device of a block, made once for all blocks there."""
        at = (name, like.device, like.dtype, groups) if name == "mask" else (name, like.device)
        if at not in self._made:
            found = self._mask(groups, like.dtype) if name == "mask" else getattr(self.packing, name)
            self._made[at] = found.to(like.device)
        return self._made[at]

    def _mask(self, groups: int, dtype: torch.dtype) -> Float[Tensor, "row 1 query key"]:
        """Adds minus infinity to the keys after each query; the queries of a group of heads stand side by side."""
        own, width = self.packing.positions[self.packing.own], self.packing.keys.shape[1]
        hidden = torch.arange(width) > own.repeat_interleave(groups, dim=1).unsqueeze(-1)
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).unsqueeze(1)


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap) + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


@contextlib.contextmanager
def attending(hf_model: nn.Module, attention: PackedAttention) -> Iterator[None]:
    """The plain model with this attention in every block."""
    config: Any = hf_model.config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS._global_mapping[NAME]


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

    Never where the longest row has more tokens than a sliding window or a chunk of attention, which no short trial
    shows.
    """
    use = "of packed rows"
    return longest <= _window(model) and not fault(
        model, use, lambda: fault_of_trial(model, use, lambda: _packed_and_whole(model))
    )


def _window(model: LanguageModel) -> int:
    """The fewest tokens that any block's attention looks back."""
    settings = vars(model.original_model.config.get_text_config())
    widths = ("window", "window_size", "chunk_size")
    found = [value for name, value in settings.items() if name.endswith(widths) and type(value) is int]
    return min((value for value in found if value > 0), default=1 << 40)


@torch.inference_mode()
def _packed_and_whole(model: LanguageModel) -> list[tuple[Tensor, Tensor]]:
    prompts = [[3, 4, 5, 6, 7, 2], [3, 4, 5, 9], [3, 4, 5, 9, 8], [3, 4, 1, 1, 1]]
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
