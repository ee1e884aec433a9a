"""The published data files beside the repository load whole; skipped where they are absent."""

import warnings
from pathlib import Path

import pytest

from mechlens.prompts.files.load import load_prompts

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CHATS = "chats_lab_harmfulness_refusal"
CATQA = [
    "Adult Content", "Child Abuse", "Economic Harm", "Fraud_Deception", "Hate_Harass_Violence", "Illegal Activity",
    "Malware Viruses", "Physical Harm", "Political Campaigning", "Privacy Violation Activity",
    "Tailored Financial Advice",
]  # fmt: skip
REAL = {
    "advbench/advbench.csv": 520,
    "refusal_direction/harmful_train.json": 260,
    "refusal_direction/harmful_val.json": 39,
    "refusal_direction/harmless_train.json": 18793,
    "refusal_direction/harmless_val.json": 6264,
    f"{CHATS}/advbench.json": 520,
    **{f"{CHATS}/catqa_{category}.json": 50 for category in CATQA},
    f"{CHATS}/catqa_Hate_Harass_Violence_test.json": 25,
    f"{CHATS}/example_test_harmless.json": 100,
    f"{CHATS}/human-seed-50-adv.json": 1250,
    f"{CHATS}/xstest-harmless.json": 250,
    "catqa/catqa_english.json": 550,
    "xstest/xstest_prompts.csv": 450,
    "gptfuzz/GPTFuzzer.csv": 77,
    "gptfuzz/seed_short_25.csv": 25,
    "emergent_misalignment/insecure_high_severity_first1000.jsonl": 1000,
    "safety_tuned_llamas/safety_only_data_Instructions.json": 2483,
    "alpaca_with_responses/gumbelsoft_alpaca_2000.json": 2000,
    "alpaca_with_responses/llamafactory_alpaca_en_demo.json": 999,
    "star1_reasoning_refusal/STAR-1.json": 1000,
    "plain_text/wikitext2_valid_first200_paragraphs.txt": 200,
    "plain_text/c4_demo.jsonl": 300,
}
REPEATED = {
    f"{CHATS}/catqa_Child Abuse.json": 3,
    f"{CHATS}/catqa_Hate_Harass_Violence.json": 4,
    "catqa/catqa_english.json": 7,
    "gptfuzz/GPTFuzzer.csv": 2,
    "emergent_misalignment/insecure_high_severity_first1000.jsonl": 13,
    "safety_tuned_llamas/safety_only_data_Instructions.json": 4,
    "alpaca_with_responses/llamafactory_alpaca_en_demo.json": 14,
}


@pytest.mark.parametrize("name", REAL)
def test_published_files_load_whole(name: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip("the shared research data is not beside this repository")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prompts = load_prompts(path)
    dropped = int(str(caught[0].message).split("dropped ")[1].split()[0]) if caught else 0
    assert dropped == REPEATED.get(name, 0)
    assert len(prompts) + dropped == REAL[name]
    assert len({prompt.id for prompt in prompts}) == len(prompts)


def test_published_files_keep_their_columns() -> None:
    if not SHARED.exists():
        pytest.skip("the shared research data is not beside this repository")
    xstest = load_prompts(SHARED / "xstest/xstest_prompts.csv", label_column="label")
    assert [sum(p.label == label for p in xstest) for label in ("safe", "unsafe")] == [250, 200]
    assert len(load_prompts(SHARED / "xstest/xstest_prompts.csv", where={"label": "unsafe"})) == 200
    with pytest.warns(UserWarning, match="dropped 7 prompts"):
        assert len({p.category for p in load_prompts(SHARED / "catqa/catqa_english.json")}) == 11
    assert load_prompts(SHARED / "star1_reasoning_refusal/STAR-1.json")[0].category == "Self-Harm"
