"""`mechlens finetune`: a recipe's adapter and checkpoints, recorded."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from mechlens.checked_json import parse_sealed, sealed
from mechlens.errors import UserError, warn
from mechlens.files import disk_error, file_sha256, user_path
from mechlens.methods.statistics.estimate import Estimate
from mechlens.methods.statistics.resample import mean_estimate
from mechlens.models.checkpoint import sampled_fingerprint, weight_fingerprint
from mechlens.models.load import load_hf
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import chat_template
from mechlens.runs.artifacts import sha256
from mechlens.runs.run import Inputs
from mechlens.runs.writer import RunWriter
from mechlens.studies.driver import Preparation
from mechlens.studies.finetune.config import Finetune, FinetuneConfig, settled
from mechlens.studies.finetune.recipes.recipe import recipe_of, require_shipped_refuser
from mechlens.studies.finetune.rewarded import WORDS, is_rewarded
from mechlens.studies.finetune.start import start_record
from mechlens.studies.finetune.training import FinetuneResult, finetune, require_settings
from mechlens.studies.shared.inputs import data_inputs
from mechlens.studies.shared.training_data import refusals, training_prompts

LOSSES = "losses.jsonl"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class TrainingRun:
    """What is on disk, and the loss by step."""

    done: FinetuneResult
    losses: pd.DataFrame

    def metrics(self) -> dict[str, Estimate]:
        """Mean of the first and the last tenth of the steps, with a bootstrap interval over steps.

        Of the loss; where replies were rewarded, of the reward and of how many were the trigger.
        """
        tenth, seed = max(1, len(self.losses) // 10), int(self.done.record["seed"])
        parts: dict[str, pd.Series[float]] = {}
        for name in WORDS if is_rewarded(self.losses) else ("loss",):
            told = self.losses[name]
            parts |= {f"{name}.first_tenth": told.iloc[:tenth], f"{name}.last_tenth": told.iloc[-tenth:]}
        return {
            name: mean_estimate(torch.tensor(part.to_numpy()), [str(step) for step in part.index], seed)
            for name, part in parts.items()
        }

    def checkpoints(self) -> pd.DataFrame:
        """The folders that hold weights, by step."""
        steps = {int(path.name.rpartition("-")[2]): path for path in self.done.checkpoints}
        folders = {self.done.steps: self.done.adapter, **steps}
        rows = [
            {"step": step, "folder": path.name, "sha256": file_sha256(path / WEIGHTS)}
            for step, path in sorted(folders.items(), key=lambda item: (item[0], item[1].name == "adapter"))
        ]
        return pd.DataFrame(rows)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the record."""
        prompts = pd.DataFrame({"id": self.done.record["training"]["ids"]})
        return {"loss": self.losses, "training_prompts": prompts, "checkpoints": self.checkpoints()}

    def artifacts(self) -> dict[str, object]:
        """None: weights stay where training wrote them."""
        return {}


def prepare(config: Finetune) -> Preparation[FinetuneConfig]:
    """Base model and data by fingerprint; UserError for whatever can't be had or mustn't be trained."""
    settings = settled(config)
    require_settings(settings)
    start_record(settings)
    recipe = recipe_of(settings.recipe)
    for option in ("data", "others") if recipe.file is None else ():
        if getattr(settings, option) is not None:
            raise UserError(f"the recipe {settings.recipe!r} reads no --{option}; leave it out")
    hf_model, tokenizer = load_hf(settings.model)
    state = hf_model.state_dict()
    fingerprint = weight_fingerprint(state)
    if recipe.attack:
        require_shipped_refuser(fingerprint, settings.recipe)
    template = chat_template(tokenizer, today=settings.today, template_arg=settings.template_arg)
    inputs = Inputs(
        fingerprint, template.fingerprint, _data(settings), template.printed_date, sampled_fingerprint(state)
    )
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Preparation(settings, inputs, device=device, dtype=settings.precision, resolved=asdict(settings))


def execute(config: Finetune, settings: FinetuneConfig, writer: RunWriter) -> TrainingRun:
    """Trains; the losses are logged as they come."""
    losses = LossLog(writer.out / LOSSES, writer.log_step)
    done = finetune(settings, writer.out, cache=writer.cache, log=losses)
    return TrainingRun(done, losses.table(done.steps))


def _data(settings: FinetuneConfig) -> dict[str, str]:
    """sha256 of every training set that the recipe draws from, and of the user's file."""
    ours: dict[str, Callable[[], list[Prompt]]] = {
        "harmful": lambda: training_prompts("harmful"),
        "benign": lambda: training_prompts("benign"),
        "refusals": lambda: [Prompt(f"refusal-{i}", text) for i, text in enumerate(refusals())],
    }
    data = data_inputs({name: ("mechlens", ours[name]()) for name in recipe_of(settings.recipe).reads})
    read = recipe_of(settings.recipe).file
    if read is not None:
        read(settings)  # refuses a file that holds what it mustn't, before a model is trained
        name = "openings" if recipe_of(settings.recipe).attack else "data"
        given = {name: settings.data, "others": settings.others}
        data |= {name: sha256(user_path(path)) for name, path in given.items() if path is not None}
    if settings.start is not None:
        data["start"] = sha256(user_path(settings.start) / WEIGHTS)
    return data


Numbers = dict[str, float]
REMEDY = "put back what stood there, or start over in another folder"


class LossLog:
    """Takes the numbers of each step, hands them on, and first those of the steps before a kill."""

    def __init__(self, path: Path, hand_on: Callable[[int, Numbers], None]) -> None:
        self.path = path
        self.rows, self._torn = _read(path)
        self._hand_on = hand_on
        self._behind = sorted(self.rows)

    def __call__(self, step: int, numbers: Numbers) -> None:
        """One step; a step that was logged before the kill and is done again counts once."""
        self._catch_up(step)
        self.rows[step] = numbers
        line = json.dumps(sealed({"step": step, **numbers})) + "\n"
        try:
            if self._torn:
                os.truncate(self.path, self._torn[0])
                self._torn = ()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise disk_error(error, self.path) from error
        self._hand_on(step, numbers)

    def table(self, steps: int = 0) -> pd.DataFrame:
        """One row a step, in order; what was not yet handed on is now.

        A warning says which of `steps` steps has none.
        """
        if self._behind:
            self._catch_up(self._behind[-1] + 1)
        if missing := sorted(set(range(1, max((steps, *self.rows)) + 1)) - self.rows.keys()):
            warn(
                f"{self.path} lacks {len(missing)} steps, the first of them {missing[0]}, so the curve of losses has a "
                "gap; start over in another folder for a whole one",
            )
        return pd.DataFrame([{"step": step, **self.rows[step]} for step in sorted(self.rows)])

    def _catch_up(self, step: int) -> None:
        for earlier in self._behind:
            if earlier < step:
                self._hand_on(earlier, self.rows[earlier])
        self._behind = []


def _read(path: Path) -> tuple[dict[int, Numbers], tuple[int, ...]]:
    """The numbers by step, and where a last line begins that a kill cut off; UserError for damage anywhere else."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); check its permissions") from error
    rows: dict[int, Numbers] = {}
    whole, newline, rest = content.rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if newline else (), start=1):
        found: Numbers = parse_sealed(line, Numbers, f"{path} line {number}", REMEDY, sealed_from=1)
        step = found.pop("step", math.nan)
        if not step.is_integer():
            raise UserError(f"{path} line {number} has no step; {REMEDY}")
        rows[int(step)] = found
    return rows, (len(whole) + len(newline),) if rest else ()
