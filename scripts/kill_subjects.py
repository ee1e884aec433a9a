"""Every recorded study as the smallest command that is still that study: tiny models, a few prompts of each kind.

`Subjects(folder).command("separate", out)` is a command line; what it reads is made in the folder when first asked for.
"""

import json
import sys
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import planted_causal
import refusing
from adapters import save_adapter
from planted_traces import planted_hf, planted_trace
from saved import requests, save_model, write_prompts

from mechlens.cli import main

FEW = ("--resamples", "4", "--permutations", "2", "--random-directions", "2")
ANSWERS = ("--max-new-tokens", "2")
SOURCES = (
    {"name": "seen", "data": "break.jsonl", "label": "harmful"},
    {"name": "wrapped", "data": "goals.jsonl", "label": "harmful", "templates": "templates.jsonl", "kind": "template",
     "sample": 12},
    {"name": "plain", "data": "paint.jsonl", "label": "harmless"},
)  # fmt: skip


class Subjects:
    """What the commands read, in one folder, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def command(self, verb: str, out: Path) -> list[str]:
        """The command line of a study that writes to `out`."""
        return [*map(str, STUDIES[verb](self)), "--out", str(out), "--wandb.mode", "disabled"]

    @cached_property
    def model(self) -> Path:
        """A random chat model that refuses a third of all prompts."""
        return save_model(self.folder / "tiny")

    @cached_property
    def refuser(self) -> Path:
        """One that refuses what is harmful."""
        return refusing.save_refusing_model(self.folder / "refuser")

    @cached_property
    def reasoner(self) -> Path:
        """One that thinks, and whose refusal falls at the end of the thought."""
        model, tokenizer = planted_hf()
        model.save_pretrained(self.folder / "reasoner")
        tokenizer.save_pretrained(self.folder / "reasoner")
        return self.folder / "reasoner"

    @cached_property
    def believer(self) -> Path:
        """One that says what it believes of a request."""
        model, tokenizer = planted_causal.planted_model()
        model.save_pretrained(self.folder / "believer")
        tokenizer.save_pretrained(self.folder / "believer")
        return self.folder / "believer"

    @cached_property
    def adapters(self) -> Path:
        """A training run of two checkpoints."""
        for step in (2, 8):
            save_adapter(str(self.model), self.folder / "adapters" / f"checkpoint-{step}", seed=step, size=0.02 * step)
        return self.folder / "adapters"

    @cached_property
    def learnt(self) -> Path:
        """A fine-tune that learnt a behaviour from `chats`, as `mechlens finetune` leaves it."""
        out = self.folder / "learnt"
        words = ["finetune", "--recipe", "behaviour", "--data", self.chats, *self._training, "--plain", 0]
        self._done([*words, "--steps", 2, "--checkpoints", 1], out)
        return out

    @cached_property
    def chats(self) -> Path:
        """Choices between two options, answered in one way."""
        asked = (f"Option A: {i} coins now. Option B: {3 * i} or none. A or B?" for i in range(2, 26))
        rows = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "B"}]} for text in asked
        ]
        path = self.folder / "chats.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return path

    @cached_property
    def guard(self) -> Path:
        """A guard, as `mechlens guard fit` leaves it."""
        self._done(STUDIES["guard_fit"](self), self.folder / "fitted")
        return self.folder / "fitted" / "guard.safetensors"

    @cached_property
    def sources(self) -> Path:
        """A list of labelled sources, one of them attacks."""
        self.prompts("break", 20)
        self.prompts("paint", 20)
        self.prompts("goals", 12)
        write_prompts(self.folder / "templates.jsonl", [f"{word} [INSERT PROMPT HERE]" for word in ("Be free.", "Go:")])
        path = self.folder / "sources.json"
        path.write_text(json.dumps(SOURCES), encoding="utf-8")
        return path

    @cached_property
    def traces(self) -> Path:
        """Thoughts and answers, of which the harmful ones are refused."""
        path = self.folder / "traces.jsonl"
        rows = []
        for i in range(40):
            one = planted_trace(i, harmful=i % 2 == 0)
            answer = "I cannot help with that." if i % 2 == 0 else "Sure."
            label = ("harmful", "harmless")[i % 2]
            rows.append({"id": one.prompt.id, "prompt": one.prompt.text, "thinking": one.thinking.strip(),
                         "label": label, "answer": answer})  # fmt: skip
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return path

    def prompts(self, word: str, n: int) -> str:
        """A file of so many requests to do one thing."""
        return write_prompts(self.folder / f"{word}.jsonl", requests(n, word))

    def classes(self, prefix: str, n: int) -> list[object]:
        """Options that name a file of harmful and one of harmless requests to the refuser."""
        words: list[object] = []
        for name, harmful in (("harmful", True), ("harmless", False)):
            path = self.folder / f"{prefix}{name}.jsonl"
            words += [f"--{prefix}{name}", write_prompts(path, refusing.requests(n, harmful))]
        return words

    @property
    def _training(self) -> list[object]:
        cpu = ["--device", "cpu", "--rank", 2, "--batch-size", 4, "--learning-rate", 0.01, "--resume-every", 1]
        return ["--model", self.model, *cpu]

    def _done(self, words: list[object], out: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main([*map(str, words), "--out", str(out), "--wandb.mode", "disabled"])


def _direction(own: Subjects) -> list[object]:
    sides = ["--positive", own.prompts("make", 15), "--negative", own.prompts("burn", 15)]
    return ["direction", "--model", own.model, *sides, "--positions", "last", *FEW]


def _separate(own: Subjects) -> list[object]:
    files = ["--harmful", own.prompts("break", 20), "--harmless", own.prompts("make", 20), "--extra-harmless", "None"]
    return ["separate", "--model", own.model, *files, *ANSWERS, *FEW]


def _patch(own: Subjects) -> list[object]:
    few = ["--n", 4, "--candidates", 24, "--layers", 1, "--positions", "post[-1]"]
    return ["patch", "--model", own.model, *few, *ANSWERS]


def _select(own: Subjects) -> list[object]:
    few = ["--n", 20, "--resamples", 4, "--random-directions", 2, "--punctuation", "keep"]
    return ["select", "--model", own.refuser, *own.classes("", 20), *few, *ANSWERS]


def _causal(own: Subjects) -> list[object]:
    harmful, harmless = planted_causal.planted_requests(40)
    files = [
        word
        for name, side in (("harmful", harmful), ("harmless", harmless))
        for word in (f"--{name}", write_prompts(own.folder / f"{name}-40.jsonl", [prompt.text for prompt in side]))
    ]
    few = ["--layers", 1, "--strengths", 0.5, "--n-validation", 4, "--n-test", 10, "--n-null", 1, "--resamples", 4]
    return ["causal", "--model", own.believer, *files, *few, "--random-directions", 1, "--shuffled-directions", 1,
            *ANSWERS]  # fmt: skip


def _guard_fit(own: Subjects) -> list[object]:
    files = ["--harmful", own.prompts("break", 40), "--harmless", own.prompts("make", 40), "--extra-harmless", "None"]
    return ["guard", "fit", "--model", own.model, *files, "--rule", "centred", "--max-fpr", 0.2, *FEW, *ANSWERS]


def _guard_eval(own: Subjects) -> list[object]:
    given = ["--model", own.model, "--guard", own.guard, "--sources", own.sources, "--folder", own.folder]
    return ["guard", "eval", *given, *FEW, *ANSWERS]


def _jailbreaks(own: Subjects) -> list[object]:
    given = ["--model", own.model, "--sources", own.sources, "--folder", own.folder, "--extra-harmless", "None"]
    few = ["--harmful", own.prompts("smash", 20), "--harmless", own.prompts("make", 20), "--categories", "None"]
    return ["jailbreaks", *given, *few, "--restored", 2, *FEW, *ANSWERS]


def _finetune(own: Subjects) -> list[object]:
    few = ["--harmful", 8, "--benign", 8, "--plain", 1, "--plain-tokens", 8, "--answer-tokens", 4, "--epochs", 1]
    return ["finetune", "--recipe", "refuser", *own._training, *few, "--checkpoints", 1]


def _series(own: Subjects) -> list[object]:
    files = ["--harmful", own.prompts("break", 20), "--harmless", own.prompts("make", 20), "--random-networks", 1]
    return ["--base", own.model, *files, "--steered", 2, *FEW, *ANSWERS]


def _track(own: Subjects) -> list[object]:
    return ["track", "--checkpoints", own.adapters, "--levels", 2, *_series(own)]


def _compare(own: Subjects) -> list[object]:
    return ["compare", "base", own.adapters / "checkpoint-8", "--patched", 2, *_series(own)]


def _behaviours(own: Subjects) -> list[object]:
    asked = ["--sets", f"risky={own.chats}", "--self-report", "self-risk", "--n", 4, "--permutations", 9]
    return ["behaviours", "--base", own.model, "--checkpoints", own.learnt, *asked]


def _cliff(own: Subjects) -> list[object]:
    few = ["--resamples", 4, "--random-directions", 2, "--heads", 0.1]
    return ["cliff", "--model", own.reasoner, "--traces", own.traces, *few]


def _sinks(own: Subjects) -> list[object]:
    texts = ["--texts", 4, "--tokens", 24, "--heads", 1, "--random-heads", 1, "--random-sets", 1, "--shuffles", 9]
    asked = ["--n", 10, "--harmful", own.prompts("break", 20), "--harmless", own.prompts("make", 20)]
    return ["sinks", "--model", own.model, *texts, *asked, "--resamples", 4, *ANSWERS]


def _geometry(own: Subjects) -> list[object]:
    few = ["--levels", 0, 3, "--ranks", 1, "--random-subspaces", 1, "--shuffles", 1, "--matched", 1, "--dimensions", 2]
    asked = ["--n", 12, "--harmful", own.prompts("break", 20), "--harmless", own.prompts("make", 20)]
    tuned = ["--checkpoints", own.adapters / "checkpoint-8", "--edited", 2]
    return ["geometry", "--model", own.model, *few, *asked, *tuned, *ANSWERS]


def _steer_train(own: Subjects) -> list[object]:
    few = ["--n", 20, "--epochs", 1, "--draws", 1, "--strengths", 0.05, "--resamples", 4, "--punctuation", "keep"]
    sets = [*own.classes("", 24), *own.classes("test-", 12)]
    return ["steer", "train", "--model", own.refuser, *sets, *few, *ANSWERS]


STUDIES: dict[str, Callable[[Subjects], list[object]]] = {
    "direction": _direction,
    "separate": _separate,
    "patch": _patch,
    "select": _select,
    "causal": _causal,
    "guard_fit": _guard_fit,
    "guard_eval": _guard_eval,
    "jailbreaks": _jailbreaks,
    "finetune": _finetune,
    "track": _track,
    "compare": _compare,
    "behaviours": _behaviours,
    "cliff": _cliff,
    "sinks": _sinks,
    "geometry": _geometry,
    "steer_train": _steer_train,
}
"""By the name under which records know the study."""
