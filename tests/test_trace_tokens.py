"""Reasoning traces token by token: parts, alignment, scores, and the cliff of a planted score."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from planted_traces import planted_model, planted_trace, refusal_line
from test_thought import OPENED, PLAIN, SWITCHED_OFF
from tiny import tiny_tokenizer

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.activations.token_scores import line_of, token_scores
from mechlens.methods.activations.trace_tokens import Trace, trace_batch, trace_parts
from mechlens.methods.directions.direction import mean_difference
from mechlens.methods.statistics.change_point import chance_among_neighbours, change_point
from mechlens.methods.statistics.cliff import cliff
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template

TRACES = [
    Trace(Prompt("a", "break it"), "I should not.", "No."),
    Trace(Prompt("b", "bake a cake now"), "Why not? A cake is fine, so bake.", "Sure, here."),
]


@pytest.mark.parametrize("template", [PLAIN, OPENED], ids=["plain", "opened"])
def test_every_token_is_of_one_part_and_the_parts_say_what_was_given(tiny_model: Any, template: str) -> None:
    model = tiny_model()
    own = chat_template(tiny_tokenizer(template))
    batch = trace_batch(model, TRACES, template=own)
    found = trace_parts(batch, own.tokenizer)
    for i, trace in enumerate(TRACES):
        row = batch.row(i)
        assert len(found.parts[i]) == len(row)
        said = {
            part: own.tokenizer.decode([t for t, p in zip(row, found.parts[i], strict=True) if p == part])
            for part in ("prompt", "thinking", "answer")
        }
        assert said["prompt"] == trace.prompt.text
        assert said["thinking"].strip() == trace.thinking
        assert said["answer"] == trace.answer
        assert own.tokenizer.decode(row).count("<think>") == 1
        assert found.parts[i][int(found.ends[i])] == "template"
        assert found.parts[i][int(found.ends[i]) + 1] == "answer"


def test_an_empty_thought_of_the_template_is_said(tiny_model: Any) -> None:
    with pytest.raises(UserError, match="writes an empty thought"):
        trace_batch(tiny_model(), TRACES, template=chat_template(tiny_tokenizer(SWITCHED_OFF)))
    with pytest.raises(UserError, match="marks of a thought"):
        trace_batch(tiny_model(), [Trace(Prompt("a", "b"), "</think>", "c")])


def test_a_thought_without_end_has_no_place_to_count_from(tiny_model: Any) -> None:
    model = tiny_model()
    batch = trace_batch(model, TRACES)
    assert batch.answer is not None
    bare = [batch.row(i)[int(start) : int(start) + 5] for i, (start, _) in enumerate(batch.answer.tolist())]
    line = refusal_line(planted_model())
    prompts = batch.select([0, 1])
    cut = trace_batch(model, TRACES).without_post()
    assert cut.answer is None
    with pytest.raises(UserError, match="no answers"):
        trace_parts(cut, model.tokenizer)
    with pytest.raises(UserError, match="at least one"):
        token_scores(model, prompts, {})
    endless = tokenize([one.prompt for one in TRACES], template_of(model)).with_answers(bare)
    assert trace_parts(endless, model.tokenizer).ends.tolist() == [-1, -1]
    with pytest.raises(UserError, match="never ends"):
        token_scores(model, endless, {"refusal": line})


def test_scores_are_those_of_each_token_alone_and_aligned_at_the_answer(tiny_model: Any) -> None:
    model = tiny_model()
    batch = trace_batch(model, TRACES)
    acts = collect(model, ["help me", "hurt him", "hurt her", "help us"], positions=["last"])
    acts = replace(acts, labels=("up", "down", "down", "up"))
    line = line_of(mean_difference(acts, "up", "down", level=2, position="last"), acts)
    scores = token_scores(model, batch, {"first": line, "second": line})
    assert bool((scores.of("first").nan_to_num() == scores.of("second").nan_to_num()).all())
    parts = trace_parts(batch, model.tokenizer)
    for i in range(2):
        alone = collect(model, batch.select([i]), positions=["prompt[*]", "answer[*]"], levels=[2])
        want = line(alone.values[0, 0] @ line.direction.unit)
        there = ~scores.of("first")[i].isnan()
        assert torch.allclose(scores.of("first")[i][there], want, atol=1e-5)
        end = int(parts.ends[i])
        assert float(scores.at("first", 0)[i]) == pytest.approx(float(want[end]), abs=1e-5)
        assert [part for part in scores.parts[i] if part] == list(parts.parts[i])
        assert there.tolist() == [bool(part) for part in scores.parts[i]]
    curve = scores.curve("first", [0, 1])
    assert curve["n"].max() == 2
    assert curve["n"].iloc[0] == 1  # missing is left out of the mean, and not zero
    first = curve["place"].iloc[0]
    assert curve["score"].iloc[0] == pytest.approx(float(scores.of("first")[:, scores.places.index(first)].nansum()))


def test_a_planted_cliff_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (20, 60, 200):
        scores = [0.9] * (n - 3) + [0.1] * 3
        noisy = (torch.tensor(scores, dtype=torch.float64) + 0.02 * torch.randn(n, generator=generator)).tolist()
        found = cliff(range(1 - n, 1), noisy, range(n - 3))
        assert found.plateau == pytest.approx(0.9, abs=0.02)
        assert found.drop == pytest.approx(0.8, abs=0.08)
        assert found.begins == -2
        assert found.jump == pytest.approx(-0.8, abs=0.05)
        assert found.p < 0.01
    spiked = [0.9] * 17 + [0.1] * 3
    spiked[9] = 40.0
    assert cliff(range(20), spiked, range(17)).plateau == 0.9


def test_a_thought_of_a_few_tokens_has_no_cliff_and_missing_scores_are_refused() -> None:
    assert math.isnan(cliff(range(5), [1.0, 1.0, 1.0, 0.0, 0.0], range(3)).drop)
    with pytest.raises(UserError, match="all finite"):
        cliff(range(9), [1.0] * 8 + [math.nan], range(8))


def test_tokens_that_are_like_their_neighbours_are_no_cliff() -> None:
    """Permuted orders call drifting noise a jump; the null of like neighbours rarely does."""
    naive = fair = 0
    for seed in range(60):
        noise = torch.randn(80, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for i in range(1, 80):
            noise[i] += 0.8 * noise[i - 1]
        series = noise.tolist()
        naive += change_point(range(80), series, permutations=99).p < 0.05
        fair += chance_among_neighbours(series, series=99, seed=0) < 0.05
    assert naive > 40
    assert fair <= 12


def test_a_planted_suppressor_shows_in_the_scores_of_harmful_requests_alone() -> None:
    traces = [planted_trace(i, harmful=harmful) for i in range(3) for harmful in (True, False)]
    for suppressor in (True, False):
        model = planted_model(suppressor=suppressor)
        scores = token_scores(model, trace_batch(model, traces), {"refusal": refusal_line(model)})
        thinking, refusal = scores.inside("thinking"), scores.of("refusal")
        for i, trace in enumerate(traces):
            plateau, final = float(refusal[i][thinking[i]].median()), float(scores.at("refusal", 0)[i])
            if trace.prompt.id.startswith("harmless"):
                assert plateau == pytest.approx(final, abs=1e-3)
            elif suppressor:
                assert final < 0.5 * plateau
            else:
                assert final == pytest.approx(plateau, rel=0.35)  # an average over ever more tokens thins out
