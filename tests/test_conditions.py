"""Laws of conditional steering: decided in the prompt's own pass as by running it twice; else nothing is touched."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from caches import DictShelf
from test_steering import NEW, ablate, add, batch_of, direction, first_logits, made, residuals, told
from tiny import ARCHITECTURES

import mechlens as ml
from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.directions.direction import project
from mechlens.methods.steering.conditions import Projection, When
from mechlens.methods.steering.interventions import ALL, Add, Intervention, ReplaceComponent, replacement
from mechlens.methods.steering.steering import answer_under, applied, logits_under
from mechlens.models.engine import forward
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt


def condition(architecture: str, level: int = 1) -> Projection:
    """Holds for half of the prompts, at `last`, along a direction of its own."""
    base = direction(architecture, 5)
    at_last = ml.Direction(
        vector=base.vector, level=level, position="last", site="resid", method="random", contrast=("a", "b"),
        checkpoint=base.checkpoint, template=base.template, train_ids=(),
    )  # fmt: skip
    acts = collect(made(architecture), batch_of(architecture), positions=("last",))
    along = project(acts.at(level, "last"), at_last).sort().values
    return Projection(at_last, threshold=float(along[1] + along[2]) / 2)


def holding(architecture: str, when: Projection) -> list[bool]:
    """By a pass of its own."""
    acts = collect(made(architecture), batch_of(architecture), positions=("last",))
    level = when.direction.level
    return (project(acts.at(level, "last"), when.direction) > when.threshold).tolist()


def kinds(architecture: str, phase: str) -> list[Intervention]:
    """One for each of four rows, at layers from 1 on."""
    component = ReplaceComponent(
        direction(architecture, 2), value=1.2, unit="raw", layers=(1, 2), positions=ALL, phase=phase,  # type: ignore[arg-type]
    )  # fmt: skip
    put = replacement(residuals(architecture), "p0", layers=[2], positions=["inst"])
    return [
        add(architecture, -1.5, phase=phase), ablate(architecture, phase=phase, layers=(1, 2)),
        component, component if phase == "generation" else put,
    ]  # fmt: skip


def both_ways(architecture: str, phase: str) -> list[tuple[list[list[Intervention]], list[list[Intervention]]]]:
    """Conditional rows with what they come to; the condition one way, then the other, so that every kind acts once."""
    when, acts = condition(architecture), kinds(architecture, phase)
    held = holding(architecture, when)
    assert sum(held) == 2
    return [
        ([[When(when, act, holds=way)] for act in acts],
         [[act] if own == way else [] for act, own in zip(acts, held, strict=True)])
        for way in (True, False)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "phase"),
    [*((one, "both") for one in ARCHITECTURES), *product(["llama", "gemma2", "gpt2"], ["prompt", "generation"])],
)
def test_a_mixed_batch_is_decided_as_by_running_its_prompts_twice(architecture: str, phase: str) -> None:
    model, batch = made(architecture), batch_of(architecture)
    for rows, come_to in both_ways(architecture, phase):
        got = answer_under(model, batch, rows, max_new_tokens=NEW)
        assert got.engine == "fast"
        assert got.tokens == told(model, batch, come_to, got.tokens)
        logits, own = logits_under(model, batch, rows), first_logits(model, batch, come_to)
        assert float((logits - own).abs().max()) < 1e-4 * float(own.abs().max())


@pytest.mark.parametrize("phase", ["prompt", "both"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_the_plain_engine_decides_alike(architecture: str, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made(architecture), batch_of(architecture)
    for rows, _ in both_ways(architecture, phase):
        fast = answer_under(model, batch, rows, max_new_tokens=NEW)
        with monkeypatch.context() as patched:
            patched.setattr(forward, "fits_fast_path", lambda model: False)
            plain = answer_under(model, batch, rows, max_new_tokens=NEW)
        assert (fast.engine, plain.engine) == ("fast", "plain")
        assert plain.tokens == fast.tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt"])
def test_where_it_does_not_hold_nothing_is_touched_to_the_bit(architecture: str, side: str) -> None:
    model, batch = made(architecture), batch_of(architecture, side=side)
    when = condition(architecture)
    push = add(architecture, 3.0)
    never = Projection(when.direction, threshold=math.inf)
    held = torch.tensor(holding(architecture, when))
    some, none = (logits_under(model, batch, [When(own, push)]) for own in (when, never))
    assert torch.equal(some[~held], none[~held])
    assert not (some[held] == none[held]).all(dim=1).any()
    for row in range(len(held)):
        alone = batch.select([row])
        assert torch.equal(logits_under(model, alone, [When(never, push)]), logits_under(model, alone, []))
    assert (
        answer_under(model, batch, [When(never, push)], max_new_tokens=NEW).tokens
        == answer(model, batch, max_new_tokens=NEW).tokens
    )


@pytest.mark.parametrize("max_tokens", [40, 12288])
@pytest.mark.parametrize("phase", ["generation", "both"])
def test_conditional_rows_of_a_sweep_are_each_decided(phase: str, max_tokens: int) -> None:
    """The same prompts many times over, which share what they can: as each by itself."""
    model, batch = made("llama"), batch_of("llama")
    when = condition("llama")
    held = holding("llama", when)
    rows = [i for i in range(len(held)) for _ in range(4)]
    acts = [
        add("llama", strength, phase=phase, layers=(layer,))
        for strength, layer in [(2.0, 1), (2.0, 1), (-3.0, 2), (1.0, 2)]
    ]
    given = [[When(when, act)] for _ in held for act in acts]
    come_to: list[list[Intervention]] = [[act] if held[i] else [] for i in range(len(held)) for act in acts]
    part = batch.select(rows)
    got = answer_under(model, part, given, max_new_tokens=NEW, max_tokens=max_tokens)
    assert got.tokens == told(model, part, come_to, got.tokens)
    bare: list[list[Intervention]] = [[] for _ in rows]
    mixed = [own if i % 2 else none for i, (own, none) in enumerate(zip(given, bare, strict=True))]
    come_mixed = [own if i % 2 else none for i, (own, none) in enumerate(zip(come_to, bare, strict=True))]
    got = answer_under(model, part, mixed, max_new_tokens=NEW, max_tokens=max_tokens)
    assert got.tokens == told(model, part, come_mixed, got.tokens)


def test_it_reads_what_changes_below_have_left() -> None:
    model, batch = made("llama"), batch_of("llama")
    when = condition("llama")
    along = Add(when.direction, strength=50.0, unit="raw", layers=(0,), positions=("last",), phase="prompt")
    push = add("llama", 2.0, layers=(2,))
    got = logits_under(model, batch, [along, When(when, push)])
    assert torch.equal(
        got, logits_under(model, batch, [along, When(Projection(when.direction, threshold=-math.inf), push)])
    )
    own = first_logits(model, batch, [[along, push]] * len(batch.prompts))
    assert float((got - own).abs().max()) < 1e-4 * float(own.abs().max())


def test_a_guard_decides_as_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ml.load("smollm2")
    prompts = [*ml.builtin_prompts("harmful")[:24], *ml.builtin_prompts("harmless")[:24]]
    guard = ml.GuardEstimator(levels=(8, 12), max_fpr=0.2).fit(collect(model, prompts))
    asked = [*ml.builtin_prompts("harmful")[40:44], *ml.builtin_prompts("harmless")[40:44]]
    flagged = [said.harmful for said in guard(model, asked)]
    assert 0 < sum(flagged) < len(flagged)
    acts = collect(model, prompts, levels=(12,), positions=("last",))
    push = Add(
        ml.mean_difference(acts, "harmful", "harmless", level=12, position="last"),
        strength=2.0,
        unit="raw",
        layers=(12,),
    )
    bare = logits_under(model, asked, [])
    for way in (True, False):
        got = logits_under(model, asked, [When(guard, push, holds=way)])
        moved = (got - bare).abs().amax(dim=1) > 0.01 * float(bare.abs().max())
        assert moved.tolist() == [own == way for own in flagged]


def test_pieces_of_other_thresholds_and_ways_are_not_mixed_up() -> None:
    model, batch, push = made("llama"), batch_of("llama"), add("llama", 2.0)
    when, shelf = condition("llama"), DictShelf()
    conditions: Sequence[Any] = (
        When(when, push), When(when, push, holds=False), When(Projection(when.direction, threshold=math.inf), push),
        push,
    )  # fmt: skip
    fresh = [logits_under(model, batch, [one]) for one in conditions]
    kept = [logits_under(model, batch, [one], cache=shelf) for one in conditions]
    again = [logits_under(model, batch, [one], cache=shelf) for one in conditions]
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(fresh, kept, again, strict=True))
    assert len({tuple(one.flatten().tolist()) for one in fresh}) == 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_model_as_it_is_steered_for_a_batch(side: str) -> None:
    model, batch = made("llama"), batch_of("llama", side=side)
    when, push = condition("llama"), add("llama", 2.0)
    with applied(model, [When(when, push)], batch), torch.inference_mode():
        logits = model(batch.tokens, attention_mask=batch.mask.long())
    last = torch.tensor([batch.offset(i) + len(batch.row(i)) - 1 for i in range(len(batch.prompts))])
    own = logits_under(model, batch, [When(when, push)])
    assert float((logits[torch.arange(len(last)), last] - own).abs().max()) < 1e-4 * float(own.abs().max())
    with pytest.raises(UserError, match="without a batch"), applied(model, [When(when, push)]):
        pass


def test_what_can_not_be_decided_is_said() -> None:
    model, batch = made("llama"), batch_of("llama")
    when, push = condition("llama", level=2), add("llama", 2.0)
    with pytest.raises(
        UserError, match="reads level 2, and what it decides on begins at layer 1; read at a lower level"
    ):
        logits_under(model, batch, [When(when, push)])
    other = made("gpt2")
    with pytest.raises(UserError, match="condition's direction"):
        logits_under(
            other, batch_of("gpt2"), [When(when, Add(direction("gpt2"), strength=1.0, unit="raw", layers=(2,)))]
        )


def test_rows_that_act_before_others_are_decided() -> None:
    """In one batch, at one layer: prompts outright and by an early condition, answers by one at the last level."""
    model, batch = made("llama"), batch_of("llama")
    early, late = condition("llama"), condition("llama", level=3)
    push, turn = add("llama", 2.0), add("llama", -2.0, phase="generation")
    rows = [[When(early, push)], [When(late, turn)], [push], [When(late, turn, holds=False)]]
    held, at_end = holding("llama", early), holding("llama", late)
    come_to: list[list[Intervention]] = [
        [push] if held[0] else [], [turn] if at_end[1] else [], [push], [] if at_end[3] else [turn]
    ]  # fmt: skip
    got = answer_under(model, batch, rows, max_new_tokens=NEW)
    assert got.tokens == told(model, batch, come_to, got.tokens)


def test_a_condition_reads_what_another_has_left_below() -> None:
    model, batch = made("llama"), batch_of("llama")
    first, second = condition("llama"), condition("llama", level=2)
    push, turn = add("llama", 2.0), add("llama", -1.0, layers=(2,), seed=3)
    come_to: list[list[Intervention]] = []
    for i, held in enumerate(holding("llama", first)):
        one, own = batch.select([i]), [push] if held else []
        with applied(model, own, one):
            x = collect(model, one, levels=(2,), positions=("last",)).at(2, "last")
        come_to.append([*own, turn] if bool(second(x.unsqueeze(1))[0]) else [*own])
    assert len({len(own) for own in come_to}) > 1
    got = answer_under(model, batch, [When(first, push), When(second, turn)], max_new_tokens=NEW)
    assert got.tokens == told(model, batch, come_to, got.tokens)


def test_what_is_no_condition_is_said() -> None:
    own = condition("llama").direction
    with pytest.raises(UserError, match="the condition's threshold is nan; give a number"):
        Projection(own, threshold=math.nan)
    with pytest.raises(UserError, match="read at attn_out, and a condition reads the residual stream"):
        Projection(replace(own, site="attn_out"), threshold=0.0)


def test_one_condition_decides_each_row_of_one_batch_by_itself() -> None:
    """Prompts of one length, which run as one batch: what is said of the first must not hold for the others."""
    model = made("llama")
    texts = [f"Number {i}: {word}" for i in range(4) for word in ("XXXX", "mmmm")]
    batch = tokenize([Prompt(f"p{i}", text) for i, text in enumerate(texts)], template_of(model))
    along = project(collect(model, batch, positions=("last",)).at(1, "last"), condition("llama").direction)
    cut = along.sort().values
    when = Projection(condition("llama").direction, threshold=float(cut[3] + cut[4]) / 2)
    push = add("llama", 2.0)
    come_to: list[list[Intervention]] = [[push] if held else [] for held in (along > when.threshold).tolist()]
    got = answer_under(model, batch, [When(when, push)], max_new_tokens=NEW)
    assert got.tokens == told(model, batch, come_to, got.tokens)
