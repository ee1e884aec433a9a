"""A calibrated strength gives the KL back, by a plain Hugging Face forward; and what can't be calibrated is said."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_hf, tiny_tokenizer, words

import mechlens as ml
from mechlens.methods.behaviour.damage import damage
from mechlens.methods.directions.direction import Direction
from mechlens.methods.steering import equal_damage
from mechlens.methods.steering.equal_damage import TOLERANCE
from mechlens.methods.steering.interventions import Add
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint

PROMPTS = [ml.Prompt(str(i), text) for i, text in enumerate(words(6))]
TOKENS = 5


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any, Direction]:
    """A plain model, the same behind a bridge, and a direction of it."""
    model = bridge(tiny_hf(), tiny_tokenizer(), Checkpoint("tiny", "tests/tiny", fingerprint="v2-tiny"))
    acts = ml.collect(model, [replace(one, label="ab"[i % 2]) for i, one in enumerate(PROMPTS)])
    return tiny_hf(), model, ml.mean_difference(acts, "a", "b", level=2, position="last")


def push(direction: Direction, strength: float = 0.5, **options: Any) -> Add:
    return Add(direction, **{"strength": strength, "unit": "share", "layers": (2,), **options})


def plain_percentile(hf_model: Any, model: Any, found: Add, distance: float) -> float:
    return float(torch.cat(plain_kls(hf_model, model, found, distance)).quantile(0.95))


def plain_kls(hf_model: Any, model: Any, found: Add, distance: float) -> list[torch.Tensor]:
    """Token KLs by whole passes, one prompt at a time, a hook adding the vector to block 2's input."""
    batch = ml.tokenize(PROMPTS, ml.template_of(model))
    said = ml.answer(model, batch, max_new_tokens=TOKENS).tokens
    vector = distance * found.direction.unit
    kls = []
    for i, answer in enumerate(said):
        ids, start = torch.tensor([[*batch.row(i), *answer]]), len(batch.row(i))
        acts_on = slice(0, start) if found.phase == "prompt" else slice(None)

        def add(module: Any, given: Any, acts_on: slice = acts_on) -> Any:
            hidden = given[0].clone()
            hidden[:, acts_on] += vector
            return (hidden, *given[1:])

        with torch.inference_mode():
            clean = hf_model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            handle = hf_model.model.layers[2].register_forward_pre_hook(add)
            steered = hf_model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            handle.remove()
        kls.append((clean.exp() * (clean - steered)).sum(-1))
    return kls


@pytest.mark.exact
@pytest.mark.parametrize("phase", ["both", "prompt"])
@pytest.mark.parametrize(("kl", "first"), [(0.05, 0.5), (0.05, -0.01), (0.1, 0.02)])
def test_a_calibrated_strength_gives_the_kl_back(world: Any, phase: Any, kl: float, first: float) -> None:
    hf_model, model, direction = world
    found = ml.calibrate(model, push(direction, first, phase=phase), PROMPTS, kl, max_new_tokens=TOKENS)
    assert found.reached, found
    assert math.copysign(1, found.push.strength) == math.copysign(1, first)
    distance = found.push.strength * (direction.residual_norm or 0)
    assert plain_percentile(hf_model, model, found.push, distance) == pytest.approx(found.kl, rel=1e-3)
    assert found.kl == pytest.approx(kl, rel=TOLERANCE)
    assert found.tried[0] == (0.0, 0.0)
    assert found.passes == len(found.tried) <= 20


@pytest.mark.exact
def test_damage_counts_what_is_done_to_the_answer_too(world: Any) -> None:
    hf_model, model, direction = world
    batch = ml.tokenize(PROMPTS, ml.template_of(model), padding_side="left")
    said = ml.answer(model, batch, max_new_tokens=TOKENS)
    one = push(direction, 0.3)
    for i, expected in enumerate(plain_kls(hf_model, model, one, 0.3 * (direction.residual_norm or 0))):
        assert float(damage(model, one, batch, said).kl[i]) == pytest.approx(float(expected.mean()), rel=1e-3)


def test_the_length_of_the_direction_is_nothing_to_it(world: Any) -> None:
    _, model, direction = world
    for unit in ("share", "unit"):
        first = 0.5 if unit == "share" else 2.0
        found = [
            ml.calibrate(model, push(own, first, unit=unit), PROMPTS, 0.1, max_new_tokens=TOKENS)
            for own in (direction, replace(direction, vector=8 * direction.vector))
        ]
        assert found[0].tried == found[1].tried
        assert found[0].push.strength == found[1].push.strength
    # As it is, eight times the vector is an eighth of the strength.
    raw = [
        ml.calibrate(model, push(own, first, unit="raw"), PROMPTS, 0.1, max_new_tokens=TOKENS)
        for own, first in ((direction, 0.5), (replace(direction, vector=8 * direction.vector), 0.5 / 8))
    ]
    assert raw[0].push.strength == 8 * raw[1].push.strength


def test_of_many_prompts_in_any_order_the_same(world: Any) -> None:
    _, model, direction = world
    one = ml.calibrate(model, push(direction), PROMPTS, 0.1, max_new_tokens=TOKENS)
    other = ml.calibrate(model, push(direction), PROMPTS[::-1], 0.1, max_new_tokens=TOKENS)
    assert one.push.strength == pytest.approx(other.push.strength, rel=1e-3)
    assert one.tokens == sum(len(row) for row in ml.answer(model, PROMPTS, max_new_tokens=TOKENS).tokens)


class Curve:
    """A meter whose KL is a given function of the strength."""

    tokens = 1

    def __init__(self, of: Callable[[float], float]) -> None:
        self.of, self.known, self.passes = of, {0.0: 0.0}, 1

    def at(self, strength: float) -> float:
        if strength not in self.known:
            self.known[strength] = self.of(strength)
            self.passes += 1
        return self.known[strength]

    near = equal_damage._Meter.near


def on_curve(of: Callable[[float], float], world: Any, monkeypatch: pytest.MonkeyPatch, first: float = 0.5) -> Any:
    _, model, direction = world
    monkeypatch.setattr(equal_damage, "_Meter", lambda *given: Curve(of))
    batch = ml.tokenize(PROMPTS, ml.template_of(model))
    return equal_damage.calibrated(model, push(direction, first), batch, ml.answer(model, batch, max_new_tokens=1), 1.0)


@pytest.mark.parametrize("first", [0.01, 0.5, 40.0])
def test_the_crossing_of_any_rising_curve_is_found(world: Any, monkeypatch: pytest.MonkeyPatch, first: float) -> None:
    for of in (lambda x: x * x, lambda x: x**4 / 50, lambda x: 3 * x / (1 + x), math.expm1):
        found = on_curve(of, world, monkeypatch, first)
        assert found.reached
        assert found.caution == ""
        assert of(found.push.strength) == found.kl == pytest.approx(1.0, rel=TOLERANCE)


def test_what_is_not_reached_jumps_or_falls_is_said(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    levels_off = on_curve(lambda x: 0.8 * x / (1 + x), world, monkeypatch)
    assert not levels_off.reached
    assert levels_off.push.strength == 512
    assert re.fullmatch(r"1 nats aren't reached: at strength 512, the last tried, it's 0\.798", levels_off.caution)
    jumps = on_curve(lambda x: 5.0 if x > 0.3 else 0.1, world, monkeypatch)
    assert jumps.caution == "the KL jumps past 1 nats: the nearest that was found is 0.1"
    falls = on_curve(lambda x: 1.5 - x if x < 1 else x * x, world, monkeypatch)
    assert falls.reached
    assert not falls.monotone
    assert "other strengths may give the same" in falls.caution
    assert falls.caution in repr(falls)


@pytest.mark.parametrize("kl", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_kl_is_said(world: Any, kl: float) -> None:
    with pytest.raises(ml.UserError, match="give a number of nats above 0"):
        ml.calibrate(world[1], push(world[2]), PROMPTS, kl)


def test_a_push_needs_a_strength_to_begin_with(world: Any) -> None:
    with pytest.raises(ml.UserError, match="can't be doubled"):
        ml.calibrate(world[1], push(world[2], 0.0), PROMPTS)
    with pytest.raises(ml.UserError, match="an Ablate has no strength to be calibrated"):
        equal_damage._require(ml.Ablate(world[2]), 1.0)


def test_too_strong_a_push_to_begin_with_and_one_that_overflows(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    strong = on_curve(lambda x: x, world, monkeypatch, first=1e6)
    assert not strong.reached
    assert strong.passes == len(strong.tried) == 2 + equal_damage.DOUBLINGS  # nothing is looked for where nothing is
    assert strong.caution == "at strength 977, the weakest tried, it's 977 nats; begin with a weaker push"
    monkeypatch.undo()
    _, model, direction = world
    with monkeypatch.context() as patched:
        patched.setattr(equal_damage._Meter, "_kl", lambda meter, one: torch.tensor(
            [math.nan if one.strength > 1 else one.strength], dtype=torch.float64
        ))  # fmt: skip
        found = ml.calibrate(model, push(direction, 8.0), PROMPTS, 0.5, max_new_tokens=TOKENS)
    assert found.reached, found
    assert found.tried[-1] == (8.0, math.inf)
