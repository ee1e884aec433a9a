"""Numbers as replies: held against plain Hugging Face over all spellings that different tokenizers have."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from tiny import CHATML, CONFIGS, SPECIAL, tiny_hf, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mechlens.errors import UserError
from mechlens.methods.behaviour.scoring import number_reply
from mechlens.methods.behaviour.scoring.number_reply import NumberTokens, number_replies
from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.models.engine import forward
from mechlens.models.engine.packed import branches as branching
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template

WORDS = [chr(n) for n in range(33, 127)]
SINGLE = [*WORDS, "Ġ", "ĠĠ"]
"""Digit by digit, as SmolLM2, Qwen and Gemma do."""
WHOLE = [*SINGLE, *map(str, range(10, 101)), "00", "01", "850", "Ġ7", "Ġ85", "5%", "9.", "Ċ4"]
"""Up to three digits at once, as Llama 3 does, and tokens that hold more than a number."""
PROMPTS = ["How many?", "From 0 to 100: how honest are you? Reply with a number.", "{answer} 5"]


def numbers_tokenizer(pieces: list[str]) -> Any:
    """Byte-level, with these tokens; it never merges by itself, but a model may say any of them."""
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "additional_special_tokens": ["<|im_start|>"]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **marks)


def fond_of_numbers(pieces: list[str], fond: float = 3.0, rows: int = 0, **options: Any) -> Any:
    """A random model that likes to say digits and white space, plain and as a bridge."""
    torch.manual_seed(0)
    tokenizer = numbers_tokenizer(pieces)
    config = CONFIGS["llama"]()
    config.update({"vocab_size": len(tokenizer) + rows, "tie_word_embeddings": False, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
        like = [i for piece, i in tokenizer.get_vocab().items() if re.search("[0-9ĠĊ]", piece)]
        bias = torch.zeros(config.vocab_size)
        bias[like] = fond
        model.lm_head.bias = torch.nn.Parameter(bias)
    model.config.architectures = [type(model).__name__]
    checkpoint = Checkpoint("tiny", "t", fingerprint=weight_fingerprint(model.state_dict()))
    return model, bridge(model, tokenizer, checkpoint)


NUMBER = re.compile(r"[ \n\t\r]{0,2}(0|[1-9][0-9]?|100)[^0-9]", re.DOTALL)
OPEN = re.compile(r"[ \n\t\r]{0,2}(0|[1-9][0-9]?|100)?")


@torch.inference_mode()
def by_hand(model: Any, tokenizer: Any, ids: list[int]) -> torch.Tensor:
    """P of each number, token by token through plain Hugging Face over every text that may still become one."""
    found = torch.zeros(101, dtype=torch.float64)
    size = model.config.vocab_size
    text = [tokenizer.decode([i], skip_special_tokens=False) for i in range(size)]
    going: list[tuple[tuple[int, ...], str, float]] = [((), "", 1.0)]
    while going:
        logits = torch.cat([model(torch.tensor(part)).logits[:, -1] for part in rows_of(ids, going)])
        then = []
        for (path, said, reached), row in zip(going, logits.double().softmax(-1).tolist(), strict=True):
            for token, p in enumerate(row):
                # A token without text, as beyond the tokenizer's last, ends a number as any other does.
                now = said + (text[token] or "\0")
                if OPEN.fullmatch(now):
                    then.append(((*path, token), now, reached * p))
                elif match := NUMBER.match(now):
                    found[int(match[1])] += reached * p
        going = then
    return found


def rows_of(ids: list[int], going: list[Any]) -> Iterator[list[list[int]]]:
    for at in range(0, len(going), 512):
        yield [[*ids, *path] for path, _, _ in going[at : at + 512]]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenize([Prompt("p", text)], chat_template(tokenizer, "tokenizer")).row(0)


@pytest.mark.parametrize("pieces", [SINGLE, WHOLE], ids=["single", "whole"])
def test_every_number_has_the_probability_of_all_its_spellings(
    pieces: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(number_reply, "NEGLIGIBLE", 0.0)
    hf_model, model = fond_of_numbers(pieces, rows=3)
    found = number_replies(model, PROMPTS[1:])  # the second one beside it
    right = by_hand(hf_model, model.tokenizer, ids_of(model.tokenizer, PROMPTS[1]))
    assert torch.allclose(found.probability[0], right, rtol=1e-4, atol=1e-9)
    assert bool((found.mass <= 1 + 1e-9).all())
    assert bool((found.mass > 0.05).all())


def test_what_is_left_away_is_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = fond_of_numbers(WHOLE, fond=1.0)
    found = number_replies(model, PROMPTS[0])
    monkeypatch.setattr(number_reply, "NEGLIGIBLE", 0.0)
    whole = number_replies(model, PROMPTS[0])
    assert bool((whole.probability >= found.probability - 1e-12).all())
    assert float((whole.mass - found.mass).max()) < 1e-4


@pytest.mark.parametrize(
    ("architecture", "one_line", "fast"),
    [("llama", True, True), ("gemma2", False, True), ("falcon_mamba", False, False), ("gpt2", True, True)],
)
def test_branches_have_the_logits_of_whole_texts(architecture: str, one_line: bool, fast: bool) -> None:
    hf_model = tiny_hf(architecture)
    model = bridge(hf_model, tiny_tokenizer(), Checkpoint("t", "t", fingerprint=weight_fingerprint({})))
    prompts = [list(range(5, 26)), list(range(5, 20)), list(range(5, 26)), [7]]
    levels = [[()], [(3,), (9,)], [(3, 8), (9, 8), (3, 9)], [(3, 9, 11)]]
    assert forward.fits_fast_path(model) == fast
    plan = branching.plan_branches(model, prompts, 3, 40)
    assert sorted(i for group in plan for i in group) == [0, 1, 2, 3]
    assert (max(map(len, plan)) > 1) == one_line
    for group in plan:
        own = [prompts[i] for i in group]
        followed = branching.branches(model, own, 3)
        for paths in levels:
            nodes = [(i, path) for i in range(len(own)) for path in paths]
            found = followed.logits(nodes)
            for (i, path), row in zip(nodes, found, strict=True):
                with torch.inference_mode():
                    right = hf_model(torch.tensor([[*own[i], *path]])).logits[0, -1]
                assert torch.allclose(row, right, atol=2e-4, rtol=1e-4)


def test_many_prompts_in_one_pass_are_each_as_alone() -> None:
    _, model = fond_of_numbers(SINGLE, fond=0.0)
    texts = [f"{text} {i}" for i in range(2) for text in PROMPTS]
    found = number_replies(model, texts, max_tokens=100)
    for i in (0, 3, 5):
        alone = number_replies(model, texts[i])
        assert torch.allclose(found.probability[i], alone.probability[0], rtol=1e-3, atol=1e-8)
    same = number_replies(model, [texts[0]] * 3)
    assert torch.allclose(same.probability[0], same.probability[2])


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["8", "5"], {85}), ([" ", "8", "5", "%"], {85}), (["8", "5", "/", "1", "0", "0"], {85}),
        (["1", "0", "0", "%"], {100}), (["1", "0", "0", "0"], set()), (["0", "0", "7"], set()), (["-", "5"], set()),
        (["\n", "\n", "0"], {0}), (["\n", " ", " ", "0"], set()), (["C", "O", "D", "E"], set()),
    ],
)  # fmt: skip
def test_what_a_reply_says(texts: list[str], numbers: set[int]) -> None:
    tokens = NumberTokens.of(numbers_tokenizer([*SINGLE, "Ċ"]), 10**6)
    said, found = "", set()
    for text in [*texts, "."]:
        after = {then[len(said) :]: then for _, then in tokens.after(said)}
        if text not in after:
            if said.strip() and not text[0].isdigit():
                found = {int(said)}
            break
        said = after[text]
    assert found == numbers


def test_tokens_of_real_tokenizers(real_tokenizer: Any) -> None:
    for name, most in (("llama3", 1110), ("llama2", 20)):  # 20: bytes beside characters
        tokenizer = real_tokenizer(name)
        tokens = NumberTokens.of(tokenizer, 10**6)
        assert len(tokens.digits) == most, name
        for number in ("7", "42", "100"):
            ids = tokenizer.encode(number, add_special_tokens=False)
            said = ""
            for token in ids:
                said = dict(tokens.after(said))[token]
            assert said.strip() == number


def test_replies_are_kept_and_what_can_not_be_asked(tmp_path: Any) -> None:
    from mechlens.runs.folder import FolderCache

    _, model = fond_of_numbers(SINGLE, fond=0.0, max_position_embeddings=64)
    keep = FolderCache(tmp_path)
    first = number_replies(model, PROMPTS[0], cache=keep)
    assert len(list(tmp_path.iterdir())) == 1
    again = number_replies(model, PROMPTS[0], cache=keep)
    assert torch.equal(first.probability, again.probability)
    assert first.openings == again.openings
    with pytest.raises(UserError, match="shorten it"):
        number_replies(model, "x" * 40)
