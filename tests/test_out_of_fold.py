"""Scores out of fold, and worlds of one variable, are what one fit and one world at a time give."""

import math

import numpy as np
import pytest
import torch
from planted_worlds import World, world

from mechlens.errors import UserError
from mechlens.methods.directions.nulls import LabelledVectors
from mechlens.methods.probing.auroc import auroc
from mechlens.methods.probing.out_of_fold import OutOfFoldScores, out_of_fold_null, out_of_fold_scores
from mechlens.methods.statistics.resample import Fold, family_folds, permuted_labels
from mechlens.studies.separate.dissociation import Places, contrast_of, without_topics
from mechlens.studies.separate.one_factor import one_factor_worlds

FOLDS, SEEDS = 4, 2


@pytest.fixture(scope="module")
def planted() -> World:
    return world("two variables", n=120, correlation=0.3, seed=1)


def quadrants(planted: World) -> list[str]:
    return [
        f"{'refused' if refused else 'accepted'}_{'harmful' if harmful else 'harmless'}"
        for harmful, refused in zip(planted.harmful, planted.refused, strict=True)
    ]


def folds_of(planted: World) -> list[tuple[Fold, ...]]:
    return [family_folds(quadrants(planted), planted.acts.families, FOLDS, seed) for seed in range(SEEDS)]


def fitted(values: torch.Tensor, rows: list[int], positive: torch.Tensor) -> torch.Tensor:
    """All prompts by one mean difference."""
    own = positive[rows]
    up, down = values[rows][own].mean(dim=0), values[rows][~own].mean(dim=0)
    return (values - (up + down) / 2) @ (up - down) / (up - down).norm()


def test_every_prompt_is_scored_by_the_other_folds(planted: World) -> None:
    folds, positive = folds_of(planted), torch.tensor(planted.harmful)
    member = torch.tensor(planted.paired)
    found = out_of_fold_scores(planted.acts, positive, member, folds)
    values = planted.acts.values.double()
    by_level = torch.zeros_like(found.by_level)
    for column in range(2):
        chosen = []
        for seed, own in enumerate(folds):
            for fold in own:
                rows = [i for i in fold.fitted if member[i]]
                quality = []
                for level in range(3):
                    by_level[level, column, list(fold.scored)] += fitted(values[:, level, column], rows, positive)[
                        list(fold.scored)
                    ] / len(folds)
                    inner = torch.full((len(positive),), math.nan, dtype=torch.float64)
                    for other in own:
                        rest = [i for i in rows if i not in set(other.scored)]
                        if other is not fold:
                            inner[list(other.scored)] = fitted(values[:, level, column], rest, positive)[
                                list(other.scored)
                            ]
                    quality.append(float(auroc(inner[rows], positive[rows])) if level else -1.0)
                chosen.append(int(np.argmax(quality)))
                level = found.chosen[column][len(chosen) - 1]
                assert quality[level] == pytest.approx(max(quality), abs=1e-12)
                expected = fitted(values[:, level, column], rows, positive)[list(fold.scored)]
                assert torch.allclose(found.nested[seed, column, list(fold.scored)], expected, atol=1e-8)
        assert 0 not in found.chosen[column]
    assert torch.allclose(found.by_level, by_level, atol=1e-8)
    assert isinstance(found, OutOfFoldScores)


def test_a_class_that_a_fold_has_all_of_is_refused(planted: World) -> None:
    folds = folds_of(planted)
    positive = torch.zeros(len(planted.harmful), dtype=torch.bool)
    positive[list(folds[0][1].scored)] = True
    with pytest.raises(UserError, match="no prompt of one class"):
        out_of_fold_scores(planted.acts, positive, torch.ones_like(positive), folds[:1])


def test_permuted_labels_are_fitted_and_scored_as_the_real_ones(planted: World) -> None:
    folds, positive = folds_of(planted)[0], torch.tensor(planted.harmful)
    values = planted.acts.values[:, 2, 0]
    null = out_of_fold_null(LabelledVectors(values, positive, planted.acts.families), folds, 0.6, 40, 3)
    areas = []
    for labels in permuted_labels(positive, planted.acts.families, 40, 3):
        scores = torch.empty(len(labels), dtype=torch.float64)
        for fold in folds:
            scores[list(fold.scored)] = fitted(values.double(), list(fold.fitted), labels)[list(fold.scored)]
        areas.append(float(auroc(scores, labels)))
    assert null.mean == pytest.approx(np.mean(areas), abs=1e-9)
    assert null.p == pytest.approx((1 + sum(area >= 0.6 - 1e-9 for area in areas)) / 41)


def test_worlds_read_at_once_are_those_read_one_by_one(planted: World) -> None:
    """By making every world's residual stream, which the study no longer does."""
    acts, n, levels = planted.acts, 7, (2, 1)
    places = Places(tuple(quadrants(planted)), acts.families, planted.topics)
    paired, folds = torch.tensor(planted.paired), folds_of(planted)[0]
    latent = torch.from_numpy(np.random.default_rng(5).normal(size=len(paired))) + torch.tensor(planted.harmful)
    found = one_factor_worlds(acts, levels, places, paired, folds, latent, seed=2, n=n)
    values = [acts.at(level, name).double() for level, name in zip(levels, ("inst", "last"), strict=True)]
    assert found.observed == pytest.approx(_read(values, torch.tensor(planted.refused), places, paired, folds))
    for k, made in enumerate(_worlds(values, places, latent, seed=2, n=n)):
        expected = _read(*made, places, paired, folds)
        assert {name: float(drawn[k]) for name, drawn in found.drawn.items()} == pytest.approx(expected, abs=1e-9)


def _worlds(
    values: list[torch.Tensor], places: Places, latent: torch.Tensor, seed: int, n: int
) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    from sklearn.linear_model import LogisticRegression

    refused = np.array([name.startswith("refused") for name in places.quadrants])
    chance = LogisticRegression().fit(latent[:, None].numpy(), refused).predict_proba(latent[:, None].numpy())[:, 1]
    up, down = places.inside("refused_harmful"), places.inside("accepted_harmless")
    middles = [(value[up].mean(dim=0) + value[down].mean(dim=0)) / 2 for value in values]
    axes = [(value[up].mean(dim=0) - value[down].mean(dim=0)) / 2 for value in values]
    left = [value.clone() for value in values]
    for name in set(places.quadrants):
        for own in left:
            own[places.inside(name)] -= own[places.inside(name)].mean(dim=0)
    rng, made = np.random.default_rng(seed), []
    for _ in range(n):
        order = torch.from_numpy(rng.permutation(len(latent)))
        world_values = [m + latent[:, None] * a + own[order] for m, a, own in zip(middles, axes, left, strict=True)]
        made.append((world_values, torch.from_numpy(rng.random(len(latent)) < chance)))
    return made


def _read(
    values: list[torch.Tensor],
    refused: torch.Tensor,
    places: Places,
    paired: torch.Tensor,
    folds: tuple[Fold, ...],
) -> dict[str, float]:
    """One world's numbers by their definitions."""
    harmful = torch.tensor([name.endswith("_harmful") for name in places.quadrants])
    everyone = torch.ones_like(harmful)
    words = [
        ("refused" if r else "accepted", "harmful" if h else "harmless") for r, h in zip(refused, harmful, strict=True)
    ]
    own = Places(tuple("_".join(pair) for pair in words), places.families, places.topics)

    def direction(value: torch.Tensor, rows: list[int], positive: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(member)
        kept[rows] = True
        return value[kept & member & positive].mean(dim=0) - value[kept & member & ~positive].mean(dim=0)

    def scored(value: torch.Tensor, read: tuple, erased: tuple | None = None) -> torch.Tensor:
        scores = torch.empty(len(refused), dtype=torch.float64)
        for fold in folds:
            rows = list(fold.fitted)
            line = direction(value, rows, *read)
            if erased is not None:
                other = torch.nn.functional.normalize(direction(value, rows, *erased), dim=0)
                line = line - (line @ other) * other
            kept = torch.zeros_like(refused)
            kept[rows] = True
            ends = [(value[kept & read[1] & side] @ line).mean() for side in (read[0], ~read[0])]
            scores[list(fold.scored)] = ((value @ line - sum(ends) / 2) / line.norm())[list(fold.scored)]
        return scores

    harm, refusal = (harmful, paired), (refused, everyone)
    first, second = scored(values[0], harm), scored(values[1], refusal)
    found = {"D": contrast_of(without_topics(first, own), without_topics(second, own), own)}
    for position, value in zip(("inst", "last"), values, strict=True):
        found[f"erase_refusal.{position}"] = float(auroc(scored(value, harm, refusal)[~refused], harmful[~refused]))
        found[f"erase_harm.{position}"] = float(auroc(scored(value, refusal, harm)[harmful], refused[harmful]))
    return found
