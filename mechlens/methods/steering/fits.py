"""Whether interventions fit a model: its layers, its width, its weights and the chat template of the prompts."""

from collections.abc import Iterator, Sequence

from mechlens.errors import UserError, an
from mechlens.methods.directions.direction import Direction
from mechlens.methods.steering.interventions import ALL, Ablate, Act, Add, Gated, Intervention, Replace
from mechlens.models.bridge import LanguageModel, checkpoint_now, d_model, n_layers
from mechlens.models.checkpoint import Checkpoint
from mechlens.models.checkpoints.difference import other_width, require_same_template, require_same_weights
from mechlens.models.sites import Place, place_hooks, require_seen


def require_interventions(given: object) -> None:
    """UserError for what is no list of interventions, such as a direction alone."""
    if isinstance(given, Direction):
        raise UserError("interventions is a Direction; say what is done with it, such as [ml.Ablate(direction)]")
    if not isinstance(given, Sequence) or isinstance(given, str):
        kind = an(type(given).__name__)
        raise UserError(f"interventions is {kind}; give a list of ml.Add, ml.Ablate, ml.Replace or ml.When: [{kind}]")


def changes_nothing(one: Intervention) -> bool:
    """True for an addition of strength 0, under whatever condition."""
    return all(isinstance(act, Add) and act.strength == 0 for act in acts_of(one))


def acts_of(one: Intervention) -> tuple[Act, ...]:
    """What may happen: the intervention itself, or what its gate lets happen."""
    return (one,) if isinstance(one, Act) else tuple(act for act, _ in one.acts)


def require_fits(
    model: LanguageModel, interventions: Sequence[Intervention], template: str | None, *, force: bool
) -> None:
    """UserError where interventions have no place in this model, or (unless forced) were made for another.

    Made for another: under other weights, another weight regime, or another chat template than the prompts'.
    """
    last, width = n_layers(model) - 1, d_model(model)
    now = checkpoint_now(model)
    given = list({id(intervention): intervention for intervention in interventions}.values())
    distinct = [act for one in given for act in acts_of(one)]
    for gated in given:
        if not isinstance(gated, Act):
            _require_gate(model, gated, template, force)
    for one in distinct:
        wrong = [layer for layer in (() if one.layers == ALL else one.layers) if not 0 <= layer <= last]
        if wrong:
            level = f"; the last level is layer {last} with site='resid_post'" if wrong[0] == last + 1 else ""
            raise UserError(f"there is no layer {wrong[0]} to intervene at, only 0 to {last}{level}")
        vector = one.values if isinstance(one, Replace) else one.direction.vector
        if vector.shape[-1] != width:
            made = one.checkpoint if isinstance(one, Replace) else one.direction.checkpoint
            raise other_width("the intervention's vector", vector.shape[-1], made, width, now)
        if not force:
            _require_made_here(one, now, template)
    place_hooks(model, {place for one in distinct for place in _places(one, last + 1)})
    if any(isinstance(one, Ablate) and {"attn_out", "mlp_out"} <= set(one.sites) for one in distinct):
        require_seen(model)


def _require_gate(model: LanguageModel, one: Gated, template: str | None, force: bool) -> None:
    """UserError for what decides by another width, or (unless forced) was made for another model or template."""
    now, width = checkpoint_now(model), d_model(model)
    for what, own, made, its_template in one.made:
        if own != width:
            raise other_width(what, own, made, width, now)
        if not force:
            require_same_weights(what, made, now, ANEW)
            if template is not None:
                require_same_template(what, its_template, template, ANEW)
    read, top = max(level for level, _ in one.places), n_layers(model)
    if not 0 <= read <= top:
        raise UserError(f"what decides reads level {read}, and the model's levels are 0 to {top}; read one of them")
    # What is done to answers alone comes after the whole prompt was read.
    in_prompt = [act for act, _ in one.acts if act.phase != "generation"]
    first = min((min(act.layers) if act.layers != ALL else 0 for act in in_prompt), default=read)
    if read > first:
        raise UserError(
            f"what decides reads level {read}, and what it decides on begins at layer {first}; read at a lower level, "
            f"or act from layer {read} on"
        )


def _places(one: Act, n_layers: int) -> Iterator[Place]:
    sites = one.sites if isinstance(one, Ablate) else (one.site,)
    layers = range(n_layers) if one.layers == ALL else one.layers
    return ((site, layer) for site in sites for layer in layers)


def require_direction(model: LanguageModel, direction: Direction, *, force: bool) -> None:
    """UserError where a direction has another width than the model or (unless forced) comes from other weights."""
    if len(direction.vector) != d_model(model):
        now = checkpoint_now(model)
        raise other_width("the direction", len(direction.vector), direction.checkpoint, d_model(model), now)
    if not force:
        require_same_weights("direction", direction.checkpoint, checkpoint_now(model), ANEW)


ANEW = "make it anew, or pass --force (force=True in Python)"
"""What can be done with an intervention that doesn't fit."""


def _require_made_here(one: Act, now: Checkpoint, template: str | None) -> None:
    given = {"vectors to put": one} if isinstance(one, Replace) else {"direction": one.direction}
    for what, made in (*given.items(), ("residual norms", getattr(one, "norms", None))):
        if made is None:
            continue
        require_same_weights(what, made.checkpoint, now, ANEW)
        if template is not None:
            require_same_template(what, made.template, template, ANEW)
