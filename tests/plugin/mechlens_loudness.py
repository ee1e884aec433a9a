"""What another package adds to mechlens; torch comes with the functions that need it, so that --help stays instant."""

from dataclasses import dataclass, replace

from mechlens.settings import ModelChoice, RunChoice
from mechlens.studies.registry import Study


@dataclass(frozen=True, kw_only=True)
class Loudness(ModelChoice, RunChoice):
    """How loud are a model's answers? The share of capitals among their letters."""

    prompts: str = "harmless"
    """A built-in set, a file or a hub data set."""
    n: int = 8
    """Prompts, the first ones."""


def prepare(config):
    from mechlens.prompts.files.load import load_prompts
    from mechlens.studies.shared.inputs import chosen_model, data_inputs, prepared

    prompts = load_prompts(config.prompts, label="asked")[: config.n]
    chosen = chosen_model(config)
    data = data_inputs({"prompts": (config.prompts, prompts)})
    return prepared((chosen, prompts), chosen.model, chosen.inputs(data), prompts)


def execute(config, content, writer):
    from mechlens.methods.behaviour.answers import answer
    from mechlens.prompts.batch import tokenize

    (model, template), prompts = content
    return answer(model, tokenize(prompts, template), max_new_tokens=8, cache=writer.cache)


def report(writer, answers, content):
    import torch

    from mechlens.methods.statistics.resample import mean_estimate
    from mechlens.runs.report.report import Report

    shares = [sum(c.isupper() for c in text) / max(sum(c.isalpha() for c in text), 1) for text in answers.texts]
    loudness = mean_estimate(torch.tensor(shares).double(), answers.ids, seed=0)
    writer.metrics({"loudness": loudness})
    numbers = {"share of capitals": loudness}
    writer.report(Report("Loudness", "How loud are the answers?", f"{loudness} of the letters are capitals.", numbers))


STUDY = Study("loudness", Loudness, *(f"mechlens_loudness:{step}" for step in ("prepare", "execute", "report")))


@dataclass(frozen=True)
class Quiet:
    """Refused where there is no capital in the answer."""

    name: str = "quiet"

    def __call__(self, prompts, answers):
        return ["empty" if not text.strip() else "accepted" if text != text.lower() else "refused" for text in answers]


QUIET = Quiet()


def median_difference(acts, positive, negative, level, position):
    """The part of the mean difference along the difference of the class medians."""
    from mechlens.methods.directions.direction import mean_difference, members

    values = acts.at(level, position)
    up, down = (values[members(acts, label)].median(dim=0).values for label in (positive, negative))
    found = mean_difference(acts, positive, negative, level, position)
    line = up - down
    unit = line / line.norm().clamp(min=1e-12)
    return replace(found, vector=(unit @ found.vector) * unit, method="median difference")
