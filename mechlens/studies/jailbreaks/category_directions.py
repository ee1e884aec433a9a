"""One direction for each kind of harm: how alike are they, and does one kind's direction find the others?

CatQA's question in Zhao et al. 2025: a category's direction of harmfulness is its mean minus the mean of harmless
prompts, at `inst`; its direction of refusal the mean of its refused prompts minus that of accepted harmless ones, at
the last token. All categories would share the noise of one harmless mean, which makes any two directions alike; so two
categories are compared by directions from disjoint halves of the harmless prompts, beside each direction's reliability.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations, column_of
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.cache import Cache
from mechlens.methods.directions.direction import cosine
from mechlens.methods.directions.nulls import corrected_cosine, split_half
from mechlens.methods.probing.auroc import auroc_estimate
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import family_halves
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.settings import Answering
from mechlens.studies.shared.quadrants import judge_answers

MIN_IN_A_CATEGORY = 12
HARMLESS = "harmless"
HALVINGS = 20
GROUPS = 10
"""Groups of prompt families that the jackknife leaves out in turn."""


@dataclass(frozen=True)
class CategoryDirections:
    """Cosines and transfer between categories at two places."""

    categories: tuple[str, ...]
    pairs: pd.DataFrame
    """category, other, position, level, cosine, corrected; one row a pair and position."""
    reliability: pd.DataFrame
    """category, position, level, reliability, n."""
    transfer: pd.DataFrame
    """fitted_on, tested_on, position, level, auroc, low, high, n: held-out prompts on both sides."""
    means: dict[str, Estimate]
    """category_cosine.POSITION: mean over pairs, with a grouped-jackknife interval."""
    no_refusals: str = ""
    """Why directions of refusal are missing where they are."""

    def and_refusals(self, other: "CategoryDirections") -> "CategoryDirections":
        """These of harmfulness with those of refusal, which are at another place, in one."""
        frames = {
            name: pd.concat([getattr(self, name), getattr(other, name)], ignore_index=True)
            for name in ("pairs", "reliability", "transfer")
        }
        return replace(self, **frames, means=self.means | other.means)


def category_directions(
    model: LanguageModel,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    places: Sequence[tuple[int, str]],
    *,
    seed: int = 0,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> CategoryDirections:
    """Directions of every category with at least 12 prompts, at the given (level, position) places.

    UserError where fewer than two categories are large enough.
    """
    counts = {
        name: sum(prompt.category == name for prompt in harmful) for name in dict.fromkeys(p.category for p in harmful)
    }
    kept = tuple(name for name, n in counts.items() if name and n >= MIN_IN_A_CATEGORY)
    if len(kept) < 2 or len(harmless) < 2 * MIN_IN_A_CATEGORY:
        raise UserError(
            f"{len(kept)} categories have {MIN_IN_A_CATEGORY} prompts or more and there are {len(harmless)} harmless "
            f"prompts; comparing needs two categories and {2 * MIN_IN_A_CATEGORY} harmless prompts"
        )
    # A label of its own for each category; the harmless prompts are everybody's other side.
    prompts = [replace(p, label=f"category {p.category}") for p in harmful if p.category in kept]
    prompts += [replace(p, label=HARMLESS) for p in harmless]
    names = tuple(dict.fromkeys(position for _, position in places))
    levels = sorted({level for level, _ in places})
    batch = tokenize(prompts, template_of(model, template))
    acts = collect(model, batch, positions=names, levels=levels, cache=cache)
    cells = [_cell(acts, level, position) for level, position in places]
    compared = [_compared(cell, kept, seed) for cell in cells]
    return CategoryDirections(
        categories=kept,
        pairs=pd.concat([pairs for pairs, _ in compared], ignore_index=True),
        reliability=pd.concat([reliable for _, reliable in compared], ignore_index=True),
        transfer=pd.concat([_transfer(cell, kept, seed) for cell in cells], ignore_index=True),
        means={name: mean for cell in cells for name, mean in _means(cell, kept, seed).items()},
    )


def category_refusals(
    model: LanguageModel, harmful: Sequence[Prompt], harmless: Sequence[Prompt], place: tuple[int, str],
    plan: Answering, *, seed: int = 0, template: TemplateChoice = "tokenizer", cache: Cache | None = None,
) -> CategoryDirections:  # fmt: skip
    """Directions of refusal by category at one place: its refused prompts against accepted harmless ones.

    UserError where fewer than two categories have at least 12 refused prompts.
    """
    used = template_of(model, template)
    judged = [
        judge_answers(
            prompts, answer(model, tokenize(prompts, used), max_new_tokens=plan.max_new_tokens, cache=cache), plan.judge
        )
        for prompts in (harmful, harmless)
    ]
    refused = [prompt for prompt, flag in zip(harmful, judged[0].refused, strict=True) if flag]
    accepted = [prompt for prompt, flag in zip(harmless, judged[1].accepted, strict=True) if flag]
    return category_directions(model, refused, accepted, [place], seed=seed, template=used, cache=cache)


def _cell(acts: Activations, level: int, position: str) -> Activations:
    """The activations of one place only."""
    name = acts.positions[column_of(position, acts.positions, acts.last)]
    return replace(acts, values=acts.at(level, name)[:, None, None], levels=(level,), positions=(name,))


def _compared(cell: Activations, categories: Sequence[str], seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    level, position = cell.levels[0], cell.positions[0]
    reliable = {
        name: float(split_half(_contrast(cell, name), f"category {name}", HARMLESS, HALVINGS, seed))
        for name in categories
    }
    cosines = _cosines(cell, categories, seed)
    counts = {name: cell.labels.count(f"category {name}") for name in categories}
    known = torch.tensor([reliable[name] for name in categories], dtype=torch.float64)
    corrected = _corrected(cosines, known, list(counts.values()), cell.labels.count(HARMLESS))
    rows = [
        {"category": category, "other": other, "position": position, "level": level,
         "cosine": float(cosines[i, j]), "corrected": float(corrected[i, j])}
        for i, category in enumerate(categories) for j, other in enumerate(categories) if i != j
    ]  # fmt: skip
    reliabilities = [{"category": name, "position": position, "level": level, "reliability": reliable[name],
               "n": counts[name]} for name in categories]  # fmt: skip
    return pd.DataFrame(rows), pd.DataFrame(reliabilities)


def _corrected(
    cosines: Float[Tensor, "category category"],
    reliable: Float[Tensor, " category"],
    sizes: Sequence[int],
    harmless: int,
) -> Float[Tensor, "category category"]:
    """Cosines of directions from half of the harmless prompts, corrected for these directions' own noise.

    A direction's squared noise goes with 1/n + 1/m for n prompts of its category and m harmless ones. Reliability r
    is a^2 / (a^2 + noise), so with half of the m it is r / (r + (1 - r) k), k = (1/n + 2/m) / (1/n + 1/m).
    """
    n = torch.tensor(sizes, dtype=torch.float64)
    k = (1 / n + 2 / harmless) / (1 / n + 1 / harmless)
    halved = reliable / (reliable + (1 - reliable) * k)
    return corrected_cosine(cosines, halved[:, None].expand_as(cosines), halved.expand_as(cosines))


def _contrast(cell: Activations, name: str) -> Activations:
    return cell.select([i for i, label in enumerate(cell.labels) if label in (f"category {name}", HARMLESS)])


def _cosines(cell: Activations, categories: Sequence[str], seed: int) -> Float[Tensor, "category category"]:
    """Mean cosine over halvings of the harmless prompts, each category of a pair using a half of its own."""
    values = cell.values[:, 0, 0].double()
    harmless = [i for i, label in enumerate(cell.labels) if label == HARMLESS]
    halves = family_halves([cell.families[i] for i in harmless], HALVINGS, seed)
    means = torch.stack(
        [values[[label == f"category {name}" for label in cell.labels]].mean(dim=0) for name in categories]
    )
    by_half = []
    for half in halves:
        rows = torch.tensor(harmless)
        first, second = means - values[rows[half]].mean(dim=0), means - values[rows[~half]].mean(dim=0)
        by_half.append(cosine(first[:, None].expand(-1, len(first), -1), second.expand(len(first), -1, -1)))
    return torch.stack(by_half).mean(dim=0)


def _means(cell: Activations, categories: Sequence[str], seed: int) -> dict[str, Estimate]:
    """Mean cosine over pairs of categories; its standard error from leaving out a tenth of the families in turn."""
    families = list(dict.fromkeys(cell.families))
    order = np.random.default_rng(seed).permutation(len(families))
    group = {families[family]: int(place % GROUPS) for place, family in enumerate(order)}

    def mean(acts: Activations) -> float:
        cosines = _cosines(acts, categories, seed)
        off = ~torch.eye(len(categories), dtype=torch.bool)
        return float(cosines[off].mean())

    value = mean(cell)
    left = [mean(cell.select([i for i, f in enumerate(cell.families) if group[f] != g])) for g in range(GROUPS)]
    error = float(np.sqrt((GROUPS - 1) / GROUPS * np.sum((np.array(left) - np.mean(left)) ** 2)))
    n = sum(label != HARMLESS for label in cell.labels)
    return {f"category_cosine.{cell.positions[0]}": Estimate(value, value - 1.96 * error, value + 1.96 * error, n)}


def _transfer(cell: Activations, categories: Sequence[str], seed: int) -> pd.DataFrame:
    """AUROC of one half's direction on the other half's prompts of every category, its own included."""
    train = family_halves(cell.families, 1, seed, cell.labels)[0]
    values = cell.values[:, 0, 0].double()
    harmless = torch.tensor([label == HARMLESS for label in cell.labels])
    rows = []
    for fitted in categories:
        inside = torch.tensor([label == f"category {fitted}" for label in cell.labels])
        direction = values[inside & train].mean(dim=0) - values[harmless & train].mean(dim=0)
        scores = values @ direction
        for tested in categories:
            positive = torch.tensor([label == f"category {tested}" for label in cell.labels])
            kept = ((positive | harmless) & ~train).nonzero()[:, 0].tolist()
            area = auroc_estimate(scores[kept], positive[kept], [cell.families[i] for i in kept])
            where = {"fitted_on": fitted, "tested_on": tested, "position": cell.positions[0], "level": cell.levels[0]}
            rows.append({**where, **area.row("auroc")})
    return pd.DataFrame(rows)
