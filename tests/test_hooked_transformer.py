"""Conformance: a real HookedTransformer, the class that TransformerLens 4 removed, works in mechlens.

`scripts/conformance` runs this file beside TransformerLens 3.9.0; under 4.x it is skipped.
"""

import os
from typing import Any

import pytest
import torch
import transformer_lens
from tiny import VOCAB, tiny_hf, tiny_tokenizer, words
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, from_cache, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.patching.metrics import LogitDifference
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import ATTRIBUTION, GROWING, patch_sweep
from mechlens.models.bridge import bridge, loaded, unembed
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.sites import level_hook, site_hook
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt, PromptPair

try:
    transformer_lens.HookedTransformer  # noqa: B018
except ImportError:
    reason = "this TransformerLens has no HookedTransformer; scripts/conformance runs these tests beside 3.9.0"
    assert not os.environ.get("MECHLENS_CONFORMANCE"), reason
    pytest.skip(reason, allow_module_level=True)

EVERY = ("inst", "post[*]")
KINDS = {
    "gpt2-like": {"normalization_type": "LN", "act_fn": "gelu"},
    "llama-like": {
        "normalization_type": "RMS",
        "act_fn": "silu",
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 8,
        "n_key_value_heads": 2,
        "final_rms": True,
    },
    "attention-only": {"normalization_type": None, "attn_only": True},
    "soft-capped": {"normalization_type": "LN", "act_fn": "relu", "output_logits_soft_cap": 0.5},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TransformerLens reloads its tokenizer by path, so it lies in a folder."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return hooked(tokenizer, **KINDS[request.param])


def hooked(tokenizer: Any, **options: Any) -> Any:
    """A random three-layer HookedTransformer; weights are scaled up so that layers really differ."""
    config = transformer_lens.HookedTransformerConfig(
        n_layers=3, d_model=32, n_ctx=128, d_head=8, n_heads=4, d_mlp=64, d_vocab=VOCAB, seed=0, device="cpu",
        initializer_range=0.3, **options,
    )  # fmt: skip
    return transformer_lens.HookedTransformer(config, tokenizer=tokenizer).eval()


def prompts(n: int = 6) -> list[Prompt]:
    return [Prompt(id=f"p{i}", text=text, label="ab"[i % 2]) for i, text in enumerate(words(n))]


def error(values: Tensor, truth: Tensor) -> float:
    return float(((values - truth).norm(dim=-1) / truth.norm(dim=-1)).max())


@torch.inference_mode()
def test_collect_equals_run_with_cache_one_prompt_at_a_time(model: Any) -> None:
    batch = tokenize(prompts(), template_of(model), padding_side="left")
    got = collect(model, batch, positions=EVERY)
    assert got.engine == "plain"
    assert got.levels == (0, 1, 2, 3)
    assert got.labels == ("a", "b") * 3
    for i in range(6):
        _, cache = model.run_with_cache(torch.tensor([batch.row(i)]), prepend_bos=False)
        for level in got.levels:
            residual = cache[level_hook(model, level)][0]
            for name in got.positions:
                truth = residual[int(batch.at(name)[i]) - batch.offset(i)]
                assert error(got.at(level, name)[i], truth) < 1e-5


@torch.inference_mode()
def test_answers_equal_the_likeliest_token_one_step_at_a_time(model: Any) -> None:
    batch = tokenize(prompts(), template_of(model))
    got = answer(model, batch, max_new_tokens=6)
    assert got.engine == "plain"
    assert len(set(got.tokens)) > 3
    for i in range(6):
        tokens = batch.row(i)
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens]), prepend_bos=False)[0, -1].argmax()))
        new = tokens[-6:]
        assert list(got.tokens[i]) == (new[: new.index(4)] if 4 in new else new)


@torch.inference_mode()
def test_unembed_equals_its_own_logits(model: Any) -> None:
    batch = tokenize(prompts(2), template_of(model))
    got = collect(model, batch, positions=["last"], levels=[3])
    logits = torch.stack([model(torch.tensor([batch.row(i)]), prepend_bos=False)[0, -1] for i in range(2)])
    assert float((unembed(model, got.values[:, 0, 0]) - logits).abs().max()) < 1e-5


@torch.inference_mode()
def test_patching_equals_one_forward_per_site_with_a_hook(model: Any) -> None:
    pairs = [PromptPair(Prompt("clean", "bake a big cake!"), Prompt("corrupt", "fake a red case?"))]
    metric, positions = LogitDifference(40, 50), ("instruction[2]", "last")
    clean, corrupt = (tokenize([getattr(pairs[0], side)], template_of(model)) for side in ("clean", "corrupt"))
    for site in ("resid_pre", "resid_mid", "resid_post", "v", "z", "pattern"):
        plan = PatchPlan(site, layers=(0, 2), positions=positions)
        if site == "resid_mid" and model.cfg.attn_only:
            with pytest.raises(UserError, match="no site 'resid_mid'"):
                patch_sweep(model, pairs, metric, plan)
            continue
        got = patch_sweep(model, pairs, metric, plan)
        assert got.engine == "plain"
        _, cache = model.run_with_cache(clean.tokens, prepend_bos=False)
        for a, layer in enumerate(got.layers):
            for b, name in enumerate(positions):
                for c, head in enumerate(got.heads or (None,)):
                    place = int(clean.at(name)[0])
                    index = (0, place) if head is None else (0, head, place) if site == "pattern" else (0, place, head)

                    def put(value: Tensor, hook: Any, index: Any = index) -> Tensor:
                        value[index] = cache[hook.name][index]  # noqa: B023
                        return value

                    logits = model.run_with_hooks(
                        corrupt.tokens, prepend_bos=False, fwd_hooks=[(site_hook(site, layer), put)]
                    )
                    assert abs(float(metric(logits[0, -1:], logits[0, -1])[0] - got.values[0, a, b, c])) < 1e-5
        assert float(got.effect().abs().max()) > 5e-5
    with pytest.raises(UserError, match="growing-batch engine"):
        patch_sweep(model, pairs, metric, plan, engine=GROWING)


def test_attribution_on_it_has_the_last_residuals_gradient(model: Any) -> None:
    """Three names for one edit have one first-order effect."""
    pairs = [PromptPair(Prompt("clean", "bake a big cake!"), Prompt("corrupt", "fake a red case?"))]
    after, before = (
        patch_sweep(model, pairs, LogitDifference(40, 50), PatchPlan(site, layers, ("inst",)), engine=ATTRIBUTION)
        for site, layers in (("resid_post", (0, 1)), ("resid_pre", (1, 2)))
    )
    assert float(after.effect().abs().max()) > 1e-3
    assert float((after.values - before.values).abs().max()) < 1e-5


def test_what_is_known_about_it(tokenizer: Any) -> None:
    model = hooked(tokenizer, **KINDS["gpt2-like"])
    checkpoint = collect(model, prompts(1)).checkpoint
    assert checkpoint.regime == "raw"
    assert checkpoint.fingerprint == loaded(model).checkpoint.fingerprint
    assert collect(hooked(tokenizer, **KINDS["gpt2-like"]), prompts(1)).checkpoint == checkpoint
    model.blocks[0].mlp.W_out.data *= 2
    assert collect(model, prompts(1)).checkpoint.fingerprint != checkpoint.fingerprint
    folded = hooked(tokenizer, normalization_type="LNPre", act_fn="gelu")
    assert collect(folded, prompts(1)).checkpoint.regime == "processed"


def test_hooks_caches_and_refusals(tokenizer: Any) -> None:
    model = hooked(tokenizer, **KINDS["gpt2-like"])
    clean = collect(model, prompts())
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda residual, hook: residual + 1)]):
        pushed = collect(model, prompts())
    assert torch.allclose(pushed.values[:, 1], clean.values[:, 1] + 1, atol=1e-5)
    assert torch.equal(collect(model, prompts()).values, clean.values)
    batch = tokenize(prompts(), template_of(model))
    _, cache = model.run_with_cache(batch.tokens, prepend_bos=False)
    assert error(from_cache(cache, batch, model, ["inst", "last"]).values, clean.values) < 1e-5
    with pytest.raises(UserError, match="the model takes 128"):
        collect(model, [Prompt("long", "word" * 100)])
    with pytest.raises(UserError, match="no tokenizer"):
        template_of(hooked(None, **KINDS["gpt2-like"]))


def test_a_bridge_of_this_version_works_too() -> None:
    model, plain = bridge(tiny_hf(), tiny_tokenizer(), Checkpoint("tiny", "tests/tiny")), tiny_hf()
    assert loaded(model).parity_gap < 1e-5
    batch = tokenize(prompts(3), template_of(model))
    got = collect(model, batch, levels=[2], positions=["last"])
    assert got.engine == "fast"
    with torch.inference_mode():
        for i in range(3):
            hidden = plain(torch.tensor([batch.row(i)]), output_hidden_states=True).hidden_states[2][0, -1]
            assert error(got.values[i, 0], hidden.unsqueeze(0)) < 1e-5
            assert answer(model, batch, max_new_tokens=1).tokens[i][0] == int(
                plain(torch.tensor([batch.row(i)])).logits[0, -1].argmax()
            )
