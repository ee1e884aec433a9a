"""Attention sinks in packaged models, for the tables in mechlens/studies/sinks/README.md.

    python scripts/attention_sinks.py --out runs/sinks [--models smollm2 smollm2-refuser ...] [--write]

Runs `mechlens sinks` on each model that has no finished run in the folder: chat models with their template and
requests, gemma3-270m, a base model, on raw prose and code. A few minutes each on one CPU core.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import readme_table

MODELS = ("smollm2", "smollm2-refuser", "gemma3-270m", "qwen2.5-coder-0.5b")
BASE = ("gemma3-270m",)
"""Models without a chat template."""
SMALL: dict[str, Any] = {
    "texts": 10, "tokens": 32, "heads": 1, "random_heads": 3, "random_sets": 1, "shuffles": 99, "n": 16,
    "max_new_tokens": 16, "resamples": 500,
}  # fmt: skip
"""Far below the study's defaults, as notebook 10 has them, so that a model takes minutes of one core."""
MEASURES = ("mass", "first", "rate", "value", "peak", "massive", "largest")


def numbers(runs: dict[str, Any]) -> str:
    """A row a model and kind of text."""
    lines = [readme_table.head(["model", "texts", "sinks", *MEASURES, "largest dimensions"])]
    for name, run in runs.items():
        measures, sinks, massive = (run.tables[one] for one in ("measures", "sinks", "massive"))
        for domain in dict.fromkeys(measures["domain"]):
            whole = measures[measures["domain"] == domain].set_index("measure")
            own = whole["value"]
            places = sinks[sinks["domain"] == domain].groupby("first_place", sort=False)["texts"].sum()
            where = ", ".join(_place(int(place), share) for place, share in places.items() if share >= 0.1)
            big = massive[massive["domain"] == domain].head(2)
            told = ", ".join(f"{row['dimension']} ({row['value']:.0f})" for _, row in big.iterrows())
            cells = [_brief(whole.loc["mass"], "value", "low", "high")]
            cells += [f"{own[one]:.2f}" if own[one] < 10 else f"{own[one]:.0f}" for one in MEASURES[1:]]
            lines.append(readme_table.row([f"`{name}`", domain, where or "none", *cells, told]))
    return "\n".join(lines)


def _place(place: int, share: float) -> str:
    return f"{place}" if share > 0.95 else f"{place} ({share:.0%})"


def verdicts(runs: dict[str, Any]) -> str:
    """What each run says."""
    return "\n".join(f"- `{name}`: {run.sentence}" for name, run in runs.items())


def positions(runs: dict[str, Any]) -> str:
    """Named positions of every chat model."""
    columns = ["attention of the answer", "even", "heads above 0.3", "AUROC harmful", "AUROC refused", "hidden: gap"]
    lines = [readme_table.head(["model", "place", *columns])]
    for name, run in runs.items():
        for _, row in run.tables.get("positions", pd.DataFrame()).iterrows():
            cells = [_brief(row, "mass", "low", "high"), f"{row['even']:.3f}", f"{row['heads']:.2f}"]
            cells += [_brief(row, one) for one in ("auroc_harmful", "auroc_refused", "hidden_gap")]
            lines.append(readme_table.row([f"`{name}`", row["position"], *cells]))
    return "\n".join(lines)


def experiments(runs: dict[str, Any]) -> str:
    """Loss, refusal and directions under every experiment; random ones as their range."""
    head = ["model", "what", "loss", "refusal gap", "harm direction", "refusal direction"]
    lines = [readme_table.head(head)]
    for name, run in runs.items():
        loss = run.tables["together"].groupby(["which", "what", "heads_or_dimensions"], sort=False)["rise"].mean()
        effects = run.tables.get("requests", pd.DataFrame())
        keys = list(dict.fromkeys((which, what) for which, what, _ in loss.index))
        for which, what in keys:
            own = [float(value) for (a, b, _), value in loss.items() if (a, b) == (which, what)]
            cells = [_range(own)]
            for column in ("change_gap", "cosine_harmful", "cosine_refused"):
                there = column in effects
                rows = effects[(effects["which"] == which) & (effects["what"] == what)] if there else effects
                cells.append(_effect(rows, column) if there else "")
            noun = "dimensions" if what == "at 0" else "heads"
            lines.append(readme_table.row([f"`{name}`", f"{which} {noun}, {what}", *cells]))
    return "\n".join(lines)


def _effect(rows: pd.DataFrame, column: str) -> str:
    """One number with its interval, a cosine with the direction's reliability too; of random ones their range."""
    if len(rows) > 1:
        return _range(rows[column].tolist())
    reliability = column.replace("cosine", "reliability")
    told = f" ({rows[reliability].iloc[0]:.2f})" if reliability != column else ""
    return _brief(rows.iloc[0], column) + told


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if len(values) == 1 else f"{low:.2f} to {high:.2f}"


def _brief(row: "pd.Series[Any]", name: str, low: str = "", high: str = "") -> str:
    ends = row[low or f"{name}_low"], row[high or f"{name}_high"]
    return "" if pd.isna(row[name]) else f"{row[name]:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import mechlens as ml

    runs = {}
    for name in given.models:
        more: dict[str, Any] = {"template": "none", "domains": ("prose", "code")} if name in BASE else {}
        runs[name] = ml.run(ml.FindSinks(model=name, out=given.out / name, **SMALL | more))
        print(runs[name].sentence, flush=True)
    tables = {"numbers": numbers(runs), "verdicts": verdicts(runs), "positions": positions(runs),
              "experiments": experiments(runs)}  # fmt: skip
    readme = Path(__file__).resolve().parents[1] / "mechlens/studies/sinks/README.md"
    readme_table.show(__file__, tables, readme if given.write else None)


if __name__ == "__main__":
    main()
