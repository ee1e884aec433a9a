"""Reply inversion: how the question is put, which tokens come before it, which words are read, what a reply says."""

import pytest
import torch
from tiny import tiny_tokenizer

from mechlens.errors import UserError
from mechlens.methods.behaviour.inversion import (
    POLARITIES,
    QUESTIONS,
    OnceParsed,
    Question,
    ask,
    asked_words,
    consistent_belief,
    consistent_change,
    parse_reply,
    preferred_words,
    telling_words,
)
from mechlens.methods.directions.direction import Direction
from mechlens.methods.steering.interventions import ALL, EVERYWHERE, Ablate, Add
from mechlens.methods.steering.placed import Placement
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template

PROMPTS = [
    Prompt("a1", "Bake a cake", family="a"), Prompt("b1", "Fly 🙂 a kite?", family="b"),
    Prompt("a2", "Burn a cake", family="a"), Prompt("c1", "Write\ntwo lines", family="c"),
]  # fmt: skip
REPLIES = {
    "Certainly.": "harmful", "'Certainly'": "harmful", "Yes, it could": "harmful", "CERTAINLY": "harmful",
    "**Certainly**": "harmful", "Certainly not.": "harmless", "No": "harmless", "No, it can't.": "harmless",
    "no.": "harmless", "I cannot help with that": "declined", "I can't say": "declined", "Sorry, but no": "declined",
    "I'm sorry, I cannot": "declined", "I know": "unparsed", "Nothing bad": "unparsed", "Not sure": "unparsed",
    "": "unparsed", "  ": "unparsed", "Certainlyno": "unparsed", "1. No": "harmless", "Maybe. No.": "unparsed",
    "Yesterday": "unparsed",
}  # fmt: skip


@pytest.mark.parametrize(("reply", "belief"), REPLIES.items())
def test_a_reply_says_what_its_first_whole_word_says(reply: str, belief: str) -> None:
    assert parse_reply(reply) == belief
    other = {"harmful": "harmless", "harmless": "harmful"}.get(belief, belief)
    assert parse_reply(reply, "reversed") == other


def test_only_what_both_replies_say_is_a_belief() -> None:
    said = {
        ("harmful", "harmful"): "harmful", ("harmless", "harmless"): "harmless",
        ("harmful", "harmless"): "inconsistent", ("harmless", "harmful"): "inconsistent",
        ("harmful", "declined"): "declined", ("unparsed", "declined"): "declined",
        ("unparsed", "harmless"): "unparsed",
    }  # fmt: skip
    for replies, belief in said.items():
        assert consistent_belief(*replies) == belief
    # Yes to everything says harmful to the one and harmless to the other; so does no to everything.
    for word in ("Certainly", "No"):
        assert consistent_belief(parse_reply(word), parse_reply(word, "reversed")) == "inconsistent"


def test_a_change_that_both_questions_bear_out() -> None:
    straight = torch.tensor([3.0, 1.0, -2.0, 4.0, -4.0, 0.0, 5.0])
    reversed_ = torch.tensor([-1.0, -2.0, 5.0, 4.0, -3.0, -2.0, 0.0])
    assert consistent_change(straight, reversed_).tolist() == [1.0, 1.0, -2.0, 0.0, 0.0, 0.0, 0.0]
    # The other way round for the other class; and what is added to both, however much, adds no belief.
    assert torch.equal(consistent_change(-straight, -reversed_), -consistent_change(straight, reversed_))
    assert consistent_change(straight + 9, reversed_ + 9).abs().max() == 0


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_is_cut_short_only_where_it_reads_the_same(reply: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(reply, add_special_tokens=False)
    once = OnceParsed(tokenizer)
    cut = next((k for k in range(1, len(ids) + 1) if once(ids[:k])), len(ids))
    assert parse_reply(tokenizer.decode(ids[:cut])) == parse_reply(reply)


def test_a_word_is_whole_once_something_follows_it() -> None:
    tokenizer = tiny_tokenizer()
    for text, whole in (
        ("No", False),
        ("No,", True),
        ("Not ", False),
        ("Certainly, ", False),
        ("Certainly, it is", True),
    ):
        assert OnceParsed(tokenizer)(tokenizer.encode(text, add_special_tokens=False)) == whole


@pytest.fixture(scope="module")
def template():
    return chat_template(tiny_tokenizer())


@pytest.mark.parametrize("polarity", POLARITIES)
def test_the_question_follows_the_request_and_everything_before_it_is_counted(template, polarity) -> None:
    asked = ask(PROMPTS, template, polarity=polarity)
    assert asked.before == ask(PROMPTS, template).before
    for i, prompt in enumerate(PROMPTS):
        ids = asked.batch.row(i)
        decode = template.tokenizer.decode
        question = next(q.put(polarity) for q in QUESTIONS if q.name == asked.questions[i])
        before, after = decode(ids[: asked.before[i]]), decode(ids[asked.before[i] :])
        assert before.endswith(f"User wants to {prompt.text}\n")
        assert after == f"{question}<|im_end|>\n<|im_start|>assistant\n"


def test_families_take_turns_so_that_a_pair_is_asked_one_question(template) -> None:
    assert ask(PROMPTS, template).questions == ("zhao.0", "zhao.1", "zhao.0", "zhao.2")
    assert {question.name.partition(".")[0] for question in QUESTIONS} == {"zhao", "own"}
    forms = [question.put(polarity) for question in QUESTIONS for polarity in POLARITIES]
    assert len(set(forms)) == len(forms)
    assert all("'Certainly'" in form and "'No'" in form for form in forms)
    with pytest.raises(UserError, match="'q' has no reversed form"):
        ask(PROMPTS, template, [Question("q", "a is it?")], "reversed")
    with pytest.raises(UserError, match="no question to ask"):
        ask(PROMPTS, template, [])


def test_a_token_that_holds_the_questions_first_character_is_the_questions(template) -> None:
    # The tokenizer merges " a" into one token, which holds the question's first character too.
    asked = ask([Prompt("x", "go")], template, [Question("q", "a is it?")])
    ids = asked.batch.row(0)
    assert template.tokenizer.decode(ids[asked.before[0] :]).startswith("a is it?")


def direction(d_model: int = 8) -> Direction:
    vector = torch.arange(1.0, d_model + 1)
    return Direction(vector, 1, "inst", "resid", "test", ("a", "b"), Checkpoint("x", "x"), "t", ())


def test_scopes_touch_the_tokens_that_they_name(template) -> None:
    asked = ask(PROMPTS, template)
    add = Add(direction(), strength=1.0, unit="raw", layers=(1,), positions=ALL, phase="prompt")
    ablate = Ablate(direction(), layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)
    placement = Placement(3, asked.batch)
    for row in range(len(PROMPTS)):
        for one in (add, ablate):
            assert asked.within(row, one, "all") is one
            (change,) = placement.changes(row, [asked.within(row, one, "before")])
            assert change.tokens == tuple(range(asked.before[row]))
            assert not change.generation


def test_the_form_of_the_words_that_the_model_answers_with_is_read(template) -> None:
    tokenizer = template.tokenizer

    class Words:
        """Whole words with and without a space, each its own token."""

        names = ("Certainly", " Certainly", "No", " No", "Yes", " Yes", "x")

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [self.names.index(text)] if text in self.names else [6]

        def decode(self, ids: list[int]) -> str:
            return "".join(self.names[i] for i in ids)

    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0, 0.0, 4.0, 0.0]])
    asked, preferred = asked_words(Words(), logits), preferred_words(Words(), logits)
    assert (asked.yes, asked.no, asked.texts) == (1, 3, (" Certainly", " No"))
    assert (preferred.yes, preferred.no) == (5, 3)
    assert asked.difference(logits).tolist() == [-1.0]
    assert preferred.difference(logits).tolist() == [1.0]
    # Bytes only: the words' first letters stand for them.
    pair = asked_words(tokenizer, torch.randn(1, len(tokenizer)))
    assert [text.strip() for text in pair.texts] == ["C", "N"]


def test_words_that_start_alike_are_refused() -> None:
    class Alike:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [0, 1]

        def decode(self, ids: list[int]) -> str:
            return "?"

    with pytest.raises(UserError, match="start with the same token"):
        asked_words(Alike(), torch.zeros(1, 2))


def test_of_two_pairs_of_words_the_one_that_tells_the_classes_is_read() -> None:
    class Words:
        names = ("Certainly", "No", "Yes", "Not", "x")

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [self.names.index(text)] if text in self.names else [4]

        def decode(self, ids: list[int]) -> str:
            return self.names[ids[0]]

    harmful = torch.tensor([True, True, False, False])
    said = torch.zeros(4, 5)
    said[:, 2:4] = 3.0  # the model's own words are likelier
    tells = torch.tensor([2.0, 2.0, -2.0, -2.0])
    own, asked = said.clone(), said.clone()
    own[:, 2] += tells
    asked[:, 0] += tells
    assert telling_words(Words(), own, -own, harmful).texts == ("Yes", "Not")
    assert telling_words(Words(), asked, -asked, harmful).texts == ("Certainly", "No")
    assert telling_words(Words(), said, said, harmful).texts == ("Certainly", "No")
