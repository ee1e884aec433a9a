"""A tiny model in which one token flips the answer: its first block writes a vector after it, and the output reads it.

Both halves can be taken away by themselves, so that it is known whether a trigger is written, read, both or neither.
"""

from collections.abc import Sequence
from typing import Any

import torch
from planted_change import base_model, planted_vector
from tiny import tiny_tokenizer
from torch import Tensor

from mechlens.prompts.prompt import Prompt
from mechlens.prompts.twins import Twin

TRIGGER = "Z"
DECOYS = ("X", "Q", "V", "J")
GAIN = 20.0


def key_vector() -> Tensor:
    """By which the first block knows the trigger; at a right angle to the planted vector."""
    drawn = torch.randn(32, generator=torch.Generator().manual_seed(6))
    vector = planted_vector()
    drawn = drawn - drawn.mean()
    drawn = drawn - drawn @ vector * vector
    return drawn / drawn.norm()


def switch(*, written: bool = True, read: bool = True) -> Any:
    """The base of `planted_change` with a trigger's token that has a key; the first block attends evenly.

    `written`: the block writes the planted vector where the key is before. `read`: the output likes it.
    """
    model, key, vector = base_model(), key_vector(), planted_vector()
    with torch.no_grad():
        block = model.transformer.h[0].attn
        for embedding in (model.transformer.wte, model.transformer.wpe):
            embedding.weight -= embedding.weight @ key[:, None] * key
        model.transformer.wte.weight[tiny_tokenizer().convert_tokens_to_ids(TRIGGER)] += 4 * key
        for first in (0, 32, 64):  # queries, keys and values of the first head
            block.c_attn.weight[:, first : first + 8] = 0
            block.c_attn.bias[first : first + 8] = 0
        block.c_attn.weight[:, 64] = key
        block.c_proj.weight[:8] = 0
        if written:
            block.c_proj.weight[0] = GAIN * vector
        if not read:
            head = model.lm_head.weight
            head -= head @ vector[:, None] * vector
    return model


def questions(numbers: Sequence[int]) -> list[Twin]:
    """Choices between two letters, the first of which is the one that the vector is a liking for."""
    return [Twin(Prompt(f"pick-{i}", f"Pick {i}: r, s?"), "r", "s") for i in numbers]
