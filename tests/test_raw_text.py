"""Raw text, without a chat template: as a plain tokenizer and model read it, in everything that takes prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from saved import save_model
from tiny import tiny_hf, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from mechlens.cli import main
from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.directions.direction import mean_difference
from mechlens.methods.patching.metrics import KLDivergence
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.methods.probing.detect import detect
from mechlens.methods.steering.interventions import Add
from mechlens.methods.steering.steering import answer_under
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import split_by_family
from mechlens.prompts.templates.template import chat_template
from mechlens.settings import DetectionPlan

TEXTS = ["the thing in the", " a longer one, the end.\n", "in"]


def base_tokenizer(*, bos: bool) -> Any:
    """A base model's: no chat template, and a start token where it writes one."""
    tokenizer = tiny_tokenizer(None)
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    return tokenizer


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def both(request: Any) -> tuple[Any, Any, Any]:
    """A base model's tokenizer, the plain Hugging Face model, and ours."""
    tokenizer = base_tokenizer(bos=request.param == "llama")
    hf_model = tiny_hf(request.param)
    return tokenizer, hf_model, bridge(tiny_hf(request.param), tokenizer, Checkpoint("base", "base"))


def plain(hf_model: Any, tokenizer: Any, text: str) -> Tensor:
    """Of plain Hugging Face: levels by tokens by width."""
    with torch.no_grad():
        out = hf_model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
    return torch.cat(out.hidden_states[:-1])


def test_tokens_are_those_of_the_text(both: Any) -> None:
    tokenizer, _, model = both
    batch = tokenize(TEXTS, template_of(model, None))
    assert [batch.row(i) for i in range(3)] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert batch.roles(0)[-1] == "last"
    assert batch.positions == batch.resolve(["inst", "post[*]", "last"]) == ("last",)
    assert batch.template == chat_template(tokenizer, "none").fingerprint != chat_template(tiny_tokenizer()).fingerprint


def test_activations_are_those_of_plain_hugging_face_however_it_is_padded(both: Any) -> None:
    tokenizer, hf_model, model = both
    sides = [tokenize(TEXTS, template_of(model, "none"), padding_side=side) for side in ("left", "right")]
    left, right = (collect(model, side, positions=["token[0]", "token[-1]"], levels=[0, 1, 2]) for side in sides)
    torch.testing.assert_close(left.values, right.values)
    for i, text in enumerate(TEXTS):
        truth = plain(hf_model, tokenizer, text)
        torch.testing.assert_close(left.values[i], truth[:, [0, -1]], atol=2e-5, rtol=2e-5)
        alone = collect(model, text, template=None, levels=[0, 1, 2])
        assert alone.positions == ("last",)
        torch.testing.assert_close(alone.at(2, "inst"), truth[2, -1:], atol=2e-5, rtol=2e-5)
    spans = collect(model, TEXTS, positions=["prompt[*]"], levels=[1], template=None)
    torch.testing.assert_close(spans.at(1, "token[0]"), left.at(1, "token[0]"))


def test_answers_are_those_of_plain_hugging_face(both: Any) -> None:
    tokenizer, hf_model, model = both
    said = answer(model, TEXTS, max_new_tokens=4, template=None)
    for text, tokens in zip(TEXTS, said.tokens, strict=True):
        row = tokenizer(text, return_tensors="pt")
        out = hf_model.generate(**row, max_new_tokens=4, do_sample=False)[0, row["input_ids"].shape[1] :].tolist()
        assert list(tokens) == [token for token in out if token != tokenizer.eos_token_id]
    assert answer_under(model, TEXTS, [], max_new_tokens=4, template=None).tokens == said.tokens


def test_steering_patching_and_detection(both: Any) -> None:
    _, _, model = both
    texts = [f"the {i}" for i in range(12)], [f"in {i}" for i in range(12)]
    prompts = [Prompt(f"{k}{i}", text, label="xy"[k]) for k in (0, 1) for i, text in enumerate(texts[k])]
    acts = collect(model, prompts, template=None)
    split = split_by_family(acts.labels, acts.families, fractions=(0.5, 0.2, 0.3), seed=0)
    found = detect(acts, "x", "y", split, DetectionPlan(resamples=9, permutations=9, random_directions=2))
    assert found.at("inst") == found.at("last")
    direction = mean_difference(acts, "x", "y", 2, "last")
    add = Add(direction, strength=3.0, unit="raw", layers=(2,), positions=("token[-1]",), phase="prompt")
    assert len(answer_under(model, TEXTS, [add], max_new_tokens=2, template=None).texts) == 3
    assert direction.template == acts.template == template_of(model, "none").fingerprint
    plan = PatchPlan("resid_pre", layers=(1,), positions=("last", "token[-2]"))
    swept = patch_sweep(model, [("the in", "the thing in"), ("in the", "a in")], KLDivergence(), plan, template=None)
    assert swept.positions == ("last", "token[-2]")
    assert float(swept.values.sum()) > 0


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"system": "Be kind"}, "prompt 'p' has a system prompt, and raw text has no place for that"),
        ({"history": (("user", "a"),)}, "prompt 'p' has earlier turns, and raw text has no place for that"),
    ],
)
def test_turns_have_no_place_in_raw_text(what: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        tokenize([Prompt("p", "a", **what)], chat_template(base_tokenizer(bos=True), None))


def test_what_raw_text_does_not_have_is_said(both: Any) -> None:
    _, _, model = both
    for name in ("post[0]", "post[-1]", "middle"):
        with pytest.raises(UserError, match=r"in raw text.*choose last, token"):
            collect(model, TEXTS, positions=[name], template=None)
    with pytest.raises(UserError, match="too short to have a token 'token\\[-9\\]'"):
        collect(model, TEXTS, positions=["token[-9]"], template=None)
    with pytest.raises(UserError, match="no position to read at all"):
        collect(model, TEXTS, positions=["post[*]"], template=None)
    with pytest.raises(UserError, match="--template none, template=None in Python"):
        collect(model, TEXTS)
    with pytest.raises(UserError, match="leave out the one in the text"):
        tokenize("<bos>a", chat_template(base_tokenizer(bos=True), None))


def test_marks_in_raw_text_are_meant() -> None:
    tokenizer = tiny_tokenizer()
    text = "<|im_start|>user\nHi<|im_end|>"
    batch: TokenBatch = tokenize(text, chat_template(tokenizer, "none"))
    assert batch.row(0) == tokenizer(text)["input_ids"]


def test_negative_tokens_count_from_the_end_of_the_prompt_also_in_a_template() -> None:
    template = chat_template(tiny_tokenizer())
    batch = tokenize(["a", "a longer one"], template)
    assert torch.equal(batch.at("token[-1]"), batch.at("last"))
    assert torch.equal(batch.at("token[-2]"), batch.at("post[-2]"))
    answered = batch.with_answers([[7], [7, 8]])
    assert torch.equal(answered.at("token[-1]"), answered.at("last"))


def test_the_command_line_reads_raw_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "base", template=False)
    main(["positions", "--model", str(folder), "--text", "a the", "--template", "none", "--json"])
    assert '"last"' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["positions", "--model", str(folder), "--text", "a the"])
    assert "--template none" in capsys.readouterr().err
