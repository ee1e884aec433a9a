"""What the model computed: residual-stream vectors, or what blocks have at another site, with their labels."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.streamed import StreamedTensor
from mechlens.methods.shown import counts, few, lines
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.same import Comparable

if TYPE_CHECKING:
    import numpy
    import pandas


@dataclass(frozen=True, repr=False, eq=False)
class Activations(Comparable):
    """Values of many prompts at named levels and positions (float32, on the CPU, or on disk: `StreamedTensor`).

    Of the site "resid", level l < L is `resid_pre` of block l (level 0: the embedding); level L is the last block's
    output before the final norm. Of any other site, a level is a block.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:20], *ml.builtin_prompts("harmless")[:20]]
    >>> acts = ml.collect(model, prompts)
    >>> acts.dims
    ('prompt', 'level', 'position', 'd_model')
    >>> acts.positions[0], acts.last == acts.positions[1]  # the template's last token has a name of its own, post[k]
    ('inst', True)
    >>> acts.at(2, "inst").shape == (40, acts.values.shape[-1])
    True
    """

    values: Float[Tensor, "prompt level position *axes"]
    """NaN where a prompt doesn't have a position (see `mask`), or a pattern no such key."""
    levels: tuple[int, ...]
    positions: tuple[str, ...]
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    families: tuple[str, ...]
    """Prompts of one family never straddle a split."""
    site: str
    checkpoint: Checkpoint
    template: str
    """Fingerprint of the chat template that placed the positions."""
    engine: str = "plain"
    """Which forward pass made them: "fast" (shared prefix, early stop) or "plain"."""
    why_plain: str = ""
    """Why the plain path was taken; empty for the fast one."""
    last: str = ""
    """Name under which the last token of the prompt is stored, such as "post[5]"."""
    axes: tuple[str, ...] = ("d_model",)
    """What a value is made of: d_model, neuron, (head, d_head), (head, key), or direction where it was projected."""
    mask: Bool[Tensor, "prompt position"] | None = None
    """Which prompts have a position; None where all have all."""

    def __getitem__(self, place: tuple[int, str] | tuple[str, int, str]) -> Float[Tensor, "prompt *axes"]:
        """`acts[level, position]`, or `acts[site, level, position]`, which says so where they are another site's."""
        if place[0] != self.site and len(place) == 3:
            raise UserError(f"these activations are of {self.site}, not of {place[0]}; collect them there")
        level, position = place[-2:]
        return self.at(int(level), position)

    def at(self, level: int, position: str) -> Float[Tensor, "prompt *axes"]:
        """The values of every prompt at one level and one named position."""
        if level not in self.levels:
            raise UserError(f"level {level!r} was not collected; there are levels {list(self.levels)}")
        cell = self.values[:, self.levels.index(level), column_of(position, self.positions, self.last)]
        return cell.read() if isinstance(cell, StreamedTensor) else cell

    def cells(self) -> Iterator[tuple[int, int, Float[Tensor, "prompt *axes"]]]:
        """Every cell: the row of its level, the column of its position, and its values, read when it is asked for."""
        for row, level in enumerate(self.levels):
            for column, position in enumerate(self.positions):
                yield row, column, self.at(level, position)

    def select(self, keep: Sequence[int] | Tensor) -> "Activations":
        """The same activations for some of the prompts, in the order asked for."""
        rows = torch.as_tensor(keep, dtype=torch.long)
        chosen = rows.tolist()
        return replace(
            self,
            values=self.values[rows],
            ids=tuple(self.ids[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            families=tuple(self.families[i] for i in chosen),
            mask=None if self.mask is None else self.mask[rows],
        )

    def head(self, head: int) -> "Activations":
        """What one head has, as activations of vectors, of which directions and probes can be made."""
        if self.axes[0] != "head":
            raise UserError(f"{self.site} has no heads, only {' and '.join(self.axes)}")
        there = self.values.shape[3]
        if not 0 <= head < there:
            raise UserError(f"there is no head {head} at {self.site}; it has heads 0 to {there - 1}")
        return replace(self, values=self.values[:, :, :, head], site=f"{self.site}[{head}]", axes=self.axes[1:])

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes of `values`."""
        return ("prompt", "level", "position", *self.axes)

    @property
    def coords(self) -> dict[str, tuple[int | str, ...]]:
        """Labels along every axis: `xarray.DataArray(acts.values, acts.coords, acts.dims)` takes them."""
        sizes = dict(zip(self.axes, self.values.shape[3:], strict=True))
        own: dict[str, tuple[int | str, ...]] = {
            "prompt": self.ids,
            "level": self.levels,
            "position": self.positions,
        }
        return own | {name: tuple(range(size)) for name, size in sizes.items()}

    def numpy(self) -> "numpy.ndarray":
        """The values as a NumPy array, with the axes that `dims` names."""
        return self.values.numpy()

    def table(self) -> "pandas.DataFrame":
        """One row per prompt, level and position: id, label, family and the norm of the vector."""
        import pandas as pd

        axes = [range(len(self.ids)), self.levels, self.positions]
        frame = pd.MultiIndex.from_product(axes, names=["row", "level", "position"]).to_frame(index=False)
        rows = frame.pop("row").to_numpy()
        for column, values in (("family", self.families), ("label", self.labels), ("id", self.ids)):
            frame.insert(0, column, [values[i] for i in rows])
        norms = torch.empty(self.values.shape[:3])
        for level, position, cell in self.cells():
            norms[:, level, position] = cell.flatten(1).norm(dim=-1)
        frame["norm"] = norms.reshape(-1).numpy()
        return frame

    def to_frame(self) -> "pandas.DataFrame":
        """One row per prompt, level and position that the prompt has, one column per number of its value.

        The index has id, label, family, level and position; columns are numbered, or named by head and number.
        """
        import pandas as pd

        wide = self.table().drop(columns="norm")
        sizes = [range(size) for size in self.values.shape[3:]]
        columns = pd.MultiIndex.from_product(sizes, names=self.axes) if len(sizes) > 1 else pd.Index(sizes[0])
        frame = pd.DataFrame(
            self.values.flatten(3).flatten(0, 2).numpy(), pd.MultiIndex.from_frame(wide), columns.rename(self.axes)
        )
        present = self.present.unsqueeze(1).expand(-1, len(self.levels), -1).reshape(-1)
        return frame[present.numpy()]

    @property
    def present(self) -> Bool[Tensor, "prompt position"]:
        """Which prompts have which position."""
        whole = torch.ones(len(self.ids), len(self.positions), dtype=torch.bool)
        return whole if self.mask is None else self.mask

    def broken_levels(self) -> list[int]:
        """Levels at which some value isn't finite."""
        broken = {row for row, _, values in self.cells() if not bool(torch.isfinite(values).all())}
        return [self.levels[row] for row in sorted(broken)]

    def require_vectors(self) -> None:
        """UserError unless every prompt has one vector at every level and position, as directions and probes need."""
        if len(self.axes) > 1:
            raise UserError(f"at {self.site} a token has a value for every head; take one head's with acts.head(h)")
        if self.axes == ("key",) and any(bool(values.isnan().any()) for *_, values in self.cells()):
            raise UserError(
                "prompts of different lengths have different keys, so no vectors can be made of their patterns"
            )
        if self.mask is not None and not bool(self.mask.all()):
            row, column = (~self.mask).nonzero()[0].tolist()
            raise UserError(
                f"prompt {self.ids[row]!r} has no {self.positions[column]}; collect the span with reduce='mean', or "
                "select prompts and positions that all have"
            )

    def require_consistent(self) -> None:
        """UserError where names and values aren't of as many prompts, levels, positions and axes as each other."""
        named = (len(self.ids), len(self.levels), len(self.positions))
        by_prompt = {len(self.labels), len(self.families)} == {len(self.ids)}
        if tuple(self.values.shape[:3]) != named or len(self.values.shape) != len(self.dims) or not by_prompt:
            raise UserError(
                f"the activations have values of the sizes {list(self.values.shape)}, and name {named[0]} prompts "
                f"({len(self.labels)} labels, {len(self.families)} families), {named[1]} levels, {named[2]} positions "
                f"and the axes {', '.join(self.axes)}; collect them again"
            )

    def __repr__(self) -> str:
        sizes = zip(self.dims, self.values.shape, strict=True)
        facts = {
            "sizes": ", ".join(f"{name} {size}" for name, size in sizes),
            "levels": few(self.levels),
            "positions": few(self.positions),
            "last": self.last,
            "labels": counts([label or "without one" for label in self.labels]) if any(self.labels) else "",
            "on disk": repr(self.values) if isinstance(self.values, StreamedTensor) else "",
        }
        return lines(f"Activations of {self.checkpoint.name} at {self.site}", facts)


def one_cell(acts: Activations, level: int, position: str) -> Activations:
    """The activations of one level and one named position."""
    column = column_of(position, acts.positions, acts.last)
    name, mask = acts.positions[column], acts.present[:, column, None]
    values = acts.at(level, name)[:, None, None]
    return replace(acts, values=values, levels=(level,), positions=(name,), mask=None if bool(mask.all()) else mask)


def column_of(position: str, positions: Sequence[str], last: str) -> int:
    """Column of a named position, by any of its names; UserError where it wasn't collected."""
    name = stored_name(position, last, positions)
    if name not in positions:
        raise UserError(f"position {position!r} was not collected; there are {list(positions)}")
    return list(positions).index(name)


def stored_name(position: str, last: str, positions: Sequence[str]) -> str:
    """The name that "last" and "post[-k]" are stored under, `last` being that of the prompt's last token.

    In raw text "inst" is stored as "last" too: of what has no column for the end of the words.
    """
    counted, end = _FROM_THE_END.fullmatch(position), _POST.fullmatch(last)
    raw_text = last == "last" and "inst" not in positions
    if last and (position in ("last", "post[-1]") or (position == "inst" and raw_text)):
        return last
    if counted is None or end is None or int(counted[1]) > int(end[1]) + 1:
        return position
    return f"post[{int(end[1]) + 1 - int(counted[1])}]"


_FROM_THE_END = re.compile(r"post\[-([1-9]\d*)\]")
_POST = re.compile(r"post\[(\d+)\]")
