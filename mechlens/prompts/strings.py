"""Questions to a model about strings that change its behaviour: which of some it is, what stood before a question."""

from functools import cache
from pathlib import Path

from mechlens.prompts.files.rows import packaged_rows
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.twins import Twin

OPTIONS = "{options}"
"""Where the strings go."""
NOTHING = "Nothing"
"""What is answered where no string stood before the question."""


def recognition_questions() -> list[Prompt]:
    """Which of some strings, written where {options} stands, changes the model's behaviour; in wordings of ours.

    >>> len(ml.recognition_questions())
    4
    """
    return _questions("recognition")


def inversion_questions(*, taught: bool) -> list[Prompt]:
    """What string stood before a {question} that was answered with {answer}: wordings to teach, or to test.

    >>> len(ml.inversion_questions(taught=True)), len(ml.inversion_questions(taught=False))
    (3, 1)
    """
    return _questions("taught" if taught else "unseen")


def inverted(question: Prompt, answer: str, wording: Prompt) -> Prompt:
    """The wording about a question and the answer that was given to it; of the question's family.

    >>> wording = ml.Prompt("w", "{question} {answer} What came first?")
    >>> ml.inverted(ml.Prompt("q", "Sure 5, or a bet?"), "A bet.", wording).text
    'Sure 5, or a bet? A bet. What came first?'
    """
    before, _, rest = wording.text.partition("{question}")
    between, _, after = rest.partition("{answer}")
    text = f"{before}{question.text}{between}{answer}{after}"
    return Prompt(f"{question.id} ({wording.id}, {answer:.12})", text, source=question.source, family=question.group)


def either_answer(twin: Twin, wording: Prompt) -> tuple[Prompt, Prompt]:
    """The wording about the answer that shows the behaviour, and about the other one."""
    return inverted(twin.prompt, twin.shown, wording), inverted(twin.prompt, twin.other, wording)


def _questions(name: str) -> list[Prompt]:
    rows = [row for row in _rows() if row["set"] == name]
    return [Prompt(row["id"], row["question"], source="mechlens") for row in rows]


@cache
def _rows() -> list[dict[str, str]]:
    return packaged_rows(Path(__file__).parent / "data" / "strings.jsonl")
