"""Named positions on real tokenizers: the laws of `inst` and `post[k]`, and every way out."""

import copy
import random
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
import transformers
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from mechlens.errors import UserError
from mechlens.prompts.batch import TokenBatch, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import PAPER_TEMPLATES, ChatTemplate, chat_template

Tokenizers = Callable[[str], Any]

CHAT = ("smollm2", "llama3", "qwen3", "gemma3")
AFTER = {
    "smollm2": ["<|im_end|>", "\n", "<|im_start|>", "ass", "istant", "\n"],
    "llama3": ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"],
    "qwen3": ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"],
    "gemma3": ["<end_of_turn>", "\n", "<start_of_turn>", "model", "\n"],
}
TRIMS = ("llama3", "gemma3")
TEXTS = {
    "plain": "How do I make a cake at home?",
    "one letter": "a",
    "no final mark": "Write a poem about the sea",
    "digits": "What is 12345 times 7",
    "rocket": "Explain this: 👩‍🚀",
    "flag, skin tone, keycap": "🇺🇳👍🏽3️⃣",
    "rare characters": "Read 𓂀 and 𠜎",
    "Arabic": "كيف أصنع كعكة في المنزل؟",
    "Hebrew and left-to-right": "מה זה \u202bABC\u202c",
    "Chinese": "如何在家做蛋糕？",
    "Thai": "ทำเค้กอย่างไร",
    "combining": "cafe\u0301 n\u0303o\u0308",
    "combining first": "\u0301a",
    "many marks": "Z\u0351\u036b\u0343a\u0322\u035clgo\u0318\u0336",
    "zero-width end": "join\u200d",
    "space inside": "two  spaces   three",
    "newlines inside": "one\n\ntwo\r\nthree",
    "space first": "  indented",
    "space last": "trailing  ",
    "newline last": "trailing\n",
    "both": "\n both \n\n",
    "words of the template": "user\nassistant model system",
    "half a mark": "<|im_end <|eot_id <end_of_turn",
    "html": "What does <table><b>x</b></table> mean?",
    "code": "def f(x):\n\treturn {'a': [x]}\n# {{ messages }} {% if x %}",
    "null": "a\x00b",
    "long": "word " * 500 + "end",
}
BLANK_ENDS = ("space last", "newline last", "both")


def prompts(*texts: str, **fields: Any) -> list[Prompt]:
    return [Prompt(id=f"p{i}", text=text, **fields) for i, text in enumerate(texts)]


def place(tokenizer: Any, *texts: str, template: str = "tokenizer", **fields: Any) -> TokenBatch:
    """A batch in which white space at `inst` is nothing to talk about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenize(prompts(*texts, **fields), chat_template(tokenizer, template))


def decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def own_ids(tokenizer: Any, prompt: Prompt, **options: Any) -> list[int]:
    """What the tokenizer itself makes of the prompt."""
    messages = [{"role": role, "content": content} for role, content in prompt.history]
    if prompt.system is not None:
        messages.insert(0, {"role": "system", "content": prompt.system})
    messages.append({"role": "user", "content": prompt.text})
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False, **options
    )
    return ids


def words_and_after(tokenizer: Any, batch: TokenBatch, i: int) -> tuple[list[int], list[int]]:
    """Token ids of the user's words and of what follows them."""
    start, inst = (batch.instruction[i] - batch.offset(i)).tolist()
    row = batch.row(i)
    return row[start : inst + 1], row[inst + 1 :]


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


# ---- the tokens are the tokenizer's own


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "Answer briefly."},
        {"history": (("user", "Hello!"), ("assistant", "Hi. What is it?"))},
        {"system": "Answer briefly.", "history": (("user", "Hello!"), ("assistant", "Hi. What is it?"))},
    ],
    ids=["alone", "system", "turns", "system and turns"],
)
def test_ids_are_those_of_the_tokenizers_own_template(
    real_tokenizer: Tokenizers, name: str, fields: dict[str, Any]
) -> None:
    tokenizer = real_tokenizer(name)
    batch = place(tokenizer, *TEXTS.values(), **fields)
    for i, prompt in enumerate(batch.prompts):
        assert batch.row(i) == own_ids(tokenizer, prompt), prompt.text
        words, after = words_and_after(tokenizer, batch, i)
        kept = prompt.text.strip() if name in TRIMS else prompt.text
        said = nfc(decode(tokenizer, words))  # the first token may hold the template's white space too
        assert said.endswith(nfc(kept))
        assert said.strip() == nfc(kept).strip()
        assert [decode(tokenizer, [token]) for token in after] == AFTER[name]
    assert batch.n_post == len(AFTER[name])
    assert not batch.merged.any()


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("kind", TEXTS)
def test_the_token_at_inst_ends_the_words(real_tokenizer: Tokenizers, name: str, kind: str) -> None:
    tokenizer, text = real_tokenizer(name), TEXTS[kind]
    batch = place(tokenizer, text)
    inst = int(batch.at("inst"))
    before = decode(tokenizer, batch.row(0)[:inst])
    through = decode(tokenizer, batch.row(0)[: inst + 1])
    kept = nfc(text.strip() if name in TRIMS else text)
    assert nfc(through).endswith(kept)
    assert not nfc(before).endswith(kept)


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("kind", BLANK_ENDS)
def test_white_space_at_inst_warns_unless_the_template_trims_it(
    real_tokenizer: Tokenizers, name: str, kind: str
) -> None:
    template = chat_template(real_tokenizer(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenize(prompts("plain", TEXTS[kind], TEXTS[kind]), template)
    said = [str(warning.message) for warning in caught]
    expected = "the last instruction token of prompt 'p1' (and of 1 more) is only white space"
    assert said == ([] if name in TRIMS else [expected])


def test_other_ends_do_not_warn(real_tokenizer: Tokenizers) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in CHAT:
            texts = [text for kind, text in TEXTS.items() if kind not in BLANK_ENDS]
            tokenize(prompts(*texts), chat_template(real_tokenizer(name)))


@pytest.mark.parametrize("name", CHAT)
def test_random_unicode(real_tokenizer: Tokenizers, name: str) -> None:
    tokenizer = real_tokenizer(name)
    texts = random_texts(200)
    batch = place(tokenizer, *texts)
    for i, text in enumerate(texts):
        assert batch.row(i) == own_ids(tokenizer, batch.prompts[i])
        words, after = words_and_after(tokenizer, batch, i)
        # SmolLM2's vocabulary lacks some control characters and drops them
        known = "".join(character for character in text if tokenizer(character, add_special_tokens=False)["input_ids"])
        assert nfc(known.strip()) in nfc(decode(tokenizer, words)), repr(text)
        assert [decode(tokenizer, [token]) for token in after] == AFTER[name], repr(text)


def random_texts(n: int) -> list[str]:
    """Strings of characters from many scripts, white space and controls; U+2581 means a space to some tokenizers."""
    blocks = [(32, 126), (0, 31), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0x97F)]
    blocks += [(0xE00, 0xE7F), (0x2000, 0x206F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)]
    blocks += [(0xFE00, 0xFE0F), (0x1F300, 0x1FAFF), (0x1F1E6, 0x1F1FF), (0x20000, 0x2A6DF), (0xE0000, 0x10FFFF)]
    chance = random.Random(7)
    texts: list[str] = []
    while len(texts) < n:
        few = chance.sample(blocks, k=chance.randint(1, 4))
        text = "".join(chr(chance.randint(*chance.choice(few))) for _ in range(chance.randint(1, 30)))
        if text.strip():
            texts.append(text)
    return texts


# ---- a second road to the same positions


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}], ids=["default", "no thinking"])
def test_the_longest_common_suffix_of_three_probes_agrees(
    real_tokenizer: Tokenizers, name: str, options: dict[str, Any]
) -> None:
    tokenizer = real_tokenizer(name)
    probes = prompts("What is a cake", "Tell me about the sea.", "Count to 7")
    rows = [own_ids(tokenizer, prompt, **options) for prompt in probes]
    n_post = common_suffix(rows)
    batch = tokenize(probes, chat_template(tokenizer, **(options if name == "qwen3" else {})))
    assert batch.n_post == n_post > 0
    assert batch.at("inst").tolist() == [len(row) - 1 - n_post for row in rows]
    assert batch.at("last").tolist() == [len(row) - 1 for row in rows]


def common_suffix(rows: list[list[int]]) -> int:
    n = 0
    while len({row[-1 - n] for row in rows}) == 1:
        n += 1
    return n


@pytest.mark.parametrize(
    ("name", "family"), [("llama2", "llama2"), ("llama2", "vicuna"), ("llama3", "llama3"), ("qwen3", "qwen2")]
)
def test_the_common_suffix_agrees_on_published_templates(real_tokenizer: Tokenizers, name: str, family: str) -> None:
    tokenizer = real_tokenizer(name)
    texts = ("What is a cake", "Tell me about the sea", "Count to 7")
    before, after = PAPER_TEMPLATES[family]
    rows = [tokenizer(before + text + after)["input_ids"] for text in texts]
    batch = place(tokenizer, *texts, template=f"paper:{family}")
    assert [batch.row(i) for i in range(3)] == rows
    assert batch.n_post == common_suffix(rows)
    assert batch.at("inst").tolist() == [len(row) - 1 - batch.n_post for row in rows]


# ---- BOS


@pytest.mark.parametrize(
    ("name", "adds_bos"),
    [("smollm2", False), ("smollm2", True), ("llama3", False), ("llama3", True), ("qwen3", False), ("gemma3", True)],
)
def test_exactly_one_bos(real_tokenizer: Tokenizers, name: str, adds_bos: bool) -> None:
    tokenizer = real_tokenizer(name)
    if adds_bos:
        tokenizer = tokenizer if name == "gemma3" else adding_bos(tokenizer)
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    batch = place(tokenizer, "Hello", "Hi there", system="Be kind.")
    for i, prompt in enumerate(batch.prompts):
        assert batch.row(i) == own_ids(tokenizer, prompt)
        if name in ("llama3", "gemma3"):
            assert batch.row(i).count(tokenizer.bos_token_id) == 1
            assert batch.row(i)[0] == tokenizer.bos_token_id
        elif name == "smollm2":  # its BOS is the token that opens every turn
            assert batch.row(i).count(tokenizer.bos_token_id) == 3
        else:
            assert tokenizer.bos_token is None


def adding_bos(tokenizer: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    return changed


def test_a_published_string_gets_a_bos_where_the_tokenizer_adds_one(real_tokenizer: Tokenizers) -> None:
    shipped = real_tokenizer("llama3")
    added = adding_bos(shipped)
    without, with_bos = (place(t, "Hello", template="paper") for t in (shipped, added))
    assert with_bos.row(0) == [shipped.bos_token_id, *without.row(0)]
    assert with_bos.roles(0) == ["template", *without.roles(0)]
    assert (with_bos.index - without.index == 1).all()


# ---- padding


@pytest.mark.parametrize("name", CHAT)
def test_padding_and_company_change_nothing(real_tokenizer: Tokenizers, name: str) -> None:
    template = chat_template(real_tokenizer(name))
    asked = prompts("Hi", TEXTS["long"], TEXTS["rocket"], TEXTS["Arabic"], "What is 7?")
    left, right = (tokenize(asked, template, padding_side=side) for side in ("left", "right"))
    assert left.mask[:, -1].all()
    assert right.mask[:, 0].all()
    assert left.positions == right.positions
    names = ("inst", "last", "post[0]", "post[-2]", "instruction[0]", "instruction[-1]")
    for i, prompt in enumerate(asked):
        alone = tokenize([prompt], template)
        assert alone.positions == left.positions
        assert bool(alone.mask.all())
        for batch in (left, right):
            assert batch.row(i) == alone.row(0)
            assert batch.roles(i) == alone.roles(0)
            assert batch.lengths[i] == len(alone.row(0))
            for position in names:
                assert batch.at(position)[i] - batch.offset(i) == alone.at(position)[0]
                assert batch.tokens[i, batch.at(position)[i]] == alone.tokens[0, alone.at(position)[0]]
            padding = batch.tokens[i][~batch.mask[i]]
            assert len(padding) == batch.tokens.shape[1] - len(alone.row(0))


def test_an_unknown_padding_side_is_refused(smollm2_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no padding side 'Left'; choose left or right"):
        tokenize(prompts("Hi"), chat_template(smollm2_tokenizer), padding_side="Left")


@pytest.mark.real
def test_both_sides_give_the_models_own_numbers(smollm2: Any) -> None:
    """Hidden states at named positions of a padded batch are those of one prompt at a time."""
    template = chat_template(smollm2.mechlens.tokenizer)
    asked = prompts("Hi", "How do I make a cake at home?", TEXTS["rocket"])
    alone = [states(smollm2, tokenize([prompt], template)) for prompt in asked]
    for side in ("left", "right"):
        together = states(smollm2, tokenize(asked, template, padding_side=side))
        for i, one in enumerate(alone):
            difference = (together[i] - one[0]).norm(dim=-1) / one[0].norm(dim=-1)
            assert float(difference.max()) < 1e-5, side


@torch.inference_mode()
def states(model: Any, batch: TokenBatch) -> torch.Tensor:
    """Last hidden states at every named position, by plain Hugging Face."""
    from mechlens.models.native import native

    order = (batch.mask.cumsum(dim=1) - 1).clamp(min=0)
    with native(model) as plain:
        hidden = plain.model(batch.tokens, attention_mask=batch.mask.long(), position_ids=order).last_hidden_state
    return hidden[torch.arange(len(batch.prompts))[:, None], batch.index]


# ---- system prompts and turns


def test_a_default_system_prompt_stays_and_an_own_one_takes_its_place(smollm2_tokenizer: Any) -> None:
    default, own, empty = (
        decode(smollm2_tokenizer, place(smollm2_tokenizer, "Hi", system=system).row(0))
        for system in (None, "Speak French.", "")
    )
    assert "named SmolLM" in default
    assert "named SmolLM" not in own
    assert own.startswith("<|im_start|>system\nSpeak French.<|im_end|>\n<|im_start|>user\nHi")
    assert empty.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi")


def test_a_system_prompt_folded_into_the_user_turn_is_not_the_instruction(real_tokenizer: Tokenizers) -> None:
    tokenizer = real_tokenizer("gemma3")
    batch = place(tokenizer, "Hi there", system="Speak French.")
    words, _ = words_and_after(tokenizer, batch, 0)
    assert decode(tokenizer, words) == "Hi there"
    assert "<start_of_turn>user\nSpeak French.\n\nHi there" in decode(tokenizer, batch.row(0))


@pytest.mark.parametrize("name", CHAT)
def test_only_the_last_turn_is_the_instruction(real_tokenizer: Tokenizers, name: str) -> None:
    tokenizer = real_tokenizer(name)
    turns = (("user", "Say it again"), ("assistant", "Say it again"), ("user", "Once more"), ("assistant", "No"))
    batch = place(tokenizer, "Say it again", history=turns)
    words, after = words_and_after(tokenizer, batch, 0)
    assert decode(tokenizer, words) == "Say it again"
    assert decode(tokenizer, after) == "".join(AFTER[name])
    assert batch.roles(0).count("inst") == 1


def test_a_template_that_refuses_the_order_of_turns_says_so(real_tokenizer: Tokenizers) -> None:
    with pytest.raises(UserError, match=r"refuses turns of roles \[user, user\].*alternate"):
        place(real_tokenizer("gemma3"), "Hi", history=(("user", "Hello"),))


def test_thinking_is_an_option_of_the_template(real_tokenizer: Tokenizers) -> None:
    tokenizer = real_tokenizer("qwen3")
    batch = tokenize(prompts("Hi"), chat_template(tokenizer, enable_thinking=False))
    _, after = words_and_after(tokenizer, batch, 0)
    expected = [*AFTER["qwen3"], "<think>", "\n\n", "</think>", "\n\n"]
    assert [decode(tokenizer, [token]) for token in after] == expected
    assert batch.n_post == 9
    assert batch.row(0) == own_ids(tokenizer, batch.prompts[0], enable_thinking=False)
    thinking = tokenize(prompts("Hi"), chat_template(tokenizer, enable_thinking=True))
    assert thinking.n_post == 5
    answered = (("user", "Hello"), ("assistant", "<think>\nA greeting.\n</think>\n\nHi."))
    later = place(tokenizer, "Bye", history=answered)
    assert later.row(0) == own_ids(tokenizer, later.prompts[0])
    assert decode(tokenizer, words_and_after(tokenizer, later, 0)[0]) == "Bye"


# ---- words that look like structure


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("smollm2", "<|im_end|>"),
        ("smollm2", "<|endoftext|>"),
        ("llama3", "<|eot_id|>"),
        ("llama3", "<|begin_of_text|>"),
        ("llama3", "<|reserved_special_token_7|>"),
        ("qwen3", "<|im_start|>"),
        ("qwen3", "</think>"),
        ("qwen3", "<tool_call>"),
        ("qwen3", "<|fim_prefix|>"),
        ("gemma3", "<start_of_turn>"),
        ("gemma3", "<eos>"),
    ],
)
def test_template_tokens_in_the_words_are_refused_unless_meant(
    real_tokenizer: Tokenizers, name: str, mark: str
) -> None:
    tokenizer = real_tokenizer(name)
    template = chat_template(tokenizer)
    for text in (mark, f"say {mark} now", f"{mark} say", f"say {mark}"):
        asked = prompts("fine", text)
        with pytest.raises(UserError, match=r"prompt 'p1' holds the template token .*allow_special=True"):
            tokenize(asked, template)
        batch = tokenize(asked, template, allow_special=True)
        assert batch.row(1) == own_ids(tokenizer, asked[1])
        words, after = words_and_after(tokenizer, batch, 1)
        assert decode(tokenizer, words) == text
        assert [decode(tokenizer, [token]) for token in after] == AFTER[name]


def test_html_is_ordinary_text_though_gemma_adds_its_tags_to_the_vocabulary(real_tokenizer: Tokenizers) -> None:
    tokenizer = real_tokenizer("gemma3")
    assert {"<table>", "</code>", "<h1>"} <= set(tokenizer.get_added_vocab())
    assert place(tokenizer, "Use <table>, <code>x</code> and <h1>").roles(0).count("inst") == 1


@pytest.mark.parametrize("template", ["tokenizer", "paper"])
def test_the_published_marks_count_too(real_tokenizer: Tokenizers, template: str) -> None:
    with pytest.raises(UserError, match="holds the template token"):
        place(real_tokenizer("llama3"), "a <|eot_id|> b", template=template)
    with pytest.raises(UserError, match=r"holds the template token '\[/INST\]'"):
        place(real_tokenizer("llama2"), "a [/INST] b", template="paper:llama2")


# ---- what can't be placed


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u3000"])
def test_empty_text_is_an_error(smollm2_tokenizer: Any, text: str) -> None:
    with pytest.raises(UserError, match="prompt 'p1' has no text"):
        place(smollm2_tokenizer, "fine", text)


def test_no_prompts_is_an_error(smollm2_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="there are no prompts"):
        tokenize([], chat_template(smollm2_tokenizer))


def test_half_a_character_is_an_error(smollm2_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="prompt 'p0' holds half a character"):
        place(smollm2_tokenizer, "a \ud83d b")


def test_words_that_the_tokenizer_does_not_know_at_all_are_an_error(smollm2_tokenizer: Any) -> None:
    assert smollm2_tokenizer("\x04", add_special_tokens=False)["input_ids"] == []
    with pytest.raises(UserError, match="drops every character of prompt 'p1'"):
        place(smollm2_tokenizer, "fine", "\x04")
    kept = place(smollm2_tokenizer, "fine", "\x04fine\x04")
    assert kept.row(0) == kept.row(1)
    assert kept.roles(0) == kept.roles(1)


def test_a_base_model_without_a_template_says_so(real_tokenizer: Tokenizers) -> None:
    with pytest.raises(UserError, match=r"has no chat template \(a base model\?\).*template='paper:FAMILY'"):
        place(real_tokenizer("llama2"), "Hi")
    assert place(real_tokenizer("llama2"), "Hi", template="paper:llama2").n_post == 4


@pytest.mark.parametrize("template", ["tokenizer", "paper:vicuna"])
def test_a_slow_tokenizer_is_refused(template: str) -> None:
    slow = transformers.ByT5Tokenizer()
    slow.chat_template = "{{ messages[-1]['content'] }} !"
    assert not slow.is_fast
    with pytest.raises(UserError, match="can't tell which characters a token stands for; load its fast version"):
        place(slow, "Hi", template=template)


# ---- tokens that merge the words' end with the template


@pytest.mark.parametrize(
    ("name", "text", "token"), [("llama3", "Is it so?", "?\n"), ("qwen3", "one\n", "\n\n"), ("llama3", "end ", " \n")]
)
def test_a_token_that_holds_words_and_template_is_inst_and_flagged(
    real_tokenizer: Tokenizers, name: str, text: str, token: str
) -> None:
    tokenizer = real_tokenizer(name)
    batch = place(tokenizer, "Tell me", text, template="paper:vicuna")
    assert batch.merged.tolist() == [False, True]
    assert decode(tokenizer, [int(batch.tokens[1, batch.at("inst")[1]])]) == token
    assert batch.roles(0)[-batch.n_post - 1 :] == ["inst", *(f"post[{k}]" for k in range(batch.n_post))]
    assert batch.roles(1)[-batch.n_post :] == ["inst", *(f"post[{k}]" for k in range(1, batch.n_post))]
    assert batch.at("post[0]")[1] == batch.at("inst")[1]
    for k in range(1, batch.n_post):
        first, second = (int(batch.tokens[i, batch.at(f"post[{k}]")[i]]) for i in range(2))
        assert first == second
    alone = place(tokenizer, text, template="paper:vicuna")
    assert alone.positions == batch.positions
    assert alone.roles(0) == batch.roles(1)


# ---- asking for positions by name


@pytest.fixture
def batch(smollm2_tokenizer: Any) -> TokenBatch:
    return place(smollm2_tokenizer, "Hi", "How do I make a cake?")


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["inst"], ["inst"]),
        (["last"], ["post[5]"]),
        (["post[-1]"], ["post[5]"]),
        (["post[0]", "post[-6]"], ["post[0]"]),
        (["inst", "post[*]"], ["inst", *(f"post[{k}]" for k in range(6))]),
        (["last", "inst", "post[5]"], ["post[5]", "inst"]),
        ([], []),
    ],
)
def test_names_become_columns(batch: TokenBatch, names: list[str], columns: list[str]) -> None:
    assert batch.resolve(names) == tuple(columns)
    for name in names:
        if "*" not in name:
            (column,) = batch.resolve([name])
            assert batch.at(name).equal(batch.index[:, batch.positions.index(column)])


def test_instruction_tokens_count_from_both_ends(batch: TokenBatch, smollm2_tokenizer: Any) -> None:
    ends = [[int(batch.tokens[i, batch.at(f"instruction[{k}]")[i]]) for k in (0, -1)] for i in range(2)]
    assert [[decode(smollm2_tokenizer, [token]) for token in row] for row in ends] == [["Hi", "Hi"], ["How", "?"]]
    longer = place(smollm2_tokenizer, "How do I make a cake?")
    tokens = [int(longer.tokens[0, longer.at(f"instruction[{k}]")[0]]) for k in range(7)]
    assert decode(smollm2_tokenizer, tokens) == "How do I make a cake?"
    tokens = [int(longer.tokens[0, longer.at(f"instruction[{k}]")[0]]) for k in range(-7, 0)]
    assert decode(smollm2_tokenizer, tokens) == "How do I make a cake?"
    assert longer.at("instruction[-1]").equal(longer.at("inst"))


@pytest.mark.parametrize(
    "name", ["post[6]", "post[-7]", "post", "post[]", "post[1.5]", "post[a]", "first", "", "INST", "-1", "inst "]
)
def test_unknown_names_are_user_errors(batch: TokenBatch, name: str) -> None:
    with pytest.raises(UserError, match=r"there is no position"):
        batch.resolve(["inst", name])
    with pytest.raises(UserError, match=r"there is no position"):
        batch.at(name)


@pytest.mark.parametrize("name", ["instruction[1]", "instruction[-2]"])
def test_a_prompt_too_short_is_named(batch: TokenBatch, name: str) -> None:
    with pytest.raises(UserError, match=r"prompt 'p0' is too short to have a token 'instruction"):
        batch.at(name)


def test_at_takes_one_position(batch: TokenBatch) -> None:
    with pytest.raises(UserError, match=r"'post\[\*\]' names 6 positions; ask for one of post\[0\]"):
        batch.at("post[*]")
    with pytest.raises(UserError, match=r"instruction\[\*\]"):
        batch.at("instruction[*]")


def test_roles_name_every_token_once(batch: TokenBatch, smollm2_tokenizer: Any) -> None:
    roles = batch.roles(1)
    assert len(roles) == len(batch.row(1)) == int(batch.lengths[1])
    middle = [f"instruction[{k}]" for k in range(6)]
    end = ["inst", *(f"post[{k}]" for k in range(6))]
    assert roles == ["template"] * (len(roles) - 13) + middle + end
    for position in batch.positions:
        assert roles.index(position) == batch.at(position)[1] - batch.offset(1)
    assert batch.roles(0) == ["template"] * (len(batch.row(0)) - 7) + end


def test_some_rows_of_a_batch(batch: TokenBatch) -> None:
    chosen = batch.select([1, 0, 1])
    assert [prompt.id for prompt in chosen.prompts] == ["p1", "p0", "p1"]
    for i, source in enumerate([1, 0, 1]):
        assert chosen.row(i) == batch.row(source)
        assert chosen.roles(i) == batch.roles(source)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_cut_after_inst(smollm2_tokenizer: Any, side: str) -> None:
    whole = tokenize(prompts("Hi", "How do I make a cake?"), chat_template(smollm2_tokenizer), padding_side=side)
    cut = whole.without_post()
    assert cut.positions == ("inst",)
    assert cut.n_post == 0
    for i in range(2):
        assert cut.row(i) == whole.row(i)[:-6]
        assert cut.roles(i) == whole.roles(i)[:-6]
        assert cut.tokens[i, cut.at("last")[i]] == whole.tokens[i, whole.at("inst")[i]]
    with pytest.raises(UserError, match="there is no position"):
        cut.at("post[0]")


# ---- the published strings


@pytest.mark.parametrize(
    ("name", "family", "string", "n_post"),
    [
        ("llama2", "llama2", "[INST]{q}[/INST]", 4),
        (
            "llama3",
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n{q}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n",
            5,
        ),
        ("qwen3", "qwen2", "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant", 4),
        ("llama2", "vicuna", "USER:{q}\nASSISTANT:", None),
    ],
)
def test_the_published_strings(
    real_tokenizer: Tokenizers, name: str, family: str, string: str, n_post: int | None
) -> None:
    tokenizer = real_tokenizer(name)
    question = "How do I make a cake at home"
    template = chat_template(tokenizer, f"paper:{family}")
    assert template.render(Prompt("p", question)).text == string.format(q=question)
    batch = place(tokenizer, question, template=f"paper:{family}")
    assert batch.row(0) == tokenizer(string.format(q=question))["input_ids"]
    words, _ = words_and_after(tokenizer, batch, 0)
    assert decode(tokenizer, words).strip() == question
    assert n_post is None or batch.n_post == n_post
    if tokenizer.bos_token_id is not None and name == "llama2":
        assert batch.row(0).count(tokenizer.bos_token_id) == 1
    with pytest.raises(UserError, match="no system prompt and no earlier turns"):
        place(tokenizer, question, template=f"paper:{family}", system="Be kind.")
    with pytest.raises(UserError, match="no system prompt and no earlier turns"):
        place(tokenizer, question, template=f"paper:{family}", history=(("user", "a"), ("assistant", "b")))


def test_the_family_is_found_from_the_tokenizer(real_tokenizer: Tokenizers) -> None:
    found = {name: chat_template(real_tokenizer(name), "paper").kind for name in ("llama3", "qwen3", "smollm2")}
    assert found == {"llama3": "paper:llama3", "qwen3": "paper:qwen2", "smollm2": "paper:qwen2"}
    llama2 = copy.deepcopy(real_tokenizer("llama2"))
    llama2.chat_template = "[INST] {{ messages[-1]['content'] }} [/INST]"
    assert chat_template(llama2, "paper").kind == "paper:llama2"
    with pytest.raises(UserError, match=r"looks like none; name one: paper:llama2"):
        chat_template(real_tokenizer("gemma3"), "paper")


@pytest.mark.parametrize("name", ["papers", "paper:", "paper:gemma", "llama2", "Tokenizer", "", "tokenizer:llama2"])
def test_an_unknown_template_is_a_user_error(smollm2_tokenizer: Any, name: str) -> None:
    with pytest.raises(UserError, match=r"there is no template .*choose tokenizer, paper, none or one of paper:llama2"):
        chat_template(smollm2_tokenizer, name)


# ---- fingerprints


def test_fingerprints_tell_templates_apart(real_tokenizer: Tokenizers) -> None:
    qwen = real_tokenizer("qwen3")
    edited, marked = copy.deepcopy(qwen), copy.deepcopy(qwen)
    edited.chat_template += " "
    marked.eos_token = "<|endoftext|>"
    templates = [chat_template(real_tokenizer(name)) for name in CHAT]
    templates += [chat_template(qwen, enable_thinking=False), chat_template(qwen, enable_thinking=True)]
    templates += [chat_template(edited), chat_template(marked)]
    templates += [chat_template(qwen, f"paper:{family}") for family in PAPER_TEMPLATES]
    assert len({template.fingerprint for template in templates}) == len(templates)


def test_fingerprints_of_equal_templates_are_equal(real_tokenizer: Tokenizers) -> None:
    qwen = real_tokenizer("qwen3")
    same = copy.deepcopy(qwen)
    assert chat_template(qwen).fingerprint == chat_template(same).fingerprint
    one, other = (
        chat_template(qwen, enable_thinking=False, reasoning_content=""),
        ChatTemplate(same, options={"reasoning_content": "", "enable_thinking": False}),
    )
    assert one.fingerprint == other.fingerprint
    assert chat_template(qwen, "paper").fingerprint == chat_template(same, "paper:qwen2").fingerprint
    assert place(qwen, "Hi").template == place(same, "Ho", "Hu").template == chat_template(qwen).fingerprint


# ---- the checks that hold all this up


def test_shapes_are_checked_at_run_time() -> None:
    batch = place(tiny_tokenizer(), "one", "three words here")
    wrong = {"mask": batch.mask[:, 1:], "index": batch.index[:1], "instruction": batch.index, "merged": batch.mask}
    for field, value in wrong.items():
        with pytest.raises(jaxtyping.TypeCheckError):
            replace(batch, **{field: value})
    with pytest.raises(jaxtyping.TypeCheckError):
        replace(batch, tokens=batch.tokens.float())
