"""What the verdict stands on: both contrasts out of fold, D, and what one variable would give; needs no model."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.probing.out_of_fold import FOLD_SEEDS, FOLDS
from mechlens.methods.statistics.by_prompt import by_prompt_table
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import Fold, family_folds
from mechlens.settings import Nulls
from mechlens.studies.separate.contrasts import OutOfFoldContrast, Question, measure_contrast
from mechlens.studies.separate.dissociation import Dissociation, Places, measure_dissociation
from mechlens.studies.separate.one_factor import WORLDS, OneFactor, one_factor_worlds
from mechlens.studies.shared.contrasts import Surface
from mechlens.studies.shared.quadrants import IN_NO_QUADRANT, QUADRANTS

HARMFUL, HARMLESS, REFUSED, ACCEPTED = "harmful", "harmless", "refused", "accepted"


@dataclass(frozen=True)
class Analysis:
    """Harm and refusal read out of fold, and whether they are one variable."""

    harm: OutOfFoldContrast
    """Harmful against harmless, fitted to the matched prompts, every prompt scored."""
    refusal: OutOfFoldContrast
    """Refused against accepted."""
    dissociation: Dissociation | None
    """None where harm or refusal has too few families to be read."""
    one_factor: OneFactor | None
    """None where D can't be measured."""
    places: Places
    folds: tuple[tuple[Fold, ...], ...]
    """By fold seed."""
    last: str
    """Name of the last position."""

    def inside(self, *words: str) -> Bool[Tensor, " prompt"]:
        """Prompts whose quadrant has one of these words in it: "accepted", "harmful"."""
        return torch.tensor([bool(set(name.split("_")) & set(words)) for name in self.places.quadrants])

    def metrics(self) -> dict[str, Estimate]:
        """Its numbers by their names in run.json."""
        harm, refusal, last = self.harm, self.refusal, self.last
        accepted, harmful = self.inside(ACCEPTED), self.inside(HARMFUL)
        numbers = {
            name: contrast.auroc(position, inside) for name, (contrast, position, inside) in self._aurocs().items()
        } | {
            "token_identity_auroc.inst": harm.baseline("token_identity.inst"),
            "token_identity_auroc.last": harm.baseline(f"token_identity.{last}"),
            "tfidf_auroc": harm.baseline("tfidf"),
            "mean_embedding_auroc": harm.baseline("mean_embedding"),
            "harmful_gain": harm.gain("inst")[0],
            "harmful_gain.accepted": harm.gain("inst", accepted)[0],
            "refused_gain.harmful": refusal.gain(last, harmful)[0],
        }
        counts = {name: self.places.quadrants.count(name) for name in (*QUADRANTS, *IN_NO_QUADRANT)}
        if not counts["unfinished"]:
            del counts["unfinished"]  # runs of earlier versions have no such number
        numbers |= {f"n.{name}": Estimate.exact(n, len(self.places.quadrants)) for name, n in counts.items()}
        return numbers | self._dissociation() | self._one_factor()

    def _aurocs(self) -> dict[str, tuple[OutOfFoldContrast, str, Bool[Tensor, " prompt"] | None]]:
        """Of every AUROC its contrast, its position, and the prompts that it is of; None is all."""
        harm, refusal, last = self.harm, self.refusal, self.last
        return {
            "harmful_auroc.inst": (harm, "inst", None),
            "harmful_auroc.last": (harm, last, None),
            "refused_auroc.inst": (refusal, "inst", None),
            "refused_auroc.last": (refusal, last, None),
            "harmful_auroc.inst.accepted": (harm, "inst", self.inside(ACCEPTED)),
            "harmful_auroc.inst.refused": (harm, "inst", self.inside(REFUSED)),
            "refused_auroc.last.harmful": (refusal, last, self.inside(HARMFUL)),
            "refused_auroc.last.harmless": (refusal, last, self.inside(HARMLESS)),
        }

    def by_prompt(self, ids: Sequence[str]) -> pd.DataFrame:
        """What the AUROCs were made of, prompt by prompt."""
        rows = {}
        for name, (contrast, position, inside) in self._aurocs().items():
            made_of = contrast.by_prompt(ids, position, inside)
            if made_of is not None:
                rows[name] = made_of
        return by_prompt_table(rows)

    def _dissociation(self) -> dict[str, Estimate]:
        if self.dissociation is not None:
            return self.dissociation.metrics()
        names = ("", ".beyond_words", ".over_topics", ".harm_gap", ".refusal_gap")
        return {f"dissociation{name}": Estimate.missing(self.places.fewest()[1]) for name in names}

    def _one_factor(self) -> dict[str, Estimate]:
        """D's null, and what is left to be read after an erasure, each beside one variable's."""
        erasures = [f"erase_{name}.{position}" for name in ("refusal", HARMFUL[:4]) for position in ("inst", "last")]
        n = len(self.places.quadrants)
        if self.one_factor is None:
            names = ["dissociation.one_variable_95", "dissociation.p", *erasures, *(f"{e}.p" for e in erasures)]
            return {name: Estimate.missing(self.places.fewest()[1]) for name in names}
        worlds = self.one_factor
        found = {
            "dissociation.one_variable_95": Estimate.exact(worlds.quantile("D"), n),
            "dissociation.p": Estimate.exact(worlds.p("D"), n),
        }
        for name in erasures:
            found[name] = Estimate.exact(worlds.observed[name], n)
            found[f"{name}.p"] = Estimate.exact(worlds.p(name), n)
        return found

    def erasures(self) -> pd.DataFrame:
        """What one erasure leaves: erased, position, auroc, and what one variable gives (mean and 95%)."""
        if self.one_factor is None:
            return pd.DataFrame()
        rows = []
        for name, value in self.one_factor.observed.items():
            if name != "D":
                erased, position = name.removeprefix("erase_").split(".")
                drawn = self.one_factor.drawn[name]
                rows.append(
                    {"erased": erased, "position": position, "auroc": value,
                     "one_variable_mean": float(drawn.nanmean()), "one_variable_95": self.one_factor.quantile(name),
                     "p": self.one_factor.p(name)}
                )  # fmt: skip
        return pd.DataFrame(rows)


def analyse(
    acts: Activations,
    quadrants: Sequence[str],
    paired: Bool[Tensor, " prompt"],
    topics: Sequence[str],
    surface: Surface,
    plan: Nulls,
    *,
    fold_seeds: int = FOLD_SEEDS,
    worlds: int = WORLDS,
) -> Analysis:
    """The analysis of prompts that are placed in quadrants; `paired` ones fit the direction of harm.

    Nothing is raised where a quadrant is small: what needs it is missing.
    """
    places = Places(tuple(quadrants), acts.families, tuple(topics))
    folds = tuple(family_folds(quadrants, acts.families, FOLDS, plan.seed + i) for i in range(fold_seeds))
    sides = tuple(q.rpartition("_")[2] if p else "" for q, p in zip(quadrants, paired.tolist(), strict=True))
    verdicts = tuple(q.partition("_")[0] if q in QUADRANTS else "" for q in quadrants)
    harm, refusal = (
        measure_contrast(question, acts, folds, surface, plan)
        for question in (
            Question("harmful", HARMFUL, HARMLESS, sides),
            Question("refused", REFUSED, ACCEPTED, verdicts),
        )
    )
    found = None
    if harm.scores is not None and refusal.scores is not None:
        told = torch.stack([*harm.surface.values(), *refusal.surface.values()], dim=1)
        found = measure_dissociation(harm.scores, refusal.scores, told, places, acts.ids, plan.seed, plan.resamples)
    return Analysis(
        harm=harm,
        refusal=refusal,
        dissociation=found,
        one_factor=_worlds(acts, harm, refusal, found, places, paired, folds[0], plan.seed, worlds),
        places=places,
        folds=folds,
        last=acts.positions[-1],
    )


def _worlds(
    acts: Activations,
    harm: OutOfFoldContrast,
    refusal: OutOfFoldContrast,
    found: Dissociation | None,
    places: Places,
    paired: Bool[Tensor, " prompt"],
    folds: Sequence[Fold],
    seed: int,
    n: int,
) -> OneFactor | None:
    if found is None or harm.scores is None or refusal.scores is None or not found.contrast.measurable:
        return None
    latent = torch.from_numpy((found.prompts["harm"] + found.prompts["refusal"]).to_numpy() / 2)
    levels = harm.scores.level("inst"), refusal.scores.level(acts.positions[-1])
    return one_factor_worlds(acts, levels, places, paired, folds, latent, seed, n)
