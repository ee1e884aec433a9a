"""Rows that are alike so far run as one: a batch that grows on its way up.

Two rows with the same tokens have the same residual stream up to the first block where something else is done to
them, so a sweep over layers needs, below each layer, one row for each prompt. The batch starts with one row for
each class of rows that are alike and, where a class parts, its rows join as copies. Hugging Face's own loop calls
the blocks; whether a model's loop bears a growing batch is tried out, once for every use.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache

from mechlens.models.bridge import LanguageModel, device_of, dtype_of, n_layers
from mechlens.models.engine.caches import with_cache
from mechlens.models.engine.intervene.token_mask import TokenMask
from mechlens.models.engine.probes import UNTRIED, apart, is_misfit, spread_tokens, tolerance
from mechlens.models.native import native, native_blocks

_FAULTS: "weakref.WeakKeyDictionary[nn.Module, dict[str, str]]" = weakref.WeakKeyDictionary()
"""Why a model bears no growing batch in a use, empty where it does; finding out costs a few short passes."""


class SharedRows:
    """The classes of rows that are alike, block by block; a class may only part from one block to the next.

    All numbers are kept on the CPU, where they can be looked at without waiting for a GPU.
    """

    def __init__(
        self, classes: Sequence[Sequence[int]], starts: Sequence[int], entry: Sequence[int] | None = None
    ) -> None:
        """`classes[block][row]` counts from 0 in order of first sight; `starts` are the rows of the shared start.

        A pass begins with the rows of `entry`, which are those of the first block if they are not given.
        """
        whole = [classes[0] if entry is None else entry, *classes]
        self.starts = torch.tensor(starts)
        self.entry = torch.tensor(_first_rows(whole[0]))
        self.of_row = _tensors(classes)
        self.first = _tensors([_first_rows(block) for block in classes])
        self.below = [torch.tensor(whole[0]), *self.of_row[:-1]]
        self._placed: dict[tuple[int, torch.device], Tensor] = {}

    @classmethod
    def apart(cls, n: int, n_blocks: int) -> "SharedRows":
        """Every row by itself, on a start of one row."""
        return cls([range(n)] * n_blocks, [0] * n)

    def on(self, device: torch.device, rows: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """Some of these numbers on a device, moved there once."""
        key = id(rows), device
        if key not in self._placed:
            self._placed[key] = rows.to(device)
        return self._placed[key]

    def cache(self, prefix: DynamicCache | None) -> DynamicCache:
        """A fresh cache that holds the start's keys and values for the classes of every block."""
        if prefix is None:
            return DynamicCache()
        starts = {id(first): self.starts[first] for first in self.first}
        layers = zip(prefix.layers, (starts[id(first)] for first in self.first), strict=True)
        return DynamicCache([self._chosen(layer, rows) for layer, rows in layers])

    def _chosen(self, layer: Any, rows: Int[Tensor, " row"]) -> tuple[Tensor, Tensor]:
        if len(layer.keys) == 1:
            return layer.keys.expand(len(rows), -1, -1, -1), layer.values.expand(len(rows), -1, -1, -1)
        return layer.keys[self.on(layer.keys.device, rows)], layer.values[self.on(layer.values.device, rows)]

    @contextlib.contextmanager
    def running(
        self, blocks: Sequence[nn.Module], token_mask: TokenMask | None = None, skip: int = 0
    ) -> Iterator[None]:
        """Lets rows join where their class parts; the pass must begin with the rows of `entry`."""
        self._advance(0, token_mask, skip)
        with contextlib.ExitStack() as stack:
            for i, block in enumerate(blocks):
                # Before the changes of the same block, which are for the rows that it has.
                hook = self._entering(i, token_mask, skip)
                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)
            yield

    def _advance(self, block: int, token_mask: TokenMask | None, skip: int) -> None:
        if token_mask is not None:
            rows = self.first[block]
            token_mask.advance(rows, torch.full_like(rows, skip), 0)

    def _entering(self, i: int, token_mask: TokenMask | None, skip: int) -> Any:
        began = len(self.entry)
        parts = len(self.first[i]) > (len(self.first[i - 1]) if i else began)
        source = self.below[i][self.first[i]] if parts else None

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


def _tensors(blocks: Sequence[Sequence[int]]) -> list[Int[Tensor, " row"]]:
    """A tensor for each block; equal ones are one."""
    known: dict[tuple[int, ...], Tensor] = {}
    return [known.setdefault(own, torch.tensor(own)) for own in map(tuple, blocks)]


def _for_any_row(value: Any, rows: int) -> Any:
    """A causal mask, the same for all rows as none is padded on the left, for any number of them."""
    return value[:1] if isinstance(value, Tensor) and value.ndim == 4 and len(value) == rows else value


def fault(model: LanguageModel, use: str, find: Callable[[], str]) -> str:
    """Why a growing batch isn't exact in a use, empty where it is; found once for a model."""
    known = _FAULTS.setdefault(model, {})
    if use not in known:
        known[use] = find()
    return known[use]


def fault_of_trial(model: LanguageModel, use: str, trial: Callable[[], list[tuple[Tensor, Tensor]]]) -> str:
    """The same of one trial, which gives pairs of what a growing batch finds and what is right."""
    try:
        pairs = trial()
    except UNTRIED as error:
        if not is_misfit(error):
            raise
        return f"a batch that grows {use} fails in it ({type(error).__name__})"
    exact = all(apart(found, right) <= tolerance(dtype_of(model)) for found, right in pairs)
    return "" if exact else f"a batch that grows {use} gives other numbers in it than one pass for each edit"


def shares_rows(model: LanguageModel) -> bool:
    """True where a growing batch gives what rows apart give, tried on a few tokens after a shared start."""
    use = "after a start"
    return n_layers(model) > 1 and not fault(
        model, use, lambda: fault_of_trial(model, use, lambda: [_merged_and_apart(model)])
    )


@torch.inference_mode()
def _merged_and_apart(model: LanguageModel) -> tuple[Tensor, Tensor]:
    blocks, device = n_layers(model), device_of(model)
    numbers = ([3, 4, 5, 6], [3, 4, 5, 6], [6, 5, 4, 3])
    rows = torch.tensor([spread_tokens(model.original_model, own) for own in numbers], device=device)
    below, above = [0, 0, 1], [0, 1, 2]
    merged = SharedRows([below] * (blocks - 1) + [above], [0, 0, 0])
    with native(model) as hf_model:
        start = DynamicCache()
        hf_model(torch.tensor([[1, 2]], device=device), **with_cache(hf_model, start))

        def logits(shared_rows: SharedRows) -> Tensor:
            with shared_rows.running(native_blocks(model), None, 2):
                tokens, cache = rows[shared_rows.entry.to(device)], shared_rows.cache(start)
                found: Tensor = hf_model(tokens, **with_cache(hf_model, cache)).logits
            return found

        return logits(merged), logits(SharedRows.apart(3, blocks))
