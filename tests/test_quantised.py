"""Quantised weights: run as plain Hugging Face runs them, exactly; told apart everywhere; never edited."""

import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from tiny import tiny_hf, tiny_tokenizer, words
from transformers import AutoModelForCausalLM

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.directions.direction import Direction, cosine, direction_cosine, mean_difference
from mechlens.methods.steering.interventions import ALL, Add
from mechlens.methods.steering.steering import applied, logits_under
from mechlens.models.bridge import checkpoint_now, dtype_of, loaded, weights_now
from mechlens.models.checkpoint import Checkpoint, is_packed
from mechlens.models.checkpoints.series import checkpoint_series
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.load import load, load_hf, load_merged
from mechlens.models.native import native, native_blocks
from mechlens.models.orthogonal import orthogonalised
from mechlens.models.quantise import configuration, keep_layout
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.runs import artifacts

KINDS = ("int8", "nf4", "fp8")


def prompts() -> list[Prompt]:
    return [Prompt(f"p{i}", text, label="ab"[i % 2]) for i, text in enumerate(words(8))]


def save(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> str:
    tiny_hf(architecture, dtype=dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("base") / "tiny")


def said(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def difference(model: Any) -> Direction:
    return mean_difference(collect(model, prompts()), "a", "b", 2, "last")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("int8", torch.float32), ("int8", torch.bfloat16), ("nf4", torch.bfloat16), ("fp8", torch.float32)],
)
def test_it_is_plain_hugging_face_quantised_so(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(tmp_path / "tiny", dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=configuration(kind, dtype), device_map="cpu"
    )
    keep_layout(plain)
    model = load(folder, dtype=kind)
    known = loaded(model)
    assert (known.checkpoint.regime, dtype_of(model)) == (kind, dtype)
    assert known.parity is not None
    assert known.parity.logits <= known.parity.tolerance
    with native(model):
        linears = [part.weight for block in native_blocks(model) for part in block.modules() if hasattr(part, "weight")]
    assert sum(map(is_packed, linears)) == 7 * 3  # all but norms
    acts = collect(model, prompts(), positions=["last"])
    assert acts.engine == "fast"
    for i, prompt in enumerate(prompts()):
        ids = known.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], add_generation_prompt=True, return_tensors="pt"
        )
        tokens = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
        with torch.inference_mode():
            hidden = plain(tokens, output_hidden_states=True, use_cache=False).hidden_states
        exact = torch.stack([one[0, -1].float() for one in hidden[:-1]])  # the last has gone through the norm
        gap = float((acts.values[i, :-1, 0] - exact).norm() / exact.norm())
        assert gap < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_answers_and_interventions_are_exact(kind: str, base: str) -> None:
    model = load(base, dtype=kind)
    answers = answer(model, prompts(), max_new_tokens=5)
    alone = [answer(model, [prompt], max_new_tokens=5).texts[0] for prompt in prompts()]
    assert list(answers.texts) == alone
    add = Add(difference(model), strength=2.0, unit="raw", layers=(1,), positions=ALL, phase="both")
    fast = logits_under(model, prompts(), [add])

    batch = tokenize(prompts(), template_of(model))
    with applied(model, [add]), torch.inference_mode():
        for i in range(len(prompts())):
            right = model(torch.tensor([batch.row(i)]))[0, -1]
            torch.testing.assert_close(fast[i], right.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_adapter_is_merged_before_and_the_merged_model_quantised(kind: str, base: str, tmp_path: Path) -> None:
    adapter = str(save_adapter(base, tmp_path / "adapter", seed=0))
    merged, tokenizer = load_merged(base, adapter)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    found, right = load(base, adapter=adapter, dtype=kind), load(str(tmp_path / "merged"), dtype=kind)
    assert found.mechlens.checkpoint.fingerprint == right.mechlens.checkpoint.fingerprint
    assert found.mechlens.checkpoint.fingerprint != load(base, dtype=kind).mechlens.checkpoint.fingerprint
    assert torch.equal(found(torch.arange(5, 45)[None]), right(torch.arange(5, 45)[None]))


def test_regimes_are_told_apart_and_never_mixed(base: str, tmp_path: Path) -> None:
    models = {kind: load(base, dtype=kind) for kind in ("float32", *KINDS)}
    found = {kind: difference(model) for kind, model in models.items()}
    assert [one.checkpoint.regime for one in found.values()] == ["raw", *KINDS]
    assert len({one.checkpoint.identity for one in found.values()}) == 4
    artifacts.save(found["int8"], tmp_path / "direction.safetensors")
    again = artifacts.load(tmp_path / "direction.safetensors", Direction)
    assert again.checkpoint == found["int8"].checkpoint
    assert "differ in weight regime (int8 and raw)" in said(lambda: direction_cosine(again, found["float32"]))
    add = Add(found["int8"], strength=1.0, unit="raw", layers=(1,), positions=ALL, phase="both")
    assert "int8 weights" in said(lambda: logits_under(models["float32"], prompts(), [add]))
    assert "was made with raw weights and the model has nf4" in said(
        lambda: collect(models["nf4"], prompts(), project=[found["float32"]])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_weight_is_seen(kind: str, base: str) -> None:
    model = load(base, dtype=kind)
    before, stamped = checkpoint_now(model), weights_now(model)
    weight = next(weight for weight in model.original_model.parameters() if is_packed(weight))
    packed = weight.qdata if hasattr(weight, "qdata") else weight.data
    packed.view(torch.uint8)[0, 0] += 1
    assert weights_now(model) != stamped
    assert checkpoint_now(model).fingerprint != before.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_not_edited(kind: str, base: str, tmp_path: Path) -> None:
    model = load(base, dtype=kind)
    with pytest.raises(UserError, match=f"these weights are {kind}, and quantised ones can't be edited"):
        orthogonalised(model, torch.ones(32)).__enter__()
    sentence = said(lambda: checkpoint_swapper(base, dtype=kind))
    assert f"{kind} weights can't be; give `dtype` bfloat16" in sentence


def test_a_folder_that_is_stored_quantised(base: str, tmp_path: Path) -> None:
    stored = tmp_path / "nf4"
    hf_model, tokenizer = load_hf(base, dtype="nf4")
    hf_model.save_pretrained(stored)
    tokenizer.save_pretrained(stored)
    model = load(str(stored))
    assert model.mechlens.checkpoint.regime == "nf4"
    right = load(base, dtype="nf4")
    assert torch.equal(model(torch.arange(5, 45)[None]), right(torch.arange(5, 45)[None]))
    assert "can't be made int8; give `dtype` auto" in said(lambda: load(str(stored), dtype="int8"))
    adapter = str(save_adapter(base, tmp_path / "adapter", seed=0))
    assert "no adapter can be merged into them" in said(lambda: load(str(stored), adapter=adapter))
    assert "nf4 weights can't be" in said(lambda: checkpoint_swapper(str(stored)))
    assert "its weights are quantised (nf4)" in said(lambda: checkpoint_series(base, [str(stored)]))


EXACT, SPLIT, NONE = "exact", "takes matrices of", "has no matrix that could be made"
OTHERS = {
    ("int8", "neox"): SPLIT, ("int8", "phi3"): SPLIT, ("int8", "gemma2"): EXACT, ("int8", "mixtral"): EXACT,
    ("int8", "gpt2"): NONE, ("nf4", "neox"): SPLIT, ("nf4", "phi3"): SPLIT, ("nf4", "gemma2"): EXACT,
    ("nf4", "mixtral"): EXACT, ("nf4", "gpt2"): SPLIT,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "architecture"), OTHERS)
def test_other_architectures_are_exact_or_refused(kind: str, architecture: str, tmp_path: Path) -> None:
    """Joint matrices, which TransformerLens splits, can't be where they are packed."""
    folder, outcome = save(tmp_path / architecture, architecture), OTHERS[kind, architecture]
    if outcome != EXACT:
        assert outcome in said(lambda: load(folder, dtype=kind))
        return
    model = load(folder, dtype=kind)
    assert loaded(model).parity_gap < 1e-4
    assert bool(torch.isfinite(collect(model, prompts(), positions=["last"]).values).all())


CHATTER = {
    "torchao": "Failed to load ",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",
}


@pytest.mark.parametrize("name", CHATTER)
def test_what_libraries_say_of_missing_kernels_is_left_out_and_all_else_is_heard(name: str) -> None:
    """The logger and the line are the library's own, as they stand in its source."""
    line, logger = CHATTER[name], logging.getLogger(name)
    assert logger.getEffectiveLevel() <= logging.WARNING
    assert not logger.filter(logging.makeLogRecord({"name": name, "msg": f"{line} and more"}))
    assert logger.filter(logging.makeLogRecord({"name": name, "msg": "something that matters"}))
    package, *inside = name.split(".")
    folder = Path(str(find_spec(package).origin)).parent.joinpath(*inside)  # type: ignore[union-attr]
    source = (folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")).read_text(encoding="utf-8")
    assert line in source
    assert "logging.getLogger(__name__)" in source


@pytest.mark.parametrize("module", ["bitsandbytes", "torchao", "accelerate"])
def test_without_the_extra(module: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for kind in KINDS:
        sentence = said(lambda kind=kind: load(base, dtype=kind))
        assert sentence.endswith("install it with: pip install 'mechlens-toolkit[quantise]'")


def test_a_kind_that_does_not_run_on_a_device_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    folder = Path(save(tmp_path / "tiny"))
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    for kind in ("nf4", "fp8"):
        assert f"{kind} doesn't run on mps; give `device` cpu or cuda" in said(
            lambda kind=kind: load(str(folder), dtype=kind, device="mps")
        )


def test_float32_matmul_stays_what_it_was(base: str) -> None:
    before = torch.get_float32_matmul_precision()
    load(base, dtype="int8")
    assert torch.get_float32_matmul_precision() == before


def test_an_older_record_reads_as_raw() -> None:
    assert Checkpoint("one", "one").regime == "raw"


@pytest.mark.real
def test_a_direction_read_in_int8_is_that_of_float32(
    smollm2: Any, record_property: Callable[[str, object], None]
) -> None:
    """Harmful against harmless at `inst`, 24 prompts of each, over the levels above the embedding."""
    from mechlens.prompts.builtin import builtin_prompts

    asked = [*builtin_prompts("harmful")[:24], *builtin_prompts("harmless")[:24]]
    model = load("smollm2", dtype="int8")
    cosines = []
    acts = [collect(one, asked, positions=["inst"]) for one in (model, smollm2)]
    for level in acts[0].levels[1:]:
        first, second = (mean_difference(one, "harmful", "harmless", level, "inst").vector for one in acts)
        cosines.append(float(cosine(first, second)))
    record_property("smallest cosine, int8 and float32", min(cosines))
    assert min(cosines) > 0.995  # 0.9990; in fp8 it is 0.993 and in nf4 0.90
