"""Laws of `collect`: always equal to plain Hugging Face, one prompt at a time, on a copy that was never bridged."""

import copy
import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from caches import DictShelf
from tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer, words
from torch import Tensor, nn

from mechlens.errors import UserError
from mechlens.methods.activations.activations import Activations
from mechlens.methods.activations.collect import collect, from_cache, template_of
from mechlens.models.bridge import bridge, loaded, n_layers, unembed
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.engine import forward
from mechlens.models.native import native
from mechlens.models.sites import level_hook
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.builtin import builtin_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate, chat_template

pytestmark = pytest.mark.exact

EVERY = ("inst", "post[*]")
CLOSE = 1e-5

# The user's words come first, so that prompts share no start.
WORDS_FIRST = (
    "{{ messages[-1]['content'] }}<|im_end|>\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def prompts(n: int = 6, seed: int = 0) -> list[Prompt]:
    return [Prompt(id=f"p{i}", text=text, label="ab"[i % 2]) for i, text in enumerate(words(n, seed))]


def bridged(hf_model: Any, tokenizer: Any = None) -> Any:
    checkpoint = Checkpoint("tiny", "tests/tiny", fingerprint=weight_fingerprint(hf_model.state_dict()))
    return bridge(hf_model, tokenizer or tiny_tokenizer(), checkpoint)


@functools.cache
def pair(architecture: str) -> tuple[Any, Any]:
    """A bridge and a plain copy of the same model, shared by tests that change neither."""
    return bridged(tiny_hf(architecture)), tiny_hf(architecture)


@torch.inference_mode()
def one_at_a_time(hf_model: Any, batch: TokenBatch, positions: Sequence[str] = EVERY) -> Tensor:
    """Residuals of every level by plain Hugging Face: its own hidden states, and the last block's output."""
    names = positions if positions[0].startswith("token[") else batch.resolve(positions)
    depth = hf_model.config.num_hidden_layers
    blocks = next(m for m in hf_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    last: list[Tensor] = []
    handle = blocks[-1].register_forward_hook(
        lambda module, args, out: last.append(out if isinstance(out, Tensor) else out[0])
    )
    found = []
    for i in range(len(batch.prompts)):
        # The body without its head: hidden states are all that is needed.
        out = hf_model.base_model(torch.tensor([batch.row(i)]), output_hidden_states=True, use_cache=False)
        levels = torch.stack([*out.hidden_states[:depth], last.pop()])[:, 0]
        read = [int(batch.at(name)[i]) - batch.offset(i) for name in names]
        found.append(levels[:, read].float())
    handle.remove()
    return torch.stack(found)


def error(values: Tensor, truth: Tensor) -> Tensor:
    """Relative L2 error of every vector."""
    return (values - truth).norm(dim=-1) / truth.norm(dim=-1)


# --- equal to plain Hugging Face -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_one_prompt_at_a_time(architecture: str) -> None:
    model, plain = pair(architecture)
    batch = tokenize(prompts(), template_of(model))
    assert int(batch.lengths.min()) > 32  # twice the sliding windows of tiny's models
    got = collect(model, batch, positions=EVERY)
    assert got.engine == "fast"
    assert got.levels == (0, 1, 2, 3)
    assert got.positions == batch.positions
    assert float(error(got.values, one_at_a_time(plain, batch)).max()) < CLOSE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_a_shared_start(architecture: str) -> None:
    model, plain = pair(architecture)
    texts = [Prompt(id=text, text=text) for text in ("hello there", "a much longer request, longer than a window", "b")]
    batch = tokenize(texts, ChatTemplate(tiny_tokenizer(WORDS_FIRST)))
    rows = [forward.Row(tuple(batch.row(i)), (int(batch.at("inst")[i]),)) for i in range(3)]
    assert forward.shared_prefix(rows) == 0
    got = collect(model, batch, positions=EVERY)
    assert float(error(got.values, one_at_a_time(plain, batch)).max()) < CLOSE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_prompt_alone_and_identical_prompts(architecture: str) -> None:
    model, plain = pair(architecture)
    batch = tokenize([Prompt(id=str(i), text="the same words") for i in range(3)], template_of(model))
    truth = one_at_a_time(plain, batch)
    assert float(error(collect(model, batch, positions=EVERY).values, truth).max()) < CLOSE
    alone = collect(model, [batch.prompts[0]], positions=EVERY)
    assert float(error(alone.values, truth[:1]).max()) < CLOSE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_is_as_good_as_plain_bfloat16(architecture: str) -> None:
    """Truth: the same bfloat16 weights computed in float32. Compared: the median error over all vectors that a
    block has written (level 0 is exact), of 12 prompts."""
    hf_model = tiny_hf(architecture, dtype=torch.bfloat16)
    plain, exact = copy.deepcopy(hf_model), copy.deepcopy(hf_model).float()
    model = bridged(hf_model)
    batch = tokenize(prompts(12), template_of(model))
    truth = one_at_a_time(exact, batch)
    ours = error(collect(model, batch, positions=EVERY).values, truth)[:, 1:].median()
    theirs = error(one_at_a_time(plain, batch), truth)[:, 1:].median()
    assert 0 < float(ours) < 1.1 * float(theirs)


def test_batches_of_any_size_and_either_padding_give_the_same_numbers() -> None:
    model, plain = pair("gemma3")
    template = template_of(model)
    truth = one_at_a_time(plain, tokenize(prompts(), template))
    for side in ("left", "right"):
        for max_tokens in (1, 100, 200, 100_000):
            batch = tokenize(prompts(), template, padding_side=side)
            got = collect(model, batch, positions=EVERY, max_tokens=max_tokens)
            assert float(error(got.values, truth).max()) < CLOSE


@pytest.mark.parametrize("levels", [(0,), (1,), (3,), (2, 0), (1, 3)])
def test_some_levels_in_the_order_asked_for(levels: tuple[int, ...]) -> None:
    model, plain = pair("llama")
    batch = tokenize(prompts(), template_of(model))
    truth = one_at_a_time(plain, batch)[:, list(levels)]
    assert float(error(collect(model, batch, positions=EVERY, levels=levels).values, truth).max()) < CLOSE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fast_engine_equals_plain_engine(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair(architecture)
    for levels in (None, (1,)):
        fast = collect(model, prompts(), positions=EVERY, levels=levels)
        with monkeypatch.context() as patched:
            patched.setattr(forward, "fits_fast_path", lambda model: False)
            plain = collect(model, prompts(), positions=EVERY, levels=levels)
        assert (fast.engine, plain.engine) == ("fast", "plain")
        assert float(error(fast.values, plain.values).max()) < CLOSE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unembed_equals_the_models_own_logits(architecture: str) -> None:
    hf_model = tiny_hf(architecture)
    if hasattr(hf_model.config, "final_logit_softcapping"):
        hf_model.config.final_logit_softcapping = 0.7  # far below the logits, so that the cap shows
    plain = copy.deepcopy(hf_model)
    model = bridged(hf_model)
    batch = tokenize(prompts(3), template_of(model))
    got = unembed(model, collect(model, batch, positions=["last"], levels=[3]).at(3, batch.positions[-1]))
    with torch.inference_mode():
        logits = torch.stack([plain(torch.tensor([batch.row(i)])).logits[0, -1] for i in range(3)])
    assert float((got - logits).abs().max()) < 1e-5 * max(1.0, float(logits.abs().max()))


# --- real models ---------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_smollm2_equals_plain_hugging_face(smollm2: Any) -> None:
    from mechlens.models.load import load_hf

    plain, _ = load_hf("smollm2")
    long = Prompt(id="long", text="Tell me about rivers, hills and everything that lies between them. " * 12 + "Now.")
    batch = tokenize([*builtin_prompts("harmful")[:2], *builtin_prompts("harmless")[:2], long], template_of(smollm2))
    got = collect(smollm2, batch, positions=EVERY)
    truth = one_at_a_time(plain, batch)
    assert got.engine == "fast"
    assert float(error(got.values, truth).max()) < CLOSE

    rounded = plain.bfloat16()
    halved = bridged(copy.deepcopy(rounded), loaded(smollm2).tokenizer)
    short = tokenize(batch.prompts[:4], template_of(smollm2))
    theirs = one_at_a_time(rounded, short)
    truth = one_at_a_time(rounded.float(), short)
    ours = collect(halved, short, positions=EVERY).values
    assert float(error(ours, truth)[:, 1:].median()) < 1.1 * float(error(theirs, truth)[:, 1:].median())


@pytest.mark.real
def test_gemma3_equals_plain_hugging_face_below_and_beyond_its_window(gemma3: Any) -> None:
    from mechlens.models.load import load_hf

    plain, tokenizer = load_hf("gemma3-270m")
    with pytest.raises(UserError, match="no chat template"):
        collect(gemma3, prompts(1))
    tokenizer.chat_template = GEMMA
    long = [Prompt(id=str(n), text="Rivers run from the hills down to the sea. " * n + "Why?") for n in (45, 55)]
    batch = tokenize([builtin_prompts("harmful")[0], *long], chat_template(tokenizer))
    window = plain.config.sliding_window
    assert int(batch.lengths[1]) < window < int(batch.lengths[2])
    got = collect(gemma3, batch, positions=EVERY)
    assert got.engine == "fast"
    assert float(error(got.values, one_at_a_time(plain, batch)).max()) < CLOSE


@pytest.mark.real
def test_twenty_thousand_characters(smollm2: Any) -> None:
    text = ("The river runs from the hills to the sea, and nobody asks it why. " * 400)[:20_000]
    got = collect(smollm2, [Prompt(id="long", text=text), *builtin_prompts("benign")[:1]], levels=[5])
    assert got.values.shape == (2, 1, 2, 576)
    assert bool(torch.isfinite(got.values).all())


# --- other people's hooks, other weights ---------------------------------------------------------------------------


def test_user_hooks_fire_and_stay() -> None:
    model = bridged(tiny_hf())
    clean = collect(model, prompts())
    seen = []

    def push(residual: Tensor, hook: Any) -> Tensor:
        seen.append(hook.name)
        return residual + 1.0

    model.add_hook("blocks.1.hook_resid_pre", push)
    pushed = collect(model, prompts())
    assert pushed.engine == "plain"
    assert seen
    assert torch.allclose(pushed.values[:, 1], clean.values[:, 1] + 1.0, atol=1e-5)
    assert float(error(pushed.values[:, 2:], clean.values[:, 2:]).min()) > 0.01
    before = len(seen)
    model(torch.tensor([[1, 2, 3]]))
    assert len(seen) == before + 1
    model.reset_hooks()
    again = collect(model, prompts())
    assert again.engine == "fast"
    assert torch.equal(again.values, clean.values)


def test_a_pytorch_hook_on_a_bridged_block_counts_as_a_users_hook() -> None:
    model = bridged(tiny_hf())
    calls: list[int] = []
    handle = model.blocks[1].register_forward_hook(lambda *args: calls.append(1))
    assert collect(model, prompts(2)).engine == "plain"
    assert calls
    handle.remove()
    assert collect(model, prompts(2)).engine == "fast"


def folded(architecture: str) -> Any:
    """A bridge as TransformerLens makes it by itself: LayerNorm folded, writes to the residual stream centred."""
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs |= {"name_or_path": "tests/tiny", "add_bos_token": True}
    model = TransformerBridge.boot_transformers("tests/tiny", hf_model=tiny_hf(architecture), tokenizer=tokenizer)
    model.enable_compatibility_mode(disable_warnings=True)
    return model


def test_folded_weights_take_the_plain_path_and_say_so() -> None:
    raw, processed = bridged(tiny_hf("gpt2")), folded("gpt2")
    got = collect(processed, prompts(), template=chat_template(tiny_tokenizer()))
    assert got.engine == "plain"
    assert got.checkpoint.regime == "processed"
    assert got.checkpoint.fingerprint
    batch = tokenize(prompts(1), chat_template(tiny_tokenizer()))
    _, cache = processed.run_with_cache(batch.tokens, prepend_bos=False)
    assert float(error(got.values[:1], from_cache(cache, batch, processed, ("inst", "last")).values).max()) < CLOSE
    # Folding and centring change directions: the regime is not a formality.
    unfolded = collect(raw, prompts())
    assert float(error(got.values[:, 1:], unfolded.values[:, 1:]).max()) > 0.01


def test_folding_after_loading_is_noticed() -> None:
    model = bridged(tiny_hf("gpt2"))
    before = collect(model, prompts(2)).checkpoint
    model.process_weights()
    after = collect(model, prompts(2))
    assert (before.regime, after.checkpoint.regime) == ("raw", "processed")
    assert after.checkpoint.fingerprint != before.fingerprint
    assert after.engine == "plain"


def hooks_of(model: Any) -> int:
    """Hooks on any module; transformers leaves some of its own on modules whose outputs were asked for."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(not hook.__module__.startswith("transformers.") for hook in hooks)


def test_an_exception_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bridged(tiny_hf())
    clean = collect(model, prompts())
    modules, hooks = [id(m) for m in model.modules()], hooks_of(model)
    with native(model):
        inner = hooks_of(model)
    attention = model.original_model.config._attn_implementation

    def broken(kept: Any, level: int, residual: Tensor) -> None:
        raise KeyboardInterrupt

    for engine in (True, False):
        with monkeypatch.context() as patched:
            patched.setattr(forward.Kept, "put", broken)
            patched.setattr(forward, "fits_fast_path", lambda model, engine=engine: engine)
            with pytest.raises(KeyboardInterrupt):
                collect(model, prompts())
        assert [id(m) for m in model.modules()] == modules
        assert hooks_of(model) == hooks
        assert model.original_model.config._attn_implementation == attention
    with native(model):
        assert hooks_of(model) == inner
    assert torch.equal(collect(model, prompts()).values, clean.values)


# --- memory, overflow, refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_running_out_of_memory_halves_the_batch(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("qwen3")
    monkeypatch.setattr(forward, "fits_fast_path", lambda model: fast)
    same_length = [Prompt(id=str(i), text=f"request {i}") for i in range(7)]
    whole = collect(model, same_length)
    name = "fast_batch" if fast else "reference_batch"
    run, sizes = getattr(forward, name), []

    def small(model: Any, rows: Sequence[Any], *rest: Any) -> Tensor:
        sizes.append(len(rows))
        if len(rows) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return run(model, rows, *rest)

    monkeypatch.setattr(forward, name, small)
    limit = 2
    assert float(error(collect(model, same_length).values, whole.values).max()) < CLOSE
    assert max(sizes) == 7
    limit = 0
    with pytest.raises(UserError, match=r"one prompt of \d+ tokens doesn't fit into memory"):
        collect(model, same_length)


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(forward, "fast_batch", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        collect(pair("llama")[0], prompts())


def test_values_that_overflow_are_named_by_level() -> None:
    hf_model = tiny_hf(dtype=torch.float16)
    hf_model.model.layers[1].post_attention_layernorm.weight.data.mul_(1e4)
    hf_model.model.layers[1].mlp.down_proj.weight.data.mul_(1e4)
    model = bridged(hf_model)
    with pytest.raises(UserError, match=r"level 2 are not finite .*'p0'.*6 prompts.*bfloat16"):
        collect(model, prompts())
    assert bool(torch.isfinite(collect(model, prompts(), levels=[0, 1]).values).all())


def test_what_is_not_there_is_named() -> None:
    model, _ = pair("llama")
    with pytest.raises(UserError, match=r"'long' has \d+ tokens and the model takes 512"):
        collect(model, [*prompts(2), Prompt(id="long", text="word" * 200)])
    for levels in ([4], [-1], []):
        with pytest.raises(UserError, match="levels 0 to 3"):
            collect(model, prompts(1), levels=levels)
    with pytest.raises(UserError, match=r"no position 'pre\[0\]'"):
        collect(model, prompts(1), positions=["pre[0]"])
    with pytest.raises(UserError, match="no position 'post"):
        collect(model, prompts(1), positions=["post[99]"])
    with pytest.raises(UserError, match="no site 'mlp'"):
        collect(model, prompts(1), site="mlp")
    with pytest.raises(UserError, match=r"load it first: model = ml\.load"):
        collect("smollm2", ["the"])
    with pytest.raises(UserError, match="no prompts"):
        collect(model, [])


# --- the cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Number of batches run since the last call."""
    calls: list[int] = []
    run = forward.fast_batch

    def counted(model: Any, rows: Sequence[Any], *rest: Any) -> Tensor:
        calls.append(len(rows))
        return run(model, rows, *rest)

    def since() -> int:
        n = len(calls)
        calls.clear()
        return n

    monkeypatch.setattr(forward, "fast_batch", counted)
    return since


def test_a_shelf_is_used_only_when_everything_is_equal(passes: Callable[[], int]) -> None:
    model, cache = bridged(tiny_hf()), DictShelf()
    first = collect(model, prompts(), cache=cache)
    assert passes() > 0
    again = collect(bridged(tiny_hf()), prompts(), cache=cache)
    assert passes() == 0
    assert torch.equal(again.values, first.values)

    edited = bridged(tiny_hf())
    edited.blocks[1].mlp.out.weight.data.mul_(1.5)
    reader = tiny_tokenizer()
    reader.chat_template += "{% if enable_thinking %}{% endif %}"
    other_template = ChatTemplate(reader, options={"enable_thinking": True})
    system = tiny_tokenizer()
    system.chat_template = system.chat_template.replace("kind", "mean")
    changed: dict[str, Callable[[], Activations]] = {
        "weights": lambda: collect(bridged(tiny_hf(seed=1)), prompts(), cache=cache),
        "weights edited in place": lambda: collect(edited, prompts(), cache=cache),
        "dtype": lambda: collect(bridged(tiny_hf(dtype=torch.bfloat16)), prompts(), cache=cache),
        "template": lambda: collect(model, prompts(), template=ChatTemplate(system), cache=cache),
        "levels": lambda: collect(model, prompts(), levels=[1], cache=cache),
        "positions": lambda: collect(model, prompts(), positions=["post[0]"], cache=cache),
        "one prompt's text": lambda: collect(model, [*prompts()[:5], Prompt("p5", "another")], cache=cache),
    }
    for what, again in changed.items():
        got = again()
        assert passes() > 0, what
        assert not torch.equal(got.values, first.values), what
    collect(model, prompts(), template=other_template, cache=cache)
    assert passes() == 0  # other options, but not one token changed


def test_nothing_made_under_the_users_hooks_is_kept_or_reused() -> None:
    """A hook's effect is in no fingerprint: with a cache the same numbers come out as without one, both ways."""
    model, cache = bridged(tiny_hf()), DictShelf()
    plain = collect(model, prompts(), cache=cache)
    kept = len(cache.pieces)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: value + 1.0)]):
        free = collect(model, prompts())
        shelved = collect(model, prompts(), cache=cache)
        empty = DictShelf()
        collect(model, prompts(), cache=empty)
    assert torch.equal(shelved.values, free.values)
    assert not torch.allclose(shelved.values, plain.values)
    assert (len(cache.pieces), len(empty.pieces)) == (kept, 0)
    assert torch.equal(collect(model, prompts(), cache=cache).values, plain.values)


def test_a_killed_run_goes_on_from_its_cache(passes: Callable[[], int]) -> None:
    model, cache = bridged(tiny_hf()), DictShelf()
    whole = collect(model, prompts(), max_tokens=150)
    batches = passes()
    assert batches > 2

    class Killed(DictShelf):
        def put(self, key: str, value: dict[str, Tensor]) -> None:
            if len(self.pieces) == 2:
                raise KeyboardInterrupt
            super().put(key, value)

    killed = Killed()
    with pytest.raises(KeyboardInterrupt):
        collect(model, prompts(), max_tokens=150, cache=killed)
    passes()
    cache.pieces = killed.pieces
    rest = collect(model, prompts(), max_tokens=150, cache=cache)
    assert passes() == batches - 2
    assert torch.equal(rest.values, whole.values)


def test_weights_edited_in_place_are_another_checkpoint() -> None:
    model = bridged(tiny_hf())
    before = collect(model, prompts(1)).checkpoint
    assert before == loaded(model).checkpoint
    model.blocks[1].mlp.out.weight.data.mul_(1.5)
    after = collect(model, prompts(1)).checkpoint
    assert after.name == before.name
    assert after.fingerprint != before.fingerprint


# --- what comes out ------------------------------------------------------------------------------------------------


def test_from_cache_equals_collect() -> None:
    model, _ = pair("gemma2")
    batch = tokenize(prompts(), template_of(model))
    _, cache = model.run_with_cache(batch.tokens, prepend_bos=False)
    mine, theirs = collect(model, batch, positions=EVERY), from_cache(cache, batch, model, EVERY)
    assert theirs.levels == mine.levels
    assert (theirs.ids, theirs.labels, theirs.positions) == (mine.ids, mine.labels, mine.positions)
    assert float(error(mine.values, theirs.values).max()) < CLOSE
    wanted = [level_hook(model, 1), level_hook(model, 3)]
    _, cache = model.run_with_cache(batch.tokens, names_filter=lambda name: name in wanted, prepend_bos=False)
    assert from_cache(cache, batch, model, ["inst"]).levels == (1, 3)
    _, cache = model.run_with_cache(batch.tokens, names_filter=lambda name: "hook_z" in name, prepend_bos=False)
    with pytest.raises(UserError, match="holds no residual stream"):
        from_cache(cache, batch, model, ["inst"])


def test_labels_travel_with_the_values() -> None:
    model, _ = pair("llama")
    got = collect(model, prompts(), positions=["inst", "last"], levels=[0, 3])
    last = got.positions[1]
    assert got.labels == ("a", "b") * 3
    assert got.families == got.ids == tuple(f"p{i}" for i in range(6))
    assert got.template == template_of(model).fingerprint
    assert got.at(3, last).shape == (6, 32)
    assert got.numpy().shape == (6, 2, 2, 32)

    few = got.select([4, 1])
    assert few.ids == ("p4", "p1")
    assert few.labels == ("a", "b")
    assert torch.equal(few.values, got.values[[4, 1]])
    assert got.select(torch.tensor([0, 2])).ids == ("p0", "p2")

    table = got.table()
    assert len(table) == 6 * 2 * 2
    assert list(table.columns) == ["id", "label", "family", "level", "position", "norm"]
    row = table[(table.id == "p4") & (table.level == 3) & (table.position == last)]
    assert math.isclose(row.norm.item(), float(got.at(3, last)[4].norm()), rel_tol=1e-6)

    with pytest.raises(UserError, match="level 1 was not collected"):
        got.at(1, last)
    with pytest.raises(UserError, match="position 'post"):
        got.at(3, "post[0]")


def test_values_are_ordinary_tensors() -> None:
    values = collect(pair("llama")[0], prompts(2)).values
    assert not values.is_inference()
    weight = torch.zeros(values.shape[-1], requires_grad=True)
    (values @ weight).sum().backward()
    assert weight.grad is not None


def test_every_level_has_a_hook_name() -> None:
    model, _ = pair("llama")
    names = [level_hook(model, level) for level in range(n_layers(model) + 1)]
    assert names == [*(f"blocks.{i}.hook_resid_pre" for i in range(3)), "blocks.2.hook_resid_post"]


# --- batches -------------------------------------------------------------------------------------------------------


def test_a_plan_holds_every_row_once_within_its_bounds() -> None:
    lengths = [39, 12, 40, 300, 12, 41, 39, 39, 90, 12]
    rows = [forward.Row(tuple(range(n)), (n - 1,)) for n in lengths]
    for max_tokens in (1, 100, 1000):
        for equal in (True, False):
            batches = forward.plan(rows, max_tokens, shared=10, equal_lengths=equal)
            assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
            for batch in batches:
                longest = max(lengths[i] for i in batch)
                assert len(batch) == 1 or len(batch) * longest <= max_tokens
                assert not equal or len({lengths[i] for i in batch}) == 1
            flat = [lengths[i] for batch in batches for i in batch]
            assert flat == sorted(lengths)


def test_a_plan_weighs_padding_against_batches() -> None:
    rows = [forward.Row(tuple(range(n)), (n - 1,)) for n in (10, 10, 100, 100)]
    assert forward.plan(rows, 1000, batch_cost=30) == [[0, 1], [2, 3]]
    assert forward.plan(rows, 1000, batch_cost=300) == [[0, 1, 2, 3]]


def test_a_token_beyond_the_embedding_is_said_before_anything_is_run() -> None:
    """A tokenizer got a new template token and the model wasn't resized: every road says which token it is."""
    from mechlens.methods.behaviour.answers import answer
    from mechlens.methods.behaviour.perplexity import instruction_surprise
    from mechlens.methods.steering.steering import logits_under

    tokenizer = tiny_tokenizer("{% for m in messages %}<|turn|>{{ m['content'] }}<|im_end|>{% endfor %}\n!")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", *(f"<|{i}|>" for i in range(9))]})
    tokenizer.add_tokens(["<|turn|>"])
    hf_model = tiny_hf()
    token = tokenizer.convert_tokens_to_ids("<|turn|>")
    hf_model.resize_token_embeddings(token)
    model = bridged(hf_model, tokenizer)
    asked = prompts(2)
    roads: list[Callable[[], object]] = [
        lambda: collect(model, asked, positions=EVERY),
        lambda: answer(model, asked, max_new_tokens=2),
        lambda: logits_under(model, asked, []),
        lambda: instruction_surprise(model, tokenize(asked, chat_template(tokenizer))),
    ]
    for road in roads:
        said = (
            rf"prompt 'p0' has the token '<\|turn\|>' \(id {token}\), and the model's embedding has {token} rows only"
        )
        with pytest.raises(UserError, match=said):
            road()


def test_a_finished_batch_is_let_go_before_the_next(tiny_model: Callable[..., Any]) -> None:
    """So the result is held once, not as a pile of batches and again as a stack of them."""
    alive: list[Any] = []

    class Kept:
        def get(self, key: str) -> None:
            assert all(piece() is None for piece in alive[:-1])

        def put(self, key: str, value: dict[str, torch.Tensor]) -> None:
            alive.append(weakref.ref(value["cells"]))

    model, asked = tiny_model(), prompts(24)
    acts = collect(model, asked, cache=Kept(), max_tokens=64)
    assert len(alive) > 4
    assert all(piece() is None for piece in alive)
    assert torch.equal(acts.values, collect(model, asked, max_tokens=64).values)


def test_a_large_model_has_small_batches_on_a_cpu_and_a_small_one_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bridged(tiny_hf())
    size = sum(weight.numel() for weight in model.original_model.parameters())
    assert forward.batch_tokens(model, 2048) == 2048
    monkeypatch.setattr(forward, "LARGE", size // 8)
    assert 250 <= forward.batch_tokens(model, 2048) <= 256
    monkeypatch.setattr(forward, "LARGE", 1)
    assert forward.batch_tokens(model, 2048) == 1
