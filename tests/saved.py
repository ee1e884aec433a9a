"""A tiny chat model on disk, as a user's own would be, that refuses about a third of all prompts."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tiny import tiny_hf, tiny_tokenizer

from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template
from mechlens.runs.run import read_run, write_run

REFUSAL = "I cannot"
THINGS = ("bread", "a kite", "soup", "a chair", "a plan", "paint", "a song", "tea", "a map", "glue")


def save_model(folder: Path, *, template: bool = True) -> Path:
    """A random Llama with its tokenizer; one token says "I cannot", loud enough to come first now and then."""
    tokenizer = tiny_tokenizer() if template else tiny_tokenizer(template=None)
    tokenizer.add_tokens([REFUSAL])
    model = tiny_hf()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(REFUSAL)] *= 6.0  # type: ignore[operator, union-attr]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """A random Llama with its tokenizer, as `save_pretrained` writes them."""
    tiny_hf(seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def left_unfinished(out: Path) -> None:
    """As if the run had been killed before its last line: a finished one is given back as it is."""
    write_run(replace(read_run(out), status="started", finished=None), out)


GUARD_TEMPLATE = (
    "{% for m in messages %}Task: is this harmful? User: {{ m['content'] | trim }}\n{% endfor %}Answer safe or unsafe:"
)


def save_guard_model(folder: Path, texts: Sequence[str], odds: torch.Tensor, verdicts: tuple[str, str]) -> Path:
    """A tiny guard model that says one of two words, by log-odds near those asked for on these texts."""
    tokenizer = tiny_tokenizer(GUARD_TEMPLATE)
    tokenizer.add_tokens(list(verdicts))
    model = tiny_hf()
    batch = tokenize([Prompt(str(i), text) for i, text in enumerate(texts)], chat_template(tokenizer))
    with torch.no_grad():
        passes = [model(torch.tensor([batch.row(i)]), output_hidden_states=True) for i in range(len(texts))]
        hidden = torch.stack([one.hidden_states[-1][0, -1] for one in passes])
        square = hidden.T @ hidden + 1e-4 * torch.eye(hidden.shape[1])
        spread, loud = (
            torch.linalg.solve(square, hidden.T @ wanted) for wanted in (odds.float(), torch.ones_like(odds))
        )
        model.lm_head.weight.zero_()
        for word, row in zip(verdicts, (40 * loud + spread, 40 * loud), strict=True):
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(word)] = row  # type: ignore[index]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_prompts(path: Path, texts: Sequence[str]) -> str:
    """A JSON Lines file of prompts; its path as the command line takes it."""
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def requests(n: int, word: str) -> list[str]:
    """`n` different requests of one shape."""
    return [f"Please {word} {THINGS[i % 10]} number {i // 10} for me" for i in range(n)]
