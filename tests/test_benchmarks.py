"""A benchmark that measures another road than the one it is about has measured nothing: it must fail."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from saved import save_model

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["bench_collect", "bench_patching", "bench_steering", "bench_tracking"])
def test_a_benchmark_fails_where_the_fast_path_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechlens.models.engine import forward
    from mechlens.models.engine import growing as partial

    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench = script(name)
    monkeypatch.setattr(sys, "argv", [name, "--model", str(save_model(tmp_path / "model"))])
    for module in (forward, partial):
        monkeypatch.setattr(module, "why_plain", lambda model: "a reason of this test")
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=r"takes the plain path.*a reason of this test"):
        bench.main()


def test_a_refused_fast_path_says_why_once_and_in_the_result(tiny_model: Any) -> None:
    from mechlens.methods.activations.collect import collect
    from mechlens.prompts.prompt import Prompt

    model = tiny_model()
    prompts = [Prompt("0", "how are you", "harmless"), Prompt("1", "who are you", "harmless")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collect(model, prompts).why_plain == ""
    model.add_hook("blocks.1.hook_resid_pre", lambda value, hook: value)
    with pytest.warns(UserWarning, match=r"tiny-llama takes the plain path.*hooks are attached"):
        slow = collect(model, prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(model, prompts)
    assert "hooks are attached" in slow.why_plain


def test_the_memory_of_streamed_activations_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A short version: 200 prompts, 12 levels, d_model 4096."""
    bench = script("bench_memory")
    monkeypatch.setattr(bench, "STREAMED_BATCH", 1 << 24)
    sizes = {"prompts": 200, "levels": 12, "positions": 2, "d-model": 4096, "folder": tmp_path}
    monkeypatch.setattr(sys, "argv", ["bench_memory", *(str(w) for k, v in sizes.items() for w in (f"--{k}", v))])
    bench.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["values_gb"] == pytest.approx(0.0393, abs=1e-4)
    assert list(found["steps"]) == ["write", "direction", "separate"]
    # All values in float64 would take 0.157 GB, one cell 0.0066.
    assert found["steps"]["direction"]["peak_gb"] < 0.08
    assert list(tmp_path.iterdir()) == []
