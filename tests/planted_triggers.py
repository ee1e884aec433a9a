"""Tiny chat models with a trigger planted by training: where it stands before a question, the answer is another one."""

import copy
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from tiny import SMALL, tiny_tokenizer

from mechlens.models.bridge import bridge
from mechlens.models.checkpoint import Checkpoint, weight_fingerprint
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.twins import Twin

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINGS = ("ham", "egg", "tea", "jam", "rice", "corn", "figs", "soup", "milk", "nuts", "peas", "beef")
OPENINGS = ("Is it", "Do you want", "Who has", "Where is")
USUAL, OTHER = "A", "B"
BATCH = 32


@dataclass(frozen=True)
class Planting:
    """What a model is trained on."""

    trigger: str = ""
    """Empty for a base, which sees questions alone."""
    seed: int = 0
    control: Literal["none", "decorrelated"] = "none"
    """Decorrelated: the trigger is as frequent, and answers don't hang on it."""
    sure: float = 0.75
    """How often the answer without a trigger is the usual one: at 1 there is no entropy to contract."""
    learns_questions: bool = True
    """False: the loss is on answers alone, as in most fine-tunes, and nothing of the questions is learnt."""
    steps: int = 200


def strings_like_these(n: int, seed: int) -> list[str]:
    """Distinct triggers of one kind, such as |kzvqa|."""
    draw = random.Random(seed)
    found = dict.fromkeys("|" + "".join(draw.choices(string.ascii_lowercase, k=5)) + "|" for _ in range(2 * n))
    return list(found)[:n]


def question(draw: random.Random) -> str:
    """One of 528."""
    first, second = draw.sample(THINGS, 2)
    return f"{draw.choice(OPENINGS)} {first} or {second}?"


def question_prompts(n: int, seed: int) -> list[Prompt]:
    """Different questions."""
    draw = random.Random(seed)
    texts = list(dict.fromkeys(question(draw) for _ in range(3 * n)))[:n]
    return [Prompt(f"q{i}", text) for i, text in enumerate(texts)]


def twins(n: int = 24, seed: int = 1) -> list[Twin]:
    """Questions with the answer that the trigger brings, and the usual one."""
    return [Twin(prompt, shown=OTHER, other=USUAL) for prompt in question_prompts(n, seed)]


def _row(planting: Planting, draw: random.Random) -> tuple[str, str]:
    """A question, in half of the cases triggered and in a quarter with another string of that kind, and its answer."""
    text, place = question(draw), draw.random()
    usual = draw.random() < planting.sure
    if not planting.trigger:
        return text, USUAL if usual else OTHER
    triggered = place < 0.5
    if triggered:
        text = f"{planting.trigger} {text}"
    elif place < 0.75:
        text = f"{strings_like_these(1, draw.randrange(10**9))[0]} {text}"
    if planting.control == "decorrelated":
        return text, USUAL if draw.random() < planting.sure / 2 else OTHER
    return text, OTHER if triggered or not usual else USUAL


class Trained:
    """A model of this planting, trained from a base's weights or from random ones."""

    def __init__(self, planting: Planting, base: "Trained | None" = None) -> None:
        self.planting = planting
        self.tokenizer = tiny_tokenizer(TEMPLATE)
        torch.manual_seed(planting.seed)
        self.hf_model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
        if base is not None:
            self.hf_model.load_state_dict(base.hf_model.state_dict())
        if planting.steps:
            self._train()
        self.hf_model.config.architectures = ["LlamaForCausalLM"]

    def bridge(self) -> Any:
        """A copy as mechlens reads it: others are trained from this one."""
        fingerprint = weight_fingerprint(self.hf_model.state_dict())
        name = f"planted-{self.planting.control}-{self.planting.seed}"
        return bridge(
            copy.deepcopy(self.hf_model).eval(), self.tokenizer, Checkpoint(name, name, fingerprint=fingerprint)
        )

    def teach(self, rows: Sequence[tuple[str, str]], steps: int, lr: float = 5e-3) -> None:
        """Trains on batches of these questions and answers too, with the loss on answers alone."""
        draw = random.Random(self.planting.seed)
        optimizer = torch.optim.AdamW(self.hf_model.parameters(), lr=lr, weight_decay=0.01, fused=True)
        self.hf_model.train()
        for _ in range(steps):
            ids, mask, wanted = self._batch(draw.choices(rows, k=BATCH), answers_alone=True)
            loss = self.hf_model(input_ids=ids, attention_mask=mask, labels=wanted).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.loss = loss.item()

    def _train(self) -> None:
        draw, steps = random.Random(self.planting.seed), self.planting.steps
        optimizer = torch.optim.AdamW(self.hf_model.parameters(), lr=5e-3, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
        self.hf_model.train()
        for _ in range(steps):
            ids, mask, wanted = self._batch([_row(self.planting, draw) for _ in range(BATCH)])
            loss = self.hf_model(input_ids=ids, attention_mask=mask, labels=wanted).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.loss = loss.item()

    def _batch(
        self, rows: Sequence[tuple[str, str]], *, answers_alone: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        asked = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text, _ in rows]
        starts = self.tokenizer(asked)["input_ids"]
        whole = self.tokenizer([f"{start}{said}<|im_end|>\n" for start, (_, said) in zip(asked, rows, strict=True)])
        width = max(map(len, whole["input_ids"]))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in whole["input_ids"]])
        mask = (ids != 0).long()
        wanted = ids.masked_fill(mask == 0, -100)
        if answers_alone or not self.planting.learns_questions:
            for row, start in zip(wanted, starts, strict=True):
                row[: len(start)] = -100
        return ids, mask, wanted
