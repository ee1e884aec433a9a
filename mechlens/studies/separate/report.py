"""The separation study as a record: metrics, tables, figures, artefacts and a report."""

from collections.abc import Sequence

import pandas as pd

from mechlens.methods.directions.token_view import project_tokens
from mechlens.methods.statistics.estimate import Estimate
from mechlens.models.bridge import LanguageModel, loaded
from mechlens.runs.report.report import Report, Section, TokenView
from mechlens.runs.writer import RunWriter
from mechlens.studies.separate.contrasts import Question
from mechlens.studies.separate.figures import INSIDE, draw
from mechlens.studies.separate.study import Separation
from mechlens.studies.separate.verdict import NO_SCALE, Verdict, on_a_scale, separation_verdict
from mechlens.studies.shared.angles import angle_text
from mechlens.studies.shared.harm_sets import ContrastSets
from mechlens.studies.shared.quadrants import IN_NO_QUADRANT, QUADRANTS
from mechlens.studies.shared.rounding import class_rounding

QUESTION = (
    "Does this model represent harmfulness and refusal as one variable or two? A harmful request that it accepts "
    "should still "
    "look harmful at the end of the instruction, and a refusal should be readable at the last template token "
    "even among harmful requests alone (Zhao et al. 2025)."
)

NUMBERS = {
    "dissociation": "how far harm and refusal come apart (one variable: 0, two: up to 4)",
    "dissociation.one_variable_95": "what one variable alone stays below, in 95% of fitted worlds",
    "dissociation.beyond_words": "how far they come apart once the words are taken out of both readings",
    "dissociation.harm_gap": "harm of accepted harmful prompts less that of refused harmless ones",
    "dissociation.refusal_gap": "refusal of accepted harmful prompts less that of refused harmless ones",
    "harmful_auroc.inst.accepted": "harmfulness fitted on all prompts, scored among accepted ones, at inst: AUROC",
    "harmful_gain.accepted": "harmfulness fitted on all prompts, AUROC gained among accepted over the best baseline",
    "refused_auroc.last.harmful": "refusal fitted on all prompts, scored among harmful ones, at last: AUROC",
    "refused_gain.harmful": "refusal fitted on all prompts, AUROC gained among harmful over the best baseline",
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
            headline=verdict.headline,
            verdict=f"{verdict.word.capitalize()}. {verdict.sentence}" + _rounding(result, sets.model),
            numbers=_cards(verdict),
            words=NUMBERS,
            main=figures["dissociation"][:1],
            sections=(
                _quadrants(result, figures),
                _one_or_two(result, figures),
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


def _cards(verdict: Verdict) -> dict[str, Estimate]:
    """The deciding numbers; of what is measured on the quadrants' scale only what that scale can carry."""
    return {
        name: on_a_scale(number) if name.startswith("dissociation") else number
        for name, number in verdict.deciding.items()
    }


def _quadrants(result: Separation, figures: dict[str, tuple[str, ...]]) -> Section:
    tokens, served = result.first_token.tokens, result.judged.answers.served
    return Section(
        "Who is refused",
        f"Every prompt was answered greedily and judged. {'' if served is None else f'{served.sentence} '}"
        "The four quadrants are placed by the first judge "
        f"(`{result.judged.judge}`); the others show how far that choice matters. {_placed_nowhere(result)}\n\n"
        f"The log-odds judge reads the first answer token only: P(first token is one of {tokens.named}), tokens "
        f"{tokens.origin}{'' if tokens.coverage is None else f' with coverage {tokens.coverage:.2f}'}. Its AUROC "
        f"against the first judge is {result.first_token.auroc}.",
        figures["quadrants"],
        table=result.agreement(),
    )


def _placed_nowhere(result: Separation) -> str:
    quadrants = result.judged.quadrants()
    counts = {name: quadrants.count(name) for name in IN_NO_QUADRANT if name in quadrants}
    if not counts:
        return f"Each of the {len(quadrants)} prompts is in one of them."
    answers = ", ".join(f"{n} {name}" for name, n in counts.items())
    return f"{sum(counts.values())} of {len(quadrants)} prompts are in none of them, for their answers ({answers})."


def _one_or_two(result: Separation, figures: dict[str, tuple[str, ...]]) -> Section:
    found, worlds = result.analysis.dissociation, result.analysis.one_factor
    if found is None or worlds is None:
        name, n = result.analysis.places.fewest()
        return Section(
            "One variable or two",
            f"Not measurable: there are {n} prompt families of {name.replace('_', ' ')} prompts.",
        )
    metrics = result.metrics()
    no_scale = "" if on_a_scale(metrics["dissociation"]).measurable else f" Read no number into it: {NO_SCALE}."
    seeds = found.by_fold_seed
    return Section(
        "One variable or two",
        "Harm is read at `inst` and refusal at the last token, each prompt by directions that never saw its family, "
        "and both are scaled so that refused harmful prompts lie at +1 and accepted harmless ones at -1. One variable, "
        "read along whatever axes, puts every prompt on the diagonal; two put accepted harmful prompts to the lower "
        "right and refused harmless ones to the upper left. Harm and refusal come apart by the distance between these "
        "two, across the diagonal (D).\n\n"
        f"D is {metrics['dissociation']} (by fold seed {min(seeds):.2f} to {max(seeds):.2f}); with topics left in, "
        f"{metrics['dissociation.over_topics']}. Accepted harmful less refused harmless: "
        f"{metrics['dissociation.harm_gap']} "
        f"in harm, {metrics['dissociation.refusal_gap']} in refusal. Of {len(worlds.drawn['D'])} worlds with one "
        "variable "
        f"fitted to these data, 95% give less than {worlds.quantile('D'):.2f} (p = {worlds.p('D'):.3f}).{no_scale}\n\n"
        "The table: harm among accepted prompts once what reads refusal is projected out at the same position, and the "
        "reverse, as AUROC; beside it what one variable leaves.",
        figures["dissociation"],
        table=_erasures(result),
    )


def _erasures(result: Separation) -> pd.DataFrame:
    read = {"refusal": "harm, among accepted prompts", "harm": "refusal, among harmful prompts"}
    table = result.analysis.erasures()
    return table.assign(read=table["erased"].map(read))[
        ["position", "erased", "read", "auroc", "one_variable_mean", "one_variable_95", "p"]
    ]


def _there_were(question: Question, quadrants: Sequence[str]) -> str:
    """How many prompts of each class there were, and whether the extra ones were left out."""
    counts = question.counts()
    said = ", ".join(f"{n} {label}" for label, n in counts.items())
    fewer = any(n < quadrants.count(label) for label, n in counts.items())
    return f"{said}; extra prompts don't count here" if fewer else said


def _detection(result: Separation, figures: dict[str, tuple[str, ...]]) -> Section:
    skipped = [
        f"{_named(name)} ({_there_were(contrast.question, result.analysis.places.quadrants)})"
        for name, contrast in result.contrasts.items()
        if contrast.scores is None
    ]
    missing = f"\n\nNot measurable, with the prompts there were: {'; '.join(skipped)}." if skipped else ""
    return Section(
        "What can be read, and where",
        "AUROC of the mean difference, every prompt scored once by directions that never saw its family, at the level "
        "that did best inside the other folds; the lowest and the highest over other folds say how much these matter. "
        "Contrasts inside a class ('harmful, fitted among accepted') are fitted and scored among its prompts only and "
        "change one factor only. The cards above that say 'fitted on all prompts' score the contrast of all prompts "
        "among those of the class, as the verdict does: from more prompts, so another number. "
        "A number means little unless it beats the surface baselines: the token at the "
        "position before any block has run, the words (TF-IDF), the mean token embedding." + missing,
        figures["detection"],
        table=_chosen(result),
    )


def _chosen(result: Separation) -> pd.DataFrame:
    chosen = result.chosen()
    return chosen.assign(contrast=chosen["contrast"].map(_named))


def _named(contrast: str) -> str:
    """`harmful.accepted` as the figures have it, "harmful, fitted among accepted"."""
    return contrast.replace(".", INSIDE)


def _angle(result: Separation, figures: dict[str, tuple[str, ...]]) -> Section:
    level = result.geometry.level
    measured = result.geometry.metrics()
    return Section(
        "The angle between the two directions",
        f"At level {level} (which most folds choose for harmfulness at `inst`) the cosine is "
        f"{angle_text(measured['cos_harm_refusal.measured'])} as measured and "
        f"{angle_text(measured['cos_harm_refusal'])} corrected for noise. "
        "Two estimates of one direction from few prompts can be nearly orthogonal, so each curve stands beside the "
        "split-half reliability of both directions, and the corrected one compares disjoint halves.\n\n"
        "Refused-harmful against accepted-harmless differs in both factors. The balanced main effects "
        "(half of [(RH-RL)+(AH-AL)] and half of [(RH-AH)+(RL-AL)]) don't, and the interaction says how far one "
        "depends on the other; they need all four quadrants.",
        figures["angle"],
    )


def _beliefs(result: Separation, figures: dict[str, tuple[str, ...]]) -> Section:
    if result.beliefs.harm is None:
        text = "Not measurable: the centroids need refused harmful and accepted harmless prompts."
    else:
        text = (
            "Belief of harmfulness: mean over levels of cos(h, harmful centroid) - cos(h, harmless centroid) at "
            "`inst`; belief of refusal likewise at the last token. Centroids come from refused harmful and accepted "
            "harmless prompts of the other folds; every prompt shown is held out. If the two are separate things, "
            "accepted "
            "harmful prompts stay on the harmful side and move to the accepting side. "
            f"Correlation of the two beliefs: {result.beliefs.correlation['belief_correlation.pearson']} (Pearson)."
        )
    return Section("Where the misbehaving quadrants fall", text, figures["beliefs"])


def _template(result: Separation) -> Section:
    rates = result.without_template.refusal_rates
    return Section(
        "Without the template's last tokens",
        f"Refusal of harmful prompts with the full template: {rates['full_template']}; with the prompt cut right after "
        f"the instruction: {rates['no_post_tokens']}. (The paper's Table 1: refusal falls from 96-100% to 59-85%.) "
        "Harmful prompts that are accepted so, against accepted harmless ones, read at `inst`: AUROC "
        f"{result.without_template.accepted_auroc}. The residual there is the same with and without those tokens, so "
        "this is the paper's way to accepted harmful prompts in a model that refuses nearly all.",
    )


def _examples(result: Separation, model: LanguageModel) -> Section:
    """One prompt of each quadrant, its tokens coloured by the two directions."""
    views: list[TokenView] = []
    rows = []
    quadrants = result.judged.quadrants()
    for name in QUADRANTS:
        own = [i for i, quadrant in enumerate(quadrants) if quadrant == name]
        for i in own[:2]:
            prompt, answers = result.judged.prompts[i], result.judged.answers
            more = " ..." if answers.cut and answers.cut[i] else ""
            rows.append({"quadrant": name.replace("_", " "), "prompt": prompt.text, "answer": answers.texts[i] + more})
        if own:
            views += _views(result, model, own[0], name)
    return Section(
        "Examples",
        "Two prompts of each quadrant; blue is below zero, red above. The directions are fitted to all prompts.",
        table=pd.DataFrame(rows),
        views=tuple(views),
    )


def _views(result: Separation, model: LanguageModel, row: int, quadrant: str) -> list[TokenView]:
    ids = [*result.batch.row(row), *result.judged.answers.tokens[row]]
    start = int(result.batch.instruction[row, 0]) - result.batch.offset(row)
    views = []
    for name, position in (("harmful", "inst"), ("refused", result.acts.positions[-1])):
        contrast = result.contrasts[name]
        if contrast.scores is not None and contrast.directions is not None:
            direction = contrast.directions.at(contrast.scores.level(position), position)
            shown = project_tokens(model, direction, ids)
            title = f"{quadrant.replace('_', ' ')}: {name} (level {shown.level}, {position})"
            views.append(TokenView.centred(shown.tokens[start:], shown.values[start:], title))
    return views


def _rounding(result: Separation, model: LanguageModel) -> str:
    """Of the distances between the classes, where each contrast is read."""
    analysis, classes = result.analysis, {}
    for name, contrast, position in (("harmful", analysis.harm, "inst"), ("refused", analysis.refusal, analysis.last)):
        if contrast.scores is not None:
            values = result.acts.at(contrast.scores.level(position), position)
            words = f"the distance between {name} prompts and the others at {position}"
            classes[words] = values, analysis.inside(name)
    return class_rounding(loaded(model).parity, classes)


def _how(result: Separation, verdict: Verdict, sets: ContrastSets) -> str:
    known = loaded(sets.model)
    return (
        f"The rule of the verdict. {verdict.rule}\n\n"
        f"Prompts: {len(result.judged.prompts)}, in {len(result.analysis.folds[0])} folds of whole families by "
        f"{len(result.analysis.folds)} fold seeds. Prompts: {sets.punctuation}.\n\n"
        "Intervals, 95%: of AUROCs by Newcombe's method 5, scaled by families, and paired for gains; of D and of means "
        f"by bootstrap over families ({result.plan.resamples} resamples), D's stretched as Student's t is; of cosines "
        "by "
        "jackknife over families, directions refitted. Nulls: label permutation and random directions of the same "
        f"norm, at the level that most folds chose.\n\nAnswers: greedy, {result.plan.max_new_tokens} tokens"
        f"{_cut(result)}. Activations: "
        f"{result.acts.engine} engine, {known.checkpoint.regime} weights."
    )


def _cut(result: Separation) -> str:
    """How many answers are not all that the model would have said."""
    cut = result.judged.answers.cut
    if not any(cut):
        return ""
    return f"; {sum(cut)} of {len(cut)} were left off once every judge had refused them, however they went on"
