"""Activations with a planted truth: the tests know the direction, its place and its strength."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.models.checkpoint import Checkpoint

CHECKPOINT = Checkpoint(name="planted", path="planted")


def activations(
    values: Tensor,
    labels: tuple[str, ...],
    families: tuple[str, ...] | None = None,
    *,
    levels: tuple[int, ...] | None = None,
    positions: tuple[str, ...] = ("inst", "last"),
    prefix: str = "prompt",
) -> Activations:
    """Wraps values [prompt level position d_model]; without families every prompt is its own."""
    ids = tuple(f"{prefix}{i}" for i in range(len(labels)))
    return Activations(
        values=values,
        levels=levels if levels is not None else tuple(range(values.shape[1])),
        positions=positions,
        ids=ids,
        labels=labels,
        families=families or ids,
        site="resid",
        checkpoint=CHECKPOINT,
        template="planted",
    )


def relabelled(acts: Activations, labels: tuple[str, ...]) -> Activations:
    """The same vectors under other labels."""
    return replace(acts, labels=labels)


def unit(vector: Tensor) -> Tensor:
    """The vector with length 1."""
    return vector / vector.norm()


@dataclass(frozen=True)
class Planted:
    """Activations of "harmful" and "harmless" prompts, and the unit vector that separates them."""

    acts: Activations
    truth: Tensor


def planted_activations(
    *,
    separation: float,
    n_per_class: int = 64,
    d_model: int = 64,
    n_levels: int = 3,
    positions: tuple[str, ...] = ("inst", "last"),
    at: tuple[int, str] | None = None,
    truth: Tensor | None = None,
    paired: bool = True,
    seed: int = 0,
) -> Planted:
    """Two classes in Gaussian noise of unit variance whose means differ by `separation` along one direction.

    The difference is at every level and position, or at the one place `at=(level, position)` only.
    Prompts alternate harmful, harmless; with `paired` each two are one family. Ids carry the seed:
    sets with different seeds share no prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    if truth is None:
        truth = unit(torch.randn(d_model, generator=generator))
    n = 2 * n_per_class
    values = torch.randn(n, n_levels, len(positions), d_model, generator=generator)
    values += 3.0 * torch.randn(d_model, generator=generator)  # the mean that all prompts share
    sign = torch.tensor([1.0, -1.0]).repeat(n_per_class)
    shift = separation / 2 * sign[:, None] * truth
    if at is None:
        values += shift[:, None, None]
    else:
        values[:, at[0], positions.index(at[1])] += shift
    families = tuple(f"s{seed}f{i // 2}" for i in range(n)) if paired else None
    acts = activations(values, ("harmful", "harmless") * n_per_class, families, positions=positions, prefix=f"s{seed}p")
    return Planted(acts=acts, truth=truth)


@dataclass(frozen=True)
class TwoByTwo:
    """Four quadrants of prompts; harmfulness lies along `harm` at `inst`, refusal along `refusal` at `last`."""

    acts: Activations
    """Labels: refused_harmful, accepted_harmful, refused_harmless, accepted_harmless."""
    harmful: Tensor
    """Bool, one a prompt."""
    refused: Tensor
    """Bool, one a prompt."""
    harm: Tensor
    refusal: Tensor


def planted_two_by_two(
    *,
    harm_separation: float,
    refusal_separation: float,
    n_per_cell: int = 32,
    d_model: int = 64,
    n_levels: int = 4,
    cosine: float = 0.0,
    seed: int = 0,
    noise_seed: int | None = None,
) -> TwoByTwo:
    """h_inst = m + a/2 (+-1)_harm u + noise, h_last = m' + b/2 (+-1)_refused w + noise.

    a, b: mean separations in units of the noise's standard deviation; `cosine` = u.w. Each factor is
    independent of the other. Level 0 at `last` is one vector for all prompts, as a template token is.
    The same `seed` with another `noise_seed` gives fresh prompts of the same world (m, m', u, w).
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.linalg.qr(torch.randn(d_model, 2, generator=generator)).Q.unbind(dim=1)
    harm, refusal = first, cosine * first + (1 - cosine**2) ** 0.5 * second
    common = torch.randn(2, d_model, generator=generator)
    token = torch.randn(d_model, generator=generator)
    if noise_seed is not None:
        generator.manual_seed(noise_seed)
    n = 4 * n_per_cell
    harmful = torch.tensor([True, True, False, False]).repeat(n_per_cell)
    refused = torch.tensor([True, False, True, False]).repeat(n_per_cell)
    values = torch.randn(n, n_levels, 2, d_model, generator=generator)
    values[:, :, 0] += harm_separation / 2 * (2.0 * harmful - 1)[:, None, None] * harm
    values[:, :, 1] += refusal_separation / 2 * (2.0 * refused - 1)[:, None, None] * refusal
    values += common
    values[:, 0, 1] = token
    labels = tuple(
        ("refused" if r else "accepted") + ("_harmful" if h else "_harmless")
        for h, r in zip(harmful.tolist(), refused.tolist(), strict=True)
    )
    acts = activations(values, labels, prefix=f"s{seed}n{noise_seed}p")
    return TwoByTwo(acts, harmful, refused, harm, refusal)


def planted_confounded(*, n_per_class: int = 40, d_model: int = 32, n_levels: int = 3, seed: int = 0) -> Activations:
    """The label follows the final punctuation and nothing else.

    At `inst` level 0 holds one of two token vectors ("?" for harmful, "." for harmless), and higher levels
    carry it along in noise; at `last` there is no difference at all.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, d_model, generator=generator)
    values = torch.randn(2 * n_per_class, n_levels, 2, d_model, generator=generator)
    values[:, 0] = 0.0
    values[:, :, 0] += tokens.repeat(n_per_class, 1)[:, None]
    return activations(values, ("harmful", "harmless") * n_per_class)
