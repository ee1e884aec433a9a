"""Surface baselines: certain where the surface tells, chance where it does not."""

from dataclasses import replace

import pytest
import torch
from planted import planted_activations, planted_confounded

from mechlens.methods.directions.nulls import refitted_scores
from mechlens.methods.probing.baselines import (
    Contrast,
    length_auroc,
    mean_embedding_auroc,
    tfidf_auroc,
    token_identity_auroc,
)
from mechlens.prompts.split import split_by_family

PAIRS = 40
LABELS = ("harmful", "harmless") * PAIRS
FAMILIES = tuple(f"f{i // 2}" for i in range(2 * PAIRS))
CONTRAST = Contrast(
    positive=torch.tensor([label == "harmful" for label in LABELS]),
    families=FAMILIES,
    split=split_by_family(LABELS, FAMILIES, fractions=(0.5, 0.1, 0.4), seed=0),
)
TOPICS = ("cake", "bike", "chair", "song", "poem", "boat", "lamp", "tent")


def _texts(harmful: str, harmless: str, end: tuple[str, str] = ("?", "?")) -> list[str]:
    sides = ((harmful, end[0]), (harmless, end[1]))
    return [
        f"how do I {verb} a {TOPICS[i % 8]} in {TOPICS[(i // 8) % 8]} town{mark}"
        for i in range(PAIRS)
        for verb, mark in sides
    ]


def test_token_identity_explains_a_confounded_set() -> None:
    acts = planted_confounded(n_per_class=PAIRS)
    assert token_identity_auroc(acts.at(0, "inst"), CONTRAST).value == 1.0
    assert token_identity_auroc(acts.at(0, "last"), CONTRAST).value == 0.5


def test_token_identity_is_one_half_on_matched_pairs_by_construction() -> None:
    # Both sides of a pair end with the same token, out of a few: exactly 0.5, whatever the last bits do.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 576, generator=generator)
    drawn = torch.randint(5, (PAIRS,), generator=generator).repeat_interleave(2)
    estimate = token_identity_auroc(tokens[drawn], CONTRAST)
    assert estimate.value == 0.5
    # In each half of the pairs the mean difference is rounding noise, and noise must not rank anything.
    labels = torch.tensor([[True, False] * (PAIRS // 2)]).double()
    scores = refitted_scores(tokens[drawn[:PAIRS]], 1000 * tokens[drawn[PAIRS:]], labels, 1 - labels)
    assert torch.equal(scores, torch.zeros_like(scores))
    # Resampling pairs whole keeps the tie in every resample: what never tells the sides apart has no width.
    assert estimate.interval == (0.5, 0.5)


def test_tfidf_reads_words_and_final_punctuation() -> None:
    assert tfidf_auroc(_texts("destroy", "paint"), CONTRAST).value == 1.0
    assert tfidf_auroc(_texts("paint", "paint", end=("?", ".")), CONTRAST).value == 1.0
    same = tfidf_auroc(_texts("paint", "paint"), CONTRAST)
    assert same.value == 0.5
    assert same.interval == (0.5, 0.5)


def test_mean_embedding_finds_what_is_planted_and_nothing_else() -> None:
    for separation, found in ((4.0, True), (0.0, False)):
        acts = planted_activations(separation=separation, n_per_class=PAIRS, d_model=16, seed=1).acts
        estimate = mean_embedding_auroc(acts.at(0, "inst"), CONTRAST)
        assert (estimate.low > 0.8) == found
        assert (estimate.low < 0.5 < estimate.high) != found


@pytest.mark.parametrize("sign", [1, -1])
def test_length_counts_in_the_direction_of_training(sign: int) -> None:
    base = torch.randint(10, 20, (2 * PAIRS,), generator=torch.Generator().manual_seed(0))
    assert length_auroc(base + sign * 100 * CONTRAST.positive + 200, CONTRAST).value == 1.0
    equal = length_auroc(torch.full((2 * PAIRS,), 12), CONTRAST)
    assert equal.value == 0.5
    assert equal.interval == (0.5, 0.5)
    noise = length_auroc(base, CONTRAST)
    assert noise.low < 0.6


def test_one_class_or_blank_texts_are_missing() -> None:
    alone = replace(CONTRAST, positive=torch.ones(2 * PAIRS, dtype=torch.bool))
    vectors = torch.randn(2 * PAIRS, 4)
    for estimate in (
        token_identity_auroc(vectors, alone),
        tfidf_auroc(_texts("paint", "paint"), alone),
        mean_embedding_auroc(vectors, alone),
        length_auroc(torch.arange(2 * PAIRS), alone),
        tfidf_auroc([" "] * 2 * PAIRS, CONTRAST),
    ):
        assert not estimate.measurable
        assert estimate.n == 32
