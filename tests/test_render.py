"""A template is a stranger's program: what it writes is as with transformers, and it can't hang or fill the memory."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_templates import SHAPES, TURNS
from tiny import CHATML, tiny_tokenizer

from mechlens.errors import UserError
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates import render as rendering
from mechlens.prompts.templates import render_worker
from mechlens.prompts.templates.render import end_workers, render
from mechlens.prompts.templates.template import chat_template

HELLO = [[{"role": "user", "content": "Hello"}]]
DAY = "2024-07-26"
LAST = "{{ messages[-1]['content'] }}"


def written(source: str) -> list[str]:
    return render(source, HELLO, {}, DAY)


# ---- the oracle: transformers


SPEAKS_ALL = (
    "{%- set ns = namespace(n=0, found=false) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}"
    "{%- if m.role == 'tool' -%}{%- continue -%}{%- endif -%}{%- if ns.n > 8 -%}{%- break -%}{%- endif -%}\n"
    "  [{{ loop.index0 }} {{ m | tojson }} {{ m | tojson(indent=2) }} {{ dict(a=1, b='é') | tojson }}]\n"
    "    {% generation %}{{ m.content | trim }}{% set ns.found = true %}{% endgeneration %} {{ ns.found }}\n"
    "{%- endfor -%}{% macro said(x) %}<{{ x }}>{% endmacro %}{{ said('a') ~ bos_token ~ (tools is none) }}"
    "{{ documents is none }}{{ unknown is defined }}{{ [3, 1] | sort | join(',') }}{{ 'a-b'.split('-')[::-1] }}"
    "{% if add_generation_prompt %}go{% endif %}{{ strftime_now is defined }}{{ '%05d' % 7 }}\n\n"
)
TEMPLATES = {name: shape.template for name, shape in SHAPES.items()} | {"every construct": SPEAKS_ALL}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_written_is_what_transformers_writes(name: str) -> None:
    options = SHAPES[name].options if name in SHAPES else {}
    tokenizer = tiny_tokenizer(TEMPLATES[name], extra=("<think>",))
    template = chat_template(tokenizer, **options)
    turns = [
        [{"role": "user", "content": " naïve {{ x }} <b> & \u2028 "}],
        [*({"role": role, "content": content} for role, content in TURNS), {"role": "user", "content": "Why?"}],
        [{"role": "tool", "content": "3"}, {"role": "user", "content": "And?"}],
    ]
    for conversation in turns:
        for more in (True, False):
            ours = template._written([conversation], template.today, add_generation_prompt=more)
            theirs = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=more, **options)
            assert ours == [theirs]


def test_what_is_written_with_real_templates_is_what_transformers_writes(smollm2_tokenizer: Any) -> None:
    (ours,) = chat_template(smollm2_tokenizer)._written(HELLO, DAY)
    assert ours == smollm2_tokenizer.apply_chat_template(HELLO[0], tokenize=False, add_generation_prompt=True)


# ---- strangers


def test_asking_a_hostile_template_for_its_arguments() -> None:
    """Compiling works out constants, so that it happens in the worker too."""
    giant = "{{ ('a' | center(99999999999)) | length }}{{ wanted }}"
    chat_template(tiny_tokenizer(giant), wanted=1)
    assert chat_template(tiny_tokenizer("{{ wanted }}")).arguments == ("wanted",)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
NESTED = "{% set ns = namespace(l=[1]) %}" + "{% set ns.l = [ns.l, ns.l] %}" * 60
HOSTILE = {
    "nested loops": LOOPS + "{% endfor %}{% endfor %}{% endfor %}" + LAST,
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}" + LAST,
    "a power": "{{ (7 ** (9 ** 9)) % 10 }}" + LAST,
    "a giant string": "{{ ('a' * 10 ** 11) | length }}" + LAST,
    "a giant string while compiling": "{{ ('a' | center(99999999999)) | length }}" + LAST,
    "a giant width": "{{ ('%99999999999d' % 1) | length }}" + LAST,
    "a giant format": "{{ '{:99999999999}'.format(1) | length }}" + LAST,
    "doubling without a loop": "{% set ns = namespace(s='abcd') %}" + "{% set ns.s = ns.s ~ ns.s %}" * 60 + LAST,
    "replacing": "{% set ns = namespace(s='aa') %}" + "{% set ns.s = ns.s.replace('a', 'aaaaaaaa') %}" * 40 + LAST,
    "lists in lists, printed": NESTED + "{{ ns.l }}" + LAST,
    "lists in lists, compared": NESTED + "{% set a = ns.l %}" + NESTED + "{{ a == ns.l }}" + LAST,
    "much that is written": "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}" + LAST,
    "brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}" + LAST,
    "blocks": "{% if 1 %}" * 20_000 + LAST + "{% endif %}" * 20_000,
    "an endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + LAST,
    "a giant template": "{# " + "a" * 2_000_000 + " #}" + LAST,
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}" + LAST,
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Workers with a second instead of ten, so that the tests are quick; a worker is told by its script."""
    script = Path(render_worker.__file__).read_text(encoding="utf-8")
    assert "SECONDS = 10\n" in script
    (tmp_path / "worker.py").write_text(script.replace("SECONDS = 10\n", "SECONDS = 0\n"), encoding="utf-8")
    monkeypatch.setattr(render_worker, "__file__", str(tmp_path / "worker.py"))


@pytest.fixture
def own_workers() -> Iterator[None]:
    """No worker from before, and none that stays."""
    end_workers()
    yield
    end_workers()


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.usefixtures("impatient", "own_workers")
def test_no_template_hangs_or_fills_the_memory(name: str) -> None:
    template = chat_template(tiny_tokenizer(HOSTILE[name]))
    with pytest.raises(UserError, match="the chat template") as caught:
        template.render(Prompt("p", "Hello"))
    assert len(str(caught.value)) < 500
    # The next one is written as if nothing had been.
    assert "Hello" in chat_template(tiny_tokenizer(CHATML)).render(Prompt("p", "Hello")).text


# ---- the process


def test_threads_get_their_own_texts() -> None:
    template = chat_template(tiny_tokenizer())
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: template.render(Prompt("p", f"number {i}")).text, range(200)))
    assert all(f"user\nnumber {i}<|im_end|>" in text for i, text in enumerate(texts))


@pytest.mark.usefixtures("own_workers")
def test_a_worker_that_is_gone_or_was_interrupted_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(LAST + "!") == ["Hello!"]
    (worker,) = rendering._workers
    worker._process.kill()
    worker._process.wait()
    assert written(LAST + "?") == ["Hello?"]

    def interrupted(self: Any, request: str) -> None:
        self._process.stdin.write(request.encode() + b"\n")
        self._process.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(rendering._Worker, "ask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            written(LAST + " one")
    assert written(LAST + " two") == ["Hello two"]


@pytest.mark.usefixtures("own_workers")
def test_a_forked_process_has_its_own_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    written(LAST)
    (before,) = rendering._workers
    pid = os.getpid()
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: pid + 1)
        assert written(LAST + "!") == ["Hello!"]
        (ours,) = rendering._workers
        assert ours is not before
        end_workers()
    assert before._process.poll() is None  # its owner's still
    before.end()
    assert before._process.poll() is not None


def test_the_worker_imports_nothing_but_jinja() -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1], run_name='worker'); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(render_worker.__file__))], capture_output=True, text=True, check=True
    )
    assert not {"mechlens", "torch", "transformers", "numpy"} & {name.split(".")[0] for name in done.stdout.split()}


def test_half_a_character_from_a_template_is_said() -> None:
    with pytest.raises(UserError, match="the chat template writes half a character"):
        render("{{ messages[0].content }}{{ '\\ud83d' }}", [[{"role": "user", "content": "hi"}]], {}, "2026-01-01")


def test_the_same_template_draws_the_same_by_chance() -> None:
    source = "{{ range(10 ** 5) | random }} {{ lipsum() }}"
    assert written(source) == written(source) == render(source, HELLO * 2, {}, DAY)[1:]


@pytest.mark.parametrize("today", ["yesterday", "2024-02-31", "", "26 Jul 2024"])
def test_a_day_that_is_none(today: str) -> None:
    with pytest.raises(UserError, match=r"there is no day .*; write it as year-month-day, such as 2024-07-26"):
        chat_template(tiny_tokenizer(), today=today)


def test_options_that_are_no_plain_data() -> None:
    with pytest.raises(UserError, match="the options of a chat template must be plain data"):
        chat_template(tiny_tokenizer("{{ tools }}" + LAST + "!"), tools=[object()]).render(Prompt("p", "Hi"))


def test_many_prompts_are_rendered_as_one_by_one() -> None:
    template = chat_template(tiny_tokenizer())
    asked = [
        Prompt(str(i), f"number {i}" + " long" * (i == 7) * 60_000, system=("Be kind.", None)[i % 2], history=turns)
        for i, turns in enumerate([(), TURNS, (("user", "Hi"), ("assistant", "Ho"))] * 200)
    ]
    together = template.render_all(asked)
    assert together[::37] == [template.render(prompt) for prompt in asked[::37]]
    assert [f"number {i}" in rendered.text[rendered.start : rendered.end] for i, rendered in enumerate(together)] == [
        True
    ] * len(asked)
    assert ["Be kind." in rendered.text for rendered in together[::2]] == [True] * 300
