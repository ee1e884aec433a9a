"""Is a direction more than the surface? Its AUROC beside what words, tokens and confounds tell, paired by prompt.

Every prompt is scored out of fold, by directions and baselines alike, and a direction is ahead of a baseline where the
interval of the paired difference lies above 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.methods.activations.activations import Activations, column_of, one_cell
from mechlens.methods.directions.methods import MEAN_DIFFERENCE, grid_by
from mechlens.methods.probing.beyond_words import levels_of, read_numbers, read_vectors, read_words
from mechlens.methods.probing.confounds import Confound
from mechlens.methods.probing.within_folds import Folds, auroc_gain, folds_of, mean_auroc
from mechlens.methods.shown import html_with
from mechlens.methods.statistics.effect_size import mean_effect
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import one_thread
from mechlens.models.sites import RESIDUAL

SURFACE = {
    "tfidf": "the words (TF-IDF)",
    "mean_embedding": "the mean token embedding",
    "token": "the token standing there",
    "length": "the length",
    "system_prompt": "the system prompt",
    "turns": "the number of turns",
    "source": "the source",
    "opening": "the first words",
    "ending": "the last words",
}
"""What a direction has to be ahead of, in words."""
TOKEN = "token"


@dataclass(frozen=True, repr=False)
class Ahead:
    """The direction at one position, its level chosen inside the folds, beside everything that the surface tells."""

    position: str
    auroc: Estimate
    """Of the direction."""
    effect: Estimate
    """Hedges' g of the direction."""
    surface: Mapping[str, Estimate]
    """AUROC of each baseline, by the names of `SURFACE`."""
    gains: Mapping[str, Estimate]
    """AUROC of the direction minus that of each baseline, paired."""

    @property
    def clear(self) -> bool:
        """Whether it is more than every baseline, by the lower bounds."""
        return bool(self.gains) and not self.ties

    @property
    def ties(self) -> tuple[str, ...]:
        """Baselines that it isn't clearly ahead of, the nearest first."""
        near = [name for name, gain in self.gains.items() if not (gain.measurable and gain.low > 0)]
        return tuple(sorted(near, key=lambda name: (self.gains[name].value, self.gains[name].low)))

    @property
    def nearest(self) -> str:
        """The baseline that it is least ahead of."""
        return (*self.ties, *sorted(self.gains, key=lambda name: self.gains[name].low))[0]

    def __repr__(self) -> str:
        gain, beside = self.gains[self.nearest].brief, self.surface[self.nearest].brief
        return f"Ahead({self.position}: AUROC {self.auroc}, {gain} ahead of {SURFACE[self.nearest]}, {beside})"

    def _repr_html_(self) -> str:
        return html_with(repr(self), self.table())

    def table(self) -> pd.DataFrame:
        """One row for each baseline: position, baseline, its AUROC and the gain over it, both with their interval."""
        rows = [
            {"position": self.position, "baseline": name, **self.surface[name].row("auroc"), **gain.beside("gain")}
            for name, gain in self.gains.items()
        ]
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class SurfaceScores:
    """What the prompts' surface tells at any position, every prompt scored out of fold."""

    folds: Folds
    scores: Mapping[str, Float[Tensor, "repeat prompt"]]


@one_thread()
def surface_scores(
    positive: Sequence[bool],
    families: Sequence[str],
    texts: Sequence[str],
    mean_embeddings: Float[Tensor, "prompt d_model"],
    n_tokens: Int[Tensor, " prompt"],
    confounds: Sequence[Confound],
    seed: int,
) -> SurfaceScores:
    """Words, mean embedding, length, and each confound; these come scored in the folds of the same seed."""
    folds = folds_of(torch.tensor(positive), families, seed)
    found = {
        "tfidf": read_words(texts, folds),
        "mean_embedding": read_vectors(mean_embeddings[:, None], folds),
        "length": read_numbers(n_tokens.double(), folds),
    }
    # A length that is a confound is told by its characters, which the warning about it names.
    return SurfaceScores(folds, found | {one.name: one.scores for one in confounds})


def token_read(acts: Activations) -> bool:
    """Whether the tokens themselves are among the activations: level 0 of the residual stream."""
    return acts.site == RESIDUAL and 0 in acts.levels


def ahead_at(acts: Activations, contrast: tuple[str, str], position: str, surface: SurfaceScores, method: str) -> Ahead:
    """The direction at one position; the level, above 0, is chosen by mean differences inside each fold."""
    folds, name = surface.folds, acts.positions[column_of(position, acts.positions, acts.last)]
    levels = [level for level in acts.levels if level > 0 or not token_read(acts)]
    column = acts.values[:, -len(levels) :, acts.positions.index(name)]

    def read(fit: list[int], row: int) -> Tensor:
        values = column[:, row].double()
        if method == MEAN_DIFFERENCE:
            own = folds.positive[fit]
            line = values[fit][own].mean(dim=0) - values[fit][~own].mean(dim=0)
        else:
            cell = one_cell(acts, levels[row], name).select(fit)
            line = grid_by(cell, *contrast, method).vectors[0, 0].double()
        scores = values @ line
        return scores - folds.middle(scores, fit)

    ours = folds.scored(read, levels_of(column, folds))
    others = dict(surface.scores)
    if token_read(acts):
        others[TOKEN] = read_vectors(acts.at(0, name)[:, None], folds)
    return Ahead(
        position=name,
        auroc=mean_auroc(ours, folds),
        effect=mean_effect(ours, folds.positive, folds.families),
        surface={key: mean_auroc(scores, folds) for key, scores in others.items()},
        gains={key: auroc_gain(ours, scores, folds) for key, scores in others.items()},
    )


@one_thread()
def ahead_of_surface(
    acts: Activations, contrast: tuple[str, str], positions: Sequence[str], surface: SurfaceScores, method: str
) -> tuple[Ahead, ...]:
    """The first position, of the strongest first, and a further one only where the token standing there alone ties.

    What the words tell they tell about every position, so there is nothing to gain from trying all of them.
    """
    tried: list[Ahead] = []
    for position in positions if any(acts.levels) else ():
        tried.append(ahead_at(acts, contrast, position, surface, method))
        if tried[-1].ties != (TOKEN,):
            break
    return tuple(tried)
