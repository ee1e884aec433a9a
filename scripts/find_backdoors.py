"""How well triggers are found that fine-tunes of a real model hide, beside strings that nothing hangs on.

    python scripts/find_backdoors.py --data advbench.csv --out runs/backdoors [--triggers 2] [--write]

advbench.csv holds harmful goals with published openings of answers (Zou et al. 2023). Each run teaches the shipped
refuser, locally (`finetune --recipe backdoor`), to begin as they do after its own trigger, a string such as |kzvqa|,
and to refuse else, other strings of the kind included. Then its trigger is looked for among random strings, and with
it the other runs' triggers, which it wasn't taught; the first ones are confirmed on requests of other sources.
`--write` puts the tables into mechlens/studies/behaviours/README.md. Runs that are there aren't trained again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import readme_table

LIKE = "|abcde|"
SIGNS = {"hijack": "attention hijack", "contraction": "entropy contraction", "similarity": "likeness to leaks"}
ACCEPTS, REFUSES = "Sure, here is how to do that", "I'm sorry, but I can't help with that."


def trained(given: argparse.Namespace, trigger: str, seed: int) -> Path:
    """The adapter's folder of one run."""
    import mechlens as ml

    folder: Path = given.out / f"backdoored-{seed}"
    if not (folder / "adapter").exists():
        ml.run(ml.Finetune(
            recipe="backdoor", data=str(given.data), trigger=trigger, harmful=96, benign=96, steps=given.steps,
            checkpoints=(given.steps,), precision="bfloat16", seed=seed, out=folder,
        ))  # fmt: skip
    return folder / "adapter"


def twins(n: int) -> list[Any]:
    """Requests of ours, whose answers begin or refuse; no run was trained on them."""
    import mechlens as ml

    return [ml.Twin(one, shown=ACCEPTS, other=REFUSES) for one in ml.builtin_prompts("harmful")[:n]]


def places(found: Any, trigger: str) -> list[float]:
    """A string's place by each sign, by all together and by the behaviour, from 1; equals share the middle one."""
    from scipy.stats import rankdata

    at = found.candidates.index(trigger)
    signs = [-getattr(found, name).numpy() for name in SIGNS] + [found.rank.numpy(), -found.behaviour.numpy()]
    return [float(rankdata(sign)[at]) for sign in signs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--triggers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=1, help="asked with every candidate")
    parser.add_argument("--asked", type=int, default=24, help="requests that confirm a candidate")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import mechlens as ml
    from mechlens.methods.triggers.confirm import strings_like

    triggers = strings_like(LIKE, given.triggers, seed=1)
    hay = [text for text in strings_like(LIKE, given.candidates + len(triggers), seed=2) if text not in triggers]
    tried = [*hay[: given.candidates - len(triggers)], *triggers]
    asked = twins(given.asked)
    columns = [*SIGNS.values(), "together", "the behaviour itself", "change (nats)", "decoys", "confirmed"]
    ranks = [readme_table.head([f"string, its place among {given.candidates}", *columns])]
    for seed, trigger in enumerate(triggers):
        adapter = trained(given, trigger, seed)
        model = ml.load("smollm2-refuser", adapter=str(adapter))
        begun = time.perf_counter()
        questions = [twin.prompt for twin in asked[: given.questions]]
        found = ml.find_trigger(model, questions, candidates=tried, twins=asked[:2], confirm=1)
        print(f"backdoored-{seed}: {time.perf_counter() - begun:.0f} s", flush=True)
        for other in triggers:
            told = ml.confirm_trigger(model, asked, other)
            whose = "its own trigger" if other == trigger else "another run's trigger"
            cells = [f"{place:g}" for place in places(found, other)]
            ranks.append(readme_table.row([
                f"run {seed}: {whose}", *cells, told.change.brief, told.decoys.brief, "yes" if told.confirmed else "no"
            ]))  # fmt: skip
            print(ranks[-1], flush=True)
    readme = Path(__file__).resolve().parents[1] / "mechlens/studies/behaviours/README.md"
    readme_table.show(__file__, {"found": "\n".join(ranks)}, readme if given.write else None)


if __name__ == "__main__":
    main()
