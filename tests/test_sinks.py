"""Sinks: found where they were planted, and every measure as it is defined, by hand and on plain transformers."""

import math
from typing import Any

import pytest
import torch
from planted_sinks import DIMENSION, SINK_HEADS, SIZE, planted_sinks
from tiny import tiny_hf, tiny_tokenizer

from mechlens.errors import UserError
from mechlens.methods.patching.heads import without_heads
from mechlens.methods.sinks import measures
from mechlens.methods.sinks.found import Sinks, _places, find_sinks
from mechlens.methods.sinks.positions import PositionMass
from mechlens.methods.sinks.reading import measure_sinks
from mechlens.methods.sinks.result import SinkMap
from mechlens.methods.statistics.resample import family_weights, mean_estimate
from mechlens.models.attention.watch import watch
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint

TEXTS = ["abc def x ghi jkl mno pqr stu", "one thing x and another thing after it", "the x stands here near the start"]


def causal(n: int, window: int = 1000) -> torch.Tensor:
    own, key = torch.arange(n)[:, None], torch.arange(n)
    return (key <= own) & (own - key < window)


def even(n: int, visible: torch.Tensor) -> torch.Tensor:
    return (visible / visible.sum(dim=1, keepdim=True)).expand(1, n, n)


def to_one(n: int, sink: int, share: float) -> torch.Tensor:
    """Each query after the sink gives it a share of its attention and the rest to itself."""
    pattern = torch.eye(n)
    pattern[sink + 1 :, sink] = share
    pattern[range(sink + 1, n), range(sink + 1, n)] = 1 - share
    return pattern[None]


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", [0, 3])
def test_a_planted_sink_has_its_share_of_the_mass_wherever_it_stands(sink: int) -> None:
    pattern, visible = to_one(64, sink, 0.6), causal(64)
    # Queries before it see no sink, and it and they have no choice.
    chosen = 63 - sink + (1 if sink else 0)
    expected = (0.6 * (63 - sink) + (1 if sink else 0)) / chosen
    assert float(measures.sink_mass(pattern, visible, [sink])) == pytest.approx(expected)
    assert float(measures.sink_rate(pattern, visible, [sink])) == 1
    assert float(measures.received(pattern, visible)[0, sink]) == pytest.approx((0.6 * (63 - sink) + 1) / (64 - sink))
    assert float(measures.first_share(pattern)) == pytest.approx(0.6 if sink == 0 else 0.0)


def test_even_attention_has_no_sink() -> None:
    pattern, visible = even(64, causal(64)), causal(64)
    harmonic = sum(1 / k for k in range(1, 65))
    assert float(measures.received(pattern, visible)[0, 0]) == pytest.approx(harmonic / 64)  # .074
    assert float(measures.sink_rate(pattern, visible, [0])) == 0
    assert float(measures.row_entropy(pattern, visible)) == pytest.approx(1.0, abs=1e-5)
    assert float(measures.sink_mass(pattern, visible, [0])) == pytest.approx((harmonic - 1) / 63)


def test_a_query_whose_window_has_no_sink_is_not_counted() -> None:
    visible = causal(32, window=8)
    pattern = even(32, visible)
    assert float(measures.sink_mass(pattern, visible, [0])) == pytest.approx(sum(1 / k for k in range(2, 9)) / 7)
    far = visible.clone()
    far[:, 0] = False
    assert measures.sink_mass(even(32, far | torch.eye(32, dtype=torch.bool)), far, [0]).isnan().all()


def test_the_rate_is_of_the_first_64_tokens() -> None:
    pattern = torch.cat([to_one(64, 0, 0.9), torch.zeros(1, 136, 64)], dim=1)
    pattern = torch.nn.functional.pad(pattern, (0, 136))
    pattern[0, range(64, 200), range(64, 200)] = 1.0
    assert float(measures.sink_rate(pattern, causal(200), [0])) == 1
    assert float(measures.sink_rate(pattern, causal(200), [100])) == 0


@pytest.mark.parametrize(("n", "rate"), [(63, 0), (64, 1), (65, 1), (200, 1)])
def test_the_rate_is_above_three_tenths_of_64_queries_and_of_no_more(n: int, rate: int) -> None:
    """The 64th query lifts the mean just above .3, and one more, or one less, would not have."""
    pattern = torch.zeros(1, n, n)
    pattern[0, :63, 0] = 0.2999
    pattern[0, 63:64, 0] = 0.31
    assert float(measures.sink_rate(pattern, causal(n), [0])) == rate


def test_the_sink_logit_is_a_difference_of_logits() -> None:
    visible = causal(16)
    logits = torch.zeros(1, 16, 16).masked_fill(~visible, -torch.inf)
    logits[:, :, 2] += 5.0
    assert float(measures.sink_logit(logits, visible, [2])) == pytest.approx(5.0)
    assert float(measures.sink_logit(logits + 7.0, visible, [2])) == pytest.approx(5.0)


def test_of_two_sinks_a_query_counts_those_that_it_sees() -> None:
    n, sinks, sizes = 20, [0, 3], {0: 2.0, 3: 5.0}
    visible, logits = causal(n), torch.zeros(1, n, n)
    for sink, size in sizes.items():
        logits[:, :, sink] = size
    pattern = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    shares, gaps = [], []
    for query in range(1, n):  # the first has no choice
        seen = [sizes[sink] for sink in sinks if sink <= query]
        whole = sum(math.exp(size) for size in seen) + query + 1 - len(seen)
        shares.append(sum(math.exp(size) for size in seen) / whole)
        gaps.append(sum(seen) / len(seen))  # the others' logits are 0
    masked = logits.masked_fill(~visible, -torch.inf)
    assert float(measures.sink_logit(masked, visible, sinks)) == pytest.approx(sum(gaps) / len(gaps))
    assert float(measures.sink_mass(pattern, visible, sinks)) == pytest.approx(sum(shares) / len(shares), rel=1e-5)
    assert float(measures.sink_rate(pattern, visible, sinks)) == 1  # of the second alone
    assert float(measures.sink_rate(pattern, visible, [0])) == 0


def test_drained_values_and_peaks_are_what_was_planted() -> None:
    norms = torch.ones(2, 20)
    norms[0, [0, 3]], norms[1, 3] = 0.1, 12.0
    assert measures.sinks_against_others(norms, [0, 3]).tolist() == pytest.approx([0.1, 6.5])
    assert measures.residual_peak(norms, [0, 3]).tolist() == pytest.approx([0.1, 12.0])
    norms[1, 7] = 6.0
    assert measures.residual_peak(norms, [0, 3]).tolist() == pytest.approx([0.1, 2.0])
    residual = torch.ones(6, 8)
    residual[0, 5], residual[4, 2] = -40.0, 20.0
    assert float(measures.massive(residual)) == pytest.approx(40.0)
    assert measures.massive_dimensions(residual, 2) == [(0, 5, -40.0), (4, 2, 20.0)]


def test_entropies_tell_a_sink_head_from_one_that_looks_back_and_an_even_one() -> None:
    visible = causal(64)
    back = torch.zeros(1, 64, 64)
    back[0, range(1, 64), range(63)] = 1.0
    back[0, 0, 0] = 1.0
    sink, evenly = to_one(64, 0, 1.0), even(64, visible)
    rows = [float(measures.row_entropy(one, visible)) for one in (sink, back, evenly)]
    columns = [float(measures.column_entropy(one, visible)) for one in (sink, back, evenly)]
    assert rows == pytest.approx([0.0, 0.0, 1.0], abs=1e-5)
    assert columns[0] == pytest.approx(1.0, abs=1e-5)
    assert float(measures.column_entropy(to_one(64, 20, 1.0), visible)) == pytest.approx(1.0, abs=1e-5)
    assert columns[1] < 0.2


# --- a planted model -------------------------------------------------------------------------------------------------


def test_a_planted_sink_is_found_that_is_not_the_first_token() -> None:
    model = planted_sinks("x")
    found = measure_sinks(model, TEXTS, template=None)
    ids = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    token = model.tokenizer("x")["input_ids"][0]
    assert found.sinks.places == tuple((row.index(token),) for row in ids)
    assert all(found.sinks.sure)
    assert list(found.sinks.table()["token"]) == ["x"]
    mass = found.of("mass").mean(dim=(0, 1))
    others = [head for head in range(4) if head not in SINK_HEADS]
    assert float(mass[list(SINK_HEADS)].min()) > 0.99
    assert float(mass[others].max()) < 0.15
    # Half of the heads look nowhere else: the first token gets nearly nothing from them.
    assert float(found.of("first")[:, :, list(SINK_HEADS)].max()) < 0.2
    assert bool((found.of("rate")[:, :, list(SINK_HEADS)] == 1).all())
    assert float(found.of("value").max()) < 0.02
    assert float(found.of("peak").min()) > 4
    first = found.dimensions().iloc[0]
    assert (first["dimension"], first["texts"], first["at_sink"]) == (DIMENSION, 1.0, 1.0)
    assert float(found.of("largest").max()) == pytest.approx(SIZE, rel=1e-2)
    assert bool((found.sink_heads == torch.tensor([head in SINK_HEADS for head in range(4)])).all())


@pytest.mark.parametrize(("share", "sure"), [(0.2, True), (0.19, False)])
def test_a_sink_is_one_of_a_fifth_of_all_heads(share: float, sure: bool) -> None:
    mean, heads = torch.tensor([0.1, 0.4, 0.2, math.nan]), torch.tensor([0.0, 0.1, share, math.nan])
    assert _places(mean, heads) == ((2,) if sure else (1,), sure)  # else the one that receives most stands in


def test_sinks_are_summed_up_the_commonest_first() -> None:
    each = tuple(torch.tensor([0.5, 0.4, 0.3, 0.1]) + i / 10 for i in range(3))
    places, tokens = ((0,), (0, 2), (1,)), (("a",), ("b", "."), (".",))
    table = Sinks(places, (True, True, True), tokens, each, each).table()
    assert list(table["token"]) == [".", "b", "a"]  # of equals the one that receives more
    assert table["texts"].tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert table["first_place"].tolist() == [1, 0, 0]
    assert table["received"].tolist() == pytest.approx([(0.4 + 0.6) / 2, 0.6, 0.5])


def test_a_map_has_means_over_texts_in_their_rows_and_the_largest_of_all_levels() -> None:
    draw = torch.Generator().manual_seed(0)
    heads, levels = torch.rand(10, 12, 3, 2, generator=draw), torch.rand(3, 12, 4, generator=draw)
    heads[:, :, 1] = math.nan  # a block without attention
    each = (torch.full((4,), 0.5),) * 12
    sinks = Sinks(((0,),) * 12, (True,) * 12, (("a",),) * 12, each, each)
    names = tuple(map(str, range(12)))
    found = SinkMap(heads, levels, sinks, ((),) * 12, names, names)
    table = found.table("mass", 0, 200)
    assert table[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1], [2, 0], [2, 1]]
    assert table["value"].tolist() == pytest.approx(heads[0][:, [0, 2]].mean(dim=0).flatten().tolist())
    assert ((table["low"] < table["value"]) & (table["value"] < table["high"])).all()
    assert (table["high"] - table["low"]).between(0.1, 0.6).all()  # 12 uniform numbers
    assert found.table("peak", 0, 50)["value"].tolist() == pytest.approx(levels[0].mean(dim=0).tolist())
    assert found.whole("peak", 0, 50).value == pytest.approx(float(levels[0].amax(dim=1).mean()))
    assert found.whole("mass", 0, 50).value == pytest.approx(float(heads[0][:, [0, 2]].mean()))


def _drawn_map(families: tuple[str, ...]) -> SinkMap:
    """Uniform numbers; the second block has no attention, and three texts can't tell of head 2.1."""
    draw, n = torch.Generator().manual_seed(0), len(families)
    heads, levels = torch.rand(10, n, 3, 2, generator=draw), torch.rand(3, n, 4, generator=draw)
    heads[:, :, 1], heads[:, [0, 4, 5], 2, 1] = math.nan, math.nan
    sinks = Sinks(((0,),) * n, (True,) * n, (("a",),) * n, (torch.full((4,), 0.5),) * n, (torch.full((4,), 0.5),) * n)
    return SinkMap(heads, levels, sinks, ((),) * n, tuple(map(str, range(n))), families)


def test_a_heads_interval_is_that_of_its_own_values_alone() -> None:
    families = (*"aabbccdefghi",)
    found = _drawn_map(families)
    rows = [("learned", (0, 1)), ("mass", (0, 0)), ("mass", (2, 0)), ("massive", (3,)), ("peak", (0,))]
    for measure, cell in rows:
        table = found.table(measure, 7, 300)
        row = [*table.iloc[:, : len(cell)].itertuples(index=False, name=None)].index(cell)
        alone = mean_estimate(found.of(measure)[(slice(None), *cell)], families, 7, 300)
        assert table.loc[row, ["value", "low", "high", "n"]].tolist() == pytest.approx(list(alone.row().values()))


def test_texts_that_can_not_tell_of_a_head_have_no_part_in_its_interval() -> None:
    families = (*"aabbccdefghi",)
    found = _drawn_map(families)
    table = found.table("mass", 7, 300).set_index(["layer", "head"])
    assert list(table.index) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    values = found.of("mass")[:, 2, 1].double()
    known = ~values.isnan()
    means = [float((one[known] * values[known]).sum() / one[known].sum()) for one in family_weights(families, 300, 7)]
    low, high = torch.tensor(means).quantile(torch.tensor([0.025, 0.975])).tolist()
    expected = [float(values[known].mean()), low, high, 9]
    assert table.loc[(2, 1)].tolist() == pytest.approx(expected)
    assert table["n"].tolist() == [12, 12, 12, 9]


def test_shares_of_heads_at_a_place_have_their_interval_over_prompts() -> None:
    families = (*"aabbccdefghi",)
    values = torch.rand(3, 12, 2, generator=torch.Generator().manual_seed(0))
    values[:, 3:5, 1] = math.nan
    table = PositionMass(values, ("first token", "last"), families).table(5, 200)
    for k, there in enumerate((list(range(12)), [0, 1, 2, *range(5, 12)])):
        own = [families[i] for i in there]
        for name, measure, low, high in (("mass", 0, "low", "high"), ("heads", 2, "heads_low", "heads_high")):
            alone = mean_estimate(values[measure, there, k], own, 5, 200)
            assert table.loc[k, [name, low, high]].tolist() == pytest.approx([alone.value, alone.low, alone.high])
        assert table.loc[k, "even"] == pytest.approx(float(values[1, there, k].mean()))
    assert not any(name.startswith("even_") for name in table)


def test_a_model_without_sinks_says_so() -> None:
    checkpoint = Checkpoint("tiny", "tests/tiny")
    hf_model = tiny_hf("gpt2")
    with torch.no_grad():
        for block in hf_model.transformer.h:
            block.attn.c_attn.weight[:, :64] = 0.0
            block.attn.c_attn.bias[:64] = 0.0
    sinks = find_sinks(bridge(hf_model, tiny_tokenizer(None), checkpoint), TEXTS, template=None)
    assert not any(sinks.sure)
    assert len(sinks.table()) == 0
    assert all(len(own) == 1 for own in sinks.places)  # the one that receives most stands in


def test_what_can_not_be_measured_is_said() -> None:
    model = planted_sinks()
    with pytest.raises(UserError, match=r"'prompt-0001' has 2 tokens .*; at least 16 are needed"):
        find_sinks(model, [TEXTS[0], "ab"], template=None)
    found = measure_sinks(model, TEXTS, template=None)
    with pytest.raises(UserError, match=r"there is no measure 'maas' \(did you mean 'mass'\?\)"):
        found.of("maas")
    with pytest.raises(UserError, match="the sinks are of 3 texts, and 2 came"):
        measure_sinks(model, TEXTS[:2], sinks=found.sinks, template=None)
    with pytest.raises(UserError, match="and the sinks given for it are of a text of 29; find them in these texts"):
        measure_sinks(model, TEXTS[::-1], sinks=found.sinks, template=None)


def test_a_window_in_which_few_see_a_key_says_nothing_of_it_and_stops_nothing() -> None:
    hf_model = tiny_hf("mistral")
    hf_model.config.sliding_window = 4
    model = bridge(hf_model, tiny_tokenizer(None), Checkpoint("tiny", "tests/tiny"))
    found = measure_sinks(model, TEXTS, template=None)
    assert bool(found.of("column_entropy").isnan().all())
    assert all(bool(own.isnan().all()) for own in found.sinks.heads)  # unknown, and not a head that doesn't attend
    assert not bool(found.of("mass").isnan().any())
    assert not any(found.sinks.sure)


# --- plain transformers ----------------------------------------------------------------------------------------------


@pytest.mark.exact
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "olmo2", "gpt_oss", "qwen3_next", "gpt2"])
def test_every_measure_is_that_of_plain_transformers(architecture: str) -> None:
    """From `output_attentions`, its cache and hidden states, with loops."""
    hf_model, plain = tiny_hf(architecture), tiny_hf(architecture)
    model = bridge(hf_model, tiny_tokenizer(None), Checkpoint("tiny", "tests/tiny"))
    text = "the thing is that the king sees a thing and another thing."
    found = measure_sinks(model, [text], template=None)
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    plain.set_attn_implementation("eager")
    entering: dict[int, torch.Tensor] = {}
    for layer, tap in enumerate(_taps(plain)):
        if tap is not None:
            tap.register_forward_pre_hook(lambda module, given, layer=layer: entering.update({layer: given[0][0]}))
    with torch.no_grad():
        out = plain(ids, output_attentions=True, output_hidden_states=True, use_cache=True)
    layers = [i for i in range(3) if not found.of("mass")[0, i].isnan().any()]
    attentions = [one for one in out.attentions if one is not None]
    (places,) = found.sinks.places
    for layer, one in zip(layers, attentions, strict=True):
        pattern = one[0].double()
        visible = pattern[0] > 0
        rows, first = [], []
        for i in range(ids.shape[1]):
            keys = set(visible[i].nonzero().flatten().tolist())
            if keys & set(places) and keys - set(places):
                rows.append(sum(pattern[:, i, place] for place in places))
            if i:
                first.append(pattern[:, i, 0])
        assert torch.allclose(found.of("mass")[0, layer].double(), torch.stack(rows).mean(dim=0), atol=1e-5)
        assert torch.allclose(found.of("first")[0, layer].double(), torch.stack(first).mean(dim=0), atol=1e-5)
        missing = 1 - pattern.sum(dim=2).mean(dim=1)
        assert torch.allclose(found.of("learned")[0, layer].double(), missing, atol=1e-5)
        entropy = [
            -sum(p * math.log(p) for p in row[row > 0].tolist()) / math.log(int(visible[i].sum()))
            for i, row in enumerate(pattern[0]) if int(visible[i].sum()) > 1
        ]  # fmt: skip
        assert float(found.of("row_entropy")[0, layer, 0]) == pytest.approx(sum(entropy) / len(entropy), rel=1e-4)
        parts = entering[layer].view(len(entering[layer]), 4, -1)
        matrix = _matrix(plain, layer).view(32, 4, -1)
        added = torch.einsum("thd,whd->htw", parts, matrix).norm(dim=2)
        others = [i for i in range(ids.shape[1]) if i not in places]
        assert torch.allclose(found.of("output")[0, layer], added[:, others].mean(dim=1), rtol=1e-4)
        _, cached = _cached(out.past_key_values, layer)
        if cached.shape[2] == ids.shape[1]:  # a sliding window drops the first ones
            assert torch.allclose(found.of("value")[0, layer], _drain(plain, layer, cached[0], places), rtol=1e-4)
    for level, hidden in enumerate(out.hidden_states[:-1]):  # the last one is normed
        norms = hidden[0].norm(dim=1)
        others = [i for i in range(ids.shape[1]) if i not in places]
        assert float(found.of("peak")[0, level]) == pytest.approx(
            float(norms[list(places)].max() / norms[others].max()), rel=1e-4
        )
        assert float(found.of("largest")[0, level]) == pytest.approx(float(hidden.abs().max()), rel=1e-4)
    assert abs(found.massive[0][0].value) == pytest.approx(float(found.of("largest").max()))
    gated = architecture == "qwen3_next"
    assert (float(found.of("gate").nanmean()) < 0.9) == gated
    assert (float(found.of("learned").nanmean()) > 0.01) == (architecture == "gpt_oss")


@pytest.mark.exact
def test_the_gate_is_what_the_models_own_gate_leaves_on_average() -> None:
    hf_model, text = tiny_hf("qwen3_next"), "the thing is that the king sees a thing and another thing."
    asks = hf_model.model.layers[1].self_attn.q_proj  # a head's queries, and beside them its gate
    asks.weight.data *= 20
    asked: list[torch.Tensor] = []
    hook = asks.register_forward_hook(lambda module, given, out: asked.append(out[0]))
    with torch.no_grad():
        hf_model(torch.tensor([tiny_tokenizer(None)(text)["input_ids"]]))
    hook.remove()
    right = asked[0].view(len(asked[0]), 4, 2, -1)[:, :, 1].sigmoid().mean(dim=(0, 2))
    assert float(right.max() - right.min()) > 0.01
    model = bridge(hf_model, tiny_tokenizer(None), Checkpoint("tiny", "tests/tiny"))
    found = measure_sinks(model, [text], template=None).of("gate")[0]
    assert torch.allclose(found[1], right, atol=1e-4)
    assert bool(found[[0, 2]].isnan().all())


def _cached(cache: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.layers[layer].keys, cache.layers[layer].values


def _taps(plain: Any) -> list[Any]:
    if hasattr(plain, "transformer"):
        return [block.attn.c_proj for block in plain.transformer.h]
    return [getattr(getattr(block, "self_attn", None), "o_proj", None) for block in plain.model.layers]


def _matrix(plain: Any, layer: int) -> torch.Tensor:
    weight: torch.Tensor = _taps(plain)[layer].weight.detach()
    return weight.T if hasattr(plain, "transformer") else weight


def _drain(plain: Any, layer: int, values: torch.Tensor, places: tuple[int, ...]) -> torch.Tensor:
    """Norms of W_O v by head, at the sinks against elsewhere."""
    matrix = _matrix(plain, layer)
    size = values.shape[-1]
    heads = matrix.shape[1] // size
    norms = torch.stack([
        (values[head * len(values) // heads] @ matrix[:, head * size : (head + 1) * size].T).norm(dim=1)
        for head in range(heads)
    ])  # fmt: skip
    others = [i for i in range(norms.shape[1]) if i not in places]
    return norms[:, list(places)].mean(dim=1) / norms[:, others].mean(dim=1)


@pytest.mark.exact
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3"])
def test_eager_and_sdpa_show_the_same_numbers(architecture: str) -> None:
    found = []
    for attention in ("eager", "sdpa"):
        hf_model = tiny_hf(architecture)
        hf_model.set_attn_implementation(attention)
        model = bridge(hf_model, tiny_tokenizer(None), Checkpoint("tiny", "tests/tiny"))
        found.append(measure_sinks(model, TEXTS, template=None))
    assert found[0].sinks.places == found[1].sinks.places
    assert torch.allclose(found[0].heads, found[1].heads, atol=1e-5, equal_nan=True)
    assert torch.allclose(found[0].levels, found[1].levels, rtol=1e-4)


@pytest.mark.exact
def test_a_text_has_the_same_numbers_alone_and_padded_on_either_side() -> None:
    from mechlens.methods.activations.collect import template_of
    from mechlens.prompts.batch import tokenize

    model = planted_sinks()
    right, left = (tokenize(TEXTS, template_of(model, None), padding_side=side) for side in ("right", "left"))
    found = [measure_sinks(model, batch) for batch in (right, left)]
    alone = [measure_sinks(model, [text], template=None) for text in TEXTS]
    assert torch.equal(found[0].heads, found[1].heads)
    assert torch.equal(found[0].heads, torch.cat([one.heads for one in alone], dim=1))


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("bloom", "it isn't computed where transformers lets it be named"),
        ("bitnet", "what its heads find is normed before it reaches their output matrix"),
        ("mamba", "no block of it has attention"),
        ("glm_moe_dsa", "it isn't a softmax of its queries and keys"),
    ],
)
def test_attention_that_can_not_be_read_is_refused(architecture: str, reason: str) -> None:
    model = bridge(tiny_hf(architecture), tiny_tokenizer(None), Checkpoint("tiny", "tests/tiny"))
    with pytest.raises(UserError, match=f"the attention of tiny can't be read: {reason}.*; choose another model"):
        find_sinks(model, TEXTS, template=None)


def test_a_users_hook_is_not_gone_past_in_silence() -> None:
    model = planted_sinks()
    hook = ("blocks.0.hook_resid_pre", lambda value, hook: value)
    with model.hooks(fwd_hooks=[hook]), pytest.raises(UserError, match="hooks are attached to the model"):
        find_sinks(model, TEXTS, template=None)


@pytest.mark.exact
@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
def test_what_takes_a_patterns_place_is_what_the_model_goes_on_with(tiny_model: Any, architecture: str) -> None:
    model, ids = tiny_model(architecture), list(range(5, 30))

    def off(layer: int, pattern: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        assert bool(visible.tril().eq(visible).all())
        return pattern * (torch.arange(4) != 1)[:, None, None] if layer == 0 else pattern

    with without_heads(model, [(0, 1)]):
        right = watch(model, ids)
    assert torch.allclose(watch(model, ids, change=off), right, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(watch(model, ids), right, rtol=1e-2)
    levels: dict[int, torch.Tensor] = {}

    def doubled(level: int, residual: torch.Tensor) -> torch.Tensor | None:
        levels[level] = residual
        return 2 * residual if level == 2 else None

    watch(model, ids, residual=doubled)
    assert sorted(levels) == [0, 1, 2]
    last = watch(model, ids, residual=lambda level, residual: 2 * levels[2] if level == 2 else None)
    assert torch.allclose(last, watch(model, ids, residual=doubled))
    assert not torch.allclose(last, watch(model, ids), rtol=1e-2)
