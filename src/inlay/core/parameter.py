"""Sites that are bare parameters (``target_parameters``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from inlay.core.call import call_in_force
from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.core.mount import ModuleCopies
from inlay.core.nest import Nested, run_nest
from inlay.core.patterns import layer_index, matcher
from inlay.core.targets import Place
from inlay.errors import TargetError, UnsupportedError, nearest

if TYPE_CHECKING:
    from inlay.core.plan import Plan

__all__ = ["ParameterLayer", "parameter_layers", "plan_parameters"]


def parameter_layers(module: nn.Module) -> Iterator[ParameterLayer]:
    """Iterate over the nest of adapted parameters that stands at a module's place, the outermost first."""
    while isinstance(module, ParameterLayer):
        yield module
        module = module.base_layer


class ParameterLayer(AdaptedLayer):
    """One adapted parameter of a module. Several of one module are nested, in the module's order, the last outermost.

    Which parameter one means follows from the nesting alone, in memory and in checkpoints, as in PEFT:
    ``experts.lora_A`` belongs to the last adapted parameter, ``experts.base_layer.lora_A`` to the one before it. The
    outermost runs the module, once, with all its rewritten parameters.
    """

    @property
    def leaf_layer(self) -> nn.Module:
        return self.get_base_layer()

    @property
    def parameter_name(self) -> str:
        """Name of the parameter that this layer adapts."""
        return self.kind.weight_name

    def _run(self, chain: tuple[Entry, ...], args: tuple[Any, ...], kwargs: dict[str, Any], off: bool = False) -> Any:
        nest: list[Nested] = [(self, chain, off)]
        for layer in parameter_layers(self.base_layer):
            hidden = off or not layer.enabled
            over = () if hidden else layer.chain(call_in_force(self.state, self.training))
            nest.append((layer, over, hidden))
        return run_nest(self.leaf_layer, nest, args, kwargs)

    def _run_named(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nest: list[Nested] = [(layer, layer.entries.get(name, ()), False) for layer in parameter_layers(self)]
        return run_nest(self.leaf_layer, nest, args, kwargs)

    def extra_repr(self) -> str:
        return f"parameter={self.parameter_name}, {super().extra_repr()}"


def plan_parameters(made: Plan, everything: list[Place]) -> None:
    """Add a placement for every parameter that ``target_parameters`` means.

    Raises:
        TargetError: a match lies in a layer that is adapted as a whole, or is trained in full.
        UnsupportedError: another adapter adapts other parameters of the same module, or the module is the root.
    """
    from inlay.core.plan import place_method
    from inlay.kinds.stacked import Stacked

    targets = getattr(made.method.config, "target_parameters", None)
    if not targets:
        return
    if getattr(made.config, "fan_in_fan_out", False):
        raise UnsupportedError(
            "fan_in_fan_out: expected False with target_parameters; how a bare parameter is stored follows from its "
            "shape and from is_transposed of its module"
        )
    match = matcher(targets)
    for name in made.model._parameters:
        if match(name) is not None:
            raise UnsupportedError(
                f"target_parameters: {name!r} belongs to the model itself ({type(made.model).__name__}) and "
                "adapters can only stand for modules inside it; wrap the model in another module"
            )
    hit: set[str] = set()
    names: list[str] = []
    layers = {id(p.place.module) for p in made.placements}
    for place in everything:
        found: dict[str, str] = {}
        for name, parameter in place.base._parameters.items():
            paths = [f"{path}.{name}" for path in (place.path, *place.aliases)]
            names += paths[:1]
            pattern = next((p for p in map(match, paths) if p is not None), None)
            if parameter is None or pattern is None or not _admitted(made, place.path, name):
                continue
            found[name] = pattern
        if not found:
            continue
        _check(place, list(found), id(place.module) in layers)
        for name, pattern in found.items():
            hit.add(pattern)
            made.matched.setdefault(pattern, []).append(f"{place.path}.{name}")
            kind = Stacked(name)
            site = kind.site(f"{place.path}.{name}", place.base)
            made.placements.append(place_method(made, place, pattern, made.method, kind, site))
    for pattern in set(targets) - hit:
        made.unmatched[f"target_parameters: {pattern}"] = nearest(pattern, names)


def _admitted(made: Plan, path: str, name: str) -> bool:
    """Whether ``exclude_modules`` and ``layers_to_transform`` leave a parameter in; PEFT does not ask them."""
    config = made.method.config
    if not made.policy.strict_targets:
        return True
    if getattr(config, "exclude_modules", None):
        exclude = matcher(config.exclude_modules)
        if exclude(path) is not None or exclude(f"{path}.{name}") is not None:
            return False
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None:
        return True
    return layer_index(f"{path}.{name}", config.layers_pattern) in ({wanted} if isinstance(wanted, int) else wanted)


def _check(place: Place, names: list[str], targeted: bool) -> None:
    """Refuse a module where nesting could not tell which parameter is which."""
    here = place.module
    if targeted or (isinstance(here, AdaptedLayer) and not isinstance(here, ParameterLayer)):
        raise TargetError(
            f"target_parameters: {place.path!r} is adapted as a layer, so its parameter {names[0]!r} cannot be adapted "
            "as well; leave it out of target_modules (set target_modules=[] where the model family's defaults name it)"
        )
    held = [layer.parameter_name for layer in parameter_layers(here) if layer.entries]
    if held and set(held) != set(names):
        raise UnsupportedError(
            f"target_parameters: another adapter adapts {_listed(held)} of {place.path!r} and this {_listed(names)}; "
            "names in the model and in checkpoints tell parameters apart by nesting alone, so all adapters of a module "
            "must target the same ones"
        )
    if isinstance(here, ModuleCopies):
        raise TargetError(f"target_parameters: {place.path!r} is trained in full by modules_to_save of another adapter")


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
