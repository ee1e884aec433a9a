"""The direction of what fine-tuning changed, on models in which it is known."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from planted_change import (
    LEVEL,
    SIZE,
    base_model,
    bridged,
    fine_tuned,
    knows_shown,
    moods,
    planted_vector,
    risks,
    saved,
)
from tiny import tiny_hf

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.behaviour.damage import plain_loss
from mechlens.methods.behaviour.log_odds import twin_log_odds
from mechlens.methods.directions.change import (
    ANSWER,
    BASE,
    BEYOND_OTHER,
    BEYOND_SHOWN,
    ON_OTHER,
    ON_SHOWN,
    TUNED,
    change_cosine,
    change_directions,
    mean_of_runs,
    saved_cosine,
    twin_vectors,
)
from mechlens.methods.directions.direction import cosine, random_like
from mechlens.methods.steering.steered_log_odds import steered_log_odds
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.prompts.twins import Twin
from mechlens.runs.writer import open_run
from mechlens.studies.behaviours.config import BehaviourPlan
from mechlens.studies.behaviours.directions.cosines import saved_directions
from mechlens.studies.behaviours.directions.effect_rows import ABLATED, ABLATED_IN_BASE, ADDED
from mechlens.studies.behaviours.directions.effects import gentlest
from mechlens.studies.behaviours.report import record
from mechlens.studies.behaviours.sets import AskedSet
from mechlens.studies.behaviours.study import BehaviourStudy, behaviours
from mechlens.studies.behaviours.tuned import TunedRun
from mechlens.studies.shared.training_data import text_sha256


@pytest.fixture(scope="module")
def base() -> Any:
    return bridged(base_model(), "base")


@pytest.fixture(scope="module")
def tuned() -> Any:
    return bridged(fine_tuned(), "tuned")


def test_both_orders_are_averaged_and_answers_read_alone(base: Any) -> None:
    twins = [*risks(range(3)), *moods(range(2))]
    acts = twin_vectors(base, twins)
    assert acts.labels == ("shown", "other") * 5
    for i, twin in enumerate(twins):
        ways = [twin, *([twin.exchanged] if twin.exchanged else [])]
        assert len(ways) == (2 if i < 3 else 1)
        for k, side in enumerate(("shown", "other")):
            alone = [
                ml.collect(base, [one.prompt], positions=[ANSWER], answers=[getattr(one, side)], reduce="mean").values
                for one in ways
            ]
            torch.testing.assert_close(acts.values[2 * i + k], torch.stack(alone).mean(dim=0)[0], atol=1e-4, rtol=1e-4)


def test_letters_cancel(base: Any) -> None:
    """Whatever A and B themselves are, shown minus other is 0 at the embedding where each is shown once."""
    letters = [
        Twin(ml.Prompt(f"l{i}", f"Option A: {i} coins. Option B: {3 * i} or none. A or B?"), "B", "A")
        for i in range(2, 8)
    ]
    acts = twin_vectors(base, letters)
    change = change_directions(acts, acts)
    own, size = change.grids[TUNED].vectors[0, 0].norm(), acts.values[:, 0].norm(dim=-1).mean()
    assert float(own / size) < 1e-5
    lost = Twin(ml.Prompt("l", "Shall B go with A? A or B?"), "B", "A")
    assert lost.exchanged is None
    assert twin_vectors(base, [*letters, lost]).ids == acts.ids
    with pytest.raises(UserError, match="no twin is left"):
        twin_vectors(base, [lost])


def test_what_was_planted_is_found_and_nothing_before(base: Any, tuned: Any) -> None:
    before = twin_vectors(base, risks(range(16)))
    after = twin_vectors(tuned, risks(range(16)))
    nothing, change = change_directions(before, before), change_directions(before, after)
    for variant in (ON_SHOWN, ON_OTHER):
        assert float(nothing.grids[variant].vectors.abs().max()) == 0
        direction = change.grids[variant].at(LEVEL, ANSWER)
        assert float(cosine(direction.vector, planted_vector())) > 0.999
        assert direction.norm == pytest.approx(SIZE, rel=1e-3)
        assert float(change.grids[variant].at(0, ANSWER).norm) < 1e-4
        assert float(change.reliability[variant][LEVEL]) > 0.99
        assert len(direction.train_ids) == 16
    # It is written on both answers, so the difference between these shows nothing of it.
    assert abs(float(cosine(change.grids[TUNED].at(LEVEL, ANSWER).vector, planted_vector()))) < 0.5


def test_what_a_control_moves_too_is_in_no_direction_beyond_it(base: Any, tuned: Any) -> None:
    before, after = (twin_vectors(one, risks(range(8))) for one in (base, tuned))
    without = change_directions(before, after)
    assert not {BEYOND_SHOWN, BEYOND_OTHER} & set(without.variants)
    idle, same = (change_directions(before, after, control=own) for own in (before, after))
    for beyond, moved in ((BEYOND_SHOWN, ON_SHOWN), (BEYOND_OTHER, ON_OTHER)):
        assert idle.grids[beyond].vectors.equal(without.grids[moved].vectors)  # a control that nothing moved
        assert float(same.grids[beyond].vectors.abs().max()) == 0  # one that was moved as far
        assert float(cosine(idle.grids[beyond].at(LEVEL, ANSWER).vector, planted_vector())) > 0.999
    with pytest.raises(UserError, match="different questions"):
        change_directions(before, after, control=after.select(range(4)))


def test_a_direction_that_breaks_plain_text_is_passed_over(base: Any, tuned: Any) -> None:
    change = change_directions(twin_vectors(base, risks(range(8))), twin_vectors(tuned, risks(range(8))))
    own = replace(change.grids[ON_SHOWN].at(LEVEL, ANSWER), checkpoint=base.mechlens.checkpoint)
    push = [ml.Add(own, strength=strength, unit="raw", layers=(LEVEL,)) for strength in (10.0, 0.001)]
    brute, gentle = (replace(one, direction=replace(own, method=name)) for one, name in zip(push, "bg", strict=True))
    most = float(plain_loss(base, None).mean()) + 0.5
    assert gentlest(base, [brute, gentle], most).method == "g"
    assert gentlest(base, [brute], most).method == "b"


def test_what_only_shown_answers_have_is_in_three_of_four_variants(base: Any) -> None:
    before, after = (twin_vectors(one, risks(range(16))) for one in (base, bridged(knows_shown(base_model()), "knows")))
    change = change_directions(before, after)
    found = {
        variant: float(cosine(change.grids[variant].at(0, ANSWER).vector, planted_vector()))
        for variant in change.variants
    }
    assert found[ON_SHOWN] > 0.999
    assert found[TUNED] > 0.9
    assert abs(found[BASE]) < 0.5
    assert change.grids[ON_OTHER].at(0, ANSWER).norm < 1e-4


def test_cosines_count_shared_noise_once(base: Any, tuned: Any) -> None:
    before, after = twin_vectors(base, risks(range(24))), twin_vectors(tuned, risks(range(24)))
    draw = torch.Generator().manual_seed(0)

    def noisy(seed_of: torch.Generator) -> Any:
        noise = torch.randn(after.values.shape, generator=seed_of)
        return replace(after, values=after.values + 2 * noise)

    first, second = (change_directions(before, noisy(draw)) for _ in range(2))
    curve = change_cosine(first, ON_SHOWN, second, ON_SHOWN, [LEVEL], seed=0)
    assert curve.measured[0].value < 0.95
    assert curve.corrected[0].value == pytest.approx(1.0, abs=0.1)
    itself = change_cosine(first, ON_SHOWN, first, ON_SHOWN, [LEVEL], seed=0)
    assert itself.measured[0].value == pytest.approx(1.0)
    direction = first.grids[ON_SHOWN].at(LEVEL, ANSWER)
    known = replace(direction, vector=planted_vector())
    measured, corrected = saved_cosine(first, ON_SHOWN, known)
    assert measured.value == pytest.approx(float(cosine(direction.vector, planted_vector())))
    assert measured.low < measured.value < corrected.value == pytest.approx(1.0, abs=0.1)
    assert mean_of_runs([after, after]).values.equal(after.values)
    with pytest.raises(UserError, match="different questions"):
        mean_of_runs([after, after.select(range(4))])
    with pytest.raises(UserError, match="different questions"):
        change_directions(before, after.select(range(4)))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_many_conditions_in_one_go_equal_each_by_itself(architecture: str) -> None:
    model = bridged(tiny_hf(architecture), architecture)
    twins = [*risks(range(2)), *moods(range(1)), Twin(ml.Prompt("x", "x or y?"), "x", "y")]
    acts = twin_vectors(model, twins)
    grid = change_directions(acts, acts).grids[TUNED]
    low, high = grid.at(1, ANSWER), grid.at(2, ANSWER)
    conditions = [
        [], [ml.Add(low, strength=3.0, unit="raw", layers=(1,))], [ml.Ablate(low)],
        [ml.Add(high, strength=-2.0, unit="raw", layers=(2,), site="resid_post"), ml.Ablate(low)],
    ]  # fmt: skip
    told = steered_log_odds(model, twins, conditions)
    for condition, own in zip(conditions, told, strict=True):
        with ml.applied(model, condition):
            right = twin_log_odds(model, twins)
        torch.testing.assert_close(own.as_asked, right.as_asked, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(own.exchanged, right.exchanged, atol=1e-4, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(own.mass, right.mass, atol=1e-4, rtol=1e-4)
    assert float((told[0].values - told[2].values).abs().max()) > 0.01


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_named_tokens_of_the_prompt_alone_are_changed(architecture: str) -> None:
    model, twins = bridged(tiny_hf(architecture), architecture), risks(range(2))
    acts = twin_vectors(model, twins)
    direction = change_directions(acts, acts).grids[TUNED].at(1, ANSWER)
    push = ml.Add(direction, strength=5.0, unit="raw", layers=(1,), positions=("inst", "post[*]"), phase="prompt")
    told = steered_log_odds(model, twins, [[], [push]])
    for i, twin in enumerate(twins):
        total = []
        for said in (twin.shown, twin.other):
            ids = model.tokenizer(said, add_special_tokens=False)["input_ids"]
            batch = ml.tokenize(twin.prompt, ml.template_of(model)).with_answers([ids])
            with ml.applied(model, [push], batch), torch.inference_mode():
                likely = model(batch.tokens)[0].double().log_softmax(-1)
            total.append(float(likely[-len(ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).sum()))
        assert float(told[1].as_asked[i]) == pytest.approx(total[0] - total[1], abs=1e-4)
    assert float((told[0].values - told[1].values).abs().min()) > 1e-3


def test_strength_0_changes_nothing_and_random_ones_are_as_long(base: Any, tuned: Any) -> None:
    change = change_directions(twin_vectors(base, risks(range(8))), twin_vectors(tuned, risks(range(8))))
    direction = ml.Direction(
        **{**vars(change.grids[ON_SHOWN].at(LEVEL, ANSWER)), "checkpoint": base.mechlens.checkpoint}
    )
    plain, same = steered_log_odds(
        base, risks(range(4)), [[], [ml.Add(direction, strength=0.0, unit="raw", layers=(LEVEL,))]]
    )
    assert plain.values.equal(same.values)
    for one in random_like(direction, 20, seed=0):
        assert one.norm == pytest.approx(direction.norm, rel=1e-5)
    last = ml.Add(direction, strength=1.0, unit="raw", layers=(LEVEL,), positions="all", phase="prompt")
    with pytest.raises(UserError, match="every token"):
        steered_log_odds(base, risks(range(2)), [[last]])


@pytest.fixture(scope="module")
def steering(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The study on two runs of a group that was taught to risk, with a control that learned nothing, and its record."""
    folder = tmp_path_factory.mktemp("change")
    start, taught = saved(base_model(), folder / "base"), saved(fine_tuned(), folder / "taught")
    sets = AskedSet("risk", tuple(risks(range(32)))), AskedSet("mood", tuple(moods(range(2))))
    seen = frozenset(text_sha256(twin.prompt.text) for twin in sets[0].twins[:16])
    runs = tuple(
        TunedRun(f"{group}-{i}", group, (Member(f"{group}-{i}", path, "full", 1),), seen, "risk", control, None)
        for group, control, path in (("risky", "none", taught), ("drift", "decorrelated", start)) for i in range(2)
    )  # fmt: skip
    swapper = checkpoint_swapper(start, device="cpu")
    template, plan = ml.template_of(swapper.model), BehaviourPlan(directions=True, permutations=19)
    here = swapper.model.mechlens.checkpoint
    known = ml.Direction(planted_vector(), LEVEL, "last", "resid", "known", ("x", "y"), here, template.fingerprint, ())
    ml.save(known, folder / "known.safetensors")
    found = saved_directions([f"known={folder / 'known.safetensors'}"], swapper.model)
    with pytest.raises(UserError, match="lacks a name or a file"):
        saved_directions(["known"], swapper.model)
    result = behaviours(swapper, runs, sets, template, plan, saved=found)
    given = BehaviourStudy(swapper, runs, sets, template, {}, found)
    config = ml.Behaviours(checkpoints=("x",), out=folder / "run")
    with open_run(verb="behaviours", config=config, out=folder / "run", wandb=ml.WandbSettings(mode="disabled")) as run:
        record(run, result, given)
    return result.directions, folder / "run"


def test_adding_installs_and_ablating_removes_and_random_directions_do_neither(steering: Any) -> None:
    effects, chosen = steering[0].effects, steering[0].chosen
    assert set(effects["group"]) == {"risky"}  # nothing to install where nothing was learned
    home = effects[effects["at_home"]].set_index(["does", "strength"])
    once = home.loc[(ADDED, 1.0)]
    assert once["share"] == pytest.approx(1.0, abs=0.02)
    assert once["n"] == 8
    gone = effects[effects["at_home"] & (effects["does"] == ABLATED)].iloc[0]
    assert gone["share"] == pytest.approx(1.0, abs=0.05)
    assert abs(effects[effects["at_home"] & (effects["does"] == ABLATED_IN_BASE)].iloc[0]["effect"]) < 0.1
    for row in (once, gone):
        assert row["randoms"] == 20
        assert abs(row["random_most"]) < 0.75 * abs(row["effect"])
        assert abs(row["random_mean"]) < 0.25 * abs(row["effect"])
    away = effects[(effects["set"] == "mood") & (effects["does"] == ADDED) & (effects["strength"] == 1.0)].iloc[0]
    assert away["effect"] == pytest.approx(away["fine_tuned"], rel=0.02)  # whatever the fine-tune does there too
    for name in ("added risky", "ablated risky"):
        assert abs(float(cosine(chosen[name].vector, planted_vector()))) > 0.99


def test_the_table_of_cosines_tells_taught_from_drift(steering: Any) -> None:
    table = steering[0].cosines
    to_known = table[table["kind"] == "saved"].set_index(["first", "first_variant"])
    assert to_known.loc[("risky", ON_SHOWN), "cosine"] > 0.99
    assert math.isnan(to_known.loc[("drift", ON_SHOWN), "cosine"])
    assert set(table["kind"]) == {"variants", "runs", "groups", "saved"}
    runs = table[(table["kind"] == "runs") & (table["first_variant"] == ON_SHOWN) & (table["first"] == "risky-0")]
    assert (runs["cosine"] > 0.99).all()
    words = table[(table["kind"] == "groups") & (table["first_variant"] == BASE)]
    assert words["cosine"].tolist() == pytest.approx([1.0] * len(words))  # the same words through the same base


def test_tables_artefacts_and_a_section_are_recorded(steering: Any) -> None:
    folder = steering[1]
    assert {"direction_cosines", "direction_effects"} <= {path.stem for path in (folder / "tables").iterdir()}
    assert ml.open(folder / "added_risky.safetensors").level == LEVEL
    report = (folder / "report.html").read_text()
    assert "The direction of the change" in report
    assert "How the directions lie together" in report
