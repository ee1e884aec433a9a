"""Beliefs: the sign of the planted factor, the paper's own numbers, and what centring repairs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted import CHECKPOINT, activations, planted_two_by_two

from mechlens.errors import UserError
from mechlens.methods.probing.beliefs import Centroids, belief, beliefs, centroids, layer_scores

RELEASED = Path(__file__).resolve().parents[2] / "shared" / "data" / "released_tensors"


def _released(name: str) -> torch.Tensor:
    """One released tensor, in float32."""
    loaded = torch.load(RELEASED / f"qwen-{name}.pt", weights_only=True, map_location="cpu")
    return torch.as_tensor(loaded).float()


def _released_centroids(positive: str, negative: str, position: str) -> Centroids:
    return Centroids(
        positive=_released(f"{positive}-cls-all-layer"),
        negative=_released(f"{negative}-cls-all-layer"),
        levels=tuple(range(29)),
        position=position,
        site="resid",
        contrast=(positive, negative),
        checkpoint=CHECKPOINT,
        template="paper",
        train_ids=(),
    )


@pytest.mark.skipif(not RELEASED.is_dir(), reason=f"the released tensors are not at {RELEASED}")
@pytest.mark.parametrize(
    ("positive", "negative", "position", "expected"),
    [
        ("hf", "hl", "inst", (-0.056, -0.028, -0.045, -0.043, -0.040)),
        ("refuse", "accept", "last", (0.009, 0.010, 0.016, 0.009, 0.015)),
    ],
)
def test_the_papers_ten_beliefs_are_reproduced(
    positive: str, negative: str, position: str, expected: tuple[float, ...]
) -> None:
    hidden = _released("hl-refuse5-all-layer-2pos").permute(1, 0, 2, 3)  # prompt level position d_model
    acts = activations(hidden, ("refused_harmless",) * 5)
    reference = _released_centroids(positive, negative, position)
    values = beliefs(acts, reference, centered=False, skip_embedding=False)
    assert values.tolist() == pytest.approx(expected, abs=1e-3)
    if position == "last":  # the same template token stands there in every prompt: level 0 tells nothing
        at_zero = layer_scores(acts.values[:, :, 1], reference, centered=False)[:, 0]
        assert torch.equal(at_zero, torch.zeros(5, dtype=torch.float64))


def _quadrant_means(values: torch.Tensor, labels: tuple[str, ...]) -> dict[str, float]:
    return {label: float(values[[own == label for own in labels]].mean()) for label in dict.fromkeys(labels)}


@pytest.mark.parametrize("centered", [False, True])
def test_beliefs_have_the_sign_of_their_own_factor_in_all_four_quadrants(centered: bool) -> None:
    train, test = (
        planted_two_by_two(harm_separation=4.0, refusal_separation=4.0, seed=0),
        planted_two_by_two(harm_separation=4.0, refusal_separation=4.0, seed=0, noise_seed=1),
    )
    harm = centroids(train.acts, "refused_harmful", "accepted_harmless", "inst")
    refusal = centroids(train.acts, "refused_harmful", "accepted_harmless", "last")
    of_harm = beliefs(test.acts, harm, centered=centered, skip_embedding=False)
    of_refusal = beliefs(test.acts, refusal, centered=centered, skip_embedding=False)
    for label, mean in _quadrant_means(of_harm, test.acts.labels).items():
        assert (mean > 0) == label.endswith("_harmful")
    for label, mean in _quadrant_means(of_refusal, test.acts.labels).items():
        assert (mean > 0) == label.startswith("refused_")


def test_no_belief_without_a_planted_factor() -> None:
    planted = planted_two_by_two(harm_separation=0.0, refusal_separation=0.0, n_per_cell=64)
    half = planted.acts.select(list(range(128))), planted.acts.select(list(range(128, 256)))
    reference = centroids(half[0], "refused_harmful", "accepted_harmless", "inst")
    means = _quadrant_means(beliefs(half[1], reference, centered=True, skip_embedding=False), half[1].labels)
    assert max(abs(mean) for mean in means.values()) < 0.08  # planted, it is above 0.4


def test_centring_repairs_a_difference_parallel_to_the_common_mean() -> None:
    # Cosine scores ignore length, so a class difference along the common mean is lost.
    generator = torch.Generator().manual_seed(0)
    axis = torch.zeros(32)
    axis[0] = 1.0
    sign = torch.tensor([1.0, -1.0]).repeat(200)
    values = torch.randn(400, 2, 1, 32, generator=generator) + (30 + sign[:, None, None, None]) * axis
    acts = activations(values, ("harmful", "harmless") * 200, positions=("inst",))
    reference = centroids(acts, "harmful", "harmless", "inst")
    accuracy = {
        centered: float(
            ((beliefs(acts, reference, centered=centered, skip_embedding=False) > 0) == (sign > 0)).float().mean()
        )
        for centered in (False, True)
    }
    assert accuracy[True] > accuracy[False] + 0.1


def test_centred_score_at_one_level_is_the_midpoint_rule() -> None:
    # methods.md 1.10: isotropic noise and equal priors make it the LDA decision (h - midpoint).v > 0.
    acts = planted_two_by_two(harm_separation=3.0, refusal_separation=0.0).acts
    reference = centroids(acts, "refused_harmful", "accepted_harmless", "inst")
    scores = layer_scores(acts.values[:, :, 0], reference, centered=True)
    difference = reference.positive - reference.negative
    side = ((acts.values[:, :, 0] - reference.grand_mean) * difference).sum(dim=-1)
    assert torch.equal(scores > 0, side > 0)


def test_laws_of_the_score() -> None:
    acts = planted_two_by_two(harm_separation=2.0, refusal_separation=2.0).acts
    reference = centroids(acts, "refused_harmful", "accepted_harmless", "inst")
    swapped = centroids(acts, "accepted_harmless", "refused_harmful", "inst")
    values = acts.values[:, :, 0]
    scores = layer_scores(values, reference, centered=False)
    assert torch.allclose(layer_scores(values, swapped, centered=False), -scores)
    assert torch.allclose(layer_scores(7 * values, reference, centered=False), scores)
    assert torch.allclose(belief(values, reference, centered=False, skip_embedding=False), scores.mean(dim=-1))
    assert torch.allclose(belief(values, reference, centered=False, skip_embedding=True), scores[:, 1:].mean(dim=-1))


def test_unequal_classes_do_not_move_the_midpoint() -> None:
    acts = planted_two_by_two(harm_separation=2.0, refusal_separation=2.0).acts
    fewer = [i for i, label in enumerate(acts.labels) if label == "refused_harmful" or i < 40]
    reference = centroids(acts.select(fewer), "refused_harmful", "accepted_harmless", "inst")
    assert torch.allclose(reference.grand_mean, (reference.positive + reference.negative) / 2)
    assert set(reference.train_ids) <= set(acts.ids)
    assert len(reference.train_ids) == 32 + 10


def test_mixed_kinds_are_refused() -> None:
    acts = planted_two_by_two(harm_separation=2.0, refusal_separation=2.0).acts
    reference = centroids(acts, "refused_harmful", "accepted_harmless", "inst")
    processed = replace(acts, checkpoint=replace(acts.checkpoint, regime="processed"))
    with pytest.raises(UserError, match="weight regime"):
        beliefs(processed, reference, centered=False, skip_embedding=False)
    with pytest.raises(UserError, match="levels"):
        beliefs(replace(acts, levels=(4, 5, 6, 7)), reference, centered=False, skip_embedding=False)
    with pytest.raises(UserError, match="position 'nowhere'"):
        centroids(acts, "refused_harmful", "accepted_harmless", "nowhere")
    only_zero = replace(acts, values=acts.values[:, :1], levels=(0,))
    with pytest.raises(UserError, match="no level is left"):
        belief(
            only_zero.values[:, :, 0],
            centroids(only_zero, "refused_harmful", "accepted_harmless", "inst"),
            centered=False,
            skip_embedding=True,
        )
