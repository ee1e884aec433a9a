"""Surface-matched twins: each harmful prompt beside a harmless one of the same form.

Prompts of two sources differ in much beside harm (opening, length, final mark, vocabulary), and a detector that reads
any of it does well: guards with an AUROC of .996 across sources had .59 to .69 on twins (arXiv 2607.13075). A harmful
and a harmless prompt of one family, as the built-in pairs are, are twins. The other prompts are matched within the
evaluation: same opening word, same final mark, lengths within `MOST_LONGER`; among these one to one, so that the
cosine of their TF-IDF vectors is largest in sum. A prompt without a match is in no pair.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_matrix
from scipy.sparse.csgraph import connected_components

from mechlens.methods.probing.baselines import tfidf
from mechlens.prompts.prompt import Prompt

MOST_LONGER = 1.5
"""The longer of two twins has at most so many times the other's words."""
_WORD = re.compile(r"\w+")
FAMILY, NEAREST = "family", "nearest"


@dataclass(frozen=True)
class Twin:
    """A harmful and a harmless prompt of one form, by row number."""

    harmful: int
    harmless: int
    how: str
    """ "family": written as a pair. "nearest": matched here."""
    similarity: float
    """Cosine of their TF-IDF vectors of words and pairs of words."""


@dataclass(frozen=True)
class Twins:
    """The pairs, no prompt in two of them."""

    pairs: tuple[Twin, ...]
    clusters: tuple[str, ...]
    """By prompt, twin or not: families that pairs connect are one, since they aren't independent."""

    @property
    def rows(self) -> list[int]:
        """Both sides of every pair."""
        return sorted(row for pair in self.pairs for row in (pair.harmful, pair.harmless))

    def count(self, how: str) -> int:
        """Pairs that were made in one of the two ways."""
        return sum(pair.how == how for pair in self.pairs)

    def table(self, prompts: Sequence[Prompt]) -> pd.DataFrame:
        """One row a pair: both ids, sources and texts, how they were matched, how alike they are."""
        columns = ["harmful", "harmless", "harmful_source", "harmless_source", "how", "similarity", "harmful_text"]
        rows = []
        for pair in self.pairs:
            up, down = prompts[pair.harmful], prompts[pair.harmless]
            told = (up.id, down.id, up.source, down.source, pair.how, pair.similarity, up.text, down.text)
            rows.append(told)
        return pd.DataFrame(rows, columns=[*columns, "harmless_text"])


def surface_twins(prompts: Sequence[Prompt]) -> Twins:
    """Twins among prompts labelled harmful or harmless; families first, then whoever is left by form."""
    vectors = tfidf().fit_transform([prompt.text for prompt in prompts])
    by_family = _matched(prompts, vectors, [prompt.group for prompt in prompts], FAMILY)
    taken = {row for pair in by_family for row in (pair.harmful, pair.harmless)}
    forms = [None if i in taken else _form(prompt.text) for i, prompt in enumerate(prompts)]
    pairs = [*by_family, *_matched(prompts, vectors, forms, NEAREST)]
    return Twins(tuple(pairs), _clusters(prompts, pairs))


def _form(text: str) -> tuple[str, str] | None:
    """Opening word and final mark ("" where a word comes last); None for a text without a word."""
    words = _WORD.findall(text)
    end = text.rstrip()[-1:]
    return (words[0].casefold(), "" if end.isalnum() else end) if words else None


def _matched(prompts: Sequence[Prompt], vectors: csr_matrix, groups: Sequence[object], how: str) -> list[Twin]:
    """Pairs inside groups (None is in no group) that are most alike in sum."""
    members: defaultdict[object, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        if group is not None:
            members[group][prompt.label != "harmful"].append(i)
    pairs = []
    for up, down in members.values():
        if not up or not down:
            continue
        alike = (vectors[up] @ vectors[down].T).toarray()
        allowed = np.ones_like(alike, dtype=bool) if how == FAMILY else _of_like_length(prompts, up, down)
        # One pair more is worth more than any likeness: as many pairs as there can be, and of those the most alike.
        rows, columns = linear_sum_assignment(np.where(allowed, len(up) + 1 + alike, 0.0), maximize=True)
        pairs += [
            Twin(up[row], down[column], how, float(alike[row, column]))
            for row, column in zip(rows, columns, strict=True)
            if allowed[row, column]
        ]
    return sorted(pairs, key=lambda pair: pair.harmful)


def _of_like_length(prompts: Sequence[Prompt], up: Sequence[int], down: Sequence[int]) -> NDArray[np.bool_]:
    lengths = [np.array([len(_WORD.findall(prompts[i].text)) for i in rows]) for rows in (up, down)]
    longer = np.maximum(lengths[0][:, None], lengths[1][None])
    allowed: NDArray[np.bool_] = longer <= MOST_LONGER * np.minimum(lengths[0][:, None], lengths[1][None])
    return allowed


def _clusters(prompts: Sequence[Prompt], pairs: Sequence[Twin]) -> tuple[str, ...]:
    """By prompt, the name of the first family of those that pairs connect."""
    names = list(dict.fromkeys(prompt.group for prompt in prompts))
    number = {name: i for i, name in enumerate(names)}
    ends = [[number[prompts[row].group] for row in (pair.harmful, pair.harmless)] for pair in pairs]
    first, second = np.array(ends, dtype=int).reshape(-1, 2).T
    links = coo_array((np.ones(len(first)), (first, second)), shape=(len(names), len(names)))
    _, component = connected_components(links, directed=False)
    named: dict[int, str] = {}
    for i, name in enumerate(names):
        named.setdefault(int(component[i]), name)
    return tuple(named[int(component[number[prompt.group]])] for prompt in prompts)
