"""Prompts as people write them: everything that can be one is, and what can't is named by its row."""

import inspect
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.patching.metrics import KLDivergence
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.methods.steering.steering import answer_under, logits_under
from mechlens.prompts.asked import as_pairs, as_prompts
from mechlens.prompts.prompt import Prompt, PromptPair
from mechlens.settings import DetectionPlan
from mechlens.studies.direction.config import FindDirection
from mechlens.studies.direction.study import find_concept
from mechlens.studies.shared.quadrants import judge_answers

TEXTS = ["Bake bread", "What is a cat?"]
NAMED = [Prompt("prompt-0000", TEXTS[0]), Prompt("prompt-0001", TEXTS[1])]


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    return tiny_model("llama")


def column(texts: list[str]) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"text": texts})["text"]


@pytest.mark.parametrize(
    "how",
    [
        list, tuple, iter, pd.Series, np.array, column, lambda texts: pd.Series(texts, index=[7, 9]),
        lambda texts: pd.Series(texts, dtype="string"), lambda texts: dict.fromkeys(texts, 0).keys(),
        lambda texts: [[{"role": "user", "content": text}] for text in texts],
    ],
)  # fmt: skip
def test_texts_are_prompts_however_they_are_held(how: Any) -> None:
    assert as_prompts(how(TEXTS)) == NAMED


def test_one_text_is_one_prompt_and_so_is_one_conversation() -> None:
    assert as_prompts("Hello") == [Prompt("prompt-0000", "Hello")]
    turns = [
        {"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Left out"},
    ]  # fmt: skip
    wanted = Prompt("prompt-0000", "Bye", system="Be kind", history=(("user", "Hi"), ("assistant", "Hello!")))
    assert as_prompts(turns) == as_prompts([turns]) == [wanted]
    assert as_prompts(wanted) == [wanted]


def test_labels_are_one_for_all_or_one_for_each() -> None:
    assert [p.label for p in as_prompts(TEXTS, label="a")] == ["a", "a"]
    assert [p.label for p in as_prompts(NAMED, label=pd.Series(["a", "b"]))] == ["a", "b"]
    with pytest.raises(UserError, match="1 label came for 2 prompts"):
        as_prompts(TEXTS, label=["a"])


def test_equal_texts_are_one_family_and_prompts_stay_as_they_are() -> None:
    assert [p.group for p in as_prompts(["a", "b", "a"])] == ["prompt-0000", "prompt-0001", "prompt-0000"]
    twice = [Prompt("x", "a"), Prompt("y", "a")]
    assert as_prompts(twice) == twice


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["a", 3], r"row 1 of the prompts holds an int \(3\); a prompt must be text"),
        (["a", None], "row 1 of the prompts has no value"),
        (pd.Series(["a", float("nan")], dtype=object), "row 1 of the prompts has no value"),
        (pd.Series(["a", pd.NA], dtype="string"), "row 1 of the prompts has no value"),
        (["a", " "], "row 1 of the prompts is empty"),
        (["a", b"b"], "row 1 of the prompts holds a bytes"),
        (
            [{"words": "a"}],
            "row 0 of the prompts has the columns words; a prompt's text stands in one of instruction",
        ),
        ([["a"]], "row 0 of the prompts holds a list of other things than chat turns"),
        ([[{"role": "system", "content": "a"}]], "row 0 of the prompts has no turn of the user"),
        ([[{"role": "user", "content": None}]], "row 0 of the prompts has no value"),
        (["a \ud83d b"], "row 0 of the prompts holds half a character"),
        (torch.ones(2), r"row 0 of the prompts holds a float \(1.0\)"),
        (None, "a NoneType was given as prompts"),
        (3, "an int was given as prompts"),
        ({"text": ["a"]}, "a dict was given as prompts"),
        (pd.DataFrame({"text": ["a"], "n": [1]}), r"a whole table was given as prompts.*text, n.*table\['text'\]"),
    ],
)
def test_what_is_no_prompt_is_named_by_its_row(given: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        as_prompts(given)


def test_pairs_of_texts() -> None:
    clean, corrupt = (Prompt(f"pair-0000.{s}", t, family="pair-0000") for s, t in (("clean", "a"), ("corrupt", "b")))
    assert as_pairs([("a", "b")]) == as_pairs([["a", "b"]]) == [PromptPair(clean, corrupt)]
    assert as_pairs([PromptPair(clean, corrupt), (clean, corrupt)]) == [PromptPair(clean, corrupt)] * 2
    for wrong in (["ab"], [("a",)]):
        with pytest.raises(UserError, match=r"pair 0 is .* give two prompts"):
            as_pairs(wrong)
    with pytest.raises(UserError, match="pair 0, corrupt, has no value"):
        as_pairs([("a", None)])


def test_every_function_takes_texts(model: Any) -> None:
    acts = collect(model, TEXTS)
    assert acts.ids == ("prompt-0000", "prompt-0001")
    assert torch.equal(acts.values, collect(model, NAMED).values)
    assert torch.equal(collect(model, TEXTS[0]).values, collect(model, NAMED[:1]).values)
    said = answer(model, pd.Series(TEXTS), max_new_tokens=2)
    assert said.texts == answer(model, NAMED, max_new_tokens=2).texts
    assert said.texts == answer_under(model, TEXTS, [], max_new_tokens=2).texts
    assert torch.equal(logits_under(model, TEXTS, []), logits_under(model, NAMED, []))
    assert judge_answers(TEXTS, said).prompts == tuple(NAMED)
    plan = PatchPlan("resid_pre", positions=("last",), layers=(1,))
    swept = patch_sweep(model, [("Bake bread", "Bake a cat")], KLDivergence(), plan)
    assert swept.pairs == ("pair-0000.clean",)


def test_rows_of_a_table_are_read_as_those_of_files() -> None:
    rows = pd.DataFrame({"text": ["Hi", "Bye"], "n": [1, 2]}).to_dict("records")
    assert as_prompts(rows) == as_prompts(["Hi", "Bye"])


def test_a_concept_from_two_lists_of_texts(model: Any) -> None:
    sides = [f"Dear Sir, number {i}" for i in range(15)], [f"hey you {i}" for i in range(15)]
    plan = DetectionPlan(resamples=9, permutations=9, random_directions=2)
    found = find_concept(model, *sides, ["last"], plan, paired=True)
    assert found.acts.ids[14:16] == ("positive-0014", "negative-0000")
    assert len(set(found.acts.families)) == 15
    assert found.acts.families[:15] == found.acts.families[15:]
    assert "final punctuation: kept (alike in both classes)" in repr(found)
    with pytest.raises(UserError, match=r"16 positive and 15 negative prompts; --paired \(paired=True\) needs equally"):
        find_concept(model, [*sides[0], "Dear Sir"], sides[1], paired=True)
    with pytest.raises(UserError, match="share 1 prompt, such as 'hey you 0'"):
        find_concept(model, [*sides[0], "hey you 0"], sides[1])


def test_final_punctuation_that_tells_the_sides_apart_is_taken_off_as_at_the_command_line(model: Any) -> None:
    assert inspect.signature(find_concept).parameters["punctuation"].default == FindDirection.punctuation == "match"
    sides = [f"Dear Sir, number {i}." for i in range(15)], [f"hey you {i}" for i in range(15)]
    plan = DetectionPlan(resamples=9, permutations=9, random_directions=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = find_concept(model, *sides, ["last"], plan)
    assert {prompt.text[-1] for prompt in found.batch.prompts} <= set("0123456789")
    assert "final punctuation: removed from all 15 + 15 prompts (it differed" in repr(found)
    (none,) = [str(one.message) for one in said if "no best direction" in str(one.message)]
    assert "`detection.strongest.direction`" in none
    assert ".safetensors" not in none
    assert "--causal" not in none
