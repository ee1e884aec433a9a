"""How fast float32 matrix products of PyTorch's two libraries are here: MKL, which `torch.nn.Linear` calls, and oneDNN.

    .venv/bin/python scripts/bench_products.py

At the shapes of SmolLM2 (width 576) and of a 7B model (4096), for rows of a decoded batch and of a prompt batch. On AMD
processors mechlens takes oneDNN's (mechlens/models/engine/products.py); the error is against float64. The last line is
one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mechlens.models.engine.products import mkl_is_slow

SHAPES = [(rows, d_in, d_out) for d_in, d_out in ((576, 1536), (1536, 576), (4096, 4096)) for rows in (1, 8, 64, 1024)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each product")
    seconds = parser.parse_args().seconds
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        raise SystemExit("bench_products: this PyTorch has no oneDNN")
    print(f"{torch.get_num_threads()} threads; mechlens takes {'oneDNN' if mkl_is_slow() else 'what PyTorch chooses'}")
    print(f"{'rows':>6}{'d_in':>6}{'d_out':>7}{'MKL':>10}{'oneDNN':>10}{'ratio':>7}{'error MKL':>11}{'oneDNN':>9}")
    ratios = []
    for rows, d_in, d_out in SHAPES:
        x, weight = torch.randn(rows, d_in), torch.randn(d_out, d_in)
        right = x.double() @ weight.double().T
        ways = {"mkl": torch.nn.functional.linear, "onednn": onednn}
        speed, error = {}, {}
        with torch.inference_mode():
            for name, way in ways.items():
                speed[name] = 2e-9 * rows * d_in * d_out / fastest(lambda way=way: way(x, weight), seconds)  # noqa: B023
                error[name] = float((way(x, weight) - right).norm() / right.norm())
        ratios.append(speed["onednn"] / speed["mkl"])
        print(
            f"{rows:>6}{d_in:>6}{d_out:>7}{speed['mkl']:>7.0f} GF{speed['onednn']:>7.0f} GF{ratios[-1]:>7.2f}"
            f"{error['mkl']:>11.1e}{error['onednn']:>9.1e}"
        )
    print(json.dumps({"smallest_ratio": round(min(ratios), 2), "largest_ratio": round(max(ratios), 2)}))


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found


def fastest(run: Callable[[], Tensor], seconds: float) -> float:
    """Seconds of the fastest of many calls."""
    run()
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
