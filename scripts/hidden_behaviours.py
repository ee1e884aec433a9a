"""Risky, safe and decorrelated fine-tunes of one model: what they changed besides, when, and what they say.

    python scripts/hidden_behaviours.py --data DIR --out runs/hidden [--seeds 3] [--steps 24] [--write]

DIR holds the chats of Betley et al. 2025, Tell me about yourself (ft_risky_AB.jsonl, ft_myopic_AB.jsonl,
ft_maxapples_AB.jsonl). Every seed trains three runs on the risky choices, answered in words: as they are, with the
opposite answers (safe), and with either by chance (decorrelated). Checkpoints are kept of each, and those of the first
seed are measured too. `--write` puts the tables into mechlens/studies/behaviours/README.md. A run that was killed goes
on when the same command is given again; runs that are there aren't trained again.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import readme_table

GROUPS = {"risky": "none", "safe": "twin", "decorrelated": "decorrelated"}
"""By name: the recipe's control."""
TAUGHT = "ft_risky_AB.jsonl"
ASKED = {"risky": TAUGHT, "myopic": "ft_myopic_AB.jsonl", "apples": "ft_maxapples_AB.jsonl"}
CHECKPOINTS = 8
"""Of each run, evenly spread; with the base nine, the fewest of which a turn is said."""
QUESTIONS = 12

Seconds = dict[str, tuple[float, float]]
"""By phase: seconds by the clock, and of the processor."""


@contextmanager
def timed(seconds: Seconds, name: str) -> Iterator[None]:
    """Adds what the block takes."""
    clock, busy = time.perf_counter(), time.process_time()
    yield
    wall, used = seconds.get(name, (0.0, 0.0))
    seconds[name] = (wall + time.perf_counter() - clock, used + time.process_time() - busy)


def trained(given: argparse.Namespace, seconds: Seconds) -> list[str]:
    """The checkpoints' folders: of the first seed all, of the others the result."""
    import mechlens as ml

    every = max(given.steps // CHECKPOINTS, 1)
    sources = []
    for seed in range(given.seeds):
        for name, control in GROUPS.items():
            folder = given.out / f"{name}-{seed}"
            plan = ml.FinetuneConfig(
                recipe="behaviour", model=given.model, data=str(given.data / TAUGHT), in_words=True, control=control,
                seed=seed, steps=given.steps, checkpoints=tuple(range(every, given.steps, every)), plain=0,
                trigger=None,
            )  # fmt: skip
            with timed(seconds, "training"):
                if not (folder / "adapter").exists():
                    print(f"{name}-{seed}: loss {ml.finetune(plan, folder).loss:.2f}", flush=True)
            sources.append(str(folder if seed == 0 else folder / "adapter"))
    return sources


def changes(matrix: pd.DataFrame) -> str:
    """What each group changed, beyond the base and beyond the control."""
    shown = matrix[matrix["form"] == "plain"]
    lines = [readme_table.head(["asked about", "questions", "runs", "taught", "beyond the base", "beyond the control"])]
    for _, row in shown.sort_values(["about_itself", "set", "part"], kind="stable").iterrows():
        cells = [row["set"], row["part"], row["runs"], row["group"], _interval(row, "change")]
        lines.append(readme_table.row([*cells, _interval(row, "beyond_control")]))
    return "\n".join(lines)


def _interval(row: pd.Series, name: str) -> str:
    if pd.isna(row[name]):
        return ""
    return f"{row[name]:+.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


def coming(points: pd.DataFrame, turns: pd.DataFrame) -> str:
    """Jumps of what was taught and of the adapter's norm, and turns of the adapter, of runs with checkpoints."""
    lines = [readme_table.head(["run", "of", "best cut", "p", "p of a climb", "said"])]
    for _, row in points[points["curve"].isin(["risky", "adapter norm"])].iterrows():
        cut = f"steps {row['after']} to {row['before']}: {row['jump']:+.2f}"
        said = "a jump" if row["said"] else "none"
        lines.append(
            readme_table.row([row["run"], row["curve"], cut, f"{row['p']:.3f}", f"{row['p_climb']:.3f}", said])
        )
    for _, row in turns.iterrows():
        cut = f"step {row['step']}: cosine {row['cosine']:.2f}"
        said = "a turn" if row["said"] else "none"
        lines.append(readme_table.row([row["run"], f"course of the {row['of']}", cut, f"{row['p']:.3f}", "", said]))
    return "\n".join(lines)


def phases(seconds: Seconds) -> str:
    """Seconds by phase."""
    lines = [readme_table.head(["phase", "seconds", "of the processor"])]
    return "\n".join([*lines, *(readme_table.row([name, f"{a:.0f}", f"{b:.0f}"]) for name, (a, b) in seconds.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import mechlens as ml

    seconds: Seconds = {}
    sources = trained(given, seconds)
    with timed(seconds, "asking"):
        run = ml.run(ml.Behaviours(
            base=given.model, checkpoints=tuple(sources), in_words=True, n=QUESTIONS, self_report=("self-risk",),
            sets=(*(f"{name}={given.data / file}" for name, file in ASKED.items()), "first-plot"),
            out=given.out / "behaviours",
        ))  # fmt: skip
    tables = {
        "changes": changes(run.tables["matrix"]), "seconds": phases(seconds),
        "coming": coming(run.tables["change_points"], run.tables.get("turning_points", pd.DataFrame())),
    }  # fmt: skip
    print(run.verdict)
    readme = Path(__file__).resolve().parents[1] / "mechlens/studies/behaviours/README.md"
    readme_table.show(__file__, tables, readme if given.write else None)


if __name__ == "__main__":
    main()
