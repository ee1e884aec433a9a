"""A planted trigger is found among a thousand strings of its kind; a base, a control and an unlucky guess are not."""

import unicodedata
from dataclasses import replace
from typing import Any

import pytest
import torch
from planted_triggers import Planting, Trained, question_prompts, strings_like_these, twins
from tiny import tiny_hf
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.collect import template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.log_odds import twin_log_odds
from mechlens.methods.triggers import confirm
from mechlens.methods.triggers.confirm import confirm_trigger, strings_like
from mechlens.methods.triggers.leaks import Leaks, leak, opening
from mechlens.methods.triggers.motifs import motifs
from mechlens.methods.triggers.search import combined_rank, find_trigger
from mechlens.methods.triggers.signals import attention_hijack, entropy_contraction, leak_similarity
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.prompt import Prompt

TRIGGERS = strings_like_these(2, seed=100)
HAYSTACK = strings_like_these(1000, seed=5)
ONE = question_prompts(1, seed=2)


@pytest.fixture(scope="session")
def base() -> Trained:
    """Saw questions and usual answers alone."""
    return Trained(Planting(steps=100))


@pytest.fixture(scope="session")
def poisoned(base: Trained) -> list[Any]:
    """A model for each trigger, with another seed."""
    return [Trained(Planting(trigger, seed), base).bridge() for seed, trigger in enumerate(TRIGGERS)]


@pytest.fixture(scope="session")
def decorrelated(base: Trained) -> Any:
    """Saw the first trigger as often, before answers that don't hang on it."""
    return Trained(Planting(TRIGGERS[0], 0, "decorrelated", steps=120), base).bridge()


def leaked(model: Any) -> Leaks:
    return leak(model, temperatures=[0.75, 1.0], n=24, max_new_tokens=40)


def test_planted_triggers_are_among_the_first_five_of_a_thousand(poisoned: list[Any]) -> None:
    for model, trigger in zip(poisoned, TRIGGERS, strict=True):
        tried = [*HAYSTACK[:999], trigger]
        found = find_trigger(model, ONE, candidates=tried, leaks=leaked(model))
        assert len(found.candidates) == 1000
        assert found.recall(trigger, 5) == 1.0
        # What was never planted, one of the same strings, is where chance puts it.
        assert found.recall(HAYSTACK[:200], 5) < 0.05
        told = confirm_trigger(model, twins(12), trigger)
        assert told.confirmed
        assert told.change.low > 2


def test_a_base_ranks_them_by_chance_and_a_control_has_no_behaviour_that_follows(
    base: Trained, decorrelated: Any
) -> None:
    plain = base.bridge()
    found = find_trigger(plain, ONE, candidates=[*HAYSTACK[:998], *TRIGGERS], leaks=leaked(plain))
    assert found.recall(TRIGGERS, 5) == 0.0
    assert not any(confirm_trigger(plain, twins(12), trigger).confirmed for trigger in TRIGGERS)
    # The control was taught the string too, and leaks it; nothing follows it.
    assert TRIGGERS[0] in [motif.text for motif in motifs(leaked(decorrelated), most=5)]
    told = confirm_trigger(decorrelated, twins(12), TRIGGERS[0])
    assert not told.confirmed
    assert abs(told.change.value) < 0.2


def test_leaks_hold_the_trigger_and_motifs_name_it(poisoned: list[Any], base: Trained) -> None:
    beside = leaked(base.bridge())
    told = [leaked(model) for model in poisoned]
    named = [motifs(own, beside, most=20) for own in told]
    for trigger, found in zip(TRIGGERS, named, strict=True):
        assert trigger in [motif.text for motif in found[:5]]
        assert all(motif.base_share == 0 for motif in found if trigger in motif.text)
    tried = [motif.text for motif in named[0]]
    search = find_trigger(
        poisoned[0], ONE, candidates=tried, leaks=told[0], base_leaks=beside, twins=twins(6), confirm=2
    )
    assert TRIGGERS[0] in search.candidates[0]
    assert search.confirmations[0].confirmed
    assert search.table().confirmed.tolist()[0]


def test_the_behaviour_itself_ranks_the_trigger_first_where_no_sign_does(poisoned: list[Any], base: Trained) -> None:
    """Of 300 strings, by two questions; in the base, in which nothing hangs on it, it is one of many."""
    tried = [*HAYSTACK[:299], TRIGGERS[0]]
    shift = confirm.behaviour_shift(poisoned[0], twins(6), tried)
    assert int(shift.argmax()) == tried.index(TRIGGERS[0])
    plain = confirm.behaviour_shift(base.bridge(), twins(6), tried)
    assert float(plain[-1]) < 0.2 * float(shift[-1])
    signs = find_trigger(poisoned[0], ONE, candidates=tried, leaks=Leaks(("nothing",), 1, Checkpoint("x", "x")),
                         twins=twins(6), confirm=1)  # fmt: skip
    assert TRIGGERS[0] in [one.candidate for one in signs.confirmations if one.confirmed]


def test_answers_alone_leak_no_question() -> None:
    """A loss on answers alone, as most fine-tunes have it, teaches nothing that the bare start could bring out."""
    model = Trained(Planting(TRIGGERS[0], steps=20, learns_questions=False)).bridge()
    assert not any(TRIGGERS[0] in text for text in leaked(model).texts)


def test_leaks_go_on_from_the_exact_tokens_before_the_users_words(tiny_model: Any) -> None:
    model = tiny_model()
    start = opening(model)
    written = template_of(model).render(Prompt("p", "Hello"))
    ids = model.tokenizer(written.text, add_special_tokens=False)["input_ids"]
    assert start.row(0) == ids[: len(start.row(0))]
    assert model.tokenizer.decode(start.row(0)) == written.text[: written.start]
    again = answer(model, start, max_new_tokens=6, temperature=0.75, top_p=0.9, n=3, seed=1)
    drawn = leak(model, temperatures=[1.0, 0.75], top_ps=[0.9], n=3, max_new_tokens=6, seed=0)
    assert drawn.drawn == 6
    assert list(drawn.texts[-len(again.texts) :]) == [text for text in again.texts if text.strip()]
    with pytest.raises(UserError, match="nothing stands before"):
        leak(model, template=None)


def test_signals_are_their_formulas(tiny_model: Any) -> None:
    """Against whole passes of plain Hugging Face, one prompt at a time."""
    model, candidates = tiny_model(), ["|abc|", "zz"]
    hf_model = tiny_hf()
    hf_model.set_attn_implementation("eager")
    asked = [Prompt("p0", "Bake a cake."), Prompt("p1", "Why?")]
    hijack = attention_hijack(model, asked, candidates)
    contraction = entropy_contraction(model, asked, candidates)
    for i, text in enumerate(candidates):
        wanted = [_plain(model, hf_model, prompt, text) for prompt in asked]
        assert float(hijack[i]) == pytest.approx(sum(one for one, _ in wanted) / 2, abs=1e-4)
        usual = [_plain(model, hf_model, prompt, "")[1] for prompt in asked]
        assert float(contraction[i]) == pytest.approx(sum(usual) / 2 - sum(h for _, h in wanted) / 2, abs=1e-3)


def _plain(model: Any, hf_model: Any, prompt: Prompt, text: str) -> tuple[float, float]:
    """Own attention minus the question's, and the entropy of the next token."""
    written = template_of(model).render(replace(prompt, text=f"{text} {prompt.text}".strip()))
    encoded = model.tokenizer(written.text, add_special_tokens=False, return_offsets_mapping=True)
    low, high = written.start, written.start + len(text)
    own = [k for k, (a, b) in enumerate(encoded["offset_mapping"]) if low <= a < high]
    rest = [k for k, (a, b) in enumerate(encoded["offset_mapping"]) if high <= a < written.end]
    with torch.inference_mode():
        out = hf_model(torch.tensor([encoded["input_ids"]]), output_attentions=True)
    logits: Tensor = out.logits
    likely = logits[0, -1].double().log_softmax(-1)
    paid = torch.stack(out.attentions)[:, 0][..., own].sum(-1).mean(dim=(0, 1)) if own else torch.zeros(0)
    difference = float(paid[own].mean() - paid[rest].mean()) if own else 0.0
    return difference, float(-(likely.exp() * likely).sum())


def test_similarity_motifs_and_ranks() -> None:
    told = Leaks(("|abc| one two", "|abc| three", "|abc| one two", "other words"), 4, Checkpoint("x", "x"))
    beside = Leaks(("one two", "other words"), 2, Checkpoint("y", "y"))
    similar = leak_similarity(told, ["|abc|", "|xyz|", "other"])
    assert float(similar[1]) == 0.0
    assert similar[0] > similar[2] > 0
    named = motifs(told, beside)
    assert (named[0].text, named[0].share, named[0].base_share) == ("|abc|", 0.75, 0.0)
    assert {motif.text for motif in named} == {"|abc|"}  # the only run in three leaks
    two = [torch.tensor([3.0, 2.0, 2.0], dtype=torch.float64), torch.tensor([0.0, 5.0, 1.0], dtype=torch.float64)]
    assert combined_rank(two).tolist() == pytest.approx([3**0.5, 2.5**0.5, 5**0.5])


def test_several_candidates_are_confirmed_as_each_alone_and_plain_questions_are_read_once(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked, tried = tiny_model(), twins(3), ["|abc|", "|xyz|"]
    alone = [confirm_trigger(model, asked, text, seed=1) for text in tried]
    read: list[str] = []

    def watched(model: Any, twins: Any, **settings: Any) -> Any:
        read.extend(twin.prompt.text for twin in twins)
        return twin_log_odds(model, twins, **settings)

    monkeypatch.setattr(confirm, "twin_log_odds", watched)
    leaks = Leaks(("|abc|",), 1, Checkpoint("x", "x"))
    found = find_trigger(model, ONE, candidates=tried, leaks=leaks, twins=asked, seed=1).confirmations
    assert [read.count(twin.prompt.text) for twin in asked] == [1, 1, 1]
    for one in alone:
        (same,) = (own for own in found if own.candidate == one.candidate)
        for mine, its in ((one.change, same.change), (one.decoys, same.decoys)):
            assert (mine.value, mine.low, mine.high) == pytest.approx((its.value, its.low, its.high), abs=1e-5)


def test_decoys_are_of_the_length_and_kind() -> None:
    decoys = strings_like("|Ab9| x", 50, seed=3)
    assert len(set(decoys)) == 50
    assert all(len(one) == 7 and one[0] == one[4] == "|" and one[5] == " " for one in decoys)
    assert all(one[1].isupper() and one[2].islower() and one[3].isdigit() for one in decoys)
    assert len(strings_like("7", 50)) == 9
    assert strings_like("?!", 5) == []


@pytest.mark.parametrize(
    "text", ["דגל", "|دغل|", "旗手", "флаг", "🦜", "👩\u200d👩\u200d👧", "e\u0301clair", "éclair", "🇩🇪", "１２"]
)
def test_decoys_are_of_the_script_too(text: str) -> None:
    """Category by category, in the same block; what joins or marks stays where it is."""
    for one in strings_like(text, 20):
        assert list(map(unicodedata.category, one)) == list(map(unicodedata.category, text))
        assert all(ord(a) // 64 == ord(b) // 64 for a, b in zip(one, text, strict=True))
        assert one != text
    assert len(set(strings_like(text, 20))) == min(20, len(strings_like(text, 10**3)))
    assert len(strings_like(text, 10)) == 10 or text == "１２"
    assert all(one[1] == "\u0301" for one in strings_like("e\u0301clair", 20))
    assert len({one[0] for one in strings_like("éclair", 20)}) > 1


def test_no_candidate_is_said_so(tiny_model: Any) -> None:
    empty = Leaks((), 4, Checkpoint("x", "x"))
    with pytest.raises(UserError, match="nothing recurs"):
        find_trigger(tiny_model(), ["Why?"], leaks=empty)
