"""Many checkpoints in one module: the base is loaded once, and each checkpoint's weights take their turn in it.

The base's own weights lie in an unnamed file, from which every matrix that a checkpoint changes is made anew:
W = round(W0 + change). So nothing drifts, the base comes back bit for bit, and memory holds one model and one
checkpoint, and two models only for a full checkpoint or an adapter that is more than low-rank products, which peft
merges. A killed process leaves no file behind.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mechlens.errors import UserError
from mechlens.files import short_name, user_path
from mechlens.models.bridge import LanguageModel, bridge, dtype_of, loaded, weights_now
from mechlens.models.checkpoint import Checkpoint, sampled_fingerprint, weight_fingerprint
from mechlens.models.checkpoints.lora import LowRank, read_lora
from mechlens.models.checkpoints.random_blocks import randomise_blocks
from mechlens.models.checkpoints.series import Member
from mechlens.models.checkpoints.weight_store import WeightStore, unnamed_file
from mechlens.models.device_map import DeviceMap, require_in_memory, require_one_place
from mechlens.models.engine.probes import require_finite_weights
from mechlens.models.load import (
    load_hf,
    load_merged,
    moved,
    own_type,
    require_wrappable,
    stored_quantised,
    type_without_loss,
)
from mechlens.models.native import native, native_blocks, refresh_splits, writing_modules
from mechlens.models.precision import chosen_device, round_weights
from mechlens.models.quantise import RUNS_ON

NOT_SCALABLE = "no LoRA adapter of plain products, which alone can be scaled; leave it out, or the scales"


def checkpoint_swapper(
    base: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = "auto",
    device_map: DeviceMap | None = None,
    chat_template: str | None = None,
) -> "CheckpointSwapper":
    """A model in which the checkpoints of a series take turns; `base` is anything that `load` takes.

    To be used in a `with` block, or closed. `dtype` and `device` are as in `load`: changes are added in float32 and
    rounded then. `chat_template` is that of a series whose checkpoints bring their own. UserError for a `device_map`
    that off-loads: what is written into weights on a disk wouldn't last.

    >>> with ml.checkpoint_swapper("smollm2") as one:
    ...     acts = ml.collect(one.model, ml.builtin_prompts("harmful")[:4])
    >>> acts.checkpoint.name
    'smollm2'
    """
    require_one_place(device, device_map)
    place = None if device_map is not None else chosen_device(device)
    require_wrappable(base, revision=revision)
    if found := dtype if dtype in RUNS_ON else stored_quantised(base, revision=revision):
        raise UserError(
            f"the checkpoints of a series are written into one model in turn, and {found} weights can't be; give "
            "--dtype bfloat16, and a base that isn't quantised"
        )
    dtype = own_type(base, revision=revision) if dtype == "auto" else dtype
    first = type_without_loss(base, dtype, revision=revision)
    hf_model, tokenizer = load_hf(base, revision=revision, dtype=first, device_map=device_map)
    require_in_memory(hf_model, "checkpoints can't take turns in it")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    store = WeightStore(unnamed_file(hf_model))
    shared = set()
    for known, *others in _names_of_each(hf_model):
        store.put(known, hf_model.get_parameter(known))
        for name in others:
            store.alias(name, known)
            shared |= {known, name}
    state = hf_model.state_dict()
    full = weight_fingerprint(state), sampled_fingerprint(state)
    if first != dtype:
        round_weights(hf_model, getattr(torch, dtype))
    hf_model = hf_model if place is None else moved(hf_model, place)
    state = hf_model.state_dict()
    own = Checkpoint(
        short_name(base), base, revision, step=0, fingerprint=weight_fingerprint(state),
        sampled=sampled_fingerprint(state),
    )  # fmt: skip
    names = frozenset(state)  # bridging adds to them
    return CheckpointSwapper(bridge(hf_model, tokenizer, own), store, own, full, names, frozenset(shared))


class CheckpointSwapper:
    """One bridged model whose weights are, at any time, those of the member that was `put` last."""

    def __init__(
        self,
        model: LanguageModel,
        store: WeightStore,
        base: Checkpoint,
        fingerprints: tuple[str, str],
        names: frozenset[str],
        shared: frozenset[str],
    ) -> None:
        self.model = model
        self.base = base
        self.base_fingerprint = fingerprints[0]
        """Of the base's weights before they were rounded, by which an adapter knows it."""
        self._fingerprints = fingerprints
        self._vault = store
        self._names = names
        self._shared = shared
        """Names of matrices that two modules of the base share, such as tied ends."""
        self._changed: set[str] = set()

    def __enter__(self) -> "CheckpointSwapper":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets the base's weights on disk go; the model keeps the weights it has."""
        self._vault.close()

    def put(self, member: Member, *, scale: float = 1.0) -> LanguageModel:
        """The model with this member's weights, and its name in `model.mechlens`.

        Equal, bit for bit, to loading the base and merging the adapter, or to loading the full checkpoint. `scale`
        multiplies what a LoRA adapter adds: 0 is the base, 1 the checkpoint. UserError for a checkpoint that can't be
        read, doesn't fit or can't be scaled; the base's weights are then in place.
        """
        try:
            if member.kind == "base":
                self._write({})
            elif member.kind == "adapter" and (changes := self.changes(member)) is not None:
                scaled = {name: replace(change, scale=scale * change.scale) for name, change in changes.items()}
                self._write({f"{name}.weight": change for name, change in scaled.items()})
            elif scale != 1:
                raise UserError(f"{member.path!r} is {NOT_SCALABLE}")
            else:
                self._replace(self._loaded(member), member)
            with native(self.model) as hf_model:
                require_finite_weights(hf_model, member.path)
        except UserError:
            self._write({})
            self._name(self.base)
            raise
        name = member.name if scale == 1 else f"{member.name}, scaled by {scale:g}"
        self._name(_checkpoint(replace(member, name=name), self.base))
        return self.model

    def added(self, member: Member) -> dict[str, Tensor]:
        """What a checkpoint adds to each parameter that it changes, in float32 on the CPU; the base is then in place.

        Of an adapter that isn't plain products, such as DoRA, it's the difference that it makes when merged. UserError
        for one that changes a matrix which two modules share.
        """
        low_rank = self.changes(member) if member.kind == "adapter" else None
        with native(self.model) as hf_model:
            if low_rank is not None:
                return {f"{name}.weight": _change(hf_model, f"{name}.weight", one) for name, one in low_rank.items()}
        self.put(member)
        with native(self.model) as hf_model:
            now = dict(hf_model.named_parameters(remove_duplicate=False))
            found = {name: own.detach().cpu().float() - self._vault.get(name).float() for name, own in now.items()}
        self.put(replace(member, kind="base"))
        found = {name: change for name, change in found.items() if bool(change.any())}
        if shared := sorted(self._shared & set(found)):
            raise UserError(
                f"{member.path!r} changes {shared[0]}, which two modules of {self.base.name} share, so it can't be "
                "mixed with others; leave it out"
            )
        return found

    def put_sum(self, changes: Mapping[str, Tensor], name: str) -> LanguageModel:
        """The base plus these changes of its parameters, under a name of its own; the next `put` ends it."""
        self._write(dict(changes))
        with native(self.model) as hf_model:
            require_finite_weights(hf_model, name)
        self._name(Checkpoint(name, self.base.path, self.base.revision, base=self.base.name))
        return self.model

    def put_random_blocks(self, seed: int) -> LanguageModel:
        """The base with its blocks drawn anew, embeddings kept (see `randomise_blocks`); the next `put` ends it.

        UserError where they can't be; the base's weights are then in place.
        """
        self._write({})
        with native(self.model) as hf_model:
            blocks = native_blocks(self.model)
            inside = {id(parameter) for block in blocks for parameter in block.parameters()}
            named = hf_model.named_parameters(remove_duplicate=False)
            self._changed = {name for name, parameter in named if id(parameter) in inside}
            try:
                randomise_blocks(hf_model, blocks, seed)
            except UserError:
                self._write({})
                raise
        refresh_splits(self.model)
        self._name(Checkpoint(f"random blocks {seed}", self.base.path, self.base.revision, base=self.base.name))
        return self.model

    def changes(self, member: Member) -> dict[str, LowRank] | None:
        """What an adapter adds to each module's weight; UserError where a module is missing or has another shape.

        It doesn't take the adapter's turn, so that what is broken can be said before any work.

        None for an adapter that is more than low-rank products on matrices of their own.
        """
        if member.base_fingerprint is not None and member.base_fingerprint not in self._fingerprints:
            raise UserError(
                f"the adapter {member.path!r} was trained on another base (fingerprint {member.base_fingerprint[:12]})"
                f"; give the base that its mechlens.json names, not {self.base.name!r}"
            )
        found = read_lora(user_path(member.path))
        if found is None or any(f"{name}.weight" in self._shared for name in found):
            return None
        with native(self.model) as hf_model:
            for name, change in found.items():
                self._require_fits(hf_model, name, change, member)
        return found

    def difference(self, module: str) -> Float[Tensor, "output input"]:
        """How a module's weight differs from the base's now, in float32 on the CPU."""
        with native(self.model) as hf_model:
            linear = hf_model.get_submodule(module)
            change = linear.get_parameter("weight").detach().cpu().float() - self._vault.get(f"{module}.weight").float()
        return change.T if isinstance(linear, Conv1D) else change

    def linears(self) -> dict[str, bool]:
        """Names of the linear layers inside the blocks, and whether each writes to the residual stream."""
        writers = {id(module) for module in writing_modules(self.model)}
        with native(self.model) as hf_model:
            inside = {id(module) for block in native_blocks(self.model) for module in block.modules()}
            named = [(name, module) for name, module in hf_model.named_modules() if id(module) in inside]
        return {name: id(module) in writers for name, module in named if isinstance(module, nn.Linear | Conv1D)}

    def _require_fits(self, hf_model: Any, name: str, change: LowRank, member: Member) -> None:
        if not all(bool(side.isfinite().all()) for side in (change.up, change.down)):
            raise UserError(
                f"what {member.path!r} adds to {name} holds NaN or infinity, so nothing that it computes means "
                "anything; take an earlier checkpoint or save it again"
            )
        try:
            module = hf_model.get_submodule(name)
        except AttributeError as error:
            raise UserError(f"{member.path!r} changes {name}, which {self.base.name} doesn't have") from error
        weight = getattr(module, "weight", None)
        there = () if weight is None else tuple(weight.T.shape if isinstance(module, Conv1D) else weight.shape)
        if there != (change.up.shape[0], change.down.shape[1]):
            raise UserError(
                f"{member.path!r} changes {name} of shape {change.up.shape[0], change.down.shape[1]}, and in "
                f"{self.base.name} it has shape {there}; the two are of different architectures"
            )

    @torch.no_grad()
    def _write(self, changes: Mapping[str, LowRank | Tensor]) -> None:
        """The base's weights with these changes; whatever the last member changed is the base's again."""
        with native(self.model) as hf_model:
            for name in sorted(self._changed | set(changes)):
                value = self._vault.get(name)
                if name in changes:
                    value = value.float() + _change(hf_model, name, changes[name])
                hf_model.get_parameter(name).copy_(value)
        self._changed = set(changes)
        refresh_splits(self.model)

    def _loaded(self, member: Member) -> Any:
        """The member as a plain model of its own, which is let go again."""
        dtype = str(dtype_of(self.model)).removeprefix("torch.")
        if member.kind == "adapter":
            return load_merged(self.base.path, member.path, revision=self.base.revision, dtype=dtype)[0]
        return load_hf(member.path, revision=member.revision, dtype=dtype)[0]

    @torch.no_grad()
    def _replace(self, other: Any, member: Member) -> None:
        """Every parameter from another model."""
        found = dict(other.named_parameters(remove_duplicate=False))
        with native(self.model) as hf_model:
            own = dict(hf_model.named_parameters(remove_duplicate=False))
            shapes = {name: tuple(p.shape) for name, p in own.items()}, {n: tuple(p.shape) for n, p in found.items()}
            if shapes[0] != shapes[1]:
                odd = min(name for name in {**own, **found} if shapes[0].get(name) != shapes[1].get(name))
                raise UserError(
                    f"{member.path!r} and {self.base.name} differ at {odd} ({shapes[1].get(odd, 'absent')} and "
                    f"{shapes[0].get(odd, 'absent')}); a series has one architecture"
                )
            self._changed = set(own)
            for name in own:
                if any(own[name] is own[tied] and found[name] is not found[tied] for tied in self._shared - {name}):
                    parent, _, last = name.rpartition(".")
                    own[name] = nn.Parameter(own[name].detach().clone(), requires_grad=False)
                    setattr(hf_model.get_submodule(parent), last, own[name])
                own[name].copy_(found[name])
        refresh_splits(self.model)

    def _name(self, checkpoint: Checkpoint) -> None:
        with native(self.model) as hf_model:
            state = hf_model.state_dict()
        own = {name: state[name] for name in self._names}
        self.model.mechlens = replace(
            loaded(self.model),
            checkpoint=replace(
                checkpoint,
                fingerprint=weight_fingerprint(own),
                sampled=sampled_fingerprint(own),
                config=loaded(self.model).checkpoint.config,
                dtype=loaded(self.model).checkpoint.dtype,
            ),
            weights=weights_now(self.model),
        )


def _change(hf_model: Any, name: str, change: LowRank | Tensor) -> Tensor:
    """As it is added to the parameter, which a Conv1D keeps turned."""
    if isinstance(change, Tensor):
        return change
    turned = isinstance(hf_model.get_submodule(name.rpartition(".")[0]), Conv1D)
    return change.product().T if turned else change.product()


def _names_of_each(hf_model: nn.Module) -> list[list[str]]:
    """The names of every parameter: more than one where modules share it."""
    names: dict[int, list[str]] = {}
    for name, parameter in hf_model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _checkpoint(member: Member, base: Checkpoint) -> Checkpoint:
    if member.kind == "base":
        return base
    if member.kind == "adapter":
        return Checkpoint(member.name, base.path, base.revision, member.path, base=base.name, step=member.step)
    return Checkpoint(member.name, member.path, member.revision, base=base.name, step=member.step)
