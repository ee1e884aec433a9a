"""How often the verdict of `mechlens direction` is right on contrasts whose truth is planted.

    python scripts/error_rates_direction.py [--draws 20] [--jobs 2] [--confounds] [--effects] [--write]

Prompts and activations are drawn (`tests/planted_surface.py`), no model is run: everything from the activations on is
the study's own. `--confounds` counts false alarms about sides that are alike, `--effects` how often the interval of an
effect size holds the truth. `--write` puts the tables into mechlens/studies/direction/README.md.
"""

import argparse
import collections
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import readme_table

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
if TYPE_CHECKING:
    from planted_surface import World

OUTCOMES = ("more than the surface", "no more than the surface", "inconclusive", "not read")
SIZES = (20, 40, 80)
"""Prompts of a side."""


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


def held(task: tuple[int, float, bool, int]) -> list[bool]:
    """Whether the interval of an effect size holds the true one, in many draws."""
    import torch

    from mechlens.methods.statistics.effect_size import effect_estimate

    n, distance, paired, draws = task
    generator = torch.Generator().manual_seed(n)
    positive = torch.tensor([True, False]).repeat(n)
    families = [str(i // 2 if paired else i) for i in range(2 * n)]
    found = []
    for _ in range(draws):
        shared = torch.randn(n, generator=generator).repeat_interleave(2) * (0.5**0.5 if paired else 0.0)
        own = torch.randn(2 * n, generator=generator) * (0.5**0.5 if paired else 1.0)
        estimate = effect_estimate(shared + own + distance * positive, positive, families)
        found.append(estimate.low <= distance <= estimate.high)
    return found


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
    """Share of intervals that hold the true effect."""
    lines = [readme_table.head(["prompts a side", "effect", "alone", "in pairs"])]
    for n in (10, 15, 25, 50):
        for distance in (0.0, 1.0, 3.0):
            both = pool.map(held, [(n, distance, paired, draws) for paired in (False, True)])
            lines.append(readme_table.row([n, distance, *(f"{sum(own) / draws:.1%}" for own in both)]))
    return "\n".join(lines)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--confounds", action="store_true")
    parser.add_argument("--effects", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs) as pool:
        if args.confounds:
            label, table = "confounds", alarm_table(pool, 10 * args.draws)
        elif args.effects:
            label, table = "effects", effect_table(pool, 25 * args.draws)
        else:
            label, table = "verdicts", verdict_table(pool, args.draws)
    print(table)
    if args.write:
        readme_table.write(__file__, label, table)


if __name__ == "__main__":
    main()
