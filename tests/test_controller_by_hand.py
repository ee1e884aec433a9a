"""Controllers against their formulas on a plain Hugging Face model: gate, weights, logits and answers, token by token.

Nothing of mechlens takes part but the file of the controller, the prompt's tokens and what is compared.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from test_controllers import fitted
from test_steering import batch_of, made
from tiny import tiny_hf
from torch import Tensor

import mechlens as ml
from mechlens.methods.behaviour.damage import answer_losses

pytestmark = pytest.mark.exact

NEW, STRENGTH = 4, 1.5
ARCHITECTURES = ("llama", "gemma2", "gpt2")


class Plain(NamedTuple):
    """A Hugging Face model of its own, and its blocks."""

    model: Any
    blocks: Any


def plain(architecture: str) -> Plain:
    """The same weights as `made`, never bridged."""
    model = tiny_hf(architecture)
    if not architecture.startswith("gemma"):
        for parameter in model.parameters():
            parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    (blocks,) = (one for name, one in model.named_modules() if isinstance(one, torch.nn.ModuleList) and len(one) == 3)
    return Plain(model, blocks)


def residuals(own: Plain, ids: Tensor) -> list[Tensor]:
    """The last token's residual at every level."""
    seen: list[Tensor] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0, -1].clone())

    def after(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).reshape(ids.shape[1], -1)[-1].clone())

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in own.blocks]
    handles.append(own.blocks[-1].register_forward_hook(after))
    own.model(ids)
    for handle in handles:
        handle.remove()
    return seen


def decided_by_hand(file: Path, own: Plain, ids: Tensor) -> tuple[float, Tensor]:
    """Gate and weights by Linear, ReLU, Linear, from what is written in the file."""
    with safe_open(file, framework="pt") as opened_file:
        parts = {name: opened_file.get_tensor(name) for name in opened_file.keys()}  # noqa: SIM118
        fields = json.loads(opened_file.metadata()["mechlens"])["fields"]
    levels = [place["$tuple"][0] for place in fields["reads"]["$tuple"]]
    seen = residuals(own, ids)
    x = (torch.cat([seen[level] for level in levels]) - parts["network.centre"]) / parts["network.spread"]
    said = parts["network.outer"] @ (parts["network.inner"] @ x + parts["network.inner_bias"]).clamp(min=0)
    said = said + parts["network.outer_bias"]
    if fields["gate"] == "raw":
        return float(said[0]), 1 / (1 + (-said[1:]).exp())
    share = said[1:].exp() / said[1:].exp().sum()
    return 1 / (1 + math.exp(-float(said[0]))), share * len(share) / 2


@contextlib.contextmanager
def adding(module: Any, vector: Tensor, start: int, *, before: bool) -> Iterator[None]:
    """A vector added to what a block is given, or to what it gives, at tokens from `start` on."""

    def added(hidden: Tensor) -> Tensor:
        shape, moved = hidden.shape, hidden.reshape(1, -1, hidden.shape[-1]).clone()
        moved[:, start:] += vector
        return moved.reshape(shape)

    def given(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (added(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": added(kwargs["hidden_states"])}

    def gives(module: Any, args: Any, output: Any) -> Any:
        return (added(output[0]), *output[1:]) if isinstance(output, tuple) else added(output)

    handle = (
        module.register_forward_pre_hook(given, with_kwargs=True) if before else module.register_forward_hook(gives)
    )
    yield
    handle.remove()


def by_hand(file: Path, controller: ml.Controller, own: Plain, prompt: list[int]) -> tuple[list[int], Tensor]:
    """A greedy answer, the whole text anew for each token, and the logits that each was taken from.

    As published blocks' outputs are added to at the answer's tokens, and the prompt is left alone.
    """
    published = controller.phase == "generation"
    gate, weights = decided_by_hand(file, own, torch.tensor([prompt]))
    tokens, logits = [], []
    with contextlib.ExitStack() as stack:
        for i, layer in enumerate(controller.layers):
            vector = STRENGTH * gate * float(weights[i] * controller.lengths[i]) * controller.directions[i]
            start = len(prompt) if published else 0
            stack.enter_context(adding(own.blocks[layer], vector, start, before=not published))
        for _ in range(NEW):
            logits.append(own.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1])
            tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_it_is_its_formula_on_a_plain_model(architecture: str, published: bool, tmp_path: Path) -> None:
    model, own = made(architecture), plain(architecture)
    where: dict[str, Any] = {"reads": (), "layers": ()} if published else {"reads": (0, 1)}
    fit = fitted(architecture, published=published, epochs=3, **where)
    # As hard as a gate can be: it differs between prompts, and as published it isn't between 0 and 1.
    outer = fit.network.outer.clone()
    outer[0] *= 4.0 if published else 2.0
    controller = replace(fit, network=replace(fit.network, outer=outer))
    file = ml.save(controller, tmp_path / "controller.safetensors")
    steered = [ml.Controlled(ml.open(file), strength=STRENGTH)]
    for side in ("left", "right"):
        batch = batch_of(architecture, side=side)
        said = ml.answer_under(model, batch, steered, max_new_tokens=NEW)
        loss = answer_losses(model, [steered], batch, said)[0, 0]
        first = ml.logits_under(model, batch, steered)
        moved = False
        for i in range(len(batch.prompts)):
            tokens, logits = by_hand(file, controller, own, batch.row(i))
            n = len(said.tokens[i])
            assert tokens[:n] == list(said.tokens[i])
            assert torch.allclose(first[i], logits[0], atol=1e-5 * float(logits.abs().max()))
            told = -logits[:n].double().log_softmax(dim=-1)[range(n), tokens[:n]].mean()
            assert float(loss[i]) == pytest.approx(float(told), abs=1e-4, rel=1e-5)
            moved |= tokens[:n] != list(ml.answer(model, batch.select([i]), max_new_tokens=NEW).tokens[0])
        assert moved
