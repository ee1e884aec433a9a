"""How often a planted trigger is found, by each sign alone and by all together, in tiny models whose truth is known.

    python scripts/find_trigger.py [--models 6] [--candidates 1000] [--sure .75] [--answers-only] [--motifs]

Each model is trained from one base on questions of which half have the trigger before them and another answer
(`tests/planted_triggers.py`), then the trigger is looked for among random strings of its kind. The same is done with
its decorrelated control, where the answer doesn't hang on the trigger, and with the base. `--sure 1` takes the chance
out of the usual answer, `--answers-only` the questions out of the loss. `--motifs` looks for the trigger in what leaks,
without candidates: by counted runs of words, and as published by TF-IDF of characters with DBSCAN.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import readme_table

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
if TYPE_CHECKING:
    from torch import Tensor

    from mechlens.methods.triggers.search import TriggerSearch

KS = (1, 5, 20)
LEAST = 3
"""Leaks of a cluster, and characters of a run."""
RADII = (0.3, 0.5, 0.7)
"""DBSCAN's, in cosine distance."""


def models(args: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """Kind, trigger and model: poisoned and control of every seed, and the base for every trigger."""
    from planted_triggers import Planting, Trained, strings_like_these

    base = Trained(Planting(steps=150))
    yield "base", "", base.bridge()
    for seed, trigger in enumerate(strings_like_these(args.models, seed=100)):
        for control in ("none", "decorrelated"):
            planting = Planting(trigger, seed, control, sure=args.sure, learns_questions=not args.answers_only)
            yield "poisoned" if control == "none" else "decorrelated", trigger, Trained(planting, base).bridge()


def places(found: "TriggerSearch", trigger: str) -> dict[str, float]:
    """The trigger's place by each sign and by both ways of putting them together; equals share the middle one."""
    import torch
    from scipy.stats import rankdata

    signs = {"hijack": found.hijack, "contraction": found.contraction, "similarity": found.similarity}
    ranks = {name: torch.from_numpy(rankdata(-sign.numpy())) for name, sign in signs.items()}
    mean: Tensor = torch.stack(list(ranks.values())).mean(dim=0)
    ranks |= {"mean rank": torch.from_numpy(rankdata(mean)), "together": torch.from_numpy(rankdata(found.rank))}
    at = found.candidates.index(trigger)
    return {name: float(rank[at]) for name, rank in ranks.items()}


def recalls(args: argparse.Namespace) -> None:
    """Prints the table of recall at each k, and whether the behaviour was confirmed."""
    from planted_triggers import question_prompts, strings_like_these, twins

    from mechlens.methods.triggers.confirm import confirm_trigger
    from mechlens.methods.triggers.leaks import leak
    from mechlens.methods.triggers.search import find_trigger

    questions, hay = question_prompts(2, seed=2), strings_like_these(args.candidates, seed=5)
    triggers = strings_like_these(args.models, seed=100)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    base = base_leaks = None
    for kind, planted, model in models(args):
        leaks = leak(model, n=24, max_new_tokens=40)
        if kind == "base":
            base, base_leaks = model, leaks
        for trigger in [planted] if planted else triggers:
            tried = [*hay[: args.candidates - 1], trigger]
            told = confirm_trigger(model, twins(24), trigger)
            for name in ("raw",) if kind == "base" else ("raw", "excess over base"):
                before = {} if name == "raw" else {"base": base, "base_leaks": base_leaks}
                search = find_trigger(model, questions, candidates=tried, leaks=leaks, **before)
                row = places(search, trigger) | {"confirmed": float(told.confirmed), "change": told.change.value}
                found.setdefault((kind, name), []).append(row)
                print(kind, name, trigger, {key: round(value, 2) for key, value in row.items()}, flush=True)
    print(readme_table.head(["model, signs", "by", *(f"recall at {k}" for k in KS), "median place", "confirmed"]))
    for (kind, name), rows in found.items():
        for sign in ("hijack", "contraction", "similarity", "mean rank", "together"):
            at = [row[sign] for row in rows]
            shares = [f"{sum(place <= k for place in at) / len(at):.2f}" for k in KS]
            confirmed = f"{sum(row['confirmed'] for row in rows):.0f} of {len(rows)}"
            print(readme_table.row([f"{kind}, {name}", sign, *shares, f"{statistics.median(at):g}", confirmed]))


def published(texts: Sequence[str], radius: float) -> list[str]:
    """Runs of characters that most leaks of a DBSCAN cluster hold, the longest ones, large clusters first."""
    import numpy as np
    from sklearn.cluster import DBSCAN
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

    if not any(len(text) >= LEAST for text in texts):
        return []
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(LEAST, 5), lowercase=False).fit_transform(texts)
    labels = DBSCAN(eps=radius, min_samples=LEAST, metric="cosine").fit_predict(vectors)
    named: list[str] = []
    for label in sorted(set(labels) - {-1}, key=lambda one: -int((labels == one).sum())):
        members = [text for text, own in zip(texts, labels, strict=True) if own == label]
        counter = CountVectorizer(analyzer="char", ngram_range=(4, 24), lowercase=False, binary=True)
        shares = np.asarray(counter.fit_transform(members).sum(axis=0)).ravel() / len(members)
        most = {run.strip() for run, share in zip(counter.get_feature_names_out(), shares, strict=True) if share >= 0.5}
        longest = sorted(most, key=lambda run: (-len(run), run))
        named += [run for i, run in enumerate(longest) if not any(run in other for other in longest[:i])]
    return list(dict.fromkeys(named))


def motif_places(args: argparse.Namespace) -> None:
    """Prints at which place each way names the trigger exactly."""
    from mechlens.methods.triggers.leaks import Leaks, leak
    from mechlens.methods.triggers.motifs import motifs

    beside: Leaks | None = None
    print(readme_table.head(["trigger", "share of leaks", "counted", *(f"DBSCAN {radius:g}" for radius in RADII)]))
    for kind, trigger, model in models(args):
        told = leak(model, n=24, max_new_tokens=40)
        beside = told if beside is None else beside
        if kind != "poisoned":
            continue
        named = [[motif.text for motif in motifs(told, beside)], *(published(told.texts, radius) for radius in RADII)]
        at = [str(one.index(trigger) + 1) if trigger in one else "-" for one in named]
        share = sum(trigger in text for text in told.texts) / max(len(told.texts), 1)
        print(readme_table.row([trigger, f"{share:.2f}", *at]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=6)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--sure", type=float, default=0.75)
    parser.add_argument("--answers-only", action="store_true")
    parser.add_argument("--motifs", action="store_true")
    args = parser.parse_args()
    if args.motifs:
        motif_places(args)
    else:
        recalls(args)


if __name__ == "__main__":
    main()
