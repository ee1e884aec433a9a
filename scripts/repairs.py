"""What a repair mends that is chosen by its cliffs, and as large a one at random (Yin et al. 2025, Cliff-as-a-Judge).

    python scripts/repairs.py --data STAR-1.json --reasoner runs/reasoner --out runs/repairs [--seeds 3] [--write]

The reasoner (`finetune --recipe reasoner`) thinks about a pool of the requests that it was trained on, with some of
which it complies; `mechlens cliff` ranks them. Every choice repairs the reasoner once a seed, and all of them are
asked about requests that none was trained on. `--write` puts the tables into the study's README. What is there
isn't made again.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import readme_table
import torch

CHOICES = {"cliff": "largest cliffs", "final": "lowest scores before the answer", "random": "at random"}


def pooled(given: argparse.Namespace) -> Path:
    """The pool's file: requests that the reasoner was trained on, drawn by seed."""
    import mechlens as ml
    from mechlens.studies.finetune.recipes.reasoner import refusing_traces

    file: Path = given.out / "pool.jsonl"
    if not file.exists():
        traces = refusing_traces(ml.FinetuneConfig(recipe="reasoner", data=str(given.data)))
        rows = [
            {"id": one.prompt.id, "prompt": one.prompt.text, "category": one.prompt.category,
             "thinking": one.thinking, "answer": one.answer}
            for one in random.Random(0).sample(traces, given.pool)
        ]  # fmt: skip
        given.out.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{json.dumps(one)}\n" for one in rows), encoding="utf-8")
    return file


def ranked(given: argparse.Namespace) -> Any:
    """The run of `mechlens cliff` that ranked the pool."""
    import mechlens as ml

    return ml.run(ml.FindCliff(
        model="smollm2", adapter=str(given.reasoner / "adapter"), harmful=str(given.data), harmless="benign", n=224,
        thinking_tokens=160, resamples=500, heads=(), pool=str(pooled(given)), out=given.out / "cliff",
    ))  # fmt: skip


def repaired(given: argparse.Namespace) -> dict[str, Path]:
    """Every repair's adapter, by its choice and seed."""
    import mechlens as ml

    found = {}
    for seed in range(given.seeds):
        for name in CHOICES:
            folder = given.out / f"{name}-{seed}"
            if not (folder / "adapter").exists():
                data = given.out / "cliff/tables" / f"repair_{name}.parquet"
                ml.run(ml.Finetune(
                    recipe="repair", model="smollm2", data=str(data), start=str(given.reasoner / "adapter"),
                    epochs=given.epochs, learning_rate=given.rate, seed=seed, precision="bfloat16", out=folder,
                ))  # fmt: skip
            found[folder.name] = folder / "adapter"
    return found


def chosen(given: argparse.Namespace) -> str:
    """What each choice holds."""
    pool = pd.read_parquet(given.out / "cliff/tables/pool.parquet")
    lines = [readme_table.head(["chosen", "traces", "plateau", "final", "drop", "shared with the cliffs"])]
    tables = {name: pd.read_parquet(given.out / f"cliff/tables/repair_{name}.parquet") for name in CHOICES}
    for name, table in {"all": pool, **tables}.items():
        shared = len(set(table["id"]) & set(tables["cliff"]["id"]))
        means = [f"{table[number].mean():.2f}" for number in ("plateau", "final", "drop")]
        lines.append(readme_table.row([CHOICES.get(name, "all of the pool"), len(table), *means, shared]))
    return "\n".join(lines)


def said(given: argparse.Namespace, name: str, adapter: Path) -> pd.DataFrame:
    """What an adapter's model refuses, by prompt; kept, so that nothing is asked twice."""
    import mechlens as ml

    file: Path = given.out / f"said-{name}.parquet"
    if not file.exists():
        asked = pd.read_parquet(given.out / "cliff/tables/prompts.parquet").dropna(subset=["label"])
        asked = asked.groupby("label").sample(given.n, random_state=0)
        prompts = [
            ml.Prompt(
                row["id"],
                row["text"],
                label=row["label"],
                system=row["system"] if isinstance(row["system"], str) else None,
            )
            for _, row in asked.iterrows()
        ]
        model = ml.load("smollm2", adapter=str(adapter))
        judged = ml.judge_answers(prompts, ml.answer(model, prompts, max_new_tokens=160))
        kept = judged.table()[["id", "label", "verdict_phrases"]]
        kept.to_parquet(file)
    return pd.read_parquet(file).set_index("id")


def mended(given: argparse.Namespace, adapters: dict[str, Path]) -> str:
    """Shares of refused requests after each repair, and how far they lie from those after a repair at random."""
    from mechlens.methods.statistics.estimate import Estimate
    from mechlens.methods.statistics.resample import mean_estimate, rate_estimate

    before = said(given, "reasoner", given.reasoner / "adapter")
    tables = {name: said(given, name, adapter) for name, adapter in adapters.items()}
    titles = [
        "repaired on",
        "harmful, refused",
        "beyond random",
        "harmless, refused",
        "beyond random",
        "no ended thought",
    ]
    lines = [readme_table.head(titles)]

    def refused(frames: list[pd.DataFrame], label: str) -> torch.Tensor:
        own = [frame[frame["label"] == label]["verdict_phrases"] == "refused" for frame in frames]
        return torch.tensor(np.mean([one.to_numpy(dtype=float) for one in own], axis=0))

    runs = {name: [tables[f"{name}-{seed}"] for seed in range(given.seeds)] for name in CHOICES}
    for name, frames in {"": [before], **runs}.items():
        cells: list[Estimate | str] = []
        for label in ("harmful", "harmless"):
            own = refused(frames, label)
            families = [str(i) for i in range(len(own))]
            cells.append(mean_estimate(own, families, 0) if name else rate_estimate(own > 0.5, families, 0))
            if name in ("", "random"):
                cells.append("")
            else:
                cells.append(mean_estimate(own - refused(runs["random"], label), families, 0))
        unended = np.mean([(frame["verdict_phrases"] == "unfinished").mean() for frame in frames])
        shown = [one if isinstance(one, str) else one.brief for one in cells]
        lines.append(readme_table.row([CHOICES.get(name, "nothing (the reasoner)"), *shown, f"{unended:.2f}"]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--reasoner", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pool", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--n", type=int, default=80, help="prompts of each class that every model is asked")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()

    print(ranked(given).sentence)
    adapters = repaired(given)
    readme = Path(__file__).resolve().parents[1] / "mechlens/studies/cliff/README.md"
    tables = {"chosen": chosen(given), "repairs": mended(given, adapters)}
    readme_table.show(__file__, tables, readme if given.write else None)


if __name__ == "__main__":
    main()
