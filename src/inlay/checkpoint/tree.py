"""The live module tree as checkpoints see it: names come from walking it, never from taking names apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor, nn

from inlay.core.follow import follower_of
from inlay.core.shared import shared_names
from inlay.core.state import State, find_state
from inlay.errors import StateError

__all__ = ["MODEL_PREFIX", "ROOT_PREFIX", "Node", "Tree", "bare_model", "persistent_tensors", "unwrapped"]

MODEL_PREFIX = "base_model.model."  # what stands before a layer's path in a checkpoint
ROOT_PREFIX = "base_model."  # what stands before the name of a tensor that layers share

# Wrappers that add a segment to memory names and none to a checkpoint's: class -> the attribute below it.
TRANSPARENT = {
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
}


def unwrapped(module: nn.Module) -> tuple[nn.Module, str]:
    """Return the module below transparent wrappers, and the memory segments they add (``_orig_mod.``)."""
    passed = ""
    while True:
        attribute = _below(type(module))  # type: ignore[arg-type]  # mypy takes a class for unhashable
        inner = None if attribute is None else module._modules.get(attribute)
        if inner is None:
            return module, passed
        module, passed = inner, f"{passed}{attribute}."


@lru_cache(maxsize=1024)  # bounded: FSDP makes classes, and a model has few
def _below(cls: type[nn.Module]) -> str | None:
    """Return the attribute below which a transparent wrapper has its module; None for any other class."""
    for base in cls.__mro__:
        if base.__name__ in TRANSPARENT and base.__module__.partition(".")[0] in ("torch", "deepspeed"):
            return TRANSPARENT[base.__name__]
    return None


@dataclass(eq=False, slots=True)
class Node:
    """One module of the model.

    Attributes:
        module: the module itself, below transparent wrappers.
        path: where it stands now, without transparent wrappers (``lin.base_layer``); what checkpoints call it.
        memory: the same with them, as ``state_dict()`` of the whole says.
        original: where it stands in the model without adapters (``lin``).
    """

    module: nn.Module
    path: str
    memory: str
    original: str


class Tree:
    """A model with adapters, bare or in a ``PeftModel``, and every module of it but those that adapters brought.

    Attributes:
        root: what was given, below transparent wrappers.
        bare: the model itself.
        wrapped: whether ``root`` is a wrapper around ``bare``; if not, keys have no ``base_model.model.``.
        state: the adapters' state.
        nodes: every module, parents first; one that stands at several places is there once.

    Raises:
        StateError: the model has no adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.root, _ = unwrapped(model)
        self.bare, memory = bare_model(model)
        self.wrapped = self.bare is not self.root
        self.nodes = list(_walk(self.bare, memory))
        self.state = self._state()
        self._by_id = {id(node.module): node for node in self.nodes}

    def _state(self) -> State:
        """Return the state that the modules follow; what adapters hang below them, which may be much, is not read."""
        found: State | None = None
        for node in self.nodes:
            held = node.module.__dict__.get("_state")
            if isinstance(held, State) and held is not found:
                if found is not None:
                    break  # several: let the error be told where it is told to others
                found = held
        else:
            if found is not None:
                return found
        found = find_state(self.bare)
        if found is None:
            raise StateError(f"{type(self.bare).__name__} has no adapters")
        return found

    def node(self, module: nn.Module) -> Node | None:
        """Return the node of a module, or None where it is not in the tree."""
        return self._by_id.get(id(unwrapped(module)[0]))

    def owner_name(self, tensor: Tensor) -> str | None:
        """Return the first name that a base tensor has in the model without adapters."""
        for node in self.nodes:
            for table in (node.module._parameters, node.module._buffers):
                for name, held in table.items():
                    if held is tensor:
                        return f"{node.original}.{name}" if node.original else name
        return None


def bare_model(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the model below every wrapper, and what its memory names start with.

    A wrapper is transparent, or a class with ``get_base_model`` that holds the model as ``base_model.model``.
    """
    root, memory = unwrapped(model)
    held = root._modules.get("base_model")
    if held is None or not callable(getattr(type(root), "get_base_model", None)):
        return root, memory
    tuner, passed = unwrapped(held)
    inner = tuner._modules.get("model")
    if inner is None:
        return root, memory
    bare, below = unwrapped(inner)
    return bare, f"{memory}base_model.{passed}model.{below}"


def _walk(bare: nn.Module, memory: str) -> Iterator[Node]:
    """Yield every module, depth first in the order of registration."""
    seen: set[int] = set()
    plain: set[type] = set()  # classes that wrap nothing, which nearly all of a model's are
    todo = [Node(bare, "", memory.removesuffix("."), "")]
    while todo:
        node = todo.pop()
        module = node.module
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield node
        children = module._modules
        if not children:
            continue
        follower = follower_of(module)
        passed = shared_names(module)
        path, memory, original = (f"{name}." if name else "" for name in (node.path, node.memory, node.original))
        if follower is not None:
            children = {follower.base_attribute: children.get(follower.base_attribute)}
        for name in reversed(children):
            child = children[name]
            if child is None or name in passed:
                continue
            here = memory + name
            if type(child) not in plain:
                if _below(type(child)) is None:  # type: ignore[arg-type]  # mypy takes a class for unhashable
                    plain.add(type(child))
                child, between = unwrapped(child)
                here = f"{here}.{between[:-1]}" if between else here
            todo.append(Node(child, path + name, here, original + name if follower is None else node.original))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def persistent_tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (dotted name, owner, attribute) of every parameter and saved buffer of a plain module."""
    todo = [("", module)]
    while todo:
        path, held = todo.pop(0)
        held, _ = unwrapped(held)
        for name, parameter in held._parameters.items():
            if parameter is not None:
                yield _joined(path, name), held, name
        for name, buffer in held._buffers.items():
            if buffer is not None and name not in held._non_persistent_buffers_set:
                yield _joined(path, name), held, name
        todo[:0] = [(_joined(path, name), child) for name, child in held._modules.items() if child is not None]
