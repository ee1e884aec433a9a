"""How much more the model loses on each kind of text with heads off, on the sink, or without dimensions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.progress import progress_bar
from mechlens.methods.sinks.interventions import losses_under
from mechlens.methods.sinks.result import SinkMap
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.models.bridge import LanguageModel
from mechlens.studies.sinks.config import SinkPlan
from mechlens.studies.sinks.experiments import OFF, Experiment
from mechlens.studies.sinks.texts import Domain


@dataclass(frozen=True)
class LossRises:
    """How much the loss rises under every experiment, text by text."""

    experiments: tuple[Experiment, ...]
    rises: Float[Tensor, "experiment text"] = field(repr=False)
    """Of the texts of all kinds, kind by kind (nats a token)."""
    table: pd.DataFrame
    """By experiment and kind: the mean rise with its interval."""

    @property
    def off(self) -> Float[Tensor, "experiment text"]:
        """Of the experiments that switch heads off."""
        return self.rises[[i for i, one in enumerate(self.experiments) if one.what == OFF]]


def loss_rises(
    model: LanguageModel,
    domains: Sequence[Domain],
    maps: Mapping[str, SinkMap],
    experiments: Sequence[Experiment],
    plan: SinkPlan,
) -> LossRises:
    """The loss of every text under each experiment, less that of the model as it is."""
    plain = {one.name: losses_under(model, one.batch) for one in domains}
    rows: list[dict[str, object]] = []
    rises = []
    for experiment in progress_bar(list(experiments), title="heads and dimensions off", unit="experiment"):
        parts = []
        for one in domains:
            places = maps[one.name].sinks.places
            changes = [experiment.change(own) for own in places]
            edits = [experiment.edit(own) for own in places]
            rise = losses_under(model, one.batch, changes, edits) - plain[one.name]
            mean = mean_estimate(rise, maps[one.name].families, plan.seed, plan.resamples)
            rows.append({**told(experiment), "domain": one.name} | mean.row("rise"))
            parts.append(rise)
        rises.append(torch.cat(parts))
    return LossRises(tuple(experiments), torch.stack(rises).float(), pd.DataFrame(rows))


def told(experiment: Experiment) -> dict[str, object]:
    """An experiment as the first columns of a row."""
    return {"which": experiment.which, "what": experiment.what, "heads_or_dimensions": experiment.named}
