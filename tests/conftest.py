"""What every test stands on: no network surprises, two threads, tiny models, and real ones where a registry ships them.

mechlens is imported inside the fixtures, so that the run-time checks of shapes are on before it loads.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WANDB_CONSOLE="off",
    WANDB_DISABLE_CODE="true",
    WANDB_ERROR_REPORTING="false",
)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning starve whatever runs beside them

import pytest
import real
import shape_checks  # noqa: F401  # before anything of mechlens
import torch

# `scripts/test` runs as many processes as there are processors, each on one thread.
BESIDE_OTHERS = "PYTEST_XDIST_WORKER" in os.environ
torch.set_num_threads(1 if BESIDE_OTHERS else 2)
if BESIDE_OTHERS:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def no_signs_of_life() -> None:
    """Lines about phases that last would stand among the errors of a slow machine; tests look at those."""
    from mechlens.methods import heartbeat

    heartbeat.LASTS = 600.0


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2-135M-Instruct as a bridge, shared by the session: leave no hooks on it."""
    from mechlens.models.load import load

    real.fetched("smollm2")
    return load("smollm2")


@pytest.fixture(scope="session")
def gemma3() -> Any:
    """Gemma-3-270M base as a bridge, shared by the session: leave no hooks on it."""
    from mechlens.models.load import load

    real.fetched("gemma3-270m")
    return load("gemma3-270m")


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """SmolLM2's tokenizer without its weights in memory; copy it before changing it."""
    return real.tokenizer("smollm2")


@pytest.fixture(scope="session")
def real_tokenizer() -> Callable[[str], Any]:
    """Real tokenizers by name: smollm2, llama2 (no chat template), llama3, qwen3, gemma3; copy before changing."""
    return real.tokenizer


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Makes a random three-layer bridge of one of tiny.ARCHITECTURES, with tiny's tokenizer."""

    def make(architecture: str = "llama", **options: Any) -> Any:
        from tiny import tiny_hf, tiny_tokenizer

        from mechlens.models.bridge import bridge
        from mechlens.models.checkpoint import Checkpoint, weight_fingerprint

        hf_model = tiny_hf(architecture, **options)
        name = f"tiny-{architecture}"
        checkpoint = Checkpoint(name, name, fingerprint=weight_fingerprint(hf_model.state_dict()))
        return bridge(hf_model, tiny_tokenizer(), checkpoint)

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The research data: `shared/data` beside the repository, or the folder that $MECHLENS_SHARED names."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    data = Path(os.environ.get("MECHLENS_SHARED") or beside)
    if not data.is_dir():
        pytest.skip(f"there is no research data at {data}; set MECHLENS_SHARED to its folder")
    return data
