"""A steering controller for a packaged model beside its rivals, on real prompts.

    python scripts/steering_rivals.py --templates TEMPLATES.csv --out runs/controller [--write]

TEMPLATES.csv holds jailbreak templates with [INSERT PROMPT HERE], such as GPTFuzz' seeds (MIT). `--write` puts the
tables into mechlens/studies/controllers/README.md. A run that is there isn't made again.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import readme_table

SHORT = {"held out": "held out", "another source": "elsewhere", "in jailbreak templates": "in templates"}


def refused(run: Any) -> str:
    """Shares of refused test prompts, by rival and where they come from."""
    table = run.tables["refusals"]
    sets = [(label, place) for place in SHORT for label in ("harmful", "harmless")]
    lines = [readme_table.head(["refused", *(f"{label}, {SHORT[place]}" for label, place in sets)])]
    for name in dict.fromkeys(table["rival"]):
        own = table[table["rival"] == name].set_index(["label", "prompts"])
        cells = [_interval(own.loc[one], "refused") for one in sets if one in own.index]
        lines.append(readme_table.row([name, *cells]))
    return "\n".join(lines)


def costs(run: Any) -> str:
    """What every rival reaches in all, and what it costs."""
    lines = [
        readme_table.head(["rival", "strength", "difference", "KL", "KL, plain text", "loss, plain text", "tokens"])
    ]
    for _, row in run.tables["totals"].iterrows():
        numbers = [f"{row[name]:.2f}" for name in ("plain_kl", "plain_loss")] + [f"{row['tokens']:.1f}"]
        cells = [f"{row['strength']:g}", _interval(row, "gap"), _interval(row, "kl"), *numbers]
        lines.append(readme_table.row([row["rival"], *cells]))
    return "\n".join(lines)


def chance(run: Any) -> str:
    """Gaps by the first answer token: own layer weights, other orders, random directions."""
    lines = [readme_table.head(["layer weights", "draws", "mean", "least", "most"])]
    for name, own in run.tables["chance"].groupby("weights", sort=False)["gap"]:
        lines.append(readme_table.row([name, len(own), *(f"{one:.3f}" for one in (own.mean(), own.min(), own.max()))]))
    return "\n".join(lines)


def _interval(row: pd.Series, name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-refuser")
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import mechlens as ml

    run = ml.run(ml.SteerTrain(
        model=given.model, n=given.n, strengths=(0.005, 0.01, 0.025), max_new_tokens=12, templates=str(given.templates),
        out=given.out,
    ))  # fmt: skip
    print(run.sentence)
    readme = Path(__file__).resolve().parents[1] / "mechlens/studies/controllers/README.md"
    tables = {"refused": refused(run), "costs": costs(run), "chance": chance(run)}
    readme_table.show(__file__, tables, readme if given.write else None)


if __name__ == "__main__":
    main()
