"""The one sentence of a run, which stands first wherever the run is shown."""

import re
from dataclasses import dataclass

LONGEST = 250
"""Characters that a reader takes in at once; a headline has no more."""
MOST_SPACES = 4
"""In what is a verdict's word, such as "no more than the words", and no sentence."""


@dataclass(frozen=True)
class Headline:
    """What was found, on which number, beside what, and what would settle it where it is open.

    Printed as "Inconclusive: harm and refusal come apart by 0.81 [0.65, 0.99] where one variable reaches 0.34; 12 more
    accepted harmful prompts (now 19) would settle it." It holds words of ours, names and numbers, and never a prompt's
    or an answer's words.
    """

    verdict: str
    """In words, such as "two variables"."""
    number: str = ""
    """What decided, with its interval, such as "harm and refusal come apart by 0.81 [0.65, 0.99]"."""
    against: str = ""
    """What the number is compared with, such as "where one variable reaches 0.34"."""
    settle: str = ""
    """What would settle it, such as "12 more accepted harmful prompts (now 19) would settle it"; "" where settled."""

    def __str__(self) -> str:
        verdict = self.verdict[:1].upper() + self.verdict[1:]
        found = " ".join(part for part in (self.number, self.against) if part)
        rest = "; ".join(part for part in (found, self.settle) if part)
        return f"{verdict}: {rest}." if rest else f"{verdict}."


def first_sentence(text: str) -> str:
    """The first sentence of a verdict; a first word of judgement, such as "Inconclusive.", takes the next with it."""
    verdict, end, rest = " ".join(text.split()).partition(". ")
    if not end or verdict.count(" ") > MOST_SPACES:
        return verdict + end.strip()
    first, end, _ = rest.partition(". ")
    return f"{verdict}: {first}{end.strip()}"


def after_headline(verdict: str, headline: str) -> str:
    """What a verdict's explanation says beyond the headline that stands above it."""
    word, end, rest = verdict.strip().partition(". ")
    if end and word.count(" ") <= MOST_SPACES and headline.lower().startswith(word.lower()):
        verdict, said = rest, headline[len(word) :].lstrip(": ")
    else:
        said = headline
    beyond = verdict.strip().removeprefix(said).strip()
    settle = headline.rpartition("; ")[2] if "; " in headline else ""
    if settle:
        again = rf"(?:^|(?<=[.] ))(?:If (?:it|D) stays there, )?{re.escape(settle)}"
        beyond = re.sub(again, "", beyond, flags=re.IGNORECASE).strip()
    return beyond
