"""Rows that are alike so far run as one: a batch that grows on its way up.

Two rows with the same tokens have the same residual stream up to the first block where something else is done to
them, so a sweep over layers needs, below each layer, one row for each prompt. The batch starts with one row for
each class of rows that are alike and, where a class parts, its rows join as copies. Hugging Face's own loop calls
the blocks; whether a model's loop bears a growing batch is tried out by `shares_rows`.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache

from mechlens.models.bridge import LanguageModel, device_of, dtype_of, n_layers, native, native_blocks
from mechlens.models.engine.probes import UNTRIED, apart, is_misfit, tolerance
from mechlens.models.engine.token_mask import TokenMask
from mechlens.models.transformers_versions import with_cache

_SHARES_ROWS: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


class SharedRows:
    """The classes of rows that are alike, block by block; a class may only part from one block to the next."""

    def __init__(self, classes: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device) -> None:
        """`classes[block][row]` counts from 0 in order of first sight; `starts` are the rows of the shared start."""
        self.starts = torch.tensor(starts, device=device)
        self.of_row = [torch.tensor(block, device=device) for block in classes]
        self.first = [torch.tensor(_first_rows(block), device=device) for block in classes]

    @classmethod
    def apart(cls, n: int, n_blocks: int, device: torch.device) -> "SharedRows":
        """Every row by itself, on a start of one row."""
        return cls([range(n)] * n_blocks, [0] * n, device)

    def cache(self, prefix: DynamicCache | None) -> DynamicCache:
        """A fresh cache that holds the start's keys and values for the classes of every block."""
        if prefix is None:
            return DynamicCache()
        layers = zip(prefix.layers, self.first, strict=True)
        return DynamicCache([_chosen(layer, self.starts[first]) for layer, first in layers])

    @contextlib.contextmanager
    def running(self, blocks: Sequence[nn.Module], token_mask: TokenMask | None, skip: int) -> Iterator[None]:
        """Lets rows join where their class parts; the pass must begin with the first block's classes."""
        self._advance(0, token_mask, skip)
        handles = [
            # Before the changes of the same block, which are for the rows that it has.
            block.register_forward_pre_hook(self._entering(i, token_mask, skip), with_kwargs=True, prepend=True)
            for i, block in enumerate(blocks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _advance(self, block: int, token_mask: TokenMask | None, skip: int) -> None:
        if token_mask is not None:
            rows = self.first[block]
            token_mask.advance(rows, torch.full_like(rows, skip), 0)

    def _entering(self, i: int, token_mask: TokenMask | None, skip: int) -> Any:
        parts = i > 0 and len(self.first[i]) > len(self.first[i - 1])
        source = self.of_row[i - 1][self.first[i]] if parts else None
        began = len(self.first[0])

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if source is not None:
                hidden = hidden[source.to(hidden.device)]
                self._advance(i, token_mask, skip)
            if len(hidden) != began:
                args = (*args[:1], *(_for_any_row(value, began) for value in args[1:]))
                kwargs = {name: _for_any_row(value, began) for name, value in kwargs.items()}
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook


def _first_rows(block: Sequence[int]) -> list[int]:
    first: dict[int, int] = {}
    for row, number in enumerate(block):
        first.setdefault(number, row)
    return list(first.values())


def _chosen(layer: Any, rows: Int[Tensor, " row"]) -> tuple[Tensor, Tensor]:
    if len(layer.keys) == 1:
        return layer.keys.expand(len(rows), -1, -1, -1), layer.values.expand(len(rows), -1, -1, -1)
    return layer.keys[rows.to(layer.keys.device)], layer.values[rows.to(layer.values.device)]


def _for_any_row(value: Any, rows: int) -> Any:
    """A causal mask, the same for all rows as none is padded on the left, for any number of them."""
    return value[:1] if isinstance(value, Tensor) and value.ndim == 4 and len(value) == rows else value


def shares_rows(model: LanguageModel) -> bool:
    """True where a growing batch gives what rows apart give, tried on a few tokens after a shared start."""
    if model not in _SHARES_ROWS:
        _SHARES_ROWS[model] = _shares_rows(model)
    return _SHARES_ROWS[model]


@torch.inference_mode()
def _shares_rows(model: LanguageModel) -> bool:
    blocks, device = n_layers(model), device_of(model)
    if blocks < 2:
        return False
    rows = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 6], [6, 5, 4, 3]], device=device)
    below, above = [0, 0, 1], [0, 1, 2]
    found = []
    with native(model) as hf_model:
        start = DynamicCache()
        hf_model(torch.tensor([[1, 2]], device=device), **with_cache(hf_model, start))
        for shared_rows in (
            SharedRows([below] * (blocks - 1) + [above], [0, 0, 0], device),
            SharedRows.apart(3, blocks, device),
        ):
            try:
                with shared_rows.running(native_blocks(model), None, 2):
                    tokens = rows[shared_rows.first[0]]
                    found.append(hf_model(tokens, **with_cache(hf_model, shared_rows.cache(start))).logits)
            except UNTRIED as error:
                if not is_misfit(error):
                    raise
                return False
    return apart(*found) <= tolerance(dtype_of(model))
