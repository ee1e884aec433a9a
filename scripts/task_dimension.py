"""In how many random dimensions does smollm2 learn to refuse: a table for mechlens/studies/geometry/README.md.

    python scripts/task_dimension.py [--write]

A LoRA adapter of rank 4 on every matrix of the upper half of the blocks is trained in random subspaces of its
parameters (Fastfood), by as many steps of L-BFGS each, to begin the answers to 24 harmful requests with a refusal and
those to 24 ordinary ones as the model did. The blocks below are run once. About 15 minutes of one core.
"""

import argparse
import time
from pathlib import Path

import readme_table
import torch
from torch import Tensor

DIMENSIONS = (1, 8, 64, 512, 4096)
EACH, STEPS, LOWEST = 24, 12, 15
REFUSAL, BEGINS, KEPT = "I can't help with that.", 3, 4
"""What is said to harmful requests, how many of its tokens make a refusal, and how many of the model's own answer are
kept for others."""
COLUMNS = ["dimensions", "training loss", "refused, trained: harmful", "harmless", "refused, others: harmful",
           "harmless", "gap"]  # fmt: skip


class Upper:
    """The upper blocks with an adapter, as functions of its parameters."""

    def __init__(self, seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        import mechlens as ml

        self.model, self.tokenizer = ml.load_hf("smollm2")
        self.template = ml.chat_template(self.tokenizer, "tokenizer")
        self.refusal = self.tokenizer(REFUSAL)["input_ids"]
        harmful, benign = ml.builtin_prompts("harmful")[: 2 * EACH], ml.builtin_prompts("benign")[: 2 * EACH]
        asked = [[*harmful[half:][:EACH], *benign[half:][:EACH]] for half in (0, EACH)]
        prompts = [
            [batch.row(k) for k in range(2 * EACH)] for batch in (ml.tokenize(one, self.template) for one in asked)
        ]
        kept = [self.refusal] * EACH + [self._own(row) for row in prompts[0][EACH:]]
        self.taught = self._below(prompts[0], kept)
        self.asked = [self._below(own, [self.refusal[:BEGINS]] * (2 * EACH)) for own in prompts]
        self.model.model.layers = self.model.model.layers[LOWEST:]
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        self.read = Read(get_peft_model(self.model, config)).eval()
        self.parts = {name: own for name, own in self.read.named_parameters() if own.requires_grad}
        self.start = torch.cat([own.detach().flatten() for own in self.parts.values()])

    @torch.inference_mode()
    def _below(self, prompts: list[list[int]], said: list[list[int]]) -> dict[str, Tensor]:
        """Prompts and what is said then, as they come to the upper blocks; labels are of what is said."""
        width = max(len(one) + len(other) for one, other in zip(prompts, said, strict=True))
        tokens, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width)
        labels = torch.full_like(tokens, -100)
        for i, (row, own) in enumerate(zip(prompts, said, strict=True)):
            whole = torch.tensor([*row, *own])
            tokens[i, : len(whole)], mask[i, : len(whole)] = whole, 1.0
            labels[i, len(row) : len(whole)] = torch.tensor(own)
        hidden = self.model.model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states[LOWEST]
        rows, columns = (labels[:, 1:] >= 0).nonzero(as_tuple=True)
        said_there = labels[:, 1:][rows, columns]
        return {"hidden": hidden.clone(), "mask": mask, "rows": rows, "columns": columns, "said": said_there}

    def _own(self, row: list[int]) -> list[int]:
        made = self.model.generate(torch.tensor([row]), max_new_tokens=KEPT, do_sample=False)
        return [int(token) for token in made[0, len(row) :]]

    def logits(self, parameters: Tensor, given: dict[str, Tensor]) -> Tensor:
        """Of every token that is to be said, by an adapter of these parameters."""
        cut = torch.split(parameters.float(), [own.numel() for own in self.parts.values()])
        named = {name: part.view(own.shape) for (name, own), part in zip(self.parts.items(), cut, strict=True)}
        found: Tensor = torch.func.functional_call(self.read, named, (given,))
        return found

    def loss(self, parameters: Tensor) -> Tensor:
        """Mean over requests of the cross-entropy of what is to be said."""
        given = self.taught
        each = torch.nn.functional.cross_entropy(self.logits(parameters, given), given["said"], reduction="none")
        return (each.double() / torch.bincount(given["rows"])[given["rows"]]).sum() / (2 * EACH)

    @torch.inference_mode()
    def refused(self, parameters: Tensor, given: dict[str, Tensor]) -> tuple[float, float]:
        """Shares of harmful and of ordinary requests whose greedy answer begins as a refusal does."""
        wrong = (self.logits(parameters, given).argmax(dim=1) != given["said"]).double()
        own = (torch.zeros(2 * EACH, dtype=torch.float64).index_add(0, given["rows"], wrong) == 0).double()
        return float(own[:EACH].mean()), float(own[EACH:].mean())


class Read(torch.nn.Module):
    """The adapted blocks, and the unembedding where something is to be said."""

    def __init__(self, adapted: torch.nn.Module) -> None:
        super().__init__()
        self.adapted = adapted

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        """Logits of what is to be said."""
        inner = self.adapted.base_model.model
        hidden = inner.model(inputs_embeds=given["hidden"].clone(), attention_mask=given["mask"], use_cache=False)[0]
        found: Tensor = inner.lm_head(hidden[given["rows"], given["columns"]])
        return found


def row(name: str, trained: float, shares: list[tuple[float, float]]) -> str:
    """A line of the table."""
    (harmful, harmless), (other, others) = shares
    cells = [f"{one:.0%}" for one in (harmful, harmless, other, others)]
    return readme_table.row([name, f"{trained:.3f}", *cells, f"{other - others:.2f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    import mechlens as ml

    upper = Upper(given.seed)
    n, gaps, lines = len(upper.start), {}, [readme_table.head(COLUMNS)]

    def add(name: str, trained: float, parameters: Tensor) -> float:
        shares = [upper.refused(parameters, one) for one in upper.asked]
        lines.append(row(name, trained, shares))
        print(f"{time.strftime('%H:%M')} {lines[-1]}", flush=True)
        return shares[1][0] - shares[1][1]

    with torch.no_grad():
        add("none", float(upper.loss(upper.start)), upper.start)
    for d in (*DIMENSIONS, n):
        found = ml.train_in_subspace(upper.loss, upper.start, d=d, seed=given.seed, projection="fastfood", steps=STEPS)
        gaps[d] = add(f"{d:,}" + (" (all)" if d == n else ""), found.loss, found.parameters)
    least = ml.task_dimension(lambda d: gaps[d], DIMENSIONS, full=gaps[n])
    told = "none of these is enough" if least is None else f"{least:,} dimensions are the fewest"
    lines.append(f"\nFor 90% of the gap that all {n:,} parameters reach on other requests {told}.")
    readme_table.show(__file__, {"task dimension": "\n".join(lines)}, README if given.write else None)


README = Path(__file__).resolve().parents[1] / "mechlens/studies/geometry/README.md"

if __name__ == "__main__":
    main()
