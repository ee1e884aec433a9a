"""The laws that mechlens is tested by, on a device and in a type of your own: a table with a verdict for each.

    .venv/bin/python scripts/check_device.py --device cuda --dtype bfloat16 [--model smollm2] [--architectures all]

First what a model says and has there against plain Hugging Face on the same device: a tiny random one, or --model.
Then every architecture asked for, as in the table of `scripts/architectures.py`. The last line is one JSON object; the
exit status is 1 where anything is wrong.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import architectures
import torch
from device_laws import LAWS, limit
from device_subject import NotHereError, Subject

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from saved import save_model
from tiny import CONFIGS, MORE

from mechlens.models.precision import chosen_device

JUMPY = ("glm_moe_dsa",)
"""Where one rounding in half precision makes attention choose other tokens: plain float32 is as far from it."""
TOO_NARROW = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu")
"""Whose heads, as tiny models have them, plain Hugging Face can't decode with in half precision on a GPU: PyTorch
2.11 gives them to cuDNN's attention, which fails."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--model", help="packaged name, hub id or folder; without it a tiny random one")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--laws", nargs="*", default=list(LAWS), metavar="LAW", help="none to leave them out")
    parser.add_argument("--architectures", nargs="*", default=list(CONFIGS), help="names, or all")
    args = parser.parse_args()
    device = chosen_device(args.device)
    names = sorted(CONFIGS | MORE) if args.architectures == ["all"] else args.architectures
    warnings.simplefilter("ignore")
    print(f"{torch.cuda.get_device_name() if 'cuda' in device else device}, {args.dtype}, {architectures.versions()}")
    with tempfile.TemporaryDirectory() as scratch:
        name = args.model or str(save_model(Path(scratch) / "tiny"))
        one = Subject(name, device, args.dtype, Path(scratch), args.prompts)
        wrong = [law for law in args.laws if not holds(law, one)]
    if args.dtype != "float32":
        names = [name for name in names if name not in (*JUMPY, *TOO_NARROW)]
    wrong += [f"{name}: {cell}" for name in names for cell in architecture(name, device, args.dtype)]
    print(json.dumps({"device": device, "dtype": args.dtype, "wrong": wrong}))
    raise SystemExit(bool(wrong))


def holds(law: str, one: Subject) -> bool:
    """Tries a law and prints its line."""
    run, of = LAWS[law]
    start = time.perf_counter()
    try:
        gap = run(one)
        most = limit(of, one)
        verdict, told = ("holds" if gap <= most else "WRONG"), f"{gap:.1e} of {most:.0e}"
    except NotHereError as error:
        verdict, told = "not here", str(error)[:90]
    except Exception as error:  # any error is a finding of this script
        verdict, told = "FAILED", f"{type(error).__name__}: {error}"[:300]
        traceback.print_exc()
    print(f"{law:<38}{verdict:<10}{time.perf_counter() - start:6.1f} s  {told}", flush=True)
    return verdict in ("holds", "not here")


def architecture(name: str, device: str, dtype: str) -> list[str]:
    """Prints an architecture's line; its cells that are wrong."""
    start = time.perf_counter()
    try:
        cells = architectures.row(name, device, getattr(torch, dtype))
    except Exception as error:  # any error is a finding of this script
        traceback.print_exc()
        if "CUDA error" in str(error):  # nothing can be computed in this process any more
            print(f"{name}: FAILED, and what follows was not tried: {error}"[:300], flush=True)
            raise SystemExit(1) from error
        cells = {"row": f"FAILED: {type(error).__name__}: {error}"[:300]}
    wrong = [f"{column} {cell}" for column, cell in cells.items() if "WRONG" in cell or "FAILED" in cell]
    told = "; ".join(wrong) or cells.get("refused", " ".join(cells.get(c, "") for c in architectures.COLUMNS[:6]))
    print(
        f"{name:<22}{'WRONG' if wrong else 'holds':<10}{time.perf_counter() - start:6.1f} s  {told[:200]}", flush=True
    )
    return wrong


if __name__ == "__main__":
    main()
