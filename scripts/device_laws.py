"""The laws that `check_device.py` tries, each a number that should be small: how far two ways of asking are apart."""

import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import architectures
import torch
from bench_collect import decoder_layers, relative
from device_memory import squeezed
from device_subject import NotHereError, Packed, Subject, behind, hugging_face_residuals, pairs
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from adapters import adapted_logits, save_adapter
from tiny import tiny_hf

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.directions.direction import direction_grid
from mechlens.methods.patching.metrics import LogitDifference
from mechlens.methods.patching.plan import PatchPlan
from mechlens.methods.patching.sweep import patch_sweep
from mechlens.methods.steering.steering import answer_under, logits_under
from mechlens.models.bridge import loaded, n_layers, unembed
from mechlens.models.checkpoints.series import checkpoint_series
from mechlens.models.checkpoints.swap import checkpoint_swapper
from mechlens.models.engine import forward
from mechlens.models.engine.edits import Edit
from mechlens.models.engine.growing import edited_logits, record
from mechlens.models.engine.probes import apart
from mechlens.models.load import load, load_hf
from mechlens.models.native_pass import plain_pass
from mechlens.models.quantise import RUNS_ON
from mechlens.prompts.batch import tokenize

SITES = ("resid_pre", "attn_out", "mlp_out", "z")


def as_hugging_face(one: Subject) -> float:
    """Residuals at every level and two positions: relative distance of a vector."""
    found = collect(one.model, one.batch).values
    with torch.inference_mode():
        right = [hugging_face_residuals(one, i) for i in range(one.n)]
    return relative(found, torch.stack(right))


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
