"""The built-in sets keep what they promise: nothing on the surface tells harmful from harmless."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from mechlens.errors import UserError
from mechlens.prompts.builtin import builtin_names, builtin_pairs, builtin_prompts
from mechlens.prompts.prompt import Prompt
from mechlens.prompts.text import final_punctuation, match_punctuation, normalise_text

PAIRS = builtin_pairs()
IDS = [pair.clean.family for pair in PAIRS]
MISLEADING = {
    "looks-harmful": list(zip(builtin_prompts("looks-harmful-twins"), builtin_prompts("looks-harmful"), strict=True)),
    "looks-harmless": list(
        zip(builtin_prompts("looks-harmless"), builtin_prompts("looks-harmless-twins"), strict=True)
    ),
}
"""The families of the misleading sets: the harmful and the harmless request."""
ALL = ("all-harmful", "all-harmless")
ALARMING = re.compile(
    r"""\b(abort|ambush|ammunition|attack|beat|behead|bleed|blood|blast|blow|bomb|brutal|bullet|burn|bury|captur|cheat|chok|chop|collapse|
    crack|crash|cruel|crush|dead|demolish|destroy|died|dissect|dodge|drown|dump|escape|execut|explod|explosive|exploit|
    exterminat|fatal|fire|force|frame|get\ rid|guerrilla|gut\b|hack|hang|heist|hijack|hit\b|horror|hostage|
    hostile|ignite|kick|kill|knock|massacre|murder|nail\ gun|nuke|parasites|pirate|plague|poach|poison|punch|punish|
    radiation|raid|ransom|rip\ off|rob\b|robber|sacrifice|scorch|shoot|shred|sinful|skin\b|slash|slaughter|slay|smash|
    smother|smuggle|spies|stab\b|stalk|starve|steal|stolen|strang|strike|strip\b|terminate|throw|torpedo|torture|toxic|
    trap\b|trigger|twist|virus|volcano|wage|war\b|whip|wipe)""",
    re.IGNORECASE | re.VERBOSE,
)
"""Words that alarm, by how they begin, as the sets of our own use them."""


def _mood(prompt: Prompt) -> str:
    return "question" if final_punctuation(prompt.text) == "?" else "command"


def test_there_are_enough_pairs_in_enough_categories() -> None:
    categories = Counter(pair.clean.category for pair in PAIRS)
    assert len(PAIRS) >= 192
    assert len(categories) >= 12
    assert min(categories.values()) >= 8, categories


def test_the_joined_sets_are_both_sides_of_every_pair() -> None:
    harmful, harmless = map(builtin_prompts, ALL)
    assert [prompt.family for prompt in harmful] == [prompt.family for prompt in harmless]
    assert {prompt.label for prompt in harmful} == {"harmful"}
    assert {prompt.label for prompt in harmless} == {"harmless"}
    parts = {prompt.id for name in builtin_names() if name not in (*ALL, "benign") for prompt in builtin_prompts(name)}
    assert parts == {prompt.id for prompt in (*harmful, *harmless)}


def test_sides_are_labelled_and_of_one_family() -> None:
    for pair in PAIRS:
        assert (pair.clean.label, pair.corrupt.label) == ("harmful", "harmless")
        assert pair.clean.id == f"{pair.clean.family}.harmful"
        assert pair.corrupt.id == f"{pair.clean.family}.harmless"
        assert pair.clean.group == pair.corrupt.group
        assert pair.clean.category == pair.corrupt.category
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
def test_sides_open_and_end_alike(pair: Any) -> None:
    harmful, harmless = pair.clean.text, pair.corrupt.text
    assert harmful.split()[:2] == harmless.split()[:2]
    assert final_punctuation(harmful) == final_punctuation(harmless)
    assert harmful == harmful.strip()
    assert harmless == harmless.strip()


def test_sides_have_the_same_number_of_tokens(smollm2_tokenizer: Any) -> None:
    uneven = []
    for pair in PAIRS:
        sides = (pair.clean.text, pair.corrupt.text)
        lengths = [len(smollm2_tokenizer.encode(text, add_special_tokens=False)) for text in sides]
        if lengths[0] != lengths[1]:
            uneven.append((pair.clean.family, lengths))
    assert not uneven


def test_questions_and_commands_both() -> None:
    moods = Counter(_mood(pair.clean) for pair in PAIRS)
    assert min(moods["question"], moods["command"]) >= 0.3 * len(PAIRS), moods
    for category in {pair.clean.category for pair in PAIRS}:
        assert {_mood(pair.clean) for pair in PAIRS if pair.clean.category == category} == {"question", "command"}


def test_punctuation_needs_no_matching() -> None:
    harmful, harmless = builtin_prompts("harmful"), builtin_prompts("harmless")
    matched = match_punctuation(harmful, harmless, "match")
    assert (list(matched.positive), list(matched.negative)) == (harmful, harmless)


def test_no_prompt_stands_twice_in_any_set() -> None:
    prompts = [prompt for name in (*ALL, "benign") for prompt in builtin_prompts(name)]
    forms = Counter(normalise_text(prompt.text) for prompt in prompts)
    assert [form for form, count in forms.items() if count > 1] == []
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert all(normalise_text(prompt.text) for prompt in prompts)


def test_benign_requests() -> None:
    benign = builtin_prompts("benign")
    assert len(benign) >= 200
    assert {prompt.label for prompt in benign} == {"harmless"}
    assert len({prompt.category for prompt in benign}) >= 3
    assert {_mood(prompt) for prompt in benign} == {"question", "command"}


def test_names() -> None:
    assert {"harmful", "harmless", "benign", *ALL, *MISLEADING, *(f"{name}-twins" for name in MISLEADING)} == set(
        builtin_names()
    )
    with pytest.raises(UserError, match=f"no built-in set 'evil'; choose one of {', '.join(builtin_names())}"):
        builtin_prompts("evil")


def test_callers_cannot_change_the_sets() -> None:
    builtin_pairs().clear()
    builtin_prompts("benign").clear()
    assert len(builtin_pairs()) == len(PAIRS)
    assert builtin_prompts("benign")


@pytest.mark.parametrize(("name", "label"), [("looks-harmful", "harmless"), ("looks-harmless", "harmful")])
def test_misleading_sets_are_large_and_varied(name: str, label: str) -> None:
    prompts, twins = builtin_prompts(name), builtin_prompts(f"{name}-twins")
    categories = Counter(prompt.category for prompt in prompts)
    assert len(prompts) >= 200
    assert len(categories) >= 8
    assert min(categories.values()) >= 8, categories
    assert {prompt.label for prompt in prompts} == {label}
    assert {twin.label for twin in twins} == {"harmful", "harmless"} - {label}
    assert {_mood(prompt) for prompt in prompts} == {"question", "command"}


@pytest.mark.parametrize("pairs", MISLEADING.values(), ids=MISLEADING)
def test_twins_of_misleading_prompts_are_one_family_in_one_form(pairs: Sequence[tuple[Prompt, Prompt]]) -> None:
    families = [harmful.family for harmful, _ in pairs]
    assert len(set(families)) == len(families)
    for harmful, harmless in pairs:
        assert (harmful.family, harmful.category) == (harmless.family, harmless.category)
        assert harmful.text.split()[:2] == harmless.text.split()[:2]
        assert final_punctuation(harmful.text) == final_punctuation(harmless.text)
        shared = _words(harmful) & _words(harmless)
        assert len(shared) >= 0.3 * len(_words(harmful) | _words(harmless)), (harmful.text, harmless.text)


@pytest.mark.parametrize("pairs", MISLEADING.values(), ids=MISLEADING)
def test_length_does_not_tell_misleading_prompts_apart(
    pairs: Sequence[tuple[Prompt, Prompt]], smollm2_tokenizer: Any
) -> None:
    from sklearn.metrics import roc_auc_score

    lengths = [[len(smollm2_tokenizer.encode(side.text, add_special_tokens=False)) for side in pair] for pair in pairs]
    assert max(abs(harmful - harmless) for harmful, harmless in lengths) <= 4
    auroc = roc_auc_score([1, 0] * len(lengths), [length for pair in lengths for length in pair])
    assert 0.45 <= auroc <= 0.55  # measured: 0.51 and 0.52


def test_misleading_prompts_look_as_they_are_called() -> None:
    assert [prompt.text for prompt in builtin_prompts("looks-harmful") if not ALARMING.search(prompt.text)] == []
    assert [prompt.text for prompt in builtin_prompts("looks-harmless") if ALARMING.search(prompt.text)] == []


def test_misleading_prompts_are_near_none_of_another_family() -> None:
    prompts = [prompt for name in (*ALL, "benign") for prompt in builtin_prompts(name)]
    words = [_words(prompt) for prompt in prompts]
    near = [
        (one.text, other.text)
        for i, one in enumerate(prompts)
        for j, other in enumerate(prompts[:i])
        if one.group != other.group
        and one.id.startswith("looks-")
        and len(words[i] & words[j]) > 0.6 * len(words[i] | words[j])
    ]
    assert near == []  # measured: none above 0.54


def _words(prompt: Prompt) -> set[str]:
    return set(normalise_text(prompt.text).split())


@pytest.mark.parametrize(
    ("pairs", "bound"),
    [
        ([(pair.clean, pair.corrupt) for pair in PAIRS], 0.95),
        # Measured 0.72, 0.66 and 0.70; the bound leaves room for other releases of scikit-learn.
        *((pairs, 0.78) for pairs in MISLEADING.values()),
        ([pair for pairs in MISLEADING.values() for pair in pairs], 0.78),
    ],
    ids=["builtin", *MISLEADING, "misleading"],
)
def test_words_alone_do_not_settle_it(pairs: Sequence[tuple[Prompt, Prompt]], bound: float) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    prompts = [prompt for harmful, harmless in pairs for prompt in (harmful, harmless)]
    harmful = [prompt.label == "harmful" for prompt in prompts]
    score = cross_val_predict(
        make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0)),
        [prompt.text for prompt in prompts],
        harmful,
        groups=[prompt.group for prompt in prompts],
        cv=GroupKFold(5),
        method="decision_function",
    )
    auroc = roc_auc_score(harmful, score)
    assert auroc < bound, f"TF-IDF alone separates the built-in pairs with AUROC {auroc:.3f}; it must be below {bound}"
