"""What mechlens can do with each architecture, measured on tiny random models and written to ARCHITECTURES.md.

Every cell is a trial, held against plain Hugging Face: a wrong number would say WRONG, and a test wants none.
Run it when a dependency or a path through the models has changed.
"""

import copy
import re
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import readme_table
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from tiny import CONFIGS, MORE, tiny_hf, tiny_tokenizer

from mechlens.errors import UserError
from mechlens.methods.activations.collect import collect, template_of
from mechlens.methods.behaviour.answers import answer
from mechlens.methods.behaviour.perplexity import text_loss
from mechlens.methods.directions.direction import Direction
from mechlens.methods.steering.interventions import ALL, EVERYWHERE, Ablate, Add
from mechlens.methods.steering.steering import answer_under, applied, logits_under
from mechlens.models.bridge import bridge, d_model, loaded, n_layers
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.engine.edits import bears_edits, is_laid_out
from mechlens.models.engine.growing import can_grow
from mechlens.models.native import blocks_of
from mechlens.models.sites import SITES, site_hook
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt

TABLE = ROOT / "mechlens" / "models" / "ARCHITECTURES.md"
COLUMNS = (
    "collect",
    "answer",
    "steer",
    "losses",
    "ablate everywhere",
    "patch, growing",
    "patch, whole",
    "in some blocks",
)
INTRODUCTION = """# What each architecture can do

Made by `scripts/architectures.py` on tiny random models; every cell was held against plain Hugging Face.

- **collect**, **answer**, **steer**: *fast* (shared start, packed cache, plain modules), *library* (Hugging Face's own
  generation, with its cache), *whole* (a whole pass for every batch or token: exact and slow).
- **losses**: text loss, surprise, first-token log-odds and logit lens, from the last residual.
- **ablate everywhere**: a direction out of all that is written, as `select` and `causal` do.
- **patch**: the sites that every block has, by a *growing* batch or by *whole* passes. In a block without attention,
  an intervention at `attn_out` acts on what mixes the tokens there (convolution, state space, linear attention).
"""
PROMPTS = [Prompt(id="a", text="the thing"), Prompt(id="b", text="what is it?")]
NEW = 3


def main() -> None:
    rows = {name: row(name) for name in sorted({**CONFIGS, **MORE})}
    TABLE.write_text(page(rows), encoding="utf-8")


def page(rows: dict[str, dict[str, str]]) -> str:
    lines = [readme_table.row(("architecture", *COLUMNS)), readme_table.row(["---"] * (len(COLUMNS) + 1))]
    lines += [readme_table.row((name, *(cells.get(column, "") for column in COLUMNS))) for name, cells in rows.items()]
    return f"{INTRODUCTION}\nMeasured with {versions()}.\n\n" + "\n".join(lines) + "\n"


def versions() -> str:
    return ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("torch", "transformers", "transformer-lens"))


def row(name: str) -> dict[str, str]:
    """The cells of one architecture, by column; a sentence in the first where the model can't be loaded."""
    hf_model = tiny_hf(name)
    plain = copy.deepcopy(hf_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of paths that are slower: the cells say so
        try:
            model = bridge(hf_model, tiny_tokenizer(), Checkpoint(name, f"tests/{name}"))
        except UserError as error:
            return {"collect": str(error).replace("|", "/")}
        trials: dict[str, Callable[[Any, Any], str]] = {
            "collect": collected, "answer": answered, "steer": steered, "losses": losses,
            "ablate everywhere": ablated, "patch, growing": grown, "patch, whole": whole, "in some blocks": sometimes,
        }  # fmt: skip
        return {column: said(trial, model, plain) for column, trial in trials.items()}


def said(trial: Callable[[Any, Any], str], model: Any, plain: Any) -> str:
    try:
        return trial(model, plain)
    except UserError as error:
        sentence = str(error).replace(loaded(model).checkpoint.name, "it").replace("|", "/")
        return "no: " + re.sub(r" \(up to [^)]*\)", "", sentence)  # a number of this random model's


def judged(how: str, right: bool) -> str:
    return how if right else f"{how}: WRONG"


def close(found: Tensor, right: Tensor) -> bool:
    return float((found - right).abs().max()) <= 1e-4 * max(1.0, float(right.abs().max()))


def rows_of(model: Any) -> list[list[int]]:
    batch = tokenize(PROMPTS, template_of(model))
    return [batch.row(i) for i in range(len(PROMPTS))]


@torch.inference_mode()
def last_logits(plain: Any, ids: list[int]) -> Tensor:
    logits: Tensor = plain(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


def greedy(plain: Any, ids: list[int]) -> tuple[int, ...]:
    found: list[int] = []
    while len(found) < NEW and (not found or found[-1] != 4):
        found.append(int(last_logits(plain, ids + found).argmax()))
    return tuple(token for token in found if token != 4)


def collected(model: Any, plain: Any) -> str:
    acts = collect(model, PROMPTS, positions=["last"])
    seen: dict[int, Tensor] = {}
    blocks = blocks_of(plain)

    def entering(layer: int) -> Callable[..., None]:
        return lambda block, args, kwargs: seen.__setitem__(layer, args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(entering(i), with_kwargs=True) for i, block in enumerate(blocks)]
    right = True
    for i, ids in enumerate(rows_of(model)):
        last_logits(plain, ids)
        right &= all(close(acts.values[i, layer, 0], seen[layer][0, -1]) for layer in seen)
    for handle in handles:
        handle.remove()
    return judged("fast" if acts.engine == "fast" else "whole", right)


def answered(model: Any, plain: Any) -> str:
    got = answer(model, PROMPTS, max_new_tokens=NEW)
    right = got.tokens == tuple(greedy(plain, ids) for ids in rows_of(model))
    return judged({"fast": "fast", "uncached": "whole"}.get(got.engine, "library"), right)


def direction(model: Any) -> Direction:
    vector = torch.randn(d_model(model), generator=torch.Generator().manual_seed(0))
    return Direction(
        vector=vector, level=1, position="inst", site="resid", method="random", contrast=("a", "b"), train_ids=(),
        checkpoint=loaded(model).checkpoint, template=template_of(model).fingerprint,
    )  # fmt: skip


def steered(model: Any, plain: Any) -> str:
    one = direction(model)
    add = Add(one, strength=1.0, unit="raw", layers=(1,), positions=ALL, phase="both")
    got = answer_under(model, PROMPTS, [add], max_new_tokens=1)
    logits = logits_under(model, PROMPTS, [add])

    def shifted(block: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] + one.vector, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + one.vector}

    handle = blocks_of(plain)[1].register_forward_pre_hook(shifted, with_kwargs=True)
    right = all(close(logits[i], last_logits(plain, ids)) for i, ids in enumerate(rows_of(model)))
    handle.remove()
    return judged("fast" if got.engine == "fast" else "whole", right)


@torch.inference_mode()
def losses(model: Any, plain: Any) -> str:
    ids = torch.tensor([tiny_tokenizer()("the thing is that")["input_ids"]])
    right = torch.nn.functional.cross_entropy(plain(ids, use_cache=False).logits[0, :-1], ids[0, 1:])
    return judged("yes", close(text_loss(model, ["the thing is that"])[0].float(), right))


def ablated(model: Any, plain: Any) -> str:
    one = direction(model)
    unit = one.vector / one.vector.norm()
    levels = tuple(range(1, n_layers(model) + 1))
    with applied(model, [Ablate(one, layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)]):
        values = collect(model, PROMPTS, levels=levels).values
    return judged("yes", float((values @ unit).abs().max()) < 1e-4 * float(values.norm(dim=-1).max()))


def in_blocks(model: Any) -> dict[str, list[bool]]:
    """Whether each block has a site."""
    points = model.hook_dict
    return {site: [site_hook(site, layer) in points for layer in range(n_layers(model))] for site in SITES}


def patchable(model: Any) -> list[str]:
    """Sites of every block whose heads are told apart and where an edit changes something."""
    every = [site for site, has in in_blocks(model).items() if all(has)]
    return [site for site in every if is_laid_out(model, site, 0) and bears_edits(model, site, 0)]


def grown(model: Any, plain: Any) -> str:
    return ", ".join(site for site in patchable(model) if can_grow(model, site))


def whole(model: Any, plain: Any) -> str:
    return ", ".join(site for site in patchable(model) if not can_grow(model, site))


def sometimes(model: Any, plain: Any) -> str:
    return ", ".join(site for site, has in in_blocks(model).items() if any(has) and not all(has))


if __name__ == "__main__":
    main()
