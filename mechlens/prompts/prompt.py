"""What we ask: a request with its label, and two requests that differ in one thing."""

from collections.abc import Iterator
from dataclasses import dataclass

from mechlens.errors import UserError, kind_of, quoted
from mechlens.files import is_whole

LONGEST_TEXT = 1_000_000
"""Characters of one text; more than any model's context holds."""


class UnfitPrompt(UserError):
    """Words that no prompt can hold."""


@dataclass(frozen=True)
class Prompt:
    """One request to a chat model, as the user would type it (the template comes later).

    UserError for half a character (an unpaired surrogate) in any field, which no table, file or tokenizer can hold,
    and for a text longer than LONGEST_TEXT.

    >>> ml.Prompt("p1", "And in French?", history=(("user", "Say hello."), ("assistant", "Hello!"))).group
    'p1'
    """

    id: str
    """Unique within a set of prompts."""
    text: str
    """The user's own words."""
    label: str = ""
    """The class in a contrast, such as "harmful"; empty where there is none."""
    category: str = ""
    """Topic; results can be grouped by it."""
    source: str = ""
    """The data set it came from."""
    system: str | None = None
    """System prompt; None leaves the template's own default in place."""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns as (role, content), oldest first; `text` is always the last user turn."""
    family: str = ""
    """Prompts of one family never straddle a split; empty means the prompt is its own family."""

    def __post_init__(self) -> None:
        for name, value in self._words():
            if not isinstance(value, str):
                raise UnfitPrompt(f"prompt {quoted(self.id, 80)} has {kind_of(value)} as its {name}; it must be text")
            if not is_whole(value):
                raise UnfitPrompt(
                    f"prompt {quoted(self.id, 80)} holds half a character (an unpaired surrogate) in its {name}; "
                    "repair it"
                )
            if len(value) > LONGEST_TEXT:
                raise UnfitPrompt(
                    f"prompt {quoted(self.id, 80)} has {len(value)} characters in its {name}, and at most "
                    f"{LONGEST_TEXT} are read; shorten it"
                )

    def _words(self) -> Iterator[tuple[str, object]]:
        """Every string in it, under the name of its field."""
        for name in ("id", "text", "label", "category", "source", "family"):
            yield name, getattr(self, name)
        if self.system is not None:
            yield "system prompt", self.system
        for role, content in self.history:
            yield "role", role
            yield "history", content

    @property
    def group(self) -> str:
        """The family, or the prompt's own id where none was given."""
        return self.family or self.id


@dataclass(frozen=True)
class PromptPair:
    """Two prompts alike but for one thing; patching carries activations from `clean` into `corrupt`.

    >>> pair = ml.PromptPair(ml.Prompt("a", "Kill a process."), ml.Prompt("b", "Stop a process."))
    >>> pair.clean.text
    'Kill a process.'
    """

    clean: Prompt
    corrupt: Prompt
