"""The numerical edge over a series: how much of what a checkpoint says, or reads, could teach it nothing any more."""

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.methods.activations.collect import template_of
from mechlens.methods.behaviour.damage import answered, logits_everywhere
from mechlens.methods.numerics.edge import NumericalEdge, numerical_edge
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.models.bridge import LanguageModel, device_of
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.studies.shared.sink_positions import first_of_each
from mechlens.studies.track.measures.snapshot import Snapshot
from mechlens.studies.track.result import Tracking

EACH = 12
"""Requests of each class whose answers are read; plain texts are all read."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Types that a training computes its softmax in."""
ANSWERS, TEXTS = "its own answers", "plain text"

Read = tuple[Float[Tensor, "position vocabulary"], Int[Tensor, " position"]]


def edge_table(swapper: CheckpointSwapper, tracking: Tracking) -> pd.DataFrame:
    """A row a checkpoint, kind of text, type and measure; means over texts of the means over their tokens.

    Of the answers the right token is the one that was said, so these are what training on them would begin with. Logits
    are the checkpoint's own, and taken into each type.
    """
    plan, batch = tracking.plan, tracking.questions.batch
    raw = template_of(swapper.model, None)
    texts = tokenize([Prompt(f"text{i}", one) for i, one in enumerate(tracking.questions.texts)], raw)
    rows = first_of_each([one.label for one in batch.prompts], EACH)
    found = []
    for snapshot in progress_bar(list(tracking.snapshots), title="numerical edge", unit="checkpoint"):
        model = swapper.put(snapshot.member)
        read = {ANSWERS: _answers(model, batch, snapshot, rows), TEXTS: _texts(model, texts)}
        for kind, several in read.items():
            edges = [[numerical_edge(*one, dtype) for dtype in DTYPES] for one in several]
            names = [str(i) for i in range(len(edges))]
            for row in _measures(edges):
                values = torch.tensor(row.pop("values"), dtype=torch.float64)
                estimate = mean_estimate(values, names, plan.seed, plan.resamples)
                found.append({"step": snapshot.step, "of": kind} | row | estimate.row())
    return pd.DataFrame(found)


def _measures(edges: Sequence[Sequence[NumericalEdge]]) -> Iterator[dict[str, object]]:
    """Each measure's values, one a text: the shares by type; the scale and the gap, which no type changes, once."""
    for k, dtype in enumerate(DTYPES):
        for name in ("collapsed", "zero_loss"):
            values = [getattr(own[k], name) for own in edges]
            yield {"dtype": str(dtype).removeprefix("torch."), "measure": name, "values": values}
    for name in ("scale", "gap"):
        yield {"dtype": "any", "measure": name, "values": [getattr(own[0], name) for own in edges]}


@torch.inference_mode()
def _answers(model: LanguageModel, batch: TokenBatch, snapshot: Snapshot, rows: Sequence[int]) -> list[Read]:
    found = []
    for i in rows:
        said = snapshot.answers.tokens[i]
        if said:
            asked = answered(model, batch, snapshot.answers, [i])
            found.append((asked.read(logits_everywhere(model, asked.tokens))[0], torch.tensor(said)))
    return found


@torch.inference_mode()
def _texts(model: LanguageModel, batch: TokenBatch) -> list[Read]:
    found = []
    for i in range(len(batch.prompts)):
        ids = torch.tensor(batch.row(i))
        logits = logits_everywhere(model, ids[None].to(device_of(model)))[0]
        found.append((logits[:-1].cpu(), ids[1:]))
    return [one for one in found if len(one[1])]
