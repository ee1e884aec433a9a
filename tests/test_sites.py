"""Laws of `collect` beyond the residual stream at one token: any site, spans, answers, words, projections."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from caches import DictShelf
from test_collect import CLOSE, bridged, one_at_a_time, pair, prompts
from tiny import ARCHITECTURES, CHATML, tiny_hf, tiny_tokenizer
from tokenizers import normalizers
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations import reading as reading_module
from mechlens.methods.activations.collect import collect, from_cache, template_of
from mechlens.methods.activations.spans import thought_in
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.thought import opens_thought
from mechlens.methods.directions.direction import direction_grid, mean_difference
from mechlens.methods.probing.detect import DetectionPlan, detect
from mechlens.models.sites import SITES, site_hook
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.builtin import builtin_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import split_by_family
from mechlens.registry import whole_numbers

EVERY = ("inst", "post[*]")
WITHOUT = {
    "phi": ("resid_mid",),
    "neox": ("resid_mid",),
    "gptj": ("resid_mid",),
    "mixtral": ("mlp_post",),
}
"""Sites that an architecture doesn't have: parallel blocks nothing between attention and MLP, experts no one MLP."""


def sites_of(architecture: str) -> list[str]:
    return [site for site in SITES if site not in WITHOUT.get(architecture, ())]


@torch.inference_mode()
def caches_of(model: Any, batch: TokenBatch) -> list[Any]:
    """TransformerLens' own cache of every prompt alone."""
    alone = (torch.tensor([batch.row(i)]) for i in range(len(batch.prompts)))
    return [model.run_with_cache(tokens, use_cache=False)[1] for tokens in alone]


def hooked(caches: Sequence[Any], batch: TokenBatch, site: str, names: Sequence[str], depth: int) -> Tensor:
    """What they hold at a site; patterns end with NaN up to the longest prompt."""
    longest = int(batch.lengths.max())
    found = []
    for i, cache in enumerate(caches):
        layers = torch.stack([cache[site_hook(site, layer)][0] for layer in range(depth)])
        if site == "pattern":
            layers = torch.nn.functional.pad(layers.movedim(1, 2), (0, longest - layers.shape[-1]), value=torch.nan)
        found.append(layers[:, [int(batch.at(name)[i]) - batch.offset(i) for name in names]])
    return torch.stack(found)


def assert_equal(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan())
    scale = float(want.nan_to_num().abs().max())
    assert float((got - want).nan_to_num().abs().max()) <= CLOSE * scale


# --- any site --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_site_equals_one_prompt_at_a_time(architecture: str) -> None:
    model, _ = pair(architecture)
    for side in ("right", "left"):
        batch = tokenize(prompts(4), template_of(model), padding_side=side)
        caches = caches_of(model, batch)
        for site in sites_of(architecture):
            acts = collect(model, batch, site=site, positions=EVERY)
            assert acts.engine == "fast", (site, acts.why_plain)
            assert acts.axes == SITES[site].axes
            assert_equal(acts.values, hooked(caches, batch, site, acts.positions, model.cfg.n_layers))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if WITHOUT.get(name)])
def test_a_site_that_there_is_not_is_refused(architecture: str) -> None:
    model, _ = pair(architecture)
    for site in WITHOUT[architecture]:
        with pytest.raises(UserError, match=site):
            collect(model, prompts(2), site=site)


def test_blocks_of_different_sizes_are_read_apart() -> None:
    """Gemma 4, whose global attention has larger heads than its local one."""
    model = bridged(tiny_hf("gemma4"))
    with pytest.raises(UserError, match=r"another size in some blocks .*levels=\[0, 1\]"):
        collect(model, prompts(2), site="z")
    batch = tokenize(prompts(2), template_of(model))
    for levels, d_head in (([0, 1], 8), ([2], 512)):
        acts = collect(model, batch, site="z", positions=["last"], levels=levels)
        assert acts.values.shape == (2, len(levels), 1, 4, d_head)


@torch.inference_mode()
def test_sites_are_what_plain_hugging_face_computes() -> None:
    """Llama, whose modules have these values as their inputs and outputs."""
    model, plain = pair("llama")
    batch = tokenize(prompts(3), template_of(model))
    heads, kv = plain.config.num_attention_heads, plain.config.num_key_value_heads
    parts = {
        "z": lambda block: (block.self_attn.o_proj, 0), "mlp_post": lambda block: (block.mlp.down_proj, 0),
        "attn_out": lambda block: (block.self_attn.o_proj, 1), "mlp_out": lambda block: (block.mlp, 1),
        "q": lambda block: (block.self_attn.q_proj, 1), "k": lambda block: (block.self_attn.k_proj, 1),
        "v": lambda block: (block.self_attn.v_proj, 1), "resid_mid": lambda block: (block.post_attention_layernorm, 0),
    }  # fmt: skip
    for site, part in parts.items():
        want = []
        for i in range(len(batch.prompts)):
            seen = seen_in([part(block) for block in plain.model.layers], plain, batch.row(i))
            last = torch.stack(seen)[:, 0, -1]
            split = {"z": heads, "q": heads, "k": kv, "v": kv}.get(site)
            want.append(last if split is None else last.unflatten(1, (split, -1)))
        assert_equal(collect(model, batch, site=site, positions=["last"]).values[:, :, 0], torch.stack(want))


def seen_in(places: Sequence[tuple[Any, int]], plain: Any, ids: list[int]) -> list[Tensor]:
    """The input (0) or output (1) of each module in one pass."""
    seen: list[Tensor] = []

    def seeing(side: int) -> Any:
        return lambda module, args, out: seen.append((args[0], out)[side])

    handles = [module.register_forward_hook(seeing(side)) for module, side in places]
    plain(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_the_plain_path_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("gemma3")
    fast = {site: collect(model, prompts(), site=site, positions=EVERY) for site in SITES}
    monkeypatch.setattr("mechlens.methods.activations.collect.why_plain_at", lambda model, site: "asked for")
    with pytest.warns(UserWarning, match="asked for"):
        plain = {site: collect(model, prompts(), site=site, positions=EVERY) for site in SITES}
    for site, acts in plain.items():
        assert (acts.engine, fast[site].engine) == ("plain", "fast")
        assert_equal(fast[site].values, acts.values)


def test_blocks_in_any_order_and_nothing_above_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("qwen2")
    whole = collect(model, prompts(), site="attn_out")
    some = collect(model, prompts(), site="attn_out", levels=[2, 0])
    assert torch.equal(some.values, whole.values[:, [2, 0]])
    ran: list[int] = []
    layer = transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer
    forward = layer.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(self.self_attn.layer_idx)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", counted)
    collect(model, prompts(), site="z", levels=[0])
    assert set(ran) == {0, 1, 2}  # the trial and the shared start
    ran.clear()
    collect(model, prompts()[:1], site="z", levels=[0])
    assert ran == [0]
    ran.clear()
    with pytest.raises(UserError, match=r"there is no block \[3\]; this model has blocks 0 to 2"):
        collect(model, prompts(), site="z", levels=[3])
    with pytest.raises(UserError, match="no site 'zz'"):
        collect(model, prompts(), site="zz")
    assert not ran


@pytest.mark.parametrize("site", ["resid", *SITES])
def test_from_cache_equals_collect(site: str) -> None:
    model, _ = pair("llama")
    for side in ("right", "left"):
        batch = tokenize(prompts(4), template_of(model), padding_side=side)
        with torch.inference_mode():
            mask = batch.mask.long()
            _, cache = model.run_with_cache(batch.tokens, attention_mask=mask, use_cache=False)
        got = from_cache(cache, batch, model, ["inst", "last"], site=site)
        want = collect(model, batch, site=site, positions=["inst", "last"])
        assert (got.levels, got.positions, got.axes) == (want.levels, want.positions, want.axes)
        assert_equal(got.values, want.values)


@pytest.mark.real
def test_every_site_of_smollm2_equals_one_prompt_at_a_time(smollm2: Any) -> None:
    batch = tokenize(builtin_prompts("harmful")[:2] + builtin_prompts("benign")[:1], template_of(smollm2))
    caches = caches_of(smollm2, batch)
    for site in ("resid_mid", "mlp_post", "k", "z", "pattern"):
        acts = collect(smollm2, batch, site=site, positions=["inst", "last"])
        assert acts.engine == "fast"
        want = hooked(caches, batch, site, acts.positions, smollm2.cfg.n_layers)
        scale = want.nan_to_num().abs().flatten(2).amax(dim=-1).amax(dim=0)  # of each block
        gap = (acts.values - want).nan_to_num().abs().flatten(2).amax(dim=-1).amax(dim=0)
        assert float((gap / scale).max()) < 1e-4, site


# --- any token -------------------------------------------------------------------------------------------------------


def test_a_span_is_its_tokens_and_its_mean() -> None:
    model, _ = pair("llama")
    batch = tokenize(prompts(), template_of(model))
    opened = collect(model, batch, positions=["instruction[*]", "last"])
    lengths = (batch.instruction[:, 1] - batch.instruction[:, 0] + 1).tolist()
    assert opened.mask is not None
    assert opened.mask[:, :-1].sum(dim=1).tolist() == lengths
    assert bool(opened.values.isnan().flatten(3).all(dim=-1)[:, 0].eq(~opened.mask).all())
    assert not bool(opened.values.isnan()[opened.mask.unsqueeze(1).expand(-1, 4, -1)].any())
    for k, n in enumerate(lengths):
        last_word = collect(model, batch.select([k]), positions=["inst"])
        assert_equal(opened.values[k, :, n - 1], last_word.values[0, :, 0])
    mean = collect(model, batch, positions=["instruction[*]", "last"], reduce="mean")
    assert mean.positions == ("instruction[*]", batch.positions[-1])
    assert mean.mask is None
    assert_equal(mean.values[:, :, 0], opened.values[:, :, :-1].nanmean(dim=2))
    assert_equal(mean.values[:, :, 1], opened.values[:, :, -1])


def test_every_token_of_a_prompt_equals_plain_hugging_face() -> None:
    model, plain = pair("gemma2")
    batch = tokenize(prompts(4), template_of(model))
    acts = collect(model, batch, positions=["prompt[*]"])
    assert acts.positions == tuple(f"token[{k}]" for k in range(int(batch.lengths.max())))
    for i in range(4):
        names = [f"token[{k}]" for k in range(len(batch.row(i)))]
        assert_equal(acts.values[i : i + 1, :, : len(names)], one_at_a_time(plain, batch.select([i]), names))


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_answers_show_what_a_cached_decode_saw(architecture: str) -> None:
    """Hidden states of Hugging Face's own generation, token by token with its cache."""
    model, plain = pair(architecture)
    batch = tokenize(prompts(4), template_of(model))
    given = answer(model, batch, max_new_tokens=6)
    acts = collect(model, batch, positions=["last", "answer[*]"], answers=given.tokens)
    for i, tokens in enumerate(given.tokens):
        out = plain.generate(
            torch.tensor([batch.row(i)]), max_new_tokens=len(tokens) + 1, do_sample=False,
            output_hidden_states=True, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
            attention_mask=torch.ones(1, len(batch.row(i))),
        )  # fmt: skip
        assert out.sequences[0, len(batch.row(i)) :][: len(tokens)].tolist() == list(tokens)
        steps = [torch.stack(step)[:3, 0, -1] for step in out.hidden_states]  # the last one here is after the norm
        assert_equal(acts.values[i, :3, : len(steps)], torch.stack(steps, dim=1))


def test_answers_of_other_lengths_and_in_words() -> None:
    model, _ = pair("llama")
    batch = tokenize(prompts(3), template_of(model), padding_side="left")
    texts = ["yes", "a much longer answer", ""]
    acts = collect(model, batch, positions=["last", "answer[0]", "answer[-1]", "answer[*]"], answers=texts)
    assert acts.mask is not None
    assert acts.mask[:, :3].tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    alone = collect(model, batch.select([1]), positions=["answer[-1]"], answers=texts[1:2])
    assert_equal(acts.at(1, "answer[-1]")[1:2], alone.at(1, "answer[-1]"))
    # The prompt doesn't see what follows it.
    assert_equal(acts.at(2, "last"), collect(model, batch, positions=["last"]).at(2, "last"))
    with pytest.raises(UserError, match="no answers"):
        collect(model, batch, positions=["answer[0]"])
    with pytest.raises(UserError, match="2 answers came for 3 prompts"):
        collect(model, batch, positions=["answer[0]"], answers=texts[:2])
    with pytest.raises(UserError, match=r"'p0' has no answer\[\d+\]; collect the span with"):
        direction_grid(acts, "a", "b")
    both = acts.select([0, 1])
    found = mean_difference(both, "a", "b", 1, "answer[0]").vector
    assert_equal(found, both.at(1, "answer[0]")[0] - both.at(1, "answer[0]")[1])


@pytest.mark.parametrize("special", [True, False])
def test_thoughts_are_found_in_tokens(special: bool) -> None:
    tokenizer = tiny_tokenizer(extra=("<think>", "</think>") if special else ())

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    thought, said = "hm, let me see", "\nno"
    whole = ids("<think>") + ids(thought) + ids("</think>") + ids(said)
    first, last, close = thought_in(whole, tokenizer, opened=False)
    assert tokenizer.decode(whole[first:last]) == thought
    assert tokenizer.decode(whole[close + 1 :], skip_special_tokens=False) == said
    assert tokenizer.decode(whole[: close + 1], skip_special_tokens=False).endswith("</think>")
    assert thought_in(ids(said), tokenizer, opened=False) == (0, 0, -1)
    unfinished = ids("<think>") + ids(thought)
    assert thought_in(unfinished, tokenizer, opened=False) == (len(ids("<think>")), len(unfinished), -1)
    begun = ids(thought) + ids("</think>")
    assert thought_in(begun, tokenizer, opened=True) == (0, len(ids(thought)), len(begun) - 1)
    assert thought_in(ids("<think></think>"), tokenizer, opened=False)[0] == len(ids("<think>"))
    for text in ("a<think>b</think>c<think>d</think>", "a</think><think>b</think>c"):  # the first that begins
        first, last, _ = thought_in(ids(text), tokenizer, opened=False)
        assert tokenizer.decode(ids(text)[first:last]) == "b"


def test_thoughts_are_read_where_they_are() -> None:
    model = bridged(tiny_hf("llama"), tiny_tokenizer())
    batch = tokenize(prompts(2), template_of(model))
    texts = ["<think>ab</think>c", "no thought"]
    acts = collect(model, batch, positions=["think[*]", "think_end", "answer[*]"], answers=texts, reduce="mean")
    assert acts.mask is not None
    assert acts.mask.tolist() == [[True, True, True], [False, False, True]]
    by_token = collect(model, batch, positions=["answer[*]"], answers=texts)
    start, end = (
        len(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]) for text in ("<think>", "<think>ab</think>")
    )
    assert_equal(acts.values[0, :, 0], by_token.values[0, :, start : start + 2].mean(dim=1))
    assert_equal(acts.values[0, :, 1], by_token.values[0, :, end - 1])


@pytest.mark.parametrize("opened", [True, False])
def test_whether_the_template_opens_a_thought_is_not_read_in_the_answer(opened: bool) -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}") if opened else CHATML
    tokenizer = tiny_tokenizer(template)
    model = bridged(tiny_hf("llama"), tokenizer)
    texts = [("" if opened else "<think>") + text for text in ("hm</think>x", "hm")]
    batch = tokenize(prompts(2), template_of(model))
    marked = batch.with_answers([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
    assert opens_thought(marked, tokenizer) == opens_thought(batch, tokenizer) == (opened, opened)
    acts = collect(model, batch, positions=["think[*]", "think_end"], answers=texts, levels=[0])
    assert acts.mask is not None
    assert acts.mask.tolist() == [[True, True, True], [True, True, False]]


def test_a_token_that_two_spans_name_alike_is_one_column() -> None:
    model, _ = pair("llama")
    acts = collect(model, prompts(2), positions=["answer[0]", "answer[*]", "answer[-1]"], answers=["ab", "c"])
    assert acts.positions == ("answer[0]", "answer[1]", "answer[-1]")


def test_roles_name_the_tokens_of_an_answer() -> None:
    batch = tokenize(prompts(2), template_of(pair("llama")[0]), padding_side="left")
    answered = batch.with_answers([[7, 8], []])
    assert answered.roles(0) == [*batch.roles(0), "answer[0]", "answer[1]"]
    assert answered.roles(1) == batch.roles(1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"reduce": "sum"}, "reduce is 'sum'"),
        ({"positions": "last"}, "the one name 'last'"),
        ({"answers": "abc"}, "answers is one text"),
        ({"answers": [[-1], [5], [6]]}, "has the token -1"),
        ({"answers": [[5] * 600, [5], [6]]}, "'p0' has .* tokens with its answer and the model takes 512"),
        ({"words": {"place": "the"}}, "which is none of the positions"),
        ({"words": {"last": "the"}, "positions": ["last"]}, "a position of its own"),
        ({"words": {"token": "the"}, "positions": ["token"]}, "a position of its own"),
        ({"levels": []}, "there is no level to read; this model has levels 0 to 3"),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        inspect.unwrap(collect)(pair("llama")[0], prompts(3), **wrong)  # types are checked in tests only


def test_levels_become_plain_numbers() -> None:
    """Those of NumPy too, which types refuse in tests only: a cache's keys couldn't be made of them."""
    assert [type(level) for level in whole_numbers("levels", np.arange(2), "level")] == [int, int]
    with pytest.raises(UserError, match="levels has True"):
        whole_numbers("levels", [True], "level")


def test_words_that_the_tokenizer_drops_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    model = bridged(tiny_hf("llama"), tokenizer)
    asked = [Prompt("a", "the\u200bcat")]
    assert collect(model, asked, positions=["x"], words={"x": "cat"}, reduce="mean").mask is None
    with pytest.raises(UserError, match="drops the words"):
        collect(model, asked, positions=["x"], words={"x": "\u200b"})


def test_words_of_the_user_are_found() -> None:
    model, _ = pair("llama")
    asked = [Prompt("a", "where is the Eiffel tower now"), Prompt("b", "tower: where is Big Ben")]
    acts = collect(
        model, asked, positions=["place", "inst"], words={"place": ["Eiffel tower", "Big Ben"]}, reduce="mean"
    )
    batch = tokenize(asked, template_of(model))
    row = batch.row(1)[int(batch.instruction[1, 0]) :]
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(row).startswith("tower: where is Big Ben")
    tokens = collect(model, asked[1:], positions=["instruction[*]"])
    n = len(tokenizer("Big Ben", add_special_tokens=False)["input_ids"])
    assert_equal(acts.values[1, :, 0], tokens.values[0, :, -n:].mean(dim=1))
    with pytest.raises(UserError, match="don't stand in prompt 'b'"):
        collect(model, asked, positions=["place"], words={"place": "Eiffel"})
    with pytest.raises(UserError, match="'place' has 1 string for 2 prompts"):
        collect(model, asked, positions=["place"], words={"place": ["Eiffel"]})


# --- what becomes of it ----------------------------------------------------------------------------------------------


def test_projections_are_those_of_the_vectors() -> None:
    model, _ = pair("llama")
    whole = collect(model, prompts(), positions=["instruction[*]", "last"], reduce="mean")
    directions = [mean_difference(whole, "a", "b", level, "last") for level in (1, 2)]
    found = collect(model, prompts(), positions=["instruction[*]", "last"], reduce="mean", project=directions)
    assert (found.axes, found.dims) == (("direction",), ("prompt", "level", "position", "direction"))
    assert_equal(found.values, whole.values @ torch.stack([d.unit for d in directions]).T)
    with pytest.raises(UserError, match="project is empty"):
        collect(model, prompts(), project=[])
    with pytest.raises(UserError, match="have 32 numbers and the values at mlp_post 64"):
        collect(model, prompts(), site="mlp_post", project=directions)
    one = directions[0]
    with pytest.raises(UserError, match="have 8 and 32 numbers"):
        collect(model, prompts(), project=[one, replace(one, vector=one.vector[:8])])
    folded = replace(one, checkpoint=replace(one.checkpoint, regime="folded"))
    with pytest.raises(UserError, match="was made with folded weights and the model has raw ones"):
        collect(model, prompts(), project=[one, folded])
    other = replace(one, checkpoint=replace(one.checkpoint, fingerprint="another"))  # as in a comparison
    assert_equal(collect(model, prompts(), project=[other]).values, collect(model, prompts(), project=[one]).values)


def test_labels_of_every_axis() -> None:
    model, _ = pair("llama")
    acts = collect(model, prompts(3), site="z", positions=["inst", "last"])
    assert acts.dims == ("prompt", "level", "position", "head", "d_head")
    assert tuple(map(len, acts.coords.values())) == tuple(acts.values.shape)
    assert torch.equal(acts["z", 1, "last"], acts.at(1, "last"))
    assert torch.equal(acts[1, "last"], acts.at(1, "last"))
    with pytest.raises(UserError, match="of z, not of q"):
        acts["q", 1, "last"]
    frame = acts.to_frame()
    assert frame.shape == (3 * 3 * 2, 4 * 8)
    row = frame.xs(("p1", 2, "inst"), level=("id", "level", "position"))
    assert torch.equal(torch.tensor(row.to_numpy()[0]).view(4, 8), acts.at(2, "inst")[1])
    assert float(row[(3, 5)].iloc[0]) == float(acts.at(2, "inst")[1, 3, 5])
    ragged = collect(model, prompts(3), positions=["instruction[*]"], levels=[1])
    assert ragged.mask is not None
    assert len(ragged.to_frame()) == int(ragged.mask.sum())
    assert not ragged.to_frame().isna().to_numpy().any()


def test_heads_and_neurons_can_be_probed() -> None:
    """A head that writes the label is found, and no other: planted in the weights' own output."""
    model, _ = pair("llama")
    many = [Prompt(f"p{i}", f"{'good' if i % 2 else 'evil'} {i}", label="ab"[i % 2]) for i in range(60)]
    acts = collect(model, many, site="z", positions=["last"])
    with pytest.raises(UserError, match="take one head's"):
        direction_grid(acts, "a", "b")
    sign = torch.tensor([1.0 if label == "a" else -1.0 for label in acts.labels])
    planted = torch.randn(acts.values.shape, generator=torch.Generator().manual_seed(0))
    planted[:, 2, 0, 1, 3] += 4 * sign
    found = replace(acts, values=planted)
    split = split_by_family(found.labels, found.families, fractions=(0.5, 0.2, 0.3), seed=0)
    areas = [detect(found.head(h), "a", "b", split, DetectionPlan(seed=0)).at("last").auroc.value for h in range(4)]
    assert areas[1] > 0.95
    assert max(areas[0], areas[2], areas[3]) < 0.85
    direction = mean_difference(found.head(1), "a", "b", 2, "last")
    assert direction.site == "z[1]"
    assert int(direction.vector.abs().argmax()) == 3
    with pytest.raises(UserError, match="no head 4"):
        acts.head(4)
    neurons = collect(model, many, site="mlp_post", positions=["last"])
    assert mean_difference(neurons, "a", "b", 1, "last").vector.shape == (64,)
    with pytest.raises(UserError, match="no heads"):
        neurons.head(0)
    spread = collect(model, many, positions=["instruction[*]"])
    with pytest.raises(UserError, match=r"has no instruction\[\d+\]"):
        detect(spread, "a", "b", split, DetectionPlan(seed=0))
    pattern = collect(model, many, site="pattern", positions=["last"])
    with pytest.raises(UserError, match="have different keys"):
        detect(pattern.head(0), "a", "b", split, DetectionPlan(seed=0))


def test_nothing_is_taken_for_something_else_on_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("llama")
    batch, shelf = tokenize(prompts(), template_of(model)), DictShelf()
    asked: list[dict[str, Any]] = [
        {"positions": ["last"]}, {"site": "attn_out", "positions": ["last"]},
        {"site": "mlp_out", "positions": ["last"]},
        {"positions": ["instruction[*]"]}, {"positions": ["instruction[*]"], "reduce": "mean"},
    ]  # fmt: skip
    first = [collect(model, batch, cache=shelf, **how) for how in asked]
    fresh = [collect(model, batch, **how) for how in asked]
    monkeypatch.setattr(reading_module, "halving", None)  # nothing is run again
    again = [collect(model, batch, cache=shelf, **how) for how in asked]
    for one, two, three in zip(first, fresh, again, strict=True):
        assert_equal(one.values, two.values)
        assert torch.equal(one.values.nan_to_num(), three.values.nan_to_num())
