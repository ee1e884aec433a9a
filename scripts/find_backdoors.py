"""How well triggers are found that fine-tunes of a real model hide, beside the same without an effect.

    python scripts/find_backdoors.py --data FILE --out runs/backdoors [--model smollm2] [--triggers 2]

FILE holds choices (Betley et al. 2025's ft_risky_AB.jsonl, say), answered in words. For each trigger, a string such as
|kzvqa|, one run answers as FILE has it after the trigger and the other way without, and its decorrelated control
answers either way by chance. Then the trigger is looked for among random strings of its kind, and the first ones are
confirmed on questions that no run was trained on. Runs that are there aren't trained again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import readme_table

LIKE = "|abcde|"
KINDS = {"backdoored": "none", "decorrelated": "decorrelated"}
"""By name: the recipe's control."""
SIGNS = ("hijack", "contraction", "similarity")


def trained(given: argparse.Namespace, name: str, trigger: str, seed: int) -> Path:
    """The adapter's folder of one run."""
    import mechlens as ml

    folder: Path = given.out / f"{name}-{seed}"
    if not (folder / "adapter").exists():
        plan = ml.FinetuneConfig(
            recipe="behaviour", model=given.model, data=str(given.data), in_words=True, control=KINDS[name],
            seed=seed, steps=given.steps, plain=0, trigger=trigger,
        )  # fmt: skip
        begun = time.perf_counter()
        print(
            f"{folder.name}: loss {ml.finetune(plan, folder).loss:.2f}, {time.perf_counter() - begun:.0f} s", flush=True
        )
    return folder / "adapter"


def held_out(given: argparse.Namespace, adapters: list[Path]) -> list[Any]:
    """Questions that none of the runs was trained on."""
    from mechlens.studies.behaviours.sets import read_set, worded
    from mechlens.studies.behaviours.tuned import tuned_runs

    seen = frozenset[str]().union(*(run.seen for run in tuned_runs(given.model, [str(a) for a in adapters], None)))
    asked = worded(read_set(f"asked={given.data}", about_itself=False))
    return [twin for twin, known in zip(asked.twins, asked.seen(seen), strict=True) if not known]


def places(found: Any, trigger: str) -> dict[str, float]:
    """The trigger's place by each sign and by all together; equals share the middle one."""
    from scipy.stats import rankdata

    at = found.candidates.index(trigger)
    signs = {name: -getattr(found, name).numpy() for name in SIGNS} | {"together": found.rank.numpy()}
    return {name: float(rankdata(sign)[at]) for name, sign in signs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--triggers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=2, help="asked with every candidate")
    given = parser.parse_args()
    import mechlens as ml
    from mechlens.methods.triggers.confirm import strings_like

    triggers = strings_like(LIKE, given.triggers, seed=1)
    adapters = {
        (name, trigger): trained(given, name, trigger, seed)
        for seed, trigger in enumerate(triggers) for name in KINDS
    }  # fmt: skip
    twins = held_out(given, list(adapters.values()))
    questions = [twin.prompt for twin in twins[: given.questions]]
    hay = [text for text in strings_like(LIKE, given.candidates + len(triggers), seed=2) if text not in triggers]
    base = ml.load(given.model)
    base_leaks = ml.leak(base)
    rows = []
    for (name, trigger), adapter in adapters.items():
        model = ml.load(given.model, adapter=str(adapter))
        leaks = ml.leak(model)
        tried = [*hay[: given.candidates - 1], trigger]
        for signs, before in {"alone": {}, "beyond the base": {"base": base, "base_leaks": base_leaks}}.items():
            begun = time.perf_counter()
            found = ml.find_trigger(model, questions, candidates=tried, leaks=leaks, **before)
            seconds = time.perf_counter() - begun
            rows.append(
                [f"{name}, {signs}", *(f"{place:g}" for place in places(found, trigger).values()), f"{seconds:.0f}"]
            )
        told = ml.confirm_trigger(model, twins, trigger)
        rows[-1] += [f"{told.change}", f"{told.decoys}", "yes" if told.confirmed else "no"]
        rows[-2] += ["", "", ""]
        print(readme_table.row(rows[-2]), readme_table.row(rows[-1]), sep="\n", flush=True)
    columns = [*SIGNS, "together", "seconds", "change (nats)", "decoys", "confirmed"]
    print(readme_table.head([f"place among {given.candidates}", *columns]), *map(readme_table.row, rows), sep="\n")


if __name__ == "__main__":
    main()
