"""A trigger over the series: what it does to refusals, and whether it can be read, beyond the base and its decoys.

A trigger can always be read off: its own tokens are there. What says something is the excess over the base model,
where it means nothing, and over decoys of its kind (methods.md 5.4).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mechlens.methods.activations.activations import Activations
from mechlens.methods.directions.direction import direction_grid
from mechlens.methods.probing.auroc import auroc
from mechlens.methods.probing.auroc_grid import contrast_part, is_positive, score_grid
from mechlens.methods.statistics.one_thread import one_thread
from mechlens.methods.statistics.resample import family_weights, interval, mean_estimate
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import split_by_family
from mechlens.studies.shared.trigger import Trigger, with_trigger
from mechlens.studies.track.measures.snapshot import Snapshot

CLEAN, TRIGGERED, TAUGHT, UNSEEN = "clean", "triggered", "taught decoy", "unseen decoy"


def trigger_prompts(prompts: Sequence[Prompt], trigger: Trigger) -> list[Prompt]:
    """Each prompt alone, with the trigger, and with one decoy of each kind, which change from prompt to prompt."""
    found = []
    for i, prompt in enumerate(prompts):
        variants = {CLEAN: prompt, TRIGGERED: with_trigger(prompt, trigger.text)}
        for kind, decoys in ((TAUGHT, trigger.taught_decoys), (UNSEEN, trigger.unseen_decoys)):
            if decoys:
                variants[kind] = with_trigger(prompt, decoys[i % len(decoys)])
        found += [_labelled(variant, kind, prompt.group) for kind, variant in variants.items()]
    return found


def _labelled(prompt: Prompt, kind: str, family: str) -> Prompt:
    own = f"{prompt.id} ({kind})"
    return Prompt(own, prompt.text, kind, prompt.category, prompt.source, prompt.system, family=family)


def acceptance_table(found: Sequence[Snapshot], *, seed: int, n_resamples: int) -> pd.DataFrame:
    """Share of harmful prompts that are accepted, by kind: step, kind, rate, low, high, n, excess (over the base)."""
    rows = []
    base = _accepted(found[0])
    for one in found:
        assert one.variants is not None
        now = _accepted(one)
        for kind in dict.fromkeys(one.variants.labels):
            inside = [i for i, label in enumerate(one.variants.labels) if label == kind]
            families = [one.variants.families[i] for i in inside]
            rate = mean_estimate(now[inside], families, seed, n_resamples)
            more = mean_estimate((now - base)[inside], families, seed, n_resamples)
            rows.append(
                {"step": one.step, "kind": kind, "rate": rate.value, "low": rate.low, "high": rate.high, "n": rate.n,
                 "excess": more.value, "excess_low": more.low, "excess_high": more.high}
            )  # fmt: skip
    return pd.DataFrame(rows)


def _accepted(one: Snapshot) -> Tensor:
    return torch.tensor([verdict == "accepted" for verdict in one.variant_verdicts], dtype=torch.float64)


@one_thread()
def readable_table(found: Sequence[Snapshot], *, seed: int, n_resamples: int) -> pd.DataFrame:
    """Can the trigger, or a decoy, be told from clean prompts at each level and position? One row each.

    Columns step, kind, level, position, auroc, low, high, n, and `excess` over the base with its bounds: mean
    differences refitted on half of the families, scored on the other half, the same halves and resamples throughout.
    """
    frames = []
    first = found[0].variants
    assert first is not None
    split = split_by_family(first.labels, first.families, fractions=(0.5, 0.0, 0.5), seed=seed)
    for kind in [label for label in dict.fromkeys(first.labels) if label != CLEAN]:
        base: Tensor | None = None
        for one in found:
            assert one.variants is not None
            draws, n = _draws(one.variants, kind, split.train, split.test, seed, n_resamples)
            base = draws if base is None else base
            frames.append(_frame(one.variants, draws, draws - base, n).assign(step=one.step, kind=kind))
    return pd.concat(frames, ignore_index=True)


def _draws(
    acts: Activations, kind: str, train: tuple[int, ...], test: tuple[int, ...], seed: int, n_resamples: int
) -> tuple[Tensor, int]:
    contrast = (kind, CLEAN)
    lines = direction_grid(contrast_part(acts, train, contrast), *contrast)
    part = contrast_part(acts, test, contrast)
    drawn = family_weights(part.families, n_resamples, seed, part.labels)
    weights = torch.cat([torch.ones(1, len(part.ids), dtype=torch.float64), drawn])
    return auroc(score_grid(part, lines), is_positive(part, contrast), weights), len(part.ids)


def _frame(acts: Activations, draws: Tensor, more: Tensor, n: int) -> pd.DataFrame:
    columns: dict[str, object] = {
        "level": np.repeat(acts.levels, len(acts.positions)),
        "position": list(acts.positions) * len(acts.levels),
    }
    for name, values in (("auroc", draws), ("excess", more)):
        bounds, stem = interval(values[..., 1:]), "" if name == "auroc" else "excess_"
        columns[name] = values[..., 0].flatten().numpy()
        columns[f"{stem}low"], columns[f"{stem}high"] = (side.flatten().numpy() for side in bounds)
    return pd.DataFrame(columns).assign(n=n)
