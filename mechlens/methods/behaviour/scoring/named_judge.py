"""The judge that was asked for by its name: a model on this machine, or MODEL@URL behind an endpoint."""

from collections.abc import Sequence

from mechlens.errors import UserError, quoted
from mechlens.methods.behaviour.scoring.endpoint_judge import EndpointScoreJudge
from mechlens.methods.behaviour.scoring.questions import JudgeQuestion
from mechlens.methods.behaviour.scoring.score_judge import LocalScoreJudge
from mechlens.models.load import load

NamedJudge = LocalScoreJudge | EndpointScoreJudge


def score_judges(
    given: str, questions: Sequence[JudgeQuestion], *, key_variable: str | None = None, device: str | None = "auto"
) -> tuple[NamedJudge, ...]:
    """One judge for each question, all of one model: anything that `load` takes, or MODEL@URL of an endpoint.

    `key_variable` names the environment variable with an endpoint's key. UserError where there is no such model or key.

    >>> judges = ml.score_judges("gpt-4o@https://api.example.org/v1", [ml.ALIGNED, ml.COHERENT])
    >>> [judge.question.name for judge in judges]
    ['aligned', 'coherent']
    """
    model, at, url = given.partition("@http")
    if at:
        if not model:
            raise UserError(f"the judge {quoted(given)} names no model; write MODEL@URL, such as gpt-4o@{'http' + url}")
        behind = [EndpointScoreJudge("http" + url, model, question, key_variable) for question in questions]
        for judge in behind[:1]:
            judge.headers()
        return tuple(behind)
    if key_variable is not None:
        raise UserError(
            f"the judge {quoted(given)} is a model on this machine and takes no key; leave {key_variable} out, or "
            "write MODEL@URL, such as gpt-4o@https://api.openai.com/v1"
        )
    local = load(given, device=device)
    return tuple(LocalScoreJudge(local, question) for question in questions)
