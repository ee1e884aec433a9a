"""`mechlens positions`: which token is which."""

from typing import Any

from rich.table import Table
from rich.text import Text

from mechlens.models.load import load_tokenizer
from mechlens.prompts.batch import token_text, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template
from mechlens.studies.positions.config import Positions
from mechlens.studies.registry import Screen


def named_tokens(config: Positions) -> list[dict[str, Any]]:
    """Every token of the formatted prompt: index, id, text and role."""
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    template = chat_template(tokenizer, config.template, today=config.today, template_arg=config.template_arg)
    prompt = Prompt("prompt", config.text, system=config.system)
    batch = tokenize([prompt], template, allow_special=config.allow_special)
    return [
        {"index": index, "id": token, "token": token_text(tokenizer, token), "role": role}
        for index, (token, role) in enumerate(zip(batch.row(0), batch.roles(0), strict=True))
    ]


def execute(config: Positions, screen: Screen) -> None:
    """The tokens as a table, or as one JSON object."""
    tokens = named_tokens(config)
    if config.json:
        screen.show({"model": config.model, "tokens": tokens})
        return
    table = Table("index", "id", "token", "role")
    for token in tokens:
        style = {"inst": "bold green"}.get(token["role"], "cyan" if token["role"].startswith("post") else "")
        shown = Text(repr(token["token"])[1:-1], style=style)
        table.add_row(str(token["index"]), str(token["id"]), shown, Text(token["role"], style=style))
    screen.show(table)
