"""Neural collapse: an exact simplex gives zeros, planted noise what theory says, each form what was published."""

import math

import numpy as np
import pytest
import torch

from mechlens.errors import UserError
from mechlens.methods.geometry.collapse.class_means import class_means
from mechlens.methods.geometry.collapse.deviation import feature_deviation
from mechlens.methods.geometry.collapse.duality import mean_disagreement, self_duality
from mechlens.methods.geometry.collapse.simplex import simplex_errors
from mechlens.methods.geometry.collapse.variability import variability_collapse

C, D = 4, 12


def rotation(seed: int = 0, size: int = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def simplex(n: int = C) -> torch.Tensor:
    """Corners of a simplex somewhere in a larger space, far from the origin."""
    corners = torch.eye(n, dtype=torch.float64) - 1 / n
    return torch.nn.functional.pad(corners, (0, D - n)) @ rotation() + 5


def with_noise(sigma: float, n: int = C) -> tuple[torch.Tensor, list[str]]:
    """Vectors around the corners whose covariance within every class is sigma² in every direction, exactly."""
    steps = sigma * math.sqrt(D) * torch.cat([torch.eye(D), -torch.eye(D)]).double()
    values = (simplex(n)[:, None] + steps).flatten(0, 1)
    return values, [f"class {k}" for k in range(n) for _ in range(len(steps))]


def gaussians(seed: int, n: int = 90) -> tuple[torch.Tensor, list[str]]:
    values = torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values, [f"class {k}" for k in [0] * (n // 6) + [1] * (n // 3) + [2] * (n // 2)]


def test_an_exact_simplex_gives_zeros() -> None:
    values, labels = with_noise(0.0)
    collapsed = variability_collapse(values, labels)
    assert max(collapsed.trace, collapsed.svd, collapsed.cdnv, collapsed.quotient) < 1e-24
    found = simplex_errors(values, labels)
    assert max(found.norm_spread, found.coherence, found.etf_error, abs(found.gnc2_excess)) < 1e-12
    means = class_means(values, labels)
    dual = self_duality(means, 3 * means.centred)
    assert max(dual.distance, dual.etf_error, dual.unc3) < 1e-12
    assert dual.cosine == pytest.approx(1)
    bias = -means.means.square().sum(dim=1) / 2
    assert mean_disagreement(means, values + 0.01 * gaussians(0, len(values))[0], means.means, bias) == 0


@pytest.mark.parametrize("sigma", [0.1, 0.7])
def test_planted_noise_gives_what_theory_says(sigma: float) -> None:
    found = variability_collapse(*with_noise(sigma))
    # Σ_B is 1/C on C - 1 directions, the corners are √2 apart.
    assert found.svd == pytest.approx(sigma**2 * C * (C - 1))  # 0.12 at sigma 0.1, as methods.md has it
    assert found.trace == pytest.approx(found.svd / C)
    assert found.cdnv == pytest.approx(sigma**2 * D / 2)
    assert found.quotient == pytest.approx(sigma**2 * D * C / (C - 1))


def test_the_forms_are_those_of_the_papers_with_matrices_formed() -> None:
    values, labels = gaussians(1)
    values[:15] += 2
    means = class_means(values, labels)
    within = means.residuals.T @ means.residuals / len(values)
    between = means.centred.T @ means.centred / 3
    found = variability_collapse(values, labels)
    assert found.trace == pytest.approx(float(torch.trace(within @ torch.linalg.pinv(between))) / 3)
    assert found.quotient == pytest.approx(float(within.trace() / between.trace()))
    pairs = [
        (values[[k == a for k in labels]].var(dim=0, correction=0).sum()
         + values[[k == b for k in labels]].var(dim=0, correction=0).sum())
        / 2 / (means.means[i] - means.means[j]).square().sum()
        for i, a in enumerate(means.classes) for j, b in enumerate(means.classes) if i < j
    ]  # fmt: skip
    assert found.cdnv == pytest.approx(float(sum(pairs)) / 3)


def test_all_four_are_a_plain_oracle_written_from_the_papers() -> None:
    """`neural-collapse` isn't installable here, so the formulas of methods.md 7.2 and A8, class by class in numpy."""
    values, labels = gaussians(2)
    values[:15] += 1
    h, names = values.numpy(), sorted(set(labels))
    mu = np.stack([np.mean([h[i] for i, own in enumerate(labels) if own == name], axis=0) for name in names])
    m = mu - mu.mean(axis=0)
    s_w = sum(np.outer(h[i] - mu[names.index(own)], h[i] - mu[names.index(own)]) for i, own in enumerate(labels))
    u, s, _ = np.linalg.svd(sum(np.outer(one, one) for one in m) / 3)
    nc1 = np.trace(s_w / len(h) @ u[:, :2] @ np.diag(1 / s[:2]) @ u[:, :2].T)  # Papyan's code: C - 1 vectors, not / C
    assert variability_collapse(values, labels).svd == pytest.approx(nc1)
    lengths = [np.sqrt(one @ one) for one in m]
    unit = [one / length for one, length in zip(m, lengths, strict=True)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    gram, wanted = m @ m.T, np.eye(3) - np.ones((3, 3)) / 3
    found = simplex_errors(values, labels)
    assert found.norm_spread == pytest.approx(np.std(lengths) / np.mean(lengths))
    assert found.coherence == pytest.approx(np.mean([abs(unit[a] @ unit[b] + 1 / 2) for a, b in pairs]))
    assert found.etf_error == pytest.approx(np.linalg.norm(gram / np.linalg.norm(gram) - wanted / np.sqrt(2)))
    assert found.gnc2 == pytest.approx(np.mean([np.log(1 / np.linalg.norm(unit[a] - unit[b])) for a, b in pairs]))
    weight = rotation(4)[:3].numpy()
    dual = self_duality(class_means(values, labels), torch.from_numpy(weight))
    cosines = [weight[c] @ unit[c] / np.linalg.norm(weight[c]) for c in range(3)]
    assert dual.distance == pytest.approx(np.sum((weight / np.linalg.norm(weight) - m / np.linalg.norm(m)) ** 2))
    assert (dual.cosine, dual.unc3) == pytest.approx((np.mean(cosines), np.var(cosines)))
    apart = [np.argmax(weight @ one) != np.argmin([np.linalg.norm(one - own) for own in mu]) for one in h]
    found_apart = mean_disagreement(class_means(values, labels), values, torch.from_numpy(weight))
    assert found_apart == pytest.approx(np.mean(apart))


def test_collapse_is_the_same_in_any_basis_and_unit_and_less_for_classes_of_chance() -> None:
    values, labels = with_noise(0.3)
    moved = 7 * values @ rotation(3) - 2
    for measure in (variability_collapse, simplex_errors):
        here, there = (list(vars(measure(one, labels)).values()) for one in (values, moved))
        assert here == pytest.approx(there, abs=1e-9)
    shuffled = [labels[i] for i in torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert variability_collapse(values, shuffled).cdnv > 5 * variability_collapse(values, labels).cdnv


def test_classes_whose_means_lie_on_a_line_have_no_third_direction_to_divide_by() -> None:
    # The pseudo-inverse leaves the empty direction out; the published SVD form divides by its rounding.
    values = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]], dtype=torch.float64)
    found = variability_collapse(values, ["a", "a", "b", "b", "c", "c"])
    assert found.trace == pytest.approx(0.0)  # all spread is across the line
    assert found.svd > 1e6


def test_uniform_means_and_a_simplex_are_told_apart_as_in_linguistic_collapse() -> None:
    # Many orthogonal means about their mean are nearly a simplex; random ones in few dimensions are not.
    assert simplex_errors(torch.eye(2 * D).repeat(2, 1), [str(k % (2 * D)) for k in range(4 * D)]).gnc2 == (
        pytest.approx(-math.log(2 * 2 * D / (2 * D - 1)) / 2)
    )
    values, _ = gaussians(5, 60)
    many = simplex_errors(values, [str(k % 30) for k in range(60)])
    assert many.gnc2_excess > 0.01
    assert 0.5 < many.etf_error < math.sqrt(2)
    assert simplex_errors(values, ["a", "b"] * 30).coherence < 1e-12  # two means are always opposite


def test_an_unrelated_classifier_is_no_dual() -> None:
    values, labels = with_noise(0.1)
    means = class_means(values, labels)
    across = torch.nn.functional.pad(torch.eye(C).double(), (D - C, 0)) @ rotation()
    dual = self_duality(means, across)
    assert dual.distance == pytest.approx(2)
    assert dual.cosine == pytest.approx(0, abs=1e-12)
    assert mean_disagreement(means, values, means.means.roll(1, dims=0)) > 0.7
    with pytest.raises(UserError, match="a row for each class"):
        self_duality(means, across[:2])


def test_the_deviation_adds_up_and_knows_what_moved() -> None:
    values, labels = with_noise(0.3)
    means = class_means(values, labels)
    collapsed = means.means[means.of]
    found = feature_deviation(collapsed, values, labels)
    assert found.between == pytest.approx(0, abs=1e-20)
    assert found.within_kept == pytest.approx(0, abs=1e-20)
    quotient = variability_collapse(values, labels).quotient
    assert found.total == pytest.approx(quotient / (1 + quotient))
    other, _ = gaussians(2, len(values))
    direct = (other - other.mean(dim=0) - values + values.mean(dim=0)).square().sum()
    size = (values - values.mean(dim=0)).square().sum()
    both = feature_deviation(other, values, labels)
    assert both.total == pytest.approx(float(direct / size))
    assert feature_deviation(values + 3, values, labels).total == pytest.approx(0, abs=1e-20)  # about the mean
    with pytest.raises(UserError, match="read the same prompts"):
        feature_deviation(values[:4], values, labels)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a"] * 4, "all of 1 class"),
        (["a", "b"], "4 vectors and 2 labels"),
        (["a", "a", "a", "b"], "the class 'b' has one vector"),
    ],
)
def test_what_has_no_classes_is_refused(labels: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        variability_collapse(torch.randn(4, 3), labels)
    with pytest.raises(UserError, match="not finite"):
        class_means(torch.full((2, 2), torch.nan), ["a", "b"])
