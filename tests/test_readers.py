"""Any bytes, in any format, end in prompts or in a sentence: never in a traceback, a hang or a full memory."""

import io
import json
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mechlens.errors import UserError
from mechlens.files import LARGEST_FILE, user_path
from mechlens.prompts.files import parquet
from mechlens.prompts.files.load import load_pairs, load_prompts
from mechlens.prompts.prompt import LONGEST_TEXT, Prompt
from mechlens.prompts.text import normalise_text
from mechlens.studies.finetune.recipes.recipe import published_openings
from mechlens.studies.shared.sources import load_source, read_sources


@pytest.fixture(autouse=True)
def _no_hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not a measurement: what hangs would otherwise hang for ever. A name that was changed is no hub data set."""

    def end(*_: object) -> None:
        raise RuntimeError("this hangs")

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(datasets, "load_dataset", no_network)

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def as_parquet(table: pa.Table, **options: Any) -> bytes:
    written = io.BytesIO()
    pq.write_table(table, written, **options)
    return written.getvalue()


ROWS = [
    {"id": "a1", "prompt": "How do I make a cake?", "label": "good", "category": "food", "n": 1.5},
    {"id": "a2", "prompt": "Say “naïve” ☕", "label": "bad", "category": None, "n": None},
    {"id": "a3", "prompt": "two\nlines", "label": "good", "category": "é", "n": 7},
]
CHAT = [{"messages": [{"role": role, "content": "Why?"} for role in ("system", "user", "assistant", "user")]}]
SEEDS: dict[str, list[bytes]] = {
    ".json": [
        json.dumps(ROWS).encode(), json.dumps(CHAT).encode(), json.dumps([row["prompt"] for row in ROWS]).encode(),
        json.dumps({"Fraud": {"Tax": ["a?", "b?"]}, "Malware": {"Virus": ["c?"]}}).encode(),
        json.dumps([{"clean": "a", "corrupt": "b", "goal": "a", "target": "Sure, here is a"}]).encode(),
        json.dumps([{"name": "x", "data": "harmful", "label": "harmful", "sample": 3, "where": {}}]).encode(),
    ],
    ".jsonl": ["\n".join(json.dumps(row) for row in rows).encode() for rows in (ROWS, CHAT)],
    ".csv": [
        b'id,prompt,label\na1,"Hi, you",good\na2,Why?,bad\n', b'\xef\xbb\xbfgoal,target\r\nx,"Sure, here is y"\r\n',
    ],
    ".tsv": [b"id\tprompt\tlabel\na1\tHi\tgood\n"],
    ".txt": ["Hi\nWhy?\nnaïve\n".encode()],
    ".parquet": [as_parquet(pa.Table.from_pylist(ROWS)), as_parquet(pa.Table.from_pylist(CHAT), compression="zstd")],
}  # fmt: skip
NASTY = [
    b"\\ud83d", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b'"', b",", b"\n", b"\r", b"[" * 2000, b"{" * 3000,
    b'{"a":' * 999, b"[" * 900 + b"1" + b"]" * 900, b'{"prompt":' * 500 + b"1" + b"}" * 500,
    b"9" * 5000, b"NaN", b"Infinity", b"-1e999", b"null", b"true", b"[]", b"{}", b'""', b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",     b"x" * 200_000, b" " * 5000, b"PAR1", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80",
]  # fmt: skip


def mutated(seed: bytes, draw: random.Random) -> bytes:
    """The bytes with a few of them changed, cut out, doubled or replaced by something that readers stumble over."""
    changed = bytearray(seed)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(changed) + 1)
        how = draw.randrange(5)
        if how == 0 and place < len(changed):
            changed[place] = draw.randrange(256)
        elif how == 1:
            del changed[place : place + draw.randint(1, 1 + len(changed) // 3)]
        elif how == 2:
            changed[place:place] = changed[place : place + draw.randint(1, 40)]
        elif how == 3:
            changed[place:place] = draw.choice(NASTY)
        else:
            end = place + draw.randint(1, 12)
            changed[place:end] = draw.choice(NASTY)
    return bytes(changed)


def require_usable(prompts: list[Prompt]) -> None:
    assert prompts
    for prompt in prompts:
        json.dumps(asdict(prompt), ensure_ascii=False).encode()
        assert normalise_text(prompt.text)
        assert prompt.text.strip()
    ids = [prompt.id for prompt in prompts]
    assert len(set(ids)) == len(ids)


READERS: dict[str, Callable[[Path], object]] = {
    "prompts": lambda path: require_usable(load_prompts(path)),
    "a label": lambda path: require_usable(load_prompts(path, label_column="label", family_column="category")),
    "another column": lambda path: require_usable(load_prompts(path, column="n", where={"label": "good"})),
    "pairs": lambda path: load_pairs(str(path), sample=None, seed=0),
    "openings": lambda path: published_openings(str(path)),
    "sources": lambda path: [load_source(source, path.parent, 0) for source in read_sources(str(path))],
}


@pytest.mark.parametrize("ending", SEEDS)
def test_any_bytes_end_in_prompts_or_in_a_sentence(tmp_path: Path, ending: str) -> None:
    draw = random.Random(f"readers {ending}")
    path = tmp_path / f"set{ending}"
    read = 0
    said: set[str] = set()
    for turn in range(120):
        seed = draw.choice(SEEDS[ending])
        content = draw.randbytes(draw.randint(0, 400)) if turn % 10 == 0 else mutated(seed, draw)
        path.write_bytes(content)
        for name, reader in READERS.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reader(path)
                read += 1
            except UserError as error:
                said.add(str(error))
            except BaseException as error:
                raise AssertionError(f"{name}: {type(error).__name__}: {error}: {content[:300]!r}") from error
    for sentence in said:
        sentence.encode()
        assert "\n" not in sentence
        assert len(sentence) < 1500, sentence
    assert read  # the changes are small enough that some of it is still read


# ---- one field of one row


HALF = "\ud83d"
FIELDS = {
    "id": {"id": HALF, "prompt": "Hi"},
    "text": {"prompt": f"Hi {HALF}"},
    "label": {"prompt": "Hi", "label": HALF},
    "category": {"prompt": "Hi", "category": HALF},
    "categories": {"prompt": "Hi", "category": ["food", HALF]},
    "family": {"prompt": "Hi", "family": HALF},
    "input": {"instruction": "Hi", "input": HALF},
    "content": {"messages": [{"role": "user", "content": HALF}]},
    "role": {"messages": [{"role": HALF, "content": "Hi"}, {"role": "user", "content": "Hi"}]},
    "system": {"messages": [{"role": "system", "content": HALF}, {"role": "user", "content": "Hi"}]},
}


@pytest.mark.parametrize("name", FIELDS)
def test_half_a_character_is_found_when_it_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text(json.dumps({"label": "a", "family": "f"} | FIELDS[name] | {"unused": HALF}))
    with pytest.raises(UserError, match=r"half\.jsonl row 1.* holds half a character \(an unpaired surrogate\)"):
        load_prompts(path, label_column="label", family_column="family")
    path.write_text(json.dumps({"prompt": "Hi", "unused": HALF}))
    assert [prompt.text for prompt in load_prompts(path)] == ["Hi"]


@pytest.mark.parametrize(
    "fields",
    [
        *({name: HALF} for name in ("id", "text", "label", "category", "source", "family", "system")),
        {"history": ((HALF, "Hi"),)},
        {"history": (("user", HALF),)},
    ],
)
def test_no_prompt_holds_half_a_character(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="half a character") as caught:
        Prompt(**({"id": "p", "text": "Hi"} | fields))
    str(caught.value).encode()


def test_a_long_text_is_one_in_every_format_and_too_long_a_one_is_named(tmp_path: Path) -> None:
    """Python's own reader of CSV stops at 131,072 characters, and said that the quotes were wrong."""
    for ending, before in ((".csv", "prompt,label\n"), (".tsv", "prompt\tlabel\n")):
        path, apart = tmp_path / f"long{ending}", before[6]
        path.write_text(f"{before}{'x' * 200_000}{apart}a\n")
        assert [len(prompt.text) for prompt in load_prompts(path)] == [200_000]
        path.write_text(f"{before}Hi{apart}a\n{'x' * (LONGEST_TEXT + 1)}{apart}a\n")
        with pytest.raises(UserError, match=rf"long{ending} row 2.* 1000001 characters in its text"):
            load_prompts(path)


def test_a_missing_label_is_none_and_a_whole_one_is_whole(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"prompt": ["a", "b", "c"], "label": [1, None, 0], "category": [2, None, 3]})
    frame.to_parquet(tmp_path / "labels.parquet")
    with pytest.raises(UserError, match=r"labels\.parquet row 2, column 'label', has no value"):
        load_prompts(tmp_path / "labels.parquet", label_column="label")
    kept = load_prompts(tmp_path / "labels.parquet", label_column="label", where={"label": "1"})
    assert [(prompt.text, prompt.label, prompt.category) for prompt in kept] == [("a", "1", "2")]
    assert [prompt.category for prompt in load_prompts(tmp_path / "labels.parquet")] == ["2", "", "3"]
    (tmp_path / "labels.json").write_text('[{"prompt": "a", "label": NaN}]')
    with pytest.raises(UserError, match=r"row 1, column 'label', has no value"):
        load_prompts(tmp_path / "labels.json", label_column="label")


BAD_UTF8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"], pa.binary()).buffers())
STRANGE = {
    "a far time": pa.array([2**62, 1], pa.timestamp("us")),
    "a far day": pa.array([2 * 10**9, 1], pa.date32()),
    "an unknown zone": pa.array([1, 2], pa.timestamp("us", tz="Mars/Olympus")),
    "no UTF-8": BAD_UTF8,
    "no UTF-8 in lists": pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), BAD_UTF8),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_value_that_cannot_be_read_spoils_nothing_but_itself(tmp_path: Path, what: str) -> None:
    path = tmp_path / "strange.parquet"
    path.write_bytes(as_parquet(pa.table({"prompt": ["Hi", "Why?"], "odd": STRANGE[what]})))
    assert [prompt.text for prompt in load_prompts(path)] == ["Hi", "Why?"]
    with pytest.raises(UserError, match=r"strange\.parquet row \d, column 'odd', (can't be read|holds a)"):
        load_prompts(path, column="odd")
    with pytest.raises(UserError, match=r"strange\.parquet row \d, column 'odd', (can't be read|holds a)"):
        load_prompts(path, label_column="odd")


# ---- more than there is room for


MUCH = "x" * 1_000_000
NOTHING = pa.array([b"\0" * 60_000_000] * 10)
BOMBS: dict[str, Callable[[], bytes]] = {
    "one text a million times": lambda: as_parquet(
        pa.table({"prompt": pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), [MUCH])})
    ),
    "one text in lists": lambda: as_parquet(
        pa.table({"m": pa.ListArray.from_arrays(pa.array([0, 900], pa.int32()), pa.array([MUCH] * 900))})
    ),
    "zeros": lambda: as_parquet(pa.table({"prompt": NOTHING}), compression="zstd", use_dictionary=False),
    "rows of nothing": lambda: as_parquet(pa.table({"prompt": pa.nulls(parquet.MAX_ROWS + 1)})),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_unpacks_to_much(tmp_path: Path, name: str) -> None:
    content = BOMBS[name]()
    assert len(content) < 1_000_000
    before = pa.total_allocated_bytes()
    (tmp_path / "bomb.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"bomb\.parquet (unpacks to more than|has \d+ rows and at most)"):
        load_prompts(tmp_path / "bomb.parquet")
    assert pa.total_allocated_bytes() - before < LARGEST_FILE


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".tsv", ".parquet"])
def test_a_line_of_megabytes(tmp_path: Path, ending: str) -> None:
    text = "How? " * LONGEST_TEXT
    contents = {
        ".txt": text.encode(), ".jsonl": json.dumps({"prompt": text}).encode(), ".json": json.dumps([text]).encode(),
        ".tsv": f"prompt\n{text}\n".encode(), ".parquet": as_parquet(pa.table({"prompt": [text]})),
    }  # fmt: skip
    (tmp_path / f"long{ending}").write_bytes(contents[ending])
    with pytest.raises(UserError, match=r"long\.\w+ row 1.*(characters in its text, and at most|field limit)"):
        load_prompts(tmp_path / f"long{ending}")


def test_only_regular_files_up_to_a_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.symlink("/dev/zero", tmp_path / "zero.txt")
    for name in ("pipe.jsonl", "zero.txt"):
        for reader in READERS.values():
            with pytest.raises(UserError, match=rf"{name} is a pipe or a device; give a regular file"):
                reader(tmp_path / name)
    with (tmp_path / "large.csv").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(UserError, match=r"large\.csv has 512 MB and at most 512 MB are read; give a part of it"):
        load_prompts(tmp_path / "large.csv")


# ---- paths


NO_PATHS = {"~nobody-of-that-name/x": "home folder", "a\0b": "NUL", "n" * 5000: "too long", "half\udc80": "isn't UTF-8"}


def path_readers() -> dict[str, Callable[[str], object]]:
    """Everything in Python that a user gives a path to."""
    from mechlens.models.checkpoints.series import checkpoint_series
    from mechlens.models.load import load, load_tokenizer
    from mechlens.runs.writer import open_run
    from mechlens.settings import WandbSettings

    return {
        "load_prompts": lambda name: load_prompts(Path(name)),
        "load_pairs": lambda name: load_pairs(name, sample=None, seed=0),
        "published_openings": published_openings,
        "read_sources": read_sources,
        "load": load,
        "load_tokenizer": load_tokenizer,
        "checkpoint_series": lambda name: checkpoint_series("base", [name]),
        "open_run": lambda name: open_run(
            verb="v", config={}, out=Path(name), wandb=WandbSettings(mode="disabled"), argv=()
        ),
    }


@pytest.mark.parametrize("name", ["load_prompts", "load_pairs", "published_openings", "read_sources", "load",
                                  "load_tokenizer", "checkpoint_series", "open_run"])  # fmt: skip
@pytest.mark.parametrize("given", NO_PATHS, ids=["nobody", "nul", "long", "half"])
def test_what_can_be_no_path_is_said_in_a_sentence(
    name: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=NO_PATHS[given].replace("too long", "(too long|can't be a path)")) as caught:
        path_readers()[name](given)
    assert len(str(caught.value)) < 400
    str(caught.value).encode()
    assert list(tmp_path.iterdir()) == []


def test_paths_that_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x"
    assert user_path("new/folder") == Path("new/folder")
    assert user_path(tmp_path / "日本語") == tmp_path / "日本語"
    (tmp_path / "file").touch()
    assert user_path(tmp_path / "file" / "below") == tmp_path / "file" / "below"  # said by whoever opens it
