"""Where a GPU's memory really runs out: what `check_device.py` tries of it."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from device_subject import NotHereError, Subject
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tiny import tiny_tokenizer, words

from mechlens.methods.activations.collect import collect
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.patching.metrics import LogitDifference
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.methods.steering.steering import logits_under
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine.probes import apart
from mechlens.prompts.prompt import Prompt, PromptPair


def squeezed(one: Subject) -> float:
    """Where memory really runs out, halves are run, and give the same: collecting, answering, steering, patching."""
    if torch.device(one.device).type != "cuda":
        raise NotHereError("only a GPU's memory is bounded here")
    model = wide_model(one)
    prompts = [Prompt(str(i), text) for i, text in enumerate(words(300))]
    same = [PromptPair(Prompt(f"c{i}", f"the thing {i:03}"), Prompt(f"d{i}", f"the ring? {i:03}")) for i in range(60)]
    plan = PatchPlan("resid_pre", positions=("inst", "last"), max_tokens=1 << 20)
    add = replace(one.added(1.0), direction=replace(one.direction, vector=torch.ones(1024), level=1), layers=(1,))
    ways: dict[str, Callable[[], Any]] = {
        "collect": lambda: collect(model, prompts, max_tokens=1 << 20).values,
        "answer": lambda: spoken(answer(model, prompts, max_new_tokens=4, max_tokens=1 << 20).tokens, one),
        "steer": lambda: logits_under(model, prompts, [add], max_tokens=1 << 20, force=True),
        "patch": lambda: patch_sweep(model, same, LogitDifference(40, 41), plan).values,
    }
    return max(with_less_memory(way, name) for name, way in ways.items())


def spoken(tokens: tuple[tuple[int, ...], ...], one: Subject) -> Tensor:
    """The answers as numbers; in half precision their number alone, as near ties fall otherwise in other batches."""
    padded = [[*own, *[-1] * (4 - len(own))] for own in tokens]
    return torch.tensor(padded if one.dtype == "float32" else [len(padded)])


def wide_model(one: Subject) -> Any:
    """A random model whose batches take gigabytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=270, hidden_size=1024, intermediate_size=8192, num_hidden_layers=4,
                         num_attention_heads=8, eos_token_id=4, pad_token_id=0, architectures=["LlamaForCausalLM"],
                         torch_dtype=getattr(torch, one.dtype))  # fmt: skip
    hf_model = LlamaForCausalLM(config).to(one.device, getattr(torch, one.dtype)).eval()
    return bridge(hf_model, tiny_tokenizer(), Checkpoint("wide", "wide"))


def with_less_memory(way: Callable[[], Tensor], name: str) -> float:
    """The gap of a result made with half of the memory that it took, which must have run out."""
    way()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    right = way()
    took = torch.cuda.max_memory_allocated() - held
    torch.cuda.empty_cache()
    before = torch.cuda.memory_stats().get("num_ooms", 0)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + took / 2) / total)
    try:
        found = way()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    halved = torch.cuda.memory_stats().get("num_ooms", 0) - before
    print(f"  {name}: took {took / 2**20:.0f} MB; with half of it memory ran out {halved} times", flush=True)
    return apart(found, right) if halved else float("inf")
