"""The one object that knows, for a model, which adapters there are and which are on."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from inlay.core.policy import INLAY, Policy
from inlay.errors import AdapterNameError, StateError, UnknownAdapterError, did_you_mean

if TYPE_CHECKING:
    from inlay.core.fixed import FixedSlots
    from inlay.core.follow import Follower
    from inlay.core.gradients import Reach
    from inlay.core.method import Method
    from inlay.core.replicate import Replication
    from inlay.core.slot import Slot


__all__ = ["BASE", "Record", "State", "check_adapter_name", "find_state", "find_states"]

# The name that stands for "no adapter" where adapters are chosen by sample.
BASE = "__base__"


@dataclass
class Record:
    """One registered adapter.

    Attributes:
        config: as the user sees and may change it; written back on save.
        method: holds its own snapshot of the config, taken at planning.
        seed: what initial values were drawn from.
        frozen: created for inference: activating it does not make it trainable.
        shared: slots of the tensors that all its layers share, by role; they hang below ``State.shared``.
        biases: names of the base biases that train with it.
        rebased: base tensors that its start changed, as they were before (name -> tensor).
        saved: values of config fields that are saved instead of those that ``config`` shows.
        translation: what turns the adapter's tensors into those of a checkpoint and back, where that is not left to
            slots; see ``checkpoint.translation``.
        slot: it is a place for registered adapters; see ``inlay.residency``.
        reach: where its gradients are switched, once that was looked up; see ``core.gradients``.
    """

    config: Any
    method: Method
    seed: int
    frozen: bool = False
    shared: dict[str, Slot] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    rebased: dict[str, Tensor] = field(default_factory=dict, repr=False)
    saved: dict[str, Any] = field(default_factory=dict)
    translation: Any = None
    slot: bool = False
    memory: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    reach: Reach | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reach": None}


class Residency(Protocol):
    """What knows registered adapters, and can bring them into a model; see ``inlay.residency``."""

    def placed(self, names: Iterable[str]) -> AbstractContextManager[list[str]]: ...

    def shown(self, names: Iterable[str]) -> list[str]: ...


@dataclass(eq=False)
class State:
    """Defaults for every adapted layer of one model, shared by reference.

    Attributes:
        policy: see ``core.policy``.
        records: adapters by name, in the order they came.
        active: names in activation order; a layer may override it for itself.
        enabled: False switches every adapter off.
        version: grows with every change that a layer's cached chain depends on.
        shared: home of the tensors that several layers use; its children are registered at the model's root, which
            gives ``vera_A.<adapter>`` the name that the slot says.
        base_values: base tensors that training or an initialiser may change, as they were (name -> tensor).
        base_grad: ``requires_grad`` of the base parameters before the first adapter came.
        replication: the list of blocks that ``layer_replication`` replaced, to be put back.
        training: adapters whose gradients may be on; the others are not looked at when adapters are switched. Who
            switches gradients on by hand, and not by adapter, is left alone.
        residency: knows adapters that are registered and not in the model, if there are any.
        coupled: some adapter's method couples the samples of a batch.
        penalised: some adapter's method has a term of the loss.
        roster: grows with every layer that comes or goes, or has something merged.
        fixed: places that compiled code has the active adapters in, where the model was prepared for that.
    """

    policy: Policy = INLAY
    records: dict[str, Record] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    version: int = 0
    shared: nn.Module = field(default_factory=nn.Module)
    base_values: dict[str, Tensor] = field(default_factory=dict)
    base_grad: dict[str, bool] = field(default_factory=dict)
    replication: Replication | None = None
    training: set[str] = field(default_factory=set)
    residency: Residency | None = field(default=None, repr=False)
    fixed: FixedSlots | None = field(default=None, repr=False)
    coupled: bool = False
    penalised: bool = False
    roster: int = field(default=0, repr=False)
    _layers: dict[int, weakref.ref[Any]] = field(default_factory=dict, repr=False)
    _apart: dict[int, weakref.ref[Any]] = field(default_factory=dict, repr=False)
    _holder: weakref.ref[nn.Module] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Layers enter themselves when they are rebuilt, so a copy of a subtree splits off a state of its own.
        # So does the module that holds the shared tensors.
        # Adapters that are registered elsewhere stay with the original, and so do the places of compiled code.
        return {**self.__dict__, "_layers": {}, "_apart": {}, "_holder": None, "residency": None, "fixed": None}

    @contextmanager
    def placed(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Yield the names that adapters have in the model; registered ones are there as long as the block runs."""
        if self.residency is None:
            yield list(names)
            return
        with self.residency.placed(names) as held:
            yield held

    def shown(self) -> list[str]:
        """Return the active adapters by the names that users know."""
        return list(self.active) if self.residency is None else self.residency.shown(self.active)

    def touch(self) -> None:
        """Make every layer resolve its chain anew."""
        self.version += 1
        if self.fixed is not None:
            self.fixed.follow(self)

    def hold_shared(self, holder: nn.Module) -> None:
        """Let ``holder``, a wrapper around the model, register the shared tensors instead of the model itself."""
        self._holder = weakref.ref(holder)

    @property
    def wrapped(self) -> bool:
        """Whether a wrapper around the model holds this state."""
        return self._holder is not None and self._holder() is not None

    def holder(self, root: nn.Module) -> nn.Module:
        """Return the module that registers the shared tensors: ``root``, unless a wrapper does."""
        held = None if self._holder is None else self._holder()
        return root if held is None else held

    def enter(self, layer: Follower) -> None:
        """Add an adapted layer (layers do this themselves)."""
        self.roster += 1
        self._layers.pop(id(layer), None)  # of one that is gone, whose address this one has
        self._layers[id(layer)] = weakref.ref(layer)
        if self._apart or layer.is_apart:
            self.set_apart(layer)

    def leave(self, layer: Follower) -> None:
        """Forget an adapted layer that was taken out of the model."""
        self.roster += 1
        self._layers.pop(id(layer), None)
        self._apart.pop(id(layer), None)

    def set_apart(self, layer: Follower) -> None:
        """Note whether a layer has active adapters, or a switch, of its own, so that it must be told to follow."""
        if layer.is_apart:
            self._apart[id(layer)] = weakref.ref(layer)
        else:
            self._apart.pop(id(layer), None)

    def apart(self) -> list[Any]:
        """Return the layers that do not just do what the state says."""
        return [layer for layer in (ref() for ref in self._apart.values()) if layer is not None]

    def layers(self) -> Iterator[Any]:
        """Iterate over the adapted layers that are alive, in the order of injection."""
        for ref in list(self._layers.values()):
            layer = ref()
            if layer is not None:
                yield layer

    def training_beside(self, names: Container[str]) -> list[str]:
        """Return the adapters whose gradients may be on, but for those named."""
        return [name for name in self.training if name not in names and name in self.records]

    def record(self, name: str) -> Record:
        """Return the record of an adapter.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        if name not in self.records:
            known = ", ".join(map(repr, self.records)) or "none"
            raise UnknownAdapterError(f"no adapter {name!r}; there are: {known}.{did_you_mean(name, self.records)}")
        return self.records[name]


def check_adapter_name(name: object, taken: Container[str] | None = None) -> str:
    """Return ``name`` if it can name an adapter.

    Raises:
        AdapterNameError: not a string, empty, with a dot or a path separator in it, ``__base__``, ``training``, or
            taken.
    """
    if not isinstance(name, str) or not name:
        raise AdapterNameError(f"an adapter name must be a non-empty string, found {name!r}")
    bad = sorted({char for char in name if char in "./\\\0*" or not char.isprintable()})
    if bad or name in (BASE, "training"):  # torch assigns to `training` on every module, also on those that hold names
        why = f"it contains {', '.join(map(repr, bad))}" if bad else "it is reserved"
        raise AdapterNameError(
            f"{name!r} cannot name an adapter: {why}. The name becomes part of parameter names and of a folder"
        )
    if taken is not None and name in taken:
        raise AdapterNameError(f"there is already an adapter {name!r}; delete it first or take another name")
    return name


def find_states(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> list[State]:
    """Return the states of a model: none, one, or several if its parts were given adapters separately.

    ``modules`` is what :func:`inlay.core.follow.base_modules` yields, where that is known.
    """
    from inlay.core.follow import base_modules

    found: dict[int, State] = {}
    for module in base_modules(model) if modules is None else modules:
        own = module.__dict__
        if "_state" in own and isinstance(own["_state"], State):
            found.setdefault(id(own["_state"]), own["_state"])
    return list(found.values())


def find_state(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> State | None:
    """Return the state of a model that has adapters, or None; ``modules`` as :func:`find_states` takes them.

    Raises:
        StateError: its parts were given adapters separately, and so far nothing into the whole.
    """
    states = find_states(model, modules)
    if len(states) < 2:
        return states[0] if states else None
    parts = "; ".join(", ".join(map(repr, state.records)) for state in states)
    raise StateError(
        f"parts of this {type(model).__name__} were given adapters separately ({parts}); pass the part that is "
        "meant, or inject into the whole, which joins them"
    )
