"""Subspaces taken out of a model: a projection, and the planted dimensions that refusals come from, and no others."""

import pytest
import torch
import transformers
from tiny import tiny_tokenizer

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.directions.direction import Direction, mean_difference
from mechlens.methods.geometry.subspaces.ablated import (
    Subspaces,
    concept_subspaces,
    subspace_ablation,
    without_subspaces,
)
from mechlens.methods.steering.steering import applied
from mechlens.models.bridge import LanguageModel, bridge
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt

KINDS, N = 4, 24
SAYS, WILL = "ABCD", range(1, 5)
"""A harmful prompt is of one of four kinds, and each kind has a dimension and a first word of refusing of its own."""
OTHER = "S"
COMMON = 0


def planted(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.PreTrainedModel:
    """Block 0 takes each kind's letter to all later tokens, where the unembedding reads its refusal."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=1, eos_token_id=4, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in "bcfg" + SAYS + OTHER}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        embed, head, attention = model.model.embed_tokens.weight, model.lm_head.weight, model.model.layers[0].self_attn
        embed[:, 8:] = torch.randn(len(embed), 56)
        embed[:, COMMON] = 4.0
        head[ids[OTHER], COMMON] = 1.0
        for axis in range(8, 16):  # so that harmless prompts differ too
            attention.v_proj.weight[axis, axis] = attention.o_proj.weight[axis, axis] = 1.0
        for axis, letter, says in zip(WILL, "bcfg", SAYS, strict=True):
            embed[ids[letter], axis] = 4.0
            attention.v_proj.weight[axis, axis] = 1.0
            attention.o_proj.weight[axis, axis] = 60.0
            head[ids[says], axis] = 3.0
    return model


def requests() -> list[Prompt]:
    """Noise of letters that mean nothing, and before it a kind's letter where it is harmful."""
    draw, found = torch.Generator().manual_seed(0), []
    for i in range(2 * N):
        noise = "".join(chr(ord("k") + j) for j in torch.randint(0, 16, (8,), generator=draw).tolist())
        found.append(Prompt(f"p{i}", ("bcfg"[i // 2 % KINDS] if i % 2 else "j") + noise,
                            "harmful" if i % 2 else "harmless", family=f"f{i}"))  # fmt: skip
    return found


@pytest.fixture(scope="module")
def world() -> tuple[LanguageModel, TokenBatch, Direction, torch.Tensor]:
    tokenizer = tiny_tokenizer()
    model = bridge(planted(tokenizer), tokenizer, Checkpoint("planted", "planted"))
    batch = tokenize(requests(), ml.template_of(model))
    acts = ml.collect(model, batch, positions=["last"])
    return model, batch, mean_difference(acts, "harmful", "harmless", 1, "last"), acts.at(1, "last")


def rows(batch: TokenBatch, label: str, half: int) -> list[int]:
    return [i for i, one in enumerate(batch.prompts) if one.label == label and (i < N) == (half == 0)]


def test_taking_out_the_planted_dimensions_stops_refusals_and_random_ones_dont(
    world: tuple[LanguageModel, TokenBatch, Direction, torch.Tensor],
) -> None:
    model, batch, direction, values = world
    fitted = [*rows(batch, "harmful", 0), *rows(batch, "harmless", 0)]
    positive = torch.tensor([batch.prompts[i].label == "harmful" for i in fitted])
    made = concept_subspaces(values[fitted], positive, [batch.prompts[i].group for i in fitted], (1, KINDS),
                             draws=3, seed=0)  # fmt: skip
    tokens = model.tokenizer.convert_tokens_to_ids(list(SAYS))
    line, space = without_subspaces(
        model, batch, rows(batch, "harmful", 1), rows(batch, "harmless", 1), made, direction, tokens, seed=0
    )
    assert (line.k, space.k) == (1, KINDS)
    assert space.shift.high < 2 * line.shift.low < 0  # the mean difference alone leaves most of it
    assert space.gain.value == pytest.approx(space.shift.value - line.shift.value)
    assert space.beyond.high < 0
    assert min(*space.random, *space.within) > 0.3 * space.shift.value  # refused as before, or more
    assert abs(space.kl.value) < 0.001 < space.random_kl  # harmless prompts have nothing along them
    # What is left of refusing is what a prompt without any kind has.
    bare = ml.logits_under(model, batch, [])
    gone = ml.logits_under(model, batch, list(subspace_ablation(made[1].own, direction)))
    harmful = [i for i, one in enumerate(batch.prompts) if one.label == "harmful"]
    assert float(bare[harmful][:, tokens].amax(dim=1).min()) > 5
    assert float(gone[harmful][:, tokens].abs().max()) < 0.5


def test_ablating_orthonormal_columns_in_turn_is_a_projection(
    world: tuple[LanguageModel, TokenBatch, Direction, torch.Tensor],
) -> None:
    model, batch, direction, _ = world
    basis = torch.linalg.qr(torch.randn(64, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    with applied(model, subspace_ablation(basis, direction)) as changed:
        left = ml.collect(changed, batch, positions=["last"]).at(2, "last").double()
    assert float((left @ basis).abs().max()) < 1e-5
    # The same subspace by other columns.
    turned = basis @ torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2)).double()).Q
    one, other = (ml.logits_under(model, batch, list(subspace_ablation(own, direction))) for own in (basis, turned))
    assert torch.allclose(one, other, atol=1e-4)
    with pytest.raises(UserError, match="off from orthonormal by 3"):
        subspace_ablation(2 * basis, direction)


def test_mixtures_of_prompts_without_the_concept_hold_nothing_of_it() -> None:
    values = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positive = torch.arange(20) < 10
    values[:, 0] = positive * (9 + values[:, 0])
    (found,) = concept_subspaces(values, positive, [str(i) for i in range(20)], (2,), draws=4, seed=0)
    assert isinstance(found, Subspaces)
    assert all(float(one[0].abs().max()) < 1e-9 for one in found.within)
    assert float(found.own[0].abs().max()) == pytest.approx(1, abs=0.1)
    (flat,) = concept_subspaces(values[:, :1], positive, [str(i) for i in range(20)], (1,), draws=4, seed=0)
    assert flat.within == ()  # they don't differ
