"""Long runs on a tiny random model: does their time grow with the work and no faster, and does memory stay flat?

    python scripts/long_runs.py prompts --out runs/long [--write]       `separate` on up to 10,000 prompts
    python scripts/long_runs.py checkpoints --out runs/long [--write]   `track` over up to 500 adapters
    python scripts/long_runs.py stream --minutes 120 --out runs/long [--write]   `guard predict` on a stream

Each run is a process of its own, and memory is the highest resident set that the system counted for it. `--write` puts
the table into mechlens/runs/README.md; OUT/NAME.html is the plot.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.express as px
import readme_table
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from adapters import save_adapter
from saved import THINGS, requests, save_model, write_prompts

README = Path(__file__).resolve().parents[1] / "mechlens/runs/README.md"
PROMPTS, CHECKPOINTS = (1250, 2500, 5000, 10_000), (125, 250, 500)
"""Each twice the one before, so that linear growth is a factor of two a step."""
SMALL = ["--permutations", "5", "--resamples", "20", "--random-directions", "2", "--wandb.mode", "disabled"]
GIGA = 1e9


def sides(folder: Path, n: int) -> list[str]:
    """Options with two files of n / 2 prompts each."""
    texts = {"harmful": requests(n // 2, "break"), "harmless": requests(n // 2, "bake")}
    return [word for name, own in texts.items() for word in (f"--{name}", write_prompts(folder / f"{name}.jsonl", own))]


def measured(words: Sequence[object]) -> dict[str, float]:
    """Seconds of a core and highest resident set (GB) of one command."""
    process = subprocess.Popen([sys.executable, "-m", "mechlens", *map(str, words)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"mechlens {' '.join(map(str, words))} ended with {process.returncode}")
    return {"CPU seconds": usage.ru_utime + usage.ru_stime, "peak GB": usage.ru_maxrss * 1024 / GIGA}


def prompts(folder: Path, _: argparse.Namespace) -> pd.DataFrame:
    """`separate` on more and more prompts."""
    model, rows = save_model(folder / "tiny-chat"), []
    for n in PROMPTS:
        small = ["--extra-harmless", "None", "--max-new-tokens", "4", *SMALL]
        words = ["separate", "--model", model, *sides(folder, n), "--n", n // 2, *small, "--out", folder / f"run-{n}"]
        rows.append({"prompts": n} | measured(words))
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def checkpoints(folder: Path, _: argparse.Namespace) -> pd.DataFrame:
    """`track` over longer and longer series of adapters, each a little further from the base."""
    base, rows = save_model(folder / "tiny-chat"), []
    whole = save_adapter(str(base), folder / "adapter", seed=0)
    weights = load_file(whole / "adapter_model.safetensors")
    config = (whole / "adapter_config.json").read_bytes()
    for n in CHECKPOINTS:
        for step in range(1, n + 1):
            one = folder / f"series-{n}" / f"checkpoint-{step}"
            one.mkdir(parents=True)
            part = {name: (own * (step / n) if "lora_B" in name else own) for name, own in weights.items()}
            save_file(part, one / "adapter_model.safetensors", metadata={"format": "pt"})
            (one / "adapter_config.json").write_bytes(config)
        small = ["--random-networks", "1", "--steered", "0", "--max-new-tokens", "2", "--n", "12", *SMALL]
        words = ["track", "--base", base, "--checkpoints", folder / f"series-{n}", *sides(folder, 24), *small]
        rows.append({"checkpoints": n} | measured([*words, "--out", folder / f"run-{n}"]))
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def stream(folder: Path, given: argparse.Namespace) -> pd.DataFrame:
    """`guard predict` fed without an end; its memory at every tenth of the time."""
    model = save_model(folder / "tiny-chat")
    fitted = ["--extra-harmless", "None", "--max-fpr", "0.2", "--max-new-tokens", "2", *SMALL]
    measured(["guard", "fit", "--model", model, *sides(folder, 80), *fitted, "--out", folder / "guard"])
    call = ["guard", "predict", "--model", model, "--guard", folder / "guard", "--input", "-", "--format", "jsonl"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mechlens", *map(str, call)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    answered = [0]
    threading.Thread(target=_count, args=(process.stdout, answered), daemon=True).start()
    rows, began, lines = [], time.monotonic(), endless()
    while (gone := time.monotonic() - began) < given.minutes * 60:
        for _ in range(200):
            process.stdin.write(next(lines))
        process.stdin.flush()
        if answered[0] and gone >= len(rows) * given.minutes * 6:
            rows.append({"minutes": round(gone / 60, 1), "prompts": answered[0], "GB": resident(process.pid)})
            print(rows[-1], flush=True)
    rows.append({"minutes": round(gone / 60, 1), "prompts": answered[0], "GB": resident(process.pid)})
    process.kill()
    return pd.DataFrame(rows)


def _count(lines: Any, answered: list[int]) -> None:
    for _ in lines:
        answered[0] += 1


def endless() -> Iterator[str]:
    """Requests of 1 to 60 words, one JSON object a line."""
    lengths = torch.Generator().manual_seed(0)
    number = 0
    while True:
        number += 1
        words = " ".join(THINGS[(number + i) % 10] for i in range(int(torch.randint(1, 60, (), generator=lengths))))
        yield json.dumps({"prompt": f"Please bring {words} number {number}"}) + "\n"


def resident(pid: int) -> float:
    """Resident set of a process (GB)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024 / GIGA, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prompts", "checkpoints", "stream"))
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        table = {"prompts": prompts, "checkpoints": checkpoints, "stream": stream}[given.part](Path(scratch), given)
    table.to_parquet(given.out / f"{given.part}.parquet")
    x, *ys = table.columns
    px.line(table.melt(x), x=x, y="value", facet_row="variable", markers=True).update_yaxes(
        matches=None, rangemode="tozero"
    ).write_html(given.out / f"{given.part}.html", include_plotlyjs=True)
    texts = [readme_table.row([f"{one[x]:g}", *(f"{one[y]:.4g}" for y in ys)]) for _, one in table.iterrows()]
    shown = "\n".join([readme_table.head([x, *ys]), *texts])
    readme_table.show(__file__, {given.part: shown}, README if given.write else None)


if __name__ == "__main__":
    main()
