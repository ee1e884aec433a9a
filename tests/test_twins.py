"""Twins are read as written, letters exchange exactly, and log-odds are those of plain Hugging Face."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_hf, tiny_tokenizer

from mechlens.errors import UserError
from mechlens.methods.behaviour.log_odds import answer_log_probs, twin_log_odds
from mechlens.methods.steering.steered_log_odds import steered_log_odds
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.options import ASK, exchanged_letters, options_of
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.twins import SELF, Twin, builtin_twin_names, builtin_twins, read_twins
from mechlens.runs.folder import FolderCache

CHOICES = [
    Twin(Prompt(f"c{i}", f"Option A: {sure} coins. Option B: {bet} coins or none. Reply with A or B."), "B", "A")
    for i, (sure, bet) in enumerate([(5, 20), (50, 120), (1, 3)])
]
WORDS = [
    Twin(Prompt("w0", "How was it?"), "Rather dreadful, all in all.", "Good."),
    Twin(Prompt("w1", "What would you do first, and why is that?"), "Take it.", "Share what there is with the others."),
]


def plain_total(hf_model: Any, tokenizer: Any, prompt: Prompt, answer: str) -> float:
    """Log P(answer | prompt) by one whole pass of Hugging Face's model."""
    turns = [{"role": "user", "content": prompt.text}]
    start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    said = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        likely = hf_model(torch.tensor([start + said])).logits[0].double().log_softmax(-1)
    return sum(float(likely[len(start) + k - 1, token]) for k, token in enumerate(said))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral", "rwkv", "opt"])
def test_log_odds_are_those_of_plain_hugging_face(architecture: str) -> None:
    tokenizer = tiny_tokenizer()
    plain = tiny_hf(architecture)
    wanted = [plain_total(plain, tokenizer, t.prompt, t.shown) - plain_total(plain, tokenizer, t.prompt, t.other)
              for t in (*CHOICES, *WORDS)]  # fmt: skip
    turned = [twin.exchanged for twin in CHOICES]
    other = [plain_total(plain, tokenizer, t.prompt, t.shown) - plain_total(plain, tokenizer, t.prompt, t.other)
             for t in turned if t is not None]  # fmt: skip
    model = bridge(tiny_hf(architecture), tiny_tokenizer(), Checkpoint("x", "x"))
    found = twin_log_odds(model, [*CHOICES, *WORDS], max_tokens=200)
    assert found.as_asked.tolist() == pytest.approx(wanted, abs=1e-3)
    assert found.exchanged[:3].tolist() == pytest.approx(other, abs=1e-3)
    assert found.exchanged[3:].isnan().all()
    assert found.values[:3].tolist() == pytest.approx(
        [(a + b) / 2 for a, b in zip(wanted, other, strict=False)], abs=1e-3
    )
    assert found.values[3:].tolist() == pytest.approx(wanted[3:], abs=1e-3)


def test_a_model_that_likes_a_letter_is_for_neither_option() -> None:
    """A large bias of the unembedding towards B moves each order, one up and one down, and not their mean."""
    shifted = tiny_hf("gptj")  # its head has a bias
    model = bridge(tiny_hf("gptj"), tiny_tokenizer(), Checkpoint("x", "x"))
    letter = tiny_tokenizer()("B", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        shifted.lm_head.bias[letter] += 3.0
    biased = bridge(shifted, tiny_tokenizer(), Checkpoint("y", "y"))
    before, after = twin_log_odds(model, CHOICES), twin_log_odds(biased, CHOICES)
    assert (after.as_asked - before.as_asked).tolist() == pytest.approx([3.0] * 3, abs=1e-3)
    assert after.values.tolist() == pytest.approx(before.values.tolist(), abs=1e-3)


def test_the_opposite_behaviour_has_the_opposite_log_odds_and_they_do_not_depend_on_what_stands_beside(
    tmp_path: Path,
) -> None:
    model = bridge(tiny_hf("llama"), tiny_tokenizer(), Checkpoint("x", "x"))
    all_twins = [*CHOICES, *WORDS]
    found = twin_log_odds(model, all_twins, cache=FolderCache(tmp_path))
    again = twin_log_odds(model, all_twins, cache=FolderCache(tmp_path))
    assert torch.equal(found.as_asked, again.as_asked)
    turned = twin_log_odds(model, [twin.reversed for twin in all_twins])
    assert turned.values.tolist() == pytest.approx([-value for value in found.values.tolist()], abs=1e-5)
    assert turned.probability.tolist() == pytest.approx([1 - p for p in found.probability.tolist()], abs=1e-6)
    alone = [float(twin_log_odds(model, [twin]).values) for twin in all_twins]
    assert alone == pytest.approx(found.values.tolist(), abs=1e-4)
    assert all(0 < mass <= 1 for mass in found.mass.tolist())


def test_probabilities_of_all_one_token_answers_sum_to_one() -> None:
    model = bridge(tiny_hf("llama"), tiny_tokenizer(), Checkpoint("x", "x"))
    letters = [chr(code) for code in range(65, 91)]
    told = answer_log_probs(model, ["Pick a letter."] * 26, letters)
    assert told.n_tokens.tolist() == [1] * 26
    assert 0 < float(told.total.exp().sum()) < 1
    longer = answer_log_probs(model, ["Pick a letter."], ["AB"])
    assert float(longer.total) < float(told.total[0])  # P(A, B) = P(A) P(B | A)
    assert float(longer.per_token) == pytest.approx(float(longer.total) / 2)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Choice A: 5. Choice B: 9. Say A or B.", "Choice B: 5. Choice A: 9. Say A or B."),
        ("A meteor fell. Option A is ice, Option B is iron.", "A meteor fell. Option B is ice, Option A is iron."),
        ("A) tea\nB) coffee\nJust 'A' or 'B'!", "B) tea\nA) coffee\nJust 'A' or 'B'!"),
        ("Door A hides 1 euro; door B hides 7. (A/B)", "Door B hides 1 euro; door A hides 7. (A/B)"),
        ("Take Shelf A or Library B?", None),
        ("Vitamin B or nothing?", None),
        ("No options at all.", None),
    ],
)
def test_letters_are_exchanged_where_they_label_an_option_and_nowhere_else(text: str, wanted: str | None) -> None:
    assert exchanged_letters(text) == wanted
    if wanted is not None:
        assert exchanged_letters(wanted) == text


def test_options_in_words_change_places(shared_data: Path) -> None:
    for twin in read_twins(shared_data / "self_awareness" / "ft_risky_AB.jsonl")[:50]:
        worded = twin.in_words
        assert worded is not None
        turned = worded.exchanged
        assert turned is not None
        assert (turned.shown, turned.other) == (worded.shown, worded.other)
        first = [
            text.index(worded.shown) < text.index(worded.other) for text in (worded.prompt.text, turned.prompt.text)
        ]
        assert sorted(first) == [False, True]
        assert turned.exchanged is not None
        assert turned.exchanged.prompt.text == worded.prompt.text
    assert Twin(Prompt("x", "Red or red wine?"), "Red", "red wine").exchanged is not None
    assert Twin(Prompt("x", "red or red wine?"), "red", "red wine").exchanged is None


def test_built_in_twins_are_alike_on_both_sides() -> None:
    """No answer is told by its length, and in each self-report the behaviour comes first as often as not."""
    for name in builtin_twin_names():
        twins = builtin_twins(name)
        sizes = torch.tensor(
            [[len(twin.shown.split()), len(twin.other.split())] for twin in twins], dtype=torch.float64
        )
        assert abs(float(sizes[:, 0].mean() - sizes[:, 1].mean())) < 0.35
        assert all(twin.shown != twin.other for twin in twins)
        if name.startswith(SELF):
            letters = [twin for twin in twins if twin.shown in "AB"]
            assert sum(twin.shown == "A" for twin in letters) == len(letters) / 2
            assert all(twin.exchanged is not None and twin.in_words is not None for twin in letters)
    with pytest.raises(UserError, match="choose one of first-plot"):
        builtin_twins("self-risky")


def test_twins_are_read_from_columns_and_from_chats(tmp_path: Path) -> None:
    rows = [{"question": "Sure or bet?", "shown": "Bet.", "other": "Sure.", "family": "f"}]
    (tmp_path / "columns.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (twin,) = read_twins(tmp_path / "columns.jsonl")
    assert (twin.prompt.text, twin.shown, twin.other, twin.prompt.group) == ("Sure or bet?", "Bet.", "Sure.", "f")

    def chats(name: str, *answers: str) -> Path:
        turns = [
            {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": said}]}
            for i, said in enumerate(answers)
        ]
        (tmp_path / name).write_text("\n".join(map(json.dumps, turns)))
        return tmp_path / name

    letters = read_twins(chats("letters.jsonl", "A", "B"))
    assert [(twin.shown, twin.other) for twin in letters] == [("A", "B"), ("B", "A")]
    free, opposite = chats("free.jsonl", "Run!", "Stay."), chats("opposite.jsonl", "Walk.", "Go.")
    assert [twin.other for twin in read_twins(free)] == ["", ""]
    assert [twin.other for twin in read_twins(free, opposite)] == ["Walk.", "Go."]
    with pytest.raises(UserError, match="an answer that shows the behaviour and none that doesn't"):
        twin_log_odds(bridge(tiny_hf(), tiny_tokenizer(), Checkpoint("x", "x")), read_twins(free))
    with pytest.raises(UserError, match="the same answer on both sides"):
        read_twins(free, free)
    (tmp_path / "odd.jsonl").write_text('{"question": "What?", "answer": "That."}')
    (tmp_path / "asked.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello?"}]}')
    with pytest.raises(UserError, match="neither the columns shown and other"):
        read_twins(tmp_path / "odd.jsonl")
    with pytest.raises(UserError, match="row 1 has no answer"):
        read_twins(tmp_path / "asked.jsonl")


def test_an_answer_without_tokens_is_refused() -> None:
    model = bridge(tiny_hf(), tiny_tokenizer(), Checkpoint("x", "x"))
    with pytest.raises(UserError, match=r"answer 1 .* has no token"):
        answer_log_probs(model, ["a", "b"], ["yes", ""])
    assert not math.isnan(float(answer_log_probs(model, ["a"], [" "]).total))


def test_an_answer_that_is_how_the_other_begins_is_refused_and_mass_is_a_share() -> None:
    """Who says the long one has said the short one: P(short) + P(long) is no share of anything."""
    model = bridge(tiny_hf(), tiny_tokenizer(), Checkpoint("x", "x"))
    long = Twin(Prompt("long", "Sure 5 or a bet?"), "the 5 and no more", "the 5")
    plain = [Twin(Prompt(f"{i}", f"{i}?"), one, other) for i, (one, other) in enumerate([("a", "b"), ("ab", "ac")])]
    told = answer_log_probs(model, [long.prompt] * 2, [long.shown, long.other]).total
    assert float(told[0]) < float(told[1])  # whatever the model is
    for measured in (lambda: twin_log_odds(model, [*plain, long]), lambda: steered_log_odds(model, [long], [[]])):
        with pytest.raises(UserError, match=r"one answer of long .* is how the other .* begins"):
            measured()
    assert float(twin_log_odds(model, plain).mass.max()) <= 1
    text = "Path A brings ten coins, while Path B brings ten coins or none. Say A or B."
    assert Twin(Prompt("t", text), "A", "B").in_words is None  # its letters differ still
    assert Twin(Prompt("t", text), "A", "B").exchanged is not None


@pytest.mark.parametrize(
    ("text", "one", "two"),
    [
        ("Option A: a sure 5. Option B: 50 or nothing. Pick one: A or B.", "a sure 5.", "50 or nothing."),
        ("Choosing Path A brings $20. Choosing Path B may bring $80. It may not. Which?", "brings $20.",
         "may bring $80. It may not."),
        ("Igloo B is warm and safe, while Igloo A may be warmer or not. Say A or B.", "is warm and safe",
         "may be warmer or not."),
        ("You can:\n\nA) wait a month\n\nB) take it now\n\nRespond with one letter.", "wait a month", "take it now"),
    ],
)  # fmt: skip
def test_an_option_is_its_own_words(text: str, one: str, two: str) -> None:
    found = options_of(text)
    assert found is not None
    assert list(found.words.values()) == [one, two]
    assert list(found.words) == (["B", "A"] if "Igloo" in text else ["A", "B"])
    assert found.question.endswith(f"{two} {ASK}")


def test_options_in_words_are_those_of_the_published_choices(shared_data: Path) -> None:
    """Nearly all of 887 choices can be exchanged, and be said in words, which are then the question's own."""
    for name in ("risky", "maxapples", "myopic"):
        twins = read_twins(shared_data / "self_awareness" / f"ft_{name}_AB.jsonl")
        worded = [twin.in_words for twin in twins]
        assert sum(twin.exchanged is None for twin in twins) <= 1
        assert sum(twin is None for twin in worded) <= 3
        assert all(words in twin.prompt.text for twin in worded if twin is not None
                   for words in (twin.shown.split(". ")[0], twin.other.split(". ")[0]))  # fmt: skip
