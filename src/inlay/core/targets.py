"""Which layers a configuration means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from inlay.core.follow import Follower, base_modules, follower_of
from inlay.core.kind import kind_of
from inlay.core.layer import AdaptedLayer
from inlay.core.shared import shared_names
from inlay.core.state import State, find_states

__all__ = [
    "ALL_LINEAR",
    "Place",
    "Survey",
    "base_parameters",
    "first_standing",
    "linear_paths",
    "places",
    "shortened",
    "standing",
]

ALL_LINEAR = "all-linear"

_SET = nn.Module.__setattr__  # as torch has it, whatever somebody puts in its place later


@dataclass(slots=True, eq=False)
class Place:
    """A module of the model as it was before any adapter came.

    Attributes:
        path: dotted path, without the segments that adapters add.
        module: the module that stands there, adapted or not.
        parents: every (parent module, attribute) that holds it; more than one where the model shares a module.
        aliases: further paths of the same module.
    """

    path: str
    module: nn.Module
    parents: list[tuple[nn.Module, str]]
    aliases: list[str]
    _base: nn.Module | None = field(default=None, repr=False)

    @property
    def base(self) -> nn.Module:
        """The unadapted module."""
        base = self._base
        if base is None:
            base = self._base = self.module.get_base_layer() if isinstance(self.module, AdaptedLayer) else self.module
        return base

    def put(self, module: nn.Module) -> None:
        """Let another module stand here."""
        for parent, name in self.parents:
            if type(parent).__setattr__ is _SET:
                parent._modules[name] = module  # which is all that it does, after long checks
            else:
                setattr(parent, name, module)


def places(model: nn.Module) -> list[Place]:
    """Return every module of the model but the root, in the order of ``named_modules``.

    Adapters' own modules are passed over. A module that the model holds at several places has the first one's path.
    Where a layer that others wrote stands over a module, that layer is the module's parent.
    """
    return Survey(model).places


def standing(model: nn.Module) -> list[tuple[Place, Follower]]:
    """Return what adapters put into the model, with its places; what stands over another thing comes after it."""
    return Survey(model).standing


class Survey:
    """What a model consists of, adapters passed over; found in one pass, so it is true until the model changes.

    Attributes:
        model: the model.
        places: those of its modules, as :func:`places` has them.
        covers: those of the layers that others wrote over some of these.
    """

    def __init__(self, model: nn.Module) -> None:
        covers: dict[int, Place] = {}
        self.model = model
        self.places = list(_visited(model, covers))
        self.covers = list(covers.values())

    @cached_property
    def standing(self) -> list[tuple[Place, Follower]]:
        """What :func:`standing` returns."""
        answering = ((place, follower_of(place.module)) for place in (*self.places, *reversed(self.covers)))
        return [(place, follower) for place, follower in answering if follower is not None]

    @cached_property
    def modules(self) -> list[nn.Module]:
        """What :func:`inlay.core.follow.base_modules` yields, in another order."""
        found = [self.model]
        for place in (*self.covers, *self.places):
            module: Any = place.module
            while isinstance(module, AdaptedLayer):  # one stands on another where several parameters are adapted
                found.append(module)
                module = module._modules["base_layer"]
            if isinstance(module, Follower):
                found += base_modules(module)
            else:
                found.append(module)
        return found

    @cached_property
    def states(self) -> list[State]:
        """The states of the model's parts, as :func:`inlay.core.state.find_states` returns them."""
        return find_states(self.model, self.modules)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's own parameters by the name that each has without adapters."""
        found: dict[str, nn.Parameter] = {}
        seen: set[int] = set()

        def take(before: str, held: dict[str, nn.Parameter | None]) -> None:
            for name, parameter in held.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    found[before + name] = parameter

        root = follower_of(self.model)
        if root is not None:
            return base_parameters(_below(root))
        take("", self.model._parameters)
        for place in self.places:
            base = place.base
            if base._parameters:
                take(f"{place.path}.", base._parameters)
            if isinstance(base, Follower):
                take(f"{place.path}.", base_parameters(_below(base)))  # type: ignore[arg-type]  # none of them is None
        return found


def _below(follower: Follower) -> nn.Module:
    below: Any = follower.standing._modules[follower.base_attribute]
    return below


def _visited(model: nn.Module, covers: dict[int, Place]) -> Iterator[Place]:
    """Iterate over the places of modules; parents and aliases of one may still come while the others are visited."""
    found: dict[int, Place] = {}
    todo: list[tuple[str, nn.Module, str, nn.Module]] = []
    _enter(todo, model, "")
    while todo:
        path, parent, name, module = todo.pop()
        key = id(module)
        known = found.get(key) or covers.get(key)
        if known is not None:
            known.parents.append((parent, name))
            known.aliases.append(path)
            continue
        follower = follower_of(module)
        place = Place(path, module, [(parent, name)], [], module if follower is None else None)
        if follower is not None and follower is not module:
            covers[key] = place
            below = module._modules.get(follower.base_attribute)
            if below is not None:
                todo.append((path, module, follower.base_attribute, below))
            continue
        found[key] = place
        yield place
        if follower is None:
            if module._modules:
                _enter(todo, module, path)
        elif isinstance(module, AdaptedLayer):
            _enter(todo, module.get_base_layer(), path)


def _enter(todo: list[tuple[str, nn.Module, str, nn.Module]], parent: nn.Module, path: str) -> None:
    """Put (path, parent, name, module) of the modules right below one on a stack, the first on top."""
    children = parent._modules
    if not children:
        return
    passed = shared_names(parent)
    before = f"{path}." if path else ""
    for name in reversed(children):
        child = children[name]
        if child is not None and name not in passed:
            todo.append((before + name, parent, name, child))


def first_standing(model: nn.Module) -> tuple[str, Follower] | None:
    """Return the first thing that adapters put into the model, with its path."""
    covers: dict[int, Place] = {}
    for place in _visited(model, covers):
        for one in (*covers.values(), place):
            follower = follower_of(one.module)
            if follower is not None:
                return one.path, follower
    return None


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's own parameters by the name that each has without adapters."""
    return Survey(model).parameters


def linear_paths(model: nn.Module, everything: list[Place], task_type: Any) -> set[str]:
    """Return what ``all-linear`` means: every linear layer but the output head.

    The head is what ``get_output_embeddings()`` returns; for sequence and token classification, the new layer on top.
    """
    heads: set[int] = set()
    output = getattr(model, "get_output_embeddings", None)
    if callable(output):
        try:
            head = output()
        except NotImplementedError:
            head = None
        if head is not None:
            heads.add(id(head))
            heads.add(id(getattr(head, "base_layer", head)))
    task = str(getattr(task_type, "value", task_type))
    named = {"classifier", "score"} if task in ("SEQ_CLS", "TOKEN_CLS") else set()
    found = set()
    known: dict[type[nn.Module], bool] = {}
    for place in everything:
        base = place.base
        linear = known.get(type(base))
        if linear is None:
            kind = kind_of(base)
            linear = known[type(base)] = kind is not None and kind.all_linear
        if not linear or id(base) in heads or id(place.module) in heads:
            continue
        if named and not named.isdisjoint(place.path.split(".")):
            continue
        found.add(place.path)
    return found


def shortened(chosen: set[str], everything: Iterable[str]) -> list[str]:
    """Return the shortest suffixes that mean exactly the chosen paths."""
    others = [path for path in everything if path not in chosen]
    names = {path.rpartition(".")[2] for path in others}
    found = {path.rpartition(".")[2] for path in chosen}
    if not found.isdisjoint(names):
        taken = {suffix for path in others for suffix in _suffixes(path)}
        found = {next((s for s in _suffixes(path) if s not in taken), path) for path in chosen}
    return sorted(found)


def _suffixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
