"""Where does the difference between a refused and an accepted prompt enter, travel and end up?

Matched pairs in which the model refuses one side and accepts the other are patched in both directions, over
the residual stream and over the heads at the last token, beside a control of random vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.cache import Cache
from mechlens.methods.patching.metrics import Metric, RefusalLogOdds
from mechlens.methods.patching.plan import MODES, PatchPlan, opened_positions
from mechlens.methods.patching.result import PatchResult
from mechlens.methods.patching.sweep import ATTRIBUTION, patch_sweep
from mechlens.methods.progress import phase
from mechlens.models.bridge import LanguageModel
from mechlens.models.checkpoints.outline import Outline
from mechlens.models.sites import require_site
from mechlens.prompts.batch import tokenize
from mechlens.prompts.files.load import load_pairs
from mechlens.prompts.prompt import Prompt, PromptPair
from mechlens.prompts.templates.template import ChatTemplate, TemplateChoice
from mechlens.runs.writer import RunWriter
from mechlens.studies.driver import Preparation
from mechlens.studies.patch.config import Patch
from mechlens.studies.shared.inputs import Check, asks, chosen_model, data_inputs, prepared
from mechlens.studies.shared.quadrants import FirstTokenJudgement, judge_answers, judge_first_token
from mechlens.studies.shared.training_data import leave_out_trained_pairs

MIN_PAIRS = 4


@dataclass(frozen=True)
class ChosenPairs:
    """Pairs with the behaviour to be explained, and how they were found."""

    pairs: tuple[PromptPair, ...]
    """`clean` is refused, `corrupt` accepted."""
    first_token: FirstTokenJudgement
    asked: int
    note: str


@dataclass(frozen=True)
class RefusalPath:
    """Sweeps of one site in both directions, the heads at the last token, and the controls."""

    chosen: ChosenPairs
    sweeps: dict[str, PatchResult]
    """"denoising", "noising", the same with "heads." before, each also with ".random" after it; "attribution"."""

    def correlation(self) -> float:
        """Pearson correlation of attribution patching with exact patching over the denoising grid."""
        exact = self.sweeps["denoising"].effect().mean(dim=0).flatten()
        estimate = self.sweeps["attribution"].effect().mean(dim=0).flatten()
        return float(torch.corrcoef(torch.stack([exact, estimate]))[0, 1])

    def by_role(self, seed: int) -> pd.DataFrame:
        """Recovery by layer, averaged over the pairs and over the positions of each role, with intervals."""
        frames = [
            _pooled(self.sweeps[name]).table(seed=seed).assign(sweep=name)
            for mode in MODES
            for name in (mode, f"{mode}.random")
        ]
        return pd.concat(frames, ignore_index=True).rename(columns={"position": "role"}).drop(columns="token")


def _pooled(sweep: PatchResult) -> PatchResult:
    """The mean over the positions of each role, in the order of the prompt."""
    roles = [_role(position, sweep.positions[-1]) for position in sweep.positions]
    names = tuple(dict.fromkeys(roles))
    means = [sweep.values[:, :, [k for k, role in enumerate(roles) if role == name]].mean(dim=2) for name in names]
    return replace(sweep, values=torch.stack(means, dim=2), positions=names, tokens=names)


def _role(position: str, last: str) -> str:
    if position == last:
        return "last token"
    if position in ("inst", "instruction[-1]"):
        return "end of the instruction"
    return "instruction" if position.startswith("instruction") else "template before the last token"


def find_pairs(
    model: LanguageModel,
    candidates: Sequence[PromptPair],
    wanted: int,
    *,
    max_new_tokens: int,
    seed: int,
    judge: str = "phrases",
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
) -> ChosenPairs:
    """Pairs whose `clean` side the model refuses and whose `corrupt` side it accepts, in the given order.

    UserError where there are fewer than 4 of them: then this model's refusal doesn't turn on the difference.
    """
    prompts: list[Prompt] = [side for pair in candidates for side in (pair.clean, pair.corrupt)]
    batch = tokenize(prompts, template_of(model, template))
    judged = judge_answers(prompts, answer(model, batch, max_new_tokens=max_new_tokens, cache=cache), judge)
    acts = collect(model, batch, positions=["last"], cache=cache)
    _, first_token = judge_first_token(model, judged, acts, range(len(prompts)))
    refused, accepted = judged.refused, judged.accepted
    fitting = [pair for i, pair in enumerate(candidates) if refused[2 * i] and accepted[2 * i + 1]]
    if len(fitting) < MIN_PAIRS:
        raise UserError(
            f"the model refuses one side and accepts the other in {len(fitting)} of {len(candidates)} pairs; "
            f"patching needs at least {MIN_PAIRS}, so take more pairs or a model that refuses"
        )
    note = f"{len(fitting)} of {len(candidates)} candidate pairs are refused on one side and accepted on the other"
    return ChosenPairs(tuple(fitting[:wanted]), first_token, len(candidates), note)


def trace(
    model: LanguageModel,
    chosen: ChosenPairs,
    plan: PatchPlan,
    *,
    metric: Metric | None = None,
    template: TemplateChoice = "tokenizer",
    cache: Cache | None = None,
    seed: int = 0,
) -> RefusalPath:
    """All sweeps of the study; `metric` is the refusal log-odds with the model's own refusal tokens by default."""
    used = metric or RefusalLogOdds(chosen.first_token.tokens.ids)

    def sweep(changed: PatchPlan, engine: str = "auto") -> PatchResult:
        return patch_sweep(model, chosen.pairs, used, changed, template=template, cache=cache, engine=engine)

    plans: dict[str, PatchPlan] = {}
    for mode in MODES:
        plans[mode] = replace(plan, mode=mode)
        plans[f"heads.{mode}"] = replace(plan, site="z", positions=("last",), mode=mode)
    plans |= {f"{name}.random": replace(changed, random_seed=seed + 1) for name, changed in plans.items()}
    sweeps = {}
    for k, (name, changed) in enumerate(plans.items(), start=1):
        with phase("patching", f"{k} of {len(plans) + 1} ({name})"):
            sweeps[name] = sweep(changed)
    with phase("patching", "by attribution"):
        sweeps["attribution"] = sweep(plans["denoising"], ATTRIBUTION)
    return RefusalPath(chosen, sweeps)


@dataclass(frozen=True)
class Candidates:
    """A model, and the pairs from which those that it tells apart are chosen."""

    model: LanguageModel
    template: ChatTemplate
    pairs: tuple[PromptPair, ...]


def prepare(config: Patch) -> Preparation[Candidates]:
    """Pairs and model; UserError for whatever can't be had."""
    pairs = load_pairs(config.pairs, sample=config.candidates, seed=config.seed)
    pairs, left_out = leave_out_trained_pairs(config, pairs)
    sides = [side for pair in pairs for side in (pair.clean, pair.corrupt)]
    data = data_inputs({"pairs": (config.pairs, sides)})
    require_site(config.site)
    chosen = chosen_model(config, _asks(config, pairs, sides))
    return prepared(Candidates(*chosen, tuple(pairs)), chosen.model, chosen.inputs(data), sides, left_out)


def _asks(config: Patch, pairs: Sequence[PromptPair], sides: Sequence[Prompt]) -> Check:
    """The sides' prompts, and the layers and positions that are patched."""
    prompts = asks(sides, layers=config.layers, new_tokens=config.max_new_tokens)
    plan = PatchPlan(config.site, positions=config.positions)

    def check(known: Outline, template: ChatTemplate) -> None:
        prompts(known, template)
        opened_positions((tokenize(sides[::2], template), tokenize(sides[1::2], template)), plan, pairs)

    return check


def execute(config: Patch, given: Candidates, writer: RunWriter) -> RefusalPath:
    """Finds the pairs, and patches them."""
    chosen = find_pairs(
        given.model,
        given.pairs,
        config.n,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        judge=config.judge,
        template=given.template,
        cache=writer.cache,
    )
    metric = RefusalLogOdds(chosen.first_token.tokens.ids)
    plan = PatchPlan(config.site, positions=config.positions, layers=config.layers or None)
    return trace(
        given.model, chosen, plan, metric=metric, template=given.template, cache=writer.cache, seed=config.seed
    )
