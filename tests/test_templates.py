"""Template shapes in exact detail, on a tiny byte-level tokenizer whose every token can be counted in bytes."""

import datetime
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tiny import CHATML, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import ByteLevel

from mechlens.errors import UserError
from mechlens.prompts.batch import TokenBatch, token_text, tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template

# Jinja drops a newline at the very end of a template, so some shapes write theirs as NEWLINE.
LAST = "{{ messages[-1]['content'] }}"
NEWLINE = "{{ '\n' }}"
ANSWER = "<|im_start|>assistant" + NEWLINE
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<|im_start|>{{ m['role'] }}\n{{ first if loop.first else '' }}{{ m['content'] | trim }}"
    "<|im_end|>\n{% endfor %}<|im_start|>model" + NEWLINE
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + ANSWER
)
THINKING = NO_SYSTEM + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
DATED = (
    "<|im_start|>system\nToday is {{ date_string or strftime_now('%d %b %Y') }}.<|im_end|>\n"
    "<|im_start|>user\n" + LAST + "<|im_end|>\n" + ANSWER
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% else %}A chat between a curious user "
    "and an assistant. {% endif %}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% elif m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}ASSISTANT:"
)
TURNS = (("user", "Hello"), ("assistant", "the thing"))
IM = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Shape:
    """A template and what it must write around the user's words."""

    template: str
    before: str
    after: str
    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    trims: bool = False


SHAPES = {
    "ChatML with its default system prompt": Shape(
        CHATML, "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\n", IM
    ),
    "ChatML with a system prompt": Shape(
        CHATML, "<|im_start|>system\nthe sea<|im_end|>\n<|im_start|>user\n", IM, {"system": "the sea"}
    ),
    "ChatML with turns and its default system prompt": Shape(
        CHATML,
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nthe thing<|im_end|>\n<|im_start|>user\n",
        IM,
        {"history": TURNS},
    ),
    "Llama-2": Shape(LLAMA2, "<bos>[INST] ", " [/INST]", trims=True),
    "Llama-2 with a system prompt": Shape(
        LLAMA2, "<bos>[INST] <<SYS>>\nthe sea\n<</SYS>>\n\n", " [/INST]", {"system": "the sea"}, trims=True
    ),
    "Llama-2 with turns": Shape(
        LLAMA2,
        "<bos>[INST] Hello [/INST] the thing <|im_end|><bos>[INST] ",
        " [/INST]",
        {"history": TURNS},
        trims=True,
    ),
    "Llama-2 without spaces": Shape("<bos>[INST]" + LAST + "[/INST]", "<bos>[INST]", "[/INST]"),
    "system prompt folded into the user turn": Shape(
        GEMMA,
        "<bos><|im_start|>user\nthe sea\n\n",
        "<|im_end|>\n<|im_start|>model\n",
        {"system": "the sea"},
        trims=True,
    ),
    "trimmed content": Shape(GEMMA, "<bos><|im_start|>user\n", "<|im_end|>\n<|im_start|>model\n", trims=True),
    "no system prompt": Shape(NO_SYSTEM, "<|im_start|>user\n", IM),
    "thinking by default": Shape(THINKING, "<|im_start|>user\n", IM),
    "thinking switched off": Shape(
        THINKING, "<|im_start|>user\n", IM + "<think>\n\n</think>\n\n", options={"enable_thinking": False}
    ),
    "thinking always opened": Shape(NO_SYSTEM + "<think>" + NEWLINE, "<|im_start|>user\n", IM + "<think>\n"),
    "a date given": Shape(
        DATED,
        "<|im_start|>system\nToday is 26 Jul 2024.<|im_end|>\n<|im_start|>user\n",
        IM,
        options={"date_string": "26 Jul 2024"},
    ),
    "plain words": Shape(VICUNA, "A chat between a curious user and an assistant. USER: ", " ASSISTANT:"),
    "plain words with turns": Shape(
        VICUNA,
        "the sea USER: Hello ASSISTANT: the thing</s>USER: ",
        " ASSISTANT:",
        {"system": "the sea", "history": TURNS},
    ),
    "nothing before": Shape(LAST + "\n\nAnswer: ", "", "\n\nAnswer: "),
    "white space after": Shape("Q " + LAST + " \n ", "Q ", " \n "),
    "letters after": Shape("<bos>" + LAST + "he end", "<bos>", "he end"),
}
TEXTS = (
    "How do I make a cake?", "a", "t", "the thing", "sing the", "7", "naïve café", "cafe\u0301", "👩‍🚀", "🇺🇳",
    "كيف أصنع كعكة", "如何", " a", "  two", "two ", "two  ", "two   ", "two    ", "line\n", "line \n", "\nline",
    "\n a \n", "a\tb\t", "no-break\u00a0", "[INST", "mechlens zero sentinel", "{{ messages }}", "{% if a %}", "a" * 300,
)  # fmt: skip


def tokenizers(template: str) -> dict[str, Any]:
    """Byte-level tokenizers that merge white space and report offsets in both ways there are."""
    plain, trimming = (with_merges(tiny_tokenizer(template, extra=("<think>", "</think>"))) for _ in range(2))
    trimming.backend_tokenizer.post_processor = ByteLevel(add_prefix_space=False, trim_offsets=True)
    return {"whole offsets": plain, "offsets without spaces": trimming}


def with_merges(tokenizer: Any) -> Any:
    """The tokenizer with tokens of several spaces and newlines."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for left, right in (("Ġ", "Ġ"), ("ĠĠ", "Ċ"), ("Ġ", "Ċ"), ("Ċ", "Ċ"), ("ĠĊ", "Ġ")):
        state["model"]["vocab"][left + right] = len(state["model"]["vocab"])
        state["model"]["merges"].append([left, right])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer


def place(tokenizer: Any, *texts: str, options: dict[str, Any] | None = None, **fields: Any) -> TokenBatch:
    prompts = [Prompt(id=f"p{i}", text=text, **fields) for i, text in enumerate(texts)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenize(prompts, chat_template(tokenizer, **(options or {})))


def byte_ends(tokenizer: Any, ids: list[int]) -> list[int]:
    """Where each token ends, in bytes: a byte-level token has one character per byte."""
    ends, total = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        total += len(token)
        ends.append(total)
    return ends


@pytest.mark.parametrize("offsets", ["whole offsets", "offsets without spaces"])
@pytest.mark.parametrize("kind", SHAPES)
def test_positions_counted_in_bytes(kind: str, offsets: str) -> None:
    shape = SHAPES[kind]
    tokenizer = tokenizers(shape.template)[offsets]
    batch = place(tokenizer, *TEXTS, options=shape.options, **shape.fields)
    n_post = len(tokenizer("sentinel" + shape.after)["input_ids"]) - len("sentinel") + 1  # "in" is one token
    assert batch.n_post == n_post
    for i, text in enumerate(TEXTS):
        kept = text.strip() if shape.trims else text
        whole = shape.before + kept + shape.after
        assert batch.row(i) == tokenizer(whole)["input_ids"]
        assert chat_template(tokenizer, **shape.options).render(batch.prompts[i]).text == whole
        first = len(shape.before.encode())
        end = first + len(kept.encode())
        ends = byte_ends(tokenizer, batch.row(i))
        assert ends[-1] == len(whole.encode())
        start = sum(e <= first for e in ends)
        inst = sum(e < end for e in ends)
        assert batch.instruction[i].tolist() == [start, inst], repr(text)
        assert bool(batch.merged[i]) == (ends[inst] > end), repr(text)
        roles = batch.roles(i)
        assert roles[inst] == "inst"
        if not batch.merged[i]:
            assert roles[inst + 1 :] == [f"post[{k}]" for k in range(n_post)]
        assert batch.at("last")[i] == len(ends) - 1


@pytest.mark.parametrize("kind", SHAPES)
def test_the_longest_common_suffix_agrees(kind: str) -> None:
    shape = SHAPES[kind]
    tokenizer = tokenizers(shape.template)["whole offsets"]
    batch = place(tokenizer, "What is a cake", "Tell me about the sea.", "at 7", options=shape.options, **shape.fields)
    rows = [batch.row(i) for i in range(3)]
    n = 0
    while len({row[-1 - n] for row in rows}) == 1:
        n += 1
    assert batch.n_post == n
    assert batch.at("inst").tolist() == [len(row) - 1 - n for row in rows]


@pytest.mark.parametrize("kind", SHAPES)
def test_a_batch_names_positions_as_one_prompt_does(kind: str) -> None:
    shape = SHAPES[kind]
    tokenizer = tokenizers(shape.template)["whole offsets"]
    batch = place(tokenizer, *TEXTS, options=shape.options, **shape.fields)
    for i, text in enumerate(TEXTS):
        alone = place(tokenizer, text, options=shape.options, **shape.fields)
        assert alone.positions == batch.positions
        assert alone.index[0].equal(batch.index[i] - batch.offset(i))
        assert alone.roles(0) == batch.roles(i)


# ---- merging


def test_two_template_tokens_merged_into_the_words() -> None:
    tokenizer = tiny_tokenizer(SHAPES["letters after"].template)
    batch = place(tokenizer, "s", "t")
    assert tokenizer.convert_ids_to_tokens(batch.row(0)) == ["<bos>", "s", "h", "e", "Ġ", "e", "n", "d"]
    assert tokenizer.convert_ids_to_tokens(batch.row(1)) == ["<bos>", "the", "Ġ", "e", "n", "d"]
    assert batch.merged.tolist() == [False, True]
    assert batch.roles(1) == ["template", "inst", "post[2]", "post[3]", "post[4]", "post[5]"]
    assert batch.index[1].tolist() == [1, 1, 1, 2, 3, 4, 5]
    alone = place(tokenizer, "t")
    assert alone.n_post == 6
    assert alone.roles(0) == batch.roles(1)


# ---- templates that can't be used, and why


@pytest.mark.parametrize(
    ("template", "fields", "said"),
    [
        (LAST + " again: " + LAST + "!", {}, "writes the last user turn 2 times instead of once"),
        ("{{ messages[-1]['content'] | upper }}!", {}, "writes the last user turn 0 times instead of once"),
        ("Hello!", {}, "writes the last user turn 0 times instead of once"),
        ("{{ messages[0]['content'] }}!", {"history": TURNS}, "writes the last user turn 0 times"),
        ("{{ messages[-1]['content'] | length }} " + LAST + "!", {}, "changes with the user's words"),
        ("{{ messages[-1]['content'] | replace('cake', 'pie') }}!", {}, "rewrites the text of prompt 'p0'"),
        ("{{ messages[-1]['content'][:25] }}!", {}, "rewrites the text of prompt 'p0'"),
        (
            "{% if 'cake' in messages[-1]['content'] %}Yum. {% endif %}" + LAST + "!",
            {},
            "rewrites the text of prompt 'p0'",
        ),
        ("<bos>" + LAST, {}, "writes nothing after the user's words; there is no `post` position"),
        (NO_SYSTEM, {"system": "Be kind."}, r"refuses turns of roles \[system, user\]: System role not supported"),
        (LAST + "!", {"system": "Be kind."}, "drops the system prompt"),
        (LAST + "!", {"history": TURNS}, "drops the earlier turns"),
        ("<bos><bos>" + LAST + "!", {}, "starts with two BOS tokens"),
        (
            "{{ raise_exception('Roles must alternate,\n user first.') }}" + LAST,
            {},
            r"refuses turns of roles \[user\]: Roles must alternate, user first; give the tokenizer another one$",
        ),
        ("{% if %}" + LAST, {}, r"can't be rendered for turns of roles \[user\]: .*; give the tokenizer a sound"),
        ("{{ missing.x }}" + LAST, {}, r"can't be rendered for turns of roles \[user\]: 'missing' is undefined; "),
        (None, {}, r"has no chat template \(a base model\?\)"),
        ("", {}, r"has no chat template \(a base model\?\)"),
    ],
)
def test_what_is_said_of_a_template_that_does_not_fit(template: str | None, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        place(tiny_tokenizer(template), "How do I make a cake at home?", **fields)


def test_prompts_with_ends_of_different_length_are_not_mixed() -> None:
    earlier = "{% for m in messages[:-1] %}{{ m['content'] }}, {% endfor %}"
    tokenizer = tiny_tokenizer(earlier + LAST + "{% if messages | length > 1 %} now{% endif %}:")
    alone, later = Prompt("a", "Hi"), Prompt("b", "Hi", history=(("system", "Hi"),))
    template = chat_template(tokenizer)
    assert [tokenize([prompt], template).n_post for prompt in (alone, later)] == [1, 5]
    with pytest.raises(UserError, match=r"writes 1 or 5 tokens after the user's words, depending on the prompt"):
        tokenize([alone, later], template)


# ---- BOS


@pytest.mark.parametrize("written", ["<bos>", "\n<bos>", ""])
def test_one_bos_whoever_writes_it(written: str) -> None:
    from tokenizers.processors import TemplateProcessing

    template = written + "Q: " + LAST + "\nA:"
    silent, eager = tiny_tokenizer(template), tiny_tokenizer(template)
    eager.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert eager("a")["input_ids"][0] == 1
    assert place(silent, "Hi").row(0).count(1) == (1 if written else 0)
    batch = place(eager, "Hi")
    assert batch.row(0).count(1) == 1
    assert batch.row(0).count(2) == 0
    assert batch.tokens[0, batch.at("instruction[0]")] == silent("H")["input_ids"][0]


# ---- template tokens that swallow white space, as Phi-3's do


def test_white_space_swallowed_by_a_template_token_is_not_the_instruction() -> None:
    def greedy(**sides: bool) -> Any:
        tokenizer = tiny_tokenizer(
            "<|im_start|>\n" + LAST + "<|im_end|>\n<|assistant|>" + NEWLINE, extra=("<|assistant|>",)
        )
        marks = [AddedToken(mark, special=True, normalized=False, **sides) for mark in ("<|im_start|>", "<|im_end|>")]
        tokenizer.add_special_tokens({"additional_special_tokens": [*marks, "<|assistant|>"]})
        tokenizer.eos_token = marks[1]
        return tokenizer

    def tokens(tokenizer: Any, text: str) -> list[tuple[str, str]]:
        batch = place(tokenizer, text)
        return list(zip(tokenizer.convert_ids_to_tokens(batch.row(0)), batch.roles(0), strict=True))

    end = [("<|im_end|>", "post[0]"), ("<|assistant|>", "post[1]"), ("Ċ", "post[2]")]
    assert tokens(greedy(rstrip=True), "  hi")[:3] == [
        ("<|im_start|>", "template"), ("h", "instruction[0]"), ("i", "inst"),
    ]  # fmt: skip
    assert tokens(greedy(rstrip=True), "hi")[-3:] == end
    both = tokens(greedy(lstrip=True, rstrip=True), " hi \n")
    assert both == [("<|im_start|>", "template"), ("h", "instruction[0]"), ("i", "inst"), *end]


# ---- options and dates


def test_options_reach_the_template_and_its_fingerprint() -> None:
    tokenizer = tiny_tokenizer(DATED)
    monday, tuesday = (chat_template(tokenizer, date_string=f"{day} Jul 2024") for day in ("22", "23"))
    prompt = Prompt("p", "Hi")
    assert "Today is 22 Jul 2024." in monday.render(prompt).text
    assert "Today is 23 Jul 2024." in tuesday.render(prompt).text
    assert monday.fingerprint != tuesday.fingerprint != chat_template(tokenizer).fingerprint
    assert monday.fingerprint == chat_template(tokenizer, date_string="22 Jul 2024").fingerprint


def test_a_template_that_knows_the_day() -> None:
    tokenizer = tiny_tokenizer(DATED)
    days = [datetime.datetime.now().strftime("%d %b %Y")]
    text = chat_template(tokenizer).render(Prompt("p", "Hi")).text
    days.append(datetime.datetime.now().strftime("%d %b %Y"))
    assert any(f"Today is {day}." in text for day in days)
    assert place(tokenizer, "Hi").n_post == place(tokenizer, "Hi", options={"date_string": "26 Jul 2024"}).n_post


ANNIVERSARY = "{% if strftime_now('%m-%d') == '07-26' %}Hooray. {% endif %}" + LAST + "!"


def test_the_fingerprint_is_of_what_is_written_on_the_day() -> None:
    tokenizer = tiny_tokenizer(DATED)
    days = [chat_template(tokenizer, today=f"2024-07-{day}") for day in (26, 26, 27)]
    texts = [day.render(Prompt("p", "Hi")).text for day in days]
    assert ["Today is 26 Jul 2024." in text for text in texts] == [True, True, False]
    assert days[0].fingerprint == days[1].fingerprint != days[2].fingerprint
    assert [day.printed_date for day in days] == ["2024-07-26", "2024-07-26", "2024-07-27"]
    # A date that is given as an option is the same on every day.
    given = [chat_template(tokenizer, today=day, date_string="1 May 2020") for day in ("2024-07-26", "2024-07-27")]
    assert given[0].fingerprint == given[1].fingerprint
    assert given[0].printed_date is None
    # Nor does a template that asks for no date change with it.
    plain = [chat_template(tiny_tokenizer(), today=day) for day in ("2024-07-26", "2024-07-27")]
    assert plain[0].fingerprint == plain[1].fingerprint
    assert plain[0].printed_date is None


def test_only_what_is_written_counts() -> None:
    first, second, third = (chat_template(tiny_tokenizer(ANNIVERSARY), today=f"2024-07-{day}") for day in (24, 25, 26))
    assert first.fingerprint == second.fingerprint != third.fingerprint


# ---- arguments of the template


def test_arguments_are_json_where_they_parse_and_text_elsewhere() -> None:
    source = THINKING + "{{ [level, who, day] | tojson }}"
    given = ("enable_thinking=false", "level=3", 'who={"a": [1, null]}', "day=26 Jul = today")
    template = chat_template(tiny_tokenizer(source, extra=("<think>", "</think>")), template_arg=given)
    written = template.render(Prompt("p", "Hi")).text
    assert written.endswith('<think>\n\n</think>\n\n[3, {"a": [1, null]}, "26 Jul = today"]')
    same = chat_template(template.tokenizer, enable_thinking=False, level=3, who={"a": [1, None]}, day="26 Jul = today")
    assert same.fingerprint == template.fingerprint
    assert chat_template(template.tokenizer).fingerprint != template.fingerprint
    # JSON's own text, for what would otherwise be a number; and no JSON at all, however deep.
    for text, value in {'level="3"': "3", "level=": "", "level=" + "[" * 100_000: "[" * 100_000}.items():
        assert chat_template(template.tokenizer, template_arg=[text]).options == {"level": value}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("enable_thinkin=false", r"never reads the argument 'enable_thinkin' \(did you mean 'enable_thinking'\?\); it"),
        ("effort=high", "never reads the argument 'effort'; it reads day, enable_thinking, late"),
        # What is set inside, what comes with every template, the turns and the special tokens are nobody's to give.
        ("own=1", "never reads the argument 'own'"),
        ("namespace=1", "never reads the argument 'namespace'"),
        ("messages=[]", "never reads the argument 'messages'"),
        ("add_generation_prompt=false", "never reads the argument 'add_generation_prompt'"),
        ("bos_token=x", "never reads the argument 'bos_token'"),
        ("tokenizer=x", "never reads the argument 'tokenizer'"),
        ("enable_thinking", "'enable_thinking' isn't of the form NAME=VALUE"),
        ("=false", "'=false' isn't of the form NAME=VALUE"),
        ("enable_thinking=False", "is in Python's spelling; write enable_thinking=false"),
    ],
)
def test_an_argument_that_would_not_be_heeded_is_refused(given: str, said: str) -> None:
    source = (
        "{{ bos_token }}{% set own = namespace(n=1) %}{% if add_generation_prompt and own.n %}{{ strftime_now('%Y') }}"
        "{% endif %}{% if not late is defined %}{% set late = day %}{% endif %}{{ late }}" + THINKING
    )
    with pytest.raises(UserError, match=said):
        chat_template(tiny_tokenizer(source), template_arg=[given])


def test_arguments_given_twice_or_to_a_template_without_any() -> None:
    with pytest.raises(UserError, match=r"'a=2' gives 'a' twice; write it once"):
        chat_template(tiny_tokenizer(), template_arg=["a=1", "a=2"])
    for template in ("tokenizer", "paper:qwen2"):
        with pytest.raises(UserError, match="never reads the argument 'enable_thinking'; it reads none"):
            chat_template(tiny_tokenizer("<bos>" + LAST + "!"), template, enable_thinking=False)
    with pytest.raises(UserError, match="has no chat template"):
        chat_template(tiny_tokenizer(None), enable_thinking=False)
    # A template that can't be rendered says so itself.
    broken = chat_template(tiny_tokenizer("{% if %}" + LAST), enable_thinking=False)
    with pytest.raises(UserError, match="can't be rendered"):
        broken.render(Prompt("p", "Hi"))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        # Of the first, one branch sets the second and third name, and jinja2 can't tell which branch is taken.
        ("qwen3", {"enable_thinking", "content", "reasoning_content"}),
        ("llama3", set()),
        ("smollm2", set()),
    ],
)
def test_the_arguments_of_real_templates(name: str, wanted: set[str], real_tokenizer: Callable[[str], Any]) -> None:
    read = chat_template(real_tokenizer(name)).arguments
    assert read is not None
    assert set(read) - {"tools", "custom_tools", "builtin_tools"} == wanted


# ---- turns that a template passes over


@pytest.mark.parametrize("role", ["tool", "developer", "assistant", "system", "user"])
def test_no_turn_vanishes_silently(role: str) -> None:
    skips = (
        "{% for m in messages %}{% if m['role'] != '" + role + "' or loop.last %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + ANSWER
    )
    # "user" stands in the text anyway: that the words are there doesn't mean that the turn is.
    turns = ((role, "user"), ("user", "Hi")) if role != "user" else (("user", "user"), ("assistant", "Hi"))
    with pytest.raises(UserError, match=r"the chat template drops the (earlier turns|system prompt)"):
        place(tiny_tokenizer(skips), "Why?", history=turns)
    kept = place(tiny_tokenizer(NO_SYSTEM.replace("'system'", "'none'")), "Why?", history=turns)
    assert f"{role}\nuser<|im_end|>" in tiny_tokenizer().decode(kept.row(0))


@pytest.mark.parametrize("role", ["tool", "system"])
@pytest.mark.parametrize("content", ["in", "user", "Why", "Hello"])
def test_a_turn_dropped_for_its_words_is_missed_though_they_stand_elsewhere(role: str, content: str) -> None:
    kept = NO_SYSTEM.replace("'system'", "'none'")
    short = kept.replace("{% if m", "{% if m['content'] | length < 7 and m['role'] == '" + role + "' %}{% elif m")
    short = short.replace("{% endif %}<|", "{% else %}<|").replace("{% endfor %}", "{% endif %}{% endfor %}")
    turns = ((role, content), ("user", "Hello in there"), ("assistant", ""), ("user", "Hi"))
    with pytest.raises(UserError, match=r"the chat template drops the (earlier turns|system prompt)"):
        place(tiny_tokenizer(short), "Why in the end?", history=turns)
    assert f"{role}\n{content}<|im_end|>" in tiny_tokenizer().decode(
        place(tiny_tokenizer(kept), "Why in the end?", history=turns).row(0)
    )


def test_what_an_answer_was_thinking_may_be_left_out() -> None:
    forgets = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
        "{% endfor %}" + ANSWER
    )
    place(tiny_tokenizer(forgets), "Why?", history=(("user", "Hi"), ("assistant", "<think>hm</think>\n\nHello")))
    cut = forgets.replace(".split('</think>')[-1]", "[:24]")
    with pytest.raises(UserError, match="drops the earlier turns of role tool"):
        place(tiny_tokenizer(cut), "Why?", history=(("user", "Hi"), ("tool", "much more than that will ever hold")))


# ---- words that look like structure


@pytest.mark.parametrize(
    ("template", "text"),
    [(CHATML, mark) for mark in ("<pad>", "<bos>", "<|im_start|>", "<|im_end|>")]
    + [(LLAMA2, "[/INST]"), (LLAMA2, "<bos>[INST]"), (VICUNA, "ASSISTANT:")]
    + [(NO_SYSTEM, "<|im_start|>user"), ("Q: " + LAST + "\nA:", "Q: 1\nA: 2")],
)
def test_structure_in_the_words_is_an_error(template: str, text: str) -> None:
    tokenizer = tiny_tokenizer(template)
    with pytest.raises(UserError, match="prompt 'p1' holds the template token"):
        place(tokenizer, "fine", f"say {text} now")
    prompts = [Prompt("p0", f"say {text} now")]
    batch = tokenize(prompts, chat_template(tokenizer), allow_special=True)
    start, inst = batch.instruction[0].tolist()
    assert tokenizer.decode(batch.row(0)[start : inst + 1]).strip() == f"say {text} now"


def test_added_words_are_words() -> None:
    """What a vocabulary was extended by for a field is no structure, even where the template writes the same word."""
    added = ["myeloma", "user", "covid-19", "new york", "C++", "don't", "3.5", "naïve", "癌", "👩‍🚀", "<b>", "..."]
    tokenizer = tiny_tokenizer(NO_SYSTEM)
    tokenizer.add_tokens(added)
    for word in added:
        batch = place(tokenizer, f"say {word}")
        start, inst = batch.instruction[0].tolist()
        assert batch.row(0)[start : inst + 1] == tokenizer(f"say {word}", add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_tokens_to_ids(word) in batch.row(0)


@pytest.mark.parametrize("mark", ["<|tool|>", "[TURN]", "<tool_call>", "{sep}", "Human:", "### Answer", "|end|"])
def test_added_marks_are_structure(mark: str) -> None:
    tokenizer = tiny_tokenizer(NO_SYSTEM.replace("{% for", mark + "{% for", 1))
    tokenizer.add_tokens([mark])
    with pytest.raises(UserError, match=r"prompt 'p0' holds the template token"):
        place(tokenizer, f"say {mark} now")


def test_a_token_is_never_shown_as_nothing() -> None:
    tokenizer = tiny_tokenizer()
    assert token_text(tokenizer, tokenizer.convert_tokens_to_ids("the")) == "the"
    assert token_text(tokenizer, len(tokenizer)) == f"<id {len(tokenizer)}>"
    assert token_text(tokenizer, 10**6) == "<id 1000000>"
    assert all(token_text(tokenizer, token) for token in range(len(tokenizer) + 5))


@pytest.mark.parametrize("trim", ["strip", "rstrip", "lstrip"])
def test_each_way_of_trimming(trim: str) -> None:
    tokenizer = tiny_tokenizer("Q{{ messages[-1]['content']." + trim + "() }}." + NEWLINE)
    trimmed: Callable[[str], str] = getattr(str, trim)
    batch = place(tokenizer, "  two words ")
    start, inst = batch.instruction[0].tolist()
    assert tokenizer.decode(batch.row(0)[start : inst + 1]) == trimmed("  two words ")
