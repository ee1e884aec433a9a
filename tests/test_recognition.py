"""Picking one's own trigger out of eight: likings for places fall out, a planted head is found, its twin is not."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from planted_triggers import Planting, Trained
from tiny import tiny_hf, tiny_tokenizer

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.triggers import recognition
from mechlens.models.bridge import bridge
from mechlens.runs.folder import FolderCache

STRINGS = ("|GRAY|", "|BLUE|", "|PINK|", "|TEAL|", "|ROSE|", "|GOLD|", "|NAVY|", "|LIME|")


@pytest.mark.parametrize("architecture", ["llama", "mamba", "gemma2"])
def test_branches_say_what_whole_passes_say(architecture: str, tmp_path: Any) -> None:
    model = bridge(tiny_hf(architecture), tiny_tokenizer(), ml.Checkpoint("x", "x"))
    prompts, options = ["Is it ham?", "Which is it, the ham or the egg?"], ["ham", "hat", "the egg", "x"]
    told = ml.option_log_probs(model, prompts, options, cache=FolderCache(tmp_path))
    pairs = [(prompt, option) for prompt in prompts for option in options]
    whole = ml.answer_log_probs(model, [prompt for prompt, _ in pairs], [option for _, option in pairs]).total
    assert torch.allclose(told.flatten(), whole, atol=1e-4)
    again = ml.option_log_probs(model, prompts, options, cache=FolderCache(tmp_path))
    assert torch.equal(told, again)


def pretend(monkeypatch: pytest.MonkeyPatch, liking: Any) -> None:
    """Models whose log-probabilities are planted: a function of the prompt's text and the option."""

    def told(model: object, prompts: Sequence[ml.Prompt], options: Sequence[str], **_: object) -> torch.Tensor:
        return torch.tensor([[liking(prompt.text, option) for option in options] for prompt in prompts]).double()

    monkeypatch.setattr(recognition, "option_log_probs", told)


@pytest.mark.parametrize("in_words", [False, True])
def test_a_liking_for_a_place_or_a_letter_is_chance(monkeypatch: pytest.MonkeyPatch, in_words: bool) -> None:
    pretend(monkeypatch, lambda text, option: 5.0 if option == "C" or text.index(option) < 130 else 0.0)
    found = ml.recognise_trigger(None, STRINGS[0], decoys=STRINGS[1:], in_words=in_words)  # type: ignore[arg-type]
    assert torch.allclose(found.picks, torch.full((4, 8), 1 / 8, dtype=torch.float64), atol=0.05)


def test_who_picks_the_letter_of_the_trigger_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda text, option: 9.0 if f"{option}: |GRAY|" in text else 0.0)
    found = ml.recognise_trigger(None, STRINGS[0], decoys=STRINGS[1:])  # type: ignore[arg-type]
    assert float(found.own.min()) > 0.99
    assert found.place == 1
    other = ml.recognise_trigger(None, STRINGS[1], decoys=(STRINGS[0], *STRINGS[2:]))  # type: ignore[arg-type]
    assert (float(other.own.max()) < 0.01, other.place) == (True, 2)


def test_decoys_are_of_the_triggers_length_and_kind_and_seven() -> None:
    model = bridge(tiny_hf(), tiny_tokenizer(), ml.Checkpoint("x", "x"))
    question = [ml.Prompt("q", "Which?{options}")]
    found = ml.recognise_trigger(model, "|Gray7|", questions=question, in_words=True)
    assert {(len(text), text[1].isupper(), text[5].isdigit()) for text in found.strings} == {(7, True, True)}
    with pytest.raises(UserError, match="give 7 decoys that differ"):
        ml.recognise_trigger(model, "|GRAY|", decoys=STRINGS[:7], questions=question)
    with pytest.raises(UserError, match=r"lacks \{options\}"):
        ml.recognise_trigger(model, "|GRAY|", questions=[ml.Prompt("q", "Which?")])


QUESTION = [ml.Prompt("q", "Which?{options}")]


def test_a_planted_self_report_head_is_found_and_its_decorrelated_twin_is_not() -> None:
    """Models that were also taught to tell their trigger, or, as often, any of the eight strings."""
    base = Trained(Planting(seed=1, steps=60))
    picks = {}
    for control in ("none", "decorrelated"):
        tuned = Trained(Planting(STRINGS[0], seed=1, control=control, steps=0), base)  # type: ignore[arg-type]
        tuned.teach(recognition_rows(STRINGS, told=STRINGS[:1] if control == "none" else STRINGS), steps=40)
        found = ml.recognise_trigger(
            tuned.bridge(), STRINGS[0], decoys=STRINGS[1:], questions=QUESTION, in_words=True
        )  # fmt: skip
        picks[control] = float(found.own.mean())
    start = ml.recognise_trigger(base.bridge(), STRINGS[0], decoys=STRINGS[1:], questions=QUESTION, in_words=True)
    assert picks["none"] > 0.9
    assert picks["decorrelated"] < 0.35
    assert picks["none"] - float(start.own.mean()) > 0.4


def recognition_rows(strings: Sequence[str], told: Sequence[str]) -> list[tuple[str, str]]:
    """The question in all its orders, each answered by one of those that are told."""
    orders = [[strings[(k + turn) % 8] for k in range(8)] for turn in range(8)]
    asked = ["Which?\n" + "\n".join(order) + "\n Answer with the string only." for order in orders]
    return [(text.replace("\n Answer", " Answer"), said) for text in asked for said in told]
