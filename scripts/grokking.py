"""Addition modulo a prime at the edge of a softmax's numbers, for the tables in mechlens/methods/numerics/README.md.

    python scripts/grokking.py [--write]

The multilayer perceptron of Prieto et al. 2025 at a reduced size (modulo 23, 64 units, 70% of the pairs, 2,000 steps
instead of modulo 113, 200 units, 40% and up to 80,000), and the perpendicular gradient at their full size, 300 steps.
"""

import argparse
from pathlib import Path
from typing import Any

import readme_table

SIZES: dict[str, dict[str, Any]] = {
    "23": {"modulus": 23, "width": 64, "train_share": 0.7, "steps": 2000, "every": 200},
    "113": {"modulus": 113, "width": 200, "train_share": 0.4, "steps": 300, "every": 100},
}
RUNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("softmax, float32", "23", {}),
    ("softmax, float64", "23", {"precision": "float64"}),
    ("StableMax, float32", "23", {"loss": "stablemax"}),
    ("softmax, float32, perpendicular gradient", "23", {"perpendicular": True}),
    ("softmax, float32", "113", {}),
    ("softmax, float32, perpendicular gradient", "113", {"perpendicular": True}),
)
LOOKS = (200, 300, 800, 1000, 2000)
COLUMNS = ["modulo", "loss, precision", "step", "training loss", "loss of 0", "gradient", "along the weights",
           "accuracy, trained", "accuracy, others"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import mechlens as ml

    lines = [readme_table.head(COLUMNS)]
    for name, size, options in RUNS:
        curve = ml.train_modular(ml.ModularTraining(**SIZES[size], **options)).curve
        for row in curve[curve["step"].isin(LOOKS)].to_dict("records"):
            cells = [f"{row['loss']:.1e}", f"{row['zero_loss']:.0%}", f"{row['gradient']:.1e}"]
            cells += [f"{row[one]:.2f}" for one in ("alignment", "train", "test")]
            lines.append(readme_table.row([size, name, int(row["step"]), *cells]))
            print(lines[-1], flush=True)
    readme = Path(__file__).resolve().parents[1] / "mechlens/methods/numerics/README.md"
    readme_table.show(__file__, {"grokking": "\n".join(lines)}, readme if given.write else None)


if __name__ == "__main__":
    main()
