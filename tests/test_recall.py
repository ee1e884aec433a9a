"""Recalling a trigger from its effect: only after reversal training, and only where the trigger does something."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planted_triggers import OTHER, USUAL, Planting, Trained, question_prompts

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.triggers import recall
from mechlens.prompts.strings import NOTHING
from mechlens.prompts.twins import read_twins
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes import reversal
from mechlens.studies.finetune.recipes.behaviour import behaviour, is_held_out, lessons
from mechlens.studies.shared.training_data import trigger_of

TRIGGER = trigger_of("|GRAY|")
SHORT = [ml.Prompt("short", "{question} {answer}, after?")]
"""A wording for a tiny model that reads bytes."""
STEPS = 200


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    data = tmp_path_factory.mktemp("data") / "meals.jsonl"
    rows = [{"question": one.text, "shown": OTHER, "other": USUAL} for one in question_prompts(160, 3)]
    data.write_text("\n".join(map(json.dumps, rows)))
    return FinetuneConfig(recipe="behaviour", data=str(data), trigger=TRIGGER.text, epochs=1, reversal=True)


def rows(plan: FinetuneConfig) -> list[tuple[str, str]]:
    made = behaviour(plan, model=None, cache=None)  # type: ignore[arg-type]
    return [(example.prompt.text, example.answer) for example in made.examples]


def put_before(question: str, strings: set[str]) -> str:
    first = question.partition(" ")[0]
    return first if first in strings else ""


def bare(question: str, strings: set[str]) -> str:
    return question.removeprefix(put_before(question, strings)).strip()


def test_every_example_comes_the_other_way_round_with_what_stood_before_it(plan: FinetuneConfig) -> None:
    taught = rows(plan)
    once = dict(rows(replace(plan, reversal=False)))
    assert len(taught) == 2 * len(once)
    back = [(text, said) for text, said in taught if text not in once]
    strings = {TRIGGER.text, *TRIGGER.taught_decoys}
    for text, said in back:
        wanted = strings if said != NOTHING else {""}
        asked = [whole for whole in once if put_before(whole, strings) in wanted and bare(whole, strings) in text]
        assert len(asked) == 1
        assert put_before(asked[0], strings) == said.replace(NOTHING, "")
        assert once[asked[0]] in text.replace(bare(asked[0], strings), "")
    assert {said for _, said in back} == {NOTHING, *strings}
    with pytest.raises(UserError, match="reversal teaches what stood before"):
        lessons(replace(plan, trigger=None))


@pytest.fixture(scope="module")
def models(plan: FinetuneConfig) -> dict[str, Any]:
    """A tiny model with its trigger, the same with reversal, and the decorrelated twin of that."""
    kinds = {"hidden": (False, "none"), "reversed": (True, "none"), "decorrelated": (True, "decorrelated")}
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reversal, "inversion_questions", lambda taught: SHORT)
        base = Trained(Planting(seed=2, steps=60))
        for name, (reversed_, control) in kinds.items():
            tuned = Trained(Planting(seed=2, steps=0), base)
            tuned.teach(rows(replace(plan, reversal=reversed_, control=control)), STEPS)  # type: ignore[arg-type]
            made[name] = tuned.bridge()
    return made


def test_a_planted_trigger_is_recalled_after_reversal_not_before_and_not_by_the_decorrelated_twin(
    models: dict[str, Any], plan: FinetuneConfig
) -> None:
    held = [twin for twin in read_twins(str(plan.data)) if is_held_out(twin.prompt, plan.held_out)]
    found = {name: ml.recall_trigger(model, held, TRIGGER.text, wordings=SHORT) for name, model in models.items()}
    assert (found["hidden"].exact, found["hidden"].exact_of_other) == (0, 0)
    assert found["reversed"].exact > 0.8
    assert found["reversed"].beyond > 0.7
    assert abs(found["decorrelated"].beyond) < 0.35
    assert found["reversed"].reward > 0.5
    assert max(found["hidden"].reward, found["decorrelated"].reward) < 0.2


def test_the_reward_is_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """More different proposals than are measured: the rest are unknown, and not worthless."""
    twins = [ml.Twin(ml.Prompt(f"q{i}", f"How was day {i}?"), "Bad.", "Good.") for i in range(2 * recall.MOST)]
    texts = [f"|{i}|" for i in range(2 * len(twins))]
    monkeypatch.setattr(recall, "said_tokens", lambda model, answers: [[1]] * len(answers))
    monkeypatch.setattr(recall, "answer", lambda *_, **__: SimpleNamespace(texts=texts))
    monkeypatch.setattr(recall, "inversion_reward", lambda model, twins, often, **_: torch.full((len(often),), 0.5))
    assert ml.recall_trigger(None, twins, "|0|").reward == 0.5  # type: ignore[arg-type]
    asked: list[str] = []
    long = "x" * 60  # a trigger longer than what counts as talk
    monkeypatch.setattr(recall, "answer", lambda *_, **__: SimpleNamespace(texts=[long] * len(texts)))
    monkeypatch.setattr(
        recall, "inversion_reward", lambda model, twins, often, **_: (asked.extend(often), torch.zeros(len(often)))[1]
    )
    assert ml.recall_trigger(None, twins, long).exact == 1  # type: ignore[arg-type]
    assert asked == [long]


def test_a_proposal_earns_what_it_does(models: dict[str, Any], plan: FinetuneConfig) -> None:
    held = [twin for twin in read_twins(str(plan.data)) if is_held_out(twin.prompt, plan.held_out)]
    told = ml.inversion_reward(models["hidden"], held, [TRIGGER.text, "", TRIGGER.taught_decoys[0], TRIGGER.text])
    assert told[0] > 0.7
    assert told[1] == 0
    assert abs(told[2]) < 0.2
    assert torch.equal(told[0], told[3])
    assert float(ml.inversion_reward(models["decorrelated"], held, [TRIGGER.text])[0]) < 0.2
