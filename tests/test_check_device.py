"""The script that tries the laws on a device: it passes here, and says so where a law doesn't hold."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_hf, tiny_tokenizer

from mechlens.errors import UserError
from mechlens.models import bridge as bridging
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine import forward
from mechlens.models.engine.forward import Row
from mechlens.models.engine.probes import Probed, spread_tokens

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
QUICK = ("collect = Hugging Face", "packed = padded", "steered = a hook", "memory runs out")


@pytest.fixture
def check_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("architectures", "bench_collect", "both_models", "device_laws", "device_memory", "device_subject"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("check_device")


def verdicts(check_device: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, *laws: str) -> tuple[int, dict[str, Any]]:
    words = ["check_device", "--device", "cpu", "--prompts", "4", "--laws", *laws, "--architectures", "llama"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        check_device.main()
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_laws_hold_here(check_device: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    status, found = verdicts(check_device, monkeypatch, capsys, *QUICK)
    assert (status, found["wrong"]) == (0, [])


def test_a_law_that_does_not_hold_fails_the_script(
    check_device: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    broken = {"collect twice": (lambda one: 1.0, "exact"), "logit lens = logits": (lambda one: 1 / 0, "rounding")}
    for name, law in broken.items():
        monkeypatch.setitem(check_device.LAWS, name, law)
    status, found = verdicts(check_device, monkeypatch, capsys, *broken)
    assert (status, found["wrong"]) == (1, list(broken))


def test_on_a_gpu_the_shared_start_is_run_with_the_prompts(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model(), [Row((5, 6, 7, 8, 9, 10 + i), (5,)) for i in range(3)]
    assert forward.own_start(model, rows) == 5
    monkeypatch.setattr(forward, "device_of", lambda model: torch.device("cuda"))
    assert forward.own_start(model, rows) == 0
    monkeypatch.setattr(forward, "packs", lambda *_: False)
    assert forward.own_start(model, rows) == 5


def test_trials_take_tokens_from_all_over_the_vocabulary() -> None:
    tokens = spread_tokens(tiny_hf(), range(11))
    assert len(set(tokens)) == 11
    assert max(tokens) > 200


def test_several_residual_streams_in_a_block_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n's blocks put out four streams at once, which would be indexed as rows."""
    found = Probed(torch.zeros(1, 16, 270), [torch.zeros(4, 1, 16, 32)])
    monkeypatch.setattr(bridging, "probe", lambda model: found)
    with pytest.raises(UserError, match="its blocks have no single residual stream"):
        bridge(tiny_hf(), tiny_tokenizer(), Checkpoint("tiny", "tests/tiny"))
