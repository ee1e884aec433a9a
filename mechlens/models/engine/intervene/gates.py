"""Gates: how much of a change happens in a row, as the prompt's own pass decides.

A gate reads residuals of its row's prompt on their way up, and says by which share the changes that it guards happen,
at blocks above. What it said of a row once holds for all of the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.models.engine.intervene.token_mask import TokenMask


@runtime_checkable
class Decider(Protocol):
    """Says by which share changes happen."""

    @property
    def key(self) -> str:
        """Another text for anything that would decide otherwise."""
        ...

    def __call__(self, values: Float[Tensor, "row read d_model"]) -> Float[Tensor, "row output"]:
        """The shares of each row, from its residuals (float32); 0 is no change at all, 1 the whole."""
        ...


@dataclass(frozen=True)
class Gate:
    """What decides over a change of one row."""

    decider: Decider
    reads: tuple[tuple[int, int], ...]
    """Level and token in the row's prompt without padding, in the decider's order."""
    output: int = 0
    """Which of the decider's shares is the change's."""

    @property
    def level(self) -> int:
        """The last level that is read; a change may happen from the block of that number on."""
        return max(level for level, _ in self.reads)


@dataclass
class Decisions:
    """What the gates of a batch's rows have read and said so far."""

    gates: Sequence[Sequence[Gate]]
    """Of each row, those of its changes."""
    _read: dict[int, Tensor] = field(default_factory=dict)
    _said: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._deciders: dict[int, dict[int, Gate]] = {}
        """By decider and row a gate: those of a row and decider read the same."""
        for row, gates in enumerate(self.gates):
            for gate in gates:
                self._deciders.setdefault(id(gate.decider), {}).setdefault(row, gate)

    @property
    def levels(self) -> tuple[int, ...]:
        """Where something is read."""
        rows = [gate for gates in self._deciders.values() for gate in gates.values()]
        return tuple(sorted({level for gate in rows for level, _ in gate.reads}))

    def look(self, level: int, x: Float[Tensor, "running seq d_model"], token_mask: TokenMask) -> None:
        """Reads what lies at this level, and decides for the rows of which it was the last."""
        running = {row: i for i, row in enumerate(token_mask.rows.tolist())}
        for name, gates in self._deciders.items():
            own = [row for row in gates if row in running and not self._is_decided(name, row)]
            for row in own:
                for place, (at, token) in enumerate(gates[row].reads):
                    column = token - int(token_mask.start[running[row]])
                    if at == level and 0 <= column < x.shape[1]:
                        self._kept(name, x, gates[row])[row, place] = x[running[row], column].float()
            ready = [row for row in own if gates[row].level == level and self._is_read(name, row)]
            if ready:
                decider = gates[ready[0]].decider
                shares = decider(self._read[name][ready]).float()
                if name not in self._said:
                    self._said[name] = shares.new_full((len(self.gates), shares.shape[1]), torch.nan)
                self._said[name][ready] = shares

    def shares(self, rows: Sequence[int], gates: Sequence[Gate | None], device: torch.device) -> Float[Tensor, " row"]:
        """The share of each of these rows' changes: 1 where it has no gate."""
        found = torch.ones(len(rows), device=device)
        for i, (row, gate) in enumerate(zip(rows, gates, strict=True)):
            if gate is not None:
                if not self._is_decided(id(gate.decider), row):
                    raise UserError(
                        "what a condition reads in a prompt is not finite, so it can't be decided; load the model in "
                        "float32 or bfloat16"
                    )
                found[i] = self._said[id(gate.decider)][row, gate.output].to(device)
        return found

    def _is_decided(self, name: int, row: int) -> bool:
        return name in self._said and not bool(self._said[name][row].isnan().any())

    def _is_read(self, name: int, row: int) -> bool:
        return name in self._read and not bool(self._read[name][row].isnan().any())

    def _kept(self, name: int, x: Tensor, gate: Gate) -> Tensor:
        if name not in self._read:
            self._read[name] = torch.full(
                (len(self.gates), len(gate.reads), x.shape[-1]), torch.nan, device=x.device, dtype=torch.float32
            )
        return self._read[name]
