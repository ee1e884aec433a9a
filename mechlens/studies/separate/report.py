"""The separation study as a record: metrics, tables, figures, artefacts and a report."""

import pandas as pd

from mechlens.methods.directions.token_view import project_tokens
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.runs.report.report import Report, Section, TokenView
from mechlens.runs.writer import RunWriter
from mechlens.studies.separate.figures import draw
from mechlens.studies.separate.study import Separation
from mechlens.studies.separate.verdict import Verdict, separation_verdict
from mechlens.studies.shared.harm_sets import ContrastSets
from mechlens.studies.shared.quadrants import IN_NO_QUADRANT, QUADRANTS

QUESTION = (
    "Does this model represent harmfulness and refusal as two things? A harmful request that it accepts should still "
    "look harmful at the end of the instruction, and a refusal should be readable at the last template token "
    "even among harmful requests alone (Zhao et al. 2025)."
)

NUMBERS = {
    "harmful_auroc.inst.accepted": "harmful among accepted prompts, at inst: AUROC",
    "refused_auroc.last.harmful": "refused among harmful prompts, at last: AUROC",
    "cos_harm_refusal": "cosine of the two directions, corrected for noise",
    "token_identity_auroc.inst": "harmful, from the token at inst alone: AUROC",
    "harmful_auroc.inst": "harmful, at inst: AUROC",
    "refused_auroc.last": "refused, at last: AUROC",
}
"""What decides the verdict, in words."""


def record(writer: RunWriter, result: Separation, sets: ContrastSets) -> None:
    """Writes everything the study found into an open run."""
    verdict = separation_verdict(result.metrics())
    writer.result(result)
    figures = draw(writer, result)
    checkpoint = loaded(sets.model).checkpoint
    writer.report(
        Report(
            title=f"Harmfulness and refusal in {checkpoint.name}",
            question=QUESTION,
            verdict=f"{verdict.word.capitalize()}. {verdict.sentence}",
            numbers={NUMBERS[name]: estimate for name, estimate in verdict.deciding.items()},
            sections=(
                _quadrants(result, figures),
                _detection(result, figures),
                _angle(result, figures),
                _beliefs(result, figures),
                _template(result),
                _examples(result, sets.model),
            ),
            how=_how(result, verdict, sets),
            model=checkpoint.name,
        )
    )


def _quadrants(result: Separation, figures: dict[str, tuple[str, ...]]) -> Section:
    tokens = result.first_token.tokens
    return Section(
        "Who is refused",
        "Every prompt was answered greedily and judged. The four quadrants are placed by the first judge "
        f"(`{result.judged.judge}`); the others show how far that choice matters. {_placed_nowhere(result)}\n\n"
        f"The log-odds judge reads the first answer token only: P(first token in {list(tokens.texts)}), tokens "
        f"{tokens.origin}{'' if tokens.coverage is None else f' with coverage {tokens.coverage:.2f}'}. Its AUROC "
        f"against the first judge is {result.first_token.auroc}.",
        figures["quadrants"],
        table=result.agreement(),
    )


def _placed_nowhere(result: Separation) -> str:
    quadrants = result.judged.quadrants()
    counts = [f"{quadrants.count(name)} {name}" for name in IN_NO_QUADRANT]
    return f"In none of them, of {len(quadrants)} prompts: {', '.join(counts)} answers."


def _detection(result: Separation, figures: dict[str, tuple[str, ...]]) -> Section:
    skipped = [
        f"`{name}` ({', '.join(f'{n} {label}' for label, n in contrast.counts.items())})"
        for name, contrast in result.contrasts.items()
        if contrast.detection is None
    ]
    missing = f"\n\nNot measurable, with the prompts there were: {'; '.join(skipped)}." if skipped else ""
    return Section(
        "What can be read, and where",
        "Held-out AUROC of the mean difference. The direction is fitted on training families, the level chosen on "
        "validation and scored once on test. Within-class contrasts (`harmful.accepted`: harmfulness among accepted "
        "prompts) change one factor only. A number means little unless it beats the surface baselines: the token at "
        "the position before any block has run, the words (TF-IDF), the mean token embedding." + missing,
        figures["detection"],
        table=result.chosen(),
    )


def _angle(result: Separation, figures: dict[str, tuple[str, ...]]) -> Section:
    level = result.geometry.level
    measured = result.geometry.metrics()
    return Section(
        "The angle between the two directions",
        f"At level {level} (chosen on validation for harmfulness at `inst`) the cosine is "
        f"{measured['cos_harm_refusal.measured']} as measured and {measured['cos_harm_refusal']} corrected for noise. "
        "Two estimates of one direction from few prompts can be nearly orthogonal, so each curve stands beside the "
        "split-half reliability of both directions, and the corrected one compares disjoint halves.\n\n"
        "Refused-harmful against accepted-harmless differs in both factors. The balanced main effects "
        "(half of [(RH-RL)+(AH-AL)] and half of [(RH-AH)+(RL-AL)]) don't, and the interaction says how far one "
        "depends on the other; they need all four quadrants.",
        figures["angle"],
    )


def _beliefs(result: Separation, figures: dict[str, tuple[str, ...]]) -> Section:
    if result.beliefs.harm is None:
        text = "Not measurable: the centroids need refused harmful and accepted harmless training prompts."
    else:
        text = (
            "Belief of harmfulness: mean over levels of cos(h, harmful centroid) - cos(h, harmless centroid) at "
            "`inst`; belief of refusal likewise at the last token. Centroids come from refused harmful and accepted "
            "harmless training prompts; every prompt shown is held out. If the two are separate things, accepted "
            "harmful prompts stay on the harmful side and move to the accepting side. "
            f"Correlation of the two beliefs: {result.beliefs.correlation['belief_correlation.pearson']} (Pearson)."
        )
    return Section("Where the misbehaving quadrants fall", text, figures["beliefs"])


def _template(result: Separation) -> Section:
    rates = result.refusal_rates
    return Section(
        "Without the template's last tokens",
        f"Refusal of harmful prompts with the full template: {rates['full_template']}; with the prompt cut right after "
        f"the instruction: {rates['no_post_tokens']}. (The paper's Table 1: refusal falls from 96-100% to 59-85%.)",
    )


def _examples(result: Separation, model: LanguageModel) -> Section:
    """One prompt of each quadrant, its tokens coloured by the two directions."""
    views: list[TokenView] = []
    rows = []
    quadrants = result.judged.quadrants()
    for name in QUADRANTS:
        test = [i for i in result.split.test if quadrants[i] == name]
        for i in test[:2]:
            prompt, said = result.judged.prompts[i], result.judged.answers.texts[i]
            rows.append({"quadrant": name, "prompt": prompt.text, "answer": said})
        if test:
            views += _views(result, model, test[0], name)
    return Section(
        "Examples", "Test prompts; blue is below zero, red above.", table=pd.DataFrame(rows), views=tuple(views)
    )


def _views(result: Separation, model: LanguageModel, row: int, quadrant: str) -> list[TokenView]:
    ids = [*result.batch.row(row), *result.judged.answers.tokens[row]]
    start = int(result.batch.instruction[row, 0]) - result.batch.offset(row)
    views = []
    for name, position in (("harmful", "inst"), ("refused", result.acts.positions[-1])):
        detection = result.contrasts[name].detection
        if detection is not None:
            shown = project_tokens(model, detection.at(position).direction, ids)
            title = f"{quadrant.replace('_', ' ')}: {name} (level {shown.level}, {position})"
            views.append(TokenView.centred(shown.tokens[start:], shown.values[start:], title))
    return views


def _how(result: Separation, verdict: Verdict, sets: ContrastSets) -> str:
    known = loaded(sets.model)
    return (
        f"The rule of the verdict. {verdict.rule}\n\n"
        f"Prompts: {result.split.sizes}; {result.split_note}. {sets.punctuation}\n\n"
        f"Intervals: 95% bootstrap over prompt families ({result.plan.resamples} resamples), directions frozen; for "
        "cosines 95% jackknife over families, directions refitted. Nulls: label permutation and random directions of "
        f"the same norm, at the chosen levels.\n\nAnswers: greedy, {result.plan.max_new_tokens} tokens. Activations: "
        f"{result.acts.engine} engine, {known.checkpoint.regime} weights. Largest logit difference to plain "
        f"Hugging Face on one prompt: {known.parity_gap:.2g}."
    )
