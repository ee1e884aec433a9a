"""How models are made to speak freely in this study: which sets, under which template, and who judges it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mechlens.errors import UserError, quoted
from mechlens.methods.behaviour.scoring.endpoint_judge import EndpointScoreJudge
from mechlens.methods.behaviour.scoring.named_judge import NamedJudge, score_judges
from mechlens.methods.behaviour.scoring.questions import ALIGNED, COHERENT
from mechlens.methods.cache import Cache
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.registry import nearest
from mechlens.studies.behaviours.config import BehaviourPlan, Behaviours
from mechlens.studies.behaviours.said.free_answers import FreeAnswers, free_answers
from mechlens.studies.behaviours.sets import AskedSet

ARGUMENT = "enable_thinking"
"""The argument by which chat templates of reasoning models (Qwen3 and others) turn thinking on and off."""


@dataclass(frozen=True)
class Speaking:
    """The judges, one of alignment and one of coherence or none, and the template for free answers."""

    judges: tuple[NamedJudge, ...]
    template: ChatTemplate

    def __call__(
        self, model: LanguageModel, sets: Sequence[AskedSet], plan: BehaviourPlan, cache: Cache | None
    ) -> dict[str, FreeAnswers]:
        """What a model says to the sets that are put freely, by their keys."""
        asked = [one for one in sets if one.name in plan.spoken]
        return {one.key: free_answers(model, one, self.template, plan, self.judges, cache) for one in asked}

    def inputs(self, given: str | None) -> dict[str, str]:
        """Fingerprints of the judge and of what it is asked."""
        found = {f"judge's question {judge.question.name}": judge.question.sha256 for judge in self.judges}
        for judge in self.judges[:1]:
            # Weights behind an endpoint can't be told.
            known = str(given) if isinstance(judge, EndpointScoreJudge) else loaded(judge.model).checkpoint.fingerprint
            found[f"judge {given}"] = hashlib.sha256(known.encode()).hexdigest()
        return found


def speaks(plan: BehaviourPlan) -> bool:
    """Whether anything is answered freely."""
    return plan.judge is not None or plan.thinking


def judges_for(config: Behaviours, sets: Sequence[AskedSet]) -> tuple[NamedJudge, ...]:
    """The judges that are asked for; UserError for what can't be judged or had."""
    if not speaks(config):
        return ()
    known = [one.name for one in sets]
    unknown = next((name for name in config.spoken if name not in known), None)
    if unknown is not None or not config.spoken:
        near = nearest(unknown or "", known)
        raise UserError(
            f"free answers are wanted to {quoted(unknown or 'no set')}, which isn't among the sets; "
            f"{f'{near} ' if near else ''}give --spoken one of {', '.join(known)}"
        )
    if config.judge is None:
        return ()
    return score_judges(config.judge, (ALIGNED, COHERENT), key_variable=config.judge_key, device=config.device)


def speaking(config: Behaviours, judges: tuple[NamedJudge, ...], template: ChatTemplate) -> Speaking | None:
    """None where nothing is answered freely; UserError where thinking can't be turned on by the template."""
    if not speaks(config):
        return None
    if config.thinking:
        template = replace(template, options={**template.options, ARGUMENT: True})
    return Speaking(judges, template)
