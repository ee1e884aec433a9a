"""Changes of the residual stream while a model runs: which vector, where, and at which tokens of which row.

Every row of a batch may carry changes of its own, and the `TokenMask` says which tokens a forward pass holds.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mechlens.models.bridge import LanguageModel, device_of, is_bridge, n_layers
from mechlens.models.engine.intervene.gates import Decisions, Gate
from mechlens.models.engine.intervene.token_mask import TokenMask
from mechlens.models.native import native, plain_module
from mechlens.models.sites import Place, level_place, place_hooks

_Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AddAlong:
    """x becomes x + (amount - <x, unit> if it erases) unit."""

    unit: Float[Tensor, " d_model"]
    amount: float
    erases: bool


@dataclass(frozen=True)
class SetVector:
    """x becomes the given vector."""

    values: Float[Tensor, "token d_model"]
    """In the order of the change's tokens."""


@dataclass(frozen=True)
class Change:
    """One change of one row, at every one of its sites and layers."""

    what: AddAlong | SetVector
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: tuple[int, ...] | None
    """Indices in the row's prompt without padding; None is every token of the prompt."""
    generation: bool
    """Whether answer tokens are changed too."""
    answer_tokens: int | None = None
    """Of those only the first so many; None is all."""
    gate: Gate | None = None
    """How much of it happens, decided while the prompt runs; None is all of it."""


@contextlib.contextmanager
def changed(
    model: LanguageModel, rows: Sequence[Sequence[Change]], token_mask: TokenMask, *, fast: bool
) -> Iterator[None]:
    """The model under the changes of each row, in the rows' order; no hook is left, also after an exception.

    `fast` puts the plain Hugging Face modules in place (see `native`) and acts on those; otherwise the changes
    act at TransformerLens' hook points, which a HookedTransformer has too.
    """
    decisions = Decisions([[one.gate for one in changes if one.gate is not None] for changes in rows])
    steps = _steps(rows, token_mask, device_of(model), decisions)
    reads: dict[Place, int] = {level_place(n_layers(model), level): level for level in decisions.levels}
    plan = {
        place: _through(steps.get(place, []), token_mask, decisions, reads.get(place)) for place in {**reads, **steps}
    }
    hooks = place_hooks(model, plan)
    modules = _modules(model, hooks) if fast else {}  # before `native` hides TransformerLens' components
    with contextlib.ExitStack() as stack:
        if fast:
            stack.enter_context(native(model))
            for place in hooks:
                stack.callback(_attach(modules[place], plan[place], before=place[0] == "resid_pre").remove)
        else:
            # By TransformerLens' own hooks: where residuals are scaled it looks for those only.
            stack.enter_context(model.hooks(fwd_hooks=[(name, _pointed(plan[place])) for place, name in hooks.items()]))
        yield


def bears_fast(model: LanguageModel, places: Sequence[Place]) -> bool:
    """True where every place is the input or output of one plain module, so that `changed(fast=True)` reaches it."""
    if not is_bridge(model):
        return False
    hooks = place_hooks(model, places)
    return len(_modules(model, hooks)) == len(hooks)


def _through(steps: list["_Step"], token_mask: TokenMask, decisions: Decisions, level: int | None) -> _Edit:
    """All steps of one place, one after the other, once gates have read what came there."""

    def edit(hidden: Tensor) -> Tensor:
        x = token_mask.laid_out(hidden)
        if level is not None:
            decisions.look(level, x, token_mask)
        for step in steps:
            x = step(x, token_mask)
        return x.reshape(hidden.shape)

    return edit


def _attach(module: nn.Module, edit: _Edit, *, before: bool) -> Any:
    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    def leaving(module: nn.Module, args: object, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    if before:
        return module.register_forward_pre_hook(entering, with_kwargs=True)
    return module.register_forward_hook(leaving)


def _pointed(edit: _Edit) -> Callable[..., Tensor]:
    def at_point(value: Tensor, hook: Any) -> Tensor:
        return edit(value)

    return at_point


def _modules(model: LanguageModel, hooks: Mapping[Place, str]) -> dict[Place, nn.Module]:
    """The plain modules whose input or output a hook point sees; a scaled residual is neither, so it is left out."""
    points = model.hook_dict
    wanted = {points[name]: place for place, name in hooks.items()}
    found: dict[Place, nn.Module] = {}
    for block in (model.blocks[layer] for layer in sorted({layer for _, layer in hooks})):
        for component in block.modules():
            for end in ("hook_in", "hook_out"):
                point = component._modules.get(end)
                place = None if point is None else wanted.get(point)
                if place is not None and (place[0] == "resid_pre") == (end == "hook_in"):
                    found[place] = plain_module(component)
    return found


_Step = Callable[[Tensor, TokenMask], Tensor]


def _steps(
    rows: Sequence[Sequence[Change]], token_mask: TokenMask, device: torch.device, decisions: Decisions
) -> dict[Place, list[_Step]]:
    """At every place the first change of each row, then the second of each row, and so on."""
    order: dict[Place, list[dict[int, Change]]] = {}
    for row, changes in enumerate(rows):
        taken: dict[Place, int] = {}
        for change in changes:
            for place in ((site, layer) for site in change.sites for layer in change.layers):
                turn = taken[place] = taken.get(place, 0) + 1
                steps = order.setdefault(place, [])
                if len(steps) < turn:
                    steps.append({})
                steps[turn - 1][row] = change
    tables = _Tables(token_mask.lengths.tolist(), device)
    known: dict[tuple[tuple[int, int], ...], list[_Step]] = {}  # a change at many layers is made ready once
    found: dict[Place, list[_Step]] = {}
    for place, steps in order.items():
        found[place] = []
        for step in steps:
            key = tuple((row, id(change)) for row, change in step.items())
            if key not in known:
                known[key] = _made(step, tables, decisions)
            found[place] += known[key]
    return found


def _made(step: dict[int, Change], tables: "_Tables", decisions: Decisions) -> list[_Step]:
    along = {row: change for row, change in step.items() if isinstance(change.what, AddAlong)}
    put = {row: change for row, change in step.items() if isinstance(change.what, SetVector)}
    return ([_moving(along, tables, decisions)] if along else []) + ([_putting(put, tables, decisions)] if put else [])


class _Tables:
    """Which tokens of each row a step touches, made once for all layers with the same tokens."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths, self.device = lengths, device
        self.made: dict[tuple[tuple[int, tuple[int, ...] | None, bool, int | None], ...], Tensor] = {}

    def of(self, step: dict[int, Change]) -> Bool[Tensor, "row token"]:
        key = tuple((row, one.tokens, one.generation, one.answer_tokens) for row, one in step.items())
        if key not in self.made:
            counted = max(first or 0 for *_, first in key)
            table = torch.zeros(len(self.lengths), max(self.lengths) + counted + 1, dtype=torch.bool)
            for row, tokens, generation, first in key:
                length = self.lengths[row]
                table[row, :length] = tokens is None
                table[row, list(tokens or ())] = True
                table[row, length : None if first is None else length + first] = generation
            self.made[key] = table
        return self.made[key]


def _moving(step: dict[int, Change], tables: _Tables, decisions: Decisions) -> _Step:
    whats = {row: change.what for row, change in step.items() if isinstance(change.what, AddAlong)}
    table, device = tables.of(step), tables.device
    distinct = {id(what.unit): what.unit for what in whats.values()}
    number = {key: i for i, key in enumerate(distinct)}
    units = torch.stack(list(distinct.values())).to(device)
    every = [whats.get(row) for row in range(len(tables.lengths))]
    which = torch.tensor([number[id(what.unit)] if what else 0 for what in every], device=device)
    amount = torch.tensor([what.amount if what else 0.0 for what in every], device=device)
    erases = torch.tensor([what is not None and what.erases for what in every], device=device)
    any_erases = any(what is not None and what.erases for what in every)
    gates = [step[row].gate if row in step else None for row in range(len(every))]
    is_gated = any(gate is not None for gate in gates)

    def move(x: Tensor, token_mask: TokenMask) -> Tensor:
        touched = token_mask.touched(table, x.shape[1], x.device)
        if touched is False:
            return x
        rows = token_mask.rows_on(device)
        # At least float32: in bfloat16 the component that was removed would come back with the rounding.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        unit = units[which[rows]].to(wide).unsqueeze(1)
        shift = amount[rows].to(wide).unsqueeze(1)
        if any_erases:
            shift = shift - erases[rows].to(wide).unsqueeze(1) * (wide * unit).sum(dim=-1)
        if isinstance(touched, Tensor):
            shift = torch.where(touched, shift, 0.0)
        if not is_gated:
            return wide.addcmul(shift.unsqueeze(-1), unit).to(x.dtype)
        own = token_mask.rows.tolist()
        acts = touched.any(dim=1).tolist() if isinstance(touched, Tensor) else [True] * len(own)
        # A row that nothing is done to in this pass may not be decided yet.
        given = [gates[row] if acting else None for row, acting in zip(own, acts, strict=True)]
        share = decisions.shares(own, given, x.device) * torch.tensor(acts, device=x.device)
        share = share.to(wide)[:, None, None]
        # Not x + 0: what a gate leaves alone stays as it is to the bit.
        return torch.where(share == 0, x, wide.addcmul(share * shift.unsqueeze(-1), unit).to(x.dtype))

    return move


def _putting(step: dict[int, Change], tables: _Tables, decisions: Decisions) -> _Step:
    row = torch.tensor([r for r, c in step.items() for _ in c.tokens or ()])
    token = torch.tensor([t for c in step.values() for t in c.tokens or ()])
    values = torch.cat([c.what.values for c in step.values() if isinstance(c.what, SetVector)]).to(tables.device)
    is_gated = any(change.gate is not None for change in step.values())

    def put(x: Tensor, token_mask: TokenMask) -> Tensor:
        slot = torch.full((len(tables.lengths),), -1)
        slot[token_mask.rows] = torch.arange(len(token_mask.rows))
        place = slot[row]
        column = token - token_mask.start[place]
        here = ((place >= 0) & (column >= 0) & (column < x.shape[1])).nonzero().squeeze(1)
        if is_gated:
            rows = row[here].tolist()
            here = here[decisions.shares(rows, [step[one].gate for one in rows], here.device) > 0]
        if not len(here):
            return x
        out = x.clone()
        out[place[here].to(x.device), column[here].to(x.device)] = values[here.to(values.device)].to(x)
        return out

    return put
