"""Where a batch doesn't fit into memory its halves are run, whatever is done with it, and say the same."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from caches import DictShelf, Killed
from tiny import tiny_hf, tiny_tokenizer, words
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.damage import damage
from mechlens.methods.directions.direction import Direction
from mechlens.methods.patching.metrics import LogitDifference
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.methods.steering.interventions import ALL, Add, Intervention
from mechlens.methods.steering.steering import answer_under, logits_under
from mechlens.models.bridge import bridge, checkpoint_now
from mechlens.models.checkpoint import Checkpoint
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt, PromptPair

PROMPTS = [Prompt(id=f"p{i}", text=text) for i, text in enumerate(words(6))]
LONGEST = 90
"""Tokens: more than the longest prompt and its answer have, fewer than two."""


@pytest.fixture(scope="module")
def model() -> Any:
    return bridge(tiny_hf(), tiny_tokenizer(), Checkpoint("tiny", "tests/tiny"))


def strengths(model: Any) -> list[list[Intervention]]:
    """For each prompt another strength at two layers, at every token, so that each has a start of its own."""
    one = Direction(
        vector=torch.randn(32, generator=torch.Generator().manual_seed(0)), level=1, position="inst", site="resid",
        method="random", contrast=("a", "b"), train_ids=(), checkpoint=checkpoint_now(model),
        template=template_of(model).fingerprint,
    )  # fmt: skip
    add = Add(one, strength=1.0, unit="raw", layers=(0, 2), positions=ALL, phase="both")
    return [[replace(add, strength=float(i % 3))] for i in range(len(PROMPTS))]


def harmed(model: Any) -> torch.Tensor:
    batch = tokenize(PROMPTS, template_of(model))
    found = damage(model, strengths(model)[1][0], batch, answer(model, batch, max_new_tokens=3), ["the thing is"] * 3)  # type: ignore[arg-type]
    return torch.cat([found.plain, found.own, found.kl])


def patched(model: Any) -> torch.Tensor:
    pairs = [PromptPair(Prompt(f"c{i}", f"the thing {i}"), Prompt(f"d{i}", f"the ring? {i}")) for i in range(2)]
    return patch_sweep(model, pairs, LogitDifference(40, 41), PatchPlan("z", positions=("inst", "last"))).values


CASES: dict[str, Callable[[Any], Any]] = {
    "collect": lambda model: collect(model, PROMPTS).values,
    "answer": lambda model: answer(model, PROMPTS, max_new_tokens=5).tokens,
    "answer under": lambda model: answer_under(model, PROMPTS, strengths(model), max_new_tokens=5).tokens,
    "logits under": lambda model: logits_under(model, PROMPTS, strengths(model)),
    "patch": patched,
    "damage": harmed,
}


@contextlib.contextmanager
def room(tokens: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A device on which a block bears so many tokens; those that blocks were given, in order."""
    seen: list[int] = []
    run = LlamaDecoderLayer.forward

    def small(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(hidden_states[..., 0].numel())
        if seen[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, hidden_states, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaDecoderLayer, "forward", small)
        yield seen


@pytest.mark.parametrize("case", CASES)
def test_halves_say_the_same(case: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = CASES[case](model)
    with room(LONGEST, monkeypatch) as seen:
        got = CASES[case](model)
    assert max(seen) > LONGEST
    if isinstance(right, torch.Tensor):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    else:
        assert got == right


@pytest.mark.parametrize("case", ["answer", "answer under", "patch"])
def test_one_prompt_that_does_not_fit(case: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    CASES[case](model)
    with room(12 if case == "patch" else 1, monkeypatch), pytest.raises(UserError, match="doesn't fit into memory"):
        CASES[case](model)


def test_a_halved_and_killed_sweep_goes_on_and_pieces_are_the_whole_batch_s(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(**options: Any) -> Any:
        return answer_under(model, PROMPTS, strengths(model), max_new_tokens=5, max_tokens=90, **options).tokens

    right, shelf = ask(), DictShelf(room=1)
    with room(LONGEST, monkeypatch), pytest.raises(Killed):
        ask(cache=shelf)
    assert len(shelf.pieces) == 1
    shelf.room = 1000
    assert ask(cache=shelf) == right, "with more memory, from the piece that was made in halves"
    with room(1, monkeypatch) as seen:
        assert ask(cache=shelf) == right
    assert seen == []
