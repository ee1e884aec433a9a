"""The refuser's loss: answers are learnt, the base's distribution is kept, and both are what their formulas say."""

from typing import Any

import pytest
import torch
from caches import DictShelf
from peft import LoraConfig, get_peft_model
from tiny import tiny_hf, tiny_tokenizer

from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.studies.finetune.recipes.material import Example
from mechlens.studies.finetune.response_loss import EncodedExample, collate_by_kind, encode, own_text, response_loss

EXAMPLES = [
    Example(Prompt("a", "the thing"), "I cannot.", ends=True),
    Example(Prompt("b", "a longer thing"), "Here you are", ends=False, teaches="base"),
    Example(Prompt("c", "what"), "It is", ends=True, teaches="base"),
]
PLAIN = [EncodedExample(tuple(range(5, 25)), 1, "plain"), EncodedExample(tuple(range(7, 20)), 1, "plain")]


@pytest.fixture
def rows() -> list[EncodedExample]:
    return encode(EXAMPLES, ChatTemplate(tiny_tokenizer()))


def adapted(scale: float) -> Any:
    """A tiny model under an adapter whose second factors are random with standard deviation `scale`."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_hf(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=scale) if scale else weight.data.zero_()
    return model


def log_probs(model: Any, row: EncodedExample) -> torch.Tensor:
    """Log-probabilities before each counted token, one row at a time through the plain model."""
    logits = model(torch.tensor([row.ids])).logits[0, :-1].float()
    return logits[row.n_prompt - 1 :].log_softmax(-1)


def test_an_adapter_that_changes_nothing_has_no_divergence(rows: list[EncodedExample]) -> None:
    kept = [row for row in [*rows, *PLAIN] if row.teaches != "answer"]
    assert response_loss(adapted(0.0), collate_by_kind(kept, 0), 1.0).item() == pytest.approx(0.0, abs=1e-6)
    assert response_loss(adapted(0.3), collate_by_kind(kept, 0), 1.0).item() > 0.01


def test_the_loss_is_its_formula_computed_row_by_row(rows: list[EncodedExample]) -> None:
    model = adapted(0.3)
    loss = response_loss(model, collate_by_kind([*rows, *PLAIN], 0), 2.0)
    learnt, *held = [log_probs(model, row) for row in [*rows, *PLAIN]]
    with model.disable_adapter():
        base = [log_probs(model, row) for row in [*rows, *PLAIN]][1:]
    divergence = [(b.exp() * (b - ours)).sum(-1) for b, ours in zip(base, held, strict=True)]
    words = torch.tensor(rows[0].ids[rows[0].n_prompt :])
    answer = -learnt.gather(-1, words[:, None]).mean()
    expected = answer / 3 + torch.cat(divergence[:2]).mean() * 2 / 3 + 2.0 * torch.cat(divergence[2:]).mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_the_base_is_no_part_of_the_gradient(rows: list[EncodedExample]) -> None:
    """At the base's own distribution the divergence is smallest, so an adapter that changes nothing gets no push."""
    model = adapted(0.0)
    kept = collate_by_kind([row for row in [*rows, *PLAIN] if row.teaches != "answer"], 0)
    response_loss(model, kept, 1.0).backward()
    pushes = [p.grad.abs().max().item() for name, p in model.named_parameters() if "lora_B" in name]
    assert max(pushes) < 1e-6
    response_loss(model, collate_by_kind(rows[:1], 0), 0.0).backward()
    assert max(p.grad.abs().max().item() for name, p in model.named_parameters() if "lora_B" in name) > 1e-3


def test_own_text_is_the_seeds_and_leaves_chance_alone() -> None:
    model, tokenizer = tiny_hf(), tiny_tokenizer()

    def drawn(seed: int) -> torch.Tensor:
        return own_text(model, tokenizer, n=3, n_tokens=8, seed=seed, fingerprint="x")

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = drawn(0)
    assert torch.equal(torch.rand(2), expected)
    assert first.shape == (3, 8)
    assert torch.equal(drawn(0), first)
    assert not torch.equal(drawn(1), first)


def test_own_text_comes_from_its_cache() -> None:
    cache = DictShelf()
    model, tokenizer = tiny_hf(), tiny_tokenizer()
    first = own_text(model, tokenizer, n=2, n_tokens=4, seed=0, fingerprint="x", cache=cache)
    (key,) = cache.pieces
    cache.pieces[key] = {"ids": first + 1}
    assert torch.equal(own_text(model, tokenizer, n=2, n_tokens=4, seed=0, fingerprint="x", cache=cache), first + 1)
    other = own_text(model, tokenizer, n=2, n_tokens=4, seed=0, fingerprint="y", cache=cache)
    assert torch.equal(other, first)
