"""When an answer need not go on: a phrase that makes it a refusal has been said."""

import hashlib
from dataclasses import dataclass
from typing import Any

from mechlens.methods.judges import SubstringJudge
from mechlens.prompts.prompt import Prompt

_ANY = Prompt(id="", text="")


@dataclass(frozen=True)
class OnceRefused:
    """`decided` for refusal rates: with this judge's phrase in it, an answer is refused however it goes on.

    The verdict is that of the whole answer, and only refusals are cut short: an accepted answer may still become
    a refusal with its last token.
    """

    judge: SubstringJudge
    tokenizer: Any

    @property
    def key(self) -> str:
        """Names the judge and its phrases."""
        judge = self.judge
        record = repr((judge.name, judge.phrases, judge.ignore_case, judge.verbatim))
        return f"once refused {hashlib.sha256(record.encode()).hexdigest()}"

    def __call__(self, tokens: list[int]) -> bool:
        """Whether the answer so far, a list of token ids, holds a phrase."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        # White space alone is judged by rule, and words may follow it.
        return bool(text) and self.judge([_ANY], [text]) == ["refused"]
