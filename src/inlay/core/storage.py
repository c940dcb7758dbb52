"""How a layer's tensors are held. Kinds read and write through here; a storage knows no kind and no method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.core.registry import load_installed
from inlay.errors import UnsupportedError
from inlay.parallel.tensors import is_distributed, scatter

__all__ = ["Storage", "floating_dtype", "names", "onloaded", "read", "register_storage", "storage_of", "write"]


class Storage:
    """One way of holding weights: plain tensors here, quantised or offloaded ones elsewhere."""

    name: ClassVar[str] = "plain"
    writable: ClassVar[bool] = True

    def claims(self, module: nn.Module) -> bool:
        """Whether the module's tensors are held this way."""
        return True

    def read(self, module: nn.Module, name: str) -> Tensor:
        """Return a tensor as a plain one (a view where it already is)."""
        tensor: Tensor = getattr(module, name)
        if not tensor.is_floating_point():
            if load_installed():  # a storage of another package may know it
                return storage_of(module).read(module, name)
            raise UnsupportedError(
                f"the {name} of a {type(module).__name__} is held as {tensor.dtype}, which no installed storage reads"
            )
        return tensor

    @torch.no_grad()
    def write(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Overwrite a tensor in place, rounding to its dtype."""
        stored = getattr(module, name)
        stored.copy_(scatter(value, stored) if is_distributed(stored) else value)

    @contextmanager
    def onloaded(self, module: nn.Module) -> Iterator[None]:
        """Hold the module's tensors on a device where they can be computed with."""
        yield


PLAIN = Storage()
_storages: list[Storage] = [PLAIN]


def register_storage(storage: Storage) -> None:
    """Add a storage; later ones are asked first. One of the same class that is there already gives way."""
    _storages[:] = [storage, *(one for one in _storages if type(one) is not type(storage))]


def names() -> list[str]:
    """Return the names of all storages, in the order in which they are asked."""
    return [one.name for one in _storages]


def storage_of(module: nn.Module) -> Storage:
    """Return the storage that claims the module."""
    return next(storage for storage in _storages if storage.claims(module))


def read(module: nn.Module, name: str) -> Tensor:
    """Read one tensor of a module as a plain tensor."""
    return PLAIN.read(module, name) if len(_storages) == 1 else storage_of(module).read(module, name)


def write(module: nn.Module, name: str, value: Tensor) -> None:
    """Overwrite one tensor of a module.

    Raises:
        UnsupportedError: the storage cannot be written.
    """
    storage_of(module).write(module, name, value)


def onloaded(module: nn.Module) -> AbstractContextManager[None]:
    """Guard under which the module's tensors may be read."""
    return storage_of(module).onloaded(module)


def floating_dtype(module: nn.Module, name: str) -> torch.dtype | None:
    """Return the dtype of a tensor of the module, None where it is not floating or not there."""
    tensor = module._parameters.get(name)
    if tensor is None:
        tensor = getattr(module, name, None)
    return tensor.dtype if isinstance(tensor, Tensor) and tensor.is_floating_point() else None
