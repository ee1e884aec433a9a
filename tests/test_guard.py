"""The Latent Guard: decides as LDA where it should, chance stays chance, calibration holds, files round-trip."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import activations, planted_activations
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from tiny import words

import mechlens as ml
from mechlens.choices import RULES
from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.geometry.subspaces.grassmann import GAMMA
from mechlens.methods.guard.rules import CosineScore, score_by
from mechlens.methods.probing.auroc import auroc_estimate
from mechlens.methods.probing.beliefs import beliefs, centroids
from mechlens.methods.statistics.calibration import calibrate, calibration_error, fpr_threshold
from mechlens.models.engine.forward import Row
from mechlens.prompts.prompt import Prompt
from mechlens.studies.guard.fitting import LatentGuard

SEPARATION = 3.0
PLAIN = sorted(set(RULES.ours) - {"augmented"})
"""Rules that need not know what the model refuses."""


@pytest.fixture(scope="module")
def planted() -> tuple[Any, Any]:
    """Activations to fit on and fresh ones of the same world, harmfulness along one line everywhere."""
    world = planted_activations(separation=SEPARATION, n_per_class=100, d_model=24)
    # Built in one piece, so that both halves share the mean of all prompts.
    return world.acts.select(range(100)), world.acts.select(range(100, 200))


def positive(acts: Any) -> torch.Tensor:
    return torch.tensor([label == "harmful" for label in acts.labels])


# The rules


def isotropic(mean: torch.Tensor, half: torch.Tensor) -> Any:
    """Two equally large classes at mean +- half, whose covariance within classes is exactly a multiple of 1."""
    d_model = len(mean)
    axes = torch.cat([torch.eye(d_model), -torch.eye(d_model)]).double()
    values = torch.cat([mean + half + axes, mean - half + axes])
    labels = ("harmful",) * len(axes) + ("harmless",) * len(axes)
    return activations(values[:, None, None].float(), labels, levels=(1,), positions=("inst",))


def test_with_equal_priors_isotropic_noise_and_the_midpoint_the_centred_guard_decides_as_lda() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, half, probes = 5 * torch.randn(12, generator=generator), torch.randn(12, generator=generator) / 4, 4000
    acts = isotropic(mean, half)
    values, labels = acts.at(1, "inst").double(), positive(acts)
    tested = (mean + torch.randn(probes, 12, generator=generator)).double()
    by_rule = {name: RULES[name](values, labels)(tested) for name in ("centred", "lda", "faithful")}
    # The textbook's decision: on which side of the plane half way between the means.
    plane = (tested - mean) @ half.double()
    clear = plane.abs() > 1e-5
    assert torch.equal((by_rule["centred"] > 0)[clear], (plane > 0)[clear])
    assert torch.equal((by_rule["lda"] > 0)[clear], (plane > 0)[clear])
    # Not so the paper's uncentred cosines, for which the mean that all share is in the way.
    assert float(((by_rule["faithful"] > 0) != (plane > 0)).float().mean()) > 0.02


def test_lda_gives_the_log_odds_of_two_gaussians() -> None:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    labels = torch.arange(40_000) % 2 == 0
    shift = torch.tensor([1.0, 0, 0, -1.0, 0, 0.5], dtype=torch.float64)
    values = torch.randn(40_000, 6, generator=generator, dtype=torch.float64) @ mix + labels[:, None] * shift
    covariance = mix.T @ mix
    weight = torch.linalg.solve(covariance, shift)
    truth = values @ weight - weight @ shift / 2
    found = RULES["lda"](values, labels)(values)
    assert float((found - truth).abs().mean() / truth.abs().mean()) < 0.1


def test_subspaces_read_classes_of_one_mean_that_no_line_tells_apart() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(400) % 2 == 0
    values = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    values[labels, 0] *= 5
    values[~labels, 1] *= 5
    train, test = slice(0, 200), slice(200, 400)
    right = {
        rule: float(((RULES[rule](values[train], labels[train])(values[test]) > 0) == labels[test]).double().mean())
        for rule in ("subspaces", "lda", "logistic", "centred")
    }
    assert right.pop("subspaces") > 0.8
    assert max(right.values()) < 0.65


def test_a_subspace_score_rises_fastest_along_its_line() -> None:
    generator = torch.Generator().manual_seed(3)
    values, labels = torch.randn(60, 7, generator=generator, dtype=torch.float64), torch.arange(60) < 30
    values[labels, 0] += 2
    score = RULES["subspaces"](values, labels)
    steps = 1e-6 * torch.eye(7, dtype=torch.float64)
    slope = (score(score.centre + steps) - score(score.centre - steps)) / 2e-6
    torch.testing.assert_close(slope * score.scale / GAMMA, score.line, rtol=0, atol=1e-7)
    swapped = RULES["subspaces"](values, ~labels)
    torch.testing.assert_close(swapped(values), -score(values), rtol=0, atol=1e-9)


def test_the_faithful_rule_over_all_levels_is_the_papers_belief(planted: tuple[Any, Any]) -> None:
    train, test = planted
    guard = LatentGuard("faithful", ("inst",), "all", max_fpr=None).fit(train)
    assert guard.fitted_.calibration.threshold == 0.0
    reference = centroids(train, "harmful", "harmless", "inst")
    expected = beliefs(test, reference, centered=False, skip_embedding=False)
    # The centroids of `beliefs` are kept in float32.
    torch.testing.assert_close(guard.score(test), expected, rtol=0, atol=1e-7)
    assert guard.fitted_.levels == train.levels


@pytest.mark.parametrize("rule", PLAIN)
def test_the_planted_place_is_found_and_read(rule: str) -> None:
    world = planted_activations(separation=4.0, n_per_class=120, d_model=16, n_levels=4, at=(2, "last"))
    train, test = world.acts.select(range(160)), world.acts.select(range(160, 240))
    guard = LatentGuard(rule, ("last",)).fit(train)
    assert [(place.level, place.position) for place in guard.fitted_.places] == [(2, "last")]
    found = auroc_estimate(guard.score(test), positive(test), test.families)
    assert found.value > (0.9 if rule != "faithful" else 0.75)
    # At the other position nothing was planted, and nothing may be read.
    blind = LatentGuard(rule, ("inst",)).fit(train)
    other = auroc_estimate(blind.score(test), positive(test), test.families)
    assert other.low < 0.5 < other.high


@pytest.mark.parametrize("rule", PLAIN)
def test_shuffled_labels_give_an_auroc_of_one_half_within_its_interval(rule: str, planted: tuple[Any, Any]) -> None:
    train, test = planted
    areas = []
    for seed in range(20):
        order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = replace(train, labels=tuple(train.labels[i] for i in order), families=train.ids)
        guard = LatentGuard(rule, levels=(1,)).fit(shuffled)
        order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(100 + seed)).tolist()
        mixed = torch.tensor([test.labels[i] == "harmful" for i in order])
        areas.append(auroc_estimate(guard.score(test), mixed, test.ids))
    covered = sum(area.low <= 0.5 <= area.high for area in areas)
    assert covered >= 16  # 19 of 20 are expected; fewer than 16 has a chance of 0.0003
    assert np.mean([area.value for area in areas]) == pytest.approx(0.5, abs=0.05)
    real = LatentGuard(rule, levels=(1,)).fit(train)
    assert auroc_estimate(real.score(test), positive(test), test.families).low > 0.55


# The augmented pool


def leaning(n: int, refused: tuple[float, float], seed: int) -> tuple[Any, dict[str, bool]]:
    """Harm along one axis and refusal along another at one place; of harmful and harmless prompts so many refused."""
    generator = torch.Generator().manual_seed(seed)
    labels = ("harmful", "harmless") * n
    shares = torch.tensor(refused).repeat(n)
    flags = torch.rand(2 * n, generator=generator) < shares
    harm = torch.tensor([1.0, -1.0]).repeat(n)
    values = 0.5 * torch.randn(2 * n, 12, generator=generator) + 4.0
    values[:, 0] += harm
    values[:, 1] += 1.5 * torch.where(flags, 1.0, -1.0)
    acts = activations(values[:, None, None], labels, levels=(1,), positions=("inst",), prefix=f"s{seed}")
    return acts, dict(zip(acts.ids, flags.tolist(), strict=True))


def test_the_augmented_pool_finds_accepted_harmful_prompts_that_the_plain_one_takes_for_harmless() -> None:
    train, refused = leaning(200, (0.85, 0.1), 0)
    test, other = leaning(400, (0.5, 0.5), 1)
    settings = {"positions": ("inst",), "levels": (1,), "max_fpr": None}
    plain = LatentGuard("faithful", **settings).fit(train).predict(test) == "harmful"
    pooled = LatentGuard("augmented", **settings).fit(train, refused=refused).predict(test) == "harmful"
    flags, harmful = np.array([other[name] for name in test.ids]), positive(test).numpy()
    right = {
        kind: [float((said == harmful)[harmful & (flags == kind)].mean()) for said in (plain, pooled)]
        for kind in (True, False)
    }
    assert right[False][1] > right[False][0] + 0.1
    assert right[True][1] > 0.95
    # By hand: the centroid of harmful prompts lies half way between the refused and the accepted ones.
    values, labels = train.at(1, "inst").double(), positive(train)
    told = torch.tensor([refused[name] for name in train.ids])
    score = score_by("augmented", values, labels, told)
    assert isinstance(score, CosineScore)
    kinds = [values[labels & told].mean(dim=0), values[labels & ~told].mean(dim=0)]
    torch.testing.assert_close(score.positive, (kinds[0] + kinds[1]) / 2)
    torch.testing.assert_close(score.negative, values[~labels & ~told].mean(dim=0))


def test_the_augmented_pool_says_what_it_lacks() -> None:
    acts, refused = leaning(40, (1.0, 0.0), 0)
    with pytest.raises(UserError, match="needs to know which prompts the model refuses"):
        LatentGuard("augmented", ("inst",), (1,)).fit(acts)
    with pytest.raises(UserError, match=r"needs 10 prompts of each kind and there are .* 0 accepted positive"):
        LatentGuard("augmented", ("inst",), (1,)).fit(acts, refused=refused)
    with pytest.raises(UserError, match="nothing says whether the model refuses 's00'"):
        LatentGuard("augmented", ("inst",), (1,)).fit(acts, refused={"other": True})


def test_of_levels_that_do_as_well_the_lowest_is_read() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = ("harmful", "harmless") * 200
    sign = torch.tensor([1.0, -1.0]).repeat(200)
    noise = torch.randn(400, 1, 8, generator=generator)
    # Level 1 separates less, levels 2 and 3 alike, and level 4 by a hair more.
    apart = torch.tensor([0.0, 1.5, 4.0, 4.0, 4.1])
    values = noise.expand(-1, 5, -1) + 0.5 * apart[:, None] * sign[:, None, None] * torch.eye(8)[0]
    acts = activations(values[:, :, None], labels, levels=tuple(range(5)), positions=("inst",))
    guard = LatentGuard(positions=("inst",)).fit(acts)
    assert [place.level for place in guard.fitted_.places] == [2]
    found = {
        place.level: place.validation_auroc
        for place in LatentGuard(positions=("inst",), levels=(1, 2, 4)).fit(acts).fitted_.places
    }
    assert found[1] < found[4] - 0.05
    assert found[2] <= found[4] < found[2] + 0.01


def test_levels_are_chosen_without_the_test_part(planted: tuple[Any, Any]) -> None:
    from mechlens.prompts.split import split_by_family

    acts = planted[0]
    split = split_by_family(acts.labels, acts.families, fractions=(0.5, 0.2, 0.3), seed=0)
    one = LatentGuard().fit(acts, split)
    values = acts.values.clone()
    values[list(split.test)] = 1e6 * torch.randn(len(split.test), *values.shape[1:])
    other = LatentGuard().fit(replace(acts, values=values), split)
    assert one.fitted_.calibration == other.fitted_.calibration
    assert set(one.fitted_.train_ids).isdisjoint({acts.ids[i] for i in split.test})
    torch.testing.assert_close(one.score(planted[1]), other.score(planted[1]), rtol=0, atol=0)


# Calibration


def test_the_threshold_keeps_its_false_positive_rate_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    for rate, n in ((0.05, 60), (0.2, 30), (0.01, 99)):
        fitted = torch.randn(4000, n, generator=generator, dtype=torch.float64)
        fresh = torch.randn(4000, 50, generator=generator, dtype=torch.float64)
        thresholds = torch.tensor([fpr_threshold(row, rate) for row in fitted], dtype=torch.float64)
        found = float((fresh > thresholds[:, None]).double().mean())
        # Never above what was asked, and not far below: at most one rank.
        assert rate - 1 / (n + 1) - 0.004 < found < rate + 0.004, (rate, n, found)


def test_a_rate_that_so_few_prompts_cannot_promise_is_said_to_be_so() -> None:
    with pytest.warns(
        UserWarning, match="20 negative prompts can't promise a false-positive rate of 0.01, which needs 99"
    ):
        assert fpr_threshold(torch.arange(20).double(), 0.01) == 19.0


def test_probabilities_recover_a_planted_sigmoid() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(20_000, generator=generator, dtype=torch.float64) + 2
    truth = torch.sigmoid(1.5 * scores - 3)
    labels = torch.rand(20_000, generator=generator) < truth
    found = calibrate(scores, labels, 0.05)
    assert found.slope == pytest.approx(1.5, rel=0.07)
    # With classes made equally heavy the intercept moves by the log of their ratio.
    ratio = float(labels.sum()) / float((~labels).sum())
    assert found.intercept == pytest.approx(-3 - np.log(ratio), abs=0.1)
    assert calibration_error(found.probability(scores), labels) < 0.02
    assert calibration_error(torch.sigmoid(6 * scores - 12), labels) > 0.05


def test_scores_that_separate_the_classes_leave_the_probabilities_inside_0_and_1() -> None:
    scores, labels = torch.cat([torch.full((30,), 9.0), torch.full((30,), -9.0)]), torch.arange(60) < 30
    found = calibrate(scores.double() + torch.linspace(0, 1, 60), labels, 0.05)
    chances = found.probability(scores)
    assert 0.9 < float(chances[0]) < 1 - 1e-3
    assert 1e-3 < float(chances[-1]) < 0.1


@pytest.mark.parametrize("rule", ["centred", "lda", "logistic"])
def test_calibration_holds_on_fresh_prompts_of_a_planted_world(rule: str) -> None:
    world = planted_activations(separation=2.0, n_per_class=1200, d_model=12, n_levels=2)
    fit, fresh = world.acts.select(range(800)), world.acts.select(range(800, 2400))
    guard = LatentGuard(rule, ("inst",), (1,), max_fpr=0.1).fit(fit)
    flagged = guard.predict(fresh) == "harmful"
    assert float(flagged[~positive(fresh).numpy()].mean()) == pytest.approx(0.1, abs=0.035)
    assert calibration_error(torch.from_numpy(guard.predict_proba(fresh)[:, 1]), positive(fresh)) < 0.06


def test_the_calibration_error_by_hand() -> None:
    # Two probabilities; of each half's prompts a quarter is on the other side.
    chances = torch.cat([torch.full((400,), 0.9), torch.full((400,), 0.1)]).double()
    labels = torch.arange(800) % 4 != 0
    labels[400:] = ~labels[400:]
    # 0.15 in every bin but the middle one of fifteen, which both halves share and where their errors cancel.
    assert calibration_error(chances, labels) == pytest.approx(0.15 * 14 / 15, abs=0.005)
    assert np.isnan(calibration_error(chances, torch.ones(800, dtype=torch.bool)))


# scikit-learn's contract


def test_it_keeps_scikit_learns_contract(planted: tuple[Any, Any]) -> None:
    train, test = planted
    guard = LatentGuard("centred", max_fpr=0.1, seed=3)
    assert guard.get_params()["rule"] == "centred"
    assert guard.set_params(rule="lda") is guard
    with pytest.raises(NotFittedError):
        guard.score(test)
    before = guard.get_params()
    assert guard.fit(train) is guard
    assert guard.get_params() == before
    again = clone(guard)
    assert type(again) is LatentGuard
    assert again.get_params() == before
    assert not hasattr(again, "fitted_")
    assert np.array_equal(again.fit(train).decision_function(test), guard.decision_function(test))
    assert guard.classes_.tolist() == ["harmless", "harmful"]
    assert guard.n_features_in_ == 24
    assert np.array_equal(guard.predict(test) == "harmful", guard.decision_function(test) > 0)
    chances = guard.predict_proba(test)
    assert np.allclose(chances.sum(axis=1), 1)
    assert np.array_equal(np.argsort(chances[:, 1], kind="stable"), np.argsort(guard.score(test), kind="stable"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "svm"}, "there is no guard rule 'svm'"),
        ({"levels": "most"}, "choose best, all"),
        ({"levels": (9,)}, "level 9 was not collected"),
        ({"max_fpr": 0.0}, "give a share between 0 and 1"),
        ({"positions": ()}, "no position to read"),
        ({"positions": ("post[9]",)}, "'post[9]' was not collected"),
        ({"positive": "evil"}, "no prompt labelled 'evil'|'evil': 0"),
    ],
)
def test_what_cannot_be_fitted_is_said(options: dict[str, Any], said: str, planted: tuple[Any, Any]) -> None:
    import re

    with pytest.raises(UserError) as caught:
        LatentGuard(**options).fit(planted[0])
    assert re.search(said.replace("[", r"\[").replace("(", r"\("), str(caught.value)), caught.value


# Files, models, early exit


@pytest.mark.parametrize("rule", PLAIN)
def test_a_saved_guard_is_the_same_to_the_last_bit(rule: str, planted: tuple[Any, Any], tmp_path: Path) -> None:
    train, test = planted
    sha = [f"sha-{i}" for i in range(len(train.ids))]
    guard = LatentGuard(rule, ("inst", "last")).fit(train, train_sha256=sha)
    again = LatentGuard.of(ml.open(ml.save(guard, tmp_path / "guard.safetensors")))
    assert again.get_params() == guard.get_params()
    assert torch.equal(again.score(test), guard.score(test))
    assert np.array_equal(again.predict_proba(test), guard.predict_proba(test))
    assert again.classes_.tolist() == guard.classes_.tolist()
    assert again.fitted_.train_sha256 == guard.fitted_.train_sha256 == tuple(sha)
    ml.save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "guard.safetensors").read_bytes()


def test_another_thing_is_no_guard(planted: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match="a Checkpoint is no fitted guard"):
        LatentGuard.of(planted[0].checkpoint)


@pytest.fixture(scope="module")
def tiny_guard(tiny_model: Any) -> tuple[Any, Any]:
    """A tiny model and a guard that tells its questions from its statements at level 1."""
    model = tiny_model()
    prompts = [Prompt(f"p{i}", text, label="harmful" if text.endswith("?") else "harmless") for i, text in
               enumerate(words(40))]  # fmt: skip
    acts = collect(model, prompts, positions=["inst", "last"])
    return model, LatentGuard(levels=(1,)).fit(acts)


def test_asking_a_model_equals_scoring_its_activations(tiny_guard: tuple[Any, Any]) -> None:
    model, guard = tiny_guard
    texts = words(12, seed=5)
    said = guard(model, texts)
    acts = collect(model, [Prompt(str(i), text) for i, text in enumerate(texts)], positions=["inst", "last"])
    assert [verdict.score for verdict in said] == pytest.approx(guard.score(acts).tolist(), rel=1e-4, abs=1e-5)
    assert [verdict.harmful for verdict in said] == (guard.predict(acts) == "harmful").tolist()
    assert [verdict.probability for verdict in said] == pytest.approx(guard.predict_proba(acts)[:, 1], abs=1e-5)
    alone = [guard(model, [text])[0].score for text in texts]
    assert alone == pytest.approx([verdict.score for verdict in said], rel=1e-4, abs=1e-5)


def test_no_block_above_the_last_level_is_run_and_no_logits(
    tiny_guard: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechlens.models.engine.generate import prompt_logits
    from mechlens.models.native import native, native_blocks

    model, guard = tiny_guard
    guard(model, ["the warm up"])  # what it asks the model once is asked
    ran: list[str] = []

    def watch(name: str, module: Any) -> None:
        original = module.forward

        def forward(*inputs: Any, **options: Any) -> Any:
            ran.append(name)
            return original(*inputs, **options)

        monkeypatch.setattr(module, "forward", forward)

    # Not by hooks, which would send everything through the plain path.
    with native(model) as hf_model:
        for i, block in enumerate(native_blocks(model)):
            watch(f"block {i}", block.mlp)
        watch("norm", hf_model.model.norm)
        watch("head", hf_model.lm_head)
    guard(model, ["the thing?"])
    assert ran == ["block 0"]
    prompt_logits(model, [Row((1, 9, 9, 9), (3,))], None)  # the watch does see what else there is
    assert set(ran) == {"block 0", "block 1", "block 2", "norm", "head"}


def test_another_model_another_template_and_another_regime_are_refused(
    tiny_guard: tuple[Any, Any], tiny_model: Any
) -> None:
    from mechlens.prompts.templates.template import chat_template

    model, guard = tiny_guard
    other = tiny_model(seed=1)
    with pytest.raises(UserError, match=r"made with other weights of tiny-llama .*--other-weights"):
        guard(other, ["the thing"])
    assert len(guard(other, ["the thing"], other_weights=True)) == 1
    published = chat_template(template_of(model).tokenizer, "paper:qwen2")
    with pytest.raises(UserError, match="under another chat template"):
        guard(model, ["the thing"], published)
    acts = collect(model, [Prompt("p", "the thing")])
    folded = replace(acts, checkpoint=replace(acts.checkpoint, regime="processed"))
    with pytest.raises(UserError, match="made with raw weights, the model is one with processed ones: fit a guard"):
        guard.score(folded)
