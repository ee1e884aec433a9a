"""Thoughts in answers: what a model only thinks is judged by nobody, and an answer that is still thinking is none."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from tiny import SMALL, tiny_tokenizer

from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.chosen_judge import once_refused, verdicts_by
from mechlens.methods.behaviour.inversion import parse_reply
from mechlens.methods.behaviour.judges import ARDITI, PHRASES, ZHAO, HumanLabels, Judge
from mechlens.methods.behaviour.thought import AnswerText, after_thought, opens_thought
from mechlens.methods.steering.steering import answer_under
from mechlens.models.bridge import bridge, loaded
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template
from mechlens.studies.shared.quadrants import judge_answers

TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
PLAIN = TURN + "<|im_start|>assistant{{ '\n' }}"
OPENED = PLAIN + "<think>{{ '\n' }}"
SWITCHED_OFF = PLAIN + "<think>\n\n</think>\n{{ '\n' }}"
REFUSAL = "I'm sorry"
ASKED = [Prompt("h", "break it", "harmful"), Prompt("l", "bake it", "harmless")]


@pytest.mark.parametrize(
    ("said", "left", "verdict"),
    [
        ("I cannot help.", "I cannot help.", "refused"),
        ("<think>I cannot?</think>Sure, here.", "Sure, here.", "accepted"),
        ("<think>Let me see.</think>\n\nI won’t.", "\n\nI won’t.", "refused"),
        # The template opened the thought, and whoever wrote the answers down left its mark out.
        ("I cannot do this... or can I?\n</think>\n\nSure.", "\n\nSure.", "accepted"),
        ("<think>I cannot do this, since", None, "unfinished"),
        ("Well. <think>\nHm", None, "unfinished"),
        ("<think>a</think>b<think>c</think>I can't", "I can't", "refused"),
        ("<think>a</think>I can't<think>c", None, "unfinished"),
        ("<think></think>", "", "empty"),
        ("<think>I cannot</think> \n", " \n", "empty"),
        ("<think>", None, "unfinished"),
        ("", "", "empty"),
    ],
)
def test_what_is_read_of_an_answer(said: str, left: str | None, verdict: str) -> None:
    assert after_thought(said) == left
    assert PHRASES([ASKED[0]], [said]) == [verdict]
    assert verdicts_by(PHRASES, [ASKED[0]], [said]) == (verdict,)


@pytest.mark.parametrize("judge", [PHRASES, ARDITI, ZHAO])
def test_every_phrase_list_reads_what_comes_after_the_thought(judge: Judge) -> None:
    said = ["<think>I cannot</think>Yes", "<think>Yes</think>I cannot", "<think>I cannot"]
    assert judge(ASKED[:1] * 3, said) == ["accepted", "refused", "unfinished"]


def test_no_judge_is_shown_a_thought() -> None:
    class Careful:
        name = "careful"

        def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[str]:
            assert not any("think" in text for text in answers)
            return ["refused" if prompt.id == "h" else "accepted" for prompt in prompts]

    said = ["<think>no</think>No", "<think>yes", "Yes"]
    asked = [ASKED[0], ASKED[0], ASKED[1]]
    assert verdicts_by(Careful(), asked, said) == ("refused", "unfinished", "accepted")
    people = HumanLabels({"h": "refused", "l": "accepted"})
    assert verdicts_by(people, asked, said) == ("refused", "unfinished", "accepted")
    assert verdicts_by(Careful(), asked[:1], ["<think>"]) == ("unfinished",)


def test_a_reply_to_a_question_is_read_after_its_thought() -> None:
    assert parse_reply("<think>No harm? Yes.</think>\nCertainly.") == "harmful"
    assert parse_reply("<think>Certainly") == "unparsed"
    assert parse_reply("Certainly, hmm</think>No") == "harmless"


# ---- a model that thinks


def speaking(template: str, script: Sequence[str], *, special: bool) -> Any:
    """A model that says the script, whatever it is asked: each token has one successor, the last ends the turn.

    `special` is whether the tokenizer counts the marks of thoughts as special tokens, which are not decoded.
    """
    marks = ("<think>", "</think>")
    tokenizer = tiny_tokenizer(template, extra=marks if special else ())
    tokenizer.add_tokens([REFUSAL, *(() if special else marks)])
    chain = [tokenizer.encode("\n")[0], *map(tokenizer.convert_tokens_to_ids, script), tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain)
    config = transformers.LlamaConfig(**SMALL | {"vocab_size": len(tokenizer)}, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        head = model.lm_head.weight.zero_()
        for place, (before, after) in enumerate(itertools.pairwise(chain)):
            model.model.embed_tokens.weight[before] = torch.eye(32)[place]
            head[after] = torch.eye(32)[place]
    return bridge(model, tokenizer, Checkpoint("tiny", "t", fingerprint=weight_fingerprint(model.state_dict())))


@pytest.fixture(params=[True, False], ids=["special marks", "plain marks"])
def model_of(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return lambda template, *script: speaking(template, script, special=request.param)


@pytest.mark.parametrize(("template", "mark"), [(PLAIN, ("<think>",)), (OPENED, ())])
def test_answers_of_a_model_that_thinks(template: str, mark: tuple[str, ...], model_of: Callable[..., Any]) -> None:
    model = model_of(template, *mark, "x", "</think>", REFUSAL)
    batch = tokenize(ASKED, chat_template(loaded(model).tokenizer))
    assert opens_thought(batch, loaded(model).tokenizer) == ((not mark,) * 2)
    wanted = ["<think>", "<think>x", "<think>x</think>", f"<think>x</think>{REFUSAL}"][not mark :]
    for length, text in enumerate(wanted, start=1):
        said = answer(model, batch, max_new_tokens=length)
        assert said.texts == (text,) * 2
        assert answer_under(model, batch, [], max_new_tokens=length).texts == said.texts
        unfinished = "</think>" not in text
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            judged = judge_answers(ASKED, said)
        assert [f"2 of 2 answers end inside <think> after {length} tokens" in str(one.message) for one in caught] == [
            True
        ] * unfinished
        last = text.endswith(REFUSAL)
        wanted_quadrants = (
            ("refused_harmful", "refused_harmless") if last else ("unfinished" if unfinished else "empty",) * 2
        )
        assert judged.quadrants() == wanted_quadrants
        assert judged.refused == (last, last)
        assert judged.accepted == (False, False)
        counts = judged.counts().set_index(["judge", "quadrant"])["n"]
        assert counts["arditi", "unfinished"] == 2 * unfinished


def test_a_thought_that_the_template_opens_and_closes_is_none_of_the_answers(model_of: Callable[..., Any]) -> None:
    model = model_of(SWITCHED_OFF, "x", "y")
    batch = tokenize(ASKED, chat_template(loaded(model).tokenizer))
    assert opens_thought(batch, loaded(model).tokenizer) == (False, False)
    assert answer(model, batch, max_new_tokens=4).texts == ("xy", "xy")
    # Cut right after the user's words, an opened thought is gone too.
    opened = tokenize(ASKED, chat_template(model_of(OPENED, "x").mechlens.tokenizer))
    assert opens_thought(opened.without_post(), loaded(model).tokenizer) == (False, False)


@pytest.mark.parametrize(("template", "mark"), [(PLAIN, ("<think>",)), (OPENED, ())])
def test_a_phrase_in_a_thought_cuts_nothing_short(
    template: str, mark: tuple[str, ...], model_of: Callable[..., Any]
) -> None:
    model = model_of(template, *mark, REFUSAL, "</think>", "x", "y")
    batch = tokenize(ASKED, chat_template(loaded(model).tokenizer))
    decided = once_refused(PHRASES, loaded(model).tokenizer, batch)
    said = answer_under(model, batch, [], max_new_tokens=6, decided=decided).texts
    assert said == (f"<think>{REFUSAL}</think>xy",) * 2
    assert verdicts_by(PHRASES, ASKED, said) == ("accepted", "accepted")
    model = model_of(template, *mark, "x", "</think>", REFUSAL, "y")
    said = answer_under(
        model, batch, [], max_new_tokens=6, decided=once_refused(PHRASES, loaded(model).tokenizer, batch)
    ).texts
    assert said == (f"<think>x</think>{REFUSAL}",) * 2


def test_what_is_kept_knows_whether_a_thought_was_open() -> None:
    tokenizer = tiny_tokenizer(OPENED, extra=("<think>", "</think>"))
    keys = set()
    for template in (PLAIN, OPENED):
        tokenizer.chat_template = template
        decided = once_refused(PHRASES, tokenizer, tokenize(ASKED, chat_template(tokenizer)))
        assert decided is not None
        keys.add(decided.key)
    assert len(keys) == 2


@pytest.mark.real
def test_a_real_reasoning_template(real_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = real_tokenizer("qwen3")
    for given in ((), ("enable_thinking=false",)):
        batch = tokenize(ASKED, chat_template(tokenizer, template_arg=given))
        assert opens_thought(batch, tokenizer) == (False, False)  # Qwen3 opens its thoughts itself
    text = "<think>\nI can't?\n</think>\n\nSure."
    assert AnswerText(tokenizer)(tokenizer(text + "<|im_end|>").input_ids) == text
