"""What the benchmarks run on: a model twice, as mechlens has it and as plain Hugging Face has it, on any device."""

import argparse
import copy
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine import products
from mechlens.models.load import load, load_hf, load_tokenizer
from mechlens.models.precision import chosen_device

SHAPES = {
    "random-llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                        "num_attention_heads": 32},
    "random-llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                        "num_attention_heads": 32},
}  # fmt: skip
"""Llama 3.2 1B's and Llama 3.1 8B's: with random weights as fast as with any, and nothing to fetch."""
TOKENIZER = "smollm2"
"""Of a random model."""


def add_options(parser: argparse.ArgumentParser, model: str) -> None:
    parser.add_argument(
        "--model", default=model, help=f"packaged name, hub id, folder or GGUF file, or one of {', '.join(SHAPES)}"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--mkl", action="store_true", help="with the matrix products that the peers have, on AMD too")


def both(options: argparse.Namespace) -> tuple[Any, Any]:
    """The bridged model, and a copy that was never bridged."""
    if options.mkl:
        products.mkl_is_slow = lambda: False
    device = chosen_device(options.device)
    if options.model not in SHAPES:
        plain, _ = load_hf(options.model, dtype=options.dtype)
        return load(options.model, device=device, dtype=options.dtype), plain.to(device)
    plain = random_llama(SHAPES[options.model], device, options.dtype)
    name = Checkpoint(options.model, options.model)
    return bridge(copy.deepcopy(plain), load_tokenizer(TOKENIZER), name), plain


def random_llama(shape: dict[str, int], device: str, dtype: str) -> Any:
    config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, bos_token_id=1,
                         eos_token_id=2, architectures=["LlamaForCausalLM"], **shape)  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        kind = getattr(torch, "float32" if dtype == "auto" else dtype)
        return AutoModelForCausalLM.from_config(config, dtype=kind).eval()


def where(model: Any) -> str:
    """The device and the type, for the first line."""
    weight = next(model.parameters())
    name = torch.cuda.get_device_name() if weight.is_cuda else f"{torch.get_num_threads()} threads"
    return f"{name}, {str(weight.dtype).removeprefix('torch.')}, torch {torch.__version__}"


def clock() -> float:
    """Seconds of the wall, once a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
