"""What is special about some architectures: states instead of keys and values, scaled logits, blocks of other parts."""

import copy
import functools
import re
from typing import Any

import pytest
import torch
from tiny import tiny_hf, tiny_tokenizer, words

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.perplexity import instruction_surprise, text_loss
from mechlens.methods.directions.direction import Direction
from mechlens.methods.patching.metrics import KLDivergence
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.methods.steering.interventions import ALL, EVERYWHERE, Ablate, Add
from mechlens.methods.steering.steering import answer_under, applied
from mechlens.models.bridge import bridge, loaded, n_layers, unembed
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.engine.forward import fits_fast_path
from mechlens.models.engine.growing import can_grow
from mechlens.models.engine.probes import loses
from mechlens.models.engine.reference import UNCACHED
from mechlens.models.sites import SITES
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt, PromptPair
from mechlens.studies.select.config import SelectionPlan
from mechlens.studies.select.study import select_direction

NEW = 4
STATES = ("qwen3_5", "qwen3_next", "qwen3_next_linear", "lfm2", "jamba", "bamba", "falcon_h1", "nemotron_h", "mamba",
          "mamba2", "recurrent_gemma", "rwkv")  # fmt: skip
SCALED = ("granite", "granitemoe", "cohere", "cohere2", "falcon_h1", "gemma2", "rwkv", "llama")
WHOLLY_SEEN = ("qwen3_5", "qwen3_next_linear", "lfm2", "jamba", "bamba", "nemotron_h", "mamba2", "granite", "llama")


def prompts(n: int = 2) -> list[Prompt]:
    return [Prompt(id=f"p{i}", text=text, label="harmful") for i, text in enumerate(words(n))]


def bridged(hf_model: Any) -> Any:
    checkpoint = Checkpoint("tiny", "tests/tiny", fingerprint=weight_fingerprint(hf_model.state_dict()))
    return bridge(hf_model, tiny_tokenizer(), checkpoint)


def capped(architecture: str) -> Any:
    hf_model = tiny_hf(architecture)
    if hasattr(hf_model.config, "final_logit_softcapping"):
        hf_model.config.final_logit_softcapping = 0.7  # far below the logits, so that the cap shows
    return hf_model


@functools.cache
def pair(architecture: str) -> tuple[Any, Any]:
    """A bridge and a plain copy of the same model, shared by tests that change neither."""
    return bridged(capped(architecture)), capped(architecture)


@torch.inference_mode()
def recomputed(hf_model: Any, rows: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    """The likeliest tokens by running everything again for each: no cache."""
    found = []
    for row in rows:
        tokens = list(row)
        for _ in range(NEW):
            tokens.append(int(hf_model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        answered = tokens[len(row) :]
        found.append(tuple(answered[: answered.index(4)] if 4 in answered else answered))
    return tuple(found)


def rows(model: Any, n: int = 2) -> list[list[int]]:
    batch = tokenize(prompts(n), template_of(model))
    return [batch.row(i) for i in range(len(batch.prompts))]


def direction(model: Any, seed: int = 0) -> Direction:
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(seed))
    return Direction(
        vector=vector, level=1, position="inst", site="resid", method="random",
        contrast=("a", "b"), train_ids=(), checkpoint=loaded(model).checkpoint, template=template_of(model).fingerprint,
    )  # fmt: skip


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", STATES)
def test_answers_equal_whole_passes(architecture: str) -> None:
    model, plain = pair(architecture)
    assert answer(model, prompts(), max_new_tokens=NEW).tokens == recomputed(plain, rows(model))


@pytest.mark.parametrize("architecture", ["lfm2", "llama", "mamba", "qwen3_5"])
def test_answers_under_a_users_hook_equal_whole_passes(architecture: str) -> None:
    model, plain = bridged(tiny_hf(architecture)), tiny_hf(architecture)
    shift = 2 * direction(model).vector
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: value + shift)]):
        got = answer(model, prompts(), max_new_tokens=NEW)
    handle = _blocks(plain)[1].register_forward_pre_hook(
        lambda block, args, kwargs: ((args[0] + shift, *args[1:]), kwargs), with_kwargs=True
    )
    expected = recomputed(plain, rows(model))
    handle.remove()
    assert got.tokens == expected != answer(model, prompts(), max_new_tokens=NEW).tokens
    assert got.engine != "fast"


def _blocks(hf_model: Any) -> Any:
    return getattr(hf_model, "backbone", getattr(hf_model, "model", None)).layers


@pytest.mark.parametrize("architecture", ["lfm2", "mamba2", "qwen3_5"])
def test_steered_answers_equal_whole_passes(architecture: str) -> None:
    model, plain = pair(architecture)
    add = Add(direction(model), strength=2.0, unit="raw", layers=(1,), positions=ALL, phase="both")
    shift = 2 * direction(model).vector
    handle = _blocks(plain)[1].register_forward_pre_hook(
        lambda block, args, kwargs: ((args[0] + shift, *args[1:]), kwargs), with_kwargs=True
    )
    expected = recomputed(plain, rows(model))
    handle.remove()
    assert answer_under(model, prompts(), [add], max_new_tokens=NEW).tokens == expected


def test_a_cache_that_loses_something_is_found_out_at_load() -> None:
    found = loaded(pair("qwen3_5")[0])
    assert found.parity_gap < 1e-5  # every single pass is right
    assert found.decode_gap > 0.1
    got = answer(pair("qwen3_5")[0], prompts(), max_new_tokens=1)
    assert got.engine == "native"
    assert loaded(pair("mamba")[0]).decode_gap < 1e-5
    assert answer(pair("mamba")[0], prompts(), max_new_tokens=1).engine == "plain"
    assert answer(pair("qwen3_next_linear")[0], prompts(), max_new_tokens=1).engine == UNCACHED


# --- logits from the last residual -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SCALED)
def test_unembed_equals_the_models_own_logits(architecture: str) -> None:
    model, plain = pair(architecture)
    assert loaded(model).head_gap < 1e-5
    batch = tokenize(prompts(), template_of(model))
    last = n_layers(model)
    got = unembed(model, collect(model, batch, positions=["last"], levels=[last]).at(last, batch.positions[-1]))
    with torch.inference_mode():
        logits = torch.stack([plain(torch.tensor([ids])).logits[0, -1] for ids in rows(model)])
    assert float((got - logits).abs().max()) < 1e-5 * float(logits.abs().max())


@pytest.mark.parametrize("architecture", SCALED)
def test_losses_equal_plain_hugging_face(architecture: str) -> None:
    model, plain = pair(architecture)
    ids = torch.tensor([tiny_tokenizer()("the thing is that")["input_ids"]])
    with torch.inference_mode():
        right = float(plain(ids, labels=ids).loss)
    assert float(text_loss(model, ["the thing is that"])[0]) == pytest.approx(right, rel=1e-5)
    batch = tokenize(prompts(1), template_of(model))
    start, end = (batch.instruction[0] - batch.offset(0)).tolist()
    row = torch.tensor([batch.row(0)])
    with torch.inference_mode():
        told = plain(row).logits[0].double().log_softmax(-1)
    surprise = -told[range(start - 1, end), row[0, start : end + 1]].mean()
    assert float(instruction_surprise(model, batch)[0]) == pytest.approx(float(surprise), rel=1e-5)


def test_a_head_that_can_not_be_run_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_model = tiny_hf()
    forward = type(hf_model).forward

    def mixing(self: Any, *args: Any, **kwargs: Any) -> Any:  # logits of a token depend on the token before it
        out = forward(self, *args, **kwargs)
        out.logits = out.logits + out.logits.roll(1, dims=1)
        return out

    monkeypatch.setattr(type(hf_model), "forward", mixing)
    model = bridged(hf_model)
    assert loaded(model).head_gap > 0.1
    with pytest.raises(UserError, match=r"logits of LlamaForCausalLM can't be worked out from its last residual"):
        text_loss(model, ["the thing"])


def test_unembedding_calls_no_hook_in_a_block_and_leaves_the_blocks_in_place() -> None:
    model, calls = bridged(tiny_hf()), []
    blocks = list(model.blocks)
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda value, hook: calls.append(hook.name))]):
        unembed(model, torch.randn(3, 32))
    assert not calls
    assert all(a is b for a, b in zip(blocks, model.blocks, strict=True))


# --- what blocks add -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", WHOLLY_SEEN)
def test_ablating_everywhere_leaves_nothing_at_any_level(architecture: str) -> None:
    model, _ = pair(architecture)
    one = direction(model)
    unit = one.vector / one.vector.norm()
    everywhere = Ablate(one, layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)
    levels = tuple(range(1, n_layers(model) + 1))
    with applied(model, [everywhere]):
        values = collect(model, prompts(), levels=levels).values
    whole = collect(model, prompts(), levels=levels).values
    assert float((values @ unit).abs().max()) < 1e-5 * float(values.norm(dim=-1).max())
    assert float((whole @ unit).abs().max()) > 1e-3 * float(whole.norm(dim=-1).max())


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [
        ("falcon_h1", r"besides attention and MLP .*intervene at resid_pre"),
        ("gemma4", r"besides attention and MLP .*intervene at resid_pre"),
        ("recurrent_gemma", r"no site attn_out in block 0; intervene at resid_pre"),
        ("rwkv", r"no site attn_out in block 0; intervene at resid_pre"),
    ],
)
def test_blocks_that_add_what_no_site_shows_are_refused(
    architecture: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair(architecture)
    everywhere = Ablate(direction(model), layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)
    with pytest.raises(UserError, match=sentence):
        answer_under(model, prompts(), [everywhere], max_new_tokens=1)
    # A study that will need it says so before it runs anything.
    monkeypatch.setattr("mechlens.studies.select.study.answer", lambda *args, **kwargs: pytest.fail("answered first"))
    plan = SelectionPlan()
    with pytest.raises(UserError, match=sentence):
        select_direction(model, prompts(), prompts(), plan)
    # Where a block's input is enough, such a model is steered as any other.
    add = Add(direction(model), strength=1.0, unit="raw", layers=(1,), positions=ALL, phase="both")
    assert len(answer_under(model, prompts(), [add], max_new_tokens=1).tokens) == 2


def test_a_block_that_is_all_mixer_has_no_mlp_to_change_alone() -> None:
    model, _ = pair("mamba2")
    alone = Ablate(direction(model), layers=ALL, positions=ALL, phase="both", sites=("mlp_out",))
    with pytest.raises(UserError, match="no site mlp_out in block 0"):
        answer_under(model, prompts(), [alone], max_new_tokens=1)


@pytest.mark.parametrize("architecture", ["codegen", "granitemoehybrid", "helium", "minimax"])
def test_what_transformerlens_can_not_wrap_is_said(architecture: str) -> None:
    with pytest.raises(UserError, match=r"^TransformerLens can't wrap \w+ForCausalLM \(tiny\): [^\n]+$"):
        bridged(tiny_hf(architecture))


# --- patches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["q", "z"])
def test_heads_that_transformerlens_lays_out_in_its_own_way_are_not_patched(site: str) -> None:
    model, _ = pair("deepseek_v3")
    pairs = [PromptPair(*(Prompt(id=text, text=text) for text in ("the thing", "the king!")))]
    with pytest.raises(UserError, match=f"lays out '{site}' of this model in a way of its own, .*choose another site"):
        patch_sweep(model, pairs, KLDivergence(), PatchPlan(site, positions=("last",)))
    assert not can_grow(model, site)
    assert can_grow(model, "resid_pre")


@pytest.mark.filterwarnings("ignore:.*takes the plain path")
@pytest.mark.parametrize("architecture", ["lfm2", "jamba", "mamba2"])
def test_a_site_that_can_not_be_patched_names_what_can(architecture: str) -> None:
    """Every site and block that the sentence offers is patched, and no other site is in every block."""
    model, _ = pair(architecture)
    pairs = [PromptPair(*(Prompt(id=text, text=text) for text in ("the thing", "the king!")))]

    def patched(site: str, layers: tuple[int, ...] | None = None) -> bool:
        try:
            patch_sweep(model, pairs, KLDivergence(), PatchPlan(site, layers=layers, positions=("last",)))
        except UserError:
            return False
        return True

    with pytest.raises(UserError, match="no site 'attn_out' in block 0; choose") as said:
        patch_sweep(model, pairs, KLDivergence(), PatchPlan("attn_out", positions=("last",)))
    offered = re.search(r"every block has \((.*)\)$", str(said.value))
    blocks = re.search(r"choose block (.*?), or", str(said.value))
    assert offered is not None
    assert [site for site in SITES if patched(site)] == offered[1].split(", ")
    there = [int(block) for block in blocks[1].split(" or ")] if blocks else []
    assert [layer for layer in range(n_layers(model)) if patched("attn_out", (layer,))] == there


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_in_a_real_model_is_not_taken_for_a_loss(dtype: str, recwarn: pytest.WarningsRecorder) -> None:
    from mechlens.models.load import load

    model = load("smollm2", dtype=dtype)
    assert fits_fast_path(model)
    assert loaded(model).head_gap < 1e-3
    assert not [warning for warning in recwarn if "other logits inside TransformerLens" in str(warning.message)]


def test_what_counts_as_a_loss() -> None:
    assert loses(float("nan"), torch.float32)
    assert loses(float("inf"), torch.bfloat16)
    assert loses(0.5, torch.bfloat16)
    assert not loses(0.11, torch.bfloat16)
    assert loses(0.01, torch.float32)
    assert not loses(1e-5, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_loss_is_told_from_rounding(dtype: torch.dtype) -> None:
    """One layer with a state among five without, whose loss moves logits by less than half precision may round."""
    from tiny import HEAD, LINEAR
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    layers = ["linear_attention", *["full_attention"] * 5]
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(
        Qwen3_5TextConfig(layer_types=layers, **LINEAR, **{**HEAD, "num_hidden_layers": 6})
    )
    hf_model = hf_model.to(dtype).eval()
    plain = copy.deepcopy(hf_model)
    model = bridged(hf_model)
    assert 0.002 < loaded(model).decode_gap < 0.2
    got = answer(model, prompts(4), max_new_tokens=NEW)
    assert got.engine == "native"
    for said, ids in zip(got.tokens, rows(model, 4), strict=True):
        start = torch.tensor([ids])
        with torch.inference_mode():
            out = plain.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=NEW, do_sample=False)
        assert said == tuple(out[0, len(ids) :].tolist())[: len(said)]


def test_rotary_tables_that_change_with_length_are_not_shared() -> None:
    from tiny import SMALL
    from transformers import AutoModelForCausalLM, Phi3Config

    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [1.0, 4.0, 8.0, 16.0], "original_max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Phi3Config(**SMALL, original_max_position_embeddings=64, rope_parameters=rope)
    model = bridged(AutoModelForCausalLM.from_config(config).eval())
    short, long = prompts(2)[0], Prompt("long", "the thing is " * 20)
    with pytest.warns(UserWarning, match="rotary frequencies depend on the longest prompt"):
        both = collect(model, [short, long])
    assert torch.equal(both.values[0], collect(model, [short]).values[0])
    assert torch.equal(both.values[1], collect(model, [long]).values[0])
    assert both.engine == "plain"
