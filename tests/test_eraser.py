"""LEACE's theorems, each with its "and before it was not so" half."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import activations, unit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from mechlens.choices import METHODS
from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import project
from mechlens.methods.directions.eraser import Eraser, fit_eraser
from mechlens.methods.directions.methods import DirectionMethod
from mechlens.methods.probing.auroc import auroc
from mechlens.runs.artifacts import load, save

SIZES = pytest.mark.parametrize(("k", "n", "d_model"), [(2, 300, 20), (3, 300, 20), (5, 90, 60), (2, 24, 100)])


def classes(k: int, n: int, d_model: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Vectors of k classes of unequal size and different means, in correlated noise around a far-off mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = [min(i % (k + 1), k - 1) for i in range(n)]  # the last class twice as large
    means = 2 * torch.randn(k, d_model, generator=generator, dtype=torch.float64)
    mixing = torch.randn(d_model, d_model, generator=generator, dtype=torch.float64) / math.sqrt(d_model)
    noise = torch.randn(n, d_model, generator=generator, dtype=torch.float64) @ mixing
    return means[labels] + noise + 20, [f"class {label}" for label in labels]


def cross_covariance(values: Tensor, labels: list[str]) -> Tensor:
    """Covariance of the values with the one-hot labels."""
    hot = torch.tensor([[label == name for name in sorted(set(labels))] for label in labels]).double()
    return (values - values.mean(dim=0)).T @ (hot - hot.mean(dim=0)) / len(labels)


def class_means(values: Tensor, labels: list[str]) -> Tensor:
    return torch.stack(
        [values[[i for i, label in enumerate(labels) if label == name]].mean(dim=0) for name in sorted(set(labels))]
    )


@SIZES
def test_no_covariance_with_the_concept_is_left(k: int, n: int, d_model: int) -> None:
    values, labels = classes(k, n, d_model)
    assert float(cross_covariance(values, labels).abs().max()) > 0.1
    assert float(cross_covariance(fit_eraser(values, labels)(values), labels).abs().max()) < 1e-10


@SIZES
def test_class_means_are_equal_after_and_the_mean_stays(k: int, n: int, d_model: int) -> None:
    values, labels = classes(k, n, d_model)
    erased = fit_eraser(values, labels)(values)
    assert float((class_means(values, labels) - values.mean(dim=0)).abs().max()) > 1
    assert torch.allclose(class_means(erased, labels), values.mean(dim=0).expand(k, -1), atol=1e-9)
    assert torch.allclose(erased.mean(dim=0), values.mean(dim=0), atol=1e-9)


@SIZES
def test_a_fresh_logistic_regression_learns_nothing_and_did_before(k: int, n: int, d_model: int) -> None:
    values, labels = classes(k, n, d_model)
    erased = fit_eraser(values, labels)(values)
    shares = np.array([labels.count(name) for name in sorted(set(labels))]) / n
    constant = -(shares * np.log(shares)).sum()

    def probe(vectors: Tensor) -> tuple[float, float]:
        """Log loss and accuracy on what it was fitted on."""
        model = LogisticRegression(C=100.0, max_iter=2000).fit(vectors.numpy(), labels)
        predicted = model.predict_proba(vectors.numpy())
        return float(log_loss(labels, predicted)), float(model.score(vectors.numpy(), labels))

    assert probe(values)[0] < 0.3 * constant
    assert probe(values)[1] > 0.9
    loss, accuracy = probe(erased)
    assert loss == pytest.approx(constant, abs=1e-5)
    assert accuracy == pytest.approx(shares.max())


@pytest.mark.parametrize("method", [METHODS[name] for name in METHODS.ours], ids=METHODS.ours)
def test_no_direction_method_finds_anything(method: DirectionMethod) -> None:
    values, names = classes(2, 120, 40)
    labels = tuple("harmful" if name == "class 0" else "harmless" for name in names)
    families = tuple(f"f{i // 3}" for i in range(120))
    acts = activations(values[:, None, None], labels, families, positions=("inst",))
    erased = replace(acts, values=fit_eraser(acts.at(0, "inst"), labels)(acts.values))
    assert method(acts, "harmful", "harmless", 0, "inst").norm > 1
    assert method(erased, "harmful", "harmless", 0, "inst").norm < 1e-8


@SIZES
def test_erasing_twice_is_erasing_once(k: int, n: int, d_model: int) -> None:
    values, labels = classes(k, n, d_model)
    eraser = fit_eraser(values, labels)
    once = eraser(values)
    assert float((once - values).abs().max()) > 0.5
    assert torch.allclose(eraser(once), once, atol=1e-9)
    # Nor is there anything left to be found by a second fit, also after rounding to float32.
    assert fit_eraser(once, labels).rank == 0
    assert fit_eraser(once.float(), labels).rank == 0


@SIZES
def test_the_change_has_rank_classes_minus_one(k: int, n: int, d_model: int) -> None:
    values, labels = classes(k, n, d_model)
    eraser = fit_eraser(values, labels)
    assert eraser.rank == k - 1
    assert eraser.classes == tuple(f"class {i}" for i in range(k))
    fresh = 30 * torch.randn(200, d_model, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    lengths = torch.linalg.svdvals(eraser(fresh) - fresh)
    assert int((lengths > 1e-8 * lengths[0]).sum()) == k - 1


def test_classes_in_fewer_dimensions_take_fewer_away() -> None:
    values, labels = classes(2, 300, 20)
    thirds = [f"{label} {i // 10 % 2}" for i, label in enumerate(labels)]
    same = values.clone()
    for name in set(thirds):  # four classes, but their means are two points
        rows = [i for i, label in enumerate(thirds) if label == name]
        twin = [i for i, label in enumerate(labels) if name.startswith(label)]
        same[rows] += values[twin].mean(dim=0) - values[rows].mean(dim=0)
    assert fit_eraser(same, thirds).rank == 1
    assert fit_eraser(values, thirds).rank == 3


def test_it_changes_less_than_projecting_the_class_difference_out() -> None:
    values, labels = classes(2, 4000, 12, seed=3)
    first, second = class_means(values, labels)
    line, centred = unit(first - second), values - values.mean(dim=0)
    projected = values - (centred @ line)[:, None] * line
    assert float(cross_covariance(projected, labels).abs().max()) < 1e-10  # that erases the concept too
    moved = (fit_eraser(values, labels)(values) - values).square().sum()
    assert float(moved) < 0.95 * float((projected - values).square().sum())


def test_any_shape_and_dtype_goes_through_and_nothing_is_written_in_place() -> None:
    values, labels = classes(3, 60, 10)
    eraser = fit_eraser(values.float(), labels)
    block = values.float().reshape(5, 12, 10)
    before = block.clone()
    assert eraser(block).shape == block.shape
    assert eraser(block).dtype == torch.float32
    assert torch.equal(eraser(block)[2, 3], eraser(block[2, 3]))
    assert torch.equal(block, before)
    assert eraser(block.bfloat16()).dtype == torch.bfloat16


def test_order_and_names_of_the_classes_do_not_matter() -> None:
    values, labels = classes(3, 60, 10)
    renamed = [{"class 0": "z", "class 1": "a", "class 2": "m"}[label] for label in labels]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    other = fit_eraser(values[order], [renamed[i] for i in order.tolist()])
    assert torch.allclose(other(values), fit_eraser(values, labels)(values), atol=1e-9)


def test_one_vector_for_all_prompts_is_left_alone() -> None:
    # A template token at level 0.
    values = torch.randn(1, 8).expand(20, 8)
    eraser = fit_eraser(values, ["?", "."] * 10)
    assert eraser.rank == 0
    assert torch.equal(eraser(values), values)


def test_two_token_vectors_become_their_mean() -> None:
    tokens = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    values = tokens.repeat(10, 1)
    erased = fit_eraser(values, ["?", "."] * 10)(values)
    assert torch.allclose(erased, tokens.mean(dim=0).expand(20, 8), atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["?"] * 10, r"the labels hold \['\?'\]; erasing a concept needs at least two classes"),
        (["?", "."] * 4, "10 vectors and 8 labels"),
    ],
)
def test_what_cannot_be_fitted_is_refused(labels: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_eraser(torch.randn(10, 4), labels)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        fit_eraser(torch.full((4, 4), math.inf), ["?", "."] * 2)


def test_an_eraser_survives_the_disk(tmp_path: Path) -> None:
    values, labels = classes(3, 60, 10)
    for fitted in (fit_eraser(values, labels), fit_eraser(values[:1].expand(60, 10), labels)):
        save(fitted, tmp_path / "eraser.safetensors")
        loaded = load(tmp_path / "eraser.safetensors", Eraser)
        assert torch.equal(loaded(values), fitted(values))
        assert loaded.classes == fitted.classes


def punctuated(n: int, agreement: float, seed: int) -> tuple[Activations, Tensor, Tensor]:
    """Prompts, harmful or not, ending in "?" or not. `agreement`: share of prompts where the two are the same.

    Harm lies along axis 0 (means 3 apart), punctuation along axis 1 (12 apart), in unit noise.
    """
    generator = torch.Generator().manual_seed(seed)
    harmful = torch.arange(n) % 2 == 0  # pairs of a harmful and a harmless prompt
    question = harmful == (torch.rand(n, generator=generator) < agreement)
    values = torch.randn(n, 32, generator=generator)
    values[:, 0] += 3 * (harmful.float() - 0.5)
    values[:, 1] += 12 * (question.float() - 0.5)
    labels = tuple("harmful" if flag else "harmless" for flag in harmful)
    families = tuple(f"f{i // 2}" for i in range(n))
    return activations(values[:, None, None], labels, families, positions=("inst",)), harmful, question


def marks(question: Tensor) -> list[str]:
    return ["?" if flag else "." for flag in question]


@pytest.mark.parametrize("method", [METHODS[name] for name in METHODS.ours], ids=METHODS.ours)
def test_erasing_punctuation_first_gives_a_direction_that_is_about_harm(method: DirectionMethod) -> None:
    acts, _, question = punctuated(800, agreement=0.75, seed=0)
    eraser = fit_eraser(acts.at(0, "inst"), marks(question))
    erased = replace(acts, values=eraser(acts.values))
    naive, clean = (method(each, "harmful", "harmless", 0, "inst") for each in (acts, erased))
    scores = project(erased.at(0, "inst"), clean)
    assert float(auroc(scores[None], question)[0]) == pytest.approx(0.5, abs=0.05)
    assert float(auroc(project(acts.at(0, "inst"), naive)[None], question)[0]) > 0.7
    # On new prompts, whether their punctuation goes with harm, is independent of it, or misleads.
    by_naive, by_clean = [], []
    for agreement in (0.75, 0.5, 0.1):
        held_out, harmful, _ = punctuated(400, agreement, seed=1)
        values = held_out.at(0, "inst")
        by_naive.append(float(auroc(project(values, naive)[None], harmful)[0]))
        by_clean.append(float(auroc(project(eraser(values), clean)[None], harmful)[0]))
    assert min(by_clean) > 0.9
    assert by_naive[-1] < by_naive[0] - 0.02
    if method in (METHODS["mean-difference"], METHODS["paired-component"]):
        assert by_naive[-1] < 0.2


def test_an_eraser_fitted_where_confound_and_concept_are_independent_leaves_no_trace() -> None:
    acts, _, question = punctuated(800, agreement=0.75, seed=0)
    held_out, harmful, asked = punctuated(800, agreement=0.5, seed=1)

    def within_harmful(eraser: Eraser) -> float:
        """What a harm direction after erasing tells of the punctuation of harmful prompts: 0.5 is nothing."""
        erased = replace(acts, values=eraser(acts.values))
        direction = METHODS["mean-difference"](erased, "harmful", "harmless", 0, "inst")
        scores = project(eraser(held_out.at(0, "inst")), direction)
        return float(auroc(scores[harmful][None], asked[harmful])[0])

    balanced, _, marked = punctuated(800, agreement=0.5, seed=2)
    assert within_harmful(fit_eraser(balanced.at(0, "inst"), marks(marked))) == pytest.approx(0.5, abs=0.06)
    assert within_harmful(fit_eraser(acts.at(0, "inst"), marks(question))) < 0.35  # leans against it
