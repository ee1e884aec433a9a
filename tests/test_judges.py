"""Judges give the published verdicts, and refusal tokens are found where they were planted."""

import math

import pytest
import torch

from mechlens.errors import UserError
from mechlens.methods.behaviour.judges import (
    ARDITI,
    PHRASES,
    ZHAO,
    HumanLabels,
    Judge,
    LogOddsJudge,
    SubstringJudge,
    fallback_refusal_tokens,
    find_refusal_tokens,
    refusal_log_odds,
)
from mechlens.prompts.prompt import Prompt


def _prompts(n: int) -> list[Prompt]:
    return [Prompt(id=f"p{place}", text="?") for place in range(n)]


TABLE = [  # answer, Zhao et al., Arditi et al.
    ("I cannot help with that.", "refused", "refused"),
    ("i cannot help with that.", "accepted", "refused"),
    ("I know how to do that.", "accepted", "accepted"),
    ("Yes", "accepted", "accepted"),
    ("certainly not", "accepted", "accepted"),
    ("No", "accepted", "accepted"),
    ("", "empty", "empty"),
    (" \n", "empty", "empty"),
    ("I'm sorry, but no.", "refused", "refused"),
    ("I’m sorry, but no.", "refused", "accepted"),
    ("SORRY!", "accepted", "accepted"),
    ("I can't do it", "refused", "refused"),
    ("I can’t do it", "refused", "accepted"),
    ("I’m really sorry to disappoint", "refused", "accepted"),
    ("I'm really sorry to disappoint", "refused", "accepted"),  # "sorry" is a phrase of its own
    ("I’m just a program", "refused", "accepted"),
    ("I'm just a program", "accepted", "accepted"),
    ("I'm not able to provide that", "accepted", "refused"),
    ("I’m not able to provide that", "refused", "accepted"),
    ("I'm not able to do that", "accepted", "refused"),
    ("As an Assistant, well", "refused", "refused"),
    ("AS A LANGUAGE MODEL", "accepted", "refused"),
    ("I am unable to", "accepted", "refused"),
    ("Step 1. If asked, I will not tell.", "refused", "accepted"),
    ("Sure! My friend said: I apologize", "refused", "refused"),
    ("I would strongly advise against it", "refused", "accepted"),
    ("Unfortunately, that is illegal.", "accepted", "accepted"),
]


@pytest.mark.parametrize(("answer", "zhao", "arditi"), TABLE)
def test_published_lists(answer: str, zhao: str, arditi: str) -> None:
    assert ZHAO(_prompts(1), [answer]) == [zhao]
    assert ARDITI(_prompts(1), [answer]) == [arditi]


def test_every_phrase_counts_anywhere_in_the_answer() -> None:
    assert (len(ARDITI.phrases), len(ZHAO.phrases)) == (12, 24)
    for judge in (ZHAO, ARDITI, PHRASES):
        if judge is not PHRASES:
            assert len(set(judge.phrases)) == len(judge.phrases)
        answers = [f"Well, {phrase} and so on" for phrase in judge.phrases]
        assert set(judge(_prompts(len(answers)), answers)) == {"refused"}


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("I’m sorry, but no.", "refused"),
        ("I can‘t do it", "refused"),
        ("I canʼt do it", "refused"),
        ("I CAN`T DO IT", "refused"),
        ("I´m not able to provide that", "refused"),
        ("I'm just a program", "refused"),
        ("I will not provide that", "refused"),
        ("I won't help", "refused"),
        ("I won’t help", "refused"),
        ("i can not say", "refused"),
        ("Unable to help with that.", "refused"),
        ("We are unable to do this", "refused"),
        ("I\xa0cannot do that", "refused"),
        ("I\n  cannot do that", "refused"),
        ("(I cannot)", "refused"),
        ("As an assistant, well", "refused"),
        ("*I* cannot do that", "refused"),
        ("**I** _cannot_ do that", "refused"),
        ("I can\u00adnot do that", "refused"),
        ("I\u200b can\u200bnot do that", "refused"),
        ("I refuse to help with that.", "refused"),
        ("I refuse to do so.", "refused"),
        ("I am not going to help with that.", "refused"),
        ("I'm not going to write this", "refused"),
        ("I'll not provide that", "refused"),
        ("\u200b\u00ad\n", "empty"),
        # What other things the same words say.
        ("I refuse to believe it was luck.", "accepted"),
        ("The patient refuses to take the pills, and may refuse to eat.", "accepted"),
        ("I refuse to give up on my garden.", "accepted"),
        ("I'll note that the oven is hot; I'll notify the guests.", "accepted"),
        ("I'm not going to lie, this cake takes time.", "accepted"),
        ("She said: you are not going to help me carry this.", "accepted"),
        ("2 * 3 is 6, and snake_case_names are fine.", "accepted"),
        # Other people's inability.
        ("Tourists unable to swim should stay out.", "accepted"),
        ("Sure, here you go", "accepted"),
        ("", "empty"),
        ("\u2003\n", "empty"),
    ],
)
def test_the_judge_that_places_quadrants(answer: str, verdict: str) -> None:
    assert PHRASES(_prompts(1), [answer]) == [verdict]
    curly = answer.replace("'", "’")
    assert PHRASES(_prompts(1), [curly]) == [verdict]


@pytest.mark.parametrize(("answer", "zhao", "arditi"), TABLE)
def test_what_a_published_list_refuses_is_refused(answer: str, zhao: str, arditi: str) -> None:
    if "refused" in (zhao, arditi):
        assert PHRASES(_prompts(1), [answer]) == ["refused"]


def test_what_a_published_list_refuses_is_refused_in_any_apostrophe() -> None:
    for phrase in (*ARDITI.phrases, *ZHAO.phrases):
        for mark in "'’‘ʼ`":
            other = phrase.replace("’", "'").replace("'", mark)
            assert PHRASES(_prompts(1), [f"Well, {other} and so on".upper()]) == ["refused"]
    own = SubstringJudge("own", ("I’d rather not",))
    assert own(_prompts(2), ["I'd  rather not", "I would rather not"]) == ["refused", "accepted"]


class _Guard:
    """A judge of somebody else's: a class of their own with a name and a call."""

    name = "guard"

    def __call__(self, prompts: list[Prompt], answers: list[str]) -> list[str]:
        return ["unclear" for _ in answers]


@pytest.mark.parametrize("judge", [ZHAO, ARDITI, PHRASES, HumanLabels({}), LogOddsJudge({}), _Guard()])
def test_anything_with_a_name_and_a_call_is_a_judge(judge: Judge) -> None:
    assert isinstance(judge, Judge)
    assert judge([], []) == []
    assert len(judge(_prompts(3), ["a", "b", "c"])) == 3


def test_human_labels_go_by_prompt() -> None:
    people = HumanLabels({"p0": "refused", "p2": "accepted"}, name="two annotators")
    assert people(_prompts(3), ["", "", ""]) == ["refused", "unclear", "accepted"]
    with pytest.raises(UserError, match="the label of 'p0' is 'yes'; it must be one of refused, accepted, unclear"):
        HumanLabels({"p0": "yes"})


def test_log_odds_judge_follows_its_threshold() -> None:
    scores = {"p0": 0.1, "p1": -0.1, "p2": math.nan}
    assert LogOddsJudge(scores)(_prompts(4), [""] * 4) == ["refused", "accepted", "unclear", "unclear"]
    assert LogOddsJudge(scores, threshold=1.0)(_prompts(1), [""]) == ["accepted"]


@pytest.mark.parametrize("judge", [ZHAO, HumanLabels({}), LogOddsJudge({})])
def test_one_answer_for_each_prompt(judge: Judge) -> None:
    with pytest.raises(UserError, match="1 answer came with 2 prompts; give one answer for each"):
        judge(_prompts(2), ["x"])


def test_log_odds_match_the_formula() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    tokens = [3, 7, 40]
    inside = logits.double().logsumexp(-1)
    outside = logits.double()[:, [place for place in range(50) if place not in tokens]].logsumexp(-1)
    chance = logits.double()[:, tokens].logsumexp(-1)
    expected = chance - outside  # log-odds without the 1e-8
    score = refusal_log_odds(logits, tokens)
    assert score.dtype == torch.float64
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-5)
    exact = torch.log((chance - inside).exp() + 1e-8) - torch.log(1 - (chance - inside).exp() + 1e-8)
    torch.testing.assert_close(score, exact, rtol=0, atol=1e-12)
    assert torch.equal(score, refusal_log_odds(logits, [40, 3, 7, 7, 3]))


def test_log_odds_at_the_ends_are_finite() -> None:
    sure = torch.zeros(2, 10)
    sure[0, 4], sure[1, 5] = 1e4, 1e4
    score = refusal_log_odds(sure, [4])
    assert score.tolist() == pytest.approx([math.log(1 + 1e-8) - math.log(1e-8), math.log(1e-8)], abs=1e-6)
    assert refusal_log_odds(torch.zeros(1, 10), range(5)).item() == pytest.approx(0.0)
    half = torch.tensor([[60000.0, 0.0]]).half()
    assert refusal_log_odds(half, [0]).isfinite().all()
    assert refusal_log_odds(torch.full((1, 10), math.nan), [1]).isnan().all()
    assert refusal_log_odds(torch.zeros(0, 10), [1]).shape == (0,)


def test_log_odds_need_tokens_of_the_vocabulary() -> None:
    with pytest.raises(UserError, match="no refusal tokens can't be scored; give ids from 0 to 9"):
        refusal_log_odds(torch.zeros(1, 10), [])
    for token in (10, -1):
        with pytest.raises(UserError, match=f"token id {token} can't be scored"):
            refusal_log_odds(torch.zeros(1, 10), [4, token])


class Words:
    """A tokenizer of whole words; a space before a word is part of it, an unknown word is token 0."""

    def __init__(self, *vocabulary: str) -> None:
        self.vocabulary = ("<unk>", *vocabulary)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [self.vocabulary.index(text) if text in self.vocabulary else 0]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.vocabulary[token] for token in token_ids)


WORDS = Words("I", " I", "Sorry", "Sure", "The", "As", " Unfortunately")
BARE_I, SPACE_I, SORRY, SURE, THE, AS, SPACE_UNFORTUNATELY = range(1, 8)


def _found(refusals: list[int], others: list[int], **choices: float) -> tuple[tuple[int, ...], str, float | None]:
    verdicts = [True] * len(refusals) + [False] * len(others)
    tokens = find_refusal_tokens([*refusals, *others], verdicts, WORDS, **choices)
    assert tokens.texts == tuple(WORDS.decode([token]) for token in tokens.ids)
    return tokens.ids, tokens.origin, tokens.coverage


def test_refusal_tokens_are_those_of_refusals_only() -> None:
    # "The" starts refusals too, but other answers as often.
    refusals = [BARE_I] * 60 + [SORRY] * 31 + [THE] * 9
    others = [SURE] * 80 + [THE] * 10 + [BARE_I] * 10
    assert _found(refusals, others) == ((BARE_I, SORRY), "found", 0.91)
    assert _found(refusals, others, cover=0.5) == ((BARE_I,), "found", 0.6)
    # "I" starts a sixth as many of the others: with a stricter ratio it says too little.
    assert _found(refusals, others, ratio=7.0) == ((SORRY,), "found", 0.31)


def test_the_commonest_tokens_where_cover_cannot_be_reached() -> None:
    refusals = [SPACE_I] * 70 + [SURE] * 29 + [AS]
    assert _found(refusals, [SURE] * 100) == ((SPACE_I,), "found", 0.7)


def test_counts_are_compared_as_shares() -> None:
    # Three refusals against 300 other answers, 30 of which start with "I": 100% against 10%.
    assert _found([BARE_I] * 3, [BARE_I] * 30 + [SURE] * 270) == ((BARE_I,), "found", 1.0)
    assert _found([BARE_I, BARE_I], []) == ((BARE_I,), "found", 1.0)


def test_the_order_of_answers_does_not_matter() -> None:
    tokens, verdicts = [BARE_I, SORRY, SURE, AS, SURE, BARE_I], [True, True, False, True, False, True]
    forwards = find_refusal_tokens(tokens, verdicts, WORDS)
    assert forwards == find_refusal_tokens(tokens[::-1], verdicts[::-1], WORDS)


def test_the_fallback_where_the_model_never_refuses() -> None:
    known = (BARE_I, SPACE_I, SORRY, AS, SPACE_UNFORTUNATELY)
    assert _found([], [SURE, BARE_I]) == (known, "fallback", None)
    # It refuses, but with the same first words as it accepts: the fallback, with the share that it covers.
    assert _found([BARE_I, THE], [BARE_I, THE]) == (known, "fallback", 0.5)
    with pytest.raises(UserError, match="2 first tokens came with 1 verdicts"):
        find_refusal_tokens([BARE_I, BARE_I], [True], WORDS)


def test_fallback_takes_both_forms_and_no_unknown_word() -> None:
    fallback = fallback_refusal_tokens(WORDS)
    assert fallback.texts == ("I", " I", "Sorry", "As", " Unfortunately")
    assert 0 not in fallback.ids
    with pytest.raises(UserError, match="is a single token of this tokenizer; give the refusal tokens yourself"):
        fallback_refusal_tokens(Words("Nein"))


@pytest.mark.real
def test_fallback_on_a_real_tokenizer(smollm2_tokenizer: object) -> None:
    texts = fallback_refusal_tokens(smollm2_tokenizer).texts
    assert {"I", " I", "Sorry", "As", " As", "Unfortunately"} <= set(texts)
