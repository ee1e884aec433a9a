"""What every token of a trace says along a few directions, in one pass, counted from where the answer starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect
from mechlens.methods.activations.trace_tokens import trace_parts
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.batch import TokenBatch
from mechlens.registry import unknown_name


@dataclass(frozen=True)
class Line:
    """A direction with a scale: its two classes' mean projections count as 0 and as 1.

    >>> model = ml.load("smollm2")
    >>> acts = ml.collect(model, [*ml.builtin_prompts("harmful")[:4], *ml.builtin_prompts("harmless")[:4]])
    >>> line = ml.line_of(ml.mean_difference(acts, "harmful", "harmless", level=2, position="last"), acts)
    >>> line.zero < line.one
    True
    """

    direction: Direction
    zero: float
    one: float

    def __call__(self, projections: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Scores of projections on the direction's unit vector."""
        return (projections.double() - self.zero) / (self.one - self.zero)


@dataclass(frozen=True, repr=False)
class TokenScores:
    """Scores of every token along every line. Place 0 is the last token before the answer, the thought has negative
    places, and the answer begins at 1; NaN where a trace has no such token.

    >>> model = ml.load("smollm2")
    >>> acts = ml.collect(model, [*ml.builtin_prompts("harmful")[:4], *ml.builtin_prompts("harmless")[:4]])
    >>> line = ml.line_of(ml.mean_difference(acts, "harmful", "harmless", level=2, position="last"), acts)
    >>> traces = [ml.Trace(ml.Prompt("1", "Bake a cake."), "Easy.", "Mix."), ml.Trace(ml.Prompt("2", "Hi."), "", "Hi!")]
    >>> scores = ml.token_scores(model, ml.trace_batch(model, traces), {"harm": line})
    >>> scores.values.shape[:2], scores.parts[0][scores.places.index(1)]
    (torch.Size([1, 2]), 'answer')
    """

    values: Float[Tensor, "line prompt place"]
    names: tuple[str, ...]
    """Of the lines."""
    ids: tuple[str, ...]
    places: tuple[int, ...]
    parts: tuple[tuple[str, ...], ...]
    """By prompt and place: prompt, template, thinking or answer; "" where there is no token."""

    def of(self, line: str) -> Float[Tensor, "prompt place"]:
        """The scores along one line."""
        if line not in self.names:
            raise unknown_name("line", line, self.names)
        return self.values[self.names.index(line)]

    def at(self, line: str, place: int) -> Float[Tensor, " prompt"]:
        """The scores at one place."""
        if place not in self.places:
            raise UserError(f"there is no place {place}; there are {self.places[0]} to {self.places[-1]}")
        return self.of(line)[:, self.places.index(place)]

    def inside(self, part: str) -> Bool[Tensor, "prompt place"]:
        """Which tokens are of a part."""
        return torch.tensor([[own == part for own in row] for row in self.parts])

    def __repr__(self) -> str:
        names = ", ".join(self.names)
        return f"TokenScores({len(self.ids)} traces along {names}; places {self.places[0]} to {self.places[-1]})"

    def curve(self, line: str, rows: Sequence[int]) -> pd.DataFrame:
        """The mean over some of the traces at each place, of those that have it, with 1.96 standard errors."""
        values = self.of(line)[torch.as_tensor(list(rows), dtype=torch.long)]
        there = ~values.isnan()
        n = there.sum(dim=0)
        mean = values.nanmean(dim=0)
        spread = (values - mean).square().nansum(dim=0) / (n - 1).clamp(min=1)
        reach = torch.where(n > 1, 1.96 * (spread / n.clamp(min=1)).sqrt(), torch.nan)
        columns = {"place": self.places, "score": mean, "low": mean - reach, "high": mean + reach, "n": n}
        return pd.DataFrame({name: list(map(float, column)) for name, column in columns.items()}).query("n > 0")


def line_of(direction: Direction, acts: Activations) -> Line:
    """The direction's line, on which the means of its two classes, in the activations it was fitted on, are 0 and 1.

    UserError where the means don't differ along it.

    >>> model = ml.load("smollm2")
    >>> acts = ml.collect(model, [*ml.builtin_prompts("harmful")[:4], *ml.builtin_prompts("harmless")[:4]])
    >>> line = ml.line_of(ml.mean_difference(acts, "harmful", "harmless", level=2, position="last"), acts)
    >>> round(float(line(acts.at(2, "last")[:4] @ line.direction.unit).mean()), 3)
    1.0
    """
    along = acts.at(direction.level, direction.position).double() @ direction.unit.double()
    one, zero = (float(along[[own == label for own in acts.labels]].mean()) for label in direction.contrast)
    if not one > zero:
        raise UserError(
            f"the means of {direction.contrast[0]} and {direction.contrast[1]} don't differ along the direction "
            f"({one:.3g} and {zero:.3g}), so it has no scale; give the activations that it was fitted on"
        )
    return Line(direction, zero, one)


def token_scores(
    model: LanguageModel, batch: TokenBatch, lines: Mapping[str, Line], *, cache: Cache | None = None
) -> TokenScores:
    """Scores of every token of traces (`trace_batch`) along lines of any levels, by one pass over each trace.

    Traces whose thought never ends have no place to count from; UserError for these.

    >>> model = ml.load("smollm2")
    >>> acts = ml.collect(model, [*ml.builtin_prompts("harmful")[:4], *ml.builtin_prompts("harmless")[:4]])
    >>> line = ml.line_of(ml.mean_difference(acts, "harmful", "harmless", level=2, position="last"), acts)
    >>> traces = [ml.Trace(ml.Prompt("1", "Bake a cake."), "Easy.", "Mix."), ml.Trace(ml.Prompt("2", "Hi."), "", "Hi!")]
    >>> scores = ml.token_scores(model, ml.trace_batch(model, traces), {"harm": line})
    >>> scores.values.shape[:2], scores.parts[0][scores.places.index(1)]
    (torch.Size([1, 2]), 'answer')
    """
    if not lines:
        raise UserError("there is no line to score tokens along; give at least one")
    found = trace_parts(batch, loaded(model).tokenizer)
    endless = [batch.prompts[i].id for i, end in enumerate(found.ends.tolist()) if end < 0]
    if endless:
        raise UserError(f"the thought of {endless[0]!r} never ends ({len(endless)} traces); leave such traces out")
    levels = sorted({line.direction.level for line in lines.values()})
    acts = collect(
        model, batch, positions=["prompt[*]", "answer[*]"], levels=levels, cache=cache,
        project=[line.direction for line in lines.values()],
    )  # fmt: skip
    columns = [levels.index(line.direction.level) for line in lines.values()]
    read = torch.stack([
        line(acts.values[:, row, :, i]) for i, (row, line) in enumerate(zip(columns, lines.values(), strict=True))
    ])  # fmt: skip
    before = int(found.ends.max())
    after = max(len(own) - 1 - end for own, end in zip(found.parts, found.ends.tolist(), strict=True))
    values = torch.full((len(lines), len(found.parts), before + 1 + after), torch.nan, dtype=torch.float64)
    parts = []
    for i, (own, end) in enumerate(zip(found.parts, found.ends.tolist(), strict=True)):
        start = before - end
        # Left to right the columns that this prompt has are its tokens.
        values[:, i, start : start + len(own)] = read[:, i, acts.present[i]]
        parts.append(("",) * start + own + ("",) * (values.shape[2] - start - len(own)))
    return TokenScores(values, tuple(lines), acts.ids, tuple(range(-before, after + 1)), tuple(parts))
