"""The laws that mechlens is tested by, on a device and in a type of your own: a table with a verdict for each.

    .venv/bin/python scripts/check_device.py --device cuda --dtype bfloat16 [--model smollm2] [--architectures all]

First what a model says and has there against plain Hugging Face on the same device: a tiny random one, or --model.
Then every architecture asked for, as in the table of `scripts/architectures.py`. The last line is one JSON object; the
exit status is 1 where anything is wrong.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import architectures
import torch
from bench_collect import decoder_layers, relative
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from adapters import adapted_logits, save_adapter
from saved import save_model
from tiny import CONFIGS, MORE, tiny_hf, tiny_tokenizer, words

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.directions.direction import Direction, direction_grid
from mechlens.methods.patching.metrics import LogitDifference
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.methods.steering.interventions import ALL, Add
from mechlens.methods.steering.steering import answer_under, logits_under
from mechlens.models.bridge import bridge, loaded, n_layers, unembed
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.series import checkpoint_series
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.engine import forward
from mechlens.models.engine.edits import Edit
from mechlens.models.engine.growing import edited_logits, record
from mechlens.models.engine.probes import apart
from mechlens.models.load import load, load_hf
from mechlens.models.native_pass import plain_pass
from mechlens.models.precision import chosen_device
from mechlens.models.quantise import RUNS_ON
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.builtin import builtin_prompts
from mechlens.prompts.prompt import Prompt, PromptPair

JUMPY = ("glm_moe_dsa",)
"""Where one rounding in half precision makes attention choose other tokens: plain float32 is as far from it."""
TOO_NARROW = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu")
"""Whose heads, as tiny models have them, plain Hugging Face can't decode with in half precision on a GPU: PyTorch
2.11 gives them to cuDNN's attention, which fails."""
SITES = ("resid_pre", "attn_out", "mlp_out", "z")


class NotHereError(Exception):
    """A law that can't be tried on this device, in this type or with the libraries that are there."""


@dataclass(frozen=True)
class Subject:
    """A model, on the device as mechlens has it and as plain Hugging Face has it, and what is asked of it."""

    name: str
    device: str
    dtype: str
    scratch: Path
    n: int

    @cached_property
    def model(self) -> Any:
        return load(self.name, device=self.device, dtype=self.dtype)

    @cached_property
    def plain(self) -> Any:
        return load_hf(self.name, dtype=self.dtype)[0].to(self.device)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Of two kinds, one half after the other."""
        half = self.n // 2
        if Path(self.name).is_dir():
            kinds = ["harmful"] * half + ["harmless"] * half
            texts = zip(words(self.n), kinds, strict=True)
            return [Prompt(f"p{i}", text, kind) for i, (text, kind) in enumerate(texts)]
        return builtin_prompts("harmful")[:half] + builtin_prompts("harmless")[:half]

    @cached_property
    def batch(self) -> TokenBatch:
        return tokenize(self.prompts, template_of(self.model))

    def rows(self) -> list[list[int]]:
        return [self.batch.row(i) for i in range(self.n)]

    def ids(self, tokens: Any) -> Tensor:
        return torch.tensor([list(tokens)], device=self.device)

    def added(self, strength: float) -> Add:
        """A random direction, half as long as the residual it is added to, at every token of prompt and answer."""
        return Add(self.direction, strength=strength, unit="raw", layers=(n_layers(self.model) // 2,), positions=ALL,
                   phase="both")  # fmt: skip

    @cached_property
    def direction(self) -> Direction:
        level = n_layers(self.model) // 2
        lengths = collect(self.model, self.batch, positions=["last"], levels=[level]).values.norm(dim=-1)
        found = architectures.direction(self.model)
        return replace(found, vector=found.vector / found.vector.norm() * lengths.mean() / 2, level=level)

    @property
    def rounding(self) -> float:
        return architectures.rounding(self.plain)


def as_hugging_face(one: Subject) -> float:
    """Residuals at every level and two positions: relative distance of a vector."""
    found = collect(one.model, one.batch).values
    with torch.inference_mode():
        right = [hugging_face_residuals(one, i) for i in range(one.n)]
    return relative(found, torch.stack(right))


def hugging_face_residuals(one: Subject, i: int) -> Tensor:
    """Of one prompt alone, by hooks: (level, position, d_model)."""
    seen: list[Tensor] = []
    layers = decoder_layers(one.plain)
    entering = [layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    ) for layer in layers]  # fmt: skip
    leaving = layers[-1].register_forward_hook(
        lambda module, args, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    one.plain(one.ids(one.rows()[i]), use_cache=False)
    for handle in (*entering, leaving):
        handle.remove()
    places = torch.tensor([int(one.batch.at(name)[i]) - one.batch.offset(i) for name in ("inst", "last")])
    return torch.stack([x[0].float().cpu()[places] for x in seen])


def answers(one: Subject) -> float:
    """How far any answer token stands behind the likeliest of a whole pass: so decoding with a cache loses nothing."""
    found = answer(one.model, one.batch, max_new_tokens=12)
    return max(behind(one, ids, tokens) for ids, tokens in zip(one.rows(), found.tokens, strict=True))


def steered(one: Subject) -> float:
    """The same of answers under an addition, and of a hook that adds."""
    found = answer_under(one.model, one.batch, [one.added(1.0)], max_new_tokens=12)
    vector, layer = one.direction.vector, decoder_layers(one.plain)[n_layers(one.model) // 2]
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0] + vector.to(args[0]), *args[1:]))
    try:
        return max(behind(one, ids, tokens) for ids, tokens in zip(one.rows(), found.tokens, strict=True))
    finally:
        handle.remove()


@torch.inference_mode()
def behind(one: Subject, ids: list[int], tokens: tuple[int, ...]) -> float:
    if not tokens:
        return 0.0
    logits = one.plain(one.ids([*ids, *tokens]), use_cache=False).logits[0, len(ids) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1)
    return float(((logits.amax(dim=-1) - chosen) / logits.abs().amax(dim=-1)).max())


def generate(one: Subject) -> float:
    """The share of tokens that are other ones than Hugging Face's `generate` gives, one prompt at a time."""
    found = answer(one.model, one.batch, max_new_tokens=12).tokens
    wrong = 0
    for ids, tokens in zip(one.rows(), found, strict=True):
        start = one.ids(ids)
        out = one.plain.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=12, do_sample=False)
        theirs = out[0, len(ids) :].tolist()[: len(tokens)]
        wrong += sum(a != b for a, b in zip(tokens, theirs, strict=True))
    return wrong / max(1, sum(map(len, found)))


def added_nothing(one: Subject) -> float:
    """Answers and logits under an addition of strength 0."""
    nothing = [one.added(0.0)]
    same = answer_under(one.model, one.batch, nothing, max_new_tokens=8).tokens
    if same != answer_under(one.model, one.batch, [], max_new_tokens=8).tokens:
        return float("inf")
    return apart(logits_under(one.model, one.batch, nothing), logits_under(one.model, one.batch, []))


def padding(one: Subject) -> float:
    """Padded left and right: bit for bit the same."""
    left = tokenize(one.prompts, template_of(one.model), padding_side="left")
    return apart(collect(one.model, left).values, collect(one.model, one.batch).values)


def alone(one: Subject) -> float:
    """Each prompt in a batch of its own."""
    every = [collect(one.model, [prompt]).values for prompt in one.prompts]
    return relative(torch.cat(every), collect(one.model, one.batch).values)


def unpacked(one: Subject) -> float:
    """Padded batches in place of one line of tokens."""
    right = collect(one.model, one.batch).values
    with mock.patch.object(forward, "packs", return_value=False):
        return relative(collect(one.model, one.batch).values, right)


def twice(one: Subject) -> float:
    """The same call again: bit for bit the same."""
    first, again = (collect(one.model, one.batch).values for _ in range(2))
    return apart(first, again)


def put_back(one: Subject) -> float:
    """A run's own values, patched into it."""
    gaps, ids, layers = [], one.rows()[0], range(n_layers(one.model))
    for site in SITES:
        own = record(one.model, ids, len(ids) - 1, site, layers)
        heads = 1 if own.values[0].ndim == 3 else None
        edits = [Edit(k, len(ids) - 3, own.values[k][len(ids) - 3][() if heads is None else heads], heads)
                 for k in layers]  # fmt: skip
        gaps += [apart(row, own.logits) for row in edited_logits(one.model, own, site, edits, len(ids) - 1)]
    return max(gaps)


def pairs(one: Subject) -> list[PromptPair]:
    """Pairs of requests of one length."""
    text = ("How do I make a {} at home?", "Tell me about a {} please")
    return [
        PromptPair(Prompt(f"c{i}", t.format("cake")), Prompt(f"d{i}", t.format("bomb"))) for i, t in enumerate(text)
    ]


def swept(one: Subject) -> float:
    """A patch sweep against passes with TransformerLens' hooks, site by site, as a share of the largest logit."""
    gaps = []
    for site in SITES:
        plan = PatchPlan(site, layers=(0, n_layers(one.model) - 1), positions=("inst", "last"))
        quick, slow = (
            patch_sweep(one.model, pairs(one), LogitDifference(40, 41), plan, engine=how).values
            for how in ("auto", "plain")
        )
        gaps.append(float((quick - slow).abs().max()))
    return max(gaps) / float(logits_under(one.model, one.batch, []).abs().max())


def attributed(one: Subject) -> float:
    """Attribution patching, which goes backwards too, against the same on the CPU."""
    plan = PatchPlan("resid_pre", positions=("inst", "last"))
    here, there = (
        patch_sweep(model, pairs(one), LogitDifference(40, 41), plan, engine="attribution").values
        for model in (one.model, load(one.name, device="cpu", dtype=one.dtype))
    )
    return apart(here, there)


def lens(one: Subject) -> float:
    """The logit lens at the last level against the model's own logits."""
    last = collect(one.model, one.batch, positions=["last"], levels=[n_layers(one.model)]).values[:, 0, 0]
    return apart(unembed(one.model, last), logits_under(one.model, one.batch, []))


def watched(one: Subject) -> float:
    """A look into a model that is being trained."""
    found = plain_pass(one.plain, one.batch, ("inst", "last"), range(n_layers(one.model) + 1))
    return relative(found.residuals, collect(one.model, one.batch).values)


def as_on_the_cpu(one: Subject) -> float:
    """Mean-difference directions of every level against those of float32 on the CPU: 1 - cosine."""
    there = load(one.name, device="cpu", dtype="float32")
    grids = [direction_grid(collect(model, one.prompts, positions=["last"]), "harmful", "harmless")
             for model in (one.model, there)]  # fmt: skip
    here, right = ([grid.at(k, "last").vector for k in range(1, n_layers(there) + 1)] for grid in grids)
    return 1 - min(float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(here, right, strict=True))


def fingerprint(one: Subject) -> float:
    """The weights' fingerprint is that of the same weights on the CPU."""
    there = load(one.name, device="cpu", dtype=one.dtype)
    return float(loaded(one.model).checkpoint.fingerprint != loaded(there).checkpoint.fingerprint)


def merged(one: Subject) -> float:
    """Logits with an adapter merged in against peft's own model, on the CPU in float32."""
    adapter = save_adapter(one.name, one.scratch / "adapter", seed=1, size=0.02)
    found = load(one.name, adapter=str(adapter), device=one.device, dtype=one.dtype)
    right = [adapted_logits(one.name, str(adapter), torch.tensor([ids]))[0, -1] for ids in one.rows()[:4]]
    return apart(logits_under(found, one.batch.select(range(4)), []), torch.stack(right))


def took_turns(one: Subject) -> float:
    """Two adapters in turn in one model, and the base again: bit for bit what loading each gives."""
    for i in (1, 2):
        save_adapter(one.name, one.scratch / "series" / f"checkpoint-{i}", seed=i, size=0.02)
    series = checkpoint_series(one.name, [str(one.scratch / "series")])
    gaps = []
    with checkpoint_swapper(one.name, device=one.device, dtype=one.dtype) as swapper:
        for member in (*series.members[1:], series.base):
            found = collect(swapper.put(member), one.batch).values
            adapter = None if member is series.base else member.path
            right = load(one.name, adapter=adapter, device=one.device, dtype=one.dtype)
            gaps.append(apart(found, collect(right, one.batch).values))
    return max(gaps)


def spread(one: Subject) -> float:
    """By `device_map="auto"`, and by a map that names every block: residuals and answers."""
    names = architectures.every_other_block(one.plain)
    index: str | int = 0 if torch.device(one.device).type == "cuda" else "cpu"
    gaps = []
    for places in ("auto", dict.fromkeys(names, index)):
        model = load(one.name, device_map=places, dtype=one.dtype)
        gaps.append(apart(collect(model, one.batch).values, collect(one.model, one.batch).values))
        same = (
            answer(model, one.batch, max_new_tokens=8).tokens == answer(one.model, one.batch, max_new_tokens=8).tokens
        )
        gaps.append(0.0 if same else float("inf"))
    return max(gaps)


def as_two_devices(one: Subject) -> float:
    """What `tests/test_devices.py` tries on make-believe devices: here and on the CPU, in float32."""
    import test_devices

    if one.dtype != "float32":
        raise NotHereError("compared with the CPU in float32 only")
    gaps = {}
    for name, case in test_devices.CASES.items():
        right = case(test_devices.bridged())
        with mock.patch.object(test_devices, "tiny_hf", side_effect=lambda: tiny_hf().to(one.device)):
            found = case(test_devices.bridged())
        tensors = isinstance(right, Tensor)
        gaps[name] = apart(found, right) if tensors else 0.0 if found == right else float("inf")
    print("  " + ", ".join(f"{name} {gap:.0e}" for name, gap in gaps.items()), flush=True)
    return max(gaps.values())


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


def packed_weights(kind: str) -> Callable[[Subject], float]:
    def law(one: Subject) -> float:
        try:
            model = load(one.name, device=one.device, dtype=kind)
        except UserError as error:
            raise NotHereError(str(error)) from error
        plain = load_hf(one.name, dtype=kind, device_map=one.device)[0]
        return as_hugging_face(Packed(model, plain, one))

    law.__doc__ = f"{kind} weights: residuals against plain Hugging Face on the same weights."
    return law


class Packed(Subject):
    """A subject with other weights."""

    def __init__(self, model: Any, plain: Any, like: Subject) -> None:
        super().__init__(like.name, like.device, like.dtype, like.scratch, like.n)
        vars(self).update(model=model, plain=plain)


EXACT = "exact"
LAWS: dict[str, tuple[Callable[[Subject], float], str]] = {
    "collect = Hugging Face": (as_hugging_face, "rounding"),
    "collect twice": (twice, EXACT),
    "left padding = right padding": (padding, EXACT),
    "batch = one at a time": (alone, "rounding"),
    "packed = padded": (unpacked, "rounding"),
    "answers are the likeliest tokens": (answers, "rounding"),
    "answers = generate": (generate, "share"),
    "steered = a hook": (steered, "rounding"),
    "steering by zero changes nothing": (added_nothing, "rounding"),
    "own values put back change nothing": (put_back, "rounding"),
    "patch sweep = TransformerLens' hooks": (swept, "rounding"),
    "attribution = the CPU's": (attributed, "attribution"),
    "logit lens = logits": (lens, "rounding"),
    "a look into training": (watched, "rounding"),
    "directions = the CPU's in float32": (as_on_the_cpu, "rounding"),
    "fingerprint = the CPU's": (fingerprint, EXACT),
    "adapter merged = peft": (merged, "rounding"),
    "checkpoints in turn = loaded": (took_turns, EXACT),
    "device map = one device": (spread, EXACT),
    "whatever else = the CPU's": (as_two_devices, "rounding"),
    "memory runs out": (squeezed, "rounding"),
    **{f"{kind} = Hugging Face": (packed_weights(kind), "half") for kind in RUNS_ON},
}


def limit(of: str, one: Subject) -> float:
    """How much may be between two ways; of a share of answer tokens, where near ties fall otherwise, a tenth."""
    half = architectures.HALF
    return {EXACT: 0.0, "rounding": one.rounding, "half": half, "attribution": 0.2 if one.dtype != "float32" else 1e-3,
            "share": 0.0 if one.dtype == "float32" else 0.25}[of]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--model", help="packaged name, hub id or folder; without it a tiny random one")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--laws", nargs="*", default=list(LAWS), metavar="LAW", help="none to leave them out")
    parser.add_argument("--architectures", nargs="*", default=list(CONFIGS), help="names, or all")
    args = parser.parse_args()
    device = chosen_device(args.device)
    names = sorted(CONFIGS | MORE) if args.architectures == ["all"] else args.architectures
    warnings.simplefilter("ignore")
    print(f"{torch.cuda.get_device_name() if 'cuda' in device else device}, {args.dtype}, {architectures.versions()}")
    with tempfile.TemporaryDirectory() as scratch:
        name = args.model or str(save_model(Path(scratch) / "tiny"))
        one = Subject(name, device, args.dtype, Path(scratch), args.prompts)
        wrong = [law for law in args.laws if not holds(law, one)]
    if args.dtype != "float32":
        names = [name for name in names if name not in (*JUMPY, *TOO_NARROW)]
    wrong += [f"{name}: {cell}" for name in names for cell in architecture(name, device, args.dtype)]
    print(json.dumps({"device": device, "dtype": args.dtype, "wrong": wrong}))
    raise SystemExit(bool(wrong))


def holds(law: str, one: Subject) -> bool:
    """Tries a law and prints its line."""
    run, of = LAWS[law]
    start = time.perf_counter()
    try:
        gap = run(one)
        most = limit(of, one)
        verdict, told = ("holds" if gap <= most else "WRONG"), f"{gap:.1e} of {most:.0e}"
    except NotHereError as error:
        verdict, told = "not here", str(error)[:90]
    except Exception as error:  # any error is a finding of this script
        verdict, told = "FAILED", f"{type(error).__name__}: {error}"[:300]
        traceback.print_exc()
    print(f"{law:<38}{verdict:<10}{time.perf_counter() - start:6.1f} s  {told}", flush=True)
    return verdict in ("holds", "not here")


def architecture(name: str, device: str, dtype: str) -> list[str]:
    """Prints an architecture's line; its cells that are wrong."""
    start = time.perf_counter()
    try:
        cells = architectures.row(name, device, getattr(torch, dtype))
    except Exception as error:  # any error is a finding of this script
        traceback.print_exc()
        if "CUDA error" in str(error):  # nothing can be computed in this process any more
            print(f"{name}: FAILED, and what follows was not tried: {error}"[:300], flush=True)
            raise SystemExit(1) from error
        cells = {"row": f"FAILED: {type(error).__name__}: {error}"[:300]}
    wrong = [f"{column} {cell}" for column, cell in cells.items() if "WRONG" in cell or "FAILED" in cell]
    told = "; ".join(wrong) or cells.get("refused", " ".join(cells.get(c, "") for c in architectures.COLUMNS[:6]))
    print(
        f"{name:<22}{'WRONG' if wrong else 'holds':<10}{time.perf_counter() - start:6.1f} s  {told[:200]}", flush=True
    )
    return wrong


if __name__ == "__main__":
    main()
