"""Interventions placed in a batch: named layers, positions and strengths as numbers for each row."""

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.directions.direction import Direction
from mechlens.methods.steering.interventions import (
    ALL,
    Ablate,
    Act,
    Add,
    Intervention,
    Replace,
    ReplaceComponent,
    level_above,
)
from mechlens.models.engine.intervene.changed import AddAlong, Change, SetVector
from mechlens.models.engine.intervene.gates import Decider, Gate
from mechlens.prompts.batch import TokenBatch

_SPAN = re.compile(r"token\[(\d*):(\d*)\]")
Tokens = tuple[int, ...] | None
"""Indices in a prompt without padding; None is all of them."""


class Placement:
    """Turns interventions into the changes of one row; unit vectors and token indices are worked out once."""

    def __init__(self, n_layers: int, batch: TokenBatch | None) -> None:
        self.all_layers, self.batch = tuple(range(n_layers)), batch
        self._units: dict[int, Tensor] = {}
        self._deciders: dict[int, Decider] = {}
        self._rows: dict[int, TokenBatch] = {}
        self._tokens: dict[tuple[int, str], tuple[int, ...]] = {}

    def changes(self, row: int, interventions: Sequence[Intervention]) -> list[Change]:
        """What the interventions do to a row of the batch; without a batch, what they do to every token."""
        return [change for one in interventions for change in self._of(row, one)]

    def _of(self, row: int, one: Intervention) -> list[Change]:
        if isinstance(one, Act):
            return self._done(row, one)
        reads = tuple((level, self._token(row, name)) for level, name in one.places)
        decider = self._deciders.setdefault(id(one), one.decider)
        return [
            replace(change, gate=Gate(decider, reads, output))
            for act, output in one.acts
            for change in self._done(row, act)
        ]

    def _token(self, row: int, name: str) -> int:
        found = self._at(row, name)
        if len(found) != 1:
            raise UserError(f"a condition reads one token, and {name} are {len(found)}; name one, such as inst or last")
        return found[0]

    def _done(self, row: int, one: Act) -> list[Change]:
        layers = one.layers if isinstance(one.layers, tuple) else self.all_layers
        places = self._places(row, one)
        if isinstance(one, Replace):
            return self._put(one, places)
        sites = one.sites if isinstance(one, Ablate) else (one.site,)
        answers = one.phase != "prompt"
        unit = self._unit(one.direction)
        if isinstance(one, Ablate) or one.unit != "share":
            tokens = None if places[0][1] is None else tuple(t for _, found in places for t in found or ())
            what = AddAlong(unit, _amount(one), not isinstance(one, Add))
            return [Change(what, sites, layers, tokens, answers, one.answer_tokens)]
        return [
            Change(AddAlong(unit, _amount(one, _norm(one, layer, name)), not isinstance(one, Add)), sites,
                   (layer,), tokens, answers, one.answer_tokens)
            for layer in layers
            for name, tokens in places
        ]  # fmt: skip

    def _put(self, one: Replace, places: list[tuple[str, Tokens]]) -> list[Change]:
        tokens = tuple(t for _, found in places for t in found or ())
        if len(tokens) != len(one.positions):
            raise UserError(
                f"the positions {', '.join(one.positions)} are {len(tokens)} different tokens and there are "
                f"{len(one.positions)} vectors to put there; name one token for each"
            )
        return [
            Change(SetVector(values), (one.site,), (layer,), tokens, False)
            for layer, values in zip(one.layers, one.values, strict=True)
        ]

    def _places(self, row: int, one: Act) -> list[tuple[str, Tokens]]:
        """Names and tokens; a token that two names share counts once, under the first."""
        if one.positions == ALL:
            return [(ALL, () if one.phase == "generation" else None)]
        found: list[tuple[str, Tokens]] = []
        taken: set[int] = set()
        for name in one.positions:
            for column in self._opened(name):
                tokens = tuple(t for t in self._at(row, column) if t not in taken)
                taken |= set(tokens)
                found.append((column, tokens))
        if not found:
            raise UserError(
                f"the positions {', '.join(one.positions)} name no token of raw text; choose last or token[k]"
            )
        return found

    def _opened(self, name: str) -> tuple[str, ...]:
        assert self.batch is not None
        return self.batch.resolve([name]) if name == "last" or name.startswith("post[") else (name,)

    def _at(self, row: int, name: str) -> tuple[int, ...]:
        if (row, name) not in self._tokens:
            self._tokens[row, name] = self._found(row, name)
        return self._tokens[row, name]

    def _found(self, row: int, name: str) -> tuple[int, ...]:
        assert self.batch is not None
        length, offset = int(self.batch.lengths[row]), self.batch.offset(row)
        span = _SPAN.fullmatch(name)
        if span is not None:
            found = tuple(range(length)[int(span[1] or 0) : int(span[2] or length)])
        elif name == "instruction[*]":
            start, end = (self.batch.instruction[row] - offset).tolist()
            found = tuple(range(start, end + 1))
        else:
            if row not in self._rows:
                # Alone, so that a token which only some prompts are long enough for can be named for those.
                self._rows[row] = self.batch.select([row])
            found = (int(self._rows[row].at(name)[0]) - offset,)
        if not found:
            raise UserError(f"prompt {self.batch.prompts[row].id!r} has {length} tokens and so none at {name!r}")
        return found

    def _unit(self, direction: Direction) -> Tensor:
        key = id(direction.vector)
        if key not in self._units:
            self._units[key] = (direction.vector.double() / direction.norm).float()
        return self._units[key]


def _norm(one: Add | ReplaceComponent, layer: int, position: str) -> float:
    """The length that a strength in shares is a share of."""
    if one.norms is not None:
        return one.norms.at(layer + level_above(one.site), position)
    assert one.direction.residual_norm is not None
    return one.direction.residual_norm


def _amount(one: Add | Ablate | ReplaceComponent, norm: float = 1.0) -> float:
    """Distance along the unit vector, in the residual stream's units."""
    if isinstance(one, Ablate):
        return 0.0
    strength = one.strength if isinstance(one, Add) else one.value
    return strength * {"raw": one.direction.norm, "unit": 1.0, "share": norm}[one.unit]
