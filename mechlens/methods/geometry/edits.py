"""What a training changed in a matrix: the directions it writes and those it reads, and which prompts it reads.

A change of rank one, u vᵀ, writes u where its input has v (Lyu et al. 2024, one-dimensional adapters): the cosine of u
with a concept's direction says what is written, the AUROC of v·x for which prompts. Other changes are looked at by the
leading components of their singular value decomposition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.probing.auroc import auroc_estimate
from mechlens.models.checkpoints.lora import LowRank

LEADING = 4
"""Components that are kept."""


@dataclass(frozen=True, eq=False)
class MatrixEdit:
    """The leading part of a change's singular value decomposition; see `matrix_edit`.

    >>> import torch
    >>> found = ml.matrix_edit(torch.outer(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])))
    >>> round(found.norm, 3), round(found.stable_rank, 3), round(found.share, 3), round(found.participation, 3)
    (3.0, 1.0, 1.0, 1.0)
    """

    norm: float
    """Frobenius."""
    stable_rank: float
    """norm² / (largest singular value)²: 1 for a change of rank one; NaN where nothing changed."""
    share: float
    """Part of norm² in the leading component: the rank-one share."""
    participation: float
    """(Σ s²)² / Σ s⁴ of all singular values: the effective rank."""
    outputs: Float[Tensor, "output leading"] = field(repr=False)
    """Left singular vectors: what the change writes."""
    inputs: Float[Tensor, "input leading"] = field(repr=False)
    """Right singular vectors: what it reads."""
    values: Float[Tensor, " leading"] = field(repr=False)


def matrix_edit(change: LowRank | Float[Tensor, "output input"]) -> MatrixEdit:
    """Exact for a low-rank change, from its factors alone; leading directions by subspace iteration for a full one.

    >>> import torch
    >>> found = ml.matrix_edit(torch.outer(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])))
    >>> round(found.norm, 3), round(found.stable_rank, 3), round(found.share, 3), round(found.participation, 3)
    (3.0, 1.0, 1.0, 1.0)
    """
    if isinstance(change, LowRank):
        left, upper = torch.linalg.qr(change.up.double() * change.scale)
        right, lower = torch.linalg.qr(change.down.double().T)
        u, values, v = torch.linalg.svd(upper @ lower.T)
        outputs, inputs = left @ u, right @ v.T
        squared, fourth = float(values.square().sum()), float(values.pow(4).sum())
    else:
        exact = change.double()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            outputs, values, inputs = torch.svd_lowrank(exact, q=min(2 * LEADING, *change.shape), niter=8)
        small = exact if exact.shape[0] <= exact.shape[1] else exact.T
        squared, fourth = float(exact.square().sum()), float((small @ small.T).square().sum())
    largest = float(values[0] ** 2)
    return MatrixEdit(
        norm=squared**0.5,
        stable_rank=squared / largest if largest > 0 else float("nan"),
        share=largest / squared if squared > 0 else float("nan"),
        participation=squared**2 / fourth if fourth > 0 else float("nan"),
        outputs=outputs[:, :LEADING],
        inputs=inputs[:, :LEADING],
        values=values[:LEADING],
    )


def edit_table(
    edit: MatrixEdit,
    directions: Mapping[str, Float[Tensor, " d_model"]],
    inputs: Float[Tensor, "prompt input"],
    concepts: Mapping[str, Bool[Tensor, " prompt"]],
    families: Sequence[str],
) -> pd.DataFrame:
    """A row a leading component: its share of the change, what it writes, and which prompts it reads.

    `cos_NAME` is the |cosine| of the written direction with each of `directions`, NaN where the matrix writes to
    another space; `auroc_NAME` how well the read direction's product with `inputs` (what the matrix is given by each
    prompt, before the change) tells a concept's prompts from the others. A component's sign is free, so an AUROC below
    0.5 is counted from the other side.

    >>> import torch
    >>> edit = ml.matrix_edit(torch.outer(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])))
    >>> harm, given = torch.arange(24) < 12, torch.zeros(24, 3)
    >>> given[:, 0] = harm.float()
    >>> families = [str(i) for i in range(24)]
    >>> found = ml.edit_table(edit, {"harm": torch.tensor([0.0, 1.0])}, given, {"harm": harm}, families)
    >>> found[["share", "cos_harm", "auroc_harm"]].round(2).values.tolist()[0]
    [1.0, 1.0, 1.0]
    """
    if inputs.shape[1] != len(edit.inputs):
        raise UserError(f"the inputs have {inputs.shape[1]} dimensions and the matrix reads {len(edit.inputs)}")
    rows = []
    for k, value in enumerate(edit.values.tolist()):
        if value <= 1e-6 * edit.norm:
            continue
        written, read = edit.outputs[:, k].double(), inputs.double() @ edit.inputs[:, k].double()
        row = {"component": k, "share": value**2 / edit.norm**2}
        row |= {f"cos_{name}": _cosine(written, direction) for name, direction in directions.items()}
        for name, positive in concepts.items():
            found = auroc_estimate(read, positive, families)
            found = auroc_estimate(-read, positive, families) if found.value < 0.5 else found
            row |= found.beside(f"auroc_{name}")
        rows.append(row)
    return pd.DataFrame(rows)


def _cosine(written: Float[Tensor, " output"], direction: Float[Tensor, " d_model"]) -> float:
    if written.shape != direction.shape:
        return float("nan")
    return float(torch.nn.functional.cosine_similarity(written, direction.double(), dim=0).abs())
