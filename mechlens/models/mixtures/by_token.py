"""Adapters mixed anew at every token and block, as X-LoRA does (Buehler & Buehler 2024), while a model runs."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel, is_bridge
from mechlens.models.checkpoints.lora import LowRank
from mechlens.models.native import native, plain_module

Gate = Callable[[Float[Tensor, "row token d_model"], int], Float[Tensor, "row token adapter"]]
"""The residual stream at a block's input, the block's number -> how much of each adapter every token gets there."""


@dataclass(frozen=True)
class TokenGate:
    """Shares that add up to 1, by a softmax of linear scores of the residual stream: the same in every block.

    >>> import torch
    >>> ml.TokenGate(torch.zeros(2, 8), torch.tensor([0.0, 0.0]))(torch.ones(1, 1, 8), 0).tolist()
    [[[0.5, 0.5]]]
    """

    weight: Float[Tensor, "adapter d_model"] = field(repr=False)
    bias: Float[Tensor, " adapter"] = field(repr=False)

    def __call__(self, residual: Float[Tensor, "row token d_model"], block: int) -> Float[Tensor, "row token adapter"]:
        """The shares of every token."""
        shares: Tensor = torch.nn.functional.linear(residual.float(), self.weight, self.bias).softmax(dim=-1)
        return shares


@contextlib.contextmanager
def mixed_by_token(
    model: LanguageModel, adapters: Sequence[Mapping[str, LowRank]], gate: Gate
) -> Iterator[LanguageModel]:
    """The model with a mixture of adapters (see `read_lora`) that its gate decides on at every token of every block.

    To collect activations from, answer with or run as one likes: whole passes, since every matrix gets a hook. A share
    of 1 for one adapter is that adapter. UserError for a matrix that the model doesn't have, or that TransformerLens
    keeps in parts, and for models without a bridge.

    >>> import torch
    >>> model = ml.load("smollm2")
    >>> width = model.cfg.d_model
    >>> adapter = {"model.layers.1.self_attn.o_proj": ml.LowRank(torch.ones(width, 1), torch.ones(1, width), scale=0.1)}
    >>> half = ml.TokenGate(torch.zeros(2, width), torch.zeros(2))
    >>> with ml.mixed_by_token(model, [adapter, {}], half) as mixed:  # half of it, and half of nothing
    ...     acts = ml.collect(mixed, ["Say hello."], positions=["last"])
    >>> acts.levels[0], acts.values.isfinite().all().item()
    (0, True)
    """
    if not is_bridge(model):
        raise UserError("adapters are mixed in models that ml.load gives, and this is no TransformerBridge")
    if not adapters:
        raise UserError("no adapter is to be mixed; give at least one, such as ml.read_lora(FOLDER)")
    whole = _run_whole(model, list(dict.fromkeys(name for one in adapters for name in one)))
    shares: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for number, block in enumerate(plain_module(one) for one in model.blocks):
            stack.callback(block.register_forward_pre_hook(_gating(gate, number, len(adapters), shares),
                                                           with_kwargs=True).remove)  # fmt: skip
        for name, module, number in whole:
            ways = [(k, one[name]) for k, one in enumerate(adapters) if name in one]
            stack.callback(module.register_forward_hook(_adding(ways, number, shares)).remove)
        yield model


def _run_whole(model: LanguageModel, names: Sequence[str]) -> list[tuple[str, nn.Module, int]]:
    """The modules by their names in the plain model, and their blocks; UserError where one isn't run as it is."""
    in_parts = [part.original_component for part in model.modules()
                if any(callable(getattr(part, split, None)) for split in _SPLITS)]  # fmt: skip
    apart = {id(own) for part in in_parts for own in part.modules()}
    found = []
    with native(model) as hf_model:
        block_of = {id(own): number for number, block in enumerate(model.blocks) for own in block.modules()}
        for name in names:
            try:
                module = hf_model.get_submodule(name)
            except AttributeError as error:
                raise UserError(f"an adapter changes {name}, which the model doesn't have") from error
            if id(module) in apart or id(module) not in block_of:
                raise UserError(
                    f"an adapter changes {name}, which isn't run by itself in a block of this model, so it can't be "
                    "mixed by token; put it in with checkpoint_swapper"
                )
            found.append((name, module, block_of[id(module)]))
    return found


_SPLITS = ("split_qkv_matrix", "split_gate_up_matrix")


def _gating(gate: Gate, number: int, n: int, shares: dict[int, Tensor]) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = gate(args[0] if args else kwargs["hidden_states"], number)
        if found.shape[-1] != n:
            raise UserError(f"the gate gives {found.shape[-1]} shares and there are {n} adapters; give one for each")
        shares[number] = found

    return before


def _adding(ways: Sequence[tuple[int, LowRank]], number: int, shares: dict[int, Tensor]) -> Callable[..., Tensor]:
    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x, total = args[0].float(), output.float()
        for k, one in ways:
            moved = (x @ one.down.to(x).T) @ one.up.to(x).T
            total = total + shares[number][..., k : k + 1].to(x) * one.scale * moved
        return total.to(output.dtype)

    return after
