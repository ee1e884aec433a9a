"""Changes of the residual stream while a model runs: which vector, where, and at which tokens of which row.

Every row of a batch may carry changes of its own, and the `TokenMask` says which tokens a forward pass holds.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechlens.errors import UserError
from mechlens.models.bridge import LanguageModel, device_of, is_bridge
from mechlens.models.native import native, plain_module
from mechlens.models.sites import Place, place_hooks


class TokenMask:
    """Which tokens the running pass holds: a runner says so before each pass, and nobody guesses it from a shape.

    So prompt and answer are told apart alike with a key/value cache, where a pass holds the prompt or one token, and
    without one, where it holds everything so far. It is all kept on the CPU, where it can be looked at without waiting
    for a GPU.
    """

    def __init__(self, lengths: Int[Tensor, " row"], starts: Int[Tensor, " row"]) -> None:
        self.lengths = lengths
        self.rows = torch.arange(len(lengths))
        self._placed: dict[torch.device, Tensor] = {}
        self._sent: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self.advance(self.rows, starts, 0)

    def advance(self, rows: Int[Tensor, " running"], start: Int[Tensor, " running"], generated: int) -> None:
        """The next pass has these rows; its first column is token `start` of each; `generated` answer tokens are in."""
        if not torch.equal(rows, self.rows):
            self._placed = {}
        self.rows, self.start = rows, start
        self.end = self.lengths[rows] + generated
        self._touched: dict[tuple[int, int, torch.device], Tensor | bool] = {}

    def rows_on(self, device: torch.device) -> Int[Tensor, " running"]:
        """The rows of the running pass, on a device."""
        if device not in self._placed:
            self._placed[device] = self.rows.to(device)
        return self._placed[device]

    def touched(
        self, table: Bool[Tensor, "row token"], width: int, device: torch.device
    ) -> Bool[Tensor, "running seq"] | bool:
        """Where a change acts in this pass: everywhere, nowhere, or at the tokens marked.

        The last column of `table` is all later tokens.
        """
        key = (id(table), width, device)
        if key not in self._touched:
            index = self.start.unsqueeze(1) + torch.arange(width)
            inside = (index >= 0) & (index < self.end.unsqueeze(1))
            found = table[self.rows].gather(1, index.clamp(0, table.shape[1] - 1)) & inside
            self._touched[key] = bool(found.any()) if found.all() or not found.any() else self._on(found, table, device)
        return self._touched[key]

    def _on(self, found: Tensor, table: Tensor, device: torch.device) -> Tensor:
        """Sent to a device unless it is what the last pass had there, as from one answer token to the next."""
        last = self._sent.get((id(table), device))
        if last is None or not torch.equal(last[0], found):
            last = self._sent[id(table), device] = found, found.to(device)
        return last[1]

    def laid_out(self, hidden: Tensor) -> Float[Tensor, "running seq d_model"]:
        """The site's value by row and column: some architectures flatten the two."""
        x = hidden if hidden.ndim == 3 else hidden.reshape(len(self.rows), -1, hidden.shape[-1])
        if len(x) != len(self.rows):
            raise UserError(
                f"the interventions were placed in a batch of {len(self.rows)} prompts and the model was run on "
                f"{len(x)}; run it on that batch, or use answer_under and logits_under"
            )
        return x


class EveryToken(TokenMask):
    """For changes that act on every token of every row, whatever is run."""

    def __init__(self) -> None:
        super().__init__(torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))

    def touched(self, table: Bool[Tensor, "row token"], width: int, device: torch.device) -> bool:
        return True

    def laid_out(self, hidden: Tensor) -> Float[Tensor, "running seq d_model"]:
        return hidden if hidden.ndim == 3 else hidden.unsqueeze(0)


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


@contextlib.contextmanager
def changed(
    model: LanguageModel, rows: Sequence[Sequence[Change]], token_mask: TokenMask, *, fast: bool
) -> Iterator[None]:
    """The model under the changes of each row, in the rows' order; no hook is left, also after an exception.

    `fast` puts the plain Hugging Face modules in place (see `native`) and acts on those; otherwise the changes
    act at TransformerLens' hook points, which a HookedTransformer has too.
    """
    plan = {place: _through(steps, token_mask) for place, steps in _steps(rows, token_mask, device_of(model)).items()}
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


def _through(steps: list["_Step"], token_mask: TokenMask) -> _Edit:
    """All steps of one place, one after the other."""

    def edit(hidden: Tensor) -> Tensor:
        x = token_mask.laid_out(hidden)
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


def _steps(rows: Sequence[Sequence[Change]], token_mask: TokenMask, device: torch.device) -> dict[Place, list[_Step]]:
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
                known[key] = _made(step, tables)
            found[place] += known[key]
    return found


def _made(step: dict[int, Change], tables: "_Tables") -> list[_Step]:
    along = {row: change for row, change in step.items() if isinstance(change.what, AddAlong)}
    put = {row: change for row, change in step.items() if isinstance(change.what, SetVector)}
    return ([_moving(along, tables)] if along else []) + ([_putting(put, tables)] if put else [])


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


def _moving(step: dict[int, Change], tables: _Tables) -> _Step:
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
        return wide.addcmul(shift.unsqueeze(-1), unit).to(x.dtype)

    return move


def _putting(step: dict[int, Change], tables: _Tables) -> _Step:
    row = torch.tensor([r for r, c in step.items() for _ in c.tokens or ()])
    token = torch.tensor([t for c in step.values() for t in c.tokens or ()])
    values = torch.cat([c.what.values for c in step.values() if isinstance(c.what, SetVector)]).to(tables.device)

    def put(x: Tensor, token_mask: TokenMask) -> Tensor:
        slot = torch.full((len(tables.lengths),), -1)
        slot[token_mask.rows] = torch.arange(len(token_mask.rows))
        place = slot[row]
        column = token - token_mask.start[place]
        here = ((place >= 0) & (column >= 0) & (column < x.shape[1])).nonzero().squeeze(1)
        if not len(here):
            return x
        out = x.clone()
        out[place[here].to(x.device), column[here].to(x.device)] = values[here.to(values.device)].to(x)
        return out

    return put
