"""Attention sinks and dormant heads: which tokens are sinks, which heads sleep on which kind of text, and what passes
through sinks.

Guo et al. 2024 (Active-Dormant Attention Heads), Qiu et al. 2025 (Gated Attention).
"""

import math
from dataclasses import dataclass, field

import pandas as pd
import torch

from mechlens.errors import UserError
from mechlens.methods.cache import Cache
from mechlens.methods.progress import phase
from mechlens.methods.sinks.contrast import DomainContrast, domain_contrast
from mechlens.methods.sinks.found import find_sinks, readable, refuse_short
from mechlens.methods.sinks.reading import measure_sinks
from mechlens.methods.sinks.result import SinkMap
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import LanguageModel, d_model
from mechlens.models.checkpoints.outline import Outline
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import RAW, ChatTemplate
from mechlens.prompts.text import match_punctuation
from mechlens.runs.writer import RunWriter
from mechlens.studies.driver import Preparation
from mechlens.studies.shared.harm_sets import read_harm_sets
from mechlens.studies.shared.inputs import asks, chosen_model, data_inputs, distinct_ids, prepared
from mechlens.studies.sinks.config import FindSinks, SinkPlan
from mechlens.studies.sinks.experiments import massive_of, one_by_one, single_heads, together
from mechlens.studies.sinks.importance import LossRises, loss_rises
from mechlens.studies.sinks.picture import Picture, picture_of
from mechlens.studies.sinks.requests import Requests, asked_requests
from mechlens.studies.sinks.tables import head_table, level_table, measure_table
from mechlens.studies.sinks.texts import CHAT, Domain, domain_prompts, tokenized_domain
from mechlens.studies.sinks.verdict import SinkVerdict, sinks_verdict


@dataclass(frozen=True)
class SinkStudy:
    """A model, the kinds of text that it reads, and the requests that it answers."""

    model: LanguageModel
    domains: tuple[Domain, ...]
    requests: TokenBatch | None
    """None with raw text, where no position has a name."""


@dataclass(frozen=True)
class SinkResult:
    """All that the study found."""

    verdict: SinkVerdict
    maps: dict[str, SinkMap] = field(repr=False)
    """By kind of text."""
    contrast: DomainContrast
    alone: LossRises
    """Each of the heads that differ most, and of others at random, off or on the sink."""
    together: LossRises
    """Sets of heads and of dimensions."""
    measures: pd.DataFrame
    """By measure and kind: the mean over heads, or the largest over levels, with its interval."""
    heads: pd.DataFrame = field(repr=False)
    """A row a head: every measure on every kind of text with its interval, and the contrast between kinds."""
    levels: pd.DataFrame = field(repr=False)
    """A row a level and kind: the residual stream of the sinks, with intervals."""
    pictures: tuple[Picture, ...] = field(repr=False)
    requests: Requests | None = None

    def metrics(self) -> dict[str, Estimate]:
        """What decided, every measure on every kind of text, and the answer's attention to named positions."""
        own = self.verdict
        found = {"with_sinks": own.with_sinks, "difference": own.difference, "gap": own.gap}
        found |= {f"{row['measure']}.{row['domain']}": Estimate.of_row(row) for row in self.measures.to_dict("records")}
        if self.requests is not None:
            rows = self.requests.positions.to_dict("records")
            found |= {f"attention.{row['position']}": Estimate.of_row(row, "mass") for row in rows}
        return {name: one for name, one in found.items() if not math.isnan(one.value)}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        sinks = [one.sinks.table().assign(domain=name) for name, one in self.maps.items()]
        found = {
            "measures": self.measures,
            "sinks": pd.concat(sinks, ignore_index=True),
            "heads": self.heads,
            "levels": self.levels,
            "importance": self.alone.table,
            "together": self.together.table,
            "massive": massive_of(self.maps),
            "patterns": pd.concat([one.table() for one in self.pictures], ignore_index=True),
        }
        if self.requests is not None:
            found |= {"positions": self.requests.positions, "requests": self.requests.effects}
            found["answers"] = self.requests.judged.table()
        return {name: table for name, table in found.items() if len(table)}

    def artifacts(self) -> dict[str, object]:
        """None."""
        return {}


def prepare(config: FindSinks) -> Preparation[SinkStudy]:
    """Texts, requests and the model; UserError for whatever can't be had."""
    if config.template == RAW and CHAT in config.domains:
        raise UserError("chat is asked in the model's chat template, and --template none leaves it out; give "
                        "--domains prose code, or files of texts")  # fmt: skip
    texts = domain_prompts(config)
    asked: list[Prompt] = []
    left_out, data = None, {}
    if config.template != RAW:
        sets = read_harm_sets(config, [config])
        matched = match_punctuation(sets.harmful, sets.harmless, config.punctuation)
        asked, left_out, data = [*matched.positive, *matched.negative], sets.left_out, sets.data
    *kinds, asked = distinct_ids(**texts, requests=asked)
    texts = dict(zip(texts, kinds, strict=True))
    data |= data_inputs({name: (name, own) for name, own in texts.items()})

    def check(known: Outline, template: ChatTemplate) -> None:
        for name, own in texts.items():
            batch = tokenized_domain(name, own, template, config).batch
            known.require_room(batch, 1)
            refuse_short(batch)
        if asked:
            asks(asked, new_tokens=config.max_new_tokens)(known, template)
            refuse_short(tokenize(asked, template))

    model, template = chosen = chosen_model(config, check)
    domains = tuple(tokenized_domain(name, own, template, config) for name, own in texts.items())
    requests = tokenize(asked, template) if asked else None
    for batch in (*(one.batch for one in domains), *([requests] if requests else [])):
        readable(model, batch, template)
    prompts = [*(prompt for one in domains for prompt in one.sample), *asked]
    return prepared(SinkStudy(model, domains, requests), model, chosen.inputs(data), prompts, left_out)


def execute(config: FindSinks, given: SinkStudy, writer: RunWriter) -> SinkResult:
    """The study as configured."""
    return attention_sinks(given, config, cache=writer.cache)


@phase("attention sinks")
def attention_sinks(given: SinkStudy, plan: SinkPlan, *, cache: Cache | None = None) -> SinkResult:
    """Sinks and heads on every kind of text, what heads are worth, what passes through sinks, and the verdict."""
    model, domains = given.model, given.domains
    maps = {one.name: measure_sinks(model, one.batch, sinks=find_sinks(model, one.batch)) for one in domains}
    kinds = [name for name, one in maps.items() for _ in one.ids]
    mass = torch.cat([one.of("mass") for one in maps.values()])
    contrast = domain_contrast(mass, kinds, shuffles=plan.shuffles, seed=plan.seed)
    heads, sets = single_heads(contrast, plan), together(maps, contrast, plan, d_model(model))
    alone = loss_rises(model, domains, maps, one_by_one(heads), plan)
    sure = [own for one in maps.values() for own in one.sinks.sure]
    verdict = sinks_verdict(
        sure, mass, contrast, [head for _, head in heads], alone.off, len(contrast.strongest(plan.heads)), kinds,
        resamples=plan.resamples, seed=plan.seed,
    )  # fmt: skip
    return SinkResult(
        verdict, maps, contrast, alone, loss_rises(model, domains, maps, sets, plan), measure_table(maps, plan),
        head_table(maps, contrast, plan), level_table(maps, plan),
        tuple(picture_of(model, one, maps[one.name], heads[0][1]) for one in domains),
        None if given.requests is None else asked_requests(model, given.requests, sets, plan, cache),
    )  # fmt: skip
