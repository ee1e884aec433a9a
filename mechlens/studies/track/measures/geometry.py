"""The shape of a concept over the series: its subspace, the whole representation, and where its path turns."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.methods.activations.activations import Activations, one_cell
from mechlens.methods.directions.direction import cosine, mean_differences
from mechlens.methods.geometry.similarity.cka import unbiased_cka
from mechlens.methods.geometry.subspaces.angles import overlap
from mechlens.methods.progress import progress_bar
from mechlens.methods.statistics.resample import one_thread
from mechlens.studies.track.measures.reference import TrackedConcept
from mechlens.studies.track.result import Tracking

DIMENSIONS = 4
"""Dimensions of a concept's subspace."""


@one_thread()
def geometry_tables(tracking: Tracking) -> dict[str, pd.DataFrame]:
    """Tables by name: subspaces, cka, turning; the steps are the series'."""
    acts = [found.acts for found in tracking.snapshots]
    concepts = tracking.reference.measurable
    bar = progress_bar(concepts, title="geometry", unit="concept")
    return {
        "subspaces": _joined([_subspaces(tracking.steps, acts, concept) for concept in bar]),
        "cka": _cka(tracking.steps, acts),
        "turning": _joined([turning_table(tracking.steps, acts, concept) for concept in concepts]),
    }


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _subspaces(steps: Sequence[int], acts: Sequence[Activations], concept: TrackedConcept) -> pd.DataFrame:
    """Overlap of the concept's subspace with the base's: columns step, level, position, overlap, random."""
    rows = []
    for position in acts[0].positions:
        level = concept.level(position)
        bases = [subspace(concept.relabelled(found).at(level, position), concept) for found in acts]
        for step, basis in zip(steps, bases, strict=True):
            rows.append(
                {"step": step, "position": position, "level": level, "overlap": overlap(bases[0], basis),
                 "random": basis.shape[1] / basis.shape[0]}
            )  # fmt: skip
    return pd.DataFrame(rows).assign(concept=concept.name)


def subspace(values: Float[Tensor, "prompt d_model"], concept: TrackedConcept) -> Float[Tensor, "d_model dimension"]:
    """Leading right singular vectors of the positive prompts about the mean of the negative ones."""
    positive, negative = (torch.tensor([own == label for own in concept.labels]) for label in concept.contrast)
    shifted = values[positive].double() - values[negative].double().mean(dim=0)
    vectors: Tensor = torch.linalg.svd(shifted, full_matrices=False).Vh[:DIMENSIONS].T
    return vectors


def _cka(steps: Sequence[int], acts: Sequence[Activations]) -> pd.DataFrame:
    """Unbiased CKA with the base at every level and position: columns step, level, position, cka."""
    rows = []
    for step, found in progress_bar(list(zip(steps, acts, strict=True)), title="CKA", unit="checkpoint"):
        for level in found.levels:
            for position in found.positions:
                value = unbiased_cka(acts[0].at(level, position), found.at(level, position))
                rows.append({"step": step, "level": level, "position": position, "cka": value})
    return pd.DataFrame(rows)


def turning_table(steps: Sequence[int], acts: Sequence[Activations], concept: TrackedConcept) -> pd.DataFrame:
    """Where the concept's direction changes course: the cosine between the ways from a step back and forth.

    cos(v[t-1] - v[t], v[t+1] - v[t]) at each position's chosen level: -1 on a straight path, 0 and above at a sharp
    turn; `moved` is the length of the way to the next step.
    """
    rows = []
    for position in acts[0].positions:
        level = concept.level(position)
        cells = [one_cell(concept.relabelled(found), level, position) for found in acts]
        path = torch.stack([mean_differences(cell, *concept.contrast)[0, 0] for cell in cells])
        for k in range(1, len(steps) - 1):
            back, forth = path[k - 1] - path[k], path[k + 1] - path[k]
            rows.append(
                {"step": steps[k], "position": position, "level": level, "turn": float(cosine(back, forth)),
                 "moved": float(forth.norm())}
            )  # fmt: skip
    return pd.DataFrame(rows).assign(concept=concept.name)
