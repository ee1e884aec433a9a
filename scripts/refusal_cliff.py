"""A small reasoner and its cliff: trained, its traces scored, its heads switched off.

    python scripts/refusal_cliff.py --data STAR-1.json --out runs/reasoner [--n 224] [--write]

STAR-1.json holds reasoning traces (Wang et al. 2025, Apache-2.0). The reasoner is trained by `finetune --recipe
reasoner` in bfloat16 products, unless it is there; it then thinks about held-out requests of the same file and about
the built-in benign ones, and `mechlens cliff` reads that. `--write` puts the tables into the study's README.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import readme_table


def by_group(cliffs: pd.DataFrame) -> str:
    """Means over test traces by what was asked and what the model did."""
    from mechlens.studies.cliff.report import GROUPS

    numbers = ["plateau", "final", "drop"]
    names = [f"{line}_{number}" for line in ("refusal", "harm") for number in numbers]
    lines = [readme_table.head(["test traces", "n", *(name.replace("_", ", ") for name in names)])]
    for group, word in GROUPS.items():
        own = cliffs[cliffs["group"] == group]
        lines.append(readme_table.row([word, len(own), *(f"{own[name].mean():.2f}" for name in names)]))
    return "\n".join(lines)


def heads(table: pd.DataFrame) -> str:
    """Harmful test traces without some heads."""
    lines = [
        readme_table.head(["heads off", "heads", "refusal before the answer", "answers that refuse", "plain text"])
    ]
    for _, row in table.iterrows():
        what = "none" if row["heads"] == "none" else f"most {row['heads']}" if row["heads"] != "random" else "random"
        cells = [f"{row['share']:.0%} {what}" if row["share"] else what, row["n_heads"]]
        for name in ("score", "refused"):
            cells.append(f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]")
        lines.append(readme_table.row([*cells, f"{row['plain_loss']:.2f}"]))
    return "\n".join(lines)


def numbers(run: Any) -> str:
    """What decided, and the controls, in words."""
    from mechlens.studies.cliff.report import WORDS

    lines = [readme_table.head(["number", "value"])]
    for name, told in run.record.metrics.items():
        if not name.startswith("n."):
            lines.append(readme_table.row([WORDS[name], told.brief]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=224)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import mechlens as ml

    folder = given.out / "reasoner"
    if not (folder / "adapter").exists():
        plan = ml.Finetune(recipe="reasoner", model="smollm2", data=str(given.data), precision="bfloat16", out=folder)
        ml.run(plan)
    run = ml.run(ml.FindCliff(
        model="smollm2", adapter=str(folder / "adapter"), harmful=str(given.data), harmless="benign", n=given.n,
        thinking_tokens=160, resamples=500, out=given.out / "cliff",
    ))  # fmt: skip
    print(run.sentence)
    tables = {
        "groups": by_group(run.tables["cliffs"]), "numbers": numbers(run), "heads": heads(run.tables["ablation"])
    }  # fmt: skip
    readme = Path(__file__).resolve().parents[1] / "mechlens/studies/cliff/README.md"
    readme_table.show(__file__, tables, readme if given.write else None)


if __name__ == "__main__":
    main()
