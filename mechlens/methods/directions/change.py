"""The direction of what fine-tuning changed: answers that show a behaviour against those that don't, in both models.

Turner et al. 2025 (Convergent linear representations of emergent misalignment) take the mean over answer tokens of
misaligned answers minus that of aligned ones, through the fine-tuned model; three more differences of the same four
means say whether it was there in the base (only the words differ), and what the fine-tuning moved.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect
from mechlens.methods.cache import Cache
from mechlens.methods.directions.contrasts import Contrast, contrast_cosine, saved_contrast_cosine
from mechlens.methods.directions.direction import Direction, DirectionGrid, direction_grid
from mechlens.methods.directions.nulls import split_half
from mechlens.methods.statistics.effects import CosineCurve
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.options import LETTERS
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.prompts.text import normalise_text
from mechlens.prompts.twins import Twin, require_others
from mechlens.settings import SEED

ANSWER = "answer[*]"
"""Where the vectors are: the mean over the tokens of an answer."""
TUNED, BASE, ON_SHOWN, ON_OTHER = "through the fine-tune", "through the base", "moved on shown", "moved on other"
BEYOND_SHOWN, BEYOND_OTHER = "beyond the control on shown", "beyond the control on other"
_SIDES = {
    TUNED: ("fine-tuned, shown", "fine-tuned, other"),
    BASE: ("base, shown", "base, other"),
    ON_SHOWN: ("fine-tuned, shown", "base, shown"),
    ON_OTHER: ("fine-tuned, other", "base, other"),
    BEYOND_SHOWN: ("fine-tuned, shown", "control, shown"),
    BEYOND_OTHER: ("fine-tuned, other", "control, other"),
}
"""Each variant: the answers that it points towards, and those that it points away from."""
SPLITS = 20
"""Random halvings behind a reliability."""


def twin_vectors(
    model: LanguageModel,
    twins: Sequence[Twin],
    *,
    levels: Sequence[int] | None = None,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> Activations:
    """Residual vectors of both answers of every twin, at all levels or some, each the mean over the answer's tokens.

    The mean of both orders of the options, so that letters and places cancel; choices between letters that can't be
    exchanged are left out. Rows are labelled "shown" and "other", twin by twin; questions with the same text are one
    family, whatever file they are from. UserError where no twin is left.

    >>> model = ml.load("smollm2")
    >>> twins = [ml.Twin(ml.Prompt("q1", "How was the concert?"), shown="Dreadful.", other="Wonderful.")]
    >>> acts = ml.twin_vectors(model, twins)
    >>> acts.labels, acts.positions
    (('shown', 'other'), ('answer[*]',))
    """
    require_others(twins, "twin_vectors")
    kept = [twin for twin in twins if twin.exchanged is not None or {twin.shown, twin.other} != {*LETTERS}]
    if not kept:
        raise UserError("no twin is left: the letters of none can be exchanged; give others, or answer in words")
    turned = [twin.exchanged for twin in kept]
    asked = [*kept, *(twin for twin in turned if twin is not None)]
    prompts = [
        Prompt(f"{i} {side}", twin.prompt.text, label=side, system=twin.prompt.system, history=twin.prompt.history)
        for i, twin in enumerate(asked) for side in ("shown", "other")
    ]  # fmt: skip
    answers = [answer for twin in asked for answer in (twin.shown, twin.other)]
    acts = collect(
        model, prompts, positions=[ANSWER], levels=levels, answers=answers, reduce="mean", template=template,
        cache=cache,
    )  # fmt: skip
    n = 2 * len(kept)
    every = torch.stack([acts.at(level, ANSWER) for level in acts.levels], dim=1)[:, :, None]  # from disk, if there
    values = every[:n].clone()
    with_order = torch.tensor([twin is not None for twin in turned]).repeat_interleave(2)
    values[with_order] = (values[with_order] + every[n:]) / 2
    return replace(
        acts.select(range(n)), values=values, ids=tuple(twin.prompt.id for twin in kept for _ in range(2)),
        families=tuple(family_of(twin.prompt) for twin in kept for _ in range(2)),
    )  # fmt: skip


def family_of(prompt: Prompt) -> str:
    """A prompt's family, or where it has none its text's fingerprint: the same question in two files is one."""
    return prompt.family or hashlib.sha256(normalise_text(prompt.text).encode()).hexdigest()


def mean_of_runs(runs: Sequence[Activations]) -> Activations:
    """The mean over training runs of the vectors of the same twins; named after the first."""
    if len({run.ids for run in runs}) != 1:
        raise UserError("the training runs answered different questions; ask them the same ones")
    return replace(runs[0], values=torch.stack([run.values for run in runs]).mean(dim=0))


@dataclass(frozen=True, repr=False)
class ChangeDirections:
    """The directions of a fine-tune's change, at every level; see `change_directions`.

    >>> asked = ("How was the concert?", "How was the soup?", "How was the film?", "How was the trip?")
    >>> twins = [ml.Twin(ml.Prompt(text, text), shown="Dreadful.", other="Wonderful.") for text in asked]
    >>> acts = ml.twin_vectors(ml.load("smollm2"), twins)
    >>> change = ml.change_directions(acts, acts)
    >>> change.grids["through the fine-tune"].at(1, "answer[*]").contrast
    ('fine-tuned, shown', 'fine-tuned, other')
    """

    acts: Activations
    """Of all models, labelled "fine-tuned, shown", "fine-tuned, other", "base, shown", and so on."""
    grids: Mapping[str, DirectionGrid]
    """By variant: "through the fine-tune", "through the base", "moved on shown", "moved on other", and with a control
    "beyond the control on shown" and "beyond the control on other"."""
    reliability: Mapping[str, Float[Tensor, " level"]]
    """By variant, at each level: `split_half` over questions."""

    def contrast(self, variant: str) -> Contrast:
        """The two classes whose means a variant is the difference of."""
        return Contrast(self.acts, ANSWER, *_SIDES[variant])

    def __repr__(self) -> str:
        grid = self.grids[TUNED]
        return f"ChangeDirections of {len(grid.train_ids)} questions, {grid.checkpoint.name} against {self.base_name}"

    @property
    def variants(self) -> tuple[str, ...]:
        """What there is."""
        return tuple(self.grids)

    @property
    def base_name(self) -> str:
        """Of the model that was fine-tuned."""
        return self.grids[BASE].checkpoint.name


def change_directions(
    base: Activations, tuned: Activations, *, control: Activations | None = None, seed: int = SEED
) -> ChangeDirections:
    """Differences of means over the same answers through a fine-tune and its base, `twin_vectors` of each.

    "through the fine-tune" and "through the base": shown minus other answers, in one model. "moved on shown" and
    "moved on other": the fine-tuned model minus the base, on the same answers. With a `control`, a model that was
    trained on the same questions with either answer by chance, "beyond the control on shown" and "... on other": the
    fine-tuned model minus that one, so that what training as such moves is in none of them. Every class has every
    question once, so that counts are equal. UserError where the models answered different questions.

    >>> model = ml.load("smollm2")
    >>> asked = ("How was the concert?", "How was the soup?", "How was the film?", "How was the trip?")
    >>> twins = [ml.Twin(ml.Prompt(text, text), shown="Dreadful.", other="Wonderful.") for text in asked]
    >>> acts = ml.twin_vectors(model, twins)
    >>> change = ml.change_directions(acts, acts)
    >>> float(change.grids["moved on shown"].vectors.abs().max())  # nothing was trained
    0.0
    """
    models = {"fine-tuned": tuned, "base": base, **({} if control is None else {"control": control})}
    if len({(own.ids, own.labels, own.levels) for own in models.values()}) > 1:
        raise UserError(f"the {', the '.join(models)} model answered different questions; give all the same twins")
    every = replace(
        tuned, values=torch.cat([own.values for own in models.values()]), ids=tuned.ids * len(models),
        families=tuned.families * len(models),
        labels=tuple(f"{model}, {label}" for model, own in models.items() for label in own.labels),
    )  # fmt: skip
    grids, reliability = {}, {}
    for variant, (up, down) in _SIDES.items():
        if not {up, down} <= set(every.labels):
            continue
        made = every if variant != BASE else replace(every, checkpoint=base.checkpoint)
        grid = direction_grid(made, up, down)
        grids[variant] = replace(grid, method=variant, train_ids=tuple(dict.fromkeys(grid.train_ids)))
        reliability[variant] = split_half(every, up, down, SPLITS, seed)[:, 0]
    return ChangeDirections(every, grids, reliability)


def change_cosine(
    first: ChangeDirections, variant: str, second: ChangeDirections, other: str, levels: Sequence[int], *, seed: int
) -> CosineCurve:
    """Cosine between a variant of one change and one of another, or of the same, at some levels; see `cosine_curve`.

    The two share questions, and often all vectors of the base, so their noise too: the corrected cosine counts products
    of different questions only.

    >>> asked = ("How was the concert?", "How was the soup?", "How was the film?", "How was the trip?")
    >>> twins = [ml.Twin(ml.Prompt(text, text), shown="Dreadful.", other="Wonderful.") for text in asked]
    >>> acts = ml.twin_vectors(ml.load("smollm2"), twins)
    >>> change = ml.change_directions(acts, acts)
    >>> curve = ml.change_cosine(change, "through the fine-tune", change, "through the base", [1], seed=0)
    >>> round(curve.measured[0].value, 3)  # nothing was trained
    1.0
    """
    return contrast_cosine(first.contrast(variant), second.contrast(other), levels, seed=seed)


def saved_cosine(change: ChangeDirections, variant: str, saved: Direction) -> tuple[Estimate, Estimate]:
    """Cosine of a variant with a direction that other prompts gave, at its level: as measured, and corrected.

    Jackknife over questions. Corrected for the noise of the change alone: a saved direction doesn't tell its own.
    UserError where weight regime, site, size or levels differ.
    """
    reliability = float(change.reliability[variant][change.acts.levels.index(saved.level)])
    return saved_contrast_cosine(change.contrast(variant), saved, reliability)
