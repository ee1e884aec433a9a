"""How often the verdict of `mechlens direction` is right on contrasts whose truth is planted.

    python scripts/error_rates_direction.py [--confounds | --effects | --folds | --pairs] [--draws 20] [--write]

Prompts and activations are drawn (`tests/planted_surface.py`), no model is run: everything from the activations on is
the study's own. `--confounds` counts false alarms about sides that are alike, `--effects` how often the interval of an
effect size holds the truth, `--folds` how far AUROCs out of fold are from those of fresh prompts, `--pairs` how often
lists that are pairs row by row are noticed. `--write` puts the tables into mechlens/studies/direction/README.md.
"""

import argparse
import collections
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import readme_table

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
if TYPE_CHECKING:
    from planted_surface import World
    from torch import Generator, Tensor

    from mechlens.methods.probing.within_folds import Folds

OUTCOMES = ("more than the surface", "no more than the surface", "inconclusive", "not read")
SIZES = (20, 40, 80)
"""Prompts of a side."""
RESAMPLES = 1000
"""Of a bootstrap that the intervals of effect sizes are compared with."""


@dataclass(frozen=True)
class Case:
    """A world by its settings, and the outcome that is true of it."""

    name: str
    settings: dict[str, float]
    right: str

    def world(self, n: int, seed: int) -> "World":
        """One draw."""
        from planted_surface import World

        return replace(World(n=n, seed=seed), **self.settings)


MORE, NO_MORE, _, NOT_READ = OUTCOMES
CASES = (
    Case("chance everywhere", {}, NOT_READ),
    Case("words only", {"words": 2.0}, NO_MORE),
    Case("words only, which tell all", {"words": 6.0}, NO_MORE),
    Case("the token at inst only", {"token": 3.0}, NO_MORE),
    Case("a system prompt on one side", {"system": True}, NO_MORE),
    Case("a weak concept", {"concept": 2.0}, MORE),
    Case("a concept, some words", {"concept": 3.0, "words": 0.5}, MORE),
    Case("a concept, the token at inst", {"concept": 3.0, "token": 3.0}, MORE),
    Case("a strong concept, many words", {"concept": 5.0, "words": 1.5}, MORE),
)


def outcome(task: tuple[Case, int, int]) -> tuple[str, int, str]:
    """The verdict on one draw."""
    from planted_surface import drawn

    from mechlens.methods.statistics.resample import one_thread

    case, n, seed = task
    with one_thread():
        return case.name, n, drawn(case.world(n, seed)).verdict().outcome


def alarms(task: tuple[int, int]) -> tuple[int, tuple[str, ...]]:
    """What is called telling of sides that are drawn alike."""
    from planted_surface import World, drawn

    n, seed = task
    return n, tuple(one.name for one in drawn(World(n=n, seed=seed)).confounds() if one.telling)


def held(task: tuple[int, float, bool, int]) -> tuple[float, float]:
    """Share of the intervals of an effect size that hold the true one, and of percentile bootstraps over families."""
    import torch

    from mechlens.methods.statistics.effect_size import effect_estimate, hedges_g
    from mechlens.methods.statistics.resample import family_weights, interval

    n, distance, paired, draws = task
    generator = torch.Generator().manual_seed(n)
    positive = torch.tensor([True, False]).repeat(n)
    families = [str(i // 2 if paired else i) for i in range(2 * n)]
    labels = ["positive", "negative"] * n
    found = []
    for seed in range(draws):
        shared = torch.randn(n, generator=generator).repeat_interleave(2) * (0.5**0.5 if paired else 0.0)
        own = torch.randn(2 * n, generator=generator) * (0.5**0.5 if paired else 1.0)
        scores = shared + own + distance * positive
        ours = effect_estimate(scores, positive, families)
        theirs = interval(hedges_g(scores, positive, family_weights(families, RESAMPLES, seed, labels)))
        found.append([float(one.low) <= distance <= float(one.high) for one in (ours, theirs)])
    one, other = (sum(held) / draws for held in zip(*found, strict=True))
    return one, other


FRESH = 2000
"""Prompts of a side that nothing is fitted to."""
READINGS = ("two tokens", "a token and words", "words", "512 dimensions", "512 dimensions, in pairs")


def readings(name: str, n: int, generator: "Generator") -> list[Any]:
    """Two things to read of all prompts, vectors or texts: a token that tells as much as .80, alone or among words."""
    import torch

    positive = torch.arange(2 * (n + FRESH)) % 2 == 0
    if name.startswith("512"):
        drawn = torch.randn(2, len(positive), 512, generator=generator)
        if name.endswith("in pairs"):
            shared = torch.randn(2, len(positive) // 2, 512, generator=generator).repeat_interleave(2, dim=1)
            drawn = 0.5**0.5 * (drawn + shared)
        drawn[:, positive, 0] += 6.0
        return list(drawn)
    marks = torch.rand(2, len(positive), generator=generator) < torch.where(positive, 0.8, 0.2)
    others = torch.randint(100, (2, len(positive), 10), generator=generator)
    vectors = torch.randn(2, 24, generator=generator)[marks.long()]
    texts = [
        [" ".join([f"m{int(mark)}", *(f"w{word}" for word in row)]) for mark, row in zip(own, words, strict=True)]
        for own, words in zip(marks, others.tolist(), strict=True)
    ]
    return {"two tokens": list(vectors), "a token and words": [vectors[0], texts[1]], "words": texts}[name]


def fold_errors(task: tuple[str, int, int]) -> list[float]:
    """The AUROC on fresh prompts of fits in the study's folds; then five numbers inside these, and pooled over ten.

    The error of the AUROC and whether its interval holds that on fresh prompts; the same of the gain over the other
    reading, and whether all of its interval is above.
    """
    import torch

    from mechlens.methods.probing.within_folds import Folds, auroc_gain, folds_of, mean_auroc
    from mechlens.methods.statistics.resample import Fold, folds_of_both, one_thread

    name, n, seed = task
    generator = torch.Generator().manual_seed(seed)
    positive, families = torch.arange(2 * n) % 2 == 0, [str(i) for i in range(2 * n)]
    if name.endswith("in pairs"):
        families = [str(i // 2) for i in range(2 * n)]
    both, found = readings(name, n, generator), []
    inside = folds_of(positive, families, seed)
    ten = Folds(positive, tuple(families), tuple(folds_of_both(positive, families, 10, seed + k) for k in range(3)))
    pooled = Folds(positive, tuple(families), ((Fold((), tuple(range(2 * n))),),))
    with one_thread():
        for folds, counted in ((inside, inside), (ten, pooled)):
            (one, truth), (other, another) = (read_out_of_fold(own, folds) for own in both)
            area, gain = mean_auroc(one, counted), auroc_gain(one, other, counted)
            found += [truth] if folds is inside else []
            beyond = truth - another
            found += [area.value - truth, area.low <= truth <= area.high]
            found += [gain.value - beyond, gain.low <= beyond <= gain.high, gain.low > beyond]
    return [float(value) for value in found]


def read_out_of_fold(values: Any, folds: "Folds") -> tuple["Tensor", float]:
    """Scores out of fold, from half way between the classes, and the fits' mean AUROC on fresh prompts.

    The fits of the first division into folds will do: those of the others are of the same prompts.
    """
    import torch

    from mechlens.methods.directions.methods import logistic_line
    from mechlens.methods.probing.auroc import auroc
    from mechlens.methods.probing.baselines import tfidf_scores
    from mechlens.methods.probing.beyond_words import PENALTY

    n, areas = len(folds.positive), []
    fresh = torch.arange(len(values) - n) % 2 == 0

    def read(fit: list[int], _: int) -> "Tensor":
        own = values if len(areas) < len(folds.parts[0]) else values[:n]
        if isinstance(values, list):
            scores = tfidf_scores([values[i] for i in fit], folds.positive[fit], own)
        else:
            scores = own.double() @ logistic_line(values[fit], folds.positive[fit], penalty=PENALTY)[0]
        if len(scores) > n:
            areas.append(float(auroc(scores[n:], fresh)))
        return scores[:n] - folds.middle(scores[:n], fit)

    return folds.scored(read), sum(areas) / len(areas)


def verdict_table(pool: ProcessPoolExecutor, draws: int) -> str:
    """How often each outcome is reached; the right one in bold."""
    tasks = [(case, n, seed) for case in CASES for n in SIZES for seed in range(draws)]
    counts: collections.Counter[tuple[str, int, str]] = collections.Counter(pool.map(outcome, tasks, chunksize=4))
    lines = [readme_table.head(["world", "prompts a side", *OUTCOMES])]
    for case in CASES:
        for n in SIZES:
            shares = [f"{counts[case.name, n, name] / draws:.0%}" for name in OUTCOMES]
            marked = [
                f"**{share}**" if name == case.right else share for name, share in zip(OUTCOMES, shares, strict=True)
            ]
            lines.append(readme_table.row([case.name, n, *marked]))
    return "\n".join(lines)


def alarm_table(pool: ProcessPoolExecutor, draws: int) -> str:
    """Share of alike sides about which something is said, and what."""
    lines = [readme_table.head(["prompts a side", "any", "length", "opening", "ending"])]
    for n in SIZES:
        found = [names for _, names in pool.map(alarms, [(n, 1000 + seed) for seed in range(draws)], chunksize=8)]
        shares = [sum(name in names for names in found) / draws for name in ("length", "opening", "ending")]
        any_of = sum(bool(names) for names in found) / draws
        lines.append(readme_table.row([n, *(f"{share:.1%}" for share in (any_of, *shares))]))
    return "\n".join(lines)


def effect_table(pool: ProcessPoolExecutor, draws: int) -> str:
    """Share of intervals that hold the true effect, of prompts alone and in pairs, and the same of bootstraps."""
    lines = [
        readme_table.head(["prompts a side", "effect", "alone", "in pairs", "bootstrap, alone", "bootstrap, in pairs"])
    ]
    for n in (10, 15, 25, 50):
        for distance in (0.0, 1.0, 3.0):
            both = list(pool.map(held, [(n, distance, paired, draws) for paired in (False, True)]))
            shares = [f"{found[way]:.1%}" for way in range(2) for found in both]
            lines.append(readme_table.row([n, distance, *shares]))
    return "\n".join(lines)


def fold_table(pool: ProcessPoolExecutor, draws: int) -> str:
    """Inside folds and pooled over them: how far from the truth, how often its interval holds it, and who is ahead."""
    each = ["error", "held", "error of the gain", "held", "above"]
    lines = [readme_table.head(["what is read", "prompts a side", "AUROC", *each, *each])]
    for name in READINGS:
        for n in SIZES:
            found = list(pool.map(fold_errors, [(name, n, seed) for seed in range(draws)]))
            truth, *means = [sum(values) / draws for values in zip(*found, strict=True)]
            said = [f"{mean:+.3f}" if k % 5 in (0, 2) else f"{mean:.1%}" for k, mean in enumerate(means)]
            lines.append(readme_table.row([name, n, f"{truth:.2f}", *said]))
            print(lines[-1], flush=True)
    return "\n".join(lines)


def warned(task: tuple[str, int, int]) -> bool:
    """Whether the lists of one draw are said to look like pairs."""
    import random
    import warnings

    from planted_pairs import WORLDS

    from mechlens.studies.shared.likely_pairs import warn_of_twins

    name, n, seed = task
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_twins(*WORLDS[name][1](random.Random(seed), n))
    return bool(said)


def pair_table(pool: ProcessPoolExecutor, draws: int) -> str:
    """Share of draws that are called likely pairs, where rows are and where they aren't."""
    from planted_pairs import WORLDS

    lines = [readme_table.head(["lists", *(f"{n} prompts a side" for n in SIZES)])]
    for name in WORLDS:
        told = [list(pool.map(warned, [(name, n, seed) for seed in range(draws)], chunksize=8)) for n in SIZES]
        lines.append(readme_table.row([name, *(f"{sum(said) / draws:.1%}" for said in told)]))
    return "\n".join(lines)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--confounds", action="store_true")
    parser.add_argument("--effects", action="store_true")
    parser.add_argument("--folds", action="store_true")
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs) as pool:
        if args.confounds:
            label, table = "confounds", alarm_table(pool, 10 * args.draws)
        elif args.effects:
            label, table = "effects", effect_table(pool, 25 * args.draws)
        elif args.folds:
            label, table = "folds", fold_table(pool, 10 * args.draws)
        elif args.pairs:
            label, table = "pairs", pair_table(pool, 10 * args.draws)
        else:
            label, table = "verdicts", verdict_table(pool, args.draws)
    print(table)
    if args.write:
        readme_table.write(__file__, label, table)


if __name__ == "__main__":
    main()
