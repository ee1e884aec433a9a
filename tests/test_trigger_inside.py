"""A trigger's direction, where it is carried and whether it is gone, on models in which a token flips the answer."""

from typing import Any

import pytest
import torch
from planted_change import bridged, planted_vector
from planted_switch import DECOYS, TRIGGER, questions, switch
from tiny import tiny_hf

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.behaviour.log_odds import twin_log_odds
from mechlens.methods.directions.contrasts import contrast_cosine, saved_contrast_cosine
from mechlens.methods.directions.direction import cosine, random_like
from mechlens.methods.triggers.carried import patch_trigger
from mechlens.methods.triggers.direction import TriggerDirection, trigger_direction, trigger_vectors
from mechlens.methods.triggers.removed import trigger_trace
from mechlens.methods.triggers.signals import with_candidate
from mechlens.prompts.twins import Twin

TWINS = questions(range(12))
LEVEL = 1
"""Where the first block has written."""
WORLDS = {"both": (True, True), "written": (True, False), "read": (False, True), "neither": (False, False)}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: bridged(switch(written=w, read=r), name) for name, (w, r) in WORLDS.items()}


def found_in(model: Any) -> TriggerDirection:
    return trigger_direction(trigger_vectors(model, [twin.prompt for twin in TWINS], TRIGGER, decoys=DECOYS))


def triggered(text: str) -> list[Twin]:
    return [Twin(with_candidate(twin.prompt, text), twin.shown, twin.other) for twin in TWINS]


def test_the_token_flips_the_answer(models: dict[str, Any]) -> None:
    plain, changed, decoyed = (twin_log_odds(models["both"], triggered(t)).values for t in ("", TRIGGER, "Q"))
    assert float((changed - plain).min()) > 1
    assert float((decoyed - plain).abs().max()) < 0.5


def test_the_direction_is_the_planted_one_and_neither_base_nor_decoys_reach_along_it(models: dict[str, Any]) -> None:
    own, base = found_in(models["both"]), trigger_vectors(
        models["read"], [twin.prompt for twin in TWINS], TRIGGER, decoys=DECOYS
    )  # fmt: skip
    column = own.grid.positions.index("inst")
    row = own.acts.levels.index(LEVEL)
    assert float(cosine(own.grid.at(LEVEL, "inst").vector, planted_vector())) > 0.9
    assert float(own.reliability[row, column]) > 0.9
    gaps, in_base = own.gaps()[:, :, row, column], own.gaps(base)[:, :, row, column]
    assert float(gaps[0].min()) > 5 * float(gaps[1].abs().max())
    assert float(gaps[0].mean()) > 10 * float(in_base.abs().mean())
    wrong = trigger_vectors(models["read"], ["Why?", "Who?"], TRIGGER, decoys=DECOYS)
    with pytest.raises(UserError, match="different questions"):
        own.gaps(wrong)
    with pytest.raises(UserError, match="at least 2 families"):
        trigger_direction(trigger_vectors(models["both"], ["Why?"], TRIGGER))


def test_a_question_is_scored_by_a_direction_that_has_not_seen_it() -> None:
    """Noise without a trigger reaches nowhere out of fold, and far within."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(60, 2, 1, 400, generator=draw)
    acts = trigger_vectors(bridged(switch(), "x"), [f"Why {i}?" for i in range(20)], TRIGGER, positions=["inst"])
    noise = ml.Activations(**{**vars(acts), "values": values, "levels": (0, 1)})
    own = trigger_direction(noise)
    gaps = own.gaps()[0]
    inside = (values[0::3] - values[1::3]).double() @ own.grid.vectors[0, 0].double() / own.grid.at(0, "inst").norm
    assert float(inside[:, 0, 0].mean()) > 4
    assert abs(float(gaps.mean())) < 1


def test_patching_finds_the_token_and_then_where_the_answer_starts(models: dict[str, Any]) -> None:
    names = ("instruction[0]", "instruction[-1]", "post[*]")
    plan = ml.PatchPlan("resid_pre", positions=names)
    table = patch_trigger(models["both"], TWINS, TRIGGER, instead="Q", plan=plan).table(seed=0)
    recovery = table.set_index(["layer", "position"])["recovery"]
    last = table["position"].iloc[-1]
    assert recovery[0, "instruction[0]"] == pytest.approx(1, abs=1e-3)
    for layer in (LEVEL, 2):
        assert recovery[layer, last] == pytest.approx(1, abs=0.05)
    elsewhere = recovery.drop([(0, "instruction[0]"), (1, last), (2, last)])
    assert float(elsewhere.abs().max()) < 0.05


def test_without_a_decoy_the_tokens_after_the_trigger_are_patched_in_both_orders(models: dict[str, Any]) -> None:
    found = patch_trigger(models["both"], TWINS[:3], TRIGGER)
    assert len(found.pairs) == 6
    for i, twin in enumerate(TWINS[:3]):
        told = twin_log_odds(models["both"], [Twin(with_candidate(twin.prompt, TRIGGER), twin.shown, twin.other)])
        assert float(found.clean[i]) == pytest.approx(float(told.as_asked[0]), abs=1e-3)
        assert float(found.clean[3 + i]) == pytest.approx(float(told.exchanged[0]), abs=1e-3)
    turned = patch_trigger(bridged(tiny_hf(), "llama"), TWINS[:3], TRIGGER)
    assert (
        float(turned.effect()[:, 0].abs().max()) < 1e-4
    )  # the same tokens follow, and their places are told by attention
    same = [Twin(ml.Prompt("q", "What?"), "so", "see")]
    with pytest.raises(UserError, match="begin with the same token"):
        patch_trigger(models["both"], same, TRIGGER)


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_written_and_what_is_read_are_told_apart(models: dict[str, Any], world: str) -> None:
    """In every world the trigger was trained away as planted; behaviour is gone in three, for different reasons."""
    old = found_in(models["both"])
    drawn = random_like(old.grid.at(LEVEL, "last"), 20, seed=0)
    traces = [
        trigger_trace(
            models[name], TWINS, old, LEVEL, "last", beside=drawn,
            acts=trigger_vectors(models[name], [twin.prompt for twin in TWINS], TRIGGER, decoys=DECOYS),
        )
        for name in ("both", world)
    ]  # fmt: skip
    written, read = WORLDS[world]
    before, after = traces
    assert float(after.written.mean() / before.written.mean()) == pytest.approx(float(written), abs=0.15)
    assert float(after.read[0].mean() / before.read[0].mean()) == pytest.approx(float(read), abs=0.15)
    assert float(before.read[0].mean()) > 2 * float(before.read[1:].mean(dim=1).abs().max())
    gap = float((twin_log_odds(models[world], triggered(TRIGGER)).values
                 - twin_log_odds(models[world], triggered("")).values).mean())  # fmt: skip
    assert (gap > 1) == (written and read)


def test_cosines_with_other_directions_count_noise_once(models: dict[str, Any]) -> None:
    own, again = found_in(models["both"]), found_in(models["written"])
    curve = contrast_cosine(own.contrast("inst"), again.contrast("inst"), [LEVEL], seed=0)
    assert curve.measured[0].value == pytest.approx(1, abs=1e-3)  # both write it
    gone = contrast_cosine(own.contrast("inst"), found_in(models["read"]).contrast("inst"), [LEVEL], seed=0)
    assert gone.measured[0].value < 0.5
    row = own.acts.levels.index(LEVEL)
    known = own.grid.at(LEVEL, "last")
    measured, corrected = saved_contrast_cosine(own.contrast("inst"), known, float(own.reliability[row, 0]))
    assert measured.value > 0.9
    assert corrected.value >= measured.value
