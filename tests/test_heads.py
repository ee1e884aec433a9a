"""Heads before the answer: what they write, the exact effect of each, and the model without some of them."""

from typing import Any

import pytest
import torch
from planted_traces import SUPPRESSOR, planted_model, planted_trace, refusal_line

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.methods.activations.token_scores import Line, token_scores
from mechlens.methods.activations.trace_tokens import trace_batch, up_to_answers
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.directions.direction import Direction
from mechlens.methods.patching.heads import chosen_heads, head_scores, without_heads
from mechlens.models.bridge import loaded, whole


def test_a_planted_suppressor_ranks_first_and_its_ablation_restores_the_score() -> None:
    model, traces = planted_model(), [planted_trace(i, harmful=True) for i in range(4)]
    line, batch = refusal_line(model), trace_batch(model, traces)
    found = head_scores(model, batch, line)
    for scores in (found.written.mean(dim=0), found.alone.mean(dim=0)):
        assert chosen_heads(scores, 0.1, "negative", seed=0) == (SUPPRESSOR,)
        assert chosen_heads(scores, 0.1, "positive", seed=0) == ((0, 0),)
    clean = token_scores(model, batch, {"refusal": line})
    with without_heads(model, [SUPPRESSOR]):
        restored = token_scores(model, batch, {"refusal": line})
    intact = token_scores(planted_model(suppressor=False), batch, {"refusal": line})
    assert torch.allclose(restored.of("refusal").nan_to_num(), intact.of("refusal").nan_to_num(), atol=1e-5)
    assert bool((restored.at("refusal", 0) > 2 * clean.at("refusal", 0)).all())
    others = [(layer, head) for layer in (0, 1) for head in range(4) if (layer, head) not in (SUPPRESSOR, (0, 0))]
    with without_heads(model, others):
        same = token_scores(model, batch, {"refusal": line})
    assert torch.allclose(same.at("refusal", 0), clean.at("refusal", 0), atol=1e-5)
    # The last block's heads are followed by an MLP that does nothing: what they write is their whole effect.
    assert torch.allclose(found.written[:, 1], found.alone[:, 1], atol=1e-5)


def test_a_head_of_harmless_requests_suppresses_nothing() -> None:
    model = planted_model()
    found = head_scores(model, trace_batch(model, [planted_trace(0, harmful=False)]), refusal_line(model))
    assert float(found.written.abs().max()) < 1e-3


@pytest.mark.exact
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_each_head_alone_is_exact(tiny_model: Any, architecture: str) -> None:
    model = tiny_model(architecture)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    checkpoint = loaded(model).checkpoint
    batch = trace_batch(model, [planted_trace(0, harmful=True, words=6), planted_trace(1, harmful=False, words=9)])
    direction = Direction(vector, 3, "answer[-1]", "resid", "random", ("a", "b"), checkpoint, batch.template, ())
    line = Line(direction, 0.0, 1.0)
    found, cut = head_scores(model, batch, line), up_to_answers(batch, loaded(model).tokenizer)
    whole_pass = collect(model, cut, positions=["answer[-1]"], levels=[3]).at(3, "answer[-1]").double()
    for i in range(2):
        tokens = torch.tensor([cut.row(i)])
        for layer, head in ((0, 0), (1, 3), (2, 1)):
            seen: list[torch.Tensor] = []

            def off(value: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
                value[:, -1, head] = 0
                return value

            def keep(value: torch.Tensor, hook: Any, seen: list[torch.Tensor] = seen) -> None:
                seen.append(value[0, -1].double())

            hooks = [(f"blocks.{layer}.attn.hook_z", off), ("blocks.2.hook_resid_post", keep)]
            with torch.inference_mode():
                model.run_with_hooks(tokens, fwd_hooks=hooks, **whole(model))
            want = float((whole_pass[i] - seen[0]) @ direction.unit.double())
            assert float(found.alone[i, layer, head]) == pytest.approx(want, abs=1e-4)


def test_the_weights_come_back_and_answers_follow_them(tiny_model: Any) -> None:
    model = tiny_model()
    before = answer(model, ["hello there"], max_new_tokens=6).tokens
    with pytest.raises(RuntimeError), without_heads(model, [(layer, head) for layer in range(3) for head in range(4)]):
        raise RuntimeError
    assert answer(model, ["hello there"], max_new_tokens=6).tokens == before
    with pytest.raises(UserError, match="no head 7 in layer 0"), without_heads(model, [(0, 7)]):
        pass
    with pytest.raises(UserError, match="share of heads"):
        chosen_heads(torch.zeros(2, 2), 0.0, "random", seed=0)
    assert len(set(chosen_heads(torch.zeros(4, 4), 0.5, "random", seed=3))) == 8


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_renormalised_heads_write_as_far_as_all_did_whatever_stands_beside(tiny_model: Any, architecture: str) -> None:
    model = tiny_model(architecture)
    prompts, off = ["hello there", "tell me much more of it please"], [(0, 1)]

    def written(given: list[str]) -> Any:
        return collect(model, given, site="attn_out", levels=[0], positions=["last"]).values[:, 0, 0]

    before = written(prompts)
    with without_heads(model, off):
        shorter = written(prompts)
    with without_heads(model, off, renormalise=True):
        scaled, alone = written(prompts), written(prompts[:1])
        longer = answer(model, prompts, max_new_tokens=4).tokens
    assert torch.allclose(scaled.norm(dim=-1), before.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(
        scaled / scaled.norm(dim=-1, keepdim=True), shorter / shorter.norm(dim=-1, keepdim=True), atol=1e-5
    )
    assert torch.allclose(scaled[:1], alone, atol=1e-6)
    assert torch.equal(written(prompts), before)
    assert len(longer) == 2
    with without_heads(model, [], renormalise=True):
        assert torch.equal(written(prompts), before)
    with without_heads(model, off, renormalise=True):
        with without_heads(model, [(0, 2)], renormalise=True):
            assert not torch.allclose(written(prompts), scaled, atol=1e-4)
        assert torch.equal(written(prompts), scaled)
