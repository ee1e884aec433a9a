"""Laws of packed passes: equal to running every prompt and every edit by itself, and no token is run twice."""

import concurrent.futures
import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
import transformers
from tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mechlens.methods.patching import packed as patching
from mechlens.methods.patching.metrics import LogitDifference
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import PLAIN, patch_sweep
from mechlens.models.bridge import bridge, n_layers
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.engine import forward
from mechlens.models.engine.edits import Edit, reference_edited_logits, site_values, value_at
from mechlens.models.engine.forward import Row, fast_batch, prefix_cache
from mechlens.models.engine.packed import packing as packed
from mechlens.models.engine.packed.edits import RunEdit, packed_edited_logits, packs_edits, record_packed
from mechlens.models.engine.packed.packing import NAME, PackedAttention, pack_prompts, packs, plan_packed
from mechlens.prompts.prompt import Prompt, PromptPair
from mechlens.prompts.templates.template import ChatTemplate

pytestmark = pytest.mark.exact

CLOSE = 1e-5
OWN_ATTENTION = ("bloom", "gptj")
"""Their blocks don't call an attention by name (GPT-J's do in newer releases)."""


@functools.cache
def model_of(architecture: str) -> Any:
    hf_model = tiny_hf(architecture)
    checkpoint = Checkpoint("tiny", "tests/tiny", fingerprint=weight_fingerprint(hf_model.state_dict()))
    return bridge(hf_model, tiny_tokenizer(), checkpoint)


PROMPTS = ((5, 6, 7, 8, 9, 10), (5, 6, 7, 8), (5, 6, 7, 8), (5, 6, 7, 4, 4, 4, 4), (5, 6, 9, 3), (5, 6, 7, 8, 9, 11))
"""One is another's beginning, two are the same, and they part at various tokens."""


@torch.inference_mode()
def residuals(hf_model: Any, ids: Sequence[int]) -> Tensor:
    """What enters every block, by plain Hugging Face."""
    states = hf_model.base_model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack(states[:-1])[:, 0]


def apart(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("skip", [0, 2])
def test_prompts_in_one_line_equal_each_prompt_alone(architecture: str, skip: int) -> None:
    model, plain = model_of(architecture), tiny_hf(architecture)
    assert packs(model, 8) or architecture in OWN_ATTENTION
    rows = [Row(ids, (len(ids) - 2, len(ids) - 1)) for ids in PROMPTS]
    levels = list(range(n_layers(model)))
    found = fast_batch(model, rows, levels, prefix_cache(model, PROMPTS[0][:skip]))
    for row, values in zip(rows, found, strict=True):
        assert apart(values, residuals(plain, row.ids)[:, list(row.read)].float()) < CLOSE


def test_a_token_is_run_once_for_all_prompts_that_share_all_before_it() -> None:
    draw = random.Random(0)
    for skip in (0, 1, 3):
        for _ in range(50):
            start = [draw.randrange(3) for _ in range(skip)]
            prompts = [start + [draw.randrange(3) for _ in range(draw.randrange(1, 6))] for _ in range(8)]
            packing, paths = pack_prompts(prompts, skip)
            distinct = {tuple(ids[: k + 1]) for ids in prompts for k in range(skip, len(ids))}
            assert len(packing.ids) == len(distinct)
            for ids, path in zip(prompts, paths, strict=True):
                assert packing.ids[path].tolist() == ids[skip:]
                assert packing.positions[path].tolist() == list(range(skip, len(ids)))


def test_every_prompt_is_in_one_pass_of_bounded_size() -> None:
    draw = random.Random(1)
    for skip in (0, 2):
        for most in (1, 7, 20, 1000):
            prompts = [[0] * skip + [draw.randrange(3) for _ in range(draw.randrange(1, 9))] for _ in range(30)]
            passes = plan_packed(prompts, most, skip)
            assert sorted(itertools.chain(*passes)) == list(range(30))
            sizes = [len(pack_prompts([prompts[i] for i in one], skip)[0].ids) for one in passes]
            assert all(
                size <= most or len({tuple(prompts[i]) for i in one}) == 1
                for size, one in zip(sizes, passes, strict=True)
            )
            assert most < 1000 or len(passes) == 1


def test_attention_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    rows = [Row(ids, (len(ids) - 1,)) for ids in PROMPTS]
    whole = fast_batch(model, rows, [2], None)
    monkeypatch.setattr(packed, "SCORES_AT_ONCE", 256)
    monkeypatch.setattr(packed, "PIECE", 3)
    assert apart(fast_batch(model, rows, [2], None), whole) < CLOSE


def test_short_rows_are_not_padded_to_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions after two long starts: a mask that gave each as many queries as a start took gigabytes."""
    model, most = model_of("llama"), 1 << 14
    monkeypatch.setattr(packed, "SCORES_AT_ONCE", most)
    starts = [tuple(5 + (i * k) % 200 for i in range(300)) for k in (1, 3)]
    rows = [Row((*starts[i % 2], 5 + i, 7), (301,)) for i in range(60)]
    attended, scores = packed._attended, []

    def counted(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        scores.append(len(q) * q.shape[2] * k.shape[2])  # the two heads of a group side by side
        return attended(q, k, *rest)

    monkeypatch.setattr(packed, "_attended", counted)
    found = fast_batch(model, rows, [1], None)  # one block runs
    assert apart(found[0, 0, 0], residuals(tiny_hf("llama"), rows[0].ids)[1, 301].float()) < CLOSE
    needed = 2 * (2 * 300 * 300 + 60 * 2 * 302)
    assert sum(scores) < 1.5 * needed
    assert max(scores) <= 2 * max(most, packed.PIECE * 302)


def test_rows_longer_than_a_sliding_window_are_not_packed() -> None:
    """Tiny's windows are 16 tokens, which the short trial of an architecture can't show."""
    model, plain = model_of("gemma3"), tiny_hf("gemma3")
    assert packs(model, 16)
    assert not packs(model, 17)
    rows = [Row(tuple(5 + (i * i + k) % 200 for i in range(24)), (23,)) for k in range(3)]
    found = fast_batch(model, rows, [0, 1, 2], None)
    for row, values in zip(rows, found, strict=True):
        assert apart(values[:, 0], residuals(plain, row.ids)[:, 23].float()) < CLOSE


def test_queries_scaled_by_their_place_in_a_pass_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 counts the tokens of a pass, from the 8192nd on; here from the 16th."""
    settings = {**tiny.HEAD, "floor_scale": 16, "attn_scale": 1.0, "no_rope_layers": [1, 0, 1]}
    make = lambda: transformers.Llama4TextConfig(num_local_experts=4, intermediate_size_mlp=64, **settings)  # noqa: E731
    monkeypatch.setitem(tiny.MORE, "scaled", make)
    model, plain = bridge(tiny_hf("scaled"), tiny_tokenizer(), Checkpoint("scaled", "tests/scaled")), tiny_hf("scaled")
    rows = [Row(tuple(5 + (i * i + k) % 200 for i in range(12)), (11,)) for k in range(3)]
    found = fast_batch(model, rows, [0, 1, 2], None)
    for row, values in zip(rows, found, strict=True):
        assert apart(values[:, 0], residuals(plain, row.ids)[:, 11].float()) < CLOSE


def test_two_models_in_two_threads() -> None:
    """Hugging Face's names of attentions are one table for all models."""
    prompts = [tuple(5 + (i * i + k) % 200 for i in range(3 + k)) for k in range(20)]
    rows = [Row(ids, (len(ids) - 1,)) for ids in prompts]
    models = [model_of("llama"), model_of("qwen2")]
    alone = [fast_batch(model, rows, [2], None) for model in models]

    def same(i: int) -> bool:
        return all(torch.equal(fast_batch(models[i], rows, [2], None), alone[i]) for _ in range(20))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert all(pool.map(same, (0, 1)))


def test_an_error_in_a_packed_pass_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    before = model.original_model.config._attn_implementation
    assert packs(model, 8)
    monkeypatch.setattr(PackedAttention, "__call__", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fast_batch(model, [Row(ids, (1,)) for ids in PROMPTS], [2], None)
    assert model.original_model.config._attn_implementation == before
    assert not any(name.startswith(NAME) for name in ALL_ATTENTION_FUNCTIONS)


# --- edits ------------------------------------------------------------------------------------------------------


RUNS = ((5, 6, 7, 8, 9, 10, 4), (5, 6, 30, 31, 32, 33), (40, 41, 42, 43, 44, 45))
READS = (5, 5, 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_edits_of_several_runs_equal_a_whole_pass_for_each(architecture: str, site: str) -> None:
    model = model_of(architecture)
    if not packs_edits(model, site, 8):
        assert architecture in OWN_ATTENTION or site == "z"
        return
    layers, head = range(n_layers(model)), 1 if site == "z" else None
    recorded = record_packed(model, RUNS, READS, site, layers)
    for run, ids in enumerate(RUNS):
        values = site_values(model, ids, site, layers)
        assert all(apart(recorded.runs[run].values[layer], values[layer]) < CLOSE for layer in layers)
    edits = [
        RunEdit(run, Edit(layer, at, value_at(recorded.runs[(run + 1) % 3].values[layer], site, at, head), head))
        for at in (4, 0, 2)
        for layer in (1, 0, 2)
        for run in (2, 0, 1)
    ]
    found = packed_edited_logits(model, recorded, site, edits, READS)
    for one, logits in zip(edits, found, strict=True):
        right = reference_edited_logits(model, RUNS[one.run], site, one.edit, READS[one.run])
        assert apart(logits, right) < CLOSE


PAIRS = [
    PromptPair(Prompt(f"{i}.clean", clean), Prompt(f"{i}.corrupt", corrupt))
    for i, (clean, corrupt) in enumerate((("give us a cake", "give us a bomb"), ("sell us a cake", "sell us a bomb")))
]
SHORT = "{{ messages[-1]['content'] }}<|im_end|>{% if add_generation_prompt %}<|im_start|>{% endif %}"


@pytest.mark.parametrize("mode", ["denoising", "noising"])
def test_only_what_can_change_is_run(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first token that differs both runs have the same, so patching there changes nothing: whole passes
    say so, and packed ones take it for granted."""
    model, template = model_of("llama"), ChatTemplate(tiny_tokenizer(SHORT))
    names = tuple(f"token[{k}]" for k in range(13))
    metric, plan = LogitDifference(40, 50), PatchPlan("resid_pre", positions=names, mode=mode)
    run, places = packed_edited_logits, []

    def counted(
        model: Any, recorded: Any, site: str, edits: Sequence[RunEdit], reads: Sequence[int], *tokens: Any
    ) -> Tensor:
        places.extend((one.run, one.edit.position) for one in edits)
        return run(model, recorded, site, edits, reads, *tokens)

    monkeypatch.setattr(patching, "packed_edited_logits", counted)
    ours = patch_sweep(model, PAIRS, metric, plan, template=template)
    plain = patch_sweep(model, PAIRS, metric, plan, template=template, engine=PLAIN)
    torch.testing.assert_close(ours.values, plain.values, atol=CLOSE, rtol=0)
    start = ours.corrupt if mode == "denoising" else ours.clean
    early = {run: min(at for own, at in places if own == run) for run in (0, 1)}
    assert all(at > 0 for at in early.values())
    for run_, at in early.items():
        torch.testing.assert_close(
            plain.values[run_, :, :at], start[run_].expand_as(plain.values[run_, :, :at]), atol=CLOSE, rtol=0
        )


def test_a_second_models_values_are_patched_at_every_token() -> None:
    """With another checkpoint as the source, runs of the same tokens differ from the first token on."""
    model, other = model_of("llama"), model_of("qwen2")
    assert forward.fits_fast_path(other)
    template = ChatTemplate(tiny_tokenizer(SHORT))
    plan = PatchPlan("resid_pre", positions=("token[0]", "token[3]"))
    same = [PromptPair(pair.clean, pair.clean) for pair in PAIRS]
    metric = LogitDifference(40, 50)
    ours = patch_sweep(model, same, metric, plan, template=template, source_model=other)
    plain = patch_sweep(model, same, metric, plan, template=template, source_model=other, engine=PLAIN)
    torch.testing.assert_close(ours.values, plain.values, atol=CLOSE, rtol=0)
    assert float((ours.values - ours.corrupt[:, None, None, None]).abs().min()) > CLOSE
