"""A hand-built chat model that refuses by one direction, written at one layer: what a selection has to find."""

from pathlib import Path
from typing import Any

import torch
import transformers
from saved import REFUSAL
from tiny import SMALL, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CONSENT = "Sure"
MARK = "z"
"""Harmful requests hold this letter, several times."""
LAYERS, WRITING = 6, 1
"""Blocks, and the block that writes refusal into the residual stream; it can be read from level WRITING + 1 on."""
LEVEL = WRITING + 1
REFUSE, ACCEPT, FEATURE, BIAS = 0, 1, 2, 3
"""Dimensions of the residual stream: what the answer is read from, what the mark puts in, and a constant."""
WIDTH = 128
FREE = slice(4, WIDTH)


def refusing_model(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Refuses where the prompt holds enough marks.

    Attention averages over all tokens so far; block WRITING adds the average of FEATURE along REFUSE, and blocks above
    it add averages of random features to dimensions that nothing reads, so that directions found there are noisier.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([REFUSAL])
    settings = SMALL | {"num_hidden_layers": LAYERS, "num_key_value_heads": 4, "hidden_size": WIDTH}
    config = transformers.LlamaConfig(**settings, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.zero_()
        embedding[:, FREE] = torch.randn(len(embedding), WIDTH - 4) * 0.3
        embedding[:, BIAS] = 1.0
        embedding[tokenizer.convert_tokens_to_ids(MARK), FEATURE] = 3.0
        for number, block in enumerate(model.model.layers):
            attention = block.self_attn
            for weight in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, block.mlp.down_proj):
                weight.weight.zero_()
            if number == WRITING:
                attention.v_proj.weight[0, FEATURE] = 1.0
                attention.o_proj.weight[REFUSE, 0] = 4.0
            elif number > WRITING:
                attention.v_proj.weight[:8, FREE] = torch.randn(8, WIDTH - 4) * 0.5
                attention.o_proj.weight[FREE, :8] = torch.randn(WIDTH - 4, 8) * 0.1
        head = model.lm_head.weight.zero_()
        head[tokenizer.convert_tokens_to_ids(REFUSAL), REFUSE] = 6.0
        head[tokenizer.convert_tokens_to_ids("a"), BIAS] = 10.0
    model.config.architectures = [type(model).__name__]
    return model, tokenizer


def save_refusing_model(folder: Path) -> Path:
    """The model on disk, as the command line takes it."""
    model, tokenizer = refusing_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def requests(n: int, harmful: bool) -> list[str]:
    """Requests of one shape, with marks or without."""
    things = ("bread", "a kite", "soup", "a chair", "a plan", "paint", "a song", "tea", "a map", "glue")
    mark = MARK * 8 if harmful else "v" * 8
    return [f"Make {things[i % 10]} {mark} number {i // 10}" for i in range(n)]


@torch.inference_mode()
def make_half_refuse(model: Any, tokenizer: Any) -> None:
    """Refusal and consent become tokens, unembedded along the widest direction of all prompts: on one side of their
    mean the model refuses, on the other it consents."""
    from mechlens.prompts.builtin import builtin_prompts

    tokenizer.add_tokens([REFUSAL, CONSENT])
    texts = [prompt.text for name in ("harmful", "harmless", "benign") for prompt in builtin_prompts(name)[:60]]
    last = []
    for text in texts:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        last.append(model.model(ids["input_ids"]).last_hidden_state[0, -1])
    states = torch.stack(last)
    mean = states.mean(dim=0)
    widest = torch.linalg.svd(states - mean).Vh[0]
    centred = widest - (widest @ mean) / (mean @ mean) * mean
    for words, sign in ((REFUSAL, 1), (CONSENT, -1)):
        token = tokenizer.convert_tokens_to_ids(words)
        model.lm_head.weight[token] = sign * 100 * centred
        model.get_input_embeddings().weight[token] = sign * 1000 * centred  # what was said is said again
