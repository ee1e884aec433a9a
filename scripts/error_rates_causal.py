"""How often the verdict of `mechlens causal` is right on read-outs whose truth is known.

    python scripts/error_rates_causal.py [--draws 400] [--jobs 2] [--write]

Only the numbers that enter the rule are drawn, no model is run: what each direction changes in each prompt's two
replies and in its refusal, and what random directions change. `--write` puts the tables into
mechlens/studies/causal/README.md.
"""

import argparse
import collections
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import readme_table

os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = ("dissociation shown", "inconclusive", "dissociation not shown")
HARM, REFUSAL = "harmfulness", "refusal"
Belief = Mapping[tuple[str, str], float]
"""What a direction does to belief, by operation and class, in the sense that its name promises."""


def belief(pushes: float, neglected: float) -> Belief:
    """The same in both pushes, and the same in both cells that these leave out."""
    return {
        ("add", "harmless"): pushes, ("subtract", "harmful"): pushes,
        ("add", "harmful"): neglected, ("subtract", "harmless"): neglected,
    }  # fmt: skip


@dataclass(frozen=True)
class World:
    """Mean changes; 1 is what the harmfulness direction's push does to belief, and refusal's to refusal, if they do."""

    name: str
    right: str
    """The right verdict."""
    harm: Belief
    refusal: Belief
    harm_says_yes: float = 0.0
    """What the harmfulness direction adds to both replies alike."""
    one_sided: bool = False
    """The harmfulness direction changes the straight reply alone."""
    refuses: float = 1.0
    """What the refusal direction does to refusal."""
    chance: bool = False
    """Both directions are drawn as random ones are."""


ACTS, NOTHING = belief(1.0, 0.5), belief(0.0, 0.0)
SHOWN, INCONCLUSIVE, NOT_SHOWN = WORDS
WORLDS = (
    World("dissociation", SHOWN, ACTS, NOTHING),
    World("dissociation, refusal does a quarter to belief", SHOWN, ACTS, belief(0.25, 0.25)),
    World("refusal does half to belief, the margin", INCONCLUSIVE, ACTS, belief(0.5, 0.5)),
    World("one variable: refusal does as much", NOT_SHOWN, ACTS, ACTS),
    World("refusal reverses in the neglected cells", NOT_SHOWN, ACTS, belief(0.0, -1.0)),
    World("refusal reverses in one neglected cell", NOT_SHOWN, ACTS, {**NOTHING, ("subtract", "harmless"): -1.0}),
    World("harmfulness says yes to everything", NOT_SHOWN, NOTHING, NOTHING, harm_says_yes=1.0),
    World("harmfulness moves one question only", NOT_SHOWN, ACTS, NOTHING, one_sided=True),
    World("refusal doesn't change refusal", NOT_SHOWN, ACTS, NOTHING, refuses=0.0),
    World("chance: both are random directions", NOT_SHOWN, NOTHING, NOTHING, chance=True),
)
DIRECTIONS_SPREAD = 0.2
"""Standard deviation over random directions of what they change, in these units; over prompts it is the noise."""


def verdict_in(world: World, n: int, noise: float, seed: int) -> str:
    """The verdict in one draw, by the study's own functions from the changes on."""
    import numpy as np
    import torch

    from mechlens.prompts.batch import TokenBatch
    from mechlens.prompts.prompt import Prompt
    from mechlens.studies.causal.config import CausalPlan
    from mechlens.studies.causal.held_out import cell_effects
    from mechlens.studies.causal.readings import Replies, Subjects
    from mechlens.studies.causal.verdict import decide

    draw = np.random.default_rng(seed)
    plan = CausalPlan(seed=seed, resamples=300)
    prompts = [
        Prompt(f"{label}{i}", "", label=label, family=f"pair{i}") for label in ("harmful", "harmless") for i in range(n)
    ]
    labels = [prompt.label for prompt in prompts]
    few = [*range(plan.n_null), *range(n, n + plan.n_null)]

    def who(rows: list[int]) -> Subjects:
        return Subjects(tuple(prompts[i] for i in rows), cast(TokenBatch, None), {})

    def replies(means: Any, agree: Any, one_sided: bool, rows: int) -> dict[str, torch.Tensor]:
        """Both replies' changes around the mean change of belief and of agreement."""
        pair = draw.normal(0, noise * 0.5, (len(means), n))
        shared = np.concatenate([pair, pair], axis=1)[:, :rows]
        straight = means + agree + shared + draw.normal(0, noise, (len(means), rows))
        reversed_ = (0.0 if one_sided else -means) + agree - shared + draw.normal(0, noise, (len(means), rows))
        found = Replies(torch.from_numpy(straight), torch.from_numpy(reversed_))
        return {"belief": found.belief, "consistent": found.consistent}

    def random(k: int, rows: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        size, agree = (draw.normal(0, DIRECTIONS_SPREAD, (k, 1)) for _ in range(2))
        refusal = draw.normal(0, DIRECTIONS_SPREAD, (k, 1)) + draw.normal(0, noise, (k, rows))
        return replies(np.broadcast_to(size, (k, rows)), agree, False, rows), torch.from_numpy(refusal)

    effects = {}
    everyone = list(range(2 * n))
    for at in (HARM, REFUSAL):
        changes: dict[str, list[torch.Tensor]] = collections.defaultdict(list)
        for name in (HARM, REFUSAL):
            size, incidental, agrees = draw.normal(0, DIRECTIONS_SPREAD / (1 if world.chance else 4), 3)
            for operation, sign in (("add", 1.0), ("subtract", -1.0)):
                truth = world.harm if name == HARM else world.refusal
                means = np.array([[sign * (truth[operation, label] + size) for label in labels]])
                agree = sign * (agrees + (world.harm_says_yes if name == HARM else -1.0 if not world.chance else 0.0))
                for scope in ("before", "all"):
                    moved = replies(means, agree, world.one_sided and name == HARM, 2 * n)
                    for measure, values in moved.items():
                        changes[f"{measure}.{scope}"].append(values[0])
                does = 0.0 if world.chance else 0.3 if name == HARM else world.refuses
                refusal = sign * (does + incidental) + draw.normal(0, noise, 2 * n)
                changes["refusal"].append(torch.from_numpy(refusal))
        null, refusal_null = random(plan.random_directions, len(few))
        null_all, _ = random(plan.random_directions, len(few))
        shuffled, refusal_shuffled = random(plan.shuffled_directions, len(few))
        claim = {"consistent.before": shuffled["consistent"]} if at == HARM else {"refusal": refusal_shuffled}
        nulls = {"refusal": refusal_null}
        for scope, drawn in (("before", null), ("all", null_all)):
            nulls |= {f"{measure}.{scope}": values for measure, values in drawn.items()}
        effects |= cell_effects(
            who(everyone), who(few), (HARM, REFUSAL), at,
            {measure: torch.stack(values) for measure, values in changes.items()},
            nulls, claim, plan,
        )  # fmt: skip
    return decide(effects).word


def row(world: World, n: int, noise: float, draws: int) -> str:
    """A line of the table; the right verdict's share in bold."""
    tally = collections.Counter(verdict_in(world, n, noise, seed) for seed in range(draws))
    shares = [f"**{tally[w] / draws:.0%}**" if w == world.right else f"{tally[w] / draws:.0%}" for w in WORDS]
    return readme_table.row([world.name, n, f"{noise:g}", *shares])


def measurable(n: int, auroc: float, draws: int) -> str:
    """How often belief is called measurable where the unsteered read-out has this AUROC."""
    import torch
    from scipy.stats import norm

    from mechlens.methods.probing.auroc import auroc_estimate
    from mechlens.studies.causal.unsteered import MIN_AUROC

    generator = torch.Generator().manual_seed(n)
    positive, families = torch.arange(2 * n) < n, [f"pair{i}" for i in (*range(n), *range(n))]
    shift = float(norm.ppf(auroc)) * 2**0.5
    hits = 0
    for _ in range(draws):
        scores = torch.randn(2 * n, generator=generator, dtype=torch.float64) + shift * positive
        hits += auroc_estimate(scores, positive, families).low > MIN_AUROC
    return f"{hits / draws:.0%}"


def tables(draws: int, jobs: int) -> str:
    """Both tables in Markdown."""
    cells = [(world, n, noise) for world in WORLDS for n, noise in ((16, 0.4), (32, 0.4), (32, 0.8), (64, 0.8))]
    with ProcessPoolExecutor(jobs) as pool:
        rows = list(pool.map(row, *zip(*cells, strict=True), [draws] * len(cells)))
    first = [readme_table.head(["world", "n", "noise", "shown", "inconclusive", "not shown"]), *rows]
    levels, sizes = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9), (16, 32, 64)
    second = [readme_table.head(["true AUROC", *(f"n = {n}" for n in sizes)])]
    second += [readme_table.row([a, *(measurable(n, a, draws) for n in sizes)]) for a in levels]
    return "\n".join([*first, "", "Belief is called measurable:", "", *second])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found = tables(args.draws, args.jobs)
    print(found)
    if args.write:
        readme_table.write(__file__, "verdicts", found)


if __name__ == "__main__":
    main()
