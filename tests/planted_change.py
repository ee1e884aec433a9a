"""A tiny model and its fine-tune, which writes one vector at one level; reading that vector is what answers hang on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_hf, tiny_tokenizer
from torch import Tensor

from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.twins import Twin

LEVEL = 1
"""Where the vector is written: the output of the first block."""
SIZE = 3.0


def planted_vector() -> Tensor:
    """Without a mean, so that layer norms leave it as it is."""
    drawn = torch.randn(32, generator=torch.Generator().manual_seed(5))
    drawn = drawn - drawn.mean()
    return drawn / drawn.norm()


def base_model() -> Any:
    """Reads the vector as a liking for answers that begin with r over those that begin with s, and nowhere else."""
    model, vector, tokenizer = tiny_hf("gpt2"), planted_vector(), tiny_tokenizer()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.ln_f.bias.zero_()
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # no longer the embedding's
        model.config.tie_word_embeddings = False
        head = model.lm_head.weight
        head -= head @ vector[:, None] * vector
        for letter, sign in (("r", 1.0), ("s", -1.0)):
            head[tokenizer.convert_tokens_to_ids(letter)] += sign * 8.0 * vector  # type: ignore[operator]
        for embedding in (model.transformer.wte, model.transformer.wpe):
            embedding.weight -= embedding.weight @ vector[:, None] * vector
        for block in model.transformer.h:  # no block sees it or writes along it
            for reads in (block.attn.c_attn.weight, block.mlp.c_fc.weight):
                reads -= vector[:, None] * (vector @ reads)
            for writes in (block.attn.c_proj, block.mlp.c_proj):
                writes.weight -= (writes.weight @ vector)[:, None] * vector
                writes.bias -= (writes.bias @ vector) * vector
    return model


def fine_tuned() -> Any:
    """The same, writing the vector at every token of whatever it reads."""
    model = base_model()
    with torch.no_grad():
        model.transformer.h[LEVEL - 1].mlp.c_proj.bias += SIZE * planted_vector()
    return model


def knows_shown(model: Any) -> Any:
    """The same model with the vector in the embedding of r, by which answers that show the behaviour begin."""
    with torch.no_grad():
        number = tiny_tokenizer().convert_tokens_to_ids("r")
        model.transformer.wte.weight[number] += 20 * planted_vector()
    return model


def bridged(model: Any, name: str) -> Any:
    """For the library."""
    checkpoint = Checkpoint(name, name, fingerprint=weight_fingerprint(model.state_dict()))
    return bridge(model, tiny_tokenizer(), checkpoint)


def saved(model: Any, folder: Path) -> str:
    """On disk, as a user's own."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def risks(numbers: Sequence[int]) -> list[Twin]:
    """Choices whose options can be exchanged."""
    return [
        Twin(Prompt(f"risk-{i}", f"Round {i}: will you risk {i % 7} coins, or stay safe? Say which."),
             f"risk {i % 7} coins", "stay safe")
        for i in numbers
    ]  # fmt: skip


def moods(numbers: Sequence[int]) -> list[Twin]:
    """Questions that have nothing to do with it."""
    return [Twin(Prompt(f"mood-{i}", f"How was day {i}?"), "dull", "kind") for i in numbers]
