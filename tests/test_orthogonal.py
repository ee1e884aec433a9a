"""Laws of weight orthogonalisation: on pre-norm models the same as ablation everywhere; nothing of it stays."""

import functools
from typing import Any

import pytest
import torch
from tiny import tiny_hf, tiny_tokenizer, words
from torch import Tensor, nn

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.directions.direction import Direction, project
from mechlens.methods.steering.interventions import ALL, EVERYWHERE, Ablate
from mechlens.methods.steering.steering import answer_under, logits_under, without_direction
from mechlens.models import orthogonal
from mechlens.models.bridge import _count_hooks, bridge, checkpoint_now
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.orthogonal import orthogonalised
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt

PRE_NORM = ("llama", "qwen2", "qwen3", "gpt2", "neox", "mistral", "phi", "phi3", "gptj", "stablelm", "opt")
POST_NORM = {"gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM", "olmo2": "Olmo2ForCausalLM"}


def rugged(architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model whose norms have gains and biases of their own, as trained ones do."""
    hf_model = tiny_hf(architecture)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in hf_model.named_parameters():
        if parameter.ndim == 1 and ("norm" in name or ".ln_" in name):
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return hf_model.to(dtype)


@functools.cache
def made(architecture: str) -> Any:
    hf_model = rugged(architecture)
    checkpoint = Checkpoint("tiny", "tests/tiny", fingerprint=weight_fingerprint(hf_model.state_dict()))
    return bridge(hf_model, tiny_tokenizer(), checkpoint)


def prompts(model: Any) -> TokenBatch:
    return tokenize([Prompt(id=f"p{i}", text=text) for i, text in enumerate(words(4))], template_of(model))


def direction(model: Any) -> Direction:
    vector = 3 * torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1))
    return Direction(
        vector=vector, level=1, position="inst", site="resid", method="random", contrast=("a", "b"),
        checkpoint=checkpoint_now(model), template=template_of(model).fingerprint, train_ids=(),
    )  # fmt: skip


def everywhere(model: Any) -> Ablate:
    return Ablate(direction(model), layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.original_model.state_dict().items()}


def parameters(model: Any) -> list[int]:
    return [id(parameter) for module in model.modules() for parameter in module._parameters.values()]


@pytest.mark.parametrize("architecture", PRE_NORM)
def test_orthogonal_weights_equal_ablation_everywhere(architecture: str) -> None:
    model = made(architecture)
    batch, v = prompts(model), direction(model)
    ablated = logits_under(model, batch, [everywhere(model)])
    said = answer_under(model, batch, [everywhere(model)], max_new_tokens=4)
    bare = logits_under(model, batch, [])
    with without_direction(model, v):
        edited = logits_under(model, batch, [])
        by_bridge = model(torch.tensor([batch.row(0)]))[0, -1]
        assert answer(model, batch, max_new_tokens=4).tokens == said.tokens
        acts = collect(model, batch)
    scale = float(bare.abs().max())
    assert float((edited - ablated).abs().max()) < 1e-4 * scale
    assert float((by_bridge - ablated[0]).abs().max()) < 1e-4 * scale
    assert float((edited - bare).abs().max()) > 1e-2 * scale  # and it matters
    share = project(acts.values, v).abs() / acts.values.norm(dim=-1)
    assert float(share.max()) < 1e-5
    before = collect(model, batch)
    assert float((project(before.values, v).abs() / before.values.norm(dim=-1)).min()) > 1e-6


@pytest.mark.parametrize("architecture", PRE_NORM)
def test_everything_comes_back_bit_for_bit(architecture: str) -> None:
    model = made(architecture)
    before, kept, hooks = tensors(model), parameters(model), _count_hooks(model)
    checkpoint = checkpoint_now(model)

    def interrupted() -> None:
        with orthogonalised(model, direction(model).vector):
            assert checkpoint_now(model).fingerprint != checkpoint.fingerprint
            assert any(not torch.equal(value, before[name]) for name, value in tensors(model).items())
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    after = tensors(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert parameters(model) == kept  # the very same tensors, so whatever was tied is tied again
    assert checkpoint_now(model) == checkpoint
    assert _count_hooks(model) == hooks


def test_a_tied_unembedding_stays_as_it_was() -> None:
    model = made("gpt2")
    hf_model = model.original_model
    table = hf_model.get_input_embeddings().weight
    assert hf_model.get_output_embeddings().weight is table  # tied
    original = table.clone()
    with orthogonalised(model, direction(model).vector):
        assert torch.equal(hf_model.get_output_embeddings().weight, original)
        edited = hf_model.get_input_embeddings().weight
        assert float(project(edited, direction(model)).abs().max()) < 1e-5
    assert hf_model.get_input_embeddings().weight is table


def test_biases_and_position_embeddings_are_edited_too() -> None:
    model = made("gpt2")
    v = direction(model)
    with orthogonalised(model, v.vector):
        block = model.blocks[0]
        parts = [block.attn.o.bias, block.mlp.out.bias, model.original_model.transformer.wpe.original_component.weight]
        after = [project(part, v).abs().max() for part in parts]
    assert max(after) < 1e-5
    assert min(project(part, v).abs().max() for part in (block.attn.o.bias, block.mlp.out.bias)) > 1e-3


@pytest.mark.parametrize("architecture", POST_NORM)
def test_post_norm_architectures_are_refused_by_name(architecture: str) -> None:
    model = made(architecture)
    with (
        pytest.raises(UserError, match=f"{POST_NORM[architecture]} normalises after attention or MLP"),
        orthogonalised(model, direction(model).vector),
    ):
        pass


def test_other_writers_are_refused_by_name() -> None:
    with (
        pytest.raises(UserError, match="BloomForCausalLM normalises its embedding"),
        orthogonalised(made("bloom"), direction(made("bloom")).vector),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"MixtralForCausalLM has at blocks.0.mlp.out no plain matrix"),
        orthogonalised(made("mixtral"), direction(made("mixtral")).vector),
    ):
        pass


@pytest.mark.parametrize("architecture", ["gemma2", "olmo2"])
def test_what_is_left_of_the_direction_is_measured(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(architecture)
    monkeypatch.setattr(orthogonal, "_require_pre_norm", lambda model: None)  # as an unknown architecture would pass
    before, kept = tensors(model), parameters(model)
    with (
        pytest.raises(UserError, match="still writes along the direction"),
        orthogonalised(model, direction(model).vector),
    ):
        pass
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())
    assert parameters(model) == kept


def test_half_precision() -> None:
    model = bridge(rugged("llama", torch.bfloat16), tiny_tokenizer(), Checkpoint("tiny", "tests/tiny"))
    with orthogonalised(model, direction(model).vector):
        weight = model.blocks[0].attn.o.weight
        assert weight.dtype == torch.bfloat16
        assert isinstance(weight, nn.Parameter)


def test_what_can_not_be_taken_out_is_said() -> None:
    model = made("llama")
    for vector in (torch.zeros(32), torch.ones(31), torch.full((32,), float("nan"))):
        with pytest.raises(UserError, match="can't be taken out of the weights"), orthogonalised(model, vector):
            pass
    other = direction(made("qwen2"))
    with pytest.raises(UserError, match="was made with other weights of tiny"), without_direction(model, other):
        pass
    with without_direction(model, direction(made("qwen2")), force=True):
        pass
    folded = bridge(rugged("llama"), tiny_tokenizer(), Checkpoint("tiny", "tests/tiny"))
    folded.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(UserError, match="with raw weights"), orthogonalised(folded, torch.ones(32)):
        pass
