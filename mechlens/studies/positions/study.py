"""`mechlens positions`: which token is which."""

from typing import Any

from mechlens.models.load import load_tokenizer
from mechlens.prompts.batch import token_text, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template
from mechlens.studies.positions.config import Positions


def named_tokens(config: Positions) -> list[dict[str, Any]]:
    """Every token of the formatted prompt: index, id, text and role."""
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    template = chat_template(tokenizer, config.template, today=config.today)
    prompt = Prompt("prompt", config.text, system=config.system)
    batch = tokenize([prompt], template, allow_special=config.allow_special)
    return [
        {"index": index, "id": token, "token": token_text(tokenizer, token), "role": role}
        for index, (token, role) in enumerate(zip(batch.row(0), batch.roles(0), strict=True))
    ]
