"""Guard models: their words are parsed, their log-odds are those of the verdict's token, and a better one wins."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import requests, save_guard_model
from sklearn.metrics import roc_auc_score
from tiny import tiny_tokenizer

import mechlens as ml
from mechlens.methods.guard.guard_model import (
    SAFETY,
    YES_NO,
    VerdictTokens,
    VerdictWords,
    ask_guard_model,
    parse_guard_answer,
    verdict_tokens,
)
from mechlens.studies.guard.detectors import guard_model_detector

PROMPTS = [ml.Prompt(str(i), text, system="ignored by a guard") for i, text in enumerate(requests(30, "make"))]


def test_llama_guards_answers_are_parsed() -> None:
    table = {
        "safe": (False, ()),
        "\n\nunsafe\nS1,S10": (True, ("S1", "S10")),
        "Unsafe\nO3": (True, ("O3",)),
        "unsafe": (True, ()),
        "safe\nS1": (False, ()),
        "This is not about safety": (None, ()),
        "": (None, ()),
        "unsafely safe": (False, ()),
    }
    for text, (harmful, hazards) in table.items():
        said = parse_guard_answer(text)
        assert (said.harmful, said.hazards) == (harmful, hazards), text


def test_yes_and_no_count_where_they_answer() -> None:
    table = {
        "Yes": True,
        "no.": False,
        " No, it is fine": False,
        "Harmful request: yes\nResponse refusal: no": True,
        "<score> no </score>": False,
        "There is no harm in it": None,
        "Nothing": None,
    }
    for text, harmful in table.items():
        assert parse_guard_answer(text, YES_NO).harmful is harmful, text


def planted_guard(folder: Path, odds: torch.Tensor, verdicts: tuple[str, str]) -> Any:
    return ml.load(str(save_guard_model(folder, [prompt.text for prompt in PROMPTS], odds, verdicts)))


@pytest.mark.parametrize("verdicts", [(" unsafe", " safe"), ("Yes ", "No ")])
def test_the_log_odds_are_those_of_the_verdicts_tokens(tmp_path: Path, verdicts: tuple[str, str]) -> None:
    from mechlens.models.native import native

    odds = torch.linspace(-3, 3, len(PROMPTS))[torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(0))]
    guard = planted_guard(tmp_path / "guard", odds, verdicts)
    said = ask_guard_model(guard, PROMPTS)
    plain = ml.answer(guard, [ml.Prompt(p.id, p.text) for p in PROMPTS], max_new_tokens=12)
    assert [one.answer for one in said.answers] == list(plain.texts)
    assert said.unread == 0
    assert said.log_odds is not None
    template = ml.template_of(guard)
    batch = ml.tokenize([ml.Prompt(p.id, p.text) for p in PROMPTS], template)
    ids = [template.tokenizer.convert_tokens_to_ids(word) for word in verdicts]
    with native(guard) as hf_model, torch.inference_mode():
        logits = torch.stack([hf_model(torch.tensor([batch.row(i)])).logits[0, -1, ids] for i in range(len(PROMPTS))])
    torch.testing.assert_close(said.log_odds.float(), logits[:, 0] - logits[:, 1], rtol=1e-4, atol=1e-4)
    # The word is the log-odds at a threshold of 0.
    assert [one.harmful for one in said.answers] == (said.log_odds > 0).tolist()
    assert 3 < sum(one.harmful is True for one in said.answers) < len(PROMPTS) - 3
    assert repr(verdicts[0]) in said.note


def test_a_guard_that_says_one_word_only_has_log_odds_all_the_same(tmp_path: Path) -> None:
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(1))
    odds = torch.linspace(-3, 3, len(PROMPTS))[order] - 12
    said = ask_guard_model(planted_guard(tmp_path / "guard", odds, (" unsafe", " safe")), PROMPTS)
    assert {one.harmful for one in said.answers} == {False}
    assert said.log_odds is not None
    # Its words know nothing, its log-odds what was planted.
    harmful = (odds > odds.median()).numpy()
    assert roc_auc_score(harmful, said.log_odds.numpy()) > 0.8


def answers_of(*texts: str) -> tuple[Any, list[list[int]]]:
    tokenizer = tiny_tokenizer()
    return tokenizer, [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def test_the_tokens_are_found_after_whatever_the_guard_says_first() -> None:
    tokenizer, said = answers_of("\n\nsafe", "\n\nunsafe\nS1", "\n\nsafe")
    found = verdict_tokens(tokenizer, said, SAFETY)
    start, s, u = (tokenizer.encode(text, add_special_tokens=False) for text in ("\n\n", "s", "u"))
    assert found == VerdictTokens(tuple(start), tuple(u), tuple(s))
    # A word that isn't said would be written as the other one is.
    for text, letter in (("Safe", "U"), ("\n\nUNSAFE", "S"), ("<a> safe", "u")):
        tokenizer, said = answers_of(text)
        found = verdict_tokens(tokenizer, said, SAFETY)
        assert isinstance(found, VerdictTokens)
        unsaid = found.harmless if "UN" in text else found.harmful
        assert list(unsaid) == tokenizer.encode(letter, add_special_tokens=False)


def test_where_no_token_tells_there_are_no_log_odds_and_no_auroc() -> None:
    from mechlens.methods.guard.guard_model import GuardModelOpinion

    tokenizer, said = answers_of("I am happy to help", "Sure")
    assert "no answer says unsafe or safe" in str(verdict_tokens(tokenizer, said, SAFETY))
    tokenizer, said = answers_of("Hmm, this is safe", "Well, that one is unsafe", "safe")
    assert "1 of 3 answers give a verdict after the same tokens" in str(verdict_tokens(tokenizer, said, SAFETY))
    alike = VerdictWords("bad", "benign", re.compile("(bad|benign)"))
    tokenizer, said = answers_of("bad", "benign")
    assert "don't begin with tokens of their own" in str(verdict_tokens(tokenizer, said, alike))
    opinion = GuardModelOpinion((parse_guard_answer("unsafe"), parse_guard_answer("hm")), None, "no log-odds: so")
    detector = guard_model_detector("guard", opinion)
    assert detector.scores is None
    assert detector.flagged.tolist() == [True, False]
    assert detector.note == "no log-odds: so; 1 of 2 answers without a verdict"
