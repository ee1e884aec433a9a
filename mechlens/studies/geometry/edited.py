"""What the last checkpoint of a series changed in each matrix, beside the concepts' directions and classes."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.methods.activations.module_inputs import module_inputs
from mechlens.methods.geometry.edits import MatrixEdit, edit_table, matrix_edit
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.resample import one_thread
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.swap import CheckpointSwapper
from mechlens.prompts.batch import TokenBatch
from mechlens.studies.geometry.concepts import Concept
from mechlens.studies.geometry.config import GeometryPlan
from mechlens.studies.geometry.reading import Reading


@one_thread()
def edited_tables(
    swapper: CheckpointSwapper,
    members: Sequence[Member],
    batch: TokenBatch,
    first: Reading,
    concepts: Sequence[Concept],
    plan: GeometryPlan,
) -> dict[str, pd.DataFrame]:
    """Every changed matrix of the last checkpoint, and the leading components of those that changed most.

    Inputs are what the base's matrices are given at the last token; directions are the base's at each concept's home.
    """
    edits = changed_matrices(swapper, members[-1])
    matrices = pd.DataFrame(
        [
            {"matrix": name, "norm": one.norm, "rank_one_share": one.share, "stable_rank": one.stable_rank,
             "effective_rank": one.participation}
            for name, one in edits.items()
        ]
    )  # fmt: skip
    most = sorted(edits, key=lambda name: -edits[name].norm)[: plan.edited]
    inputs = module_inputs(swapper.put(members[0]), batch, most)
    directions, classes = _of_concepts(first, concepts)
    components = [edit_table(edits[name], directions, inputs[name], classes, first.families).assign(matrix=name)
                  for name in most]  # fmt: skip
    return {"edits": matrices, "components": pd.concat(components, ignore_index=True) if components else matrices[:0]}


def changed_matrices(swapper: CheckpointSwapper, member: Member) -> dict[str, MatrixEdit]:
    """By the module's name; those that the checkpoint left alone are left out."""
    low_rank = swapper.changes(member) if member.kind == "adapter" else None
    swapper.put(member)
    names = [name for name in swapper.linears() if low_rank is None or name in low_rank]
    found = {
        name: matrix_edit(swapper.difference(name) if low_rank is None else low_rank[name])
        for name in progress_bar(names, title="matrices", unit="matrix")
    }
    return {name: one for name, one in found.items() if one.norm > 0}


def _of_concepts(
    first: Reading, concepts: Sequence[Concept]
) -> tuple[dict[str, Float[Tensor, " d_model"]], dict[str, Bool[Tensor, " prompt"]]]:
    """Each measurable concept's mean difference at its home, and the prompts that have it."""
    directions, classes = {}, {}
    for concept, asked in zip(concepts, first.asked, strict=True):
        if concept.level is None:
            continue
        has = torch.zeros(len(first.families), dtype=torch.bool)
        has[[row for row, own in zip(asked.rows, asked.positive.tolist(), strict=True) if own]] = True
        values = first.acts.at(concept.level, concept.position)[asked.rows]
        directions[concept.name] = values[asked.positive].mean(dim=0) - values[~asked.positive].mean(dim=0)
        classes[concept.name] = has
    return directions, classes
