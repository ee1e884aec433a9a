"""The process that chat templates are rendered in, since a stranger's template may loop for ever or fill the memory.

Run as a script by `render`, with nothing of mechlens imported. A line of JSON comes in, a line of JSON goes out.
The environment is that of transformers' `apply_chat_template`, but for the clock and for chance, which stand still.
"""

import json
import random
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import meta, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY = 1 << 30
"""Bytes that rendering may use, with the interpreter's own."""
SECONDS = 10
"""Seconds of processor time for all that one request asks."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's words for training; rendered, it is what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class PlainNamespace(Namespace):
    """A namespace that no name beginning with an underscore gets into."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            PlainNamespace.check(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        PlainNamespace.check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def check(name: object) -> None:
        """SecurityError for a name that Python could mean something by."""
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not keep {name!r} in a namespace")


class MakeDict:
    """`dict` without what hangs on Python's own type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """dict(...)"""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """dict.fromkeys(...)"""
        return dict.fromkeys(*args)


def as_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without jinja's escaping for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def fail(message: str) -> None:
    """What `raise_exception` does in a template."""
    raise jinja2.exceptions.TemplateError(message)


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """The template, ready to be rendered."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {"raise_exception": fail, "dict": MakeDict(), "namespace": PlainNamespace}
    return environment.from_string(source)


def names_read(source: str) -> list[str]:
    """What the template asks its caller for, but for the turns and what this environment has."""
    environment = compiled(source).environment
    ours = {"messages", "add_generation_prompt", "strftime_now", *environment.globals}
    return sorted(meta.find_undeclared_variables(environment.parse(source)) - ours)


def rendered(request: dict[str, Any]) -> dict[str, Any]:
    """The texts of all conversations, or the first one that failed and why; without conversations, the names read."""
    if "conversations" not in request:
        try:
            return {"names": names_read(request["source"])}
        except Exception:  # rendering says what is wrong
            return {"names": None}
    day = datetime.fromisoformat(request["today"])
    done: list[str] = []
    room = request["longest"]
    try:
        template = compiled(request["source"])
        for messages in request["conversations"]:
            random.seed(0)  # a template that draws by chance draws the same again
            variables = {"strftime_now": day.strftime, **request["variables"], "messages": messages}
            done.append(template.render(variables))
            room -= len(done[-1])
            if room < 0:
                return {"too_much": f"writes more than {request['longest']} characters"}
    except MemoryError:
        return {"too_much": f"needs more than {MEMORY >> 20} MB of memory"}
    except Exception as error:  # jinja2 raises what the template's author wrote
        said = " ".join(str(error).split()) or type(error).__name__
        return {"failed": len(done), "error": said, "refused": type(error) is jinja2.exceptions.TemplateError}
    return {"texts": done}


def limit_memory() -> None:
    """No more memory than MEMORY, where the system can see to that."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass


def limit_time() -> None:
    """The system ends this process after SECONDS more of processor time, where it can."""
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + SECONDS, most))
    except (ImportError, ValueError, OSError):
        pass


def main() -> None:
    """Answers requests until there are no more."""
    limit_memory()
    for line in sys.stdin.buffer:
        limit_time()
        sys.stdout.buffer.write(json.dumps(rendered(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
