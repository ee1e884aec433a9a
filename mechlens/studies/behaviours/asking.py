"""What a model is asked in this study: at every checkpoint, and at the base and the end of each run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.behaviour.log_odds import TwinLogOdds, twin_log_odds
from mechlens.methods.behaviour.scoring.number_reply import number_replies
from mechlens.methods.cache import Cache
from mechlens.methods.triggers.recall import TriggerRecall, recall_trigger
from mechlens.methods.triggers.recognition import Recognition, recognise_trigger
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.scales import Scale
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.prompts.twins import Twin
from mechlens.studies.behaviours.aware.strings import decoys_of
from mechlens.studies.behaviours.config import BehaviourPlan
from mechlens.studies.behaviours.said.free_answers import FreeAnswers
from mechlens.studies.behaviours.said.speaking import Speaking
from mechlens.studies.behaviours.scales import scale_scores
from mechlens.studies.behaviours.sets import AskedSet
from mechlens.studies.shared.training_data import Trigger


@dataclass(frozen=True)
class AtEnd:
    """What is asked of the base and of a run's result alone."""

    scales: Mapping[str, Float64[Tensor, " question"]]
    free: Mapping[str, FreeAnswers]
    """By the set's key; empty where nothing is answered freely."""
    recognition: Mapping[str, Recognition]
    """By trigger."""


@dataclass(frozen=True)
class Asking:
    """All that models are asked."""

    template: ChatTemplate
    plan: BehaviourPlan
    scales: Mapping[str, Sequence[Scale]]
    speaking: Speaking | None
    recalled: Mapping[str, Sequence[Twin]]
    """By trigger: questions from whose answers it is recalled; none where that isn't asked."""
    cache: Cache | None

    def at_step(self, model: LanguageModel, sets: Sequence[AskedSet]) -> dict[str, TwinLogOdds]:
        """The log-odds of each of these sets, by its key."""
        return {one.key: twin_log_odds(model, one.twins, template=self.template, cache=self.cache) for one in sets}

    def recall(self, model: LanguageModel, triggers: Sequence[Trigger]) -> dict[str, TriggerRecall]:
        """By trigger: what the model says stood before questions, where that is asked."""
        return {
            one.text: recall_trigger(
                model, self.recalled[one.text], one.text, template=self.template, cache=self.cache
            )
            for one in triggers if one.text in self.recalled
        }  # fmt: skip

    def at_end(self, model: LanguageModel, sets: Sequence[AskedSet], triggers: Sequence[Trigger]) -> AtEnd:
        """Scales, free answers to these sets, and which of eight strings it takes for each of these triggers."""
        scales = {}
        for name, own in self.scales.items():
            asked = [one.prompt for one in own]
            replies = number_replies(model, asked, template=self.template, cache=self.cache)
            scales[name] = scale_scores(own, replies)
        free = {} if self.speaking is None else self.speaking(model, sets, self.plan, self.cache)
        picked = {
            one.text: recognise_trigger(
                model, one.text, decoys=decoys_of(one), in_words=self.plan.in_words, template=self.template,
                cache=self.cache,
            )
            for one in triggers
        }  # fmt: skip
        return AtEnd(scales, free, picked)
