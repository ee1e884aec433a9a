"""The network before any training: its blocks drawn anew as its configuration says, its embeddings kept.

What can be read from it, the words carry: it is the floor under every claim that training put something there.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechlens.errors import UserError
from mechlens.models.checkpoint import is_packed
from mechlens.models.native import blocks_of

_LOADED = "_is_hf_initialized"
"""Mark of a loaded parameter, which transformers' own initialisers leave as it is."""


@torch.no_grad()
def randomise_blocks(hf_model: Any, blocks: Sequence[nn.Module], seed: int) -> None:
    """Every parameter of the blocks, in place, from the model's own initialiser; one seed gives one network.

    UserError where that leaves a matrix as it was: such a network would hold some of the training.
    """
    model = next((part for part in hf_model.modules() if isinstance(part, PreTrainedModel)), None)
    if model is None:
        raise UserError(f"{type(hf_model).__name__} has no initialiser, so its blocks can't be drawn anew")
    named = {f"{i}.{name}": p for i, block in enumerate(blocks) for name, p in block.named_parameters()}
    before = {name: _outline(parameter) for name, parameter in named.items()}
    marked = [parameter for parameter in named.values() if hasattr(parameter, _LOADED)]
    marks = [getattr(parameter, _LOADED) for parameter in marked]
    for parameter in marked:
        delattr(parameter, _LOADED)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for block in blocks:
                block.apply(model._init_weights)
    finally:
        for parameter, mark in zip(marked, marks, strict=True):
            setattr(parameter, _LOADED, mark)
    left = [name for name, outline in before.items() if outline is not None and outline == _outline(named[name])]
    if left:
        raise UserError(f"{type(model).__name__} has no initialiser for {left[0]}, so its blocks can't be drawn anew")


def _outline(parameter: Tensor) -> tuple[float, float] | None:
    """Two sums that tell a drawn matrix from the one before; None of vectors and constants, which may stay."""
    if parameter.ndim < 2 or min(parameter.shape[-2:]) < 2 or bool((parameter == parameter.flatten()[0]).all()):
        return None
    exact = parameter.cpu() if parameter.device.type == "mps" else parameter  # which knows no float64
    return float(exact.sum(dtype=torch.float64)), float(exact.abs().sum(dtype=torch.float64))


@contextlib.contextmanager
def random_blocks(module: nn.Module, seed: int) -> Iterator[nn.Module]:
    """A model in training with random blocks, for the length of a `with` block; the same tensors come back after it.

    An adapter's own matrices are drawn anew too. Memory holds the blocks twice meanwhile.
    """
    blocks = list(blocks_of(module))
    kept = [(parameter, parameter.data) for block in blocks for parameter in block.parameters()]
    if any(is_packed(data) for _, data in kept):
        raise UserError("the model's blocks are quantised, so they can't be drawn anew")
    try:
        for parameter, data in kept:
            parameter.data = torch.empty_like(data).copy_(data)
        randomise_blocks(module, blocks, seed)
        yield module
    finally:
        for parameter, data in kept:
            parameter.data = data
