"""One prompt, answered as a controller steers it."""

from pathlib import Path

from mechlens.files import user_path
from mechlens.methods.shown import few
from mechlens.methods.steering.controllers.controller import Controlled, Controller
from mechlens.methods.steering.controllers.fit import read_values
from mechlens.methods.steering.fits import ANEW
from mechlens.models.bridge import LanguageModel
from mechlens.models.checkpoints.difference import require_same_template
from mechlens.models.checkpoints.outline import Outline
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.templates.template import ChatTemplate
from mechlens.runs import artifacts
from mechlens.studies.shared.inputs import Check
from mechlens.studies.steer.config import STRENGTH, Steer

FILE = "controller.safetensors"


def read_controller(path: Path) -> Controller:
    """The controller of a file or a run's folder."""
    file = user_path(path)
    return artifacts.load(file / FILE if file.is_dir() else file, Controller)


def fits(controller: Controller, asked: Check, *, force: bool) -> Check:
    """UserError, before any weights are read, where a model's files say that controller or prompt aren't for it."""

    def check(known: Outline, template: ChatTemplate) -> None:
        known.require_same("controller", controller.checkpoint, controller.directions.shape[1], ANEW, any_weights=force)
        if not force:
            require_same_template("controller", controller.template, template.fingerprint, ANEW)
        asked(known, template)

    return check


def controlled(
    config: Steer, controller: Controller, model: LanguageModel, template: ChatTemplate, prompt: Prompt
) -> tuple[Controlled, str]:
    """What is done to the prompt, and in words how strongly."""
    chosen = controller.evidence.get("strength", STRENGTH) if config.strength is None else config.strength
    one = Controlled(controller, strength=chosen)
    gate, weights = controller.decide(read_values(model, tokenize([prompt], template), controller))
    order = weights[0].argsort(descending=True)[:3].tolist()
    return one, (
        f"by a controller {controller.method}: gate {float(gate[0]):.2f} at strength {one.strength:g} of the residual "
        f"norm, most at layers {few([controller.layers[i] for i in order])}"
    )
