"""A model whose sink is a certain letter wherever it stands: all heads attend to it, its values are drained, and its
residual stream is large in one dimension."""

from typing import Any

import torch
from tiny import tiny_hf, tiny_tokenizer

from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint

DIMENSION, SIZE = 3, 30.0
SINK_HEADS = (0, 1)
"""Of every layer; the others attend evenly."""


def planted_sinks(letter: str = "x") -> Any:
    """A bridge on a GPT-2 whose blocks add next to nothing, so that every level is the embedding."""
    hf_model, tokenizer = tiny_hf("gpt2"), tiny_tokenizer(None)
    token = tokenizer(letter)["input_ids"][0]
    width, size = 32, 8
    with torch.no_grad():
        parts = hf_model.transformer
        parts.wpe.weight.zero_()
        parts.wte.weight.normal_(generator=torch.Generator().manual_seed(0))
        parts.wte.weight[:, DIMENSION] = 0.0
        parts.wte.weight[token] = 0.0
        parts.wte.weight[token, DIMENSION] = SIZE
        for block in parts.h:
            for norm in (block.ln_1, block.ln_2):
                norm.weight.fill_(1.0)
                norm.bias.zero_()
            attention = block.attn.c_attn
            attention.weight.zero_()
            attention.bias.zero_()
            for head in SINK_HEADS:
                attention.bias[head * size] = 10.0  # the same query everywhere
                attention.weight[DIMENSION, width + head * size] = 2.0  # a key of the large dimension
            values = torch.randn(width, width, generator=torch.Generator().manual_seed(1))
            values[DIMENSION] = 0.0
            others = torch.arange(width) != DIMENSION
            # The sink's other dimensions are all alike after the norm, so its values are 0.
            values[others] -= values[others].mean(dim=0)
            attention.weight[:, 2 * width :] = values
            block.attn.c_proj.weight.normal_(std=1e-3, generator=torch.Generator().manual_seed(2))
            for quiet in (block.attn.c_proj.bias, block.mlp.c_proj.weight, block.mlp.c_proj.bias):
                quiet.zero_()
    checkpoint = Checkpoint("planted", "tests/planted", fingerprint=weight_fingerprint(hf_model.state_dict()))
    return bridge(hf_model, tokenizer, checkpoint)
