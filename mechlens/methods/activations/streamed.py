"""Values too many for memory: a tensor whose numbers stay in a cache's pieces until something is computed with them."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mechlens.errors import UserError
from mechlens.methods.cache import Cache

STREAMED_FROM = 1 << 30
"""Bytes in float32: values that take more are streamed, where there is a cache to keep them; fewer lie in memory."""
STREAMED_BATCH = 1 << 28
"""Bytes in float32 of one batch of values that are streamed, and so of what is in memory while they are made."""

_aten = torch.ops.aten
_TAKES = (_aten.select.int, _aten.slice.Tensor, _aten.unbind.int, _aten.unsqueeze.default)
"""What takes a part along an axis."""


class StreamedTensor(Tensor):
    """A float32 tensor [prompt, ..., d] whose rows lie in pieces, which a cache on disk hands out memory-mapped.

    Taking prompts, levels, positions or a head reads nothing and gives another one. Anything else first reads what was
    taken into memory, so code that goes cell by cell holds one cell: `values[:, level, position].double()`.
    """

    pieces: tuple[Tensor, ...]
    """As `values`, each of some rows; the last axis, of a pattern's keys, may be shorter, and ends in NaN."""
    rows: Int[Tensor, " prompt"]
    """Where each prompt is, counted through all pieces."""
    keys: tuple[str, ...]
    """Under which the cache keeps the pieces."""

    @staticmethod
    def __new__(
        cls: type["StreamedTensor"],
        pieces: Sequence[Tensor],
        rows: Int[Tensor, " prompt"],
        keys: Sequence[str] = (),
    ) -> "StreamedTensor":
        shape = (len(rows), *pieces[0].shape[1:-1], max(piece.shape[-1] for piece in pieces))
        made: StreamedTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)
        made.pieces, made.rows, made.keys = tuple(pieces), rows, tuple(keys)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        own = args[0]
        if isinstance(own, cls):
            if func._schema.is_mutable:
                raise UserError(
                    "these activations lie on disk and can't be changed; change a copy, acts.at(...).clone()"
                )
            if func is _aten.alias.default:
                return own._same(own.pieces, own.rows)
            if func in _TAKES and (taken := own._taken(func, *args[1:])) is not None:
                return taken
            if func is _aten.index.Tensor and _of_rows(args[1]):
                return own._same(own.pieces, own.rows[args[1][0]])
        return func(*tree_map_only(cls, cls.read, args), **tree_map_only(cls, cls.read, kwargs or {}))

    def _taken(self, func: Any, axis: int = 0, *where: Any) -> Any:
        """The part that `func` takes, unread but for that of one prompt; None where it takes from the last axis."""
        ends = self.ndim + (func is _aten.unsqueeze.default)
        axis %= ends
        if axis == 0 and func is _aten.slice.Tensor:
            return self._same(self.pieces, func(self.rows, 0, *where))
        if axis == 0 and func is _aten.select.int:
            return self._same(self.pieces, func(self.rows, 0, *where)[None]).read()[0]
        if not 0 < axis < ends - 1:
            return None
        parts = [func(piece, axis, *where) for piece in self.pieces]
        if func is not _aten.unbind.int:
            return self._same(parts, self.rows)
        return [self._same(part, self.rows) for part in zip(*parts, strict=True)]

    def _same(self, pieces: Sequence[Tensor], rows: Tensor) -> "StreamedTensor":
        return StreamedTensor(pieces, rows, self.keys)

    @classmethod
    def of(cls, cache: Cache | None, keys: Sequence[str], rows: Int[Tensor, " prompt"]) -> "StreamedTensor | None":
        """The tensor whose pieces a cache keeps under these keys; None where one of them is lost."""
        pieces = [cache.get(key) if cache is not None else None for key in keys]
        whole = [unpacked(piece) for piece in pieces if piece is not None]
        return cls(whole, rows, keys) if len(whole) == len(pieces) else None

    def read(self) -> Tensor:
        """The numbers in memory, as an ordinary float32 tensor; UserError where there isn't that much memory."""
        require_memory(self.numel())
        found = torch.full(tuple(self.shape), torch.nan)
        start = 0
        for piece in self.pieces:
            here = (start <= self.rows) & (self.rows < start + len(piece))
            found[here, ..., : piece.shape[-1]] = piece[self.rows[here] - start].float()
            start += len(piece)
        return found

    def __setitem__(self, *_: Any) -> None:
        self.zero_()  # raises

    def __repr__(self) -> str:  # type: ignore[override]
        size = self.numel() * 4 / 1e9
        return f"StreamedTensor({list(self.shape)}, {size:.3g} GB in float32, unread; .read() loads it)"

    def numpy(self, *, force: bool = False) -> Any:
        return self.read().numpy(force=force)

    def tolist(self) -> Any:
        return self.read().tolist()

    def __deepcopy__(self, _: Any) -> "StreamedTensor":
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.read().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def too_many(numbers: int) -> bool:
    """Whether so many values are streamed."""
    return 4 * numbers > STREAMED_FROM


def packed(values: Float[Tensor, "row level column *axes"]) -> dict[str, Tensor]:
    """A batch for a cache: each cell in one place, in the smallest type that loses nothing, which is the model's own.

    So a bfloat16 model's take half of float32, apart from means over spans and projections.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if all(_holds(dtype, row) for row in values):
            values = values.to(dtype)
            break
    return {"cells": values.movedim(0, 2).contiguous()}


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    return torch.equal(values.to(dtype).float().view(torch.int32), values.view(torch.int32))  # bits: NaN is NaN


def unpacked(piece: dict[str, Tensor]) -> Shaped[Tensor, "row level column *axes"]:
    """What `packed` put away, not read where it is memory-mapped."""
    return piece["cells"].movedim(2, 0)


def _of_rows(indices: Sequence[Tensor | None]) -> bool:
    """Whether an index only takes rows."""
    first, *others = indices
    return first is not None and first.ndim == 1 and not any(other is not None for other in others)


def require_memory(numbers: int) -> None:
    """UserError where so many float32 numbers are more than the machine's memory holds."""
    if not hasattr(os, "sysconf"):
        return  # Windows says so itself
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * numbers > there:
        raise UserError(
            f"these activations take {4 * numbers / 1e9:.0f} GB and this machine has {there / 1e9:.0f}; collect them "
            "with cache=FolderCache(FOLDER), which streams them to disk, and take one cell at a time, "
            "acts.at(level, position), or some prompts, acts.select(rows)"
        )
