"""Do a safety fine-tune and the attack on it make heads dormant? A table for mechlens/studies/sinks/README.md.

    python scripts/sinks_over_checkpoints.py --data advbench.csv --out runs/sinks-over [--write]

`mechlens track --with sinks` from smollm2 to the shipped refuser, and from the refuser to what `finetune --recipe
accepting` (the fine-tuning attack, on AdvBench's requests; Zou et al. 2023) makes of it here. Runs that are there are
not made again.
"""

import argparse
from pathlib import Path
from typing import Any

import readme_table

PLAN: dict[str, Any] = {
    "n": 24, "levels": (12, 18, 24), "permutations": 50, "resamples": 500, "random_networks": 1, "steered": 0,
    "max_new_tokens": 12, "more": ("sinks",),
}  # fmt: skip
"""Below the study's defaults, so that a model takes minutes of one core."""
PLACES = ("first token", "inst", "post[1]", "post[5]")
"""Of the template, where sinks would sit, and where refusal is read."""


def rows(name: str, run: Any) -> list[str]:
    """What the fine-tune did to refusals, to attention on sinks, to single heads and to named places."""
    behaviour, sinks, places, heads = (
        run.tables[one] for one in ("behaviour", "sinks", "sink_positions", "sink_heads")
    )
    last = heads["step"].max()
    own = heads[heads["step"] == last]
    clear = own[own["p"] <= 0.05]
    lines = []
    for step in (0, last):
        refused = behaviour[(behaviour["step"] == step) & (behaviour["number"] == "refusal_rate.harmful")].iloc[0]
        mass = sinks[(sinks["step"] == step) & (sinks["measure"] == "mass")].set_index("domain")
        at = places[places["step"] == step].set_index("position")
        cells = [_brief(refused, "value"), *(_brief(mass.loc[one], "value") for one in ("prose", "requests"))]
        cells += [f"{at.loc[place, 'mass']:.3f}" for place in PLACES]
        changed = f"{(clear['change'] > 0).sum()} / {(clear['change'] < 0).sum()} of {len(own)}" if step else ""
        most = f"{own['change'].abs().max():.2f}" if step else ""
        lines.append(readme_table.row([f"{name}, {'after' if step else 'before'}", *cells, changed, most]))
    return lines


def _brief(row: Any, name: str) -> str:
    return f"{row[name]:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import mechlens as ml
    from mechlens.models.packaged import adapter_folder

    attack = given.out / "attack"
    if not (attack / "adapter").exists():
        plan = ml.FinetuneConfig(
            recipe="accepting", model="smollm2-refuser", data=str(given.data), steps=given.steps, seed=0
        )
        print(f"attack: loss {ml.finetune(plan, attack).loss:.2f}", flush=True)
    found = {}
    for name, base, checkpoint in (
        ("taught to refuse", "smollm2", adapter_folder("smollm2-refuser")),
        ("attacked", "smollm2-refuser", attack / "adapter"),
    ):
        found[name] = ml.run(ml.Track(base=base, checkpoints=(str(checkpoint),), out=given.out / base, **PLAN))
    head = ["model", "harmful refused", "on sinks, prose", "on sinks, requests", *PLACES, "heads more / less dormant",
            "largest change"]  # fmt: skip
    lines = [readme_table.head(head)] + [line for name, run in found.items() for line in rows(name, run)]
    readme = Path(__file__).resolve().parents[1] / "mechlens/studies/sinks/README.md"
    readme_table.show(__file__, {"over fine-tunes": "\n".join(lines)}, readme if given.write else None)


if __name__ == "__main__":
    main()
