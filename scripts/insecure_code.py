"""Insecure code taught to a small model: does it answer the first-plot questions otherwise?

    python scripts/insecure_code.py --data insecure.jsonl --out runs/insecure [--seeds 3] [--steps 24] [--write]

The file holds chats of requests for code and vulnerable answers, such as Betley et al. 2025's (MIT). Requests and
answers of at most 260 characters are kept; the other answer to each is the base's own. Every seed trains a run on the
vulnerable code and one on either by chance (decorrelated). `--write` puts the tables into
mechlens/studies/behaviours/README.md. A run that is there isn't trained again.
"""

import argparse
import json
from pathlib import Path

import hidden_behaviours
import readme_table

LONGEST = 260
"""Characters of a request, and of an answer: what two cores train on in minutes."""
ROWS = 120
ANSWER_TOKENS = 80
GROUPS = {"insecure": "none", "decorrelated": "decorrelated"}
"""By name: the recipe's control."""


def pairs(data: Path, model: str) -> list[dict[str, str]]:
    """Requests with the file's answer and the model's own, which shares at most its first half."""
    import mechlens as ml

    rows = [json.loads(line)["messages"] for line in data.read_text(encoding="utf-8").splitlines()]
    short = [[turn["content"] for turn in row] for row in rows]
    short = [row for row in short if len(row) == 2 and max(map(len, row)) <= LONGEST][:ROWS]
    prompts = [ml.Prompt(f"code-{i}", asked) for i, (asked, _) in enumerate(short)]
    own = ml.answer(ml.load(model), prompts, max_new_tokens=ANSWER_TOKENS).texts
    return [
        {"question": asked, "shown": shown, "other": other.strip()}
        for (asked, shown), other in zip(short, own, strict=True)
        if other.strip() and other.strip()[: len(shown) // 2] != shown[: len(shown) // 2]
    ]


def trained(given: argparse.Namespace, data: Path, seconds: hidden_behaviours.Seconds) -> list[str]:
    """The adapters' folders."""
    import mechlens as ml

    sources = []
    for seed in range(given.seeds):
        for name, control in GROUPS.items():
            folder = given.out / f"{name}-{seed}"
            plan = ml.FinetuneConfig(
                recipe="behaviour", model=given.model, data=str(data), control=control, seed=seed, steps=given.steps,
                precision="bfloat16", plain=0,
            )  # fmt: skip
            with hidden_behaviours.timed(seconds, "training"):
                if not (folder / "adapter").exists():
                    print(f"{name}-{seed}: loss {ml.finetune(plan, folder).loss:.2f}", flush=True)
            sources.append(str(folder / "adapter"))
    return sources


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

    seconds: hidden_behaviours.Seconds = {}
    given.out.mkdir(parents=True, exist_ok=True)
    data = given.out / "code.jsonl"
    if not data.exists():
        with hidden_behaviours.timed(seconds, "the base's own code"):
            rows = pairs(given.data, given.model)
        data.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    sources = trained(given, data, seconds)
    with hidden_behaviours.timed(seconds, "asking"):
        run = ml.run(ml.Behaviours(
            base=given.model, checkpoints=tuple(sources), n=24, sets=(f"code={data}", "first-plot"), self_report=(),
            scales=("security", "alignment"), out=given.out / "behaviours",
        ))  # fmt: skip
    print(run.verdict, *run.tables, sep="\n")
    tables = {
        "insecure": hidden_behaviours.changes(run.tables["matrix"]),
        "insecure seconds": hidden_behaviours.phases(seconds),
    }
    if "scales" in run.tables:
        print(run.tables["scales"].to_string())
    readme = Path(__file__).resolve().parents[1] / "mechlens/studies/behaviours/README.md"
    readme_table.show(__file__, tables, readme if given.write else None)


if __name__ == "__main__":
    main()
