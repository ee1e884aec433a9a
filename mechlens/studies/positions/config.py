"""`mechlens positions`."""

from dataclasses import dataclass

from mechlens.settings import TemplateArguments
from mechlens.studies.registry import Command


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Show the tokens of a prompt with their ids and roles (inst, post[0], ...)."""

    text: str
    """What the user says."""
    model: str = "smollm2"
    """Packaged name, hub id or a folder; a folder with only a tokenizer is enough."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    system: str | None = None
    """System prompt; None leaves the template's own default."""
    template: str = "tokenizer"
    """Chat template: tokenizer, paper, paper:FAMILY, or none: raw text."""
    today: str | None = None
    """Day, such as 2024-07-26, that a chat template which prints the date prints; None is this day."""
    template_arg: TemplateArguments = ()
    """Argument of the chat template, such as enable_thinking=false; may be given more than once."""
    allow_special: bool = False
    """Let template tokens inside the text count as such instead of refusing them."""
    json: bool = False
    """Print one JSON object, for machines."""


COMMAND = Command(
    "positions",
    Positions,
    "mechlens.studies.positions.study:execute",
    ('mechlens positions --model smollm2 --text "How do I bake a cake?"',),
)
