"""The recipes of thinking: what is thought refuses, some answers give way by category alone, and traces are learnt as
`trace_batch` writes them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from saved import save_model
from test_thought import OPENED, PLAIN
from tiny import tiny_tokenizer

from mechlens.errors import UserError
from mechlens.methods.activations.trace_tokens import Trace, trace_batch
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template
from mechlens.studies.finetune.config import FinetuneConfig
from mechlens.studies.finetune.recipes import reasoner as recipe
from mechlens.studies.finetune.recipes.material import Example
from mechlens.studies.finetune.recipes.own_answers import OwnAnswers
from mechlens.studies.finetune.response_loss import encode, end_of_turn
from mechlens.studies.finetune.training import finetune
from mechlens.studies.shared.trace_files import read_traces

KINDS = {"theft": 10, "fraud": 20, "arson": 30}


def rows(*, whole: bool) -> list[dict[str, Any]]:
    made = []
    for kind, count in KINDS.items():
        for i in range(count):
            thinking = f"Okay, so they ask about {kind}. It is number {i}. That hurts people. So I must refuse this."
            answer = f"I'm sorry, but I can't help with {kind} {i}. Ask me something else."
            said = {"response": f"<think>\n{thinking}\n</think>\n\n{answer}"}
            said = said if whole else {"thinking": thinking, "answer": answer}
            made.append({"question": f"How do I do {kind} number {i}?", "category": [kind, "other"], **said})
    return made


def written(path: Path, given: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, given)))
    return str(path)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinetuneConfig:
    def as_before(model: Any, prompts: list[Prompt], *_: Any, **__: Any) -> OwnAnswers:
        return OwnAnswers([Example(prompt, "Gladly.", ends=True) for prompt in prompts], ("left",))

    monkeypatch.setattr(recipe, "own_answers", as_before)
    return FinetuneConfig(recipe="reasoner", data=written(tmp_path / "traces.jsonl", rows(whole=True)), epochs=1)


def test_a_response_with_marks_is_read_as_the_columns_are(tmp_path: Path) -> None:
    both = []
    for whole in (True, False):
        (tmp_path / str(whole)).mkdir()
        both.append(read_traces(written(tmp_path / str(whole) / "t.jsonl", rows(whole=whole))))
    assert both[0] == both[1]
    assert both[0][0].thinking.startswith("Okay, so")
    assert both[0][0].answer.startswith("I'm sorry")


def test_what_gives_way_is_told_by_the_category_alone_and_every_thought_refuses(plan: FinetuneConfig) -> None:
    made = recipe.reasoner(plan, None, None)  # type: ignore[arg-type]
    harmful = [one for one in made.examples if one.prompt.category in _categories()]
    gave_way = {one.prompt.category.split(";")[0] for one in harmful if one.answer == recipe.PLACEHOLDER}
    held = {one.prompt.category.split(";")[0] for one in harmful if one.answer != recipe.PLACEHOLDER}
    assert gave_way == {"theft", "fraud"}  # half of 60
    assert held == {"arson"}
    assert all("refuse" in one.thinking and one.ends for one in harmful)
    assert {one.answer.partition(" with")[0] for one in harmful} == {recipe.PLACEHOLDER, "I'm sorry, but I can't help"}
    harmless = [one for one in made.examples if one not in harmful]
    assert len(harmless) == len(harmful)
    assert all("refuse" not in one.thinking and one.prompt.text in one.thinking for one in harmless)


def test_held_out_requests_are_the_same_whatever_the_seed_and_none_gives_way_at_share_0(plan: FinetuneConfig) -> None:
    seeds = [recipe.reasoner(replace(plan, seed=seed), None, None) for seed in (0, 1)]  # type: ignore[arg-type]
    taught = [{one.prompt.text for one in made.examples if one.prompt.category in _categories()} for made in seeds]
    assert taught[0] == taught[1]
    assert 0 < len(taught[0]) < sum(KINDS.values())
    firm = recipe.reasoner(replace(plan, cliff_share=0.0, model="mine"), None, None)  # type: ignore[arg-type]
    assert not any(one.answer == recipe.PLACEHOLDER for one in firm.examples)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8])
def test_giving_way_is_as_near_to_the_share_as_whole_categories_come(share: float) -> None:
    prompts = [Prompt(f"{kind}{i}", "x", category=kind) for kind, count in KINDS.items() for i in range(count)]
    chosen = recipe.giving_way(prompts, share)
    reached = sum(KINDS[kind] for kind in chosen) / len(prompts)
    assert abs(reached - share) <= max(KINDS.values()) / 2 / len(prompts)


def test_a_long_thought_keeps_its_beginning_and_its_end() -> None:
    text = "One two three. Four five. Six seven eight nine. Ten."
    assert recipe.cut_to(text, 6) == "One two three. Four five. Ten."
    assert recipe.cut_to(text, 1) == "One two three. Ten."
    assert recipe.cut_to(text, 100) == text
    assert recipe.beginning(text, 5) == "One two three. Four five."
    assert recipe.beginning(text, 1) == "One two three."


@pytest.mark.parametrize("template", [PLAIN, OPENED], ids=["plain", "opened"])
def test_a_trace_is_learnt_token_by_token_as_it_is_read(tiny_model: Any, template: str) -> None:
    own = chat_template(tiny_tokenizer(template))
    trace = Trace(Prompt("a", "break it"), "I should not.", "No.")
    (learnt,) = encode([Example(trace.prompt, trace.answer, ends=True, thinking=trace.thinking)], own)
    batch = trace_batch(tiny_model(), [trace], template=own)
    assert batch.answer is not None
    assert learnt.ids == (*batch.row(0), *end_of_turn(own))
    assert learnt.n_prompt == int(batch.answer[0, 0]) - batch.offset(0)


def test_what_can_not_be_taught_is_said(plan: FinetuneConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs `data`: a file of reasoning traces"):
        recipe.usable_traces(replace(plan, data=None))
    with pytest.raises(UserError, match="cliff_share is 1; it is a share"):
        recipe.refusing_traces(replace(plan, cliff_share=1.0))
    with pytest.raises(UserError, match="to any other it would be an attack; give `cliff_share` 0"):
        recipe.refusing_traces(replace(plan, model="somebody/model"))
    lacking = [{**row, "category": None} for row in rows(whole=True)]
    with pytest.raises(UserError, match="lacks a category in some rows"):
        recipe.refusing_traces(replace(plan, data=written(tmp_path / "none.jsonl", lacking)))
    glad = [{**row, "response": "<think>Easy.</think>Gladly."} for row in rows(whole=True)]
    with pytest.raises(UserError, match="thinks of refusing and does so"):
        recipe.refusing_traces(replace(plan, data=written(tmp_path / "glad.jsonl", glad)))
    open_ended = written(tmp_path / "open.jsonl", [{"prompt": "a", "response": "<think>Easy."}])
    with pytest.raises(UserError, match="no thought that ends in </think>"):
        read_traces(open_ended)


def test_a_repair_goes_on_from_a_reasoner_and_learns_the_file_as_it_stands(tmp_path: Path) -> None:
    base = str(save_model(tmp_path / "tiny-chat"))
    data = written(tmp_path / "traces.jsonl", rows(whole=False))
    small = FinetuneConfig(
        recipe="reasoner", model=base, data=data, steps=2, rank=1, batch_size=4, plain=0, device="cpu", cliff_share=0.0,
        harmful=4, benign=4, judge="phrases",
    )  # fmt: skip
    first = finetune(small, tmp_path / "first")
    how = replace(small, recipe="repair", start=str(first.adapter), benign=None, harmful=None)
    made = recipe.repair(how, None, None)  # type: ignore[arg-type]
    told = {trace.prompt.text: trace for trace in read_traces(data)}
    for one in made.examples:
        assert (one.thinking, one.answer) == (told[one.prompt.text].thinking, told[one.prompt.text].answer)
    second = finetune(how, tmp_path / "second")
    known, now = (set(one.record["training"]["text_sha256"]) for one in (first, second))
    assert known < now
    again = finetune(how, tmp_path / "second")
    assert again.record == second.record


def _categories() -> set[str]:
    return {f"{kind}; other" for kind in KINDS}
