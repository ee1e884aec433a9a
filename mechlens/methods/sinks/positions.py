"""How much attention the answer pays to every named position of its prompt: which template tokens act as sinks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError, kind_of, quoted
from mechlens.methods.activations.collect import refuse_too_long
from mechlens.methods.progress import progress_bar
from mechlens.methods.sinks.measures import RATE
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.models.attention.watch import Attended, require_watchable, watch
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.batch import TokenBatch
from mechlens.registry import unknown_name, whole_numbers
from mechlens.settings import RESAMPLES

FIRST, TEMPLATE, WORDS = "first token", "template before", "words"
"""What stands before the named positions; the last two are means over many tokens."""
MEASURES = ("mass", "even", "heads")


@dataclass(frozen=True)
class PositionMass:
    """What every place of a prompt gets of the answer's attention, prompt by prompt; NaN where it has no answer.

    >>> model = ml.load("smollm2")
    >>> batch = ml.tokenize(["How do I bake a cake?", "Say hello."], ml.template_of(model))
    >>> answers = ml.answer(model, batch, max_new_tokens=4)
    >>> mass = ml.position_mass(model, batch, answers.tokens)
    >>> mass.positions[0], mass.positions[3], bool((mass.of("mass").sum(dim=1) <= 1).all())
    ('first token', 'inst', True)
    """

    values: Float[Tensor, "measure prompt position"] = field(repr=False)
    positions: tuple[str, ...]
    families: tuple[str, ...] = field(repr=False)

    def of(self, measure: str) -> Float[Tensor, "prompt position"]:
        """`mass`: the attention of a query in the answer, mean over heads; `even`: what even attention would give;
        `heads`: the share of heads that give more than 0.3."""
        if measure not in MEASURES:
            raise unknown_name("measure", measure, MEASURES)
        return self.values[MEASURES.index(measure)]

    def table(self, seed: int, resamples: int = RESAMPLES) -> pd.DataFrame:
        """A row for each place: mean attention and the share of heads, with intervals over prompts, and even attention.

        `even` has none: it is exact, as the lengths of these prompts and answers (and the windows) decide it.
        """
        rows = []
        for k, position in enumerate(self.positions):
            there = ~self.values[0, :, k].isnan()  # a prompt of one word has no others, a raw one no template
            families = [own for own, kept in zip(self.families, there.tolist(), strict=True) if kept]
            mass, even, heads = (values[there, k] for values in self.values)
            paid, much = (mean_estimate(own, families, seed, resamples) for own in (mass, heads))
            rows.append({"position": position, **paid.row("mass"), "even": float(even.mean()), **much.beside("heads")})
        return pd.DataFrame(rows)


def position_mass(model: LanguageModel, batch: TokenBatch, answers: Sequence[Sequence[int]]) -> PositionMass:
    """The attention that the tokens of each answer pay to the places of their prompt.

    The last template token is seen by nothing in the prompt, so the answer is asked. A place that a window hides from
    a query isn't counted for it. UserError for a model whose attention can't be read.

    >>> model = ml.load("smollm2")
    >>> batch = ml.tokenize(["How do I bake a cake?", "Say hello."], ml.template_of(model))
    >>> answers = ml.answer(model, batch, max_new_tokens=4)
    >>> mass = ml.position_mass(model, batch, answers.tokens)
    >>> mass.positions[0], mass.positions[3], bool((mass.of("mass").sum(dim=1) <= 1).all())
    ('first token', 'inst', True)
    """
    require_watchable(model)
    _require_tokens(answers)
    if not any(len(own) for own in answers):
        raise UserError("no prompt has an answer, whose attention is asked; let the model answer first")
    refuse_too_long(model, batch)
    whole = batch.with_answers(answers)
    refuse_too_long(model, whole)
    names = (FIRST, TEMPLATE, WORDS, *batch.positions)
    values = torch.full((len(MEASURES), len(batch.prompts), len(names)), torch.nan)
    rows = [i for i, own in enumerate(answers) if len(own)]
    for i in progress_bar(rows, title="attention of answers", unit="answer"):
        values[:, i] = _of_answer(model, whole.row(i), places_of(batch, i), len(batch.row(i)))
    return PositionMass(values, names, tuple(one.group for one in batch.prompts))


_TOKENS = "give the tokens of each, such as what ml.answer returns has in its tokens"


def _require_tokens(answers: object) -> None:
    if not isinstance(answers, Sequence) or isinstance(answers, str):
        raise UserError(f"answers is {kind_of(answers)}; {_TOKENS}")
    for own in answers:
        if not isinstance(own, Sequence) or isinstance(own, str):
            raise UserError(f"answers has {quoted(own)} ({kind_of(own)}); {_TOKENS}")
        whole_numbers("answers", own, "token")


def places_of(batch: TokenBatch, i: int) -> list[list[int]]:
    """The tokens of prompt `i` that stand behind each name: the first, the template's before the words, the words but
    their last, then every named position."""
    offset = batch.offset(i)
    start, end = (batch.instruction[i] - offset).tolist()
    named = (batch.index[i] - offset).tolist()
    return [[0], [*range(1, start)], [k for k in range(max(start, 1), end) if k not in named], *([k] for k in named)]


def _of_answer(
    model: LanguageModel, ids: Sequence[int], places: Sequence[Sequence[int]], begins: int
) -> Float[Tensor, "measure position"]:
    """Means over the answer's queries and all heads; of several tokens a mean, NaN of none."""
    found: list[Tensor] = []

    def see(one: Attended) -> None:
        pattern, visible = one.pattern[:, begins:].cpu(), one.visible[begins:].cpu()
        even = visible / visible.sum(dim=1, keepdim=True)
        seen = visible.sum(dim=0)
        per_head = torch.where(seen > 0, pattern.sum(dim=1) / seen.clamp(min=1), torch.nan)
        flat = torch.where(seen > 0, even.sum(dim=0) / seen.clamp(min=1), torch.nan)
        much = (per_head > RATE).float().masked_fill(per_head.isnan(), torch.nan)
        of_all = torch.stack([per_head.mean(dim=0), flat, much.mean(dim=0)])
        found.append(torch.stack([of_all[:, list(own)].nanmean(dim=1) for own in places], dim=1))

    watch(model, ids, see)
    return torch.stack(found).nanmean(dim=0)
