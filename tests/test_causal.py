"""The causal battery: a planted model whose truth is known, its twins, and what can't be measured."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import planted_causal as planted
import pytest
import torch
from saved import left_unfinished, save_model, write_prompts
from sentence import require_one_sentence, require_short
from shown import require_shown

from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.damage import damage, damage_of_each, repetition
from mechlens.methods.directions.direction import cosine, mean_difference
from mechlens.methods.directions.nulls import shuffled_like
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import one_thread
from mechlens.methods.steering.equal_damage import TOLERANCE
from mechlens.methods.steering.interventions import residual_norms
from mechlens.methods.steering.steering import logits_under
from mechlens.models.bridge import bridge, has_hooks
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.prompts.prompt import Prompt
from mechlens.runs.folder import FolderCache
from mechlens.runs.run import read_run
from mechlens.studies.causal.choice import Strengths, best, choose, grid_layers
from mechlens.studies.causal.config import CausalPlan, Grid, costs
from mechlens.studies.causal.directions import (
    CELLS,
    HARMFUL,
    HARMFULNESS,
    HARMLESS,
    NAMES,
    PUSHES,
    REFUSAL,
    Cell,
    Setting,
    intervene,
    pushes,
    sources,
)
from mechlens.studies.causal.held_out import EffectKey
from mechlens.studies.causal.readings import Setup, read_in_scopes, read_refusal, read_replies, subjects
from mechlens.studies.causal.study import Battery, own_tokens, run_battery
from mechlens.studies.causal.sweeps import RefusalByLayer, depth_gap
from mechlens.studies.causal.verdict import INCONCLUSIVE, NOT_MEASURABLE, NOT_SHOWN, SHOWN, causal_verdict, decide

PLAN = CausalPlan(
    layers=(1, 2), strengths=(0.5,), n_validation=4, n_test=10, n_null=3, shuffled_directions=2, max_new_tokens=3,
    resamples=100,
)  # fmt: skip
SMALLER = replace(PLAN, layers=(1,), random_directions=5)
N = 40


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with one_thread(), warnings.catch_warnings():
        yield


def bridged(world: planted.World = "apart") -> Any:
    hf_model, tokenizer = planted.planted_model(world)
    checkpoint = Checkpoint("planted", "tests/planted", fingerprint=weight_fingerprint(hf_model.state_dict()))
    return bridge(hf_model, tokenizer, checkpoint)


@pytest.fixture(scope="module")
def model() -> Any:
    return bridged()


@pytest.fixture(scope="module")
def found(model: Any) -> Battery:
    with one_thread():
        return run_battery(model, *planted.planted_requests(N), PLAN)


def of(battery: Battery, measure: str, direction: str, cell: Cell, at: str = "") -> Estimate:
    return battery.effects[EffectKey(measure, direction, at or direction, cell)].change


def test_the_planted_model_dissociates(found: Battery, model: Any) -> None:
    verdict = causal_verdict(found)
    require_shown(found)
    assert str(verdict.headline) in repr(found)
    assert verdict.word == SHOWN
    numbers = found.unsteered.numbers
    assert numbers["inversion_parsed"].value == numbers["inversion_consistent"].value == 1.0
    assert numbers["inversion_declined"].value == 0.0
    assert numbers["inversion_auroc.unsteered"].value == 1.0
    for cell in CELLS:
        for scope in ("before", "all"):
            # Belief is moved either way from anywhere; the refusal direction leaves it alone in every cell.
            assert of(found, f"belief.{scope}", "harmfulness", cell).low > 0
            for at in NAMES:
                harm = of(found, f"belief.{scope}", "harmfulness", PUSHES[0])
                assert abs(of(found, f"belief.{scope}", "refusal", cell, at).value) < 0.25 * harm.value
        assert of(found, "refusal", "refusal", cell).low > 1
    # Everywhere it pushes both replies towards the word that refuses.
    assert of(found, "agreement.all", "refusal", PUSHES[0]).high < -1
    assert not has_hooks(model)


def test_the_directions_are_the_planted_ones(found: Battery) -> None:
    for name, coordinate in (("harmfulness", planted.BELIEF), ("refusal", planted.WILL)):
        truth = torch.eye(planted.D_MODEL)[coordinate]
        assert cosine(found.directions[name].vector, truth) > 0.8


def test_every_number_of_the_rule_has_its_controls(found: Battery) -> None:
    assert len(found.effects) == 7 * 2 * 2 * 4  # measures, directions, settings, cells
    for key, effect in found.effects.items():
        assert effect.random_max >= 0
        claimed = key.direction == key.at and key.cell in PUSHES
        claimed &= key.measure == {"harmfulness": "consistent.before", "refusal": "refusal"}[key.direction]
        assert (effect.shuffled_max == effect.shuffled_max) == claimed
    metrics = found.metrics()
    assert metrics["belief.before.harmfulness.at_harmfulness.add_harmless"].n == 10
    assert metrics["refusal.random_max.at_refusal.harmless"].n == 20


def test_a_push_turns_the_replies_and_ablating_refusal_stops_it(found: Battery) -> None:
    beliefs = found.beliefs.set_index(["direction", "operation", "label", "belief"])["share"]
    assert beliefs["none", "none", HARMLESS, "harmless"] == beliefs["none", "none", HARMFUL, "harmful"] == 1.0
    assert beliefs["harmfulness", "add", HARMLESS, "harmful"] == 1.0
    assert beliefs["harmfulness", "subtract", HARMFUL, "harmless"] == 1.0
    table = found.broken[found.broken["direction"] == "refusal"].set_index(["operation", "measure"])["value"]
    assert table["none", "refused_harmful"] > 0.2
    assert table["ablate", "refused_harmful"] == 0.0
    assert table["add", "refused_harmless"] == 1.0
    assert table["add", "refused_harmless_zhao"] == 1.0  # both judges know "I cannot"
    assert table["none", "kl"] == pytest.approx(0.0, abs=1e-9)
    assert table["add", "kl"] > table["none", "kl"]


def test_the_published_figures(found: Battery) -> None:
    refused = found.refusal_layers.table.set_index(["direction", "layer"])["value"]
    assert set(refused.index) == {("none", -1), *((name, layer) for name in NAMES for layer in (1, 2, 3))}
    assert refused["refusal", 2] > refused["none", -1]
    assert refused["harmfulness", 2] <= refused["none", -1]
    assert found.reply_layers is not None
    table = found.reply_layers.table.set_index(["direction", "layer", "operation", "label", "measure"])["value"]
    assert table["harmfulness", 1, "add", HARMLESS, "no.straight"] == 0.0
    assert table["harmfulness", 1, "add", HARMLESS, "no.reversed"] == 1.0
    assert table["none", -1, "none", HARMLESS, "no.straight"] == 1.0
    assert table["harmfulness", 1, "add", HARMLESS, "belief"] > 0 > table["none", -1, "none", HARMLESS, "belief"]


def test_the_layer_is_chosen_where_the_direction_can_act(found: Battery) -> None:
    # Block 2 is the last that carries BELIEF on to the last token.
    assert found.choice.chosen["harmfulness"].layer in (1, 2)
    assert set(found.choice.table["measure"]) == {"consistent.before", "refusal"}


NOT_APART = {
    "one variable": "added to harmless prompts, the refusal direction moves belief up by",
    # It makes harmful of what was harmless where it is subtracted: one of the two cells that no push shows.
    "reversing": "subtracted from harmless prompts, the refusal direction moves belief up by",
    "says yes": "added to harmless prompts, the harmfulness direction moves what both replies say up by",
}


@pytest.mark.parametrize("world", NOT_APART)
def test_worlds_where_the_two_are_not_apart(world: planted.World) -> None:
    twin = run_battery(bridged(world), *planted.planted_requests(N), SMALLER)
    verdict = causal_verdict(twin)
    assert verdict.word == NOT_SHOWN
    require_short(str(verdict.headline))
    assert NOT_APART[world] in verdict.sentence
    key = EffectKey("belief.all", "refusal", "refusal", Cell("add", HARMFUL))
    if world == "reversing":
        assert twin.effects[key].change.high < -1
        words = twin.beliefs.set_index(["direction", "operation", "label", "belief"])["share"]
        assert words["refusal", "subtract", HARMLESS, "harmful"] == 1.0
    if world == "says yes":
        # The published question alone would have called it a belief.
        assert of(twin, "agreement.before", "harmfulness", PUSHES[0]).low > 1
        assert abs(of(twin, "consistent.before", "harmfulness", PUSHES[0]).value) < 0.5


@pytest.mark.parametrize("at", NAMES)
@pytest.mark.parametrize("scope", ["before", "all"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_belief_moved_by_the_refusal_direction_anywhere_is_no_dissociation(
    found: Battery, at: str, scope: str, cell: Cell, sign: int
) -> None:
    assert decide(found.effects).word == SHOWN
    harm = of(found, f"belief.{scope}", "harmfulness", PUSHES[0])
    low, high = sorted((sign * 0.8 * harm.value, sign * 1.2 * harm.value))
    key = EffectKey(f"belief.{scope}", "refusal", at, cell)
    turned = replace(found.effects[key], change=Estimate(sign * harm.value, low, high, 10))
    verdict = decide({**found.effects, key: turned})
    assert verdict.word == NOT_SHOWN
    require_short(str(verdict.headline))
    assert verdict.deciding[key.name] == turned.change


@pytest.mark.parametrize(("name", "measure"), [("harmfulness", "consistent.before"), ("refusal", "refusal")])
@pytest.mark.parametrize("cell", PUSHES)
def test_each_push_has_to_do_what_is_claimed_and_more_than_chance(
    found: Battery, name: str, measure: str, cell: Cell
) -> None:
    key = EffectKey(measure, name, name, cell)
    effect = found.effects[key]
    assert decide({**found.effects, key: replace(effect, random_max=effect.change.high)}).word == NOT_SHOWN
    assert decide({**found.effects, key: replace(effect, random_max=effect.change.low)}).word == INCONCLUSIVE
    assert decide({**found.effects, key: replace(effect, shuffled_max=effect.change.value)}).word == INCONCLUSIVE
    other = Estimate(-effect.change.value, -effect.change.high, -effect.change.low, 10)
    assert decide({**found.effects, key: replace(effect, change=other)}).word == NOT_SHOWN


def test_labels_that_mean_nothing_are_not_measurable_and_nothing_is_asked_of_them() -> None:
    shuffled = run_battery(bridged(), *planted.shuffled_requests(N), replace(SMALLER, random_directions=2))
    verdict = causal_verdict(shuffled)
    assert verdict.word == NOT_MEASURABLE
    assert "needed: a lower bound above 0.6" in verdict.sentence
    assert "Measured all the same: " in verdict.sentence
    assert {key.measure for key in shuffled.effects} == {"refusal"}
    assert shuffled.reply_layers is None
    assert set(shuffled.choice.table["measure"]) == {"refusal"}


def test_too_few_prompts_for_any_direction_are_said_not_an_error(tmp_path: Path, words: list[str]) -> None:
    few = [*words[:7], "--n", "12", *words[7:]]
    main([*few, "--out", str(tmp_path / "out"), "--wandb.mode", "disabled"])
    run = require_one_sentence(tmp_path / "out")
    assert run.verdict is not None
    assert run.verdict.startswith("Not measurable. Of 12 training prompts 6 are harmful, and 10 are needed")
    assert "about 8 more training prompts" in run.verdict
    assert (tmp_path / "out" / "report.html").exists()


def test_what_would_make_it_measurable_is_said(found: Battery) -> None:
    def told(auroc: Estimate) -> str:
        numbers = {**found.unsteered.numbers, "inversion_auroc.unsteered": auroc}
        verdict = causal_verdict(replace(found, unsteered=replace(found.unsteered, numbers=numbers)))
        assert verdict.word == NOT_MEASURABLE
        return verdict.sentence

    # Half as far from the value as the bound is: four times the prompts.
    assert "About 30 more test prompts of each class (--n-test 40)" in told(Estimate(0.7, 0.5, 0.9, 20))
    assert "More prompts would not make it so" in told(Estimate(0.5, 0.4, 0.59, 200))
    for few in (Estimate(0.55, 0.4, 0.7, 20), Estimate(0.61, 0.0, 1.0, 14, is_auroc=True)):
        assert "That may be for want of prompts (--n-test)" in told(few)


def test_a_model_that_never_refuses_has_no_refusal_direction(found: Battery) -> None:
    verdict = causal_verdict(replace(found, counts={**found.counts, "refusal": (5, 37)}))
    assert verdict.word == NOT_MEASURABLE
    assert "Of 42 training prompts 5 are refused, and 10 are needed for a refusal direction" in verdict.sentence
    assert "about 42 more training prompts" in verdict.sentence
    never = causal_verdict(replace(found, counts={**found.counts, "refusal": (0, 37)}))
    assert "Prompts of which some are refused are needed." in never.sentence


def test_an_open_verdict_says_what_is_open_and_what_would_settle_it(found: Battery) -> None:
    key = EffectKey("belief.all", "refusal", "harmfulness", Cell("subtract", HARMLESS))
    harm = of(found, "belief.all", "harmfulness", PUSHES[0])
    wide = Estimate(0.25 * harm.low, -0.25 * harm.low, 0.75 * harm.low, 10)
    verdict = decide({**found.effects, key: replace(found.effects[key], change=wide)})
    assert verdict.word == INCONCLUSIVE
    require_short(str(verdict.headline))
    assert "subtracted from harmless prompts, at the harmfulness direction's layer" in verdict.sentence
    # Its upper bound has to come down from .75 to .5 of the harmfulness direction's: half as wide, four times as many.
    assert "about 30 more test prompts of each class (--n-test 40)" in verdict.sentence
    assert verdict.deciding[key.name] == wide


@pytest.mark.parametrize("measure", ["consistent.before", "refusal", "belief.all"])
def test_changes_that_are_no_numbers_are_not_measurable(measure: str, found: Battery) -> None:
    broken = {
        key: replace(effect, change=Estimate.missing(effect.change.n)) if key.measure == measure else effect
        for key, effect in found.effects.items()
    }
    chance = {key: replace(effect, random_max=float("nan")) for key, effect in found.effects.items()}
    for effects in (broken, chance):
        verdict = decide(effects)
        assert verdict.word == NOT_MEASURABLE
        require_short(str(verdict.headline))
        assert "no finite numbers: give --dtype float32" in verdict.sentence
        assert "nan" not in verdict.sentence


def test_more_prompts_are_not_asked_for_where_random_directions_do_as_much(found: Battery) -> None:
    key = EffectKey("belief.all", REFUSAL, REFUSAL, Cell("add", HARMFUL))
    harm = found.effects[EffectKey("belief.all", HARMFULNESS, HARMFULNESS, Cell("subtract", HARMFUL))].change
    change = Estimate(harm.value, harm.value * 0.98, harm.value * 1.02, harm.n)  # beyond the margin for certain
    verdict = decide({**found.effects, key: replace(found.effects[key], change=change, random_max=change.high)})
    assert verdict.word == INCONCLUSIVE
    require_short(str(verdict.headline))
    assert "as random directions do as much" in verdict.sentence
    assert "--n-test" not in verdict.sentence


def test_readings_equal_running_each_arm_by_itself(model: Any, found: Battery, tmp_path: Path) -> None:
    sides = zip((HARMFUL, HARMLESS), planted.planted_requests(3), strict=True)
    prompts = [replace(prompt, label=label) for label, own in sides for prompt in own]
    who = subjects(prompts, template_of(model))
    direction, norms, setting = found.directions["harmfulness"], found_norms(model, prompts), Setting(1, 0.5)
    arms = [
        [None] * 6,
        pushes(direction, setting, norms, who.labels),
        [intervene(direction, "ablate", setting, norms)] * 6,
    ]
    setup = Setup(model, norms, found.tokens, PLAN, FolderCache(tmp_path), believes=True)
    replies, refusal = read_replies(setup, who, arms, "before"), read_refusal(setup, who, arms)
    pieces = sorted(tmp_path.iterdir())
    assert len(pieces) >= 3
    for a, arm in enumerate(arms):
        for i, one in enumerate(arm):
            for polarity, values in (("straight", replies.straight), ("reversed", replies.reversed)):
                asked = who.asked[polarity]
                given = [] if one is None else [asked.within(i, one, "before")]
                logits = logits_under(model, asked.batch.select([i]), given)
                assert float(values[a, i]) == pytest.approx(float(found.tokens.words.difference(logits)[0]), abs=1e-4)
    # Both scopes at once, where a request runs once up to its question: the same numbers.
    scopes = read_in_scopes(replace(setup, cache=None), who, arms, ("before", "all"))
    for scope, read in scopes.items():
        alone = read_replies(replace(setup, cache=None), who, arms, scope)
        assert torch.allclose(read.straight, alone.straight, atol=1e-4)
        assert torch.allclose(read.reversed, alone.reversed, atol=1e-4)
    assert not torch.allclose(scopes["all"].straight, scopes["before"].straight, atol=1e-2)
    # From the cache: the same numbers, and nothing is made again.
    assert torch.equal(read_replies(setup, who, arms, "before").straight, replies.straight)
    assert torch.equal(read_refusal(setup, who, arms), refusal)
    assert sorted(tmp_path.iterdir()) == pieces
    change = replies.changes().consistent
    assert bool((change[0] * torch.where(who.harmful, -1.0, 1.0) > 0).all())


def test_the_early_late_split_has_its_own_test() -> None:
    layers, families = tuple(range(1, 11)), tuple(f"family{i}" for i in range(12))
    depth = torch.tensor(layers).double()[:, None]

    def bump(centre: float, height: float, seed: int) -> torch.Tensor:
        noise = torch.randn(10, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return height * (torch.exp(-((depth - centre) ** 2) / 2) + 0.1 * noise)

    def gap(harm: torch.Tensor, refusal: torch.Tensor) -> Any:
        return depth_gap(
            RefusalByLayer(layers, {"harmfulness": harm, "refusal": refusal}, pd.DataFrame(), families), 0, 400
        )

    apart = gap(bump(3, 1.0, 0), bump(7, 5.0, 1))
    assert 3 < apart.layers.value < 5
    assert apart.layers.low > 0
    assert apart.p < 0.01
    # However different their heights: what one direction does more is no later.
    ps = [gap(bump(5, 1.0, 2 * seed), bump(5, 5.0, 2 * seed + 1)).p for seed in range(40)]
    assert sum(p < 0.05 for p in ps) <= 5
    assert not gap(torch.zeros(10, 12), bump(7, 5.0, 1)).layers.measurable


def found_norms(model: Any, prompts: list[Any]) -> Any:
    return residual_norms(collect(model, prompts, positions=["inst", "post[*]"]))


def test_damage_is_nothing_without_an_intervention_and_equals_the_loss_by_hand(model: Any) -> None:
    import mechlens as ml

    prompts = planted.planted_requests(5)[0]
    batch = ml.tokenize(prompts, ml.template_of(model), padding_side="left")
    said = ml.answer(model, batch, max_new_tokens=2)
    nothing = damage(model, None, batch, said)
    assert torch.allclose(nothing.kl, torch.zeros(5, dtype=torch.float64), atol=1e-12)
    norms = found_norms(model, prompts)
    acts = ml.collect(model, [replace(p, label=str(i % 2)) for i, p in enumerate(prompts)], positions=["inst"])
    one = intervene(ml.mean_difference(acts, "0", "1", 1, "inst"), "add", Setting(1, 0.7), norms)
    hurt = damage(model, one, batch, said)
    for alone, together in zip((hurt, nothing), damage_of_each(model, [one, None], batch, said), strict=True):
        assert torch.equal(alone.own, together.own)
        assert torch.equal(alone.kl, together.kl)
    logits = logits_under(model, batch, [one]).double().log_softmax(dim=-1)
    clean = logits_under(model, batch, []).double().log_softmax(dim=-1)
    for i, tokens in enumerate(said.tokens):
        if len(tokens) == 1:  # one token, so the loss is that of the first answer token
            assert float(hurt.own[i]) == pytest.approx(-float(logits[i, tokens[0]]), abs=1e-4)
            kl = (clean[i].exp() * (clean[i] - logits[i])).sum()
            assert float(hurt.kl[i]) == pytest.approx(float(kl), abs=1e-4)
    assert {len(tokens) for tokens in said.tokens} == {1}
    assert not torch.equal(hurt.plain, nothing.plain)


def test_tokens_without_a_row_in_the_embedding_are_said_before_anything_is_run() -> None:
    import mechlens as ml

    small = bridged()
    batch = ml.tokenize(planted.planted_requests(5)[0], ml.template_of(small), padding_side="left")
    said = ml.answer(small, batch, max_new_tokens=1)
    acts = collect(small, [replace(p, label=str(i % 2)) for i, p in enumerate(batch.prompts)], positions=["inst"])
    found = mean_difference(acts, "0", "1", 1, "inst")
    rows = small.original_model.get_input_embeddings().weight.shape[0]
    with pytest.raises(UserError, match=rf"^the text has the token .*{rows}.*, and .* has {rows} rows only; load"):
        ml.project_tokens(small, found, [5, rows])
    small.mechlens.tokenizer.add_tokens([f"beyond{i}" for i in range(rows)])
    small.original_model.forward = None
    with pytest.raises(UserError, match=rf"^the text 'all of beyond.*' has the token .*, and .* has {rows} rows only"):
        damage(small, None, batch, said, texts=["fine", f"all of beyond{rows - 1}"])


@pytest.mark.parametrize(("tokens", "share"), [((), 0.0), ((1, 2), 0.0), ((1, 2, 3), 0.0), ((1,) * 6, 0.75)])
def test_repetition(tokens: tuple[int, ...], share: float) -> None:
    assert repetition(tokens) == share


def test_shuffled_directions_are_those_of_shuffled_labels() -> None:
    from planted import planted_activations

    acts = planted_activations(separation=4.0, n_per_class=32).acts
    real = mean_difference(acts, "harmful", "harmless", 1, "inst")
    drawn = shuffled_like(acts, "harmful", "harmless", 1, "inst", 40, 0)
    norms = torch.tensor([one.norm for one in drawn])
    assert float(norms.max()) < real.norm
    along = torch.stack([cosine(one.vector, real.vector) * one.norm for one in drawn])
    # Within pairs the sign of each difference is chance: mean 0, spread |separation| / sqrt(pairs).
    assert abs(float(along.mean())) < 3 * 4.0 / 32**0.5 / 40**0.5
    again = shuffled_like(acts, "harmful", "harmless", 1, "inst", 40, 0)
    assert all(torch.equal(one.vector, other.vector) for one, other in zip(drawn, again, strict=True))


def test_the_grid_and_the_work(model: Any) -> None:
    assert grid_layers(model, (), 3) == (2,)
    assert grid_layers(model, (), 1) == (1, 2, 3)
    with pytest.raises(UserError, match="no layer 4 to intervene at"):
        grid_layers(model, (1, 4), 3)
    few, many = (costs(plan, Grid(2, 3), 10.0, 30.0, believes=True) for plan in (PLAN, replace(PLAN, n_test=20)))
    # Two settings; nothing, and two directions added and subtracted; 20 more requests and two questions in two scopes.
    assert many["test prompts"] - few["test prompts"] == 2 * 5 * 20 * (10 / 2 + 2 * 2 * 30 / 2)
    assert many["replies by layer"] == few["replies by layer"]
    assert "replies by layer" not in costs(PLAN, Grid(2, 3), 10.0, 30.0, believes=False)
    who = subjects([Prompt("a", "x y"), Prompt("b", "z")], template_of(model))
    assert 0 < own_tokens(who.batch) < len(who.batch.row(0))


def test_the_whole_grid_is_every_layer_that_can_be_chosen_at_every_strength(model: Any, found: Battery) -> None:
    acts = collect(model, found.judged.prompts, positions=["inst", "post[*]"])
    contrasts = sources(found.judged, acts, found.split.train)
    who = subjects([found.judged.prompts[i] for i in found.split.validation], template_of(model))
    plan = replace(PLAN, layers=(), strengths=(0.25, 0.5))
    setup = Setup(model, residual_norms(acts), found.tokens, plan, None, believes=True)
    said = found.judged.answers.select(found.split.validation)

    def chosen(first: tuple[int, ...], **options: Any) -> Any:
        own = replace(setup, plan=replace(plan, **options))
        return choose(own, who, Strengths(own, contrasts, who.batch, said), first, {})

    coarse = chosen((2,))
    whole = chosen((2,), grid="all")
    for choice, tried in ((coarse, 4), (whole, 6)):  # layers 1 to 3 of 4 at two strengths; at the best layer both
        known = choice.cells.set_index(["direction", "outcome"])["n"]
        assert known.groupby("direction").sum().tolist() == [6, 6]
        for name in NAMES:
            rows = choice.table[choice.table["direction"] == name]
            assert known[name, "tried"] == len(rows) == tried
            assert not rows.duplicated(["layer", "strength"]).any()
    both = coarse.table.merge(whole.table, on=["direction", "layer", "strength"])
    assert len(both) == len(coarse.table)
    assert both["value_x"].tolist() == pytest.approx(both["value_y"].tolist(), abs=1e-5)
    asked = chosen((1,), layers=(1,)).cells
    assert asked.set_index(["direction", "outcome"])["n"]["refusal", "not tried: layer not asked for"] == 4


def kl_percentile(push: Any, batch: Any, said: Any) -> float:
    """Whole passes of each prompt with its answer, with a hook of PyTorch's that adds to the prompt's tokens."""
    hf_model, kls = planted.planted_model()[0], []
    for i, tokens in enumerate(said.tokens):
        ids, start = torch.tensor([[*batch.row(i), *tokens]]), len(batch.row(i))
        vector = push.strength * push.norms.at(push.layers[0], "all") * push.direction.unit

        def add(module: Any, given: Any, vector: torch.Tensor = vector, start: int = start) -> Any:
            hidden = given[0].clone()
            hidden[:, :start] += vector
            return (hidden, *given[1:])

        with torch.inference_mode():
            clean = hf_model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            handle = hf_model.model.layers[push.layers[0]].register_forward_pre_hook(add)
            steered = hf_model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            handle.remove()
        kls.append((clean.exp() * (clean - steered)).sum(-1))
    return float(torch.cat(kls).quantile(0.95))


def test_at_equal_damage_each_direction_has_its_own_strength_at_each_layer(model: Any, found: Battery) -> None:
    """Put into the model by hand, every strength that was found damages harmless answers by the KL asked for."""
    acts = collect(model, found.judged.prompts, positions=["inst", "post[*]"])
    contrasts, norms = sources(found.judged, acts, found.split.train), residual_norms(acts)
    who = subjects([found.judged.prompts[i] for i in found.split.validation], template_of(model))
    harmless, said = who.of(HARMLESS), found.judged.answers.select(found.split.validation)
    plan = replace(PLAN, layers=(1, 2), calibrate_kl=0.05)
    setup = Setup(model, norms, found.tokens, plan, None, believes=False)

    def strengths(plan: CausalPlan) -> Strengths:
        own = replace(setup, plan=plan)
        return Strengths(own, contrasts, who.batch.select(harmless), said.select(harmless))

    own = strengths(plan)
    choice = choose(setup, who, own, (1, 2), {})
    table = own.table().set_index(["direction", "layer"])
    assert set(table.index) == {(name, layer) for name in NAMES for layer in (1, 2)}
    assert table["reached"].all()
    for (name, layer), row in table.iterrows():
        push = intervene(contrasts[name].direction(layer), "add", Setting(layer, row["strength"]), norms)
        assert kl_percentile(push, own.harmless, own.said) == pytest.approx(row["kl"], rel=1e-3)
        assert row["kl"] == pytest.approx(0.05, rel=TOLERANCE)
    for at in NAMES:  # at one layer both directions damage alike, and so have strengths of their own
        layer = choice.chosen[at].layer
        assert choice.places[at] == {name: Setting(layer, table.loc[(name, layer), "strength"]) for name in NAMES}
        mine = choice.table[choice.table["direction"] == at]
        assert layer == mine.loc[mine["value"].idxmax(), "layer"]  # simply the largest push
    assert choice.cells.groupby("direction")["n"].sum().tolist() == [3, 3]
    never = replace(plan, calibrate_kl=1e6)
    with pytest.raises(UserError, match=r"reaches 1e\+06 nats at none of the layers 1; give a smaller"):
        choose(replace(setup, plan=never), who, strengths(never), (1,), {})


# The command line


def saved(folder: Path) -> str:
    hf_model, tokenizer = planted.planted_model()
    hf_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


SMALL = (
    "--layers", "1", "--strengths", "0.5", "--n-validation", "4", "--n-test", "10", "--n-null", "2",
    "--random-directions", "3", "--shuffled-directions", "2", "--resamples", "40", "--max-new-tokens", "3",
    "--every-position",
)  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command on the planted model; --out is to be added."""
    folder = tmp_path_factory.mktemp("planted")
    harmful, harmless = planted.planted_requests(N)
    files = [
        write_prompts(folder / f"{n}.jsonl", [p.text for p in own]) for n, own in (("bad", harmful), ("good", harmless))
    ]
    return ["causal", "--model", saved(folder / "model"), "--harmful", files[0], "--harmless", files[1], *SMALL]


@pytest.fixture(scope="module")
def out(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "causal"
    with one_thread(), warnings.catch_warnings():
        main([*words, "--out", str(folder), "--wandb.mode", "disabled", "--keep-cache"])
    return folder


def test_the_run_folder_holds_the_finding(out: Path) -> None:
    run = require_one_sentence(out)
    assert run.status == "success"
    assert run.verdict is not None
    assert set(run.metrics) >= {
        "refusal.refusal.at_refusal.add_harmless", "refusal.random_max.at_refusal.harmless", "depth_gap", "depth_gap.p",
        "belief.all.refusal.at_harmfulness.subtract_harmless", "inversion_parsed", "inversion_declined",
    }  # fmt: skip
    tables = {path.stem for path in (out / "tables").glob("*.parquet")}
    assert tables >= {
        "refusals_by_layer", "replies_by_layer", "choice", "cells", "beliefs", "by_question", "damage",
        "steered_answers", "positions",
    }  # fmt: skip
    answers = pd.read_parquet(out / "tables" / "steered_answers.parquet")
    assert len(answers) == 2 * 3 * 20
    positions = pd.read_parquet(out / "tables" / "positions.parquet").set_index(["direction", "position", "measure"])
    assert positions["cosine"]["harmfulness", "inst", "refusal"] == pytest.approx(1.0)
    assert positions["value"]["harmfulness", "inst", "consistent.before"] > 1
    html = (out / "report.html").read_text()
    assert "Harmless requests that are refused, by layer (Fig. 4)" in html
    assert "Replies about harmful requests that say No, by layer (Fig. 5)" in html
    assert "<li>Dissociation shown: all three hold.</li>" in html
    assert "both replies, harmfulness added to harmless, before the question" in html
    assert (out / "direction_harmfulness.safetensors").exists()
    assert (out / "direction_refusal.safetensors").exists()


def test_the_same_command_goes_on_from_its_cache(out: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((out / "run.json").read_text())["metrics"]
    lost = sorted((out / "cache").glob("*.safetensors"))[::3]
    for path in lost:
        path.unlink()
    left_unfinished(out)
    made: list[str] = []
    put = FolderCache.put
    monkeypatch.setattr(FolderCache, "put", lambda self, key, value: (made.append(key), put(self, key, value)))
    main([*words, "--out", str(out), "--wandb.mode", "disabled", "--keep-cache"])
    assert sorted(made) == [path.stem for path in lost]
    after = json.loads((out / "run.json").read_text())["metrics"]
    for name, estimate in before.items():
        for part, value in estimate.items():
            assert after[name][part] == (value if value is None else pytest.approx(value, abs=1e-6)), name


MISTAKES = {
    ("--n-test", "9"): "--n-test must be at least 10, and is 9",
    ("--coefficient", "0"): "the coefficient is 0",
    ("--strengths", "-1"): "give at least one, all above 0",
    ("--layers", "9"): "there is no layer 9; model has layers 0 to 3",
    ("--layers", "1", "--full"): "give one of them",
    ("--random-directions", "0"): "--random-directions must be at least 1, and is 0",
    ("--grid", "all"): "leave --full and --layers out",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_in_one_line(
    mistake: tuple[str, ...], words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words, *mistake, "--out", str(tmp_path / "out"), "--wandb.mode", "disabled"])
    assert stop.value.code == (2 if "must be" in MISTAKES[mistake] else 1)
    said = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("mechlens: ") and "warning" not in line
    ]
    assert len(said) == 1
    assert MISTAKES[mistake] in said[0]


def test_a_model_that_answers_nothing_to_the_question_is_told_so(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "noise")
    swapped = [str(model) if word == words[2] else word for word in words]
    at = swapped.index("--strengths")
    swapped[at : at + 2] = ["--calibrate-kl", "0.05"]
    main([*swapped, "--out", str(tmp_path / "out"), "--wandb.mode", "disabled"])
    run = read_run(tmp_path / "out")
    assert run.verdict is not None
    assert run.verdict.startswith("Not measurable. ")
    calibrated = pd.read_parquet(tmp_path / "out" / "tables" / "calibration.parquet")
    cells = pd.read_parquet(tmp_path / "out" / "tables" / "cells.parquet")
    assert set(calibrated["strength"]) == set(cells["strength"])
    assert "Strengths of equal damage" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(SystemExit):
        main([*swapped, "--strengths", "0.5", "--out", str(tmp_path / "both")])
    assert "--calibrate-kl finds the strengths; leave --strengths out" in capsys.readouterr().err


def test_of_pushes_that_do_as_much_the_weakest_is_chosen() -> None:
    rows = [(2, 0.5, 1.0, 0.5), (5, 0.5, 3.2, 2.0), (5, 1.0, 4.0, 3.0), (2, 1.0, 3.9, 3.0), (9, 0.25, 9.0, 8.0)]
    table = pd.DataFrame(rows, columns=["layer", "strength", "value", "low"])
    # Layer 9 of 10 is too late; 3.2 lies above the lower bound of the largest, 4.0.
    assert best(table, 10) == Setting(5, 0.5)
    assert best(table.assign(low=table["value"]), 10) == Setting(5, 1.0)
    # Without a number anywhere one is named all the same; the verdict says that nothing is measurable.
    assert best(table.assign(value=float("nan"), low=float("nan")), 10).layer < 8


def test_what_few_prompts_add_to_the_spread_of_chance_is_taken_off() -> None:
    from mechlens.studies.causal.held_out import _largest

    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(200, 40, 1, generator=generator, dtype=torch.float64)
    noise = 3 * torch.randn(200, 40, 6, generator=generator, dtype=torch.float64)
    real = torch.tensor([float(one.abs().max()) for one in truth]).mean()
    plain = torch.tensor([float(one.mean(dim=1).abs().max()) for one in truth + noise]).mean()
    shrunk = torch.tensor([_largest(one) for one in truth + noise]).mean()
    assert plain > 1.4 * real
    assert 0.9 * real < shrunk < 1.1 * real
    # Directions that do nothing of their own reach nothing, and without noise nothing is taken off.
    assert torch.tensor([_largest(one) for one in noise]).mean() < 0.4 * real
    assert _largest(truth[0].expand(40, 6)) == pytest.approx(float(truth[0].abs().max()))
    assert _largest(torch.zeros(3, 2)) == 0.0
