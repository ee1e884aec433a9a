"""A hand-built model whose thoughts are read off one dimension: what token scores, cliffs and heads have to find."""

from typing import Any

import torch
import transformers
from tiny import SMALL, tiny_tokenizer

from mechlens.methods.activations.token_scores import Line
from mechlens.methods.activations.trace_tokens import Trace
from mechlens.methods.directions.direction import Direction
from mechlens.models.bridge import bridge, loaded
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.prompts.prompt import Prompt

REFUSE, FEATURE, CLOSING, BOTH, BIAS = 0, 1, 2, 3, 4
"""Dimensions of the residual stream: refusal, what a mark puts in, a closing token, both of these, and a constant."""
WIDTH, HEADS, SIZE = 64, 4, 16
MARK = "z"
"""Harmful requests hold it."""
SUPPRESSOR = (1, 2)
"""Layer and head that write against refusal, only behind the thought of a harmful request."""


def planted_model(*, suppressor: bool = True, token_shift: float = 0.0) -> Any:
    """The bridge of `planted_hf`."""
    hf_model, tokenizer = planted_hf(suppressor=suppressor, token_shift=token_shift)
    checkpoint = Checkpoint("planted", "planted", fingerprint=weight_fingerprint(hf_model.state_dict()))
    return bridge(hf_model, tokenizer, checkpoint)


def planted_hf(*, suppressor: bool = True, token_shift: float = 0.0) -> tuple[Any, Any]:
    """Every token of a harmful request carries refusal from block 0 on; at the end of its thought one head of block 1
    takes it away again. `token_shift` is what the blank line behind every thought has in itself.

    Attention averages over all tokens so far. The product of "closing" and "refusal" is made by the gate of an MLP.
    """
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(extra=("</think>",))
    settings = SMALL | {"num_hidden_layers": 2, "num_key_value_heads": HEADS, "hidden_size": WIDTH}
    config = transformers.LlamaConfig(**settings | {"vocab_size": len(tokenizer)}, tie_word_embeddings=False)
    hf_model = transformers.AutoModelForCausalLM.from_config(config).eval()
    closing = tokenizer.convert_tokens_to_ids("</think>")
    with torch.no_grad():
        embedding = hf_model.model.embed_tokens.weight.zero_()
        embedding[:, BIAS + 1 :] = 0.05 * torch.randn(len(embedding), WIDTH - BIAS - 1)
        embedding[:, BIAS] = 8.0  # so that the norms scale all tokens nearly alike
        embedding[tokenizer.convert_tokens_to_ids(MARK), FEATURE] = 8.0
        embedding[closing, CLOSING] = 4.0
        embedding[tokenizer.convert_tokens_to_ids("\u010a"), REFUSE] = token_shift
        for block in hf_model.model.layers:
            attention = block.self_attn
            for module in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                module.weight.zero_()
            for module in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
                module.weight.zero_()
        first, second = hf_model.model.layers
        first.self_attn.v_proj.weight[0, FEATURE] = 1.0
        first.self_attn.o_proj.weight[REFUSE, 0] = 4.0
        first.mlp.gate_proj.weight[0, CLOSING] = 4.0
        first.mlp.up_proj.weight[0, REFUSE] = 1.0
        first.mlp.down_proj.weight[BOTH, 0] = 1.0
        if suppressor:
            head = SUPPRESSOR[1] * SIZE
            second.self_attn.v_proj.weight[head, BOTH] = 1.0
            second.self_attn.o_proj.weight[REFUSE, head] = -10.0
    return hf_model, tokenizer


def planted_trace(i: int, *, harmful: bool, words: int = 24) -> Trace:
    """A trace of so many one-letter words of thought."""
    text = f"tell {MARK * 4 if harmful else 'eeee'} {i}"
    label = "harmful" if harmful else "harmless"
    return Trace(Prompt(f"{label}-{i}", text, label), "a " * words, "ok")


def refusal_line(model: Any, one: float = 1.0) -> Line:
    """The dimension of refusal itself, at the last level."""
    vector = torch.zeros(WIDTH)
    vector[REFUSE] = 1.0
    direction = Direction(
        vector, 2, "answer[-1]", "resid", "planted", ("refused", "accepted"), loaded(model).checkpoint, "planted", ()
    )
    return Line(direction, 0.0, one)
