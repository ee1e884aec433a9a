"""Which way a headline number speaks, said on its card, for people who don't know the measure."""

import re

_SIGNS = (
    (r"random|one_variable_95|null\.|floor", "the number to beat"),
    (r"beyond_words", "above 0: more than the words tell"),
    (r"bypass_shift\.beyond_chance", "below 0: refuses less than under random ones"),
    (r"beyond_chance", "above 0: more than random ones"),
    (r"gain", "above 0: ahead of the baseline"),
    (r"(^|_)words$|surface|tfidf|mean_embedding|token_identity|length_auroc", "the number to beat"),
    (r"dissociation$", "above the next number: more than one variable gives"),
    (r"harm_gap", "above 0: looks more harmful"),
    (r"refusal_gap", "below 0: looks less refused"),
    (r"gap_change", "above 0: refused more, beside the other class, than in the base"),
    (r"readout_gap|threshold_gap", "below 0: worse than what is fitted at the checkpoint"),
    (r"auroc_change|frozen_change|own_change|probe_change", "below 0: read worse than in the base"),
    (r"auroc", "0.5: chance; 1: told apart"),
    (r"effect_size", "0: no difference; above 0.8: large"),
    (r"reliability", "0: noise; 1: noise-free"),
    (r"recovery|moved", "0: nothing changes; 1: all of it"),
    (r"bypass_shift|refusal_score.*ablated", "lower: refuses less"),
    (r"induce_shift|refusal_score.*added", "higher: refuses more"),
    (r"change\.belief_harm", "below 0: looks less harmful"),
    (r"change\.belief_refusal", "below 0: closer to accepting"),
    (r"belief_harm", "above 0: looks harmful"),
    (r"success", "higher: the attack works more often"),
    (r"accuracy|tpr", "higher: better"),
    (r"calibration_error|loss|\bkl\b|fpr|false_positives", "lower: better"),
)
"""Patterns in the names of metrics, the first that is found counts, and what stands on the card."""


def sign(name: str) -> str:
    """What a high or a low value says; "" where the number has no better side."""
    return next((words for pattern, words in _SIGNS if re.search(pattern, name)), "")
