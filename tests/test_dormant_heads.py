"""Heads that sleep on one kind of text: what is lost without them, and the contrast between kinds."""

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planted_sinks import planted_sinks
from test_sinks import TEXTS

from mechlens.errors import UserError
from mechlens.methods.activations.collect import template_of
from mechlens.methods.behaviour.perplexity import text_loss
from mechlens.methods.patching.heads import without_heads
from mechlens.methods.sinks.contrast import domain_contrast, paired_change
from mechlens.methods.sinks.found import find_sinks
from mechlens.methods.sinks.interventions import all_on_sink, away_from, losses_under, without_dimensions, zeroed
from mechlens.methods.sinks.positions import position_mass
from mechlens.methods.sinks.reading import measure_sinks
from mechlens.models.attention.watch import Attended, watch
from mechlens.prompts.batch import tokenize
from mechlens.prompts.builtin import DOMAINS, domain_texts
from mechlens.views import show_attention

# --- interventions ---------------------------------------------------------------------------------------------------


@pytest.mark.exact
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_oss", "gpt2"])
def test_losses_are_those_of_the_model_with_and_without_heads(tiny_model: Any, architecture: str) -> None:
    model, texts = tiny_model(architecture), [text.replace("x", "k") for text in TEXTS]
    batch = tokenize(texts, template_of(model, None))
    assert torch.allclose(losses_under(model, batch), text_loss(model, texts), rtol=1e-5)
    heads = [(0, 1), (2, 3)]
    off = losses_under(model, batch, [zeroed(heads)] * len(texts))
    with without_heads(model, heads):
        right = text_loss(model, texts)
    assert torch.allclose(off, right, rtol=1e-5)
    assert not torch.allclose(off, losses_under(model, batch), rtol=1e-4)


def test_a_head_that_is_put_on_the_sink_attends_to_nothing_else() -> None:
    model = planted_sinks()
    ids, seen = model.tokenizer(TEXTS[1])["input_ids"], {}
    place = ids.index(model.tokenizer("x")["input_ids"][0])

    def see(one: Attended) -> None:
        seen[one.layer] = one.pattern

    before: dict[int, torch.Tensor] = {}
    watch(model, ids, lambda one: before.__setitem__(one.layer, one.pattern))
    watch(model, ids, see, change=all_on_sink([(1, 2)], place))
    assert bool((seen[1][2, place:, place] == 1).all())
    assert torch.equal(seen[1][2, :place], before[1][2, :place])  # queries that can't see it are left as they were
    assert torch.allclose(seen[1][[0, 1, 3]], before[1][[0, 1, 3]], atol=1e-6)


def test_removed_dimensions_are_zero_at_the_sinks_alone() -> None:
    residual = torch.ones(6, 8)
    changed = without_dimensions([2, 5], [0, 3])(1, residual)
    assert changed.sum() == 48 - 4
    assert bool((changed[[0, 0, 3, 3], [2, 5, 2, 5]] == 0).all())
    assert bool((residual == 1).all())
    model = planted_sinks()
    batch = tokenize(TEXTS, template_of(model, None))
    same = losses_under(model, batch, edits=[without_dimensions([], [0])] * len(TEXTS))
    assert torch.equal(same, losses_under(model, batch))
    with pytest.raises(UserError, match="what is done is given for 1 text, and 3 came; give one for each"):
        losses_under(model, batch, [zeroed([])])


# --- the contrast -----------------------------------------------------------------------------------------------------


def test_the_contrast_finds_the_planted_head_and_shuffled_kinds_find_none() -> None:
    kinds = ["prose"] * 12 + ["code"] * 12
    p, right = [], 0
    for seed in range(20):
        mass = torch.rand(24, 3, 4, generator=torch.Generator().manual_seed(seed))
        p.append(float(domain_contrast(mass, kinds, shuffles=99, seed=seed).p.min()))
        mass[:12, 1, 2] = mass[:12, 1, 2] / 4 + 0.7
        mass[12:, 1, 2] /= 4
        found = domain_contrast(mass, kinds, shuffles=99, seed=seed)
        right += found.strongest(1) == ((1, 2),) and float(found.p[1, 2]) == pytest.approx(0.01)
        assert found.domains[int(found.dormant[1, 2])] == "prose"
        assert found.domains[int(found.active[1, 2])] == "code"
    assert right == 20
    assert sum(one <= 0.05 for one in p) <= 4


def test_a_p_is_of_any_head_of_ties_and_of_differences_in_standard_errors() -> None:
    kinds, spread = ["a"] * 6 + ["b"] * 6, torch.linspace(-1, 1, 6).repeat(2)[:, None]
    none = domain_contrast(torch.full((12, 1, 2), 0.5), kinds, shuffles=99, seed=0)
    assert none.p.flatten().tolist() == [1.0, 1.0]  # a shuffle that differs as much counts
    constant = torch.cat([torch.full((12, 1), 0.5), spread], dim=1)
    constant[6:, 1] += 0.3
    assert float(domain_contrast(constant[:, None], kinds, shuffles=99, seed=0).p[0, 1]) > 0.2
    # 0.5 apart with standard errors of 0.42 is less clear than 0.09 with 0.03.
    mass = spread * torch.tensor([1.0, 0.07]) * 0.95
    mass[6:] += torch.tensor([0.5, 0.09])
    wide, narrow = domain_contrast(mass[:, None], kinds, shuffles=999, seed=0).p[0].tolist()
    assert narrow < wide


def test_a_head_that_varies_more_has_to_differ_as_much_more() -> None:
    """Far above the floor the scale of a head's numbers means nothing, however many other heads vary less."""
    draw = torch.Generator().manual_seed(3)
    one = 100 * torch.randn(24, generator=draw)
    one[12:] += 250
    mass = torch.stack([one, 10 * one, 100 * torch.randn(24, generator=draw)], dim=1)[:, None]
    first, second, third = domain_contrast(mass, ["a"] * 12 + ["b"] * 12, shuffles=199, seed=0).p[0].tolist()
    assert first == second < 0.01 < third
    change = mass + torch.tensor([100.0, 1000.0, 0.0])
    change[12:] -= mass[12:].mean(dim=0) - mass[:12].mean(dim=0)
    first, second, third = paired_change(torch.zeros_like(mass), change, shuffles=199, seed=0)[1][0].tolist()
    assert first == second < 0.05 < third


def test_of_three_kinds_the_two_that_are_farthest_apart_count() -> None:
    mass = 0.1 + 0.01 * torch.rand(18, 1, 2, generator=torch.Generator().manual_seed(0))
    mass[12:, 0, 1] += 0.6
    found = domain_contrast(mass, ["a"] * 6 + ["b"] * 6 + ["c"] * 6, shuffles=99, seed=0)
    assert float(found.difference[0, 1]) == pytest.approx(0.6, abs=0.02)
    assert found.domains[int(found.dormant[0, 1])] == "c"
    assert float(found.p[0, 1]) == pytest.approx(0.01)
    assert float(found.p[0, 0]) > 0.05


def test_heads_that_are_not_there_have_no_contrast() -> None:
    mass = torch.rand(8, 2, 2, generator=torch.Generator().manual_seed(0))
    mass[:, 0] = torch.nan
    found = domain_contrast(mass, ["a"] * 4 + ["b"] * 4, shuffles=19, seed=0)
    assert bool(found.p[0].isnan().all())
    assert not bool(found.p[1].isnan().any())
    assert {layer for layer, _ in found.strongest(2)} == {1}
    with pytest.raises(UserError, match="two kinds of text with two texts each"):
        domain_contrast(mass, ["a"] * 8, shuffles=19, seed=0)


def test_texts_come_by_kind() -> None:
    for kind in DOMAINS:
        texts = domain_texts(kind)
        assert len({one.text for one in texts}) == len(texts) == 16
        assert min(len(one.text.split()) for one in texts) > 20
    with pytest.raises(UserError, match="there are no built-in texts 'poems'; choose one of prose, code"):
        domain_texts("poems")


def test_a_head_that_goes_dormant_between_two_models_is_found_and_no_other() -> None:
    p, right = [], 0
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        before = torch.rand(12, 3, 4, generator=draw)
        after = before + 0.05 * torch.randn(12, 3, 4, generator=draw)
        p.append(float(paired_change(before, after, shuffles=99, seed=seed)[1].min()))
        after[:, 2, 1] += 0.3
        change, own = paired_change(before, after, shuffles=99, seed=seed)
        right += int(own.argmin()) == 2 * 4 + 1 and float(own[2, 1]) <= 0.05
        assert float(change[2, 1]) == pytest.approx(float((after - before)[:, 2, 1].mean()), abs=1e-6)
    assert right == 20
    assert sum(one <= 0.05 for one in p) <= 4
    before[:, 0] = torch.nan
    assert bool(paired_change(before, after, shuffles=19, seed=0)[1][0].isnan().all())
    with pytest.raises(UserError, match="on the same two texts or more is needed"):
        paired_change(before[:1], after[:1], shuffles=19, seed=0)


# --- what is asked for has to be there --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "edit", "told"),
    [
        (zeroed([(99, 0)]), None, "there is no head 0 in layer 99; there are layers 0 to 2 with heads 0 to 3"),
        (all_on_sink([(0, -1)], 0), None, "there is no head -1 in layer 0"),
        (all_on_sink([(0, 1)], 999), None, r"there is no token 999 in a text of \d+ tokens; choose from 0 to \d+"),
        (away_from([-1]), None, "there is no token -1"),
        (None, without_dimensions([9999], [0]), "there is no dimension 9999; choose those from 0 to 31"),
        (None, without_dimensions([0], [999]), "there is no token 999"),
    ],
)
def test_a_head_a_token_or_a_dimension_that_there_is_not_is_refused(change: Any, edit: Any, told: str) -> None:
    model = planted_sinks()
    batch = tokenize(TEXTS[:1], template_of(model, None))
    with pytest.raises(UserError, match=told):
        losses_under(model, batch, [change], [edit])


bare = SimpleNamespace(**{
    own.__name__: inspect.unwrap(own)
    for own in (zeroed, all_on_sink, away_from, without_dimensions, losses_under, domain_contrast, paired_change,
                measure_sinks, position_mass)
})  # fmt: skip
"""Without the checks of types, which there are in tests only."""


@pytest.fixture(scope="module")
def planted() -> tuple[Any, Any, Any]:
    model = planted_sinks()
    return model, tokenize(TEXTS[:2], template_of(model, None)), find_sinks(model, TEXTS[:2], template=None)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda m, b, s: bare.zeroed((0, 1)), r"heads is one pair, \(0, 1\); give a list of such pairs: \[\(0, 1\)\]"),
        (lambda m, b, s: bare.zeroed([(0, 1, 2)]), r"heads has \(0, 1, 2\) .*; each is a pair of layer and head"),
        (lambda m, b, s: bare.all_on_sink([(True, False)], 0), r"heads has \(True, False\)"),
        (lambda m, b, s: bare.all_on_sink("0.1", 0), r"heads has '0.1' \(a str\)"),
        (lambda m, b, s: bare.all_on_sink([(0, 1)], None), "sink has None .*; a token is a whole number"),
        (lambda m, b, s: bare.away_from([0.5]), "places has 0.5 .*; a token is a whole number"),
        (lambda m, b, s: bare.without_dimensions("3", [0]), "dimensions has '3' .*; a dimension is a whole number"),
        (lambda m, b, s: show_attention(m, TEXTS[0], (0, 1), template=None), "heads is one pair"),
        (lambda m, b, s: without_heads(m, (0, 1)).__enter__(), "heads is one pair"),
        (
            lambda m, b, s: bare.losses_under(m, b, bare.zeroed([(0, 1)])),
            "changes is one alone; give a list with one for each",
        ),
        (
            lambda m, b, s: bare.losses_under(m, b, [(0, 1)] * 2),
            r"changes has \(0, 1\) .*; each is None or what zeroed",
        ),
        (
            lambda m, b, s: bare.losses_under(m, b, [bare.without_dimensions([0], [0])] * 2),
            "changes has a function of other values",
        ),
        (
            lambda m, b, s: bare.losses_under(m, b, None, [bare.away_from([0])] * 2),
            "edits has Hidden.*; each is None or what without_",
        ),
        (lambda m, b, s: bare.losses_under(m, TEXTS), "the batch is a list; give what ml.tokenize returns"),
        (
            lambda m, b, s: bare.losses_under(m, tokenize("a", template_of(m, None))),
            "'prompt-0000' has 1 token, and a loss is of",
        ),
        (
            lambda m, b, s: bare.domain_contrast(torch.rand(4, 1, 2), [*"aab"], shuffles=9, seed=0),
            "3 kinds came for the sink mass of 4 texts",
        ),
        (
            lambda m, b, s: bare.domain_contrast(torch.rand(4, 1, 2), [*"aabb"], shuffles=0, seed=0),
            "shuffles is 0, and a p is of at least one",
        ),
        (
            lambda m, b, s: bare.domain_contrast(torch.rand(4, 2), [*"aabb"], shuffles=9, seed=0),
            "sink mass has the shape 4 x 2; give it by",
        ),
        (
            lambda m, b, s: bare.domain_contrast(s, [*"aabb"], shuffles=9, seed=0),
            "sink mass is a Sinks; give a tensor by text, layer and head",
        ),
        (
            lambda m, b, s: bare.domain_contrast(torch.rand(4, 1, 2), [*"aabb"], shuffles=9, seed=0).strongest(0),
            "ask for 1 or more",
        ),
        (
            lambda m, b, s: bare.paired_change(torch.rand(4, 1, 2), torch.rand(3, 1, 2), shuffles=9, seed=0),
            "they have 4 x 1 x 2 and 3 x 1 x 2",
        ),
        (lambda m, b, s: replace(s, places=((200,), (0,))), "there is no token 200 in a text of 29 tokens"),
        (lambda m, b, s: replace(s, places=((), (0,))), r"places has \(\) for text 0, and tokens has \('x',\)"),
        (lambda m, b, s: replace(s, places=((), (0,)), tokens=((), ("o",))), "no token of text 0 is a sink; leave one"),
        (lambda m, b, s: replace(s, sure=(True,)), "are of 2, 1, 2, 2, 2 texts; give one of each for all"),
        (
            lambda m, b, s: bare.measure_sinks(m, TEXTS[:2], sinks=((0,), (0,)), template=None),
            "the sinks are a tuple; give what",
        ),
        (
            lambda m, b, s: bare.measure_sinks(m, TEXTS[:2], sinks=s, template=None).whole("mass", 0, 0),
            "resamples is 0, and an",
        ),
        (
            lambda m, b, s: bare.position_mass(m, b, ["yes", "no"]),
            r"answers has 'yes' \(a str\); give the tokens of each",
        ),
        (lambda m, b, s: bare.position_mass(m, b, [[5], [6] * 999]), r"has 10\d\d tokens with its answer"),
    ],
)
def test_what_is_meant_otherwise_is_said(planted: tuple[Any, Any, Any], wrong: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        wrong(*planted)
