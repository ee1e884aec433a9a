"""The laws of positions, held by any tokenizer and template on any texts that they accept; no model is run."""

import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from tiny import CHATML, tiny_tokenizer

from mechlens.errors import UserError
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template


class Template(NamedTuple):
    """A chat template, and whether it trims the user's words."""

    source: str
    trims: bool


LAST = "{{ messages[-1]['content'] }}"
TEMPLATES = {
    "ChatML": Template(CHATML, False),
    "Llama-2": Template("{{ bos_token }}[INST] {{ messages[-1]['content'] | trim }} [/INST]", True),
    "Gemma": Template(
        "<bos>{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
        "<|im_start|>model{{ '\n' }}",
        True,
    ),
    "plain words": Template(f"USER: {LAST} ASSISTANT:", False),
    "letters after": Template(f"<bos>{LAST}he end", False),
    "white space after": Template(f"Q {LAST} \n ", False),
}


@lru_cache(maxsize=16)
def tokenizer_of(source: str) -> Any:
    """A byte-level tokenizer with this chat template."""
    return tiny_tokenizer(source)


def require_positions(tokenizer: Any, trims: bool | None, texts: Sequence[str]) -> str:
    """What law is broken; "" where all hold. UserError where no text is accepted.

    `trims` None is a template that may do anything to the words: then only what doesn't hang on it is asked.
    """
    template = chat_template(tokenizer)
    alone: list[TokenBatch] = []
    refused: UserError | None = None
    for i, one in enumerate(texts):
        try:
            alone.append(_tokenized([Prompt(f"p{i}", one)], template))
        except UserError as error:
            refused = error
    if not alone:
        assert refused is not None
        raise refused
    prompts = [batch.prompts[0] for batch in alone]
    try:
        sides = {side: _tokenized(prompts, template, padding_side=side) for side in ("left", "right")}
    except UserError as error:
        if trims is None:  # ends of different lengths are refused together
            raise
        return f"accepted one at a time and refused together: {error}"
    for i, own in enumerate(alone):
        for side, batch in sides.items():
            if said := _differs(own, batch, i):
                return f"{said} with padding on the {side}, of {prompts[i].text[:80]!r}"
        if trims is not None and (said := _not_the_words(tokenizer, own, trims)):
            return f"{said}, of {prompts[i].text[:80]!r}"
    return ""


def _tokenized(prompts: list[Prompt], template: Any, **options: Any) -> TokenBatch:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenize(prompts, template, **options)


def _differs(own: TokenBatch, batch: TokenBatch, i: int) -> str:
    """Whether a row of a batch isn't the prompt alone."""
    if batch.row(i) != own.row(0):
        return "other tokens"
    if batch.positions != own.positions or batch.roles(i) != own.roles(0):
        return "other roles"
    at, alone = (batch.index[i] - batch.offset(i)).tolist(), (own.index[0] - own.offset(0)).tolist()
    return "" if at == alone else "other places"


def _not_the_words(tokenizer: Any, own: TokenBatch, trims: bool) -> str:
    """Whether the tokens aren't the template's own, or what ends at `inst` isn't exactly the user's text."""
    prompt, ids = own.prompts[0], own.row(0)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.text}], tokenize=False, add_generation_prompt=True
    )
    if ids != tokenizer(rendered, add_special_tokens=False)["input_ids"]:
        return "not the tokens of the tokenizer's own template"
    kept = prompt.text.strip() if trims else prompt.text
    start, inst = own.instruction[0].tolist()
    before, through = (_bytes(tokenizer, ids[: end + 1]) for end in (inst - 1, inst))
    end = rendered.rindex(kept) + len(kept)
    wanted = rendered[:end].encode()
    if not through.startswith(wanted) or (not bool(own.merged[0]) and through != wanted):
        return f"inst ends at {through[-20:]!r}, and the words at {wanted[-20:]!r}"
    if len(before) >= len(wanted):
        return "a token before inst ends the words"
    ours = _bytes(tokenizer, ids[start : inst + 1])
    return "" if kept.encode() in ours else f"the words' tokens are {ours[:60]!r}"


def _bytes(tokenizer: Any, ids: Sequence[int]) -> bytes:
    """What tokens of a byte-level tokenizer stand for."""
    special = set(tokenizer.all_special_ids)
    table = _alphabet()
    parts = []
    for token, name in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        parts.append(name.encode() if token in special else bytes(table[character] for character in name))
    return b"".join(parts)


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """The byte behind each character of GPT-2's alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}
