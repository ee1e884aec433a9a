"""The lines that tokens are scored along: refusal before the answer, its controls, and harmfulness of the request."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect
from mechlens.methods.activations.token_scores import Line, line_of
from mechlens.methods.activations.trace_tokens import up_to_answers
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction, direction_grid, mean_difference, random_like
from mechlens.methods.directions.methods import logistic
from mechlens.methods.probing.auroc import auroc
from mechlens.methods.probing.auroc_grid import score_grid
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.batch import TokenBatch
from mechlens.prompts.split import Split
from mechlens.studies.cliff.traces import HARMFUL, HARMLESS

REFUSED, ACCEPTED = "refused", "accepted"
BEFORE, WORDS = "answer[-1]", "inst"
"""The last token before the answer, of traces without their answers, and of the request."""
REFUSAL, HARM = "refusal", "harm"
LOGISTIC, ELSEWHERE = "refusal (logistic)", "refusal (fitted at inst)"


SHALLOW = 5
"""Levels of a model in which the last one is read too."""
FEW = 4
"""Training traces of each verdict that a class needs for its refused and complied ones to be set against each other."""


@dataclass(frozen=True)
class Lines:
    """By name: refusal, harm, controls, and random directions."""

    all: dict[str, Line]
    """Refusal first."""
    middles: dict[str, float]
    """By class, the score along refusal halfway between its complied and its refused training traces; empty where no
    class has both, so that refusal can't be told from harm."""

    @property
    def random(self) -> list[str]:
        """Names of the random ones."""
        return [name for name in self.all if name.startswith("random ")]

    @property
    def named(self) -> list[str]:
        """Names of the others."""
        return [name for name in self.all if not name.startswith("random ")]

    def apart_from_harm(self, scores: Float[Tensor, " prompt"], classes: Sequence[str]) -> Float[Tensor, " prompt"]:
        """Scores along refusal from the middle of each trace's class, NaN in a class without one; as they are where no
        class has one."""
        if not self.middles:
            return scores
        return scores - torch.tensor([self.middles.get(one, math.nan) for one in classes], dtype=scores.dtype)


def fitted_lines(
    model: LanguageModel,
    batch: TokenBatch,
    verdicts: Sequence[str],
    split: Split,
    *,
    random_directions: int,
    seed: int,
    cache: Cache | None,
) -> Lines:
    """The lines of a model's traces; see `lines_of`."""
    cut = up_to_answers(batch, loaded(model).tokenizer)
    acts = collect(model, cut, positions=[BEFORE, WORDS], cache=cache)
    before, asked = (
        replace(acts, values=acts.values[:, :, k : k + 1], positions=(acts.positions[k],)) for k in range(2)
    )
    return lines_of(before, asked, verdicts, split, random_directions=random_directions, seed=seed)


def lines_of(
    before: Activations,
    asked: Activations,
    verdicts: Sequence[str],
    split: Split,
    *,
    random_directions: int,
    seed: int,
) -> Lines:
    """Mean differences of training traces, each at the level that tells validation traces best.

    `before` is read at the last token before the answer, `asked` at the request's last. Refusal is refused minus
    complied within harmful and within harmless requests, of the classes that have some of each: all refused against
    all complied would be harm in part.
    """
    classes, before = list(asked.labels), replace(before, labels=tuple(verdicts))
    both = _with_both(verdicts, classes, split)
    within = _within(before, classes, both, split)
    apart = [[i for i in part if not both or classes[i] in both] for part in (split.train, split.validation)]
    chosen = _chosen(within, (REFUSED, ACCEPTED), *apart)
    level, train = chosen.direction.level, within.select(apart[0])
    refusal = _on_its_scale(chosen.direction, before, classes, both, split) if both else chosen
    by_probe = logistic(train, REFUSED, ACCEPTED, level, before.positions[0])
    found = {
        REFUSAL: refusal,
        HARM: _chosen(asked, (HARMFUL, HARMLESS), split.train, split.validation),
        LOGISTIC: _on_its_scale(by_probe, before, classes, both, split) if both else line_of(by_probe, train),
    }
    told = _within(replace(asked, labels=tuple(verdicts)), classes, both, split).select(apart[0])
    at_words = mean_difference(told, REFUSED, ACCEPTED, level, told.positions[0])
    if float(at_words.vector.norm()) > 0:
        found[ELSEWHERE] = line_of(at_words, told)
    drawn = random_like(refusal.direction, random_directions, seed)
    found |= {f"random {i}": replace(refusal, direction=one) for i, one in enumerate(drawn)}
    middles = {}
    for one in both:
        refused, complied = (_mean_score(refusal, before, _rows(verdicts, classes, split, said, one)) for said in _SAID)
        middles[one] = (refused + complied) / 2
    return Lines(found, middles)


_SAID = (REFUSED, ACCEPTED)


def _rows(verdicts: Sequence[str], classes: Sequence[str], split: Split, said: str, of: str) -> list[int]:
    """Training traces of a class with a verdict."""
    return [i for i in split.train if verdicts[i] == said and classes[i] == of]


def _with_both(verdicts: Sequence[str], classes: Sequence[str], split: Split) -> tuple[str, ...]:
    return tuple(
        one for one in (HARMFUL, HARMLESS)
        if min(len(_rows(verdicts, classes, split, said, one)) for said in _SAID) >= FEW
    )  # fmt: skip


def _within(acts: Activations, classes: Sequence[str], both: Sequence[str], split: Split) -> Activations:
    """Activations from the middle of their class: halfway between its complied and its refused training traces."""
    values = acts.values.clone()
    for one in both:
        rows = [i for i, own in enumerate(classes) if own == one]
        means = [acts.values[_rows(acts.labels, classes, split, said, one)].mean(dim=0) for said in _SAID]
        values[rows] -= (means[0] + means[1]) / 2
    return replace(acts, values=values)


def _mean_score(line: Line, acts: Activations, rows: Sequence[int]) -> float:
    direction = line.direction
    along = acts.at(direction.level, acts.positions[0])[list(rows)].double() @ direction.unit.double()
    return float(line(along).mean())


def _on_its_scale(
    direction: Direction, acts: Activations, classes: Sequence[str], both: Sequence[str], split: Split
) -> Line:
    """The direction's line, 0 at complied and 1 at refused training traces, each the mean of its classes' means."""
    plain = Line(direction, 0.0, 1.0)
    one, zero = (
        sum(_mean_score(plain, acts, _rows(acts.labels, classes, split, said, name)) for name in both) / len(both)
        for said in _SAID
    )
    return Line(direction, zero, one)


def _chosen(acts: Activations, contrast: tuple[str, str], fitted: Sequence[int], validation: Sequence[int]) -> Line:
    """Of equal levels the last, since what is said follows from there.

    Never the embedding, nor in a deep model the last block's output: its sizes differ so much between tokens that a
    scale from one token means nothing at others.
    """
    train, chosen = acts.select(fitted), acts.select(validation)
    chosen = chosen if set(chosen.labels) == set(contrast) else train  # few traces, all of one kind
    grid = direction_grid(train, *contrast)
    areas = auroc(score_grid(chosen, grid)[:, 0], torch.tensor([own == contrast[0] for own in chosen.labels]))
    among = acts.levels[1:-1] if len(acts.levels) > SHALLOW else acts.levels[1:]
    level = max(among, key=lambda one: (float(areas[acts.levels.index(one)]), one))
    return line_of(grid.at(level, acts.positions[0]), train)
