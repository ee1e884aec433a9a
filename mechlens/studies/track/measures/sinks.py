"""Attention sinks over a series: of plain texts and of the study's own requests, and at every named position."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.activations.collect import template_of
from mechlens.methods.progress import progress_bar
from mechlens.methods.sinks.contrast import paired_change
from mechlens.methods.sinks.found import readable
from mechlens.methods.sinks.positions import position_mass
from mechlens.methods.sinks.reading import measure_sinks
from mechlens.methods.sinks.result import SinkMap
from mechlens.models.bridge import LanguageModel
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.builtin import DOMAINS, domain_texts
from mechlens.studies.shared.sink_positions import Asked, asked_about, first_of_each, position_table
from mechlens.studies.track.measures.reference import BaseReference
from mechlens.studies.track.measures.snapshot import Snapshot
from mechlens.studies.track.result import Tracking

REQUESTS = "requests"
EACH = 16
"""Requests of each class, and texts of each kind, whose attention is read."""
TOKENS = 128
"""What a text has beyond these is cut off."""
TOLD = ("mass", "first", "rate", "value", "peak", "massive", "largest")
"""Measures that are followed."""


@dataclass(frozen=True)
class _Series:
    """What is asked of every checkpoint."""

    texts: dict[str, TokenBatch]
    rows: list[int]
    """The requests whose attention is read, of all that were tracked."""
    asked: list[Asked]


def sink_tables(swapper: CheckpointSwapper, tracking: Tracking) -> dict[str, pd.DataFrame]:
    """Tables by name: sinks (measures by step and kind of text), sink_positions, sink_heads."""
    plan, batch = tracking.plan, tracking.questions.batch
    raw = template_of(swapper.model, None)
    rows = _rows(batch)
    texts = {name: _cut(tokenize(domain_texts(name)[:EACH], raw)) for name in DOMAINS}
    texts |= {REQUESTS: batch.select(rows)}
    given = _Series(texts, rows, _asked(tracking.reference, batch))
    chance = {"seed": plan.seed, "resamples": plan.resamples}
    measures, positions, heads = [], [], []
    base: dict[str, SinkMap] = {}
    for snapshot in progress_bar(list(tracking.snapshots), title="sinks", unit="checkpoint"):
        model = swapper.put(snapshot.member)
        found = {name: measure_sinks(model, own) for name, own in texts.items()}
        base = base or found
        step = {"step": snapshot.step}
        for name, own in found.items():
            measures += [step | {"domain": name, "measure": one} | own.whole(one, **chance).row() for one in TOLD]
        positions.append(_positions(model, snapshot, given, chance).assign(**step))
        heads.append(_heads(base, found, plan.permutations, plan.seed).assign(**step))
    joined = {"sink_positions": pd.concat(positions), "sink_heads": pd.concat(heads)}
    return {"sinks": pd.DataFrame(measures)} | {name: one.reset_index(drop=True) for name, one in joined.items()}


def require_sinks(model: LanguageModel, batch: TokenBatch) -> None:
    """UserError for requests or a model whose sinks can't be read, before any checkpoint is measured."""
    readable(model, batch.select(_rows(batch)), "tokenizer")


def _cut(batch: TokenBatch) -> TokenBatch:
    return replace(batch, tokens=batch.tokens[:, :TOKENS], mask=batch.mask[:, :TOKENS])


def _rows(batch: TokenBatch) -> list[int]:
    return first_of_each([one.label for one in batch.prompts], EACH)


def _asked(reference: BaseReference, batch: TokenBatch) -> list[Asked]:
    families = [one.group for one in batch.prompts]
    return [asked_about(one.name, one.labels, one.contrast, families) for one in reference.measurable]


def _positions(model: LanguageModel, snapshot: Snapshot, given: _Series, chance: dict[str, int]) -> pd.DataFrame:
    answers: Sequence[Sequence[int]] = [snapshot.answers.tokens[i] for i in given.rows]
    mass = position_mass(model, given.texts[REQUESTS], answers)
    return position_table(mass, snapshot.acts, given.asked, **chance)


def _heads(base: dict[str, SinkMap], found: dict[str, SinkMap], shuffles: int, seed: int) -> pd.DataFrame:
    """A row a head: its sink mass over all texts, and the change from the base with its p."""
    before, after = (_mass(own) for own in (base, found))
    change, p = paired_change(before, after, shuffles=shuffles, seed=seed)
    cells = (~change.isnan()).nonzero().tolist()
    mean = after.mean(dim=0)
    return pd.DataFrame([
        {"layer": layer, "head": head, "mass": float(mean[layer, head]), "change": float(change[layer, head]),
         "p": float(p[layer, head])}
        for layer, head in cells
    ])  # fmt: skip


def _mass(maps: dict[str, SinkMap]) -> Float[Tensor, "text layer head"]:
    return torch.cat([one.of("mass") for one in maps.values()])
