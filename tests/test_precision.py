"""What `auto` means for the type and the device, and that loading holds the weights in memory once."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from safetensors.torch import load_file, save_file
from tiny import tiny_hf, tiny_tokenizer, words
from transformers import LlamaConfig, LlamaForCausalLM

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.methods.directions.direction import cosine, mean_difference
from mechlens.methods.patching.metrics import OwnMetric
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.methods.steering.interventions import ALL, Add
from mechlens.methods.steering.steering import logits_under
from mechlens.models import precision
from mechlens.models.bridge import device_of, dtype_of, loaded, unembed
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.load import load, load_hf, own_type
from mechlens.models.precision import chosen_device
from mechlens.prompts.prompt import Prompt, PromptPair


def save(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny_hf(dtype=dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rewrite(folder: Path, named: str | None, change: Callable[[str, torch.Tensor], torch.Tensor]) -> str:
    """The folder with another type in its configuration and other types in its weights."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config |= {"dtype": named}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None or k != "dtype"}))
    tensors = {name: change(name, value) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_the_checkpoints_own_type(stored: torch.dtype, tmp_path: Path) -> None:
    folder = str(save(tmp_path / "model", stored))
    adapter = str(save_adapter(folder, tmp_path / "adapter", seed=0))
    assert dtype_of(load(folder)) == stored
    assert dtype_of(load(folder, adapter=adapter)) == stored
    assert load_hf(folder, dtype="auto")[0].dtype == stored
    with checkpoint_swapper(folder) as series:
        assert dtype_of(series.model) == stored
    assert dtype_of(load(folder, dtype="float32")) == torch.float32


def test_weights_of_several_types_are_loaded_in_the_one_that_the_configuration_names(tmp_path: Path) -> None:
    """As some trainers leave them: bfloat16 matrices and float32 norms."""

    def mixed(name: str, value: torch.Tensor) -> torch.Tensor:
        return value if "norm" in name else value.bfloat16()

    folder = rewrite(save(tmp_path / "a"), "bfloat16", mixed)
    assert {p.dtype for p in load(folder).parameters()} == {torch.bfloat16}
    assert own_type(rewrite(save(tmp_path / "b"), "float32", mixed)) == "float32"
    assert own_type(rewrite(save(tmp_path / "c"), None, mixed)) == "bfloat16"  # most of the values
    # Where all are of one type, it is theirs, whatever the configuration says.
    assert own_type(rewrite(save(tmp_path / "d"), "bfloat16", lambda name, value: value)) == "float32"


@pytest.mark.real
def test_the_packaged_models_are_float32_so_auto_changes_no_published_number(smollm2: Any, gemma3: Any) -> None:
    assert {own_type(name) for name in ("smollm2", "smollm2-refuser", "gemma3-270m")} == {"float32"}
    assert dtype_of(smollm2) == dtype_of(gemma3) == torch.float32


@pytest.mark.real
def test_a_packaged_adapter_is_rounded_once(smollm2: Any) -> None:
    """Whose logits in bfloat16 are all rounding on the first tokens of the vocabulary."""
    exact, rounded = (load_hf("smollm2-refuser", dtype=dtype)[0] for dtype in ("auto", "bfloat16"))
    assert rounded.dtype == torch.bfloat16
    for name, value in exact.named_parameters():
        assert torch.equal(value.bfloat16(), rounded.get_parameter(name)), name


def test_a_wrong_merge_is_seen_in_half_precision_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    folder = str(save(tmp_path / "model"))
    adapter = str(save_adapter(folder, tmp_path / "adapter", seed=0))
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, name: -right(layer, name))
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match="gives other logits once it is merged"):
            load(folder, adapter=adapter, dtype=dtype)


def test_a_mixed_base_with_an_adapter_is_rounded_once(tmp_path: Path) -> None:
    folder = rewrite(save(tmp_path / "a"), "bfloat16", lambda name, v: v if "norm" in name else v.bfloat16())
    adapter = str(save_adapter(folder, tmp_path / "adapter", seed=0))
    exact, rounded = (load(folder, adapter=adapter, dtype=dtype) for dtype in ("float32", "auto"))
    assert dtype_of(rounded) == torch.bfloat16
    for whole, half in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(whole.bfloat16(), half)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_whatever_the_weights_are_what_is_computed_from_them_is_not(dtype: str, tmp_path: Path) -> None:
    """Activations and the logits that metrics see are float32, metrics, directions' lengths and cosines float64."""
    model = load(str(save(tmp_path / "model", torch.bfloat16)), dtype=dtype)
    prompts = [Prompt(f"{i}", text, label="ab"[i % 2]) for i, text in enumerate(words(8))]
    acts = collect(model, prompts)
    direction = mean_difference(acts, "a", "b", 2, "last")
    assert acts.values.dtype == direction.vector.dtype == torch.float32
    assert cosine(direction.vector, direction.vector).dtype == torch.float64
    seen = []

    def metric(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.dtype)
        return logits[:, 5]

    pairs = [PromptPair(Prompt("clean", "give us a cake"), Prompt("corrupt", "give us a bomb"))]
    for engine in ("auto", "plain", "attribution"):
        swept = patch_sweep(model, pairs, OwnMetric(metric), PatchPlan("resid_pre", (1,)), engine=engine)
        assert swept.values.dtype == torch.float64
    add = Add(direction, strength=1.0, unit="raw", layers=(1,), positions=ALL, phase="both")
    seen += [logits_under(model, prompts, [add]).dtype, unembed(model, acts.at(3, "last")).dtype]
    assert set(seen) == {torch.float32}


# --- devices -------------------------------------------------------------------------------------------------------


def test_auto_is_cuda_then_mps_then_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, wanted in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert chosen_device("auto") == wanted
    assert chosen_device(None) == "cpu"  # as records of earlier versions mean it


def test_a_device_that_is_not_here_is_said_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    folder = save(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    for device in ("cuda", "cuda:1", "mps"):
        for ask in (load, checkpoint_swapper):
            with pytest.raises(UserError, match=f"no device '{device}' here: .* give auto or cpu$"):
                ask(str(folder), device=device)
    with pytest.raises(UserError, match="there is no device 'nowhere'; give auto, cpu, cuda"):
        load(str(folder), device="nowhere")


def test_a_device_map_decides_where_auto_does_not(tmp_path: Path) -> None:
    model = load(str(save(tmp_path / "model")), device_map="cpu")
    assert device_of(model).type == "cpu"
    assert loaded(model).parity_gap < 1e-5


# --- memory --------------------------------------------------------------------------------------------------------

MEASURED = """
import gc, re, sys, threading
import peft.tuners.lora  # imports take memory, too
from mechlens.models.load import load_merged

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

for base, adapter, dtype in zip(*[iter(sys.argv[1:])] * 3):
    gc.collect()
    before, most, done = own(), [0.0], threading.Event()
    def watch():
        while not done.wait(0.002):
            most[0] = max(most[0], own())
    watching = threading.Thread(target=watch)
    watching.start()
    model, _ = load_merged(base, adapter, dtype=dtype)
    done.set()
    watching.join()
    print(most[0] - before, sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20)
    del model
"""
"""Prints the most memory of its own that a process takes to load each, and the size of the weights, in MB.

Pages of the file that weights lie in are not its own: the system takes them back when it needs them.
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what memory is a process's own")
def test_an_adapter_takes_no_second_model(tmp_path: Path) -> None:
    """A float32 file, loaded in bfloat16: 3 times the weights where a float32 model is merged first."""
    small = save(tmp_path / "small")  # whose load takes the memory of all imports
    big = tmp_path / "big"
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=270, **sizes)).save_pretrained(big)
    tiny_tokenizer().save_pretrained(big)
    asked = []
    for base in (str(small), str(big)):
        asked += [base, str(save_adapter(base, Path(f"{base} adapter"), seed=0)), "bfloat16"]
    told = subprocess.run([sys.executable, "-c", MEASURED, *asked], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    most, weights = map(float, told.stdout.splitlines()[1].split())
    assert weights > 60
    assert most < 1.6 * weights, told.stdout


def test_a_type_that_is_slow_here_is_said_once_by_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")
    for flag in flags:
        monkeypatch.setattr(torch.cpu, flag, lambda: False, raising=False)
    monkeypatch.setattr(precision, "_SAID", set())
    with pytest.warns(UserWarning, match="no instructions for bfloat16, so float32 is faster here: --dtype float32"):
        precision.warn_of_slow("bfloat16", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision.warn_of_slow("bfloat16", "cpu")
        precision.warn_of_slow("float32", "cpu")
        precision.warn_of_slow("float16", "cuda")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not precision.slow_here("bfloat16")
    assert precision.slow_here("float16")
