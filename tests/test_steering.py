"""Laws of steering: cached, batched and shared runs equal whole recomputation, one prompt at a time, by plain hooks."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
import transformers
from caches import DictShelf
from tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer, words
from torch import Tensor

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.directions.direction import Direction, project
from mechlens.methods.steering import steered_batch as batching
from mechlens.methods.steering.interventions import (
    ALL,
    EVERYWHERE,
    Ablate,
    Add,
    Intervention,
    Replace,
    ReplaceComponent,
    replacement,
    residual_norms,
)
from mechlens.methods.steering.starts import rows_with_starts
from mechlens.methods.steering.steering import SteeredAnswers, answer_under, applied, logits_under
from mechlens.models.bridge import _count_hooks, bridge, checkpoint_now, has_hooks
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.engine import forward
from mechlens.models.engine.intervene.changed import bears_fast
from mechlens.models.sites import CHANGEABLE, level_hook, site_hook
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt

pytestmark = pytest.mark.exact

NEW = 5
MODELS: list[Any] = []
FEW = ("llama", "mistral", "gemma2", "gpt2", "neox", "bloom", "opt")


@functools.cache
def made(architecture: str) -> Any:
    """A tiny model whose answers differ from prompt to prompt; leave no hook on it."""
    hf_model = tiny_hf(architecture)
    if not architecture.startswith("gemma"):
        for parameter in hf_model.parameters():
            parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    checkpoint = Checkpoint("tiny", "tests/tiny", fingerprint=weight_fingerprint(hf_model.state_dict()))
    MODELS.append(bridge(hf_model, tiny_tokenizer(), checkpoint))
    return MODELS[-1]


@functools.cache
def batch_of(architecture: str, n: int = 4, side: str = "right") -> TokenBatch:
    prompts = [Prompt(id=f"p{i}", text=text) for i, text in enumerate(words(n))]
    return tokenize(prompts, template_of(made(architecture)), padding_side=side)


@functools.cache
def residuals(architecture: str) -> Activations:
    return collect(made(architecture), batch_of(architecture), positions=("inst", "post[*]"))


@functools.cache
def direction(architecture: str, seed: int = 0) -> Direction:
    """A random direction as long as the residual stream at level 1."""
    acts = residuals(architecture)
    vector = torch.randn(acts.values.shape[-1], generator=torch.Generator().manual_seed(seed))
    length = residual_norms(acts).at(1, "inst")
    return Direction(
        vector=vector / vector.norm() * length, level=1, position="inst", site="resid", method="random",
        contrast=("a", "b"), checkpoint=checkpoint_now(made(architecture)), template=acts.template, train_ids=(),
    )  # fmt: skip


def add(architecture: str, strength: float = 1.0, **options: Any) -> Add:
    options = {"layers": (1,), "positions": ALL, "phase": "both", "unit": "raw", "seed": 0} | options
    return Add(direction(architecture, options.pop("seed")), strength=strength, **options)


def ablate(architecture: str, **options: Any) -> Ablate:
    options = {"layers": ALL, "positions": ALL, "phase": "both", "sites": EVERYWHERE, "seed": 0} | options
    return Ablate(direction(architecture, options.pop("seed")), **options)


@pytest.fixture(autouse=True)
def _no_hook_is_left() -> Iterator[None]:
    yield
    assert not any(has_hooks(model) for model in MODELS)


# What the methods are compared with: whole passes by TransformerLens' hooks, one prompt at a time.


def hooked(one: Intervention, tokens: Sequence[int], n_layers: int) -> list[tuple[str, Callable[..., Tensor]]]:
    """The intervention at the given tokens, written down once more and otherwise."""
    index = list(tokens)
    if isinstance(one, Replace):
        values = dict(zip(one.layers, one.values, strict=True))
        return [(site_hook(one.site, layer), functools.partial(_put, own, index)) for layer, own in values.items()]
    unit = one.direction.vector / one.direction.vector.norm()

    def edit(x: Tensor, hook: Any) -> Tensor:
        rows = x.clone() if x.ndim == 3 else x.clone().unsqueeze(0)
        own = rows[0, index]
        if isinstance(one, Add):
            rows[0, index] = own + one.strength * one.direction.vector
        else:
            value = one.value * float(one.direction.vector.norm()) if isinstance(one, ReplaceComponent) else 0.0
            rows[0, index] = own - torch.outer(own @ unit, unit) + value * unit
        return rows.reshape(x.shape)

    layers = range(n_layers) if one.layers == ALL else one.layers
    sites = one.sites if isinstance(one, Ablate) else (one.site,)
    return [(site_hook(site, layer), edit) for site in sites for layer in layers]


def _put(values: Tensor, index: list[int], x: Tensor, hook: Any) -> Tensor:
    rows = x.clone() if x.ndim == 3 else x.clone().unsqueeze(0)
    rows[0, index] = values.to(x)
    return rows.reshape(x.shape)


def tokens_touched(one: Intervention, batch: TokenBatch, row: int, now: int) -> list[int]:
    prompt = len(batch.row(row))
    if not isinstance(one, Replace) and one.answer_tokens is not None:
        now = min(now, prompt + one.answer_tokens)
    if one.positions != ALL:
        return [int(batch.at(name)[row]) - batch.offset(row) for name in one.positions]
    return [*range(prompt if one.phase != "generation" else 0), *range(prompt if one.phase != "prompt" else now, now)]


@torch.inference_mode()
def recomputed(model: Any, batch: TokenBatch, row: int, given: Sequence[Intervention], ids: list[int]) -> Tensor:
    """Logits at every one of `ids`, a prompt and perhaps some of its answer, in one pass without a cache."""
    hooks = [h for one in given for h in hooked(one, tokens_touched(one, batch, row, len(ids)), model.cfg.n_layers)]
    logits: Tensor = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)[0]
    return logits


def first_logits(model: Any, batch: TokenBatch, rows: Sequence[Sequence[Intervention]]) -> Tensor:
    return torch.stack([recomputed(model, batch, i, given, batch.row(i))[-1] for i, given in enumerate(rows)])


def told(
    model: Any, batch: TokenBatch, rows: Sequence[Sequence[Intervention]], answers: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """What follows on the prompt and each token of its answer: the answers themselves, if they are right."""
    found = []
    for i, (given, said) in enumerate(zip(rows, answers, strict=True)):
        ids = batch.row(i) + list(said)
        likeliest = recomputed(model, batch, i, given, ids).argmax(dim=-1).tolist()
        new = likeliest[len(batch.row(i)) - 1 :][:NEW]
        found.append(tuple(new[: new.index(4)] if 4 in new else new))
    return tuple(found)


def kinds(architecture: str, phase: str) -> list[list[Intervention]]:
    """A different intervention in each of four rows: another strength, kind, direction, and none at all."""
    return [
        [add(architecture, -1.5, phase=phase)],
        [ablate(architecture, phase=phase), add(architecture, 0.7, phase=phase, layers=(0, 2), seed=1)],
        [],
        [ReplaceComponent(
            direction(architecture, 2), value=1.2, unit="raw", layers=(1, 2), positions=ALL, phase=phase,
        )],
    ]  # fmt: skip


@pytest.mark.parametrize("phase", ["prompt", "generation", "both"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_answers_of_a_mixed_batch_equal_recomputation_one_at_a_time(architecture: str, phase: str) -> None:
    model, batch = made(architecture), batch_of(architecture)
    rows = kinds(architecture, phase)
    got = answer_under(model, batch, rows, max_new_tokens=NEW)
    assert got.engine == "fast"
    assert got.tokens == told(model, batch, rows, got.tokens)
    assert isinstance(got, SteeredAnswers)
    assert got.interventions[1] == tuple(rows[1])
    # And they matter:
    assert got.tokens != answer(model, batch, max_new_tokens=NEW).tokens
    logits = logits_under(model, batch, rows)
    own = first_logits(model, batch, rows)
    assert float((logits - own).abs().max()) < 1e-4 * float(own.abs().max())
    bare = logits_under(model, batch, [])
    moved = (logits - bare).abs().amax(dim=1) > 1e-3 * float(bare.abs().max())
    assert moved.tolist() == ([False] * 4 if phase == "generation" else [True, True, False, True])


@pytest.mark.parametrize("phase", ["prompt", "generation", "both"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
def test_the_plain_engine_without_a_cache_gives_the_same(
    architecture: str, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = made(architecture), batch_of(architecture)
    rows = kinds(architecture, phase)
    fast, logits = answer_under(model, batch, rows, max_new_tokens=NEW), logits_under(model, batch, rows)
    monkeypatch.setattr(forward, "fits_fast_path", lambda model: False)
    plain = answer_under(model, batch, rows, max_new_tokens=NEW)
    assert (fast.engine, plain.engine) == ("fast", "plain")
    assert plain.tokens == fast.tokens
    assert torch.allclose(logits_under(model, batch, rows), logits, atol=1e-4 * float(logits.abs().max()))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("phase", ["generation", "both"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_only_the_first_answer_tokens_are_changed(
    architecture: str, phase: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zhao et al. 2025 have three phases: the prompt, the prompt and the first tokens, everything."""
    model, batch = made(architecture), batch_of(architecture)
    rows: list[list[Intervention]] = [
        [add(architecture, -1.5, phase=phase, answer_tokens=k)],
        [ablate(architecture, phase=phase, answer_tokens=k), add(architecture, 0.7, phase=phase, seed=1)],
        [add(architecture, 2.0, phase=phase, answer_tokens=k + 1)],
        [add(architecture, 2.0, phase=phase)],
    ]
    got = answer_under(model, batch, rows, max_new_tokens=NEW)
    assert got.engine == "fast"
    assert got.tokens == told(model, batch, rows, got.tokens)
    monkeypatch.setattr(forward, "fits_fast_path", lambda model: False)
    assert answer_under(model, batch, rows, max_new_tokens=NEW).tokens == got.tokens


def test_pieces_of_different_phases_are_not_mixed_up() -> None:
    model, batch, cache = made("llama"), batch_of("llama"), DictShelf()
    for k in (1, 2, None):
        answer_under(model, batch, [add("llama", 3.0, answer_tokens=k)], max_new_tokens=NEW, cache=cache)
    assert len(cache.pieces) == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_blocks_output_is_the_next_level(architecture: str) -> None:
    model, batch = made(architecture), batch_of(architecture)
    last = model.cfg.n_layers - 1

    def rows(site: str, layer: int, phase: str) -> list[list[Intervention]]:
        """Additions and a component set, each in rows of its own, and a row with nothing."""
        options: dict[str, Any] = {"layers": (layer,), "phase": phase, "site": site}
        component = ReplaceComponent(direction(architecture, 2), value=1.2, unit="raw", positions=ALL, **options)
        return [[add(architecture, -1.5, **options)], [component], [], [add(architecture, 0.7, seed=1, **options)]]

    for layer in range(last):
        above, here = rows("resid_pre", layer + 1, "both"), rows("resid_post", layer, "both")
        got = logits_under(model, batch, here)
        assert torch.allclose(got, logits_under(model, batch, above), rtol=0, atol=1e-5 * float(got.abs().max()))
    here = rows("resid_post", last, "both")
    got, own = logits_under(model, batch, here), first_logits(model, batch, here)
    assert float((got - own).abs().max()) < 1e-4 * float(own.abs().max())
    said = answer_under(model, batch, here, max_new_tokens=NEW)
    assert said.engine == "fast"
    assert said.tokens == told(model, batch, here, said.tokens)
    # With no block above, what is added goes straight to the final norm.
    bare = logits_under(model, batch, [])
    assert ((got - bare).abs().amax(dim=1) > 1e-3 * float(bare.abs().max())).tolist() == [True, True, False, True]


def test_a_share_at_a_blocks_output_is_of_the_level_above() -> None:
    model, batch = made("llama"), batch_of("llama")
    norms = residual_norms(residuals("llama"))
    for layer, name in ((0, "inst"), (2, "last")):
        options: dict[str, Any] = {"layers": (layer,), "positions": (name,), "phase": "prompt", "site": "resid_post"}
        share = logits_under(model, batch, [add("llama", 0.5, unit="share", norms=norms, **options)])
        raw = 0.5 * norms.at(layer + 1, name)
        assert torch.allclose(share, logits_under(model, batch, [add("llama", raw, unit="unit", **options)]), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_positions_by_role_whatever_the_padding(architecture: str, side: str) -> None:
    model, batch = made(architecture), batch_of(architecture, side=side)
    given = [add(architecture, 2.0, positions=("inst", "last"), phase="prompt")]
    got = answer_under(model, batch, given, max_new_tokens=NEW)
    assert got.tokens == told(model, batch, [given] * 4, got.tokens)
    assert got.tokens != answer(model, batch, max_new_tokens=NEW).tokens


@pytest.mark.parametrize(
    ("architecture", "max_tokens"), [("llama", 1), ("llama", 120), ("mistral", 100_000), ("gpt2", 100_000)]
)
def test_a_sweep_shares_the_start_of_prompts_and_stays_exact(architecture: str, max_tokens: int) -> None:
    model, whole = made(architecture), batch_of(architecture)
    settings: list[list[Intervention]] = [
        [],
        [add(architecture, 1.0, phase="prompt")],
        [add(architecture, -2.0, layers=(0,))],
        [add(architecture, 1.0, positions=("token[0:6]",), phase="prompt")],
        [add(architecture, 1.0, positions=("inst",), phase="prompt")],
        [ablate(architecture, sites=("mlp_out",))],
    ]
    rows = [setting for setting in settings for _ in range(4)]
    batch = whole.select(list(range(4)) * len(settings))
    work = batching.steered_batch(model, batch, rows, "tokenizer", False, 0)
    ids = [tuple(batch.row(i)) for i in range(len(rows))]
    skip, shared = rows_with_starts(ids, work.changes, fast=True)
    assert skip > 10
    # Untouched starts and those of `inst` are one; every setting that touches the start has its own.
    assert [len({shared[4 * s + i].common for i in range(4)}) for s in range(6)] == [1] * 6
    assert len({row.common for row in shared}) == 5
    got = answer_under(model, batch, rows, max_new_tokens=NEW, max_tokens=max_tokens)
    for i in range(1, len(rows), 4):
        alone = answer_under(model, batch.select([i]), [rows[i]], max_new_tokens=NEW)
        assert got.tokens[i] == alone.tokens[0]
    assert got.tokens[:4] == answer(model, whole, max_new_tokens=NEW).tokens
    assert len(set(got.tokens)) > 12


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_strength_0_changes_nothing(architecture: str) -> None:
    model, batch = made(architecture), batch_of(architecture)
    nothing = [add(architecture, 0.0), add(architecture, 0.0, layers=(0, 1, 2), seed=1)]
    assert torch.equal(logits_under(model, batch, nothing), logits_under(model, batch, []))
    assert torch.equal(logits_under(model, batch, [nothing, [], nothing, []]), logits_under(model, batch, []))
    untouched = answer(model, batch, max_new_tokens=NEW).tokens
    assert answer_under(model, batch, nothing, max_new_tokens=NEW).tokens == untouched
    # A row of strength 0 beside rows that are pushed.
    mixed = logits_under(model, batch, [nothing, [add(architecture)], [add(architecture)], nothing])
    bare = logits_under(model, batch, [])
    assert torch.allclose(mixed[[0, 3]], bare[[0, 3]], rtol=0, atol=1e-5 * float(bare.abs().max()))
    assert float((mixed[1] - bare[1]).abs().max()) > 1e-2 * float(bare.abs().max())


@pytest.mark.parametrize("architecture", FEW)
def test_adding_and_taking_away_restores(architecture: str) -> None:
    model, batch = made(architecture), batch_of(architecture)
    bare = logits_under(model, batch, [])
    there_and_back = logits_under(model, batch, [add(architecture, 3.0), add(architecture, -3.0)])
    assert float((there_and_back - bare).abs().max()) < 1e-4 * float(bare.abs().max())
    assert float((logits_under(model, batch, [add(architecture, 3.0)]) - bare).abs().max()) > 1e-2


@torch.inference_mode()
def seen(model: Any, batch: TokenBatch, row: int, names: Sequence[str], given: Sequence[Intervention]) -> list[Tensor]:
    """What later readers see at hook points while one prompt runs under interventions."""
    one = batch.select([row])
    tokens = torch.tensor([batch.row(row)])
    with applied(model, given, one if batch.offset(row) == 0 and len(one.row(0)) == one.tokens.shape[1] else None):
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names)
    return [cache[name].reshape(1, -1, cache[name].shape[-1])[0] for name in names]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_after_ablation_the_projection_is_0_at_every_site_asked_for(architecture: str) -> None:
    model, batch = made(architecture), batch_of(architecture)
    names = [site_hook(site, layer) for site in EVERYWHERE for layer in range(3)] + [level_hook(model, 3)]
    before = seen(model, batch, 0, names, [])
    after = seen(model, batch, 0, names, [ablate(architecture)])

    def share(values: Tensor) -> float:
        return float((project(values, direction(architecture)).abs() / values.norm(dim=-1)).max())

    assert min(share(values) for values in before) > 1e-2
    assert max(share(values) for values in after) < 1e-5
    # Where only some sites are asked for, the others still hold the direction.
    some = seen(model, batch, 0, names, [ablate(architecture, sites=("resid_pre",), layers=(1,))])
    assert share(some[1]) < 1e-5
    assert torch.equal(some[0], before[0])
    assert share(some[2]) > 1e-3


@pytest.mark.parametrize("architecture", FEW)
def test_an_addition_changes_its_own_layer_by_its_vector_and_nothing_below(architecture: str) -> None:
    model, batch = made(architecture), batch_of(architecture)
    names = [level_hook(model, level) for level in range(4)]
    for layer in range(3):
        before = seen(model, batch, 1, names, [])
        after = seen(model, batch, 1, names, [add(architecture, 0.5, layers=(layer,))])
        vector = direction(architecture).vector
        for level in range(layer):
            assert torch.equal(before[level], after[level])
        assert torch.allclose(after[layer] - before[layer], 0.5 * vector.expand_as(before[layer]), atol=1e-3)
        assert float((after[layer + 1] - before[layer + 1]).abs().max()) > 1e-3


def test_a_component_is_set_to_the_value() -> None:
    model, batch = made("llama"), batch_of("llama")
    one = ReplaceComponent(direction("llama"), value=7.0, unit="unit", layers=(2,), positions=ALL, phase="both")
    name = level_hook(model, 2)
    (before,), (after,) = seen(model, batch, 0, [name], []), seen(model, batch, 0, [name], [one])
    found = project(after, direction("llama"))
    assert torch.allclose(found, torch.full_like(found, 7.0), atol=1e-4)
    unit = direction("llama").unit
    rest = [x - torch.outer(x @ unit, unit) for x in (before, after)]
    assert torch.allclose(rest[0], rest[1], atol=1e-4)


@pytest.mark.parametrize("architecture", FEW)
def test_replacing_by_its_own_value_changes_nothing_and_by_anothers_everything(architecture: str) -> None:
    model, batch, acts = made(architecture), batch_of(architecture), residuals(architecture)
    positions = acts.positions  # from `inst` to the end
    own = [[replacement(acts, f"p{i}", layers=(1, 2), positions=positions)] for i in range(4)]
    bare = logits_under(model, batch, [])
    assert float((logits_under(model, batch, own) - bare).abs().max()) < 1e-4 * float(bare.abs().max())
    # The last block's input at every token that is read gives the other prompt's logits wherever it only looks there.
    others = logits_under(model, batch, [own[1], own[0], own[2], own[3]])
    assert float((others[:2] - bare[:2]).abs().amax(dim=1).min()) > 1e-2
    assert torch.allclose(others[2:], bare[2:], atol=1e-4 * float(bare.abs().max()))


def test_replaced_values_stand_at_their_tokens_only() -> None:
    model, batch, acts = made("llama"), batch_of("llama"), residuals("llama")
    one = replacement(acts, "p3", layers=(1,), positions=("inst",))
    row, name = batch.select([0]), level_hook(model, 1)
    with applied(model, [one], row), torch.inference_mode():
        _, cache = model.run_with_cache(row.tokens, names_filter=lambda n: n == name)
    (before,) = seen(model, row, 0, [name], [])
    inst = int(row.at("inst")[0])
    assert torch.equal(cache[name][0, inst], acts.at(1, "inst")[3])
    kept = [i for i in range(len(before)) if i != inst]
    assert torch.equal(cache[name][0, kept], before[kept])


class Stopped(Exception):
    pass


@pytest.mark.parametrize("fast", [True, False])
def test_no_hook_is_left_after_an_exception(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made("llama"), batch_of("llama")
    count, bare = _count_hooks(model), logits_under(model, batch, [])
    monkeypatch.setattr(forward, "fits_fast_path", lambda model: fast)

    def stop(tokens: list[int]) -> bool:
        assert _count_hooks(model) > count
        raise Stopped

    with pytest.raises(Stopped):
        answer_under(model, batch, [ablate("llama")], max_new_tokens=3, decided=stop)
    assert _count_hooks(model) == count

    def interrupted() -> None:
        with applied(model, [ablate("llama")]):
            assert has_hooks(model)
            raise Stopped

    with pytest.raises(Stopped):
        interrupted()
    assert not has_hooks(model)
    monkeypatch.undo()
    assert torch.equal(logits_under(model, batch, []), bare)


def test_decided_answers_leave_the_batch() -> None:
    model, batch = made("llama"), batch_of("llama")
    given = [[add("llama", 1.0)], [], [ablate("llama")], [add("llama", -1.0, phase="generation")]]
    whole = answer_under(model, batch, given, max_new_tokens=NEW).tokens

    def decided(tokens: list[int]) -> bool:
        return tuple(tokens) in (whole[0][:2], whole[3][:1])

    got = answer_under(model, batch, given, max_new_tokens=NEW, decided=decided).tokens
    assert got == (whole[0][:2], whole[1], whole[2], whole[3][:1])


def test_logits_can_be_reduced_batch_by_batch() -> None:
    model, batch = made("llama"), batch_of("llama")
    given = kinds("llama", "prompt")
    whole = logits_under(model, batch, given)
    rows_seen: list[int] = []

    def first_two(logits: Tensor, rows: list[int]) -> Tensor:
        rows_seen.extend(rows)
        return logits[:, :2]

    got = logits_under(model, batch, given, reduce=first_two, max_tokens=1)
    assert torch.allclose(got, whole[:, :2], atol=1e-4 * float(whole.abs().max()))
    assert sorted(rows_seen) == [0, 1, 2, 3]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_modules_are_what_the_hook_points_see(architecture: str) -> None:
    model, batch = made(architecture), batch_of(architecture).select([0])
    assert bears_fast(model, [(site, layer) for site in CHANGEABLE for layer in range(3)])
    for site in CHANGEABLE:
        one = add(architecture, 1.0, site=site, layers=(1,))
        logits = logits_under(model, batch, [one])
        own = first_logits(model, batch, [[one]])
        assert float((logits - own).abs().max()) < 1e-4 * float(own.abs().max()), site


def test_models_that_need_the_hook_points_take_the_plain_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    # Granite scales what attention and MLP add, Mamba keeps no keys and values.
    granite = transformers.GraniteConfig(residual_multiplier=0.5, embedding_multiplier=2.0, **tiny.SMALL)
    mamba = transformers.MambaConfig(vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=3, eos_token_id=4)
    monkeypatch.setitem(tiny.CONFIGS, "granite", lambda: granite)
    monkeypatch.setitem(tiny.CONFIGS, "mamba", lambda: mamba)
    for architecture, sites in (("granite", EVERYWHERE), ("mamba", ("resid_pre",))):
        model, batch = made(architecture), batch_of(architecture)
        rows = kinds(architecture, "both")
        rows[1][0] = ablate(architecture, sites=sites)
        got = answer_under(model, batch, rows, max_new_tokens=NEW)
        assert got.engine == "plain"
        assert got.tokens == told(model, batch, rows, got.tokens)
        logits, own = logits_under(model, batch, rows), first_logits(model, batch, rows)
        assert torch.allclose(logits, own, atol=1e-4 * float(own.abs().max()))
    with pytest.raises(UserError, match="this model has no site mlp_out in block 0"):  # its blocks are all mixer
        logits_under(model, batch, [ablate("mamba", sites=("mlp_out",))])


def test_applied_without_a_batch_reaches_whatever_is_run() -> None:
    model, batch = made("llama"), batch_of("llama")
    given = [add("llama", 1.0), ablate("llama", seed=1)]
    under = answer_under(model, batch, given, max_new_tokens=NEW)
    with applied(model, given):
        plain = answer(model, batch, max_new_tokens=NEW)
        acts = collect(model, batch, levels=[1], positions=["inst"])
    assert plain.engine == "plain"
    assert plain.tokens == under.tokens
    assert float(project(acts.at(1, "inst"), direction("llama", 1)).abs().max()) < 1e-4
    for outside in ([add("llama", phase="prompt")], [add("llama", positions=("inst",), phase="prompt")], [given]):
        with pytest.raises(UserError, match="without a batch nothing says which tokens"), applied(model, outside):
            pass


def test_applied_with_a_batch_is_for_that_batch() -> None:
    model, batch = made("llama"), batch_of("llama", side="left")
    given = [add("llama", positions=("inst",), phase="prompt")]
    name = level_hook(model, 1)
    with applied(model, given, batch), torch.inference_mode():
        _, cache = model.run_with_cache(
            batch.tokens, attention_mask=batch.mask.long(), names_filter=lambda n: n == name
        )
        with pytest.raises(UserError, match="placed in a batch of 4 prompts and the model was run on 1"):
            model(batch.tokens[:1])
    with torch.inference_mode():
        _, bare = model.run_with_cache(batch.tokens, attention_mask=batch.mask.long(), names_filter=lambda n: n == name)
    moved = (cache[name] - bare[name]).norm(dim=-1) > 1e-3
    expected = torch.zeros_like(moved)
    expected[torch.arange(4), batch.at("inst")] = True
    assert torch.equal(moved, expected)


def test_user_hooks_take_the_plain_engine() -> None:
    model, batch = made("llama"), batch_of("llama")
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda residual, hook: -3 * residual)]):
        got = answer_under(model, batch, [add("llama", layers=(0,))], max_new_tokens=2)
    assert got.engine == "plain"
    assert got.tokens != answer_under(model, batch, [add("llama", layers=(0,))], max_new_tokens=2).tokens


def test_half_precision_keeps_the_projection_out() -> None:
    hf_model = tiny_hf("llama", dtype=torch.bfloat16)
    model = bridge(hf_model, tiny_tokenizer(), Checkpoint("tiny", "tests/tiny"))
    one = Ablate(direction("llama"), layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)
    batch = tokenize([Prompt("a", "the thing")], template_of(model))
    with applied(model, [one], force=True):
        acts = collect(model, batch)
    share = project(acts.values, direction("llama")).abs() / acts.values.norm(dim=-1)
    assert float(share.max()) < 5e-3
    assert answer_under(model, batch, [one], max_new_tokens=2, force=True).engine == "fast"


def test_what_can_not_be_done_is_said() -> None:
    model, batch = made("llama"), batch_of("llama")
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        answer_under(model, batch, [], max_new_tokens=0)
    with pytest.raises(UserError, match="3 lists of interventions came for 4 prompts"):
        logits_under(model, batch, [[], [], []])
    with pytest.raises(UserError, match="no layer 3 to intervene at, only 0 to 2; the last level"):
        logits_under(model, batch, [add("llama", layers=(3,))])
    with pytest.raises(UserError, match=r"'p\d' has \d+ tokens and so none at 'token\[500:600\]'"):
        logits_under(model, batch, [add("llama", positions=("token[500:600]",), phase="prompt")])
    long = [Prompt("long", "word " * 300)]
    with pytest.raises(UserError, match="the model takes 512"):
        logits_under(model, long, [])
