"""What else differs between the two sides of a contrast: system prompt, turns, source, opening, ending, length.

Each is given the AUROC that it alone reaches, every prompt scored by a fit to others. A direction that tells the sides
apart no better than one of these may be a direction of that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import quoted, warn
from mechlens.methods.probing.beyond_words import read_numbers
from mechlens.methods.probing.within_folds import Folds, folds_of, mean_auroc
from mechlens.methods.shown import cut
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import fewest_families
from mechlens.prompts.prompt import Prompt

TELLING = 0.55
"""A feature whose AUROC lies above this, by the lower bound, is warned about."""
EDGE = 2
"""Words that an opening or an ending is made of."""


@dataclass(frozen=True, repr=False)
class Confound:
    """Something that the prompts show and that isn't meant to be the concept."""

    name: str
    """system_prompt, turns, source, opening, ending or length."""
    words: str
    """How the sides differ in it, as a part of a sentence."""
    auroc: Estimate
    """Of telling the sides apart by it alone, out of fold."""
    scores: Float[Tensor, "repeat prompt"]

    @property
    def telling(self) -> bool:
        """Clearly more than chance."""
        return self.auroc.measurable and self.auroc.low > TELLING

    def __repr__(self) -> str:
        return f"Confound({self.name}: {cut(self.words)}; AUROC {self.auroc} by that alone)"

    @property
    def sentence(self) -> str:
        """How the sides differ in it, with the AUROC; of many texts only the commonest is counted, as an example."""
        alone = f"(AUROC {self.auroc.value:.2f} by that alone)"
        said = {"opening": "how they begin tells", "ending": "how they end tells", "source": "the source tells"}
        return (
            f"{said[self.name]} them apart {alone}, such as {self.words}"
            if self.name in said
            else (f"{self.words} {alone}")
        )


def find_confounds(prompts: Sequence[Prompt], positive: Bool[Tensor, " prompt"], seed: int = 0) -> tuple[Confound, ...]:
    """Everything in which the prompts differ at all, the most telling first; nothing where a side has one family.

    Of sides drawn alike, 20 to 80 prompts each, something is telling in 0% to 1.5% (`scripts/error_rates_direction.py
    --confounds`).
    """
    families = [prompt.group for prompt in prompts]
    if fewest_families(positive, families) < 2:
        return ()
    folds, found = folds_of(positive, families, seed), []
    for name, values in _features(prompts, positive).items():
        if len(set(values)) > 1:
            scores = _read(values, folds)
            found.append(Confound(name, _in_words(name, values, positive), mean_auroc(scores, folds), scores))
    return tuple(sorted(found, key=lambda one: -one.auroc.value))


def compare_sides(positive: Sequence[Prompt], negative: Sequence[Prompt], sides: tuple[str, str]) -> None:
    """Warns of what tells two sides apart besides the concept (see `warn_of_confounds`)."""
    both = [*positive, *negative]
    warn_of_confounds(find_confounds(both, torch.arange(len(both)) < len(positive)), sides)


def warn_of_confounds(confounds: Sequence[Confound], sides: tuple[str, str]) -> None:
    """A UserWarning that names what is telling, in one sentence; nothing where nothing is."""
    telling = [one.sentence for one in confounds if one.telling]
    if telling:
        warn(
            f"the {sides[0]} and the {sides[1]} prompts differ in more than what they mean, {sides[0]} first: "
            f"{'; '.join(telling)}; what is found may be that, so make the sides alike in it",
        )


Values = Sequence[float] | Sequence[str]


def _features(prompts: Sequence[Prompt], positive: Bool[Tensor, " prompt"]) -> Mapping[str, Values]:
    """By name; numbers are read by size, texts by what they say."""
    words = [prompt.text.casefold().split() for prompt in prompts]
    found: dict[str, Values] = {
        "system_prompt": ["" if prompt.system is None else f"x{prompt.system}" for prompt in prompts],
        "turns": [float(len(prompt.history)) for prompt in prompts],
        "opening": [" ".join(own[:EDGE]) for own in words],
        "ending": [" ".join(own[-EDGE:]) for own in words],
        "length": [float(len(prompt.text)) for prompt in prompts],
    }
    sources = [prompt.source for prompt in prompts]
    ours, theirs = (set(side) for side in _sides(sources, positive))
    # Where each side has files of its own, as two files given by hand have, the source is the contrast itself.
    return found | {"source": sources} if ours & theirs else found


def _read(values: Values, folds: Folds) -> Float[Tensor, "repeat prompt"]:
    """Every prompt's score out of fold: a number by its size, a text by how often it was positive among the others."""
    if not isinstance(values[0], str):
        return read_numbers(torch.tensor(values, dtype=torch.float64), folds)

    def by_text(fit: list[int], _: int) -> Tensor:
        counts: dict[object, list[int]] = {}
        for i in fit:
            counts.setdefault(values[i], [0, 0])[int(folds.positive[i])] += 1
        odds = {text: math.log((up + 0.5) / (down + 0.5)) for text, (down, up) in counts.items()}
        return torch.tensor([odds.get(text, 0.0) for text in values], dtype=torch.float64)

    return folds.scored(by_text)


def _sides(values: Sequence[Any], positive: Bool[Tensor, " prompt"]) -> tuple[list[Any], list[Any]]:
    """The values of the positive prompts, and of the others."""
    both = list(zip(values, positive.tolist(), strict=True))
    return [value for value, own in both if own], [value for value, own in both if not own]


def _in_words(name: str, values: Values, positive: Bool[Tensor, " prompt"]) -> str:
    ours, theirs = _sides(values, positive)
    if name in ("length", "turns"):
        what = {"length": "characters", "turns": "earlier messages"}[name]
        return f"a median of {median(ours):g} against {median(theirs):g} {what}"
    if name == "system_prompt":
        given = [sum(v != "" for v in side) for side in (ours, theirs)]
        if given[0] * len(theirs) != given[1] * len(ours):
            return f"{given[0]} of {len(ours)} against {given[1]} of {len(theirs)} have a system prompt"
    share = {v: ours.count(v) / len(ours) - theirs.count(v) / len(theirs) for v in {*ours, *theirs}}
    most = max(sorted(share, key=str), key=lambda v: abs(share[v]))
    said = {"opening": "begin with", "ending": "end with", "source": "are from"}.get(name, "have the system prompt")
    shown = str(most).removeprefix("x") if name == "system_prompt" else str(most)
    return f"{ours.count(most)} of {len(ours)} against {theirs.count(most)} of {len(theirs)} {said} {quoted(shown)}"
