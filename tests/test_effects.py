"""Effects: cosines come out as planted although noise shrinks them, and noise is never taken for a direction."""

import pytest
import torch
from planted import activations, planted_two_by_two
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import cosine, mean_differences
from mechlens.methods.directions.nulls import split_half
from mechlens.methods.statistics.effects import HARM, INTERACTION, REFUSAL, CosineCurve, Effect, cosine_curve

D = 128
SWAP = {"harmful": 1.0, "harmless": -1.0}


def effects(
    *, separation: float, true_cosine: float, n: int, seed: int, shared: bool = False, d_model: int = D
) -> tuple[Effect, Effect, tuple[str, ...]]:
    """Both main effects of planted quadrants: harm at `inst` and refusal at `last`, or both at one position."""
    planted = planted_two_by_two(
        harm_separation=separation, refusal_separation=separation, n_per_cell=n, d_model=d_model, n_levels=2,
        cosine=true_cosine, seed=seed, noise_seed=seed + 1000,
    )  # fmt: skip
    values = planted.acts.values[:, 1:]  # level 0 at `last` is one vector, as a template token is
    if shared:
        values = values + separation / 2 * (2.0 * planted.refused - 1)[:, None, None, None] * planted.refusal
    labels = planted.acts.labels
    second = values[:, :, 0] if shared else values[:, :, 1]
    return Effect(values[:, :, 0], labels, HARM), Effect(second, labels, REFUSAL), planted.acts.families


def curves(draws: int, *, start: int = 0, **planted: float) -> list[CosineCurve]:
    """One curve a draw of prompts."""
    found = []
    for seed in range(start, start + draws):
        first, second, families = effects(seed=seed, **planted)  # type: ignore[arg-type]
        found.append(cosine_curve(first, second, families, (1,), seed=seed))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("true_cosine", [0.0, 0.5, 1.0])
def test_planted_cosines_are_recovered_although_the_measured_ones_shrink(true_cosine: float) -> None:
    found = curves(30, separation=2.0, true_cosine=true_cosine, n=60)
    corrected, measured = ([getattr(c, kind)[0] for c in found] for kind in ("corrected", "measured"))
    # |a|^2 = 4, noise of a direction d / n_all * 4 = 128 * 4 / 240: the reliability of the whole sample is 0.65.
    reliability = 4 / (4 + 4 * D / 240)
    assert mean([e.value for e in measured]) == pytest.approx(true_cosine * reliability, abs=0.05)
    assert mean([e.value for e in corrected]) == pytest.approx(true_cosine, abs=0.05)
    inside = [e.low <= true_cosine <= e.high for e in corrected]
    assert sum(inside) >= 26  # 95% nominal; 26 of 30 has a chance of 2% to be missed
    assert all(e.low < e.value < e.high for e in (*corrected, *measured))
    assert all(e.n == 240 for e in corrected)
    assert all(0.3 < c.reliability_first[0] < 0.65 for c in found)  # a half is noisier than the whole: 0.48


def test_intervals_are_as_wide_as_the_draws_differ() -> None:
    # A percentile bootstrap fails here: the measured cosine leaves its own interval.
    found = curves(40, separation=2.0, true_cosine=0.5, n=60)
    for kind in ("corrected", "measured"):
        estimates = [getattr(curve, kind)[0] for curve in found]
        spread = float(torch.tensor([e.value for e in estimates]).std())
        claimed = mean([(e.high - e.low) / 3.92 for e in estimates])
        assert 0.8 * spread < claimed < 1.7 * spread


@pytest.mark.parametrize("separation", [1.5, 4.0])
def test_noise_that_two_effects_share_does_not_bring_them_together(separation: float) -> None:
    # The same vectors carry both effects.
    found = curves(20, separation=separation, true_cosine=0.0, n=40, shared=True)
    assert mean([c.corrected[0].value for c in found]) == pytest.approx(0.0, abs=0.08)


def test_shared_noise_alone_is_no_cosine() -> None:
    # Two noise-free contrasts at right angles over the same prompts, whose heavy noise is common to both.
    shared, corrected = [], []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(60, 1, D, generator=generator)
        up = torch.tensor([1.0, -1.0]).repeat(30)
        first, second = values.clone(), values.clone()
        first[:, 0, 0] += 2 * up
        second[:, 0, 1] += 2 * up
        labels = ("harmful", "harmless") * 30
        families = tuple(f"f{i}" for i in range(60))
        curve = cosine_curve(Effect(first, labels, SWAP), Effect(second, labels, SWAP), families, (0,), seed=0)
        shared.append(curve.measured[0].value)
        corrected.append(curve.corrected[0].value)
    assert mean(shared) > 0.25  # the noise is one vector in both directions
    assert abs(mean(corrected)) < 0.08


def test_pairs_count_as_one_family() -> None:
    # Both sides of a pair share a topic vector; as two families, the two directions would share it too.
    generator = torch.Generator().manual_seed(3)
    topic = 2 * torch.randn(30, 1, D, generator=generator).repeat_interleave(2, dim=0)
    values = topic + torch.randn(60, 1, D, generator=generator)
    values[::2, 0, 0] += 4.0
    labels, pairs = ("harmful", "harmless") * 30, tuple(f"f{i // 2}" for i in range(60))
    effect = Effect(values, labels, SWAP)
    paired = cosine_curve(effect, effect, pairs, (0,), seed=0)
    alone = cosine_curve(effect, effect, tuple(map(str, range(60))), (0,), seed=0)
    # One effect with itself: exactly 1, whatever the noise.
    assert paired.corrected[0].value == pytest.approx(1.0)
    assert paired.measured[0].value == pytest.approx(1.0)
    # The topic cancels within a pair, so halves by pair agree better than halves that tear pairs apart.
    assert paired.reliability_first[0] > alone.reliability_first[0] + 0.1


def test_a_direction_of_noise_is_missing_and_never_an_angle() -> None:
    found = []
    for seed in range(20):
        first, second, families = effects(separation=3.0, true_cosine=0.0, n=40, seed=seed, d_model=512)
        noise = torch.randn(first.values.shape, generator=torch.Generator().manual_seed(seed))
        curve = cosine_curve(Effect(noise, first.labels, HARM), second, families, (1,), seed=seed)
        assert curve.measured[0].measurable
        assert curve.reliability_second[0] > 0.2
        found.append(curve.corrected[0])
    assert sum(estimate.measurable for estimate in found) <= 2
    assert not any(e.measurable and e.high - e.low < 0.5 for e in found)


def test_what_cannot_be_measured_is_missing_and_does_not_crash() -> None:
    planted = planted_two_by_two(harm_separation=3.0, refusal_separation=3.0, n_per_cell=12)
    everywhere = Effect(planted.acts.values[:, :, 1], planted.acts.labels, REFUSAL)
    harm = Effect(planted.acts.values[:, :, 0], planted.acts.labels, HARM)
    curve = cosine_curve(harm, everywhere, planted.acts.families, planted.acts.levels, seed=0)
    # One vector for all prompts at level 0 of `last`: no direction, so no angle.
    assert not curve.measured[0].measurable
    assert not curve.corrected[0].measurable
    assert curve.corrected[2].measurable
    for empty in ((), ("accepted_harmful",)):
        labels = tuple("" if label not in empty else label for label in planted.acts.labels)
        lacking = cosine_curve(
            Effect(harm.values, labels, HARM), everywhere, planted.acts.families, planted.acts.levels, seed=0
        )
        assert not any(estimate.measurable for estimate in (*lacking.measured, *lacking.corrected))
        assert not harm.norms().isnan().any()
    one_family = cosine_curve(harm, harm, ("f",) * len(planted.acts.labels), planted.acts.levels, seed=0)
    assert not any(estimate.measurable for estimate in one_family.corrected)


def _quadrant_means(acts: Activations) -> dict[str, Tensor]:
    return {
        label: acts.values[[own == label for own in acts.labels]].double().mean(dim=0)
        for label in sorted(set(acts.labels))
    }


def test_main_effects_and_interaction_are_the_stated_sums_of_means() -> None:
    planted = planted_two_by_two(harm_separation=2.0, refusal_separation=3.0, n_per_cell=10, seed=4)
    acts = planted.acts
    means = _quadrant_means(acts)
    rh, ah = means["refused_harmful"], means["accepted_harmful"]
    rl, al = means["refused_harmless"], means["accepted_harmless"]
    everyone = torch.ones(1, len(acts.labels))
    stated = {
        "harm": (HARM, ((rh - rl) + (ah - al)) / 2),
        "refusal": (REFUSAL, ((rh - ah) + (rl - al)) / 2),
        "interaction": (INTERACTION, ((rh - rl) - (ah - al)) / 2),
    }
    for coefficients, expected in stated.values():
        effect = Effect(acts.values[:, :, 0], acts.labels, coefficients)
        for level in range(4):
            assert torch.allclose(effect.directions(everyone, level)[0], expected[level, 0])
        assert torch.allclose(effect.norms(), expected[:, 0].norm(dim=-1))
    # Simple effects follow: harm among the refused is main effect plus interaction, among the accepted minus.
    assert torch.allclose(stated["harm"][1] + stated["interaction"][1], rh - rl)
    assert torch.allclose(stated["harm"][1] - stated["interaction"][1], ah - al)
    assert torch.allclose(stated["refusal"][1] - stated["interaction"][1], rl - al)
    # With equal cells the main effect is the plain mean difference, and the poles hold both factors.
    plain = mean_differences(_by(acts, planted.harmful), "yes", "no")
    assert torch.allclose(stated["harm"][1].float(), plain, atol=1e-5)
    assert torch.allclose(rh - al, stated["harm"][1] + stated["refusal"][1])


def _by(acts: Activations, flags: Tensor) -> Activations:
    return activations(acts.values, tuple("yes" if flag else "no" for flag in flags))


def test_main_effects_are_not_moved_by_quadrants_of_unequal_size() -> None:
    # Mostly refused harmful and accepted harmless prompts: the plain contrast mixes in refusal, the balanced doesn't.
    planted = planted_two_by_two(harm_separation=4.0, refusal_separation=0.0, n_per_cell=200, d_model=32, seed=5)
    values = planted.acts.values[:, 1:2, 0] + 4.0 * planted.refused[:, None, None] * planted.refusal
    count: dict[str, int] = {}
    keep = []
    for i, label in enumerate(planted.acts.labels):
        count[label] = count.get(label, 0) + 1
        if count[label] <= (200 if label in ("refused_harmful", "accepted_harmless") else 20):
            keep.append(i)
    labels = tuple(planted.acts.labels[i] for i in keep)
    everyone = torch.ones(1, len(keep))
    balanced = Effect(values[keep], labels, HARM).directions(everyone, 0)[0]
    sides = tuple(label.rpartition("_")[2] for label in labels)
    plain = Effect(values[keep], sides, SWAP).directions(everyone, 0)[0]
    assert abs(float(cosine(balanced, planted.refusal.double()))) < 0.12
    assert float(cosine(plain, planted.refusal.double())) > 0.5


def test_reliability_agrees_with_the_one_of_directions() -> None:
    planted = planted_two_by_two(harm_separation=2.0, refusal_separation=2.0, n_per_cell=60, d_model=D)
    acts = _by(planted.acts, planted.harmful)
    effect = Effect(acts.values[:, :, 0], acts.labels, {"yes": 1.0, "no": -1.0})
    curve = cosine_curve(effect, effect, acts.families, acts.levels, seed=0)
    half = torch.tensor(curve.reliability_first)
    whole = 2 * half / (1 + half)
    assert torch.allclose(whole.double(), split_half(acts, "yes", "no", 40, 0)[:, 0].double(), atol=0.05)


def test_the_same_input_gives_the_same_numbers_and_scale_changes_nothing() -> None:
    first, second, families = effects(separation=2.0, true_cosine=0.5, n=20, seed=9)
    one = cosine_curve(first, second, families, (1,), seed=0)
    assert one == cosine_curve(first, second, families, (1,), seed=0)
    scaled = cosine_curve(Effect(1e3 * first.values, first.labels, HARM), second, families, (1,), seed=0)
    for kind in ("measured", "corrected"):
        a, b = getattr(one, kind)[0], getattr(scaled, kind)[0]
        assert (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high), abs=1e-6)
    swapped = cosine_curve(second, first, families, (1,), seed=0)
    assert swapped.corrected[0].value == pytest.approx(one.corrected[0].value)
