"""Drawn answers: transformers' distribution, and the same answers for a seed however prompts are batched."""

from typing import Any

import pytest
import torch
from caches import DictShelf
from scipy.stats import chisquare

from mechlens.errors import UserError
from mechlens.methods.activations.collect import template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.drawing import Drawn, Draws
from mechlens.methods.directions.direction import Direction
from mechlens.methods.steering.interventions import ALL, Add
from mechlens.methods.steering.steering import answer_under
from mechlens.models.bridge import checkpoint_now
from mechlens.models.engine import forward
from mechlens.models.native import native
from mechlens.prompts.batch import tokenize
from mechlens.studies.shared.quadrants import judge_answers

TEXTS = ["Bake bread", "What is a cat, and why is it so?", "in", "Sing"]
HOW: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.8, "top_p": 0.9, "seed": 3}


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.3, 0.9), (0.2, 0.5), (1.0, 1e-6)])
def test_a_token_is_drawn_with_the_probabilities_of_transformers(model: Any, temperature: float, top_p: float) -> None:
    ids = torch.tensor([tokenize(TEXTS[:1], template_of(model)).row(0)])
    with native(model) as hf_model, torch.no_grad():
        out = hf_model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=temperature, top_p=top_p, top_k=0,
            max_new_tokens=1, output_scores=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        logits = hf_model(ids).logits[:, -1]
    ours = Draws(temperature, top_p, 1, 0).probabilities(logits)
    torch.testing.assert_close(ours.float(), out.scores[0].softmax(dim=-1), atol=1e-6, rtol=1e-4)


def test_tokens_come_as_often_as_they_should() -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 2
    draws, many = Draws(0.9, 0.95, 1, 0), 20_000
    drawn = Drawn(draws, [str(i) for i in range(many)])(logits.expand(many, -1), range(many), 0)
    chances = draws.probabilities(logits[None])[0]
    counts = torch.bincount(drawn, minlength=30)
    assert int(counts[chances == 0].sum()) == 0
    kept = chances > 0
    assert chisquare(counts[kept].numpy(), (chances[kept] * many).numpy()).pvalue > 0.001
    # From place to place and from seed to seed the numbers are others.
    places = Drawn(draws, ["one"] * 1)
    assert len({int(places(logits[None], [0], k)) for k in range(50)}) > 5
    assert len({int(Drawn(Draws(0.9, 0.95, 1, seed), ["one"])(logits[None], [0], 0)) for seed in range(50)}) > 5


def test_a_seed_gives_the_same_answers_however_they_are_batched(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = answer(model, TEXTS, n=3, **HOW)
    assert said.ids[:4] == ("prompt-0000#0", "prompt-0000#1", "prompt-0000#2", "prompt-0001#0")
    assert said.draw[:4] == (0, 1, 2, 0)
    assert said.drawn == "temperature 0.8, top-p 0.9, seed 3"
    assert len(set(said.tokens[:3])) == 3
    backwards = answer(model, TEXTS[::-1], n=3, **HOW)
    assert [backwards.tokens[i : i + 3] for i in (9, 6, 3, 0)] == [said.tokens[i : i + 3] for i in (0, 3, 6, 9)]
    assert answer(model, TEXTS, **HOW).tokens == said.tokens[::3]
    assert answer(model, TEXTS[1], n=3, **HOW).tokens == said.tokens[3:6]
    assert answer(model, TEXTS, n=3, max_tokens=40, **HOW).tokens == said.tokens
    left = tokenize(TEXTS, template_of(model), padding_side="left")
    assert answer(model, left, n=3, **HOW).tokens == said.tokens
    assert answer(model, TEXTS, n=3, **{**HOW, "seed": 4}).tokens != said.tokens
    assert answer_under(model, TEXTS, [], n=3, **HOW).tokens == said.tokens
    monkeypatch.setattr(forward, "fits_fast_path", lambda _: False)
    assert answer(model, TEXTS, n=3, **HOW).tokens == said.tokens
    assert answer_under(model, TEXTS[:2], [], n=2, **HOW).tokens == tuple(said.tokens[i] for i in (0, 1, 3, 4))


def test_the_same_text_twice_is_drawn_twice(model: Any) -> None:
    twice = answer(model, ["Bake bread"] * 2, **HOW)
    assert twice.tokens[0] != twice.tokens[1]


def test_a_temperature_near_0_is_greedy(model: Any) -> None:
    greedy = answer(model, TEXTS, max_new_tokens=4)
    for temperature in (1e-6, 1e-30):
        assert answer(model, TEXTS, max_new_tokens=4, temperature=temperature).tokens == greedy.tokens
    assert (greedy.drawn, greedy.draw) == ("", ())


def test_steered_answers_are_drawn_by_the_numbers_of_unsteered_ones(model: Any) -> None:
    vector = torch.ones(32)
    direction = Direction(vector, 1, "last", "resid", "mean_difference", ("a", "b"), checkpoint_now(model), "", ())
    adds = [[Add(direction, strength=k, unit="unit", layers=(1,), positions=ALL, phase="both")] for k in (0.0, 30.0)]
    batch = tokenize(TEXTS[:1], template_of(model)).select([0, 0])  # one prompt under two interventions
    said = answer_under(model, batch, adds, n=4, force=True, **HOW)
    assert said.tokens[:4] == answer(model, TEXTS[:1], n=4, **HOW).tokens
    assert said.tokens[4:] != said.tokens[:4]
    assert [row[0].strength for row in said.interventions] == [0.0] * 4 + [30.0] * 4


def test_draws_are_kept_under_their_own_names(model: Any) -> None:
    cache = DictShelf()
    for ask in (answer, lambda m, t, **how: answer_under(m, t, [], **how)):
        for how in (HOW, {**HOW, "seed": 4}, {**HOW, "top_p": 1.0}, {"max_new_tokens": 4}):
            n = 5 if "seed" in how else 1
            first = ask(model, TEXTS[:2], n=n, cache=cache, max_tokens=40, **how)
            assert first.tokens == ask(model, TEXTS[:2], n=n, **how).tokens
            assert first.tokens == ask(model, TEXTS[:2], n=n, cache=cache, max_tokens=40, **how).tokens


def test_every_draw_is_judged(model: Any) -> None:
    said = answer(model, TEXTS, n=2, **HOW)
    judged = judge_answers(TEXTS, said)
    assert [prompt.id for prompt in judged.prompts] == list(said.ids)
    assert {prompt.group for prompt in judged.prompts} == {f"prompt-000{i}" for i in range(4)}
    assert list(said.table().columns) == ["id", "answer", "n_tokens", "prompt", "draw"]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; give 0 for greedy"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; give a share"),
        ({"temperature": 1.0, "n": 0}, "n is 0; ask for at least one"),
        ({"n": 4}, "n=4 says how answers are drawn, and without a temperature they are greedy"),
        ({"top_p": 0.9}, "top_p=0.9 says how answers are drawn"),
    ],
)
def test_what_draws_nothing_is_said(model: Any, how: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        answer(model, TEXTS, max_new_tokens=1, **how)
