"""The cliff as a record: curves over the trace, controls, cliffs by trace, heads and what is without them."""

from mechlens.models.bridge import loaded
from mechlens.runs.report import figures
from mechlens.runs.report.report import Report, Section
from mechlens.runs.writer import RunWriter
from mechlens.studies.cliff.study import CLIFF, CliffResult, CliffStudy
from mechlens.studies.cliff.verdict import RULE

QUESTION = "Does refusal, which a reasoning model holds while it thinks, fall before it answers, and where?"
SHOWN = (-120, 10)
"""Places that the curve shows; the table has all."""
WORDS = {
    "drop": "drop of harmful requests", "excess": "that, beyond harmless ones",
    "auroc": "AUROC of refused against complied, before the answer", "drop.harmless": "drop of harmless requests",
    "drop.shuffled": "drop of harmful ones whose thought is shuffled", "drop.harm": "drop of their harmfulness",
    "drop.complied_harmful": "drop where the model complied", "drop.refused_harmful": "drop where it refused",
    "share.cliff": f"share of harmful requests with a cliff (more than {CLIFF} beyond harmless ones)",
    "auroc.drop_complied": "AUROC of the drop for complying, among harmful requests",
}  # fmt: skip


def record(writer: RunWriter, result: CliffResult, given: CliffStudy) -> None:
    """Writes everything that was found into an open run."""
    writer.result(result)
    sections = [
        Section("Along the trace", RULE, _curve(writer, result)),
        Section(
            "Trace by trace",
            "A p is how often noise whose neighbours are as alike has as good a cut in two.",
            table=result.prompts,
        ),
    ]
    if len(result.heads.ablation):
        sections.append(_heads(writer, result))
    name = loaded(given.model).checkpoint.name
    metrics = result.metrics()
    writer.report(Report(
        title=f"The refusal cliff in {name}", question=QUESTION, verdict=str(result.verdict.headline),
        headline=result.verdict.headline, numbers=metrics, words=WORDS, sections=tuple(sections),
        how=f"{len(given.traces)} traces ({result.split.sizes}); refusal is read at level {result.level}, chosen on "
        "validation traces. Published scores (Yin et al. 2025) are probabilities of a logistic probe: another scale.",
        model=name,
    ))  # fmt: skip


def _curve(writer: RunWriter, result: CliffResult) -> tuple[str, ...]:
    curves = result.curves
    shown = curves[curves["place"].between(*SHOWN) & (curves["n"] > 1)]
    names = []
    for line in dict.fromkeys(curves["line"]):
        own = shown[shown["line"] == line]
        figure = figures.lines(
            own, x="place", y="score", low="low", high="high", group="group", hline=0.0,
            title=f"{line.capitalize()} by token", xlabel="tokens from the last one before the answer",
            ylabel="score (0 to 1: the classes' means)",
        )  # fmt: skip
        caption = "At 0 the answer is about to begin. Bands: 1.96 standard errors over traces."
        names.append(writer.figure(f"{line}_by_token", figure, table="curves", caption=caption))
    return tuple(names)


def _heads(writer: RunWriter, result: CliffResult) -> Section:
    grid = figures.heatmap(
        result.heads.heads, x="head", y="layer", value="written", center=0.0, label="score",
        title="What heads write along refusal before the answer", xlabel="head", ylabel="layer",
    )  # fmt: skip
    seen = "Blue: against refusal. Harmful validation traces."
    name = writer.figure("heads", grid, table="heads", caption=seen)
    return Section(
        "Heads",
        "Heads are ranked by what they write on validation traces, and switched off on test traces of harmful requests "
        "at every token. The exact effect of each alone goes with what it writes by a correlation of "
        f"{result.heads.heads['agreement'].iloc[0]:.2f}. Damage is the loss on plain text (nats a token).",
        (name,),
        table=result.heads.ablation,
    )
