"""Laws of patching: every engine equals one whole forward per site, with a hook that these tests write themselves."""

import copy
import functools
import itertools
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import real
import torch
import warm
from tiny import ARCHITECTURES, SMALL, tiny_hf, tiny_tokenizer
from torch import Tensor
from transformer_lens import patching as peer
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from mechlens.errors import UserError
from mechlens.methods.patching import packed as packed_edits
from mechlens.methods.patching import plan as patch_plan
from mechlens.methods.patching import sweep as patching
from mechlens.methods.patching.metrics import (
    KLDivergence,
    LogitDifference,
    LogProbability,
    Metric,
    OwnMetric,
    as_metric,
)
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.result import PatchResult
from mechlens.methods.patching.sweep import ATTRIBUTION, GROWING, PLAIN, patch_sweep
from mechlens.models.bridge import bridge, has_hooks, loaded, n_layers
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.engine.edits import Edit, site_values, value_at
from mechlens.models.engine.growing import can_grow, edited_logits, record
from mechlens.models.sites import SITES, n_heads, site_hook
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt, PromptPair
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.folder import FolderCache

pytestmark = pytest.mark.exact

CLOSE = 1e-5
PARALLEL = ("phi", "neox", "gptj")
"""Attention and MLP read the same stream, so there is nothing in the middle."""
DEAF = ("gptj", "opt")
"""TransformerLens only shows the attention pattern there."""
SHORT = "{{ messages[-1]['content'] }}<|im_end|>{% if add_generation_prompt %}<|im_start|>{% endif %}"
METRIC = LogitDifference(40, 50)


def bridged(hf_model: Any, name: str = "tiny") -> Any:
    checkpoint = Checkpoint(name, f"tests/{name}", fingerprint=weight_fingerprint(hf_model.state_dict()))
    return bridge(hf_model, tiny_tokenizer(), checkpoint)


def sharpened(architecture: str, **options: Any) -> Any:
    """A tiny model whose blocks weigh twice as much: attention that is not nearly uniform."""
    hf_model = tiny_hf(architecture, **options)
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            if parameter.ndim > 1 and not any(word in name for word in ("emb", "wte", "wpe", "lm_head")):
                parameter.mul_(2.0)
    return hf_model


@functools.cache
def model_of(architecture: str, seed: int = 0) -> Any:
    """Shared by the session; tests leave it as it was."""
    return bridged(sharpened(architecture, seed=seed), f"{architecture}{seed}")


@functools.cache
def short() -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer(SHORT))


def random_ids(n: int, seed: int) -> list[int]:
    return torch.randint(5, 260, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def pair(clean: str, corrupt: str, name: str = "p") -> PromptPair:
    return PromptPair(Prompt(f"{name}.clean", clean), Prompt(f"{name}.corrupt", corrupt))


PAIRS = [pair("bake a big cake!", "fake a red case?", "one"), pair("give us more gold", "sell me some cars", "two")]
LONG = [pair("please bake a very big cake!", "police fake a most red case?", "long")]
UNEVEN = [pair("bake it", "burn all of them down"), pair("sing the song of old", "go", "two")]


@torch.inference_mode()
def oracle(model: Any, ids: Sequence[int], site: str, edit: Edit, read: int) -> Tensor:
    """One whole forward with a hook, written here and not in mechlens; in place, so that every reader sees it."""

    def put(value: Tensor, hook: Any) -> Tensor:
        if edit.head is None:
            value[0, edit.position] = edit.value
        elif site == "pattern":
            value[0, edit.head, edit.position] = edit.value
        else:
            value[0, edit.position, edit.head] = edit.value
        return value

    return model.run_with_hooks(torch.tensor([list(ids)]), fwd_hooks=[(site_hook(site, edit.layer), put)])[0, read]


@torch.inference_mode()
def plain_logits(model: Any, ids: Sequence[int], read: int = -1) -> Tensor:
    return model(torch.tensor([list(ids)]))[0, read]


def edits_at(model: Any, source: Sequence[int], site: str, positions: Sequence[int]) -> list[Edit]:
    """Every layer at the positions, in a shuffled order, with the source's values; heads take turns."""
    values = site_values(model, source, site, range(n_layers(model)))
    count = n_heads(model, site)
    places = [(layer, position) for position in positions for layer in (2, 0, 1)]
    heads = [i % count if count else None for i in range(len(places))]
    return [
        Edit(layer, position, value_at(values[layer], site, position, head), head)
        for (layer, position), head in zip(places, heads, strict=True)
    ]


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def sites_of(architecture: str) -> list[str]:
    without = {"resid_mid"} if architecture in PARALLEL else set()
    without |= {"mlp_post"} if architecture == "mixtral" else set()  # its experts have each their own
    return [site for site in SITES if site not in without and not (site == "pattern" and architecture in DEAF)]


# --- the growing batch equals one forward per site -----------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_site_equals_one_whole_forward(architecture: str) -> None:
    """Prompts of 40 tokens, longer than tiny's windows of 16; the first edited position is 0, or a later one."""
    model = model_of(architecture)
    ids, other = random_ids(40, 1), random_ids(40, 2)
    run = plain_logits(model, ids)
    for site in sites_of(architecture):
        later = edits_at(model, other, site, (39, 7))
        truth = torch.stack([oracle(model, ids, site, edit, 39) for edit in later])
        assert gap(truth, run) > 1e-4, f"{site}: the edits change nothing, so nothing is shown"
        assert can_grow(model, site) == (architecture != "bloom")
        if architecture == "bloom":
            continue
        recording = record(model, ids, 39, site, (0, 2))
        assert gap(recording.logits, run) < CLOSE
        values = site_values(model, ids, site, (0, 2))
        for layer in (0, 2):  # in units of the largest value, which is 7 in Gemma 2
            scale = max(1.0, float(values[layer].abs().max()))
            assert gap(recording.values[layer], values[layer]) < CLOSE * scale
        got = edited_logits(model, recording, site, later, 39)
        assert gap(got[1:], truth) < CLOSE
        assert gap(got[0], run) < CLOSE
        first = edits_at(model, other, site, (0,))
        got = edited_logits(model, recording, site, [*first, *later], 39)
        truth = torch.cat([torch.stack([oracle(model, ids, site, edit, 39) for edit in first]), truth])
        assert gap(got[1:], truth) < CLOSE
        assert gap(got[0], run) < CLOSE
        assert not has_hooks(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_three_names_for_one_edit(architecture: str) -> None:
    """The MLP works on each token alone: an edit in the middle of a block, after it and before the next are one.

    On a bridge `hook_resid_mid` is only what the MLP's norm reads; an edit must reach the skip connection too.
    """
    model, positions = model_of(architecture), ("instruction[2]", "last")
    for engine in ("auto", PLAIN):
        same = [
            patch_sweep(model, PAIRS[:1], METRIC, PatchPlan(site, layers, positions), template=short(), engine=engine)
            for site, layers in (("resid_mid", (0, 1)), ("resid_post", (0, 1)), ("resid_pre", (1, 2)))
            if site != "resid_mid" or architecture not in PARALLEL
        ]
        assert float(same[0].effect().abs().min()) > 1e-4
        assert all(gap(result.values, same[0].values) < CLOSE for result in same)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_logits_read_before_and_between_the_edits(architecture: str) -> None:
    model = model_of(architecture)
    ids, other = random_ids(30, 1), random_ids(30, 2)
    for site in ("resid_pre", "v", "mlp_out"):
        edits = edits_at(model, other, site, (4, 12, 29))
        recording = record(model, ids, 29, site, ())
        for read in (0, 12, 20):
            got = edited_logits(model, recording, site, edits, read)
            truth = torch.stack([oracle(model, ids, site, edit, read) for edit in edits])
            assert gap(got[1:], truth) < CLOSE
            assert gap(got[1:][[edit.position > read for edit in edits]], plain_logits(model, ids, read)) < CLOSE


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "bloom"])
def test_bfloat16_is_no_worse_than_plain_bfloat16(architecture: str) -> None:
    """Truth: the same bfloat16 weights and the same bfloat16 values put in, computed in float32; median error."""
    half = bridged(sharpened(architecture, dtype=torch.bfloat16))
    exact = bridged(sharpened(architecture, dtype=torch.bfloat16).float())
    ours, theirs = [], []
    for site, seed in itertools.product(("resid_pre", "attn_out", "v", "z"), (1, 3, 5)):
        if not can_grow(half, site):  # TransformerLens mixes types in OLMo-2's attention when it continues from a cache
            assert (architecture, site) in {("olmo2", "attn_out"), ("olmo2", "v")}
            continue
        ids, other = random_ids(24, seed), random_ids(24, seed + 1)
        edits = edits_at(half, other, site, (6, 23))
        truth = [
            oracle(exact, ids, site, replace(edit, value=edit.value.clone().float()), 23)  # no inference tensor
            for edit in edits
        ]
        got = edited_logits(half, record(half, ids, 23, site, ()), site, edits, 23)[1:]
        ours += [(row - true).abs() for row, true in zip(got, truth, strict=True)]
        theirs += [
            (oracle(half, ids, site, edit, 23).float() - true).abs() for edit, true in zip(edits, truth, strict=True)
        ]
    assert 0 < float(torch.stack(ours).median()) < 1.15 * float(torch.stack(theirs).median())
    plan = PatchPlan("resid_pre", layers=(1,), positions=("last",))
    assert patch_sweep(half, PAIRS[:1], METRIC, plan, template=short()).engine == GROWING


# --- sweeps ----------------------------------------------------------------------------------------------------------


def by_hand(model: Any, pairs: Sequence[PromptPair], plan: PatchPlan, result: PatchResult, metric: Metric) -> Tensor:
    """The whole sweep from its definition: every site of the result by one forward with a hook."""
    clean, corrupt = (tokenize([getattr(p, side) for p in pairs], short()) for side in ("clean", "corrupt"))
    start, source = (corrupt, clean) if plan.mode == "denoising" else (clean, corrupt)
    values = torch.empty_like(result.values)
    for i in range(len(pairs)):
        found = site_values(model, source.row(i), plan.site, result.layers)
        clean_logits = plain_logits(model, clean.row(i), int(clean.at(plan.read)[i]))
        for a, layer in enumerate(result.layers):
            for b, name in enumerate(result.positions):
                for c, head in enumerate(result.heads or (None,)):
                    value = value_at(found[layer], plan.site, int(source.at(name)[i]), head)
                    edit = Edit(layer, int(start.at(name)[i]), value, head)
                    row = oracle(model, start.row(i), plan.site, edit, int(start.at(plan.read)[i]))
                    values[i, a, b, c] = metric(row[None], clean_logits)[0]
    return values


SWEEPS = {
    "all, denoising": PatchPlan("resid_pre", layers=(1,), positions=("all",)),
    "inst and template, noising": PatchPlan("attn_out", positions=("inst", "post[*]"), mode="noising"),
    "instruction": PatchPlan("v", layers=(1,), positions=("instruction[*]",), heads=(1,)),
    "one token": PatchPlan("z", positions=("token[3]",), mode="noising", heads=(2,)),
    "read early": PatchPlan("mlp_out", positions=("instruction[2]", "last"), read="inst"),
    "pattern": PatchPlan("pattern", layers=(2, 0), positions=("inst",), mode="noising"),
}


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_sweep_equals_its_definition(name: str, architecture: str) -> None:
    model, plan = model_of(architecture), SWEEPS[name]
    pairs = PAIRS if name.startswith("inst") else LONG
    metric = KLDivergence() if architecture == "gpt2" else METRIC
    grown = patch_sweep(model, pairs, metric, plan, template=short())
    plain = patch_sweep(model, pairs, metric, plan, template=short(), engine=PLAIN)
    truth = by_hand(model, pairs, plan, grown, metric)
    assert (plain.engine, grown.engine) == (PLAIN, GROWING)
    assert gap(grown.values, truth) < CLOSE
    assert gap(plain.values, truth) < CLOSE
    assert max(gap(plain.clean, grown.clean), gap(plain.corrupt, grown.corrupt)) < CLOSE


def test_any_batch_size_gives_the_same_numbers() -> None:
    model = model_of("gemma3")
    plan = PatchPlan("resid_post", layers=(0, 2), positions=("all",))
    truth = patch_sweep(model, LONG, METRIC, plan, template=short(), engine=PLAIN).values
    for max_tokens in (1, 37, 100, 10**6):
        chunked = patch_sweep(model, LONG, METRIC, replace(plan, max_tokens=max_tokens), template=short())
        assert gap(chunked.values, truth) < CLOSE


def test_where_memory_runs_out_the_batch_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = model_of("llama"), PatchPlan("resid_pre", positions=("instruction[*]",), max_tokens=10**6)
    truth = patch_sweep(model, LONG, METRIC, plan, template=short()).values
    sizes: list[int] = []
    run = packed_edits.packed_edited_logits

    def small(model: Any, recorded: Any, site: str, edits: Sequence[Any], reads: Sequence[int], *tokens: Any) -> Tensor:
        if len(edits) > 10:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        sizes.append(len(edits))
        return run(model, recorded, site, edits, reads, *tokens)

    monkeypatch.setattr(packed_edits, "packed_edited_logits", small)
    assert gap(patch_sweep(model, LONG, METRIC, plan, template=short()).values, truth) < CLOSE
    assert sum(sizes) == truth.numel() - n_layers(model)  # both prompts begin with a "p"

    def broken(*args: Any) -> Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(packed_edits, "packed_edited_logits", broken)
    with pytest.raises(RuntimeError, match="something else"):
        patch_sweep(model, LONG, METRIC, plan, template=short(), engine=GROWING)


def test_the_growing_batch_is_halved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites that only TransformerLens' hook points reach don't come into packed passes."""
    model, plan = model_of("llama"), PatchPlan("mlp_out", positions=("instruction[*]",), max_tokens=10**6)
    truth = patch_sweep(model, LONG, METRIC, plan, template=short()).values
    sizes: list[int] = []

    def small(model: Any, recording: Any, site: str, edits: Sequence[Edit], read: int) -> Tensor:
        if len(edits) > 10:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        sizes.append(len(edits))
        return edited_logits(model, recording, site, edits, read)

    monkeypatch.setattr(patching, "edited_logits", small)
    assert gap(patch_sweep(model, LONG, METRIC, plan, template=short()).values, truth) < CLOSE
    assert sum(sizes) == truth.numel()


def test_what_cannot_grow_says_which_path_ran() -> None:
    plan = PatchPlan("resid_pre", layers=(1,), positions=("inst",))
    got = patch_sweep(model_of("bloom"), PAIRS[:1], METRIC, plan, template=short())
    assert got.engine == PLAIN
    with pytest.raises(UserError, match="growing-batch engine"):
        patch_sweep(model_of("bloom"), PAIRS[:1], METRIC, plan, template=short(), engine=GROWING)
    model = bridged(tiny_hf("llama"))
    free = patch_sweep(model, PAIRS[:1], METRIC, plan, template=short())
    model.add_hook("blocks.2.hook_resid_pre", lambda residual, hook: residual * 2 + 1)  # the user's own
    pushed = patch_sweep(model, PAIRS[:1], METRIC, plan, template=short())
    assert (free.engine, pushed.engine) == (GROWING, PLAIN)
    assert gap(free.values, pushed.values) > 0.01
    assert has_hooks(model)


@pytest.mark.parametrize("architecture", PARALLEL)
def test_a_site_that_is_not_there_is_named(architecture: str) -> None:
    for engine in ("auto", GROWING, PLAIN, ATTRIBUTION):
        with pytest.raises(UserError, match="no site 'resid_mid' in block 0"):
            patch_sweep(model_of(architecture), LONG, METRIC, PatchPlan("resid_mid"), template=short(), engine=engine)


@pytest.mark.filterwarnings("ignore:A hook on")
@pytest.mark.parametrize("architecture", DEAF)
def test_a_site_that_is_only_shown_is_refused(architecture: str) -> None:
    with pytest.raises(UserError, match="'pattern' can be read and not changed"):
        patch_sweep(model_of(architecture), LONG, METRIC, PatchPlan("pattern"), template=short())


# --- equal to transformer_lens.patching ------------------------------------------------------------------------------

PEERS: dict[str, Callable[..., Tensor]] = {
    "resid_pre": peer.get_act_patch_resid_pre,
    "resid_mid": peer.get_act_patch_resid_mid,
    "attn_out": peer.get_act_patch_attn_out,
    "mlp_out": peer.get_act_patch_mlp_out,
    "z": peer.get_act_patch_attn_head_out_by_pos,
    "q": peer.get_act_patch_attn_head_q_by_pos,
    "k": peer.get_act_patch_attn_head_k_by_pos,
    "v": peer.get_act_patch_attn_head_v_by_pos,
    "pattern": peer.get_act_patch_attn_head_pattern_by_pos,
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_equals_transformer_lens(architecture: str) -> None:
    model, pairs = model_of(architecture), [pair("ab", "xy")]
    clean, corrupt = (tokenize([getattr(pairs[0], side)], short()).tokens for side in ("clean", "corrupt"))
    with torch.inference_mode():
        _, cache = model.run_with_cache(clean)

        def metric(logits: Tensor) -> Tensor:
            return logits[0, -1, 40] - logits[0, -1, 50]

        ours = {
            site: patch_sweep(model, pairs, METRIC, PatchPlan(site), template=short()).values[0].float()
            for site in PEERS
        }
        for site, sweep in PEERS.items():
            theirs = sweep(model, corrupt, cache, metric)
            if site == "pattern":
                theirs = theirs.transpose(1, 2)  # layer, head, position
            assert gap(ours[site], theirs.reshape(ours[site].shape)) < CLOSE
        every = peer.get_act_patch_block_every(model, corrupt, cache, metric)
        assert gap(torch.stack([ours[site][..., 0] for site in ("resid_pre", "attn_out", "mlp_out")]), every) < CLOSE


# --- what must hold whatever the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "bloom"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_self_patch_changes_nothing(architecture: str, direction: str) -> None:
    same = [pair(p.clean.text, p.clean.text, p.clean.id) for p in PAIRS]
    for site in ("resid_pre", "k", "pattern"):
        plan = PatchPlan(site, layers=(0, 2), positions=("inst",), mode=direction)
        for metric in (LogProbability(40), KLDivergence()):
            got = patch_sweep(model_of(architecture), same, metric, plan, template=short())
            assert gap(got.values, got.start[:, None, None, None]) < CLOSE
            assert torch.equal(got.clean, got.corrupt)
            assert bool(got.recovery().isnan().all())
            assert set(got.table(seed=0, resamples=5, n_flips=50)["p_corrected"]) == {1.0}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_residual_gives_the_sources_metric(architecture: str) -> None:
    for direction in ("denoising", "noising"):
        plan = PatchPlan("resid_post", layers=(2,), positions=("last",), mode=direction)
        got = patch_sweep(model_of(architecture), PAIRS, METRIC, plan, template=short())
        assert gap(got.values.flatten(), got.target) < CLOSE
        assert gap(got.recovery().flatten(), torch.ones(2)) < 1e-3
        assert gap(got.clean, got.corrupt) > 0.01


def test_uneven_pairs_are_aligned_by_role_or_refused() -> None:
    model, positions = model_of("gemma2"), ("instruction[*]", "inst", "post[*]")
    for direction in ("denoising", "noising"):
        plan = PatchPlan("resid_mid", layers=(0, 1), positions=positions, mode=direction)
        got = patch_sweep(model, UNEVEN, METRIC, plan, template=short())
        assert got.positions == ("instruction[-2]", "instruction[-1]", "inst", "post[0]", "post[1]")
        assert gap(got.values, by_hand(model, UNEVEN, plan, got, METRIC)) < CLOSE
        assert torch.equal(got.values[:, :, 1], got.values[:, :, 2])  # the last word's token is inst
    for name in ("all", "token[1]"):
        with pytest.raises(UserError, match=r"needs prompts of one length.*positions by role"):
            patch_sweep(model, UNEVEN, METRIC, PatchPlan("resid_pre", positions=(name,)), template=short())
    for name in ("inst", "instruction[0]"):
        with pytest.raises(UserError, match="choose pairs of one length"):
            patch_sweep(model, UNEVEN, METRIC, PatchPlan("pattern", positions=(name,)), template=short())


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "bloom"])
def test_padding_on_either_side_changes_nothing(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uneven pairs in one call share a padded block; each must get the numbers that it has alone."""
    model, plan = (
        model_of(architecture),
        PatchPlan("v", layers=(0,), positions=("instruction[*]", "inst", "last"), read="last"),
    )
    alone = [
        patch_sweep(model, [p], METRIC, replace(plan, positions=("inst", "last")), template=short()) for p in UNEVEN
    ]
    for side in ("left", "right"):
        with monkeypatch.context() as patch:
            patch.setattr(patch_plan, "tokenize", functools.partial(tokenize, padding_side=side))
            got = patch_sweep(model, UNEVEN, METRIC, plan, template=short())
        assert got.positions == ("instruction[-2]", "instruction[-1]", "inst", "post[1]")
        assert got.tokens[-2:] == ("t", "<|im_start|>")
        assert gap(got.values[:, :, 2:], torch.cat([result.values for result in alone])) < CLOSE
        assert gap(got.clean, torch.cat([result.clean for result in alone])) < CLOSE
        assert gap(got.values[:, :, 0], got.values[:, :, 3]) > 1e-4


def test_axes_and_labels() -> None:
    model = model_of("llama")
    for site, heads in {"q": 4, "z": 4, "pattern": 4, "k": 2, "v": 2, "resid_post": 1}.items():
        got = patch_sweep(model, PAIRS, METRIC, PatchPlan(site, layers=(2, 1), positions=("inst",)), template=short())
        assert got.values.shape == (2, 2, 1, heads)
        assert got.layers == (2, 1)
        assert got.heads == (tuple(range(heads)) if heads > 1 else ())
    assert (got.pairs, got.families, got.tokens) == (("one.clean", "two.clean"),) * 2 + (("!",),)
    assert (got.site, got.metric, got.mode) == ("resid_post", "logit_difference", "denoising")
    assert got.source == "other prompt"
    assert SMALL["num_key_value_heads"] == 2


WRONG = {
    "there is no site 'mlp'": {"site": "mlp"},
    "there is no layer 3": {"layers": (0, 3)},
    "there is no layer -1": {"layers": (-1,)},
    "there is no layer at all": {"layers": ()},
    "has 2 heads": {"site": "v", "heads": (2,)},
    "has 4 heads": {"site": "z", "heads": ()},
    "has 0 heads": {"heads": (0,)},
    "there is no position 'middle'": {"positions": ("middle",)},
    r"too short to have a token 'token\[99\]'": {"positions": ("token[99]",)},
    r"too short to have a token 'instruction\[99\]'": {"positions": ("instruction[99]",)},
    "there are no positions": {"positions": ()},
    "there is no position 'end'": {"read": "end"},
    "names 2 positions": {"read": "post[*]"},
    "there is no mode 'up'": {"mode": "up"},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_there_is_not_is_said_in_a_sentence(sentence: str) -> None:
    options = {"site": "resid_pre", "positions": ("inst",), **WRONG[sentence]}
    with pytest.raises(UserError, match=sentence):
        patch_sweep(model_of("llama"), LONG, METRIC, PatchPlan(**options), template=short())


def test_a_metric_of_a_token_that_there_is_not_is_refused_before_any_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    monkeypatch.setattr(model, "forward", None)
    for metric in (LogitDifference(7, 270), LogProbability(270)):
        with pytest.raises(UserError, match="token id 270 can't be scored; give ids from 0 to 269"):
            patch_sweep(model, LONG, metric, PatchPlan("resid_pre", positions=("inst",)), template=short())


def test_more_that_there_is_not() -> None:
    model, plan = model_of("llama"), PatchPlan("resid_pre", positions=("inst",))
    with pytest.raises(UserError, match="there is no engine 'fast'"):
        patch_sweep(model, PAIRS, METRIC, plan, template=short(), engine="fast")
    with pytest.raises(UserError, match="there are no pairs"):
        patch_sweep(model, [], METRIC, plan, template=short())
    with pytest.raises(UserError, match="the model takes 512"):
        patch_sweep(model, [pair("a" * 600, "b")], METRIC, plan, template=short())
    with pytest.raises(UserError, match="another shape"):
        patch_sweep(model, PAIRS, METRIC, plan, template=short(), source_model=model_of("neox"))


@pytest.mark.parametrize("engine", [GROWING, PLAIN, ATTRIBUTION])
def test_an_exception_in_the_metric_leaves_no_hook(engine: str) -> None:
    model, plan = model_of("llama"), PatchPlan("attn_out", positions=("inst",))
    before = patch_sweep(model, PAIRS, METRIC, plan, template=short())

    class Broken:
        name = "broken"

        def __call__(self, logits: Tensor, clean: Tensor) -> Tensor:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        patch_sweep(model, PAIRS, Broken(), plan, template=short(), engine=engine)
    assert not has_hooks(model)
    after = patch_sweep(model, PAIRS, METRIC, plan, template=short())
    assert after.engine == GROWING
    assert torch.equal(before.values, after.values)


@pytest.mark.parametrize("engine", [GROWING, PLAIN, ATTRIBUTION])
def test_a_bare_function_is_a_metric(engine: str) -> None:
    model, plan = model_of("llama"), PatchPlan("resid_pre", positions=("inst",), layers=(1,))
    ours = patch_sweep(model, PAIRS, LogitDifference(40, 41), plan, template=short(), engine=engine)
    theirs = patch_sweep(model, PAIRS, lambda x: x[:, 40] - x[:, 41], plan, template=short(), engine=engine)
    assert gap(ours.values, theirs.values) < CLOSE
    assert theirs.metric == "own_metric"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda logits: logits[40] - logits[41], r"raised IndexError .*it takes logits of shape \(row, vocab\)"),
        (lambda logits, clean: logits[:, 0], "raised TypeError .*it takes logits of shape"),
        (lambda logits: logits.mean(), "gave 1 numbers for 2 rows of logits"),
        (lambda logits: "high", "gave a str; it takes logits"),
        (lambda logits: None, "gave a NoneType; it takes logits"),
        (lambda logits: (logits[:, 0] * 0).log(), r"gave \[-inf, -inf\] for the first pair"),
        (lambda logits: logits.softmax(dim=0)[:, 0], "so it mixes rows"),
        ("kl", "the metric is a str; give ml.LogitDifference"),
    ],
)
def test_a_function_that_is_no_metric_is_refused_before_the_sweep(
    function: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechlens.methods.patching.sweep._Sweep.run", lambda *_: pytest.fail("the sweep began"))
    plan = PatchPlan("resid_pre", positions=("inst",))
    with pytest.raises(UserError, match=says):
        patch_sweep(model_of("llama"), PAIRS, as_metric(function), plan, template=short())


def test_attribution_asks_a_function_for_its_gradient() -> None:
    plan = PatchPlan("resid_pre", positions=("inst",))
    with pytest.raises(UserError, match="without a gradient, which attribution needs"):
        patch_sweep(model_of("llama"), PAIRS, lambda x: x[:, 0].detach(), plan, template=short(), engine=ATTRIBUTION)


# --- values from another checkpoint, and at random -------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_another_checkpoint_as_the_source(architecture: str) -> None:
    a, b = model_of(architecture), model_of(architecture, seed=1)
    same = [pair(p.clean.text, p.clean.text, p.clean.id) for p in PAIRS]
    plan = PatchPlan("resid_post", positions=("last",))
    got = patch_sweep(a, same, LogProbability(40), plan, template=short(), source_model=b)
    rows = [tokenize([p.clean], short()).row(0) for p in same]
    mine, theirs = (torch.stack([plain_logits(m, row) for row in rows]) for m in (a, b))
    assert gap(got.clean, theirs.double().log_softmax(-1)[:, 40]) < CLOSE
    assert gap(got.corrupt, mine.double().log_softmax(-1)[:, 40]) < CLOSE
    assert got.source == loaded(b).checkpoint.name
    with torch.inference_mode():  # B's last residual through A's own final norm and unembedding
        _, cache = b.run_with_cache(torch.tensor(rows[:1]))
        read = a.unembed(a.ln_final(cache[site_hook("resid_post", 2)]))[0, -1]
    assert gap(got.values[0, 2, 0, 0], read.double().log_softmax(-1)[40]) < CLOSE
    ordinary = patch_sweep(a, PAIRS, METRIC, plan, template=short())
    itself = patch_sweep(a, PAIRS, METRIC, plan, template=short(), source_model=a)
    assert torch.equal(ordinary.values, itself.values)


def test_all_of_another_checkpoints_last_residual_gives_its_metric() -> None:
    """A and B share what comes after the blocks, as fine-tunes that leave the unembedding alone do."""
    b = bridged(_other_blocks(), "b")
    same = [pair(p.clean.text, p.clean.text, p.clean.id) for p in PAIRS]
    for direction in ("denoising", "noising"):
        plan = PatchPlan("resid_post", layers=(2,), positions=("last",), mode=direction)
        got = patch_sweep(model_of("llama"), same, METRIC, plan, template=short(), source_model=b)
        assert gap(got.values.flatten(), got.target) < CLOSE
        assert gap(got.start, got.target) > 0.01


def _other_blocks() -> Any:
    hf_model, other = sharpened("llama"), sharpened("llama", seed=1)
    hf_model.model.layers.load_state_dict(other.model.layers.state_dict())
    return hf_model


def caught_edits(monkeypatch: pytest.MonkeyPatch, plan: PatchPlan, pairs: Sequence[PromptPair]) -> list[Edit]:
    found: list[Edit] = []
    with monkeypatch.context() as patch:
        original = patching.reference_edited_logits

        def catch(model: Any, ids: Sequence[int], site: str, edit: Edit, read: int) -> Tensor:
            found.append(edit)
            return original(model, ids, site, edit, read)

        patch.setattr(patching, "reference_edited_logits", catch)
        patch_sweep(model_of("llama"), pairs, METRIC, plan, template=short(), engine=PLAIN)
    return found


@pytest.mark.parametrize("site", ["resid_mid", "k", "pattern"])
def test_the_random_control_is_as_long_as_the_difference(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # `inst` and instruction[-1] are one token: it must not get two vectors.
    plan = PatchPlan(site, layers=(1, 2), positions=("inst", "instruction[-1]", "post[*]"), random_seed=3)
    edits = caught_edits(monkeypatch, plan, LONG)
    honest = caught_edits(monkeypatch, replace(plan, random_seed=None), LONG)
    own = site_values(model_of("llama"), tokenize([LONG[0].corrupt], short()).row(0), site, (1, 2))
    assert len(edits) == len(honest) > 5
    for edit, true in zip(edits, honest, strict=True):
        mine = value_at(own[edit.layer], site, edit.position, edit.head)
        shift, length = edit.value - mine, (true.value - mine).norm()
        assert float(shift.norm()) == pytest.approx(float(length), rel=1e-4)
        assert float(length) > 0
        if mine.numel() > 8:
            assert float(torch.cosine_similarity(shift, true.value - mine, dim=0).abs()) < 0.9
        if site == "pattern":
            assert not edit.value[edit.position + 1 :].any()  # no attention to what is still to come
    shown = patch_sweep(model_of("llama"), LONG, METRIC, plan, template=short())
    again = patch_sweep(model_of("llama"), LONG, METRIC, plan, template=short())
    other = patch_sweep(model_of("llama"), LONG, METRIC, replace(plan, random_seed=4), template=short())
    assert torch.equal(shown.values, again.values)
    assert gap(shown.values, other.values) > 1e-4
    assert shown.source == "random"


def test_every_pair_draws_its_own_random_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """One vector for all pairs would have the same effect in each, and pass for a significant site."""
    plan = PatchPlan("resid_post", layers=(2,), positions=("last",), random_seed=0)
    edits = caught_edits(monkeypatch, plan, PAIRS)
    rows = [tokenize([p.corrupt], short()).row(0) for p in PAIRS]
    own = [site_values(model_of("llama"), row, "resid_post", (2,))[2][-1] for row in rows]
    first, second = (edit.value - mine for edit, mine in zip(edits, own, strict=True))
    assert float(torch.cosine_similarity(first, second, dim=0).abs()) < 0.9


# --- going on after a kill -------------------------------------------------------------------------------------------


class Memory:
    """A cache in memory that can be told to die after some pieces."""

    def __init__(self, last: int = 10**9) -> None:
        self.pieces: dict[str, dict[str, Tensor]] = {}
        self.last, self.found = last, 0

    def get(self, key: str) -> dict[str, Tensor] | None:
        self.found += key in self.pieces
        return self.pieces.get(key)

    def put(self, key: str, value: dict[str, Tensor]) -> None:
        if len(self.pieces) == self.last:
            raise KeyboardInterrupt
        self.pieces[key] = value


THREE = [*PAIRS, pair("draw my red sun", "drop my sad fork", "three")]
PLAN = PatchPlan("z", layers=(0, 2), positions=("inst", "last"))
ALONE = replace(PLAN, max_tokens=17)
"""The same with too few tokens in a pass for two pairs to share it."""


def test_a_killed_sweep_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = model_of("llama"), Memory(last=2)
    runs: list[int] = []
    record = packed_edits.record_packed
    monkeypatch.setattr(packed_edits, "record_packed", lambda *args: runs.append(len(args[1])) or record(*args))
    truth = patch_sweep(model, THREE, METRIC, ALONE, template=short())
    with pytest.raises(KeyboardInterrupt):
        patch_sweep(model, THREE, METRIC, ALONE, template=short(), cache=cache)
    cache.last = 10**9
    runs.clear()
    got = patch_sweep(model, THREE, METRIC, ALONE, template=short(), cache=cache)
    assert (runs, cache.found) == ([2], 2)  # the two runs of the third pair
    assert gap(got.values, truth.values) < 1e-12
    assert gap(got.clean, truth.clean) == gap(got.corrupt, truth.corrupt) == 0.0
    runs.clear()
    # How it is computed is no part of what it is.
    assert torch.equal(patch_sweep(model, THREE, METRIC, PLAN, template=short(), cache=cache).values, got.values)
    assert not runs


def test_what_differs_has_another_place_in_the_cache() -> None:
    model, cache = bridged(sharpened("llama")), Memory()

    def sweep(plan: PatchPlan = PLAN, metric: Metric = METRIC, **options: Any) -> Tensor:
        return patch_sweep(model, PAIRS[:1], metric, plan, template=short(), cache=cache, **options).values

    first = sweep()
    for plan in (
        replace(PLAN, mode="noising"), replace(PLAN, layers=(0, 1)), replace(PLAN, heads=(0,)),
        replace(PLAN, positions=("inst",)), replace(PLAN, site="q"), replace(PLAN, random_seed=1),
        replace(PLAN, random_seed=2), replace(PLAN, read="inst"),
    ):  # fmt: skip
        sweep(plan)
    sweep(metric=LogitDifference(41, 50))
    sweep(engine=PLAIN)
    sweep(source_model=model_of("llama", seed=1))
    assert (len(cache.pieces), cache.found) == (12, 0)
    assert torch.equal(sweep(), first)
    assert cache.found == 1
    model.original_model.model.layers[1].mlp.down_proj.original_component.weight.data *= 2
    edited = sweep()  # weights changed since loading
    assert (len(cache.pieces), cache.found) == (13, 1)
    assert gap(edited, first) > 1e-4
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda residual, hook: residual * 2 + 1)]):
        hooked = sweep()  # nothing says what the user's hooks do
    assert (len(cache.pieces), cache.found) == (13, 1)
    assert gap(edited, hooked) > 1e-4


def test_a_function_of_ones_own_works_and_is_never_kept() -> None:
    cache = Memory()
    plan = replace(PLAN, layers=(0,))
    for metric in (OwnMetric(lambda logits: logits[:, 40] - logits[:, 50]), OwnMetric(lambda logits: -logits[:, 7])):
        got = patch_sweep(model_of("llama"), PAIRS, metric, plan, template=short(), cache=cache)
        assert got.metric == "own_metric"
    same = patch_sweep(model_of("llama"), PAIRS, METRIC, plan, template=short())
    first = OwnMetric(lambda logits: logits[:, 40] - logits[:, 50], "mine")
    mine = patch_sweep(model_of("llama"), PAIRS, first, plan, template=short(), cache=cache)
    assert gap(mine.values, same.values) < CLOSE  # a head of two tokens rounds otherwise than a whole one
    assert mine.metric == "mine"
    assert not cache.pieces
    with pytest.raises(UserError, match="one number for each row"):
        patch_sweep(model_of("llama"), PAIRS, OwnMetric(lambda logits: logits.mean()), plan, template=short())


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_patching as t
class Dying(t.FolderCache):
    def put(self, key, value):
        super().put(key, value)
        if len(list(self.folder.glob("*.safetensors"))) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
from pathlib import Path
cache = Dying(Path({folder!r}))
t.patch_sweep(t.model_of("llama"), t.THREE, t.METRIC, t.ALONE, template=t.short(), cache=cache)
"""


def test_a_process_killed_with_kill_9_is_taken_up_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = warm.python(script)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    runs: list[int] = []
    record = packed_edits.record_packed
    monkeypatch.setattr(packed_edits, "record_packed", lambda *args: runs.append(len(args[1])) or record(*args))
    truth = patch_sweep(model_of("llama"), THREE, METRIC, ALONE, template=short())
    runs.clear()
    got = patch_sweep(model_of("llama"), THREE, METRIC, ALONE, template=short(), cache=FolderCache(tmp_path))
    assert runs == [2]  # both runs of one pair
    assert gap(got.values, truth.values) < CLOSE  # numbers of another process, whose threads differ
    kept = patch_sweep(model_of("llama"), THREE, METRIC, PLAN, template=short(), cache=FolderCache(tmp_path))
    assert gap(kept.values, got.values) < 1e-12


# --- real models -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def frugal_oracle(model: Any, ids: Sequence[int], site: str, edit: Edit, read: int) -> Tensor:
    """`oracle` without the logits that nobody reads: Gemma's vocabulary has 262,144 tokens."""

    def put(value: Tensor, hook: Any) -> Tensor:
        where = (0, edit.position) if edit.head is None else (0, edit.position, edit.head)
        value[where] = edit.value
        return value

    with model.hooks(fwd_hooks=[(site_hook(site, edit.layer), put)]):
        keep = torch.tensor([read])
        return model.original_model(torch.tensor([list(ids)]), logits_to_keep=keep).logits[0, -1]


@pytest.mark.real
def test_smollm2(smollm2: Any) -> None:
    pairs = [pair("How do I bake a cake?", "How do I rob a bank?")]
    metric = LogitDifference(40, 57)
    for site, heads in (("resid_pre", None), ("mlp_out", None), ("z", (8,)), ("k", (2,))):
        plan = PatchPlan(site, layers=(29,) if heads else (0, 29), positions=("instruction[3]", "last"), heads=heads)
        grown = patch_sweep(smollm2, pairs, metric, plan)
        plain = patch_sweep(smollm2, pairs, metric, plan, engine=PLAIN)
        assert (grown.engine, plain.engine) == (GROWING, PLAIN)
        assert gap(grown.values, plain.values) < 1e-4
        assert float(plain.effect().abs().max()) > 0.01


GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.mark.real
@pytest.mark.parametrize("repeats", [0, 130])
def test_gemma3_prompts_shorter_and_longer_than_the_window(gemma3: Any, repeats: int) -> None:
    tokenizer = loaded(gemma3).tokenizer
    asking = ChatTemplate(_with_template(tokenizer))
    words = "so it goes on " * repeats
    batch = tokenize([Prompt("a", f"{words}bake a cake"), Prompt("b", f"{words}rob a bank")], asking)
    source, ids = batch.row(0), batch.row(1)
    assert len(source) == len(ids)
    assert (len(ids) > 512) == (repeats > 0)  # its sliding window
    read = len(ids) - 1
    places = [(3, int(batch.at("inst")[1]), None), (11, int(batch.at("inst")[1]) - 2, None), (17, read, None)]
    sites = {"resid_pre": places[:1], "z": [(6, read, 1)]}  # three whole passes for each edit, one in float64
    if not repeats:
        sites = {"resid_pre": places, "v": [(5, places[0][1], 0), (12, read, 0)], "attn_out": places[:1]}
    run = plain_logits_of_one(gemma3, ids)
    exact = float64_gemma() if repeats else None
    ours = theirs = 0.0
    for site, wanted in sites.items():
        found = site_values(gemma3, source, site, sorted({layer for layer, _, _ in wanted}))
        edits = [Edit(layer, place, value_at(found[layer], site, place, head), head) for layer, place, head in wanted]
        assert can_grow(gemma3, site)
        got = edited_logits(gemma3, record(gemma3, ids, read, site, ()), site, edits, read)[1:]
        plain = torch.stack([frugal_oracle(gemma3, ids, site, edit, read) for edit in edits])
        if exact is None:
            assert gap(got, plain) < 1e-4
        else:
            truth = torch.stack([exact_logits(exact, ids, site, edit, read) for edit in edits])
            ours, theirs = max(ours, gap(got.double(), truth)), max(theirs, gap(plain.double(), truth))
        assert gap(plain, run) > 0.01
        assert not has_hooks(gemma3)
    # On 532 tokens plain float32 is itself up to 3e-4 from float64, more or less by the edit and the machine.
    assert exact is None or ours < 2 * theirs < 1e-3


def float64_gemma() -> Any:
    """Hugging Face's own modules, never bridged; its norms, which compute in float32 whatever they get, in float64."""

    def exactly(norm: Any, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.eps) * (1 + norm.weight)

    model = AutoModelForCausalLM.from_pretrained(real.fetched("gemma3-270m")).double().eval()
    for module in model.modules():
        if isinstance(module, Gemma3RMSNorm):
            module.forward = functools.partial(exactly, module)
    return model


@torch.inference_mode()
def exact_logits(model: Any, ids: Sequence[int], site: str, edit: Edit, read: int) -> Tensor:
    """One whole forward of `float64_gemma` with a value put in by a hook of PyTorch's."""
    block, value = model.model.layers[edit.layer], edit.value.double()
    columns = slice(None) if edit.head is None else slice(edit.head * len(value), (edit.head + 1) * len(value))

    def put(x: Tensor) -> Tensor:
        x[0, edit.position, columns] = value
        return x

    if site == "v":
        handle = block.self_attn.v_proj.register_forward_hook(lambda module, args, out: put(out))
    else:
        module = block if site == "resid_pre" else block.self_attn.o_proj
        handle = module.register_forward_pre_hook(lambda module, args: (put(args[0]), *args[1:]))
    try:
        return model(torch.tensor([list(ids)]), logits_to_keep=torch.tensor([read])).logits[0, -1]
    finally:
        handle.remove()


@torch.inference_mode()
def plain_logits_of_one(model: Any, ids: Sequence[int]) -> Tensor:
    return model.original_model(torch.tensor([list(ids)]), logits_to_keep=1).logits[0, -1]


def _with_template(tokenizer: Any) -> Any:
    tokenizer = copy.copy(tokenizer)  # a deep one of its 262,144 tokens takes seconds
    tokenizer.chat_template = GEMMA
    return tokenizer
