"""What mechlens can do with each architecture, measured on tiny random models and written into the engine's README.

Every cell is a trial, held against plain Hugging Face: a wrong number would say WRONG, and a test wants none. All
that transformers and TransformerLens both know is tried. Run it when a dependency or a path through the models has
changed.
"""

import copy
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import readme_table
import torch
import transformers
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
from mechlens.models.engine.edits import Edit, bears_edits, is_laid_out, reference_edited_logits, reference_record
from mechlens.models.engine.growing import can_grow, edited_logits, record
from mechlens.models.engine.probes import apart
from mechlens.models.load import load
from mechlens.models.native import blocks_of
from mechlens.models.sites import SITES, site_hook
from mechlens.prompts.batch import tokenize
from mechlens.prompts.prompt import Prompt

README = ROOT / "mechlens" / "models" / "engine" / "README.md"
COLUMNS = (
    "collect",
    "answer",
    "steer",
    "residuals",
    "logits",
    "patched",
    "losses",
    "ablate everywhere",
    "patch, growing",
    "patch, whole",
    "in some blocks",
    "on the disk",
)
NUMBERS = ("residuals", "logits", "patched")
"""Columns that rounding changes from one machine to the next."""
RIGHT, HALF = 1e-4, 5e-2
"""Differences up to this, as a share of the largest value, are rounding: in float32, and in half precision."""
PROMPTS = [Prompt(id="a", text="the thing"), Prompt(id="b", text="what is it?")]
NEW = 3


def main() -> None:
    rows = {name: row(name) | in_parts(name) for name in sorted({**CONFIGS, **MORE})}
    readme_table.write(__file__, "what was tried", table(rows), README)
    readme_table.write(__file__, "refused", refusals(), README)


def table(rows: dict[str, dict[str, str]]) -> str:
    """The architectures that run, and below them those that TransformerLens can't wrap, with its reason."""
    runs = {name: cells for name, cells in rows.items() if "refused" not in cells}
    lines = [f"Measured with {versions()}.\n", readme_table.row(("architecture", *COLUMNS))]
    lines += [readme_table.row(["---"] * (len(COLUMNS) + 1)), *(line(name, cells) for name, cells in runs.items())]
    lines += ["", readme_table.row(("architecture", "why it can't be loaded")), readme_table.row(["---"] * 2)]
    lines += [line(name, cells) for name, cells in rows.items() if "refused" in cells]
    return "\n".join(lines)


def line(name: str, cells: dict[str, str]) -> str:
    if "refused" in cells:
        return readme_table.row((name, cells["refused"]))
    return readme_table.row((name, *(cells.get(column, "") for column in COLUMNS)))


def versions() -> str:
    return ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("torch", "transformers", "transformer-lens"))


def known_to_both() -> list[str]:
    """Model classes of transformers that TransformerLens says it supports."""
    return sorted(name for name in SUPPORTED_ARCHITECTURES if hasattr(transformers, name))


def causal(config: Any) -> str:
    """The class that a configuration is loaded as."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])


def refusals() -> str:
    """What is said of those that are no causal language models, from a folder that holds no weights."""
    named = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    said: dict[str, list[str]] = {}
    for name in known_to_both():
        if name not in named:
            said.setdefault(refusal(name).replace(name, "NAME"), []).append(name)
    return "\n\n".join(f"- *{sentence}*: {', '.join(names)}" for sentence, names in said.items())


def refusal(name: str) -> str:
    """The sentence about a folder with the configuration of such a model alone."""
    config = getattr(transformers, name).config_class()
    config.architectures = [name]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            load(folder)
        except UserError as error:
            return str(error).replace(folder, "it").replace("|", "/")
    return "WRONG: loaded"


def row(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """The cells of one architecture, by column; "refused" alone, with the sentence, where it can't be loaded."""
    try:
        hf_model = in_type(tiny_hf(name), dtype).to(device)
    except ImportError as error:
        return {"refused": "not tried: " + " ".join(str(error).split()).partition(" but ")[0]}
    plain = copy.deepcopy(hf_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of paths that are slower: the cells say so
        try:
            model = bridge(hf_model, tiny_tokenizer(), Checkpoint(name, f"tests/{name}"))
        except UserError as error:
            return {"refused": str(error).replace("|", "/")}
        trials: dict[str, Callable[[Any, Any], str]] = {
            "collect": how_collected, "answer": answered, "steer": steered, "residuals": collected, "logits": told,
            "patched": patched, "losses": losses, "ablate everywhere": ablated, "patch, growing": grown,
            "patch, whole": whole, "in some blocks": sometimes,
        }  # fmt: skip
        return {column: said(trial, model, plain) for column, trial in trials.items()}


def in_type(hf_model: Any, dtype: torch.dtype) -> Any:
    """The model in another type as transformers loads it: rotary tables stay float32, other buffers don't."""
    if dtype == hf_model.dtype:
        return hf_model
    again = transformers.AutoModelForCausalLM.from_config(hf_model.config, dtype=dtype)
    again.load_state_dict(hf_model.state_dict())
    return again.eval()


def in_parts(name: str) -> dict[str, str]:
    """The last column: with every other block on the disk, residuals, answers and logits are the whole model's."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as temporary:
        warnings.simplefilter("ignore")
        folder = str(Path(temporary) / name)
        try:
            tiny_hf(name).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            whole, parts = load(folder), load(folder, device_map=every_other_block(tiny_hf(name)))
            gaps = [apart(collect(parts, PROMPTS).values, collect(whole, PROMPTS).values)]
            gaps.append(apart(logits_under(parts, PROMPTS, []), logits_under(whole, PROMPTS, [])))
            answers = [answer(model, PROMPTS, max_new_tokens=NEW).tokens for model in (parts, whole)]
        except (UserError, ImportError) as error:
            return {"on the disk": "no: " + " ".join(str(error).split()).replace(folder, "it").replace("|", "/")}
    return {"on the disk": judged(number(gaps), answers[0] == answers[1])}


def every_other_block(plain: Any) -> dict[str, str]:
    """A device map: all on the CPU but the first block, the third and so on."""
    names = {module: name for name, module in plain.named_modules()}
    blocks = [names[block] for block in blocks_of(plain)]
    weights = [name for name, _ in (*plain.named_parameters(), *plain.named_buffers())]
    rest = {name.rpartition(".")[0] for name in weights if not name.startswith(tuple(f"{one}." for one in blocks))}
    return dict.fromkeys(rest, "cpu") | {name: ("disk", "cpu")[i % 2] for i, name in enumerate(blocks)}


def said(trial: Callable[[Any, Any], str], model: Any, plain: Any) -> str:
    try:
        return trial(model, plain)
    except UserError as error:
        sentence = str(error).replace(loaded(model).checkpoint.name, "it").replace("|", "/")
        return "no: " + re.sub(r" \(up to [^)]*\)", "", sentence)  # a number of this random model's


def judged(how: str, right: bool) -> str:
    return how if right else f"{how}: WRONG"


def rounding(plain: Any) -> float:
    """What may be between two ways of computing with this model."""
    return RIGHT if plain.dtype == torch.float32 else HALF


def number(gaps: list[float], most: float = RIGHT) -> str:
    """The largest difference."""
    return judged(f"{max(gaps):.0e}" if max(gaps) else "0", max(gaps) <= most)


def close(found: Tensor, right: Tensor, plain: Any) -> bool:
    return apart(found, right) <= rounding(plain)


def rows_of(model: Any) -> list[list[int]]:
    batch = tokenize(PROMPTS, template_of(model))
    return [batch.row(i) for i in range(len(PROMPTS))]


@torch.inference_mode()
def last_logits(plain: Any, ids: list[int]) -> Tensor:
    logits: Tensor = plain(torch.tensor([ids], device=plain.device), use_cache=False).logits[0, -1]
    return logits


def is_greedy(plain: Any, ids: list[int], answer: tuple[int, ...]) -> bool:
    """Whether each token is the likeliest of a whole pass; in half precision, which knows many ties, to rounding."""
    ends = [4] if len(answer) < NEW else []  # the end of sequence is left out
    for i, token in enumerate([*answer, *ends]):
        logits = last_logits(plain, [*ids, *answer[:i]]).float()
        behind = (logits.max() - logits[token]) / logits.abs().max()
        if int(logits.argmax()) != token and (plain.dtype == torch.float32 or float(behind) > HALF):
            return False
    return True


def how_collected(model: Any, plain: Any) -> str:
    return "fast" if collect(model, PROMPTS, positions=["last"]).engine == "fast" else "whole"


def collected(model: Any, plain: Any) -> str:
    """Of the residuals at every block's input and at the last one's output."""
    acts = collect(model, PROMPTS, positions=["last"])
    seen: dict[int, Tensor] = {}
    blocks = blocks_of(plain)

    def entering(layer: int) -> Callable[..., None]:
        return lambda block, args, kwargs: seen.__setitem__(layer, args[0] if args else kwargs["hidden_states"])

    def leaving(block: Any, args: Any, output: Any) -> None:
        seen[len(blocks)] = output if isinstance(output, Tensor) else output[0]

    handles = [block.register_forward_pre_hook(entering(i), with_kwargs=True) for i, block in enumerate(blocks)]
    handles.append(blocks[-1].register_forward_hook(leaving))
    gaps = []
    for i, ids in enumerate(rows_of(model)):
        last_logits(plain, ids)
        gaps += [apart(acts.values[i, level, 0], seen[level][0, -1]) for level in seen]
    for handle in handles:
        handle.remove()
    return number(gaps, rounding(plain))


def told(model: Any, plain: Any) -> str:
    """Of the logits of the first answer token, as every sweep computes them."""
    logits = logits_under(model, PROMPTS, [])
    return number([apart(logits[i], last_logits(plain, ids)) for i, ids in enumerate(rows_of(model))], rounding(plain))


def patched(model: Any, plain: Any) -> str:
    """Of the logits after a vector was put at the input of a block, at a token in the prompt's middle."""
    ids, layer, place = rows_of(model)[1], n_layers(model) - 1, 9
    reference_record(model, ids, -1, "resid_pre", [layer])  # says so where there is none
    edit = Edit(layer, place, direction(model).vector)
    if can_grow(model, "resid_pre"):
        got = edited_logits(
            model, record(model, ids, len(ids) - 1, "resid_pre", ()), "resid_pre", [edit], len(ids) - 1
        )[1]
    else:
        got = reference_edited_logits(model, ids, "resid_pre", edit, len(ids) - 1)

    def put(block: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        x[:, place] = edit.value.to(x)

    handle = blocks_of(plain)[layer].register_forward_pre_hook(put, with_kwargs=True)
    gaps = [apart(got, last_logits(plain, ids))]
    handle.remove()
    return number(gaps, rounding(plain))


def answered(model: Any, plain: Any) -> str:
    got = answer(model, PROMPTS, max_new_tokens=NEW)
    right = all(is_greedy(plain, ids, tokens) for ids, tokens in zip(rows_of(model), got.tokens, strict=True))
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
            return (args[0] + one.vector.to(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": (x := kwargs["hidden_states"]) + one.vector.to(x)}

    handle = blocks_of(plain)[1].register_forward_pre_hook(shifted, with_kwargs=True)
    right = all(close(logits[i], last_logits(plain, ids), plain) for i, ids in enumerate(rows_of(model)))
    handle.remove()
    return judged("fast" if got.engine == "fast" else "whole", right)


@torch.inference_mode()
def losses(model: Any, plain: Any) -> str:
    ids = torch.tensor([tiny_tokenizer()("the thing is that")["input_ids"]], device=plain.device)
    right = torch.nn.functional.cross_entropy(plain(ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:])
    return judged("yes", close(text_loss(model, ["the thing is that"])[0].float(), right, plain))


def ablated(model: Any, plain: Any) -> str:
    one = direction(model)
    unit = one.vector / one.vector.norm()
    levels = tuple(range(1, n_layers(model) + 1))
    with applied(model, [Ablate(one, layers=ALL, positions=ALL, phase="both", sites=EVERYWHERE)]):
        values = collect(model, PROMPTS, levels=levels).values
    return judged("yes", float((values @ unit).abs().max()) < rounding(plain) * float(values.norm(dim=-1).max()))


def in_blocks(model: Any) -> dict[str, list[bool]]:
    """Whether each block has a site."""
    points = model.hook_dict
    return {site: [site_hook(site, layer) in points for layer in range(n_layers(model))] for site in SITES}


def patchable(model: Any) -> list[str]:
    """Sites of every block whose heads are told apart and where an edit changes something."""
    every = [site for site, has in in_blocks(model).items() if all(has)]
    return [site for site in every if is_laid_out(model, site, 0) and bears_edits(model, site, 0)]


def sites(found: list[str]) -> str:
    """Their names, or those of the few that are missing."""
    missing = [site for site in SITES if site not in found]
    if len(missing) > len(SITES) // 2:
        return ", ".join(found)
    return "all but " + ", ".join(missing) if missing else "all"


def grown(model: Any, plain: Any) -> str:
    return sites([site for site in patchable(model) if can_grow(model, site)])


def whole(model: Any, plain: Any) -> str:
    return sites([site for site in patchable(model) if not can_grow(model, site)])


def sometimes(model: Any, plain: Any) -> str:
    return sites([site for site, has in in_blocks(model).items() if any(has) and not all(has)])


if __name__ == "__main__":
    main()
