"""The judge that was asked for by name, and what every judge's verdicts have to be."""

from collections.abc import Iterable, Sequence
from typing import Any, get_args

from mechlens.choices import JUDGES
from mechlens.errors import UserError
from mechlens.methods.behaviour.judges import ARDITI, ZHAO, Judge, OnceRefused, SubstringJudge, Verdict
from mechlens.prompts.prompt import Prompt


def judge_of(name: str) -> Judge:
    """The judge of that name (`mechlens.choices.JUDGES`); UserError where there is none."""
    found = JUDGES[name]
    if isinstance(found, type) or not isinstance(found, Judge):
        raise UserError(f"the judge {name!r} is a {type(found).__name__}, not a judge: it needs a name and a call")
    if found.name != name:
        raise UserError(f"the judge {name!r} has the name {found.name!r}; give one name to both")
    return found


def judges_of(name: str) -> tuple[Judge, ...]:
    """The judge of that name, which decides, and beside it both published lists."""
    chosen = judge_of(name)
    return (chosen, *(list_ for list_ in (ARDITI, ZHAO) if list_.name != name))


def verdicts_by(judge: Judge, prompts: Sequence[Prompt], answers: Sequence[str]) -> tuple[Verdict, ...]:
    """One verdict per answer; UserError where the judge gives something else."""
    given = judge(prompts, answers)
    if not isinstance(given, Iterable):
        raise UserError(f"the judge {judge.name!r} gave a {type(given).__name__}, not a verdict on each answer")
    found = tuple(given)
    wrong = [verdict for verdict in found if verdict not in get_args(Verdict)]
    if wrong or len(found) != len(answers):
        gave = f"the verdict {wrong[0]!r}" if wrong else f"{len(found)} verdicts on {len(answers)} answers"
        raise UserError(f"the judge {judge.name!r} gave {gave}; it owes one of {', '.join(get_args(Verdict))} to each")
    return found


def once_refused(judge: Judge, tokenizer: Any) -> OnceRefused | None:
    """Lets a refused answer be cut short; None for judges that may yet change their mind, which read it whole."""
    return OnceRefused(judge, tokenizer) if isinstance(judge, SubstringJudge) else None
