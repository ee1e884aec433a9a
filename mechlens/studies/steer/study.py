"""`mechlens steer`: one prompt, answered with and without a direction; nothing is recorded."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from mechlens.errors import UserError
from mechlens.files import short_name
from mechlens.methods.directions.direction import Direction
from mechlens.methods.heartbeat import heartbeat
from mechlens.methods.progress import phase, timed
from mechlens.methods.steering.equal_damage import FIRST, calibrate
from mechlens.methods.steering.fits import ANEW
from mechlens.methods.steering.interventions import ALL, EVERYWHERE, Ablate, Add, Intervention
from mechlens.methods.steering.side_by_side import IN_WORDS, NORM_PROMPTS, addition_at
from mechlens.methods.steering.steering import answer_under
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.models.checkpoints.difference import require_same_template
from mechlens.models.checkpoints.outline import Outline
from mechlens.models.sites import require_everywhere
from mechlens.prompts.builtin import builtin_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs.run import RUN_FILE, read_run
from mechlens.runs.vectors.direction_files import read_direction
from mechlens.studies.registry import Screen
from mechlens.studies.shared.inputs import asks, chosen_model
from mechlens.studies.steer.by_controller import controlled, fits, read_controller
from mechlens.studies.steer.config import STRENGTH, Steer

UNSTEERED, STEERED = "unsteered", "steered"
Told = Callable[[str, str], None]
"""Is called with "unsteered" or "steered" and that answer so far, after each token."""


@dataclass(frozen=True)
class BothAnswers:
    """The answers without and with, several of a side numbered, and what was done for the second."""

    unsteered: str
    steered: str
    what: str


def execute(config: Steer, screen: Screen) -> None:
    """Both answers beside each other as they are written; in a pipe one after the other, once they are there."""
    if not screen.interactive():
        with timed() as clock, heartbeat(clock, "answering"):
            found = steer(config)
        screen.show(f"unsteered:\n{found.unsteered}\n\nsteered ({found.what}):\n{found.steered}")
        return
    said = {UNSTEERED: "", STEERED: ""}

    def beside() -> Table:
        table = Table(UNSTEERED, STEERED, expand=True)
        table.add_row(*(Text(text) for text in said.values()))
        return table

    with screen.updating(beside()) as update:

        def told(name: str, text: str) -> None:
            said[name] = text
            update(beside())

        found = steer(config, told)
    screen.show(found.what)


def steer(config: Steer, told: Told | None = None) -> BothAnswers:
    """Both answers, one after the other; `told` hears of them while they are written."""
    prompt = Prompt("prompt", config.prompt, system=config.system)
    asked = asks([prompt], new_tokens=config.max_new_tokens)
    if config.controller is not None:
        controller = read_controller(config.controller)
        with phase("loading", short_name(config.model)):
            model, template = chosen_model(config, fits(controller, asked, force=config.force))
        by_it, what = controlled(config, controller, model, template, prompt)
        return _both_answers(config, model, template, prompt, by_it, what, told)
    assert config.direction is not None  # as the configuration has made sure
    direction = read_direction(config.direction, config.layer, config.position)
    layer = direction.level if config.layer is None else config.layer

    def check(known: Outline, template: ChatTemplate) -> None:
        known.require_same("direction", direction.checkpoint, len(direction.vector), ANEW, any_weights=config.force)
        if config.operation == "add":
            known.require_levels((layer,), "layer")
        if direction.template and not config.force:
            require_same_template("direction", direction.template, template.fingerprint, ANEW)
        asked(known, template)

    with phase("loading", short_name(config.model)):
        model, template = chosen_model(config, check)
    one = _intervention(config, direction, layer, model, template)
    what = _described(config, config.direction, direction, layer, one)
    if config.calibrate_kl is not None:
        assert isinstance(one, Add)
        harmless = builtin_prompts("benign")[:NORM_PROMPTS]
        found = calibrate(model, one, harmless, config.calibrate_kl, template=template, force=config.force)
        one, what = found.push, f"{_described(config, config.direction, direction, layer, found.push)}; {found.told}"
    return _both_answers(config, model, template, prompt, one, what, told)


def _both_answers(
    config: Steer,
    model: LanguageModel,
    template: ChatTemplate,
    prompt: Prompt,
    one: Intervention,
    what: str,
    told: Told | None,
) -> BothAnswers:
    given: dict[str, tuple[Intervention, ...]] = {UNSTEERED: (), STEERED: (one,)}
    said = {name: _answer(model, template, prompt, own, config, name, told) for name, own in given.items()}
    return BothAnswers(said[UNSTEERED], said[STEERED], what)


def _intervention(
    config: Steer, direction: Direction, layer: int, model: LanguageModel, template: ChatTemplate
) -> Add | Ablate:
    if config.operation == "ablate":
        require_everywhere(model)
        return Ablate(direction, layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)
    strength = STRENGTH if config.strength is None else config.strength
    if config.calibrate_kl is not None:
        strength = math.copysign(FIRST, strength)
    return addition_at(model, direction, strength, config.unit, layer, template)


def _answer(
    model: LanguageModel,
    template: ChatTemplate,
    prompt: Prompt,
    given: tuple[Intervention, ...],
    config: Steer,
    name: str,
    told: Told | None,
) -> str:
    """One answer is heard of token by token, several once they are there: they are written side by side."""
    decode = loaded(model).tokenizer.decode

    def hear(tokens: list[int]) -> bool:
        if told is not None:
            told(name, decode(tokens, skip_special_tokens=True).strip())
        return False

    said = answer_under(
        model, [prompt], given, max_new_tokens=config.max_new_tokens, template=template,
        decided=hear if config.n_samples == 1 else None, force=config.force,
        temperature=config.temperature, top_p=config.top_p, n=config.n_samples, seed=config.seed,
    )  # fmt: skip
    if config.n_samples == 1:
        return said.texts[0]
    text = "\n".join(f"{k}. {one}" for k, one in enumerate(said.texts, start=1))
    if told is not None:
        told(name, text)
    return text


def _described(config: Steer, path: Path, direction: Direction, layer: int, one: Add | Ablate) -> str:
    positive, negative = _sides(path, direction)
    origin = f"{direction.method}, {positive} against {negative}"
    where = f"level {direction.level}, {direction.position}"
    if isinstance(one, Ablate):
        return f"ablated everywhere: {origin} ({where})"
    return f"added at layer {layer}, {one.strength:.6g} {IN_WORDS[config.unit]}: {origin} ({where})"


def _sides(path: Path, direction: Direction) -> tuple[str, str]:
    """What the direction tells apart: sides that are only called positive and negative by the sources of its run."""
    folder = path if path.is_dir() else path.parent
    if direction.contrast != ("positive", "negative") or not (folder / RUN_FILE).is_file():
        return direction.contrast
    with contextlib.suppress(UserError):  # a damaged record takes nothing from the answers
        config = read_run(folder).config
        if config.get("positive") and config.get("negative"):
            return Path(config["positive"]).name, Path(config["negative"]).name
    return direction.contrast
