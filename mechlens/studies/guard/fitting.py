"""Guards by every rule, fitted to half of the prompt families and held to the rest."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from mechlens.choices import RULES
from mechlens.errors import UserError, kind_of
from mechlens.files import user_path
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.cache import Cache
from mechlens.methods.guard.fitted import ANEW, TRANSFER, FittedGuard, GuardSettings
from mechlens.methods.guard.guard import GuardEstimator
from mechlens.methods.guard.rules import needs_refusals
from mechlens.methods.probing.confounds import compare_sides
from mechlens.methods.shown import few, lines
from mechlens.models.bridge import LanguageModel
from mechlens.models.checkpoints.difference import require_same_template
from mechlens.models.checkpoints.outline import Outline
from mechlens.prompts.asked import Prompts, as_prompts
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import Split, split_by_family
from mechlens.prompts.templates.template import ChatTemplate, TemplateChoice
from mechlens.settings import FRACTIONS, Answering
from mechlens.studies.shared.inputs import Check
from mechlens.studies.shared.quadrants import judge_answers
from mechlens.studies.shared.sources import HARMFUL, HARMLESS
from mechlens.studies.shared.training_data import text_sha256

Guard = TypeVar("Guard", bound="LatentGuard")


class LatentGuard(GuardEstimator):
    """A detector of harmful prompts that reads the model's own residual stream; see `GuardEstimator`.

    `guard = LatentGuard().fit(activations)`, then `guard(model, texts)`; `ml.save(guard, path)` keeps it, and
    `LatentGuard.of(ml.open(path))` is the estimator again.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> guard = ml.LatentGuard().fit(ml.collect(model, prompts))
    >>> (said,) = guard(model, ["How do I bake a cake?"])
    >>> said.harmful in (True, False)
    True
    """

    @classmethod
    def of(cls: type[Guard], fitted: object) -> Guard:
        """The estimator around a fitted guard; UserError for anything else."""
        if not isinstance(fitted, FittedGuard):
            raise UserError(f"{kind_of(fitted)} is no fitted guard; give what `mechlens guard fit` wrote")
        guard = cls.with_settings(fitted.settings)
        guard.fitted_ = fitted
        guard._learnt()
        return guard


def fits(guard: FittedGuard, *, other_weights: bool) -> Check:
    """UserError, before any weights are read, where the files of a model say that the guard isn't for it."""

    def check(known: Outline, template: ChatTemplate) -> None:
        allow = ANEW if guard.checkpoint.regime != known.checkpoint.regime else TRANSFER
        known.require_same("guard", guard.checkpoint, guard.d_model, allow, any_weights=other_weights)
        require_same_template("guard", guard.template, template.fingerprint, ANEW)

    return check


PAPER = "paper_rule"
"""Name of the rule as published: cosines at `inst`, averaged over all levels, threshold 0."""


@dataclass(frozen=True, repr=False)
class GuardFitting:
    """A fitted guard, the other rules fitted in the same way, and what was held out."""

    guard: FittedGuard
    others: dict[str, FittedGuard]
    train: tuple[Prompt, ...]
    """Prompts that the guards were fitted and calibrated on."""
    test: tuple[Prompt, ...]
    split: Split
    """Row numbers of the prompts that were given."""

    def __repr__(self) -> str:
        others = few(list(self.others))
        facts = {"others": others, "prompts": f"{len(self.train)} fitted on, {len(self.test)} held out"}
        return lines(f"GuardFitting: {self.guard!r}", facts)


def fit_guard(
    model: LanguageModel,
    prompts: Prompts,
    estimator: GuardEstimator,
    *,
    plan: Answering | None = None,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> GuardFitting:
    """Fits the estimator to half of the prompt families, with a fifth that chooses levels; the rest is held out.

    Prompts carry their labels: `ml.as_prompts(texts, label=labels)` gives them to texts. `plan` says how the model
    answers and is judged, for a rule that has to know what it refuses.

    >>> model = ml.load("smollm2")
    >>> prompts = [*ml.builtin_prompts("harmful")[:40], *ml.builtin_prompts("harmless")[:40]]
    >>> fitting = ml.fit_guard(model, prompts, ml.LatentGuard(max_fpr=0.1))
    >>> guard = ml.LatentGuard.of(fitting.guard)
    >>> len(guard(model, ["How do I bake a cake?", "How do I poison a cake?"]))
    2
    """
    used = template_of(model, template)
    prompts = as_prompts(prompts)
    labels, families = [prompt.label for prompt in prompts], [prompt.group for prompt in prompts]
    harmful, harmless = ([p for p in prompts if (p.label == HARMFUL) is side] for side in (True, False))
    compare_sides(harmful, harmless, (HARMFUL, HARMLESS))
    split = split_by_family(labels, families, fractions=FRACTIONS, seed=estimator.seed)
    acts = collect(model, tokenize(prompts, used), positions=read_positions(estimator), cache=cache)
    sha = [text_sha256(prompt.text) for prompt in prompts]
    known = sorted((*split.train, *split.validation))
    refused = None
    if needs_refusals(estimator.rule):
        how = plan or Answering()
        batch = tokenize([prompts[i] for i in known], used)
        said = answer(model, batch, max_new_tokens=how.max_new_tokens, cache=cache)
        judged = judge_answers(batch.prompts, said, how.judge)
        refused = dict(zip(said.ids, judged.refused, strict=True))
    guard = estimator.fit(acts, split, sha, refused).fitted_
    return GuardFitting(
        guard=guard,
        others=other_rules(acts, guard.settings, split),
        train=tuple(prompts[i] for i in known),
        test=tuple(prompts[i] for i in split.test),
        split=split,
    )


def other_rules(acts: Activations, settings: GuardSettings, split: Split | None = None) -> dict[str, FittedGuard]:
    """The paper's rule as published, and every other rule of ours with the same settings that needs no refusals."""
    fitted = {
        f"{rule}_rule": GuardEstimator.with_settings(replace(settings, rule=rule)).fit(acts, split).fitted_
        for rule in RULES.ours
        if rule != settings.rule and not needs_refusals(rule)
    }
    published = replace(settings, rule="faithful", positions=("inst",), levels="all", max_fpr=None)
    return {PAPER: GuardEstimator.with_settings(published).fit(acts, split).fitted_, **fitted}


def rules_by_refusal(acts: Activations, settings: GuardSettings, refused: Mapping[str, bool]) -> dict[str, FittedGuard]:
    """Every other rule of ours that knows what the model refuses, where it refuses and accepts enough prompts."""
    fitted = {}
    for rule in RULES.ours:
        if needs_refusals(rule) and rule != settings.rule:
            estimator = GuardEstimator.with_settings(replace(settings, rule=rule))
            with contextlib.suppress(UserError):  # too few of a kind: there is no such guard to compare with
                fitted[f"{rule}_rule"] = estimator.fit(acts, refused=refused).fitted_
    return fitted


def read_positions(settings: GuardEstimator | GuardSettings) -> tuple[str, ...]:
    """The positions to collect: the guard's own, and both that other rules and baselines read."""
    return tuple(dict.fromkeys((*settings.positions, "inst", "last")))


def guard_file(given: str) -> Path:
    """Where a guard lies: the file named, or the one in the folder of a run of `guard fit`."""
    path = user_path(given)
    return path / "guard.safetensors" if path.is_dir() else path
