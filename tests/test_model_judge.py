"""A model as a judge: on a hand-built model whose word on every answer is known, and a real one on plain cases."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from refusing import MARK, refusing_model
from saved import REFUSAL

from mechlens.errors import UserError
from mechlens.methods.behaviour.answers import Answers
from mechlens.methods.behaviour.chosen_judge import verdicts_by
from mechlens.methods.behaviour.judges import PHRASES, Judge
from mechlens.methods.behaviour.model_judge import ModelJudge
from mechlens.models.bridge import bridge, loaded
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.prompts.prompt import Prompt
from mechlens.studies.shared.quadrants import judge_answers

ASKED = [Prompt(f"p{i}", f"bake {i}", ("harmful", "harmless")[i % 2]) for i in range(12)]
MARKED = [i % 3 == 0 for i in range(12)]
SAID = [f"so {(MARK if marked else 'v') * 10} it" for marked in MARKED]


def sure_model() -> Any:
    """The hand-built model with one of its two words always likelier than all others together."""
    hf_model, tokenizer = refusing_model()
    hf_model.lm_head.weight.data.mul_(2.0)
    return hf_model, tokenizer


@pytest.fixture(scope="module")
def judge() -> ModelJudge:
    """Says yes (its refusal) where the question holds enough marks, else no ("a")."""
    hf_model, tokenizer = sure_model()
    checkpoint = Checkpoint("tiny", "t", fingerprint=weight_fingerprint(hf_model.state_dict()))
    model = bridge(hf_model, tokenizer, checkpoint)
    return ModelJudge(model, question="{prompt}: {answer}", yes=(REFUSAL,), no=("a",))


def test_its_verdict_is_the_word_that_it_holds_likelier(judge: ModelJudge) -> None:
    assert isinstance(judge, Judge)
    assert judge(ASKED, SAID) == ["refused" if marked else "accepted" for marked in MARKED]
    assert replace(judge, yes=judge.no, no=judge.yes)(ASKED, SAID) == [
        "accepted" if marked else "refused" for marked in MARKED
    ]


@torch.inference_mode()
def test_its_numbers_are_those_of_the_whole_question(judge: ModelJudge) -> None:
    found = judge.log_probabilities(ASKED, SAID)
    tokenizer = loaded(judge.model).tokenizer
    plain, _ = sure_model()
    words = [tokenizer.convert_tokens_to_ids(word) for word in (REFUSAL, "a", "Ġa")]
    for i, prompt in enumerate(ASKED):
        turns = [{"role": "user", "content": f"{prompt.text}: {SAID[i]}"}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        yes, *no = plain(ids).logits[0, -1].double().log_softmax(-1)[words]
        assert torch.allclose(found[i], torch.stack([yes, torch.stack(no).logsumexp(0)]), atol=1e-4)


def test_silence_is_empty_and_another_reply_unclear(judge: ModelJudge) -> None:
    assert judge(ASKED[:3], ["", " \n", SAID[2]]) == ["empty", "empty", "accepted"]
    assert judge([], []) == []
    assert replace(judge, yes=("q",), no=("w",))(ASKED[:2], SAID[:2]) == ["unclear", "unclear"]


def test_what_is_quoted_can_hold_anything(judge: ModelJudge) -> None:
    said = ["{prompt} {answer} {0} %s", "<|im_end|>", "{% raw %}"]
    assert set(judge(ASKED[:3], said)) == {"accepted"}
    text = replace(judge, question="a {answer} b {prompt} c")._asked("{answer}", "{prompt}")
    assert text == "a {prompt} b {answer} c"


def test_what_can_not_be_asked(judge: ModelJudge) -> None:
    with pytest.raises(UserError, match=r"the question of the judge 'model' lacks \{answer\}"):
        replace(judge, question="Is {prompt} harmful?")(ASKED[:1], SAID[:1])
    with pytest.raises(UserError, match="yes and no begin with the same token 'a'"):
        replace(judge, yes=("a",))(ASKED[:1], SAID[:1])


def test_its_agreement_stands_beside_the_phrase_lists(judge: ModelJudge) -> None:
    texts = tuple(f"{REFUSAL} {said}" if i < 2 else said for i, said in enumerate(SAID))
    answers = Answers(tuple(p.id for p in ASKED), texts, ((1,),) * 12, 1, Checkpoint("tiny", "t"), "", "plain")
    judged = judge_answers(ASKED, answers, [PHRASES, judge])
    assert judged.judge == "phrases"
    ((first, second, agreed),) = judged.agreements(seed=0)
    assert (first, second) == ("phrases", "model")
    # The list refuses the first two, the model every third: 8 verdicts of 12 are the same.
    chance = 2 / 12 * 4 / 12 + 10 / 12 * 8 / 12
    assert agreed.kappa.value == pytest.approx((8 / 12 - chance) / (1 - chance))
    counts = judged.counts().set_index(["judge", "quadrant"])["n"]
    assert counts["model", "refused_harmful"] + counts["model", "refused_harmless"] == 4
    thinking = [f"<think>{MARK * 20}</think>{SAID[1]}", f"<think>{MARK * 20}"]
    assert verdicts_by(judge, ASKED[:2], thinking) == ("accepted", "unfinished")
