"""A probe that knows the prompt again is told from one that reads the behaviour; the ceiling is the prompt's rate."""

from typing import NamedTuple

import pytest
import torch

from mechlens.errors import UserError
from mechlens.methods.probing.prompt_identity import behaviour_probe, other_answers_rate, prompt_identity_auroc

PROMPTS, ANSWERS, D = 40, 8, 32


class World(NamedTuple):
    vectors: torch.Tensor
    shown: torch.Tensor
    prompts: list[str]


def world(seed: int, *, rates: str, signal: float) -> World:
    """Each prompt has a vector of its own; `rates` are alike or differ; `signal` is what the behaviour adds."""
    draw = torch.Generator().manual_seed(seed)
    own = torch.randn(PROMPTS, 1, D, generator=draw)
    rate = torch.rand(PROMPTS, 1, generator=draw) ** 2 if rates == "differ" else torch.full((PROMPTS, 1), 0.4)
    shown = torch.rand(PROMPTS, ANSWERS, generator=draw) < rate
    line = torch.randn(D, generator=draw)
    vectors = own + 0.3 * torch.randn(PROMPTS, ANSWERS, D, generator=draw) + signal * shown[..., None] * line
    names = [f"p{i}" for i in range(PROMPTS) for _ in range(ANSWERS)]
    return World(vectors.flatten(0, 1), shown.flatten(), names)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_a_probe_that_knows_the_prompt_again_carries_nothing_over() -> None:
    found = [behaviour_probe(*world(seed, rates="differ", signal=0.0)) for seed in range(12)]
    assert mean([probe.held_out_answers.value for probe in found]) > 0.7
    assert mean([probe.held_out_prompts.value for probe in found]) == pytest.approx(0.5, abs=0.06)
    assert mean([probe.prompt_identity.value for probe in found]) > mean([p.held_out_answers.value for p in found])


def test_a_probe_that_reads_the_behaviour_carries_over_whatever_the_prompt() -> None:
    found = [behaviour_probe(*world(seed, rates="alike", signal=1.0)) for seed in range(3)]
    assert min(probe.held_out_prompts.value for probe in found) > 0.9
    assert mean([probe.prompt_identity.value for probe in found]) == pytest.approx(0.5, abs=0.06)


def test_the_ceiling_is_a_half_where_prompts_are_alike_and_is_counted_over_other_answers() -> None:
    """Leaving an answer out of its own prompt's mean would say less than nothing if answers to one prompt counted."""
    worlds = [world(seed, rates="alike", signal=0.0) for seed in range(60)]
    areas = [prompt_identity_auroc(one.shown, one.prompts).value for one in worlds]
    assert mean(areas) == pytest.approx(0.5, abs=0.012)
    shown = torch.tensor([True, False, False, True])
    assert other_answers_rate(shown, ["a", "a", "a", "b"])[:3].tolist() == [0.0, 0.5, 0.5]
    assert not prompt_identity_auroc(shown, ["a", "a", "a", "b"]).measurable  # b has one answer
    with pytest.raises(UserError, match="give one for each"):
        behaviour_probe(torch.zeros(4, 2), shown, ["a"] * 3)
