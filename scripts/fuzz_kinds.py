"""Kinds of input and the laws that each must hold: what is read is what was written, what isn't is told of."""

import contextlib
import csv
import io
import json
import random
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import pyarrow as pa
import pyarrow.parquet as pq
from artefacts import activations, controller, direction, grid, guard
from fuzz_positions import TEMPLATES, require_positions, tokenizer_of
from fuzz_texts import BLANK, HALVES, MARKS, text, twisted, wrecked
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mechlens import cli
from mechlens.checked_json import SEAL, sealed
from mechlens.errors import UserError
from mechlens.methods.guard.fitted import FittedGuard
from mechlens.models.checkpoints.adapter_record import read_record
from mechlens.models.checkpoints.found import sources, told_step
from mechlens.models.checkpoints.lora import read_config, read_lora
from mechlens.prompts.files.load import load_pairs, load_prompts
from mechlens.prompts.prompt import LONGEST_TEXT, Prompt
from mechlens.prompts.text import normalise_text
from mechlens.runs.artifacts import ENTRY, tensor_digest
from mechlens.runs.results.opened import open as open_any
from mechlens.runs.results.saved import save
from mechlens.runs.run import read_run
from mechlens.runs.writer import open_run
from mechlens.settings import WandbSettings
from mechlens.studies.guard.config import GuardPredict
from mechlens.studies.guard.predict import read_lines
from mechlens.studies.registry import commands
from mechlens.studies.shared.sources import load_source, read_sources
from mechlens.studies.sweep.plan import jobs_of, read_plan


class Fault(Exception):
    """A law that doesn't hold."""


class World:
    """A folder with one sound file of every kind, from which others are twisted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, name: str, content: bytes | str) -> Path:
        """A file with this content."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    @cached_property
    def artefacts(self) -> dict[str, Path]:
        """By kind, a file that `ml.save` wrote."""
        made = {"guard": guard(), "direction": direction(), "grid": grid(), "controller": controller(),
                "activations": activations()}  # fmt: skip
        return {name: save(thing, self.folder / f"sound-{name}.safetensors") for name, thing in made.items()}

    @cached_property
    def adapter(self) -> Path:
        """A LoRA adapter in a checkpoint's folder."""
        import torch

        folder = self.folder / "run" / "checkpoint-7"
        folder.mkdir(parents=True)
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        save_file({key.format("A"): torch.ones(2, 16), key.format("B"): torch.ones(16, 2)},
                  folder / "adapter_model.safetensors")  # fmt: skip
        return folder

    @cached_property
    def record(self) -> dict[str, Any]:
        """run.json of a sound run."""
        with open_run(verb="v", config=Prompt("a", "b"), out=self.folder / "recorded",
                      wandb=WandbSettings(mode="disabled"), argv=["mechlens", "v"]):  # fmt: skip
            pass
        record: dict[str, Any] = json.loads((self.folder / "recorded" / "run.json").read_text())
        return record


# --- rows: whole files of known rows


def _rows(draw: random.Random, ending: str) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Rows as they are to stand in the file, and by number the column of those that can't be prompts."""
    rows, bad = [], {}
    for number in range(1, draw.randint(1, 6) + 1):
        row: dict[str, Any] = {"prompt": text(draw, longest=20_000), "label": draw.choice(("a", "b", 'é, "x"'))}
        if draw.random() < 0.04:
            row["prompt"] = draw.choice(BLANK if ending != ".txt" else ("x",))
        if draw.random() < 0.03 and ending in (".json", ".jsonl"):
            row["prompt"] = draw.choice(HALVES)
        if draw.random() < 0.01:
            row["prompt"] = "x" * (LONGEST_TEXT + 1)
        if ending == ".txt":  # a line is a prompt, and a mark of the byte order begins a file
            row = {"text": re.sub(r"[\r\n]|^\ufeff+", "x", row["prompt"])}
            row["text"] = row["text"] if row["text"].strip() else "x"
        column = next(iter(row))
        if not row[column].strip() or len(row[column]) > LONGEST_TEXT or row[column] in HALVES:
            bad[number] = column
        rows.append(row)
    return rows, bad


def _written(rows: Sequence[dict[str, Any]], ending: str, draw: random.Random) -> bytes:
    plain = draw.random() < 0.5
    if any(row.get("prompt") in HALVES for row in rows):
        plain = True
    if ending == ".json":
        return json.dumps(rows, ensure_ascii=plain).encode()
    if ending == ".jsonl":
        return draw.choice(("\n", "\r\n")).join(json.dumps(row, ensure_ascii=plain) for row in rows).encode()
    if ending == ".txt":
        return draw.choice(("\n", "\r\n", "\n\n")).join(row["text"] for row in rows).encode()
    if ending == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(list(rows)), sink)
        return sink.getvalue()
    out = io.StringIO(newline="")
    everywhere = draw.random() < 0.5 or any("\r" in row["prompt"] for row in rows)
    writer = csv.DictWriter(
        out, list(rows[0]), delimiter="\t" if ending == ".tsv" else ",", lineterminator=draw.choice(("\n", "\r\n")),
        quoting=csv.QUOTE_ALL if everywhere else csv.QUOTE_MINIMAL,
    )  # fmt: skip
    writer.writeheader()
    writer.writerows(rows)
    return draw.choice((b"", b"\xef\xbb\xbf")) + out.getvalue().encode()


def rows(draw: random.Random, world: World) -> None:
    """Rows in are rows out and rows told of; a row that is no prompt is named by file, row and column."""
    ending = draw.choice((".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet"))
    given, bad = _rows(draw, ending)
    path = world.file(f"set{ending}", _written(given, ending, draw))
    label = "label" if ending != ".txt" and draw.random() < 0.5 else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = load_prompts(path, label_column=label)
        except UserError as error:
            number, column = next(iter(bad.items()), (0, ""))
            said = str(error)
            named = (
                path.name in said and re.search(rf"\brow {number}\b", said) and (column in said or "its text" in said)
            )
            if not bad or not named:
                raise Fault(f"{ending}, bad rows {bad}: {said[:300]} for {[str(row)[:80] for row in given]}") from error
            raise
    if bad:
        raise Fault(f"{ending}: rows {bad} were read: {[str(row)[:80] for row in given]}")
    told = sum(int(n) for warning in caught for n in re.findall(r"dropped (\d+) prompt", str(warning.message)))
    texts = [next(iter(row.values())) for row in given]
    first: dict[str, str] = {}
    for one in texts:
        first.setdefault(normalise_text(one), one)
    wanted = list(first.values())
    if len(found) + told != len(given) or [one.text for one in found] != wanted:
        raise Fault(f"{ending}: {len(given)} rows, {len(found)} read, {told} told of: {[one[:60] for one in texts]}")


SOUND = {
    ".json": b'[{"id": "a", "prompt": "Hi", "label": "x"}, {"id": "b", "prompt": "Why?", "label": "y"}]',
    ".jsonl": b'{"prompt": "Hi", "label": "x"}\n{"messages": [{"role": "user", "content": "Why?"}]}\n',
    ".csv": b'id,prompt,label\na,"Hi, you",x\nb,Why?,y\n',
    ".tsv": b"id\tprompt\tlabel\na\tHi\tx\n",
    ".txt": b"Hi\nWhy?\n",
}


def wrecks(draw: random.Random, world: World) -> None:
    """Damaged files are read or refused."""
    ending = draw.choice(tuple(SOUND))
    path = world.file(f"wreck{ending}", wrecked(SOUND[ending], draw))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if draw.random() < 0.2:
            load_pairs(str(path), sample=None, seed=0)
        else:
            load_prompts(path, label_column=draw.choice((None, "label")))


def stream(draw: random.Random, world: World) -> None:
    """`guard predict` answers every line that isn't blank."""
    lines = []
    for _ in range(draw.randint(1, 8)):
        row = {"prompt": text(draw, longest=20_000), "id": draw.choice((1, "a", None, [1]))}
        whole = draw.choice((json.dumps(row), json.dumps(row, ensure_ascii=False), row["prompt"])).encode()
        whole = wrecked(whole, draw) if draw.random() < 0.4 else whole
        lines += whole.split(b"\n")
    config = GuardPredict(guard="g", format=draw.choice(("auto", "lines", "jsonl")))
    found = list(read_lines(io.BytesIO(b"\n".join(lines)), config))
    wanted = [number for number, line in enumerate(lines, start=1) if line.strip()]
    if [line.number for line in found] != wanted or any(
        bool(line.error) == (line.prompt is not None) for line in found
    ):
        raise Fault(f"lines {wanted} of a stream, answered {[line.number for line in found]}")


# --- positions and templates


def positions(draw: random.Random, world: World) -> None:
    """The laws of positions hold for every prompt that is accepted."""
    name = draw.choice(tuple(TEMPLATES))
    texts = [text(draw) for _ in range(draw.randint(1, 5))]
    if draw.random() < 0.1:
        texts[0] += draw.choice(MARKS)
    if said := require_positions(tokenizer_of(TEMPLATES[name].source), TEMPLATES[name].trims, texts):
        raise Fault(f"{name}: {said}")


SNIPPETS = (
    "{{ messages }}", "{% for m in messages %}", "{% endfor %}", "{% if x %}", "{{ 1/0 }}", "{{ x.y.z }}", "| trim",
    "| upper", "[::-1]", "{{ raise_exception('no') }}", "{{ 'a' * 10 ** 10 }}", "{{ messages[-1]['content'] }}",
    "{%", "}}", "{{ bos_token }}", "<|im_end|>", "\n", " ", "{# ", "{{ ''.__class__.__mro__ }}",
    "{% macro a() %}{{ a() }}{% endmacro %}", "{% include 'x' %}", "{{ namespace(a=1).a }}", "{{ '\\ud83d' }}",
    "{% set messages = [] %}", "\x00", "{{ tools }}",
)  # fmt: skip


def templates(draw: random.Random, world: World) -> None:
    """A template of any kind is used lawfully or refused."""
    source = draw.choice([one.source for one in TEMPLATES.values()])
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(source) + 1)
        source = source[:place] + draw.choice(("", draw.choice(SNIPPETS))) + source[place + draw.choice((0, 0, 1, 9)) :]
    if said := require_positions(tokenizer_of(source), None, [text(draw, longest=500) for _ in range(2)]):
        raise Fault(f"{source!r}: {said}")


# --- files of ours


def artefacts(draw: random.Random, world: World) -> None:
    """A stranger's file with a sound seal is a value that can be shown and kept, or is refused."""
    path = draw.choice(list(world.artefacts.values()))
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[ENTRY])
    tensors = load_file(path)
    if tensors and draw.random() < 0.4:
        name = draw.choice(sorted(tensors))
        one = tensors[name]
        others = (one * float("nan"), one * 1e30, one.int(), one.half(), one.flatten()[:1], one[None], -one, one * 0)
        tensors[name] = draw.choice((*others, one[..., :0].clone()))
    else:
        header = {**header, "fields": twisted(header["fields"], draw)} if draw.random() < 0.8 else twisted(header, draw)
    if isinstance(header, dict):
        header = sealed(
            {**{key: value for key, value in header.items() if key != SEAL}, "tensors": tensor_digest(tensors)}
        )
    other = world.folder / "strange.safetensors"
    save_file({name: one.contiguous() for name, one in tensors.items()}, other, metadata={ENTRY: json.dumps(header)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = open_any(other)
        repr(found)
        if isinstance(found, FittedGuard):
            found.scores(activations())
        kept = open_any(save(found, world.folder / "kept.safetensors"))
    if repr(kept) != repr(found):
        raise Fault(f"kept {kept!r:.200}, and it was {found!r:.200}")


ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 16, "bias": "none",
    "target_modules": ["q_proj"], "base_model_name_or_path": "base", "rank_pattern": {}, "alpha_pattern": {},
    "use_rslora": False, "use_dora": False,
}  # fmt: skip


def adapters(draw: random.Random, world: World) -> None:
    """An adapter's settings are read or refused."""
    text = json.dumps(twisted(ADAPTER, draw)).encode()
    (world.adapter / "adapter_config.json").write_bytes(wrecked(text, draw) if draw.random() < 0.3 else text)
    state = json.dumps(twisted({"global_step": 7, "log_history": [{"step": 1}]}, draw))
    (world.adapter / "trainer_state.json").write_text(state)
    (one,) = sources(str(world.adapter.parent))
    told_step(one)
    read_config(world.adapter)
    read_record(world.adapter)
    read_lora(world.adapter)


SOURCES = [{"name": "x", "data": "harmful", "label": "harmful", "sample": 3, "where": {}, "kind": "requests"}]
PLAN = {
    "study": "separate",
    "options": {"n": 40, "harmful": "harmful"},
    "over": {"seed": [0, 1]},
    "gpus": 0,
    "shards": 1,
}


def records(draw: random.Random, world: World) -> None:
    """Lists of sources, plans of sweeps and records of runs are read or refused."""
    kind = draw.choice(("sources", "plan", "run"))
    whole = {"sources": SOURCES, "plan": PLAN, "run": world.record}[kind]
    changed = json.dumps(twisted(whole, draw)).encode()
    changed = wrecked(changed, draw) if draw.random() < 0.3 else changed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "sources":
            for one in read_sources(world.file("sources.json", changed)):
                load_source(one, world.folder, 0)
        elif kind == "plan":
            jobs_of(read_plan(world.file("plan.yaml", changed)), world.folder / "sweep", "plan")
        else:
            record = json.loads(changed) if draw.random() < 0.7 and _is_json(changed) else None
            changed = (
                json.dumps(sealed({k: v for k, v in record.items() if k != SEAL})).encode()
                if isinstance(record, dict)
                else changed
            )
            (world.folder / "recorded" / "run.json").write_bytes(changed)
            run = read_run(world.folder / "recorded")
            repr(run)


def _is_json(text: bytes) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text)
        return True
    return False


# --- the command line


def options(draw: random.Random, world: World) -> None:
    """Any words are a command's, or one sentence and an exit with 1 or 2, before any work."""
    name = draw.choice([one for one in commands() if one not in ("env", "wandb sync", "wandb workspace")])
    words = name.split()
    known = list(commands()[name].config.__dataclass_fields__)
    for field in draw.sample(known, k=min(4, len(known))):
        value = draw.choice(
            ("", "-1", "0", "nan", "1e999", "None", "x", "[]", "{}", "harmful", text(draw, longest=300))
        )
        words += [f"--{field.replace('_', '-')}", *([] if draw.random() < 0.1 else [value])]
    for place in ("model", "base", "out", "guard"):
        if place in known:
            words += [f"--{place}", str(world.folder / "nowhere" / "x")]
    code, said = _ended(words)
    lines = [line for line in said.splitlines() if not line.startswith("mechlens: warning: ")]
    if (
        "Traceback" in said
        or code not in (0, 1, 2)
        or (code and (len(lines) != 1 or not lines[0].startswith("mechlens: ")))
    ):
        raise Fault(f"{words}: exit {code}, {said[-400:]!r}")
    if code:
        raise UserError(lines[0])


def _ended(words: list[str]) -> tuple[object, str]:
    """Exit code and what stood on stderr."""
    said = io.StringIO()
    shown = warnings.showwarning
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            cli.main(words)
        return 0, said.getvalue()
    except SystemExit as stop:
        return stop.code or 0, said.getvalue()
    finally:
        warnings.showwarning = shown


KINDS: dict[str, Callable[[random.Random, World], None]] = {
    "rows": rows,
    "wrecks": wrecks,
    "stream": stream,
    "positions": positions,
    "templates": templates,
    "artefacts": artefacts,
    "adapters": adapters,
    "records": records,
    "options": options,
}
