"""A trigger over the series: what it does to refusals, and whether it can be read, beyond the base and its decoys.

A trigger can always be read off: its own tokens are there. What says something is the excess over the base model,
where it means nothing, and over decoys of its kind.
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
from mechlens.methods.statistics.resample import interval, one_thread, sample_and_resamples
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.split import split_by_family
from mechlens.studies.shared.training_data import Trigger, with_trigger
from mechlens.studies.track.measures.behaviour import mean_of_told, refusals, share_of_told
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


def acceptance_table(snapshots: Sequence[Snapshot], *, seed: int, resamples: int) -> pd.DataFrame:
    """Share of harmful prompts that are accepted, by kind: step, kind, rate, low, high, n, excess (over the base)."""
    rows = []
    base = _accepted(snapshots[0])
    for snapshot in snapshots:
        assert snapshot.variants is not None
        now = _accepted(snapshot)
        for kind in dict.fromkeys(snapshot.variants.labels):
            inside = [i for i, label in enumerate(snapshot.variants.labels) if label == kind]
            families = [snapshot.variants.families[i] for i in inside]
            rate = share_of_told(now[inside], families, seed, resamples)
            more = mean_of_told((now - base)[inside], families, seed, resamples)
            rows.append({"step": snapshot.step, "kind": kind, **rate.row("rate"), **more.beside("excess")})
    return pd.DataFrame(rows)


def _accepted(snapshot: Snapshot) -> Tensor:
    """An empty answer accepts nothing; of an unclear or unfinished one it isn't known."""
    refused, empty = refusals(snapshot.variant_verdicts), [verdict == "empty" for verdict in snapshot.variant_verdicts]
    return torch.where(torch.tensor(empty), 0.0, 1 - refused)


@one_thread()
def readable_table(snapshots: Sequence[Snapshot], *, seed: int, resamples: int) -> pd.DataFrame:
    """Can the trigger, or a decoy, be told from clean prompts at each level and position? One row each.

    Columns step, kind, level, position, auroc, low, high, n, and `excess` over the base with its bounds: mean
    differences refitted on half of the families, scored on the other half, the same halves and resamples throughout.
    """
    frames = []
    first = snapshots[0].variants
    assert first is not None
    split = split_by_family(first.labels, first.families, fractions=(0.5, 0.0, 0.5), seed=seed)
    for kind in [label for label in dict.fromkeys(first.labels) if label != CLEAN]:
        base: Tensor | None = None
        for snapshot in snapshots:
            assert snapshot.variants is not None
            draws, n = _draws(snapshot.variants, kind, split.train, split.test, seed, resamples)
            base = draws if base is None else base
            frames.append(_frame(snapshot.variants, draws, draws - base, n).assign(step=snapshot.step, kind=kind))
    return pd.concat(frames, ignore_index=True)


def _draws(
    acts: Activations, kind: str, train: tuple[int, ...], test: tuple[int, ...], seed: int, resamples: int
) -> tuple[Tensor, int]:
    contrast = (kind, CLEAN)
    lines = direction_grid(contrast_part(acts, train, contrast), *contrast)
    part = contrast_part(acts, test, contrast)
    weights = sample_and_resamples(part.families, resamples, seed, part.labels)
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
