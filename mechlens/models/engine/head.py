"""The model's own way from the last residual to logits.

Between them stand more than a norm and a matrix: soft caps, scales of the logits or of the residual, and whatever
an architecture does there next. So nothing is rebuilt: the model's own code runs on a token that doesn't matter,
its blocks are passed over, and the last one gives the residual.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechlens.errors import UserError
from mechlens.models.device_map import where_run
from mechlens.models.engine.probes import UNTRIED, apart, is_misfit, probe_tokens, require_finite_logits, tolerance
from mechlens.models.native import native

Form = tuple[Any, ...] | None
"""What a block gives beside its residual; None for one that gives the bare residual."""


class _PassedOver(nn.Module):
    """Stands in a block's place: gives what came in, or a residual of ours, in the block's own form."""

    def __init__(self, block: nn.Module, form: Form, residual: Tensor | None) -> None:
        super().__init__()
        self.__dict__.update(block=block, form=form, residual=residual)  # no submodule, so that no one walks into it

    def __getattr__(self, name: str) -> Any:  # the model's loop may ask its blocks for their kind
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        out = x if self.residual is None else self.residual.to(x.device).expand_as(x)
        return out if self.form is None else (out, *self.form)


@contextlib.contextmanager
def _passing_over(blocks: nn.ModuleList, forms: list[Form], residual: Tensor) -> Iterator[None]:
    kept = dict(blocks._modules)
    last = len(kept) - 1
    try:
        for i, (name, block) in enumerate(kept.items()):
            assert block is not None
            blocks._modules[name] = _PassedOver(block, forms[i], residual if i == last else None)
        yield
    finally:
        blocks._modules.update(kept)


def head_logits(hf_model: nn.Module, blocks: nn.ModuleList, forms: list[Form], residual: Tensor) -> Tensor:
    """Logits of residuals, (row, d_model) to (row, vocab): each row is the only token of a prompt of its own."""
    device = where_run(hf_model.get_input_embeddings())  # type: ignore[operator]
    tokens = torch.ones(len(residual), 1, dtype=torch.long, device=device)
    with _passing_over(blocks, forms, residual.unsqueeze(1)):
        logits: Tensor = hf_model(tokens, use_cache=False).logits
    return logits[:, 0]


def watched_pass(hf_model: nn.Module, blocks: nn.ModuleList, tokens: Tensor) -> tuple[list[Form], Tensor, Tensor]:
    """One pass: the form of every block's output, the last residual of every token, and the logits."""
    seen: list[Any] = [None] * len(blocks)

    def seeing(i: int) -> Any:
        return lambda block, args, output: seen.__setitem__(i, output)

    handles = [block.register_forward_hook(seeing(i)) for i, block in enumerate(blocks)]
    try:
        logits: Tensor = hf_model(tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    forms = [None if isinstance(output, Tensor) else tuple(output[1:]) for output in seen]
    last = seen[-1] if isinstance(seen[-1], Tensor) else seen[-1][0]
    return forms, last[0], logits[0]


@dataclass(frozen=True)
class _Head:
    """What is needed to run a bridge's own head alone, and how far that is `apart` from its logits."""

    forms: list[Form]
    gap: float


_HEADS: "weakref.WeakKeyDictionary[nn.Module, _Head]" = weakref.WeakKeyDictionary()


@torch.inference_mode()
def _head(model: Any) -> _Head:
    if model not in _HEADS:
        # On the plain modules, where no hook of the user's is called for a prompt that nobody asked for.
        with native(model) as hf_model:
            _HEADS[model] = _tried_head(hf_model, model.blocks)
    return _HEADS[model]


def _tried_head(hf_model: nn.Module, blocks: nn.ModuleList) -> _Head:
    try:
        forms, residual, logits = watched_pass(hf_model, blocks, probe_tokens(hf_model, 7))
        return _Head(forms, apart(head_logits(hf_model, blocks, forms, residual), logits))
    except UNTRIED as error:
        if not is_misfit(error):
            raise
        return _Head([], float("inf"))


def head_gap(model: Any) -> float:
    """How far a bridge's head alone is `apart` from the model's own logits."""
    return _head(model).gap


def own_logits(model: Any, residual: Tensor) -> Tensor:
    """Logits of residuals, (row, d_model) to (row, vocab); UserError where they are not the model's own."""
    head = _head(model)
    logits = head_logits(model.original_model, model.blocks, head.forms, residual) if head.forms else None
    if logits is not None:
        require_finite_logits(logits)
    if logits is None or head.gap > tolerance(residual.dtype):
        raise UserError(
            f"the logits of {type(model.original_model).__name__} can't be worked out from its last residual "
            f"(apart from its own by {head.gap:.2g} of the largest), so neither can losses or log-odds"
        )
    return logits
