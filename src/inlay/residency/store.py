"""Many adapters by name, of which a fixed number is in the model at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from inlay.checkpoint.tree import bare_model
from inlay.core.state import BASE, State
from inlay.errors import AdapterNameError, ConfigError, UnknownAdapterError, did_you_mean
from inlay.residency.building import add_slots, remove_slots
from inlay.residency.host import Arena, Folder, packed
from inlay.residency.occupancy import Occupancy
from inlay.residency.reading import HostCache
from inlay.residency.slots import Fitted, Slots

__all__ = ["AdapterStore"]


class AdapterStore:
    """Adapters that are registered by name, and slots in the model that those in use are copied into.

    ::

        store = inlay.AdapterStore(model, LoraConfig(r=64, target_modules="all-linear"), max_resident=16)
        for name, folder in customers.items():
            store.register(name, folder)
        model.set_adapter("customer 17")
        model(batch, adapter_names=["customer 17", "customer 4711", "__base__"])

    A registered adapter costs one small object, whatever the model's size. Its name can be used wherever the name of
    an adapter in the model can: using it copies its tensors into a free slot, or into the one that was not used for
    the longest time. The model has the same modules all the time, so switching and evicting compile nothing anew.

    Adapters that are active, pinned, or in use by a running forward are not evicted, and neither are those that were
    changed since they were copied in (trained, for instance). Every method may be called by any thread.

    Args:
        model: a ``PeftModel`` or a bare model, with or without adapters of its own; the slots are added to it.
        config: what a slot has room for: the method, the layers, and as ``r`` the largest rank.
        max_resident: how many slots.
        max_host: how many adapters are kept in this machine's memory after they were read, so that using them again
            reads no file; those that were registered from memory do not count.
        autocast_adapter_dtype: the slots of a half-precision model are in float32.

    Raises:
        ConfigError: a number is out of range, or the config asks for more than tensors at layers.
        what :func:`inlay.plan` raises. In each case the model is as before.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        *,
        max_resident: int = 8,
        max_host: int = 0,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        for what, number, least in (("max_resident", max_resident, 1), ("max_host", max_host, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ConfigError(f"{what}: expected a whole number of at least {least}, found {number!r}")
        self._model = model
        self._sources: dict[str, Folder | Arena] = {}
        self._changed = threading.Condition(threading.RLock())
        names = add_slots(model, config, max_resident, autocast_adapter_dtype)
        try:
            self._slots = Slots(bare_model(model)[0], names)
        except BaseException:
            remove_slots(model, names)
            raise
        self._host = HostCache(max_host, len(names), lambda: self._pins_memory)
        self._occupancy = Occupancy(self._slots, self._changed)
        self._state.residency = self

    @property
    def _state(self) -> State:
        return self._slots.state

    # -- what is registered ------------------------------------------------------------------------------------------

    def register(
        self,
        name: str,
        source: str | os.PathLike[str] | tuple[Any, Mapping[str, Tensor]],
        *,
        subfolder: str | None = None,
        check: bool = True,
        **hub_keywords: Any,
    ) -> None:
        """Give an adapter a name; no tensor is read from a file, and nothing is added to the model.

        Args:
            name: any string but ``__base__`` and the names of the model's own adapters.
            source: a folder or a Hub repository; or a configuration and tensors by the keys of a checkpoint, which
                are copied into one tensor.
            subfolder: a folder inside ``source``.
            check: read the configuration and the shapes now, and refuse what does not fit; otherwise this is done
                when the adapter is used for the first time.
            hub_keywords: revision, token, ... of ``huggingface_hub.hf_hub_download``.

        Raises:
            AdapterNameError: the name is taken or reserved.
            CheckpointError: files are missing or damaged.
            ConfigError: another method than the slots are for, or more than tensors at layers.
            CheckpointMismatchError: other layers, a larger rank, or other shapes than the slots have.
        """
        if not isinstance(name, str) or not name or name == BASE:
            raise AdapterNameError(f"expected a name other than {BASE!r}, found {name!r}")
        if isinstance(source, tuple):
            config, tensors = source
            self._slots.fitted(name, config, tensors)
            held: Folder | Arena = packed(config, tensors, self._pins_memory)
        else:
            held = Folder(os.fspath(source), subfolder, dict(hub_keywords) or None)
            if check:
                self._slots.fitted(name, *held.read())
        with self._changed:
            if name in self._sources or name in self._state.records:
                where = "registered" if name in self._sources else "an adapter of the model"
                raise AdapterNameError(f"{name!r} is {where} already; unregister it first or take another name")
            self._sources[name] = held

    def unregister(self, name: str) -> None:
        """Forget an adapter, and what was changed of it in its slot.

        Raises:
            UnknownAdapterError: it is not registered.
            StateError: it is active, pinned or in use.
        """
        with self._changed:
            self._known(name)
            if name in self._occupancy.at:
                self._occupancy.drop(name, changed=True)
            self._sources.pop(name)
            self._host.forget(name)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._sources))

    def _known(self, name: str) -> Folder | Arena:
        if name not in self._sources:
            raise UnknownAdapterError(
                f"no adapter {name!r} is registered; there are {len(self._sources)}.{did_you_mean(name, self._sources)}"
            )
        return self._sources[name]

    # -- what is resident --------------------------------------------------------------------------------------------

    @property
    def resident(self) -> tuple[str, ...]:
        """Adapters that are in a slot, the last used one last."""
        with self._changed:
            return tuple(self._occupancy.at)

    @property
    def pinned(self) -> frozenset[str]:
        """Adapters that stay in their slots."""
        with self._changed:
            return frozenset(self._occupancy.pinned)

    @property
    def max_resident(self) -> int:
        """The number of slots."""
        return len(self._slots.names)

    @property
    def copies(self) -> int:
        """How often an adapter was copied into a slot so far."""
        return self._occupancy.copies

    def pin(self, name: str) -> None:
        """Make an adapter resident, and keep it so.

        Raises:
            UnknownAdapterError: it is not registered.
            StateError: no slot can be had.
        """
        with self._changed:
            self._occupancy.admit([self._checked(name)], self._fitted)
            self._occupancy.pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again.

        Raises:
            UnknownAdapterError: it is not registered.
        """
        with self._changed:
            self._known(name)
            self._occupancy.unpin(name)

    def evict(self, name: str) -> None:
        """Free an adapter's slot; it stays registered.

        Raises:
            UnknownAdapterError: it is not registered.
            StateError: it is active, pinned, in use, or was changed since it was copied in.
        """
        with self._changed:
            self._known(name)
            if name in self._occupancy.at:
                self._occupancy.drop(name)

    def prefetch(self, names: str | Iterable[str]) -> None:
        """Read adapters into this machine's memory, in another thread; using them then only copies them.

        What goes wrong there is raised when the adapter is used. At most ``max_host`` adapters are kept, or as many
        as there are slots if that is 0.

        Raises:
            UnknownAdapterError: one is not registered.
        """
        with self._changed:
            for name in [names] if isinstance(names, str) else names:
                source = self._known(name)
                if isinstance(source, Folder) and name not in self._occupancy.at:
                    self._host.prefetch(name, source)

    @property
    def _pins_memory(self) -> bool:
        return any(tensor.is_cuda for tensor in self._slots.tensors(self._slots.names[0])[:1])

    @contextmanager
    def placed(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Make adapters resident and keep them so inside the block; yields the model's names for them, in order.

        Names of the model's own adapters and ``__base__`` stand for themselves.

        Raises:
            UnknownAdapterError: a name is neither registered nor one of the model's.
            StateError: there are more distinct names than slots that can be had.
            what :meth:`register` raises, for an adapter that was not checked. No slot was changed then.
        """
        wanted = list(names)
        with self._changed:
            distinct = [name for name in dict.fromkeys(wanted) if not self._is_own(name)]
            places = self._occupancy.admit([self._checked(name) for name in distinct], self._fitted)
            self._occupancy.lease(distinct)
        try:
            yield [places.get(name, name) for name in wanted]
        finally:
            with self._changed:
                self._occupancy.release(distinct)

    def shown(self, names: Iterable[str]) -> list[str]:
        """Return adapter names with those of slots replaced by those of the adapters in them."""
        with self._changed:
            held = {slot: name for name, slot in self._occupancy.at.items()}
        return [held.get(name, name) for name in names]

    def _is_own(self, name: str) -> bool:
        return name == BASE or (name in self._state.records and name not in self._slots.names)

    def _checked(self, name: str) -> str:
        if name not in self._sources:
            own = [one for one in self._state.records if one not in self._slots.names]
            known = ", ".join(map(repr, own)) or "none"
            raise UnknownAdapterError(
                f"no adapter {name!r}: it is not registered, nor one of the model's ({known})."
                f"{did_you_mean(str(name), [*own, *self._sources])}"
            )
        return name

    def _fitted(self, name: str) -> Fitted:
        """Return an adapter ready to be copied, from memory where it is there."""
        return self._slots.fitted(name, *self._host.get(name, self._known(name)).read())

    def close(self) -> None:
        """Take the slots out of the model, and stop reading ahead. The adapters that are active in them go too."""
        with self._changed:
            self._host.close()
            self._state.residency = None
            remove_slots(self._model, [name for name in self._slots.names if name in self._state.records])
            self._sources.clear()
            self._occupancy.at.clear()

    def __repr__(self) -> str:
        taken = len(self._occupancy.at)
        return f"AdapterStore({len(self)} adapters registered, {taken} of {self.max_resident} slots taken)"
