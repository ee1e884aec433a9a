"""A benchmark that measures another road than the one it is about has measured nothing: it must fail."""

import importlib.util
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
