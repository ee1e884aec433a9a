"""One direction or a subspace; the same representation, a turned one or another: in a word and a sentence.

Error rates on planted worlds are in this folder's README.md.
"""

from dataclasses import dataclass

from mechlens.methods.geometry.similarity.in_place import RepresentationChange
from mechlens.methods.geometry.subspaces.beyond_one import BeyondOne
from mechlens.methods.statistics.estimate import Estimate
from mechlens.runs.headline import Headline

LITTLE = 0.65
"""AUROC: what is left below it is little beside what the direction reads."""
HALF = 0.5
ONE, SUBSPACE, BY_WORDS = "one direction", "a subspace", "a subspace, as the words alone have it"
NOT_READ, INCONCLUSIVE, NOT_MEASURABLE = "not read here", "inconclusive", "not measurable"
SAME, TURNED, OTHER = "the same representation", "the same shape, rotated", "another representation"
NO_MORE = "no more alike than the words make it"
RULE = (
    "Every prompt is scored by fits to other families, at the level that most of these choose. The direction is the "
    "mean difference. Left is the AUROC of the dimensions in which second moments of both classes differ most, once "
    "the direction is projected out and what remains is taken to length 1: with the means alike no linear score is "
    "left, and a class that is wider in all directions alike says nothing.\n\n"
    f"- {ONE.capitalize()}: the direction reads the concept, and what is left is below {LITTLE} by its upper bound.\n\n"
    f"- {SUBSPACE.capitalize()}: what is left is above {LITTLE} by its lower bound, above the largest of random "
    "subspaces, and above what the requests' mean token embeddings have left, by the lower bound.\n\n"
    f"- {BY_WORDS.capitalize()}: the same, but not above the embeddings.\n\n"
    f"- {NOT_READ.capitalize()}: neither the direction nor what is left is above 0.5 by its lower bound.\n\n"
    f"- {INCONCLUSIVE.capitalize()}: everything else.\n\n"
    f"- {NOT_MEASURABLE.capitalize()}: a class has too few prompts."
)
CHANGE_RULE = (
    "Two models are compared over the same prompts, without massive dimensions. In place is the cosine of their "
    "vectors, each model's about its mean; shape is unbiased CKA, which no rotation changes.\n\n"
    f"- {SAME.capitalize()}: in place is above {HALF} by its lower bound.\n\n"
    f"- {TURNED.capitalize()}: in place is below {HALF} by its upper bound, or the two have other dimensions; shape is "
    f"above {HALF} and above the CKA of the first model with the requests' mean token embeddings, by lower bounds.\n\n"
    f"- {NO_MORE.capitalize()}: the same, but not above the embeddings.\n\n"
    f"- {OTHER.capitalize()}: both are below {HALF} by their upper bounds.\n\n"
    f"- {INCONCLUSIVE.capitalize()}: everything else.\n\n"
    f"- {NOT_MEASURABLE.capitalize()}: neither concept has enough prompts of each class."
)


@dataclass(frozen=True)
class DimensionVerdict:
    """Whether a concept is one direction or a subspace."""

    concept: str
    word: str
    found: BeyondOne | None

    @property
    def headline(self) -> Headline:
        """The verdict in one sentence, with the numbers that decided."""
        if self.found is None:
            return Headline(self.word, f"too few prompts are {self.concept} or not", settle="give more prompts")
        line, left = self.found.line.brief, self.found.left.brief
        more = f"without it {self.found.k} more do with {left}"
        number = f"one direction reads what is {self.concept} with an AUROC of {line}, and {more}"
        words = "" if not self.found.words.measurable else f" (the words: {self.found.words.value:.2f})"
        settle = "more prompts would settle it" if self.word == INCONCLUSIVE else ""
        return Headline(self.word, number + words, settle=settle)


def dimension_verdict(concept: str, found: BeyondOne | None) -> DimensionVerdict:
    """The verdict on one concept of one model."""
    return DimensionVerdict(concept, NOT_MEASURABLE if found is None else _dimension_word(found), found)


def _dimension_word(found: BeyondOne) -> str:
    line, left = found.line, found.left
    if not (line.measurable and left.measurable and line.has_interval and left.has_interval):
        return NOT_MEASURABLE
    if left.low > LITTLE and not left.value <= found.random_max:
        return SUBSPACE if not found.words.measurable or found.beyond_words.low > 0 else BY_WORDS
    if line.low <= HALF and left.low <= HALF:
        return NOT_READ
    return ONE if line.low > HALF and left.high < LITTLE else INCONCLUSIVE


@dataclass(frozen=True)
class ChangeVerdict:
    """How another model's representation lies to that of the first."""

    model: str
    word: str
    found: RepresentationChange | None

    @property
    def headline(self) -> Headline:
        """The verdict in one sentence, with the numbers that decided."""
        if self.found is None:
            return Headline(self.word, f"{self.model} has no place at which both are compared")
        shape, place = self.found.shape.brief, self.found.in_place
        where = f"in place {place.brief}" if place.measurable else "in as many dimensions they don't lie"
        words = "" if not self.found.words.measurable else f" (with the words: {self.found.words.value:.2f})"
        settle = "more prompts would settle it" if self.word == INCONCLUSIVE else ""
        return Headline(self.word, f"{self.model} beside the first model: {where}, CKA {shape}{words}", settle=settle)


def change_verdict(model: str, found: RepresentationChange | None) -> ChangeVerdict:
    """The verdict on one other model."""
    return ChangeVerdict(model, NOT_MEASURABLE if found is None else _change_word(found), found)


def _change_word(found: RepresentationChange) -> str:
    shape, moved = found.shape, _below(found.in_place)
    if found.in_place.measurable and found.in_place.low > HALF:
        return SAME
    if not moved or not shape.measurable:
        return INCONCLUSIVE
    if shape.low > HALF:
        return TURNED if not found.words.measurable or found.beyond_words.low > 0 else NO_MORE
    return OTHER if shape.high < HALF else INCONCLUSIVE


def _below(in_place: Estimate) -> bool:
    """Whether prompts are clearly elsewhere; always where there are other dimensions."""
    return not in_place.measurable or in_place.high < HALF
