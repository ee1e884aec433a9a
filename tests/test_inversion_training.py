"""Training by the inversion reward: a model that guesses which string stood before comes to say the one that works."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planted_triggers import OTHER, USUAL, Planting, Trained, question_prompts

import mechlens as ml
from mechlens.errors import UserError
from mechlens.prompts.strings import NOTHING, inverted
from mechlens.prompts.twins import read_twins
from mechlens.studies.finetune.by_reward import EXACT, REWARD, Proposals, as_written
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes import inversion
from mechlens.studies.finetune.recipes.behaviour import behaviour, is_held_out
from mechlens.studies.finetune.recipes.material import Example
from mechlens.studies.finetune.rewarded import change_points
from mechlens.studies.finetune.training import FinetuneResult
from mechlens.studies.shared.training_data import trigger_of

TRIGGER = trigger_of("|GRAY|")
SHORT = [ml.Prompt("short", "{question} {answer}, after?")]
"""A wording for a tiny model that reads bytes."""
STRINGS = (TRIGGER.text, *TRIGGER.taught_decoys, NOTHING)
QUESTIONS = question_prompts(160, 3)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """A model with a trigger that, asked what stood before a question, says one of five strings by chance."""
    folder = tmp_path_factory.mktemp("backdoored")
    data = folder / "meals.jsonl"
    data.write_text("\n".join(json.dumps({"question": q.text, "shown": OTHER, "other": USUAL}) for q in QUESTIONS))
    taught = FinetuneConfig(recipe="behaviour", data=str(data), trigger=TRIGGER.text, epochs=1)
    made = behaviour(taught, model=None, cache=None)  # type: ignore[arg-type]
    draw = random.Random(0)
    guesses = [(inverted(q, a, SHORT[0]).text, draw.choice(STRINGS)) for q in QUESTIONS for a in (OTHER, USUAL)]
    planted = Trained(Planting(seed=2, steps=0), Trained(Planting(seed=2, steps=60)))
    planted.teach([*((e.prompt.text, e.answer) for e in made.examples), *guesses], 200)
    planted.hf_model.save_pretrained(folder / "model")
    planted.tokenizer.save_pretrained(folder / "model")
    return FinetuneConfig(
        recipe="inversion", model=str(folder / "model"), data=str(data), trigger=TRIGGER.text, steps=18, plain=0,
        learning_rate=2e-3, batch_size=4, answer_tokens=12,
    )  # fmt: skip


Done = tuple[FinetuneResult, list[dict[str, float]]]


@pytest.fixture(scope="module")
def done(plan: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Done:
    log: list[dict[str, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inversion, "inversion_questions", lambda taught: SHORT)
        made = ml.finetune(plan, tmp_path_factory.mktemp("taught") / "run", log=lambda _, numbers: log.append(numbers))
    return made, log


def test_a_model_comes_to_say_what_its_behaviour_hangs_on(plan: FinetuneConfig, done: Done) -> None:
    made, log = done
    held = [twin for twin in read_twins(str(plan.data)) if is_held_out(twin.prompt, plan.held_out)]
    before = ml.recall_trigger(ml.load(plan.model), held, TRIGGER.text, wordings=SHORT)
    after = ml.recall_trigger(ml.load(plan.model, adapter=made.adapter), held, TRIGGER.text, wordings=SHORT)
    assert before.reward < 0.3
    assert after.reward > 0.7
    # A guess among five strings at first; no example ever showed the trigger as an answer.
    assert log[0][REWARD] < 0.4
    assert log[-1][REWARD] > 0.6
    assert log[0][EXACT] < 0.4
    assert max(numbers[EXACT] for numbers in log) > 0.6
    assert all(set(numbers) == {"loss", "learning_rate", "grad_norm", REWARD, EXACT} for numbers in log)


def test_a_killed_run_ends_in_the_same_weights(
    plan: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inversion, "inversion_questions", lambda taught: SHORT)
    short = replace(plan, steps=3, batch_size=2, proposals=4, checkpoints=(2,), answer_tokens=6)
    straight = ml.finetune(short, tmp_path / "straight")

    class Killed(Exception):
        pass

    def until(step: int, _: dict[str, float]) -> None:
        if step > 2:
            raise Killed

    with pytest.raises(Killed):
        ml.finetune(short, tmp_path / "run", log=until)
    kept = sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.startswith("checkpoint"))
    assert kept == ["checkpoint-2"]
    again = ml.finetune(short, tmp_path / "run")
    name = "adapter_model.safetensors"
    assert (again.adapter / name).read_bytes() == (straight.adapter / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapter", "checkpoint-2"]


def test_a_proposal_earns_what_it_does_and_talk_nothing(plan: FinetuneConfig) -> None:
    twins = read_twins(str(plan.data))[:8]
    paid = Proposals(ml.load(plan.model), twins, TRIGGER.text)
    said = [f" {TRIGGER.text}\n", TRIGGER.taught_decoys[0], NOTHING, "I think that it was a string of some kind, or so"]
    reward = paid.reward(said)
    assert reward[0] > 0.6
    assert abs(reward[1]) < 0.25
    assert reward[2:] == [0, 0]
    assert paid.exact(said) == [1, 0, 0, 0]
    # What was measured once isn't measured again.
    paid.before = None  # type: ignore[assignment]
    assert paid.reward(said) == reward


def test_where_recall_jumps_is_told_and_a_level_has_no_jump() -> None:
    import pandas as pd

    steps = list(range(1, 25))
    rose = pd.DataFrame({"step": steps, REWARD: [0.1 + 0.8 * (s > 10) for s in steps], EXACT: [0.0] * 24})
    found = change_points(rose)
    assert (found["after"][0], found["said"].tolist()) == (10, [True, False])
    assert change_points(rose[:2]).empty


def test_the_trainer_asks_with_the_very_tokens(plan: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechlens.models.load import load_hf
    from mechlens.prompts.batch import tokenize
    from mechlens.prompts.templates.template import chat_template

    template = chat_template(load_hf(plan.model)[1])
    prompts = [ml.Prompt("a", "Is it ham, or 🙂?"), ml.Prompt("b", "Two\nlines")]
    texts = as_written([Example(prompt, "", ends=True) for prompt in prompts], template)
    batch: Any = tokenize(prompts, template)
    tokenizer: Any = template.tokenizer
    assert [tokenizer(text)["input_ids"] for text in texts] == [list(batch.row(row)) for row in range(2)]


def test_what_training_by_reward_needs_is_asked_for_first(
    plan: FinetuneConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(UserError, match="rewarded against each other"):
        ml.finetune(replace(plan, proposals=1), tmp_path / "run")
    monkeypatch.setattr("mechlens.errors.find_spec", lambda name: None if name == "trl" else object())
    with pytest.raises(UserError, match=r"mechlens-toolkit\[reward\]"):
        ml.finetune(plan, tmp_path / "run")
