"""A look into a Hugging Face model that is being trained, which leaves no trace in it."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechlens.errors import UserError
from mechlens.models.engine.forward import Reader, gather
from mechlens.models.native import blocks_of
from mechlens.prompts.batch import TokenBatch


class PlainPass(NamedTuple):
    """What plain forward passes read, on the CPU in float32."""

    residuals: Float[Tensor, "prompt level read d_model"]
    logits: Float[Tensor, "prompt vocab"]
    """Of the token after each prompt."""


def plain_pass(
    module: nn.Module, batch: TokenBatch, positions: Sequence[str], levels: Sequence[int], rows: int = 16
) -> PlainPass:
    """Residuals at named positions and levels, and next-token logits, by hooks on the module's own blocks.

    The module may be wrapped (PEFT) and is never bridged. Nothing of its state is changed, nor any random number
    generator's. `batch` is padded on the right. UserError for a level that isn't there.
    """
    blocks = blocks_of(module)
    wrong = [level for level in levels if not 0 <= level <= len(blocks)]
    if wrong:
        raise UserError(f"there is no level {wrong}; this model has levels 0 to {len(blocks)}")
    device = next(module.parameters()).device
    read = torch.stack([batch.at(name) for name in positions], dim=1)
    residuals, logits = [], []
    with undisturbed(module):
        for start in range(0, len(batch.prompts), rows):
            part = slice(start, start + rows)
            width = int(batch.lengths[part].max())
            tokens, mask = batch.tokens[part, :width], batch.mask[part, :width]
            reader = Reader(levels, len(blocks), read[part], stops=False)
            with reader.attached(list(blocks)):
                output = module(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False)
            residuals.append(reader.stacked())
            logits.append(gather(output.logits, batch.lengths[part, None] - 1)[:, 0])
    return PlainPass(torch.cat(residuals), torch.cat(logits))


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule's mode and every generator is what it was."""
    modes = [(part, part.training) for part in module.modules()]
    words, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            module.eval()
            yield
    finally:
        for part, training in modes:
            part.training = training
        random.setstate(words)
        np.random.set_state(numbers)
