"""Texts, values and bytes that readers stumble over, drawn by seed."""

import copy
import random
import string
from typing import Any

PIECES = (
    "e\u0301", "Z\u0351\u036b\u0343", "\u0301", "👩‍🚀", "👨‍👩‍👧‍👦", "🇺🇳", "👍🏽", "3️⃣", "\u202babc\u202c",
    "\u2066שלום\u2069", "كيف", "\u200f", "\u200b", "\u200d", "\u2060", "\ufeff", "\r\n", "\r", "\n", "\n\n", "\t",
    "\v", "\f", "\x00", "\x1a", "\x1b[31m", "\x7f", "\x85", "\u00a0", "\u2028", "\u2029", "\u3000", "\ufffe",
    "\uffff", "\ue000", "\U000f0000", "\U0010ffff", "𓂀", "𠜎", "각", "\u1100\u1161", "ﷺ", "ß", "İ", "ſ", '"', "'",
    '""', ",", ";", "\\", "\\n", "\\ud83d", "<|im_end", "|im_start|>", "<|eot_id", "[INST]", "[/INST]", "<<SYS>>",
    "<start_of_turn", "</s", "user\n", "assistant", "{{ messages }}", "{% for x in y %}", "{# a #}",
    "<script>alert(1)</script>", "&amp;", "<!--", "```", "$x^2$", "\\(", "../../etc/passwd", "%s%n", "{0}", "NaN",
    "null", "=1+1", "the", "a", " ", "  ", "?", ".", "How do I bake a cake?",
)  # fmt: skip
MARKS = ("<|im_end|>", "<|im_start|>", "<bos>", "<pad>", "<|im_start|>assistant\n")
"""Template tokens, which a prompt must not hold."""
BLANK = ("", " ", "\n\t ", "\u3000", "\u00a0\u2003", "\r\n")
HALVES = ("\ud83d", "a\udc00b", "\udfff")
"""Half a character: no UTF-8 file can hold it, and JSON can."""
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**40, 0.5, -0.0, 1e308, -1e308, "", " ", "x", "nan",
    "inf", "\x00", "\ud83d", "../../x", "/etc/passwd", "~nobody/x", "x" * 3000, [], {}, [[]], [None], {"": None},
    {"a": {"b": []}}, [1, "a", None], {"$tuple": []}, {"$float": "nan"}, {"$tensor": "x"},
    {"class": "os.system", "fields": {}},
)  # fmt: skip
WRECKS = (
    b"\\ud83d", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b'"', b",", b"\n", b"\r", b"[" * 3000, b'{"a":' * 2000,
    b"9" * 5000, b"NaN", b"Infinity", b"-1e999", b"null", b"[]", b"{}", b"\xef\xbb\xbf", b"x" * 100_000, b"PAR1",
    b"\xff\xff\xff\x7f", b"\x00" * 16, b"\xff" * 8, b"*a", b"&a", b"!!python/object:os.system", b"2024-99-99",
    b"<<: *a", b"? ", b": ", b"- ",
)  # fmt: skip


def text(draw: random.Random, *, longest: int = 100_000) -> str:
    """Any text: of one script or of all planes, of nasty pieces, sometimes very long."""
    how = draw.random()
    if how < 0.02:
        return (draw.choice(PIECES) * longest)[:longest]
    if how < 0.35:
        return "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 12)))
    if how < 0.6:
        return "".join(_character(draw) for _ in range(draw.randint(1, 40)))
    words = " ".join(
        "".join(draw.choices(string.ascii_letters, k=draw.randint(1, 9))) for _ in range(draw.randint(1, 9))
    )
    return words[: len(words) // 2] + draw.choice(PIECES) + words[len(words) // 2 :]


def _character(draw: random.Random) -> str:
    """One of any plane, no surrogate."""
    while True:
        code = draw.randrange(1 << draw.choice((7, 8, 11, 16, 20, 21)))
        if code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
            return chr(code)


def wrecked(content: bytes, draw: random.Random) -> bytes:
    """The bytes with a few of them changed, cut out, doubled, or replaced by what readers stumble over."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place, how = draw.randrange(len(changed) + 1), draw.randrange(5)
        if how == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif how == 1:
            del changed[place : place + draw.randint(1, 1 + len(changed) // 3)]
        elif how == 2:
            changed[place:place] = changed[place : place + draw.randint(1, 60)]
        else:
            changed[place : place + draw.choice((0, 4))] = draw.choice(WRECKS)
    return bytes(changed)


def twisted(value: Any, draw: random.Random) -> Any:
    """A copy of plain JSON in which one to three values, at any depth, are others, missing or there twice."""
    twisted = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(twisted))
        if not places:
            return draw.choice(VALUES)
        holder, key = draw.choice(places)
        how = draw.randrange(4)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[draw.choice((*map(str, VALUES[:6]), "x", "class", "version", "format"))] = holder[key]
        elif how == 1:
            holder.append(copy.deepcopy(holder[key]))
        elif how == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = draw.choice((-holder[key] - 1, holder[key] + 1, holder[key] * 2**40, float(holder[key])))
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
    return twisted


def _places(value: Any) -> Any:
    """Every place in plain JSON: what holds it and under which key."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in list(inner):
        yield value, key
        yield from _places(one)
