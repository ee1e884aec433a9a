"""Patching finds what was planted: hand-built circuits, a rewritten head, and models that are linear."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tiny import GPT, VOCAB, tiny_hf, tiny_tokenizer
from torch import Tensor

from mechlens.methods.patching.metrics import KLDivergence, LogitDifference, LogProbability, OwnMetric
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.result import PatchResult
from mechlens.methods.patching.sweep import ATTRIBUTION, GROWING, PLAIN, patch_sweep
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.sites import SITES
from mechlens.prompts.prompt import Prompt, PromptPair
from mechlens.prompts.templates.template import ChatTemplate

SHORT = "{{ messages[-1]['content'] }}<|im_end|>{% if add_generation_prompt %}<|im_start|>{% endif %}"
INFO, MIDDLE = 2, 4
"""In the words `..A.!` and `..B.!` the answer stands at token 2; token 4 is `inst`, token 6 the last."""
LAST = 6
PAIRS = [PromptPair(Prompt("A", "xyAz!"), Prompt("B", "xyBz!"))]


def bridged(hf_model: Any, name: str = "planted") -> Any:
    hf_model.config.architectures = [type(hf_model).__name__]
    checkpoint = Checkpoint(name, f"tests/{name}", fingerprint=weight_fingerprint(hf_model.state_dict()))
    return bridge(hf_model.eval(), tiny_tokenizer(), checkpoint)


def short() -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer(SHORT))


def token(text: str) -> int:
    return tiny_tokenizer().convert_tokens_to_ids(text)


def sweep(model: Any, site: str, **options: Any) -> PatchResult:
    metric = options.pop("metric", LogitDifference(token("A"), token("B")))
    engine, source = options.pop("engine", "auto"), options.pop("source_model", None)
    pairs = options.pop("pairs", PAIRS)
    plan = PatchPlan(site, **{"positions": ("all",), **options})
    return patch_sweep(model, pairs, metric, plan, template=short(), engine=engine, source_model=source)


# --- a copy circuit of two heads -------------------------------------------------------------------------------------

HEAD = 8
"""Width of a head; the residual stream of 64 has 20 features of two numbers each, opposite, so that their mean is 0."""
A0, B0, ASKED, ASKING_1, ASKING_2, A1, B1, A2, B2 = range(9)
"""Token A or B; "copy me"; the asker of the first head and of the second; what each of them has written."""
NOISE = slice(20, 60)
"""Numbers of the stream that other heads and the MLPs play with."""


def feature(k: int) -> Tensor:
    vector = torch.zeros(64)
    vector[2 * k], vector[2 * k + 1] = 0.5**0.5, -(0.5**0.5)
    return vector


@functools.cache
def circuit(planted: bool) -> Any:
    """GPT-2 with two blocks of eight heads: head (0, 1) copies A or B to `inst`, head (1, 2) from there to the last.

    Every other head and both MLPs write noise about noise, which neither the circuit nor the answer reads.
    Without planting, the two heads write nothing.
    """
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**GPT, "n_embd": 64, "n_head": 8, "n_layer": 2}, tie_word_embeddings=False)
    hf_model = transformers.AutoModelForCausalLM.from_config(config)
    body = hf_model.transformer
    with torch.no_grad():
        body.wpe.weight.zero_()
        table = torch.zeros(VOCAB, 64)
        table[:, NOISE] = torch.randn(VOCAB, 40)
        table[:, NOISE] -= table[:, NOISE].mean(1, keepdim=True)
        table[[token("A"), token("B")]] = 0.0  # alike but for the one feature
        for text, features in {
            "A": (A0, ASKED), "B": (B0, ASKED), "!": (ASKING_1,), "<|im_start|>": (ASKING_2,),
        }.items():  # fmt: skip
            table[token(text)] += 4 * sum(feature(k) for k in features)
        body.wte.weight.copy_(table)
        for block in body.h:
            block.attn.c_attn.weight.zero_()
            block.attn.c_proj.weight.zero_()
            block.attn.c_attn.weight[NOISE] = torch.randn(40, 192)
            block.attn.c_proj.weight[:, NOISE] = 0.05 * _centred(torch.randn(64, 40))
            block.mlp.c_fc.weight.zero_()
            block.mlp.c_fc.weight[NOISE] = torch.randn(40, 256)
            block.mlp.c_proj.weight.zero_()
            block.mlp.c_proj.weight[:, NOISE] = 0.02 * _centred(torch.randn(256, 40))
        plant(body.h[0].attn, 1, (ASKING_1, ASKED), {A0: A1, B0: B1}, planted)
        plant(body.h[1].attn, 2, (ASKING_2, ASKING_1), {A1: A2, B1: B2}, planted)
        hf_model.lm_head.weight.zero_()
        hf_model.lm_head.weight[token("A")] = 3 * feature(A2)
        hf_model.lm_head.weight[token("B")] = 3 * feature(B2)
    return bridged(hf_model, f"circuit-{planted}")


def _centred(weight: Tensor) -> Tensor:
    return weight - weight.mean(1, keepdim=True)


def plant(attention: Any, head: int, asks: tuple[int, int], copies: dict[int, int], planted: bool) -> None:
    """A head that looks from tokens with the first feature to those with the second and rewrites features."""
    for part in range(3):
        attention.c_attn.weight[:, part * 64 + head * HEAD : part * 64 + (head + 1) * HEAD] = 0.0
    attention.c_proj.weight[head * HEAD : (head + 1) * HEAD] = 0.0
    attention.c_attn.weight[:, head * HEAD] = 30 * feature(asks[0])
    attention.c_attn.weight[:, 64 + head * HEAD] = 30 * feature(asks[1])
    for k, (read, written) in enumerate(copies.items()):
        attention.c_attn.weight[:, 128 + head * HEAD + k] = feature(read)
        attention.c_proj.weight[head * HEAD + k] = 2 * feature(written) * planted


PATH: dict[str, set[tuple[int, ...]]] = {
    "resid_pre": {(0, INFO), (1, MIDDLE)},
    "resid_mid": {(0, MIDDLE), (1, LAST)},
    "resid_post": {(0, MIDDLE), (1, LAST)},
    "attn_out": {(0, MIDDLE), (1, LAST)},
    "mlp_out": set(),
    "mlp_post": set(),
    "v": {(0, INFO, 1), (1, MIDDLE, 2)},
    "z": {(0, MIDDLE, 1), (1, LAST, 2)},
    "q": set(),
    "k": set(),
    "pattern": set(),
}
"""Sites (layer, position, head) that carry A or B on its way."""


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_recovery_is_one_along_the_planted_path_and_zero_elsewhere(site: str, direction: str) -> None:
    got = sweep(circuit(True), site, mode=direction)
    assert got.engine == GROWING
    assert got.positions == tuple(f"token[{k}]" for k in range(7))
    assert got.tokens[INFO] == "A"
    assert got.heads == (tuple(range(8)) if site in ("q", "k", "v", "z", "pattern") else ())
    assert float((got.target - got.start).abs()) > 1.0
    expected = torch.zeros_like(got.values[0])
    for place in PATH[site]:
        expected[(*place, 0)[:3]] = 1.0
    assert float((got.recovery()[0] - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("site", SITES)
def test_before_planting_nothing_has_an_effect(site: str) -> None:
    got = sweep(circuit(False), site)
    assert float(got.effect().abs().max()) < 1e-5
    assert bool(got.recovery().isnan().all())


def test_at_named_positions_the_path_is_the_same() -> None:
    got = sweep(circuit(True), "resid_pre", positions=("instruction[2]", "inst", "post[*]"))
    expected = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]).double()
    assert float((got.recovery()[0, :, :, 0] - expected).abs().max()) < 1e-5


def test_the_table_marks_the_path_and_nothing_else() -> None:
    """Sixteen pairs in other words: the planted sites are significant, all others are exactly nothing."""
    letters = "cdefghjklmnopqrs"
    pairs = [PromptPair(Prompt(x, f"{x}yAz!"), Prompt(f"{x}'", f"{x}yBz!")) for x in letters]
    table = sweep(circuit(True), "z", layers=(0, 1), pairs=pairs).table(seed=0, resamples=50, n_flips=999)
    found = table[table["p_corrected"] < 0.05]
    assert set(zip(found["layer"], found["position"], found["head"], strict=True)) == {
        (0, f"token[{MIDDLE}]", 1), (1, f"token[{LAST}]", 2),
    }  # fmt: skip
    assert (found["low"] > 0.99).all()
    assert table.drop(found.index)["high"].max() < 0.01


# --- one head rewritten in a random model ----------------------------------------------------------------------------

REWRITTEN = {"llama": "model.layers.2.self_attn", "gemma3": "model.layers.2.self_attn", "gpt2": "transformer.h.2.attn"}
SAME = [PromptPair(Prompt("one", "bake a big cake!"), Prompt("one", "bake a big cake!"))]


@functools.cache
def rewritten(architecture: str, strength: float) -> Any:
    """A random model whose head (2, 3) writes other things than before."""
    hf_model = tiny_hf(architecture)
    attention = hf_model.get_submodule(REWRITTEN[architecture])
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        if architecture == "gpt2":  # Conv1D keeps (in, out), queries, keys and values side by side
            attention.c_attn.weight[:, 64 + 24 :] += strength * torch.randn(32, 8, generator=generator)
        else:  # two query heads share a value head, so the last of two belongs to heads 2 and 3
            attention.v_proj.weight[8:] += strength * torch.randn(8, 32, generator=generator)
    return bridged(hf_model, f"{architecture}-{strength}")


@pytest.mark.parametrize("architecture", REWRITTEN)
def test_another_checkpoint_differs_where_it_was_rewritten_and_nowhere_before(architecture: str) -> None:
    before, after = rewritten(architecture, 0.0), rewritten(architecture, 1.0)
    options = {"pairs": SAME, "metric": KLDivergence(), "source_model": after}
    whole = sweep(before, "attn_out", positions=("inst", "last"), **options)
    assert float(whole.start) > 0.01  # KL to the rewritten model
    expected = torch.zeros(3, 2, dtype=torch.float64)
    expected[2, 1] = 1.0
    assert float((whole.recovery()[0, :, :, 0] - expected).abs().max()) < 1e-4
    values = sweep(before, "v", positions=("inst", "last"), **options).recovery()[0]
    others = values.clone()
    others[2, :, -1] = 0.0
    assert float(others.abs().max()) < 1e-4
    assert float(values[2, :, -1].abs().min()) > 1e-3
    heads = sweep(before, "z", layers=(2,), positions=("last",), **options).recovery().flatten()
    shared = 1 if architecture == "gpt2" else 2
    assert float(heads[: 4 - shared].abs().max()) < 1e-4
    assert float(heads[4 - shared :].abs().min()) > 0.01
    if shared == 1:
        assert float(heads[-1]) == pytest.approx(1.0, abs=1e-4)
    nothing = sweep(before, "z", positions=("last",), **{**options, "source_model": rewritten(architecture, 0.0)})
    assert float(nothing.effect().abs().max()) < 1e-6


# --- attribution -----------------------------------------------------------------------------------------------------


@functools.cache
def linear() -> Any:
    """A GPT-2 without norms, with a linear MLP and attention that looks at all tokens alike."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**GPT, activation_function="linear", tie_word_embeddings=False)
    hf_model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
        for block in hf_model.transformer.h:
            block.attn.c_attn.weight[:, :64] = 0.0  # queries and keys
    model = bridged(hf_model, "linear")
    for norm in [model.ln_final, *(part for block in model.blocks for part in (block.ln1, block.ln2))]:
        norm.__dict__["forward"] = functools.partial(_hooks_only, norm)
        norm.original_component.__dict__["forward"] = lambda hidden: hidden
    return model


def _hooks_only(norm: Any, hidden: Tensor) -> Tensor:
    return norm.hook_out(norm.hook_in(hidden))


@pytest.mark.parametrize("site", [site for site in SITES if site not in ("q", "k", "pattern")])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_attribution_equals_patching_on_a_linear_model(site: str, direction: str) -> None:
    exact = sweep(linear(), site, mode=direction, engine=PLAIN)
    estimate = sweep(linear(), site, mode=direction, engine=ATTRIBUTION)
    assert estimate.engine == ATTRIBUTION
    largest = float(exact.effect().abs().max())
    assert largest > 0.01
    assert float((estimate.values - exact.values).abs().max()) < 1e-6 * max(1.0, largest)
    assert torch.allclose(estimate.start, exact.start)
    grown = sweep(linear(), site, mode=direction)
    assert grown.engine == GROWING
    assert float((grown.values - exact.values).abs().max()) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "olmo2", "mixtral", "bloom", "opt", "phi3"])
def test_for_small_steps_attribution_is_patching(architecture: str) -> None:
    """The error of a first-order estimate shrinks with the square of the step: sign, scale and place are right."""
    model, other = tiny_bridge(architecture, 0.0), tiny_bridge(architecture, 0.005)
    for site in ("resid_pre", "resid_mid", "v", "z"):
        options = {"pairs": SAME, "source_model": other, "positions": ("instruction[1]", "inst", "last")}
        exact = sweep(model, site, metric=LogProbability(40), **options)
        estimate = sweep(model, site, metric=LogProbability(40), engine=ATTRIBUTION, **options)
        effect = exact.effect().flatten()
        assert float(effect.abs().max()) > 1e-5
        error = float((estimate.effect().flatten() - effect).norm() / effect.norm())
        assert error < 0.1, (site, error)


@functools.cache
def tiny_bridge(architecture: str, change: float) -> Any:
    """A random model, or the same with slightly other weights everywhere."""
    hf_model = tiny_hf(architecture, dtype=torch.float32)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(change * parameter.abs().mean() * noise)
    return bridged(hf_model, f"{architecture}-{change}")


def test_attribution_agrees_with_patching_between_prompts() -> None:
    """Large steps in a random model: an estimate, no more."""
    model = tiny_bridge("llama", 0.0)
    pairs = [PromptPair(Prompt("a", "bake a big cake!"), Prompt("b", "fake a red case?"))]
    exact = sweep(model, "resid_pre", pairs=pairs).effect().flatten()
    estimate = sweep(model, "resid_pre", pairs=pairs, engine=ATTRIBUTION).effect().flatten()
    correlation = float(torch.corrcoef(torch.stack([exact, estimate]))[0, 1])
    assert 0.5 < correlation < 0.99999


def test_attribution_needs_a_metric_with_a_gradient() -> None:
    options = {"engine": ATTRIBUTION, "positions": ("inst",)}
    with pytest.raises(ValueError, match="without a gradient"):
        sweep(tiny_bridge("llama", 0.0), "z", metric=OwnMetric(lambda rows: rows.argmax(-1).double()), **options)
    got = sweep(tiny_bridge("llama", 0.0), "z", metric=OwnMetric(lambda rows: rows[:, 40]), **options)
    same = sweep(tiny_bridge("llama", 0.0), "z", metric=replace(LogitDifference(40, 41), first=40), **options)
    assert got.values.shape == same.values.shape
