"""What the model computed: residual-stream vectors that carry their labels with them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy
    import pandas


@dataclass(frozen=True)
class Activations:
    """Vectors of many prompts at named levels and positions (float32, on the CPU).

    Level l < L is `resid_pre` of block l (level 0: the embedding); level L is the last block's output
    before the final norm.
    """

    values: Float[Tensor, "prompt level position d_model"]
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

    def at(self, level: int, position: str) -> Float[Tensor, "prompt d_model"]:
        """The vectors of every prompt at one level and one named position."""
        if level not in self.levels:
            raise UserError(f"level {level} was not collected; there are levels {list(self.levels)}")
        return self.values[:, self.levels.index(level), column_of(position, self.positions, self.last)]

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
        )

    def numpy(self) -> "numpy.ndarray":
        """The values as a NumPy array with axes (prompt, level, position, d_model)."""
        return self.values.numpy()

    def table(self) -> "pandas.DataFrame":
        """One row per prompt, level and position: id, label, family and the norm of the vector."""
        import pandas as pd

        axes = [range(len(self.ids)), self.levels, self.positions]
        frame = pd.MultiIndex.from_product(axes, names=["row", "level", "position"]).to_frame(index=False)
        rows = frame.pop("row").to_numpy()
        for column, values in (("family", self.families), ("label", self.labels), ("id", self.ids)):
            frame.insert(0, column, [values[i] for i in rows])
        frame["norm"] = self.values.norm(dim=-1).reshape(-1).numpy()
        return frame


def one_cell(acts: Activations, level: int, position: str) -> Activations:
    """The activations of one level and one named position."""
    name = acts.positions[column_of(position, acts.positions, acts.last)]
    return replace(acts, values=acts.at(level, name)[:, None, None], levels=(level,), positions=(name,))


def column_of(position: str, positions: Sequence[str], last: str) -> int:
    """Column of a named position, by any of its names; UserError where it wasn't collected."""
    name = stored_name(position, last)
    if name not in positions:
        raise UserError(f"position {position!r} was not collected; there are {list(positions)}")
    return list(positions).index(name)


def stored_name(position: str, last: str) -> str:
    """The name that "last" and "post[-k]" are stored under, `last` being that of the prompt's last token."""
    counted, end = _FROM_THE_END.fullmatch(position), _POST.fullmatch(last)
    if last and position in ("last", "post[-1]"):
        return last
    if counted is None or end is None or int(counted[1]) > int(end[1]) + 1:
        return position
    return f"post[{int(end[1]) + 1 - int(counted[1])}]"


_FROM_THE_END = re.compile(r"post\[-([1-9]\d*)\]")
_POST = re.compile(r"post\[(\d+)\]")
